// Matrix kernels with AVX2, FMA and F16C.
#include "kernels/linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "kernels/linear_types.h"
#include "kernels/packed_format.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace coreinfer {
namespace {

#include "kernels/linear_avx2_codes.inc"

// ---- Integer family -----------------------------------------------------------------------------

// Steps whose sums of 2 products still fit into 16 bits: 2 * 127 * (largest code) * steps < 2^15.
template <DType kType>
constexpr int steps_in_16_bits() {
  if (signed_codes<kType>()) return 1;
  const int largest = (1 << packed_format(kType).bits) - 1;
  return 32767 / (2 * 127 * largest);
}

inline __m256i pair_sums(const __m256i& sums16) {
  return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
}

// Sums of a group for one token.
struct Sums {
  __m256i low, high;  // rows 0-7, 8-15
};

inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Adds n_steps steps, no more than steps_in_16_bits().
template <DType kType, bool kTail, int T>
inline void add_steps(const std::byte* first, const std::byte* second, int n_steps, const int8_t* x,
                      int64_t x_stride, Sums (&sum)[T]) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kFirst = 2 * f.plane_bits(0), kSecond = 2 * f.plane_bits(1);
  if constexpr (signed_codes<kType>()) {
    const Codes codes = load_codes<kType, kTail>(first, second);
    const __m256i low = _mm256_abs_epi8(codes.low), high = _mm256_abs_epi8(codes.high);
    for (int t = 0; t < T; ++t) {
      const __m256i four = broadcast4(x + t * x_stride);
      const __m256i a = _mm256_maddubs_epi16(low, _mm256_sign_epi8(four, codes.low));
      const __m256i b = _mm256_maddubs_epi16(high, _mm256_sign_epi8(four, codes.high));
      sum[t].low = _mm256_add_epi32(sum[t].low, pair_sums(a));
      sum[t].high = _mm256_add_epi32(sum[t].high, pair_sums(b));
    }
  } else {
    Sums sum16[T];
    for (int t = 0; t < T; ++t) sum16[t].low = sum16[t].high = _mm256_setzero_si256();
    for (int i = 0; i < n_steps; ++i) {
      const Codes codes = load_codes<kType, kTail>(first + i * kStepCols * kFirst,
                                                   second + i * kStepCols * kSecond);
      for (int t = 0; t < T; ++t) {
        const __m256i four = broadcast4(x + t * x_stride + i * kStepCols);
        sum16[t].low = _mm256_add_epi16(sum16[t].low, _mm256_maddubs_epi16(codes.low, four));
        sum16[t].high = _mm256_add_epi16(sum16[t].high, _mm256_maddubs_epi16(codes.high, four));
      }
    }
    for (int t = 0; t < T; ++t) {
      sum[t].low = _mm256_add_epi32(sum[t].low, pair_sums(sum16[t].low));
      sum[t].high = _mm256_add_epi32(sum[t].high, pair_sums(sum16[t].high));
    }
  }
}

template <DType kType, bool kDense, int T>
inline void dot_tokens(const PackedView& w, const std::byte* strip, const QuantizedRows& x,
                       float* tile) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kGroup = traits(kType).group_size;
  constexpr int kFirst = 2 * f.plane_bits(0), kSecond = 2 * f.plane_bits(1);  // bytes a column
  constexpr int kSteps = steps_in_16_bits<kType>();
  const ColumnGroup* const groups = w.columns->groups.data();
  const auto n_groups = static_cast<int64_t>(w.columns->groups.size());
  const std::byte* scales = strip + w.scales_offset;
  const std::byte* codes = strip + w.codes_offset;
  const int8_t* activations = x.codes;
  __m256 acc[T][2];
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t p = 0; p < n_groups; ++p) {
    const int n = kDense ? kGroup : groups[p].n;
    const std::byte* const first = codes;
    const std::byte* const second = codes + n * kFirst;
    Sums sum[T];
    for (int t = 0; t < T; ++t) {
      sum[t].low = _mm256_setzero_si256();
      if constexpr (f.has_offset() && !signed_codes<kType>()) {
        sum[t].low = _mm256_slli_epi32(_mm256_set1_epi32(x.minus_sum[t * x.groups_stride + p]),
                                       f.offset_log2);
      }
      sum[t].high = sum[t].low;
    }
    const int steps = n / kStepCols;
    for (int i = 0; i < steps; i += kSteps) {
      const int count = steps - i < kSteps ? steps - i : kSteps;
      add_steps<kType, false>(first + i * kStepCols * kFirst, second + i * kStepCols * kSecond,
                              count, activations + i * kStepCols, x.codes_stride, sum);
    }
    activations += steps * kStepCols;
    if (!kDense && n % kStepCols != 0) {
      add_steps<kType, true>(first + steps * kStepCols * kFirst,
                             second + steps * kStepCols * kSecond, 1, activations, x.codes_stride,
                             sum);
      activations += kStepCols;
    }
    const int64_t source = kDense ? p : groups[p].source;
    const std::byte* const super = strip + source * kGroup / kSuperCols * f.super_bytes();
    const Scales s = load_scales<kType>(scales, super);
    for (int t = 0; t < T; ++t) {
      const int64_t at = t * x.groups_stride + p;
      const __m256i sums[2] = {sum[t].low, sum[t].high};
      for (int i = 0; i < 2; ++i) {
        const __m256 scale = _mm256_mul_ps(s.scale[i], _mm256_set1_ps(x.scale[at]));
        acc[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), scale, acc[t][i]);
        if constexpr (!f.has_offset()) {
          acc[t][i] = _mm256_fmadd_ps(s.add[i], _mm256_set1_ps(x.scaled_sum[at]), acc[t][i]);
        }
      }
    }
    scales += f.group_scale_bytes();
    codes += n * f.column_bytes();
  }
  for (int t = 0; t < T; ++t) {
    _mm256_storeu_ps(tile + t * kStripRows, acc[t][0]);
    _mm256_storeu_ps(tile + t * kStripRows + 8, acc[t][1]);
  }
}

template <DType kType, bool kDense>
void dot_strip(const PackedView& w, int64_t s, const QuantizedRows& x, int64_t n_tokens,
               float* tile) {
  const std::byte* const strip = w.strip(s);
  int64_t t = 0;
  for (; t + 4 <= n_tokens; t += 4) {
    dot_tokens<kType, kDense, 4>(w, strip, x.from(t), tile + t * kStripRows);
  }
  for (; t + 2 <= n_tokens; t += 2) {
    dot_tokens<kType, kDense, 2>(w, strip, x.from(t), tile + t * kStripRows);
  }
  if (t < n_tokens) dot_tokens<kType, kDense, 1>(w, strip, x.from(t), tile + t * kStripRows);
}

inline int32_t largest_of(const __m256i& v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

inline int32_t sum_of(const __m256i& v) {
  __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

void quantize(const ColumnGroups& columns, const float* x, const QuantizedRows& out) {
  constexpr float kSmallest = 1e-35f;  // as in linear_scalar.cpp
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  const ColumnGroup* const groups = columns.groups.data();
  const auto n_groups = static_cast<int64_t>(columns.groups.size());
  for (int64_t p = 0; p < n_groups; ++p) {
    const int n = groups[p].n;
    const float* values = x + groups[p].first;
    float padded[32] = {};
    if (n != 32) {
      std::memcpy(padded, values, static_cast<size_t>(n) * sizeof(float));
      values = padded;
    }
    __m256 v[4];
    __m256i bits = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(values + 8 * i);
      bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude_bits));
    }
    const int32_t largest = largest_of(bits);
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    float scale = 0.0f, inverse = 0.0f;
    if (largest >= 0x7f800000) {
      scale = std::numeric_limits<float>::quiet_NaN();
    } else if (magnitude >= kSmallest) {
      scale = magnitude / 127.0f;
      inverse = 127.0f / magnitude;
    }
    __m256i q[4];
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      q[i] = inverse != 0.0f ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)))
                             : _mm256_setzero_si256();
      total = _mm256_add_epi32(total, q[i]);
    }
    // Packing interleaves the 128-bit lanes; the permutation undoes it.
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    alignas(32) int8_t bytes[32];
    _mm256_store_si256(
        reinterpret_cast<__m256i*>(bytes),
        _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    std::memcpy(out.codes + groups[p].padded, bytes,
                static_cast<size_t>((n + kStepCols - 1) / kStepCols * kStepCols));
    const int32_t sum = sum_of(total);
    out.scale[p] = scale;
    out.minus_sum[p] = -sum;
    out.scaled_sum[p] = scale * static_cast<float>(sum);
  }
}

// ---- Float family -------------------------------------------------------------------------------

// Column c of a step as numbers without their offset.
template <DType kType>
inline __m256 column_values(const __m256i& codes, int c) {
  constexpr PackedFormat f = packed_format(kType);
  const __m256i up = _mm256_sll_epi32(codes, _mm_cvtsi32_si128(24 - 8 * c));
  if constexpr (signed_codes<kType>()) return _mm256_cvtepi32_ps(_mm256_srai_epi32(up, 24));
  const __m256i code = _mm256_srli_epi32(up, 24);
  constexpr int kOffset = f.has_offset() ? 1 << f.offset_log2 : 0;
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(kOffset)));
}

template <DType kType, bool kTail>
inline void unpack_step(const std::byte* first, const std::byte* second, const Scales& s, int n,
                        float* panel) {
  const Codes codes = load_codes<kType, kTail>(first, second);
  for (int c = 0; c < n; ++c) {
    const __m256 low = _mm256_mul_ps(s.scale[0], column_values<kType>(codes.low, c));
    const __m256 high = _mm256_mul_ps(s.scale[1], column_values<kType>(codes.high, c));
    _mm256_storeu_ps(panel + c * kStripRows, _mm256_add_ps(low, s.add[0]));
    _mm256_storeu_ps(panel + c * kStripRows + 8, _mm256_add_ps(high, s.add[1]));
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
  __m256 acc[T][2];
  for (int t = 0; t < T; ++t) {
    acc[t][0] = _mm256_loadu_ps(tile + t * kStripRows);
    acc[t][1] = _mm256_loadu_ps(tile + t * kStripRows + 8);
  }
  for (int64_t c = 0; c < n_cols; ++c) {
    const __m256 low = _mm256_loadu_ps(panel + c * kStripRows);
    const __m256 high = _mm256_loadu_ps(panel + c * kStripRows + 8);
    for (int t = 0; t < T; ++t) {
      const __m256 value = _mm256_set1_ps(x[t * x_stride + c]);
      acc[t][0] = _mm256_fmadd_ps(low, value, acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(high, value, acc[t][1]);
    }
  }
  for (int t = 0; t < T; ++t) {
    _mm256_storeu_ps(tile + t * kStripRows, acc[t][0]);
    _mm256_storeu_ps(tile + t * kStripRows + 8, acc[t][1]);
  }
}

void dot_panel(const float* panel, int64_t n_cols, const FloatRows& x, int64_t n_tokens,
               float* tile) {
  int64_t t = 0;
  for (; t + 6 <= n_tokens; t += 6) {
    dot_panel_tokens<6>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  for (; t + 2 <= n_tokens; t += 2) {
    dot_panel_tokens<2>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  if (t < n_tokens) {
    dot_panel_tokens<1>(panel, n_cols, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
}

// 8 elements of a float row as float32.
template <DType kType>
inline __m256 load_floats(const std::byte* p) {
  if constexpr (kType == DType::kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  if constexpr (kType == DType::kF16) return load_halves(p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
}

template <DType kType, int T>
inline void add_32_columns(const std::byte* row, const float* x, int64_t x_stride,
                           __m256 (&acc)[T][4]) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  for (int i = 0; i < 4; ++i) {
    const __m256 weights = load_floats<kType>(row + 8 * i * kElement);
    for (int t = 0; t < T; ++t) {
      acc[t][i] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + t * x_stride + 8 * i), acc[t][i]);
    }
  }
}

template <DType kType, int T>
inline void dot_row_tokens(const std::byte* row, int64_t n, const float* x, int64_t x_stride,
                           float* tile) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  __m256 acc[T][4];
  for (int t = 0; t < T; ++t) {
    for (int i = 0; i < 4; ++i) acc[t][i] = _mm256_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 32 <= n; c += 32) {
    add_32_columns<kType>(row + c * kElement, x + c, x_stride, acc);
  }
  if (c < n) {  // zeros behind the last column
    std::byte weights[32 * kElement] = {};
    float values[T][32] = {};
    std::memcpy(weights, row + c * kElement, static_cast<size_t>((n - c) * kElement));
    for (int t = 0; t < T; ++t) {
      std::memcpy(values[t], x + t * x_stride + c, static_cast<size_t>(n - c) * sizeof(float));
    }
    add_32_columns<kType>(weights, values[0], 32, acc);
  }
  for (int t = 0; t < T; ++t) {
    const __m256 s8 =
        _mm256_add_ps(_mm256_add_ps(acc[t][0], acc[t][2]), _mm256_add_ps(acc[t][1], acc[t][3]));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    tile[t * kStripRows] = _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
}

template <DType kType>
void dot_row(const std::byte* row, int64_t n, const FloatRows& x, int64_t n_tokens, float* tile) {
  int64_t t = 0;
  for (; t + 2 <= n_tokens; t += 2) {
    dot_row_tokens<kType, 2>(row, n, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
  if (t < n_tokens) {
    dot_row_tokens<kType, 1>(row, n, x.data + t * x.stride, x.stride, tile + t * kStripRows);
  }
}

inline void transpose8(__m256 (&v)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
      b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xee);
    }
  }
  for (int k = 0; k < 4; ++k) {
    v[k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
    v[4 + k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
  }
}

template <DType kType>
void transpose_rows(const std::byte* rows, size_t row_stride, int64_t n_rows, int64_t begin,
                    int64_t end, float* panel) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  for (int64_t c = begin; c < end; c += 8) {
    const int64_t n = end - c < 8 ? end - c : 8;
    for (int64_t half = 0; half < 2; ++half) {
      __m256 v[8];
      for (int64_t r = 0; r < 8; ++r) {
        std::byte weights[8 * kElement] = {};
        if (8 * half + r < n_rows) {
          const std::byte* const row = rows + row_stride * static_cast<size_t>(8 * half + r);
          std::memcpy(weights, row + c * kElement, static_cast<size_t>(n * kElement));
        }
        v[r] = load_floats<kType>(weights);
      }
      transpose8(v);
      for (int64_t j = 0; j < n; ++j) {
        _mm256_storeu_ps(panel + (c - begin + j) * kStripRows + 8 * half, v[j]);
      }
    }
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

const LinearKernels& linear_kernels_avx2() {
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
