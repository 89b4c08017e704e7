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

// 16 registers: two sums of 16 bits a token. A panel's column is two registers.
constexpr int kDotTokens = 4, kPairTokens = 2, kPanelTokens = 6, kRowTokens = 2, kRowPairTokens = 1;

inline Floats broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Ints broadcast(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const Floats& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline Floats add(const Floats& a, const Floats& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats mul(const Floats& a, const Floats& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats to_floats(const Ints& v) {
  return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)};
}

// Steps whose sums of 2 products still fit into 16 bits: 2 * 127 * (largest code) * steps < 2^15.
template <DType kType>
constexpr int steps_in_16_bits() {
  return 32767 / (2 * 127 * ((1 << packed_format(kType).bits) - 1));
}

inline __m256i pair_sums(const __m256i& sums16) {
  return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
}

inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Adds n_steps steps, no more than steps_in_16_bits().
template <DType kType, bool kTail, int T>
inline void add_few_steps(const std::byte* first, const std::byte* second, int n_steps,
                          const int8_t* x, int64_t x_stride, Ints (&sum)[T]) {
  constexpr PackedFormat f = packed_format(kType);
  Ints sum16[T];
  for (int t = 0; t < T; ++t) sum16[t] = broadcast(0);
  for (int i = 0; i < n_steps; ++i) {
    const Codes codes = load_codes<kType, kTail>(first, second);
    for (int t = 0; t < T; ++t) {
      const __m256i four = broadcast4(x + t * x_stride);
      sum16[t].low = _mm256_add_epi16(sum16[t].low, _mm256_maddubs_epi16(codes.low, four));
      sum16[t].high = _mm256_add_epi16(sum16[t].high, _mm256_maddubs_epi16(codes.high, four));
    }
    first += kStepCols * 2 * f.plane_bits(0);
    second += kStepCols * 2 * f.plane_bits(1);
    x += kStepCols;
  }
  for (int t = 0; t < T; ++t) {
    sum[t].low = _mm256_add_epi32(sum[t].low, pair_sums(sum16[t].low));
    sum[t].high = _mm256_add_epi32(sum[t].high, pair_sums(sum16[t].high));
  }
}

// One step of signed codes, as |code| times the activation with the code's sign.
template <DType kType, bool kTail, int T>
inline void add_signed_step(const std::byte* first, const std::byte* second, const int8_t* x,
                            int64_t x_stride, Ints (&sum)[T]) {
  const Codes codes = load_codes<kType, kTail>(first, second);
  const __m256i low = _mm256_abs_epi8(codes.low), high = _mm256_abs_epi8(codes.high);
  for (int t = 0; t < T; ++t) {
    const __m256i four = broadcast4(x + t * x_stride);
    const __m256i a = _mm256_maddubs_epi16(low, _mm256_sign_epi8(four, codes.low));
    const __m256i b = _mm256_maddubs_epi16(high, _mm256_sign_epi8(four, codes.high));
    sum[t].low = _mm256_add_epi32(sum[t].low, pair_sums(a));
    sum[t].high = _mm256_add_epi32(sum[t].high, pair_sums(b));
  }
}

template <DType kType, bool kTail, int T>
inline void add_steps_of_one(const std::byte* first, const std::byte* second, int n_steps,
                             const int8_t* x, int64_t x_stride, Ints (&sum)[T]) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kSteps = signed_codes<kType>() ? 1 : steps_in_16_bits<kType>();
  for (int i = 0; i < n_steps; i += kSteps) {
    if constexpr (signed_codes<kType>()) {
      add_signed_step<kType, kTail>(first, second, x, x_stride, sum);
    } else {
      const int count = n_steps - i < kSteps ? n_steps - i : kSteps;
      add_few_steps<kType, kTail>(first, second, count, x, x_stride, sum);
    }
    first += kSteps * kStepCols * 2 * f.plane_bits(0);
    second += kSteps * kStepCols * 2 * f.plane_bits(1);
    x += kSteps * kStepCols;
  }
}

template <DType kType, bool kTail, int S, int T>
inline void add_steps(const std::byte* const (&first)[S], const std::byte* const (&second)[S],
                      int n_steps, const int8_t* x, int64_t x_stride, Ints (&sum)[S][T]) {
  for (int s = 0; s < S; ++s) {
    add_steps_of_one<kType, kTail>(first[s], second[s], n_steps, x, x_stride, sum[s]);
  }
}

template <DType kType>
inline __m256 column_half(const __m256i& codes, int c) {
  constexpr PackedFormat f = packed_format(kType);
  const __m256i up = _mm256_sll_epi32(codes, _mm_cvtsi32_si128(24 - 8 * c));
  if constexpr (signed_codes<kType>()) return _mm256_cvtepi32_ps(_mm256_srai_epi32(up, 24));
  constexpr int kOffset = f.has_offset() ? 1 << f.offset_log2 : 0;
  const __m256i code = _mm256_srli_epi32(up, 24);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(kOffset)));
}

template <DType kType>
inline Floats column(const Codes& codes, int c) {
  return {column_half<kType>(codes.low, c), column_half<kType>(codes.high, c)};
}

// 8 elements of a float row as float32.
template <DType kType>
inline __m256 load_floats(const std::byte* p) {
  if constexpr (kType == DType::kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  if constexpr (kType == DType::kF16) return load_halves(p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
}

template <DType kType>
inline Floats load_row(const std::byte* p) {
  return {load_floats<kType>(p), load_floats<kType>(p + 8 * row_bytes(kType, 1))};
}

inline float total(const Floats& low, const Floats& high) {
  const __m256 s8 =
      _mm256_add_ps(_mm256_add_ps(low.low, high.low), _mm256_add_ps(low.high, high.high));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

#include "kernels/linear_simd.inc"

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
