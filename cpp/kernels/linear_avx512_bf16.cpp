// Matrix kernels of the bf16 family with AVX-512: unpacking, rounding, and products of pairs.
#include "kernels/linear_bf16.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "kernels/linear_types.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")

namespace coreinfer {
namespace {

#include "kernels/linear_avx512_codes.inc"

constexpr int64_t kPairSize = 2 * kStripRows;  // bf16 numbers of 2 columns of a panel

inline __m256i to_bf16(const __m512& v) { return (__m256i)_mm512_cvtneps_pbh(v); }

// Elements [i, i + 16) of n; zeros past the end.
inline __m512 load_up_to(const float* x, int64_t i, int64_t n) {
  if (n - i >= 16) return _mm512_loadu_ps(x + i);
  const int64_t left = n - i < 0 ? 0 : n - i;
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), x + i);
}

void round_token(const float* x, int64_t n, int64_t token, uint16_t* tiles) {
  const int64_t n_tiles = (n + kTileCols - 1) / kTileCols;
  uint16_t* to =
      tiles + token / kTileTokens * n_tiles * kTileSize + token % kTileTokens * kTileCols;
  for (int64_t c = 0; c < n; c += kTileCols, to += kTileSize) {
    const __m256i low = to_bf16(load_up_to(x, c, n)), high = to_bf16(load_up_to(x, c + 16, n));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), high);
  }
}

// Two columns of 16 rows side by side, rounded to nearest.
inline void store_pair(const __m512& even, const __m512& odd, uint16_t* to) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}

template <DType kType>
void unpack(const PackedView& w, int64_t s, int64_t begin, int64_t end, uint16_t* panel) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kGroup = traits(kType).group_size;
  constexpr int kFirst = 2 * f.plane_bits(0), kSecond = 2 * f.plane_bits(1);
  const std::byte* const strip = w.strip(s);
  // Codes are converted where they stand in their 32-bit word; the scales take the shift back.
  const __m512i mask0 = _mm512_set1_epi32(0xff), mask1 = _mm512_set1_epi32(0xff00),
                mask2 = _mm512_set1_epi32(0xff0000);
  for (int64_t p = begin / kGroup; p < end / kGroup; ++p) {
    const std::byte* first = strip + w.codes_offset + p * kGroup * f.column_bytes();
    const std::byte* second = first + kGroup * kFirst;
    const Scales scales = load_scales<kType>(strip + w.scales_offset + p * f.group_scale_bytes(),
                                             strip + p * kGroup / kSuperCols * f.super_bytes());
    const __m512 scale = scales.scale;
    const __m512 scale1 = _mm512_mul_ps(scale, _mm512_set1_ps(0x1p-8f));
    const __m512 scale2 = _mm512_mul_ps(scale, _mm512_set1_ps(0x1p-16f));
    __m512 add = scales.add;
    if constexpr (f.has_offset()) {
      add = _mm512_mul_ps(scale, _mm512_set1_ps(-static_cast<float>(1 << f.offset_log2)));
    }
    for (int c = 0; c < kGroup; c += kStepCols) {
      const __m512i codes = load_codes<kType, false>(first, second);
      const __m512 v0 = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask0));
      const __m512 v1 = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask1));
      const __m512 v2 = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask2));
      const __m512 v3 = _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
      store_pair(_mm512_fmadd_ps(v0, scale, add), _mm512_fmadd_ps(v1, scale1, add), panel);
      store_pair(_mm512_fmadd_ps(v2, scale2, add), _mm512_fmadd_ps(v3, scale, add),
                 panel + kPairSize);
      first += kStepCols * kFirst;
      second += kStepCols * kSecond;
      panel += 2 * kPairSize;
    }
  }
}

#include "kernels/linear_avx512_transpose.inc"

// 16 pairs of columns of a float row as bf16; zeros past column n.
template <DType kType>
inline __m512i load_pairs(const std::byte* row, int64_t c, int64_t n) {
  const int64_t left = n - c < 32 ? n - c : 32;
  const uint32_t mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
  const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  __m256i a, b;
  if constexpr (kType == DType::kF32) {
    a = to_bf16(_mm512_maskz_loadu_ps(low, row + 4 * c));
    b = to_bf16(_mm512_maskz_loadu_ps(high, row + 4 * c + 64));
  } else {
    a = masked_halves(row + 2 * c, low);
    b = masked_halves(row + 2 * c + 32, high);
    if constexpr (kType == DType::kF16) {
      a = to_bf16(_mm512_cvtph_ps(a));
      b = to_bf16(_mm512_cvtph_ps(b));
    }
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

template <DType kType>
void transpose(const std::byte* rows, size_t row_stride, int64_t n_rows, int64_t begin, int64_t end,
               uint16_t* panel) {
  for (int64_t c = begin; c < end; c += kTileCols) {
    __m512 v[16];
    for (int64_t r = 0; r < 16; ++r) {
      v[r] = r < n_rows ? _mm512_castsi512_ps(
                              load_pairs<kType>(rows + row_stride * static_cast<size_t>(r), c, end))
                        : _mm512_setzero_ps();
    }
    transpose16(v);
    for (int i = 0; i < 16; ++i, panel += kPairSize) _mm512_storeu_ps(panel, v[i]);
  }
}

// 16 elements as bf16.
template <DType kType>
inline __m256i load_16(const std::byte* p) {
  if constexpr (kType == DType::kF32) return to_bf16(_mm512_loadu_ps(p));
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return kType == DType::kF16 ? to_bf16(_mm512_cvtph_ps(halves)) : halves;
}

template <DType kType>
void columns(const std::byte* first, size_t stride, int64_t begin, int64_t end, uint16_t* panel) {
  const int64_t padded = (end + kTileCols - 1) / kTileCols * kTileCols;
  const auto column = [&](int64_t c) {
    return _mm512_cvtepu16_epi32(c < end ? load_16<kType>(first + stride * static_cast<size_t>(c))
                                         : _mm256_setzero_si256());
  };
  for (int64_t c = begin; c < padded; c += 2, panel += kPairSize) {
    const __m512i even = column(c), odd = column(c + 1);
    _mm512_storeu_si512(panel, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

// T tokens of one token tile times P panels; their sums are from `at` on.
template <int P, int T>
inline void multiply_tokens(const uint16_t* const* panels, int64_t n_tiles, const uint16_t* tokens,
                            bool first, float* const* sums, int64_t at) {
  __m512 acc[P][T];
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) {
      acc[p][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums[p] + at + t * kStripRows);
    }
  }
  for (int64_t k = 0; k < n_tiles * kTileSize; k += kTileSize) {
#pragma GCC unroll 4
    for (int pair = 0; pair < kTileCols / 2; ++pair) {
      __m512bh weights[P];
      for (int p = 0; p < P; ++p) {
        weights[p] = (__m512bh)_mm512_loadu_si512(panels[p] + k + pair * kPairSize);
      }
      for (int t = 0; t < T; ++t) {
        int32_t two;
        std::memcpy(&two, tokens + k + t * kTileCols + 2 * pair, 4);
        const auto values = (__m512bh)_mm512_set1_epi32(two);
        for (int p = 0; p < P; ++p) acc[p][t] = _mm512_dpbf16_ps(acc[p][t], weights[p], values);
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums[p] + at + t * kStripRows, acc[p][t]);
  }
}

void multiply(const uint16_t* const* panels, int n_panels, int64_t n_tiles, const uint16_t* tokens,
              int64_t token_stride, int64_t n_token_tiles, bool first, float* const* sums) {
  constexpr int kTokens = 8;  // 16 sums of two panels, half of the registers
  for (int64_t t = 0; t < n_token_tiles * kTileTokens; t += kTokens) {
    const uint16_t* const from =
        tokens + t / kTileTokens * token_stride + t % kTileTokens * kTileCols;
    if (n_panels == 2) {
      multiply_tokens<2, kTokens>(panels, n_tiles, from, first, sums, t * kStripRows);
    } else {
      multiply_tokens<1, kTokens>(panels, n_tiles, from, first, sums, t * kStripRows);
    }
  }
}

}  // namespace
#pragma GCC pop_options

const Bf16Kernels& bf16_kernels_avx512() {
  static constexpr Bf16Kernels kTable = {
      .round_token = round_token,
      .unpack =
          [](DType type) {
            return for_packed_type(
                type, []<DType kType>() -> Bf16Kernels::UnpackFn { return unpack<kType>; });
          },
      .transpose =
          [](DType type) {
            return for_float_type(
                type, []<DType kType>() -> Bf16Kernels::TransposeFn { return transpose<kType>; });
          },
      .columns =
          [](DType type) {
            return for_float_type(
                type, []<DType kType>() -> Bf16Kernels::ColumnsFn { return columns<kType>; });
          },
      // Of codes the integer family has as many products an instruction, and exact sums.
      .packed = false,
      .multiply = multiply,
      .begin = [] {},
      .end = [] {},
  };
  return kTable;
}

}  // namespace coreinfer

#endif
