// Matrix kernels with AVX-512 and VNNI.
#include "kernels/linear.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "kernels/linear_types.h"
#include "kernels/packed_format.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace coreinfer {
namespace {

#include "kernels/linear_avx512_codes.inc"

using Floats = __m512;
using Ints = __m512i;
using Codes = __m512i;

// 32 registers: a sum and an accumulator a token. A panel's column is one register.
constexpr int kDotTokens = 8, kPairTokens = 8, kPanelTokens = 12, kRowTokens = 4,
              kRowPairTokens = 4;

inline Floats broadcast(float v) { return _mm512_set1_ps(v); }
inline Ints broadcast(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, const Floats& v) { _mm512_storeu_ps(p, v); }
inline Floats add(const Floats& a, const Floats& b) { return _mm512_add_ps(a, b); }
inline Floats mul(const Floats& a, const Floats& b) { return _mm512_mul_ps(a, b); }
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Floats to_floats(const Ints& v) { return _mm512_cvtepi32_ps(v); }

template <DType kType>
constexpr bool signed_codes() {
  return false;
}

// Codes times activations of steps in pairs, for one token: a line of 64 bytes holds two steps, its
// low halves rows 0 to 7 of both, its high halves rows 8 to 15. A byte as it stands is its low code
// and 16 times its high one, and so is a sum of bytes times activations: the sum of the high codes
// is what is left of it, without a shift and a mask for every line. Codes that are looked up have
// to be taken apart. At the end the sums are folded into that of 16 rows.
template <DType kType, int S>
inline void add_step_pairs(const std::byte* const (&codes)[S], int n_pairs, const int8_t* x,
                           Ints (&sum)[S][1]) {
  constexpr bool kLookup = packed_format(kType).lookup;
  __m512i low[S], high[S];  // without lookup: of whole bytes
  for (int s = 0; s < S; ++s) low[s] = high[s] = _mm512_setzero_si512();
  for (int i = 0; i < n_pairs; ++i) {
    const int8_t* const eight = x + i * 2 * kStepCols;
    const __m512i activations = _mm512_mask_broadcastd_epi32(
        _mm512_broadcastd_epi32(_mm_loadu_si32(eight)), 0xff00, _mm_loadu_si32(eight + 4));
    for (int s = 0; s < S; ++s) {
      const __m512i bytes = _mm512_loadu_si512(codes[s] + i * 64);
      const CodesPair pair = kLookup ? looked_up(bytes) : CodesPair{low_codes(bytes), bytes};
      low[s] = _mm512_dpbusd_epi32(low[s], pair.low, activations);
      high[s] = _mm512_dpbusd_epi32(high[s], pair.high, activations);
    }
  }
  for (int s = 0; s < S; ++s) {
    if constexpr (!kLookup) high[s] = _mm512_srai_epi32(_mm512_sub_epi32(high[s], low[s]), 4);
    const __m512i first_steps = _mm512_shuffle_i64x2(low[s], high[s], 0x44);
    const __m512i second_steps = _mm512_shuffle_i64x2(low[s], high[s], 0xee);
    sum[s][0] = _mm512_add_epi32(sum[s][0], _mm512_add_epi32(first_steps, second_steps));
  }
}

template <DType kType, bool kTail, int S, int T>
inline void add_steps(const std::byte* const (&first)[S], const std::byte* const (&second)[S],
                      int n_steps, const int8_t* x, int64_t x_stride, Ints (&sum)[S][T]) {
  constexpr PackedFormat f = packed_format(kType);
  int i = 0;
  if constexpr (f.bits == 4 && !kTail && T == 1) {
    // For fewer steps the fold takes more than it saves.
    if (n_steps >= 6) {
      i = n_steps & ~1;
      add_step_pairs<kType>(first, i / 2, x, sum);
    }
  }
  // Unrolled, the sums stay where they are; otherwise GCC moves each from one register to another
  // and back in every step, which takes a third of the time.
#pragma GCC unroll 8
  for (; i < n_steps; ++i) {
    Codes codes[S];
    for (int s = 0; s < S; ++s) {
      codes[s] = load_codes<kType, kTail>(first[s] + i * kStepCols * 2 * f.plane_bits(0),
                                          second[s] + i * kStepCols * 2 * f.plane_bits(1));
    }
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, x + i * kStepCols + t * x_stride, 4);
      const __m512i activations = _mm512_set1_epi32(four);
      for (int s = 0; s < S; ++s) {
        sum[s][t] = _mm512_dpbusd_epi32(sum[s][t], codes[s], activations);
      }
    }
  }
}

template <DType kType>
inline Floats column(const Codes& codes, int c) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kOffset = f.has_offset() ? 1 << f.offset_log2 : 0;
  const __m512i shifted = _mm512_srl_epi32(codes, _mm_cvtsi32_si128(8 * c));
  const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(kOffset)));
}

#include "kernels/linear_avx512_transpose.inc"

// 16 elements of a float row as float32; those without a mask bit are not read and count zero.
template <DType kType>
inline __m512 load_floats(const std::byte* p, __mmask16 mask) {
  if constexpr (kType == DType::kF32) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i halves = masked_halves(p, mask);
    if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

template <DType kType>
inline Floats load_row(const std::byte* p) {
  return load_floats<kType>(p, 0xffff);
}

inline float total(const Floats& low, const Floats& high) {
  const __m512 s16 = _mm512_add_ps(low, high);
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(s16), _mm512_extractf32x8_ps(s16, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

#include "kernels/linear_simd.inc"

void quantize(const ColumnGroups& columns, const float* x, const QuantizedRows& out) {
  constexpr float kSmallest = 1e-35f;  // as in linear_scalar.cpp
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  const ColumnGroup* const groups = columns.groups.data();
  const auto n_groups = static_cast<int64_t>(columns.groups.size());
  for (int64_t p = 0; p < n_groups; ++p) {
    const int n = groups[p].n;
    const float* const values = x + groups[p].first;
    int8_t* const codes = out.codes + groups[p].padded;
    const uint32_t mask = n == 32 ? 0xffffffffu : (1u << n) - 1;
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    const __m512 a = _mm512_maskz_loadu_ps(low, values);
    const __m512 b = _mm512_maskz_loadu_ps(high, values + 16);
    const int32_t largest = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude_bits),
                         _mm512_and_si512(_mm512_castps_si512(b), magnitude_bits)));
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    float scale = 0.0f, inverse = 0.0f;
    if (largest >= 0x7f800000) {
      scale = std::numeric_limits<float>::quiet_NaN();
    } else if (magnitude >= kSmallest) {
      scale = magnitude / 127.0f;
      inverse = 127.0f / magnitude;
    }
    const auto padded = static_cast<__mmask16>((1u << ((n + 3) / 4)) - 1);
    __m512i qa = _mm512_setzero_si512(), qb = qa;
    if (inverse != 0.0f) {
      qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse)));
      qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(inverse)));
    }
    const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(qb), _mm512_cvtepi32_epi8(qa));
    _mm256_mask_storeu_epi32(codes, static_cast<__mmask8>(padded), bytes);
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
    out.scale[p] = scale;
    out.minus_sum[p] = -sum;
    out.scaled_sum[p] = scale * static_cast<float>(sum);
  }
}

template <DType kType>
inline void transpose_rows(const std::byte* rows, size_t row_stride, int64_t n_rows, int64_t begin,
                           int64_t end, float* panel) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  for (int64_t c = begin; c < end; c += 16) {
    const int64_t n = end - c < 16 ? end - c : 16;
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    __m512 v[16];
    for (int64_t r = 0; r < 16; ++r) {
      v[r] = r < n_rows ? load_floats<kType>(
                              rows + row_stride * static_cast<size_t>(r) + c * kElement, mask)
                        : _mm512_setzero_ps();
    }
    transpose16(v);
    for (int64_t j = 0; j < n; ++j) _mm512_storeu_ps(panel + (c - begin + j) * kStripRows, v[j]);
  }
}

void transpose_panel(DType type, const std::byte* rows, size_t row_stride, int64_t n_rows,
                     int64_t begin, int64_t end, float* panel) {
  switch (type) {
    case DType::kF16:
      return transpose_rows<DType::kF16>(rows, row_stride, n_rows, begin, end, panel);
    case DType::kBF16:
      return transpose_rows<DType::kBF16>(rows, row_stride, n_rows, begin, end, panel);
    default:
      return transpose_rows<DType::kF32>(rows, row_stride, n_rows, begin, end, panel);
  }
}

}  // namespace
#pragma GCC pop_options

const LinearKernels& linear_kernels_avx512() {
  static constexpr LinearKernels kTable = {
      .quantize = quantize,
      .dot_strips = find_dot_strips,
      .unpack_panel = find_unpack_panel,
      .transpose_panel = transpose_panel,
      .dot_panel = dot_panel,
      .dot_rows = find_dot_rows,
      .columns_panel = find_columns_panel,
      .add_columns = find_add_columns,
  };
  return kTable;
}

}  // namespace coreinfer

#endif
