// Packing for AVX-512 with VBMI, whose byte permutes pick columns out of 32 and bring them into
// lines, 16 columns of 16 rows at a time. Types of 32-column blocks are read where they stand in
// the file; super-blocks are taken apart by packed_source.inc first.
#include "kernels/packed_strip.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstring>

#include "kernels/linear_types.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")

namespace coreinfer {
namespace {

#include "kernels/packed_source.inc"
//
#include "kernels/packed_scales.inc"

// One byte a code, [row][column]: half h of entry i has columns 16 * h and up of rows 4 * i and up.
struct GroupCodes {
  __m512i half[2][4];
};

inline __m512i four_rows(const uint8_t* const* rows, ptrdiff_t offset) {
  const auto row = [&](int r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
  };
  __m512i v = _mm512_castsi128_si512(row(0));
  v = _mm512_inserti32x4(v, row(1), 1);
  v = _mm512_inserti32x4(v, row(2), 2);
  return _mm512_inserti32x4(v, row(3), 3);
}

inline __m128i four_words(const uint8_t* const* rows, ptrdiff_t offset) {
  int32_t words[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&words[r], rows[r] + offset, 4);
  return _mm_setr_epi32(words[0], words[1], words[2], words[3]);
}

// Adds the fifth bits of half h's columns; `bits` are those of 32 columns a row.
inline __m512i add_fifth_bits(__m512i codes, __m128i bits, int h) {
  const __m512i first = _mm512_set_epi64(0x0d0d0d0d0d0d0d0d, 0x0c0c0c0c0c0c0c0c, 0x0909090909090909,
                                         0x0808080808080808, 0x0505050505050505, 0x0404040404040404,
                                         0x0101010101010101, 0);
  const __m512i byte = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(2 * h)));
  const __m512i spread = _mm512_permutexvar_epi8(byte, _mm512_castsi128_si512(bits));
  const __m512i column = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201u));
  return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(spread, column), codes,
                              _mm512_set1_epi8(16));
}

// The codes of a block of 32 columns, at `offset` in each row.
template <DType kType>
inline GroupCodes load_block(const uint8_t* const* rows, ptrdiff_t offset) {
  using Block = typename BlockOf<kType>::Type;
  const ptrdiff_t qs = offset + static_cast<ptrdiff_t>(offsetof(Block, qs));
  const __m512i low_half = _mm512_set1_epi8(15);
  GroupCodes codes;
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const* const four = rows + 4 * i;
    __m512i low = four_rows(four, qs), high;
    if constexpr (kType == DType::kQ8_0) {
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      low = _mm512_xor_si512(low, sign);
      high = _mm512_xor_si512(four_rows(four, qs + 16), sign);
    } else {
      high = _mm512_and_si512(_mm512_srli_epi32(low, 4), low_half);
      low = _mm512_and_si512(low, low_half);
    }
    if constexpr (packed_format(kType).bits == 5) {
      const __m128i bits = four_words(four, offset + static_cast<ptrdiff_t>(offsetof(Block, qh)));
      low = add_fifth_bits(low, bits, 0);
      high = add_fifth_bits(high, bits, 1);
    }
    codes.half[0][i] = low;
    codes.half[1][i] = high;
  }
  return codes;
}

// Codes that have been taken apart.
template <int kGroup>
inline GroupCodes load_group(const uint8_t* const* rows, ptrdiff_t offset) {
  GroupCodes codes;
  for (int i = 0; i < 4; ++i) {
    codes.half[0][i] = four_rows(rows + 4 * i, offset);
    codes.half[1][i] = kGroup == 32 ? four_rows(rows + 4 * i, offset + 16) : codes.half[0][i];
  }
  return codes;
}

// Scales of 16 blocks of 32 columns, which start with d, or with d and m.
template <DType kType>
inline void put_block_scales(const uint8_t* const* rows, ptrdiff_t offset, std::byte* to) {
  __m512i v = _mm512_castsi128_si512(four_words(rows, offset));
  v = _mm512_inserti32x4(v, four_words(rows + 4, offset), 1);
  v = _mm512_inserti32x4(v, four_words(rows + 8, offset), 2);
  v = _mm512_inserti32x4(v, four_words(rows + 12, offset), 3);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(v));
  if constexpr (packed_format(kType).scales == ScaleKind::kHalfPair) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
  }
}

// Where the bytes of n columns of a plane come from, once its lines are there as [line][column]
// with 16 columns each: whole steps, [line][column], then the tail, [column][line].
template <int kLines>
struct PlaneOrder {
  static constexpr int kColumns = 16;
  alignas(64) uint8_t of[kColumns + 1][kLines < 4 ? 64 : kColumns * kLines];
};

template <int kLines>
constexpr PlaneOrder<kLines> plane_order() {
  PlaneOrder<kLines> order{};
  for (int n = 0; n <= order.kColumns; ++n) {
    const int steps = n / kStepCols * kStepCols;
    for (int i = 0; i < n * kLines; ++i) {
      const bool whole = i < steps * kLines;
      const int line = whole ? i / kStepCols % kLines : i % kLines;
      const int column = whole ? i / (kStepCols * kLines) * kStepCols + i % kStepCols : i / kLines;
      order.of[n][i] = static_cast<uint8_t>(order.kColumns * line + column);
    }
  }
  return order;
}

// 16 columns' lines, [line][column], of the codes' bits from kShift on; kOnly: they have no others.
template <int kBits, int kShift, bool kOnly>
inline std::array<__m512i, 4> lines_of(const __m512i (&codes)[4]) {
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = kShift > 0 ? _mm512_srli_epi32(codes[i], kShift) : codes[i];
    if constexpr (!kOnly) v[i] = _mm512_and_si512(v[i], _mm512_set1_epi8((1 << kBits) - 1));
  }
  const __m512i zero = _mm512_setzero_si512();
  if constexpr (kBits == 8) return {v[0], v[1], v[2], v[3]};
  // Codes are narrower than bytes, so that what is shifted stays in its byte.
  if constexpr (kBits == 4) {
    return {_mm512_or_si512(v[0], _mm512_slli_epi32(v[2], 4)),
            _mm512_or_si512(v[1], _mm512_slli_epi32(v[3], 4)), zero, zero};
  }
  const __m512i low = _mm512_or_si512(v[0], _mm512_slli_epi32(v[1], 2));
  const __m512i high = _mm512_or_si512(v[2], _mm512_slli_epi32(v[3], 2));
  const __m512i all = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
  if constexpr (kBits == 2) return {all, zero, zero, zero};
  // Rows 2 and 3 of each four follow on rows 0 and 1 in their lines.
  const __m512i upper = _mm512_shuffle_i64x2(all, all, 0x0e);
  return {_mm512_or_si512(all, _mm512_slli_epi32(upper, 1)), zero, zero, zero};
}

// n of 16 columns of a plane.
template <int kBits, int kShift, bool kOnly>
inline void write_plane(const __m512i (&codes)[4], int n, std::byte* to) {
  constexpr int kLines = 2 * kBits;
  static constexpr PlaneOrder<kLines> kOrder = plane_order<kLines>();
  const std::array<__m512i, 4> lines = lines_of<kBits, kShift, kOnly>(codes);
  for (int i = 0; i < n * kLines; i += 64) {
    const __m512i order = _mm512_load_si512(kOrder.of[n] + i);
    __m512i bytes;
    if constexpr (kLines == 16) {
      bytes = _mm512_mask_blend_epi8(_mm512_movepi8_mask(order),
                                     _mm512_permutex2var_epi8(lines[0], order, lines[1]),
                                     _mm512_permutex2var_epi8(lines[2], order, lines[3]));
    } else if constexpr (kLines == 8) {
      bytes = _mm512_permutex2var_epi8(lines[0], order, lines[1]);
    } else {
      bytes = _mm512_permutexvar_epi8(order, lines[0]);
    }
    const int left = n * kLines - i;
    if (left >= 64) {
      _mm512_storeu_si512(to + i, bytes);
    } else {
      _mm512_mask_storeu_epi8(to + i, (uint64_t{1} << left) - 1, bytes);
    }
  }
}

// A group's codes; `within` are the picked columns, or null.
template <DType kType>
inline void write_group(const GroupCodes& codes, const uint8_t* within, int n, std::byte* to) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kFirst = f.plane_bits(0), kSecond = f.plane_bits(1);
  std::byte* const second = to + n * 2 * kFirst;
  const __m512i row =
      _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x2020202020202020,
                       0x2020202020202020, 0x1010101010101010, 0x1010101010101010, 0, 0);
  for (int c = 0; c < n; c += 16) {
    __m512i sixteen[4];
    if (within == nullptr) {
      for (int i = 0; i < 4; ++i) sixteen[i] = codes.half[c / 16][i];
    } else {
      // Bit 6 of an index says which half.
      __m128i column = _mm_loadu_si128(reinterpret_cast<const __m128i*>(within + c));
      const __m128i half = _mm_and_si128(_mm_slli_epi32(column, 2), _mm_set1_epi8(64));
      column = _mm_or_si128(_mm_and_si128(column, _mm_set1_epi8(15)), half);
      const __m512i from = _mm512_or_si512(_mm512_broadcast_i32x4(column), row);
      for (int i = 0; i < 4; ++i) {
        sixteen[i] = _mm512_permutex2var_epi8(codes.half[0][i], from, codes.half[1][i]);
      }
    }
    const int columns = n - c < 16 ? n - c : 16;
    write_plane<kFirst, 0, kSecond == 0>(sixteen, columns, to + c * 2 * kFirst);
    if constexpr (kSecond != 0) {
      write_plane<kSecond, kFirst, false>(sixteen, columns, second + c * 2 * kSecond);
    }
  }
}

template <DType kType>
void pack_strip(const StripJob& job) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kGroup = traits(kType).group_size;
  constexpr bool kInPlace = traits(kType).block_size == 32;
  constexpr size_t kChunkBytes = row_bytes(kType, kSuperCols);
  alignas(2) static constexpr uint8_t kZeros[kChunkBytes] = {};
  const int64_t n_chunks = (job.cols + kSuperCols - 1) / kSuperCols;
  const bool picks = job.map.picks != nullptr;
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    if (!f.has_super() && picks && job.map.first_pick[chunk + 1] == job.map.first_pick[chunk]) {
      continue;
    }
    fetch_ahead<kType>(job, chunk, n_chunks);
    const uint8_t* rows[kStripRows];
    for (int r = 0; r < kStripRows; ++r) {
      const std::byte* const row = job.rows[r];
      rows[r] = row == nullptr
                    ? kZeros
                    : reinterpret_cast<const uint8_t*>(row) + chunk * int64_t{kChunkBytes};
    }
    SourceBlock blocks[kInPlace ? 1 : kStripRows];
    if constexpr (!kInPlace) {
      for (int r = 0; r < kStripRows; ++r) {
        read_blocks<kType>(reinterpret_cast<const std::byte*>(rows[r]), kSuperCols, &blocks[r]);
        rows[r] = blocks[r].codes;
      }
      put_super<kType>(blocks, job.strip + chunk * f.super_bytes());
    }
    const int64_t column = chunk * kSuperCols;
    const int n_groups = static_cast<int>(
        (job.cols - column < kSuperCols ? job.cols - column : kSuperCols) / kGroup);
    for (int g = 0; g < n_groups; ++g) {
      const int32_t p = job.map.packed_groups[column / kGroup + g];
      if (p < 0) continue;
      const ColumnGroup& group = job.map.groups[p];
      std::byte* const scales = job.strip + job.to->scales_offset + p * f.group_scale_bytes();
      std::byte* const to = job.strip + job.to->codes_offset + group.before * f.column_bytes();
      const uint8_t* const within = picks ? job.map.within + group.first : nullptr;
      if constexpr (kInPlace) {
        const auto offset = static_cast<ptrdiff_t>(g * row_bytes(kType, kGroup));
        put_block_scales<kType>(rows, offset, scales);
        write_group<kType>(load_block<kType>(rows, offset), within, group.n, to);
      } else {
        put_scales<kType>(blocks, g, scales);
        write_group<kType>(load_group<kGroup>(rows, g * kGroup), within, group.n, to);
      }
    }
  }
}

}  // namespace
#pragma GCC pop_options

PackStripFn pack_strip_avx512(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

}  // namespace coreinfer

#endif
