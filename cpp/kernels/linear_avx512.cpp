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

// ---- Integer family -----------------------------------------------------------------------------

// Sums of a group for T tokens, 16 rows in the lanes.
template <DType kType, bool kTail, int T>
inline void add_step(const std::byte* first, const std::byte* second, const int8_t* x,
                     int64_t x_stride, __m512i (&sum)[T]) {
  const __m512i codes = load_codes<kType, kTail>(first, second);
  for (int t = 0; t < T; ++t) {
    int32_t four;
    std::memcpy(&four, x + t * x_stride, 4);
    sum[t] = _mm512_dpbusd_epi32(sum[t], codes, _mm512_set1_epi32(four));
  }
}

template <DType kType, bool kDense, int T>
inline void dot_tokens(const PackedView& w, const std::byte* strip, const QuantizedRows& x,
                       float* tile) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kGroup = traits(kType).group_size;
  constexpr int kFirst = 2 * f.plane_bits(0), kSecond = 2 * f.plane_bits(1);  // bytes a column
  const ColumnGroup* const groups = w.columns->groups.data();
  const auto n_groups = static_cast<int64_t>(w.columns->groups.size());
  const std::byte* scales = strip + w.scales_offset;
  const std::byte* codes = strip + w.codes_offset;
  const int8_t* activations = x.codes;
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t p = 0; p < n_groups; ++p) {
    const int n = kDense ? kGroup : groups[p].n;
    const std::byte* first = codes;
    const std::byte* second = codes + n * kFirst;
    __m512i sum[T];
    for (int t = 0; t < T; ++t) {
      if constexpr (f.has_offset()) {
        const __m512i minus = _mm512_set1_epi32(x.minus_sum[t * x.groups_stride + p]);
        sum[t] = _mm512_slli_epi32(minus, f.offset_log2);
      } else {
        sum[t] = _mm512_setzero_si512();
      }
    }
    for (int c = 0; c + kStepCols <= n; c += kStepCols) {
      add_step<kType, false>(first, second, activations, x.codes_stride, sum);
      first += kStepCols * kFirst;
      second += kStepCols * kSecond;
      activations += kStepCols;
    }
    if (!kDense && n % kStepCols != 0) {
      add_step<kType, true>(first, second, activations, x.codes_stride, sum);
      activations += kStepCols;
    }
    const int64_t source = kDense ? p : groups[p].source;
    const std::byte* const super = strip + source * kGroup / kSuperCols * f.super_bytes();
    const Scales s = load_scales<kType>(scales, super);
    for (int t = 0; t < T; ++t) {
      const int64_t at = t * x.groups_stride + p;
      const __m512 scale = _mm512_mul_ps(s.scale, _mm512_set1_ps(x.scale[at]));
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), scale, acc[t]);
      if constexpr (!f.has_offset()) {
        acc[t] = _mm512_fmadd_ps(s.add, _mm512_set1_ps(x.scaled_sum[at]), acc[t]);
      }
    }
    scales += f.group_scale_bytes();
    codes += n * f.column_bytes();
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(tile + t * kStripRows, acc[t]);
}

template <DType kType, bool kDense>
void dot_strip(const PackedView& w, int64_t s, const QuantizedRows& x, int64_t n_tokens,
               float* tile) {
  const std::byte* const strip = w.strip(s);
  int64_t t = 0;
  for (; t + 8 <= n_tokens; t += 8) {
    dot_tokens<kType, kDense, 8>(w, strip, x.from(t), tile + t * kStripRows);
  }
  for (; t + 4 <= n_tokens; t += 4) {
    dot_tokens<kType, kDense, 4>(w, strip, x.from(t), tile + t * kStripRows);
  }
  for (; t + 2 <= n_tokens; t += 2) {
    dot_tokens<kType, kDense, 2>(w, strip, x.from(t), tile + t * kStripRows);
  }
  if (t < n_tokens) dot_tokens<kType, kDense, 1>(w, strip, x.from(t), tile + t * kStripRows);
}

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

// ---- Float family -------------------------------------------------------------------------------

template <DType kType, bool kTail>
inline void unpack_step(const std::byte* first, const std::byte* second, const Scales& s, int n,
                        float* panel) {
  constexpr PackedFormat f = packed_format(kType);
  const __m512i codes = load_codes<kType, kTail>(first, second);
  const __m512i offset = _mm512_set1_epi32(f.has_offset() ? 1 << f.offset_log2 : 0);
  for (int c = 0; c < n; ++c) {
    __m512i code = _mm512_srl_epi32(codes, _mm_cvtsi32_si128(8 * c));
    code = _mm512_sub_epi32(_mm512_and_si512(code, _mm512_set1_epi32(255)), offset);
    __m512 value = _mm512_mul_ps(s.scale, _mm512_cvtepi32_ps(code));
    value = _mm512_add_ps(value, s.add);
    _mm512_storeu_ps(panel + c * kStripRows, value);
  }
}

template <DType kType>
void unpack_panel(const PackedView& w, int64_t s, int64_t begin, int64_t end, float* panel) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kGroup = traits(kType).group_size;
  constexpr int kFirst = 2 * f.plane_bits(0), kSecond = 2 * f.plane_bits(1);
  const std::byte* const strip = w.strip(s);
  for (int64_t p = begin; p < end; ++p) {
    const ColumnGroup& group = w.columns->groups[static_cast<size_t>(p)];
    const std::byte* first = strip + w.codes_offset + group.before * f.column_bytes();
    const std::byte* second = first + group.n * kFirst;
    const Scales scales =
        load_scales<kType>(strip + w.scales_offset + p * f.group_scale_bytes(),
                           strip + int64_t{group.source} * kGroup / kSuperCols * f.super_bytes());
    int c = 0;
    for (; c + kStepCols <= group.n; c += kStepCols) {
      unpack_step<kType, false>(first, second, scales, kStepCols, panel);
      first += kStepCols * kFirst;
      second += kStepCols * kSecond;
      panel += kStepCols * kStripRows;
    }
    if (const int tail = group.n - c; tail > 0) {
      unpack_step<kType, true>(first, second, scales, tail, panel);
      panel += tail * kStripRows;
    }
  }
}

template <int T>
inline void dot_panel_tokens(const float* panel, int64_t n_cols, const float* x, int64_t x_stride,
                             float* tile) {
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_loadu_ps(tile + t * kStripRows);
  for (int64_t c = 0; c < n_cols; ++c) {
    const __m512 weights = _mm512_loadu_ps(panel + c * kStripRows);
    for (int t = 0; t < T; ++t) {
      acc[t] = _mm512_fmadd_ps(weights, _mm512_set1_ps(x[t * x_stride + c]), acc[t]);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(tile + t * kStripRows, acc[t]);
}

void dot_panel(const float* panel, int64_t n_cols, const FloatRows& x, int64_t n_tokens,
               float* tile) {
  int64_t t = 0;
  for (; t + 12 <= n_tokens; t += 12) {
    dot_panel_tokens<12>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  for (; t + 4 <= n_tokens; t += 4) {
    dot_panel_tokens<4>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  for (; t < n_tokens; ++t) {
    dot_panel_tokens<1>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
}

// 16 elements of a float row as float32; those without a mask bit are not read and count zero.
template <DType kType>
inline __m512 load_floats(const std::byte* p, __mmask16 mask) {
  if constexpr (kType == DType::kF32) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, p);
    if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

template <DType kType, int T>
inline void dot_row_tokens(const std::byte* row, int64_t n, const float* x, int64_t x_stride,
                           float* tile) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  constexpr __mmask16 kAll = 0xffff;
  __m512 low[T], high[T];
  for (int t = 0; t < T; ++t) low[t] = high[t] = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + 32 <= n; c += 32) {
    const __m512 a = load_floats<kType>(row + c * kElement, kAll);
    const __m512 b = load_floats<kType>(row + (c + 16) * kElement, kAll);
    for (int t = 0; t < T; ++t) {
      low[t] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + t * x_stride + c), low[t]);
      high[t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + t * x_stride + c + 16), high[t]);
    }
  }
  if (c < n) {
    const uint32_t mask = (1u << (n - c)) - 1;
    const auto ma = static_cast<__mmask16>(mask), mb = static_cast<__mmask16>(mask >> 16);
    const __m512 a = load_floats<kType>(row + c * kElement, ma);
    const __m512 b = load_floats<kType>(row + (c + 16) * kElement, mb);
    for (int t = 0; t < T; ++t) {
      const float* const xt = x + t * x_stride + c;
      low[t] = _mm512_mask3_fmadd_ps(a, _mm512_maskz_loadu_ps(ma, xt), low[t], ma);
      high[t] = _mm512_mask3_fmadd_ps(b, _mm512_maskz_loadu_ps(mb, xt + 16), high[t], mb);
    }
  }
  for (int t = 0; t < T; ++t) {
    const __m512 s16 = _mm512_add_ps(low[t], high[t]);
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(s16), _mm512_extractf32x8_ps(s16, 1));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    tile[t * kStripRows] = _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
}

template <DType kType>
void dot_row(const std::byte* row, int64_t n, const FloatRows& x, int64_t n_tokens, float* tile) {
  int64_t t = 0;
  for (; t + 4 <= n_tokens; t += 4) {
    dot_row_tokens<kType, 4>(row, n, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  for (; t + 2 <= n_tokens; t += 2) {
    dot_row_tokens<kType, 2>(row, n, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  if (t < n_tokens) {
    dot_row_tokens<kType, 1>(row, n, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
}

#include "kernels/linear_avx512_transpose.inc"

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
      .dot_strip =
          [](DType type, bool dense) {
            return for_packed_type(type, [dense]<DType kType>() -> DotStripFn {
              return dense ? dot_strip<kType, true> : dot_strip<kType, false>;
            });
          },
      .unpack_panel =
          [](DType type) {
            return for_packed_type(
                type, []<DType kType>() -> UnpackPanelFn { return unpack_panel<kType>; });
          },
      .transpose_panel = transpose_panel,
      .dot_panel = dot_panel,
      .dot_row =
          [](DType type) {
            return for_float_type(type, []<DType kType>() -> DotRowFn { return dot_row<kType>; });
          },
  };
  return kTable;
}

}  // namespace coreinfer

#endif
