// Packing for AVX-512 with VBMI. A plan made once for the matrix (packed_plan.h) says where 64
// codes stand in a row; byte permutes bring them together, row by row, and 16 rows are then turned
// into lines and steps. Of dropped columns no code is unpacked.
#include "kernels/packed_strip.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstddef>
#include <cstring>

#include "kernels/linear_types.h"
#include "kernels/packed_plan.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")

namespace coreinfer {
namespace {

using Rows = const uint8_t* const (&)[kStripRows];

alignas(64) constexpr uint8_t kZeros[64 * ByteFetch::kMaxWindows] = {};

template <int kWindows>
inline void fetch_windows(const ByteFetch& f, Rows rows, int64_t at, __m512i (&out)[kStripRows]) {
  const __m512i index = _mm512_load_si512(f.index);
  for (int r = 0; r < kStripRows; ++r) {
    const uint8_t* const from = rows[r] == nullptr ? kZeros : rows[r] + at + f.base;
    const auto window = [&](int w) {
      return w + 1 < kWindows ? _mm512_loadu_si512(from + 64 * w)
                              : _mm512_maskz_loadu_epi8(f.last, from + 64 * w);
    };
    __m512i bytes = _mm512_permutexvar_epi8(index, window(0));
    for (int w = 1; w < kWindows; ++w) {
      bytes = _mm512_mask_permutexvar_epi8(bytes, f.take[w], index, window(w));
    }
    out[r] = bytes;
  }
}

// The bytes of each row.
void fetch(const ByteFetch& f, Rows rows, int64_t at, __m512i (&out)[kStripRows]) {
  static_assert(ByteFetch::kMaxWindows == 5);
  switch (f.n_windows) {
    case 1:
      return fetch_windows<1>(f, rows, at, out);
    case 2:
      return fetch_windows<2>(f, rows, at, out);
    case 3:
      return fetch_windows<3>(f, rows, at, out);
    case 4:
      return fetch_windows<4>(f, rows, at, out);
    default:
      return fetch_windows<5>(f, rows, at, out);
  }
}

// Bytes shifted down by 2 and by 4 where the masks say; what comes in from above stays.
inline __m512i shift_down(__m512i v, __mmask64 by_2, __mmask64 by_4) {
  v = _mm512_mask_mov_epi8(v, by_2, _mm512_srli_epi16(v, 2));
  return _mm512_mask_mov_epi8(v, by_4, _mm512_srli_epi16(v, 4));
}

// A row's 64 codes, one a byte, from their bytes.
template <DType kType>
inline __m512i codes_of(const StepsPlan& p, __m512i low, __m512i high) {
  constexpr int kBits = packed_format(kType).bits;
  if constexpr (kBits == 8) return _mm512_xor_si512(low, _mm512_set1_epi8(-128));
  if constexpr (kBits == 2 || kBits == 3) {
    low = _mm512_and_si512(shift_down(low, p.low_by_2, p.low_by_4), _mm512_set1_epi8(3));
  } else {
    low = _mm512_mask_mov_epi8(low, p.low_by_4, _mm512_srli_epi16(low, 4));
    low = _mm512_and_si512(low, _mm512_set1_epi8(15));
  }
  if constexpr (kBits == 3 || kBits == 5) {
    const __mmask64 set = _mm512_test_epi8_mask(high, _mm512_load_si512(p.high_bit));
    low = _mm512_mask_add_epi8(low, set, low, _mm512_set1_epi8(1 << (kBits - 1)));
  }
  if constexpr (kBits == 6) {
    high = _mm512_and_si512(shift_down(high, p.high_by_2, p.high_by_4), _mm512_set1_epi8(3));
    low = _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
  }
  return low;
}

// Lines of the codes' bits from kShift on; kOnly: they have no others.
template <int kBits, int kShift, bool kOnly>
inline void lines_of(const __m512i (&codes)[kStripRows], __m512i (&lines)[2 * kBits]) {
  constexpr int kLines = 2 * kBits;
  const auto bits = [&](int row) {
    const __m512i v = kShift > 0 ? _mm512_srli_epi16(codes[row], kShift) : codes[row];
    return kOnly ? v : _mm512_and_si512(v, _mm512_set1_epi8((1 << kBits) - 1));
  };
  for (int i = 0; i < kLines; ++i) {
    lines[i] = bits(i);
    for (int part = 1; part < 8 / kBits; ++part) {
      const __m512i upper = _mm512_slli_epi16(bits(i + kLines * part), kBits * part);
      lines[i] = _mm512_or_si512(lines[i], upper);
    }
  }
}

// Four lines of 16 slots to slot after slot in each quarter of a vector: quarter q of to[k] has the
// four lines of step 4 * q + k.
inline void turn_four(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&to)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  to[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  to[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  to[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  to[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

// Lines to steps, [line][column]. Whole vectors are stored, so that what is read again is
// forwarded.
template <int kLines>
inline void turn(const __m512i (&lines)[kLines], uint8_t* to) {
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  const auto zip = [&](__m512i a, __m512i b, __m512i(&pairs)[2]) {
    pairs[0] = _mm512_permutex2var_epi64(a, first, b);
    pairs[1] = _mm512_permutex2var_epi64(a, second, b);
  };
  const auto put = [&](__m512i v) {
    _mm512_store_si512(to, v);
    to += 64;
  };
  __m512i ab[2], cd[2];
  if constexpr (kLines == 2) {
    const __m512i in_order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    put(_mm512_permutexvar_epi64(in_order, _mm512_unpacklo_epi32(lines[0], lines[1])));
    put(_mm512_permutexvar_epi64(in_order, _mm512_unpackhi_epi32(lines[0], lines[1])));
  } else {
    __m512i turned[kLines / 4][4];
    for (int i = 0; i < kLines / 4; ++i) {
      turn_four(lines[4 * i], lines[4 * i + 1], lines[4 * i + 2], lines[4 * i + 3], turned[i]);
    }
    for (int k = 0; k < 4; ++k) {
      if constexpr (kLines == 4) {
        put(turned[0][k]);
      } else {
        zip(turned[0][k], turned[1][k], ab);
        if constexpr (kLines == 16) zip(turned[2][k], turned[3][k], cd);
        for (int half = 0; half < 2; ++half) {
          if constexpr (kLines == 8) {
            put(ab[half]);
          } else {
            put(_mm512_shuffle_i64x2(ab[half], cd[half], 0x44));
            put(_mm512_shuffle_i64x2(ab[half], cd[half], 0xee));
          }
        }
      }
    }
  }
}

// Where the bytes of a step come from: as they are, or [column][line] in a tail.
template <int kLines>
struct StepOrder {
  alignas(64) uint8_t of[2][4 * kLines];  // whole, tail
};

template <int kLines>
constexpr StepOrder<kLines> step_order() {
  StepOrder<kLines> order{};
  for (int i = 0; i < 4 * kLines; ++i) {
    order.of[0][i] = static_cast<uint8_t>(i);
    order.of[1][i] = static_cast<uint8_t>(i % kLines * kStepCols + i / kLines);
  }
  return order;
}

// The steps of one plane to their places; kGroup: columns of whole groups.
template <int kLines, int kGroup>
inline void put_steps(const StepsPlan& p, int plane, const uint8_t* steps, std::byte* codes) {
  if (p.whole) {
    constexpr int kSteps = kGroup / kStepCols;  // that follow one another
    for (int i = 0; i < StepsPlan::kSteps; i += kSteps) {
      std::memcpy(codes + p.steps[i].plane[plane], steps + i * 4 * kLines, kSteps * 4 * kLines);
    }
    return;
  }
  static constexpr StepOrder<kLines> kOrder = step_order<kLines>();
  for (int i = 0; i < StepsPlan::kSteps; ++i) {
    const StepTarget& step = p.steps[i];
    const uint8_t* const from = steps + i * 4 * kLines;
    const uint8_t* const order = kOrder.of[step.n != kStepCols];
    std::byte* const to = codes + step.plane[plane];
    const uint64_t bytes = _bzhi_u64(~uint64_t{0}, static_cast<uint32_t>(step.n * kLines));
    if constexpr (kLines == 16) {
      const __m512i v = _mm512_load_si512(from);
      _mm512_mask_storeu_epi8(to, bytes, _mm512_permutexvar_epi8(_mm512_load_si512(order), v));
    } else if constexpr (kLines == 8) {
      const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i by = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
      _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(bytes), _mm256_permutexvar_epi8(by, v));
    } else {
      constexpr __mmask16 kRead = kLines == 4 ? 0xffff : 0x00ff;
      const __m128i v = _mm_maskz_loadu_epi8(kRead, from);
      const __m128i by = _mm_maskz_loadu_epi8(kRead, order);
      _mm_mask_storeu_epi8(to, static_cast<__mmask16>(bytes), _mm_shuffle_epi8(v, by));
    }
  }
}

template <int kBits, int kShift, bool kOnly, int kGroup>
inline void write_plane(const StepsPlan& p, const __m512i (&codes)[kStripRows], std::byte* to) {
  __m512i lines[2 * kBits];
  lines_of<kBits, kShift, kOnly>(codes, lines);
  alignas(64) uint8_t steps[StepsPlan::kSteps * 4 * 2 * kBits];
  turn(lines, steps);
  put_steps<2 * kBits, kGroup>(p, kShift > 0 ? 1 : 0, steps, to);
}

template <DType kType>
void pack_steps(const StepsPlan& p, Rows rows, int64_t at, std::byte* to) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kFirst = f.plane_bits(0), kSecond = f.plane_bits(1);
  constexpr int kGroup = traits(kType).group_size;
  __m512i low[kStripRows], high[kStripRows], codes[kStripRows];
  fetch(p.low, rows, at, low);
  if constexpr (kSecond != 0) fetch(p.high, rows, at, high);
  for (int r = 0; r < kStripRows; ++r) {
    codes[r] = codes_of<kType>(p, low[r], kSecond != 0 ? high[r] : low[r]);
  }
  write_plane<kFirst, 0, kSecond == 0, kGroup>(p, codes, to);
  if constexpr (kSecond != 0) write_plane<kSecond, kFirst, false, kGroup>(p, codes, to);
}

// 16 halves a group, row after row, from those of 8 groups a row: `from` is [row][group], 64 bytes
// from row to row.
inline void turn_halves(const uint8_t* from, const ScalesPlan& p, std::byte* to) {
  const __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4,
                                         27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
  __m512i four[4];  // four rows: [group][row]
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int r) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(from + 64 * (4 * i + r)));
    };
    __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
    v = _mm512_inserti32x4(_mm512_inserti32x4(v, row(2), 2), row(3), 3);
    four[i] = _mm512_permutexvar_epi16(order, v);
  }
  alignas(64) uint8_t halves[2][2][64];  // rows below 8 and from 8 on; even and odd groups
  for (int half = 0; half < 2; ++half) {
    const __m512i a = four[2 * half], b = four[2 * half + 1];
    _mm512_store_si512(halves[half][0], _mm512_unpacklo_epi64(a, b));
    _mm512_store_si512(halves[half][1], _mm512_unpackhi_epi64(a, b));
  }
  for (int g = 0; g < p.n; ++g) {
    std::memcpy(to + p.to[g], halves[0][g % 2] + 16 * (g / 2), 16);
    std::memcpy(to + p.to[g] + 16, halves[1][g % 2] + 16 * (g / 2), 16);
  }
}

template <DType kType>
void pack_scales(const ScalesPlan& p, Rows rows, int64_t at, std::byte* to) {
  __m512i bytes[kStripRows];
  fetch(p.fetch, rows, at, bytes);
  const auto* const d = reinterpret_cast<const uint8_t*>(bytes);
  turn_halves(d, p, to);
  if constexpr (packed_format(kType).scales == ScaleKind::kHalfPair)
    turn_halves(d + 16, p, to + 32);
}

// --- super-blocks ---

// 16 bytes of four rows.
inline __m512i four_rows(const uint8_t* const* rows, int64_t at) {
  const auto row = [&](int r) {
    const uint8_t* const from = rows[r] == nullptr ? kZeros : rows[r] + at;
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(v, row(2), 2), row(3), 3);
}

inline __m512i quarters(__m128i v) { return _mm512_broadcast_i32x4(v); }

// Four rows' scales, one a byte: of 16 groups, or of 8 and then their minima. `at`: the
// super-block.
template <DType kType>
inline __m512i scales_of(const uint8_t* const* rows, int64_t at) {
  const auto load = [&](size_t offset) {
    return four_rows(rows, at + static_cast<int64_t>(offset));
  };
  if constexpr (kType == DType::kQ2_K) return load(offsetof(BlockQ2_K, scales));
  if constexpr (kType == DType::kQ6_K) return load(offsetof(BlockQ6_K, scales));
  if constexpr (kType == DType::kQ3_K) {
    // Two bytes sooner: 16 bytes from the scales on would pass the block's end.
    const __m512i v = _mm512_bsrli_epi128(load(offsetof(BlockQ3_K, scales) - 2), 2);
    __m512i low = _mm512_shuffle_epi32(v, _MM_PERM_BABA);
    low = _mm512_srlv_epi32(low, quarters(_mm_setr_epi32(0, 0, 4, 4)));
    low = _mm512_and_si512(low, _mm512_set1_epi8(15));
    __m512i high = _mm512_shuffle_epi32(v, _MM_PERM_CCCC);
    high = _mm512_srlv_epi32(high, quarters(_mm_setr_epi32(0, 2, 4, 6)));
    high = _mm512_slli_epi16(_mm512_and_si512(high, _mm512_set1_epi8(3)), 4);
    return _mm512_sub_epi8(_mm512_or_si512(low, high), _mm512_set1_epi8(32));
  }
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    const __m512i v = load(offsetof(BlockQ4_K, scales));
    static_assert(offsetof(BlockQ4_K, scales) == offsetof(BlockQ5_K, scales));
    __m512i low = _mm512_shuffle_epi32(v, _MM_PERM_CBCA);
    low = _mm512_srlv_epi32(low, quarters(_mm_setr_epi32(0, 0, 0, 4)));
    low = _mm512_and_si512(
        low, quarters(_mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)));
    __m512i high = _mm512_srli_epi16(_mm512_shuffle_epi32(v, _MM_PERM_BBAA), 2);
    high = _mm512_and_si512(high, quarters(_mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
    return _mm512_or_si512(low, high);
  }
  if constexpr (kType == DType::kIQ4_XS) {
    const __m512i v = load(0);
    const __m128i low_at = _mm_setr_epi8(4, 4, 5, 5, 6, 6, 7, 7, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m128i high_at = _mm_setr_epi8(2, 2, 2, 2, 3, 3, 3, 3, 2, 2, 2, 2, 3, 3, 3, 3);
    static_assert(offsetof(BlockIQ4_XS, scales_h) == 2 && offsetof(BlockIQ4_XS, scales_l) == 4);
    const __m512i low = _mm512_and_si512(
        shift_down(_mm512_shuffle_epi8(v, quarters(low_at)), 0, 0xaaaaaaaaaaaaaaaa),
        _mm512_set1_epi8(15));
    const __m512i high = _mm512_and_si512(shift_down(_mm512_shuffle_epi8(v, quarters(high_at)),
                                                     0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc),
                                          _mm512_set1_epi8(3));
    return _mm512_sub_epi8(_mm512_or_si512(low, _mm512_slli_epi16(high, 4)), _mm512_set1_epi8(32));
  }
}

// Where d stands in a super-block, and dmin after it.
template <DType kType>
constexpr size_t d_offset() {
  if constexpr (kType == DType::kQ2_K) return offsetof(BlockQ2_K, d);
  if constexpr (kType == DType::kQ3_K) return offsetof(BlockQ3_K, d);
  if constexpr (kType == DType::kQ6_K) return offsetof(BlockQ6_K, d);
  return 0;
}

template <DType kType>
void pack_super(const StripJob& job, Rows rows, int64_t block) {
  constexpr PackedFormat f = packed_format(kType);
  const int64_t at = block * static_cast<int64_t>(traits(kType).block_bytes);
  std::byte* const super = job.strip + block * f.super_bytes();
  for (int r = 0; r < kStripRows; ++r) {
    uint16_t d[2] = {};
    constexpr size_t kHalves = f.has_offset() ? 1 : 2;
    if (rows[r] != nullptr) std::memcpy(d, rows[r] + at + d_offset<kType>(), 2 * kHalves);
    for (size_t i = 0; i < kHalves; ++i) std::memcpy(super + 32 * i + 2 * r, &d[i], 2);
  }
  constexpr int kGroups = kSuperCols / traits(kType).group_size;
  const int32_t* const packed = job.map.packed_groups + block * kGroups;
  __m512i four[4];
  const __m512i order = _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b,
                                         0x3a2a1a0a, 0x39291909, 0x38281808, 0x37271707, 0x36261606,
                                         0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101,
                                         0x30201000);  // [row][entry] to [entry][row]
  for (int i = 0; i < 4; ++i) {
    four[i] = _mm512_permutexvar_epi8(order, scales_of<kType>(rows + 4 * i, at));
  }
  alignas(64) uint8_t turned[16 * kStripRows];
  turn(four, turned);
  // StepsPlan::slot is its own inverse.
  std::byte* const scales = job.strip + job.to->scales_offset;
  for (int g = 0; g < kGroups; ++g) {
    if (packed[g] < 0) continue;
    std::byte* const to = scales + packed[g] * f.group_scale_bytes();
    std::memcpy(to, turned + kStripRows * StepsPlan::slot(g), kStripRows);
    if constexpr (f.scales == ScaleKind::kSuperPair) {
      std::memcpy(to + kStripRows, turned + kStripRows * StepsPlan::slot(kGroups + g), kStripRows);
    }
  }
}

template <DType kType>
void pack_strip(const StripJob& job) {
  constexpr PackedFormat f = packed_format(kType);
  const uint8_t* rows[kStripRows];
  for (int r = 0; r < kStripRows; ++r) rows[r] = reinterpret_cast<const uint8_t*>(job.rows[r]);
  const auto bytes = static_cast<int64_t>(row_bytes(kType, job.cols));
  std::byte* const scales = job.strip + job.to->scales_offset;
  std::byte* const codes = job.strip + job.to->codes_offset;
  int64_t block = 0;
  const auto super_blocks_before = [&](int64_t byte) {
    if constexpr (f.has_super()) {
      const auto block_bytes = static_cast<int64_t>(traits(kType).block_bytes);
      for (; block * block_bytes < byte; ++block) pack_super<kType>(job, rows, block);
    }
  };
  for (const StripPlan& plan : *job.plans) {
    for (int64_t i = 0; i < plan.repeat; ++i) {
      const int64_t at = i * plan.row_step;
      size_t scaled = 0;
      const auto scales_before = [&](int64_t byte) {
        if constexpr (!f.has_super()) {
          for (; scaled < plan.scales.size() && plan.scales[scaled].fetch.base < byte; ++scaled) {
            pack_scales<kType>(plan.scales[scaled], rows, at, scales + i * plan.scales_step);
          }
        }
      };
      for (const StepsPlan& steps : plan.steps) {
        fetch_ahead(job, at + steps.ahead_begin, at + steps.ahead_end, bytes);
        scales_before(steps.low.base);
        super_blocks_before(at + steps.low.base);
        pack_steps<kType>(steps, rows, at, codes + i * plan.codes_step);
      }
      scales_before(bytes);
    }
  }
  super_blocks_before(bytes);
}

}  // namespace
#pragma GCC pop_options

PackStripFn pack_strip_avx512(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

}  // namespace coreinfer

#endif
