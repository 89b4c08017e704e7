// Row functions with AVX-512: the words that vector_simd.inc is made of.
#include "kernels/vector_tables.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "base/half.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512dq")

namespace coreinfer::kernels {
namespace {

using F = __m512;
using I = __m512i;
constexpr int64_t kLanes = 16;
constexpr int64_t kProductRows = 6;  // 6 x 4 sums, 4 vectors of a line, 1 factor: 29 registers
constexpr int kProductCols = 4;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_half(const uint16_t* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline __m256i to_half(F x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(x));
}
inline void store_half(uint16_t* p, F x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_half(x));
}
inline F load_any(const float* p) { return load(p); }
inline F load_any(const float* p, int64_t n) { return load(p, n); }
inline F load_any(const uint16_t* p) { return load_half(p); }
inline F load_any(const uint16_t* p, int64_t n) { return load_half(p, n); }

inline F all(float x) { return _mm512_set1_ps(x); }
inline F add_(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div_(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma_(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F min_(F a, F b) { return _mm512_min_ps(a, b); }
inline F max_(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs_(F x) { return _mm512_abs_ps(x); }
inline F negate(F x) { return _mm512_xor_ps(x, all(-0.0f)); }
inline F copy_sign(F size, F sign) {
  return _mm512_or_ps(abs_(size), _mm512_and_ps(sign, all(-0.0f)));
}
inline F round_(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F pick_le(F x, F y, F a, F b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LE_OQ), b, a);
}
inline F times_pow2(F x, F n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(F x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(F x) { return _mm512_reduce_max_ps(x); }

inline void load_pairs(const float* p, F& even, F& odd) {
  const F low = load(p), high = load(p + kLanes);
  const I first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(low, first, high);
  odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}
inline void store_pairs(float* p, F even, F odd) {
  const I first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(p, _mm512_permutex2var_ps(even, first, odd));
  store(p + kLanes,
        _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd));
}

struct D {
  __m512d low, high;
};
inline __m512d low_half(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d high_half(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline D zero_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline D add_values(D sum, F x) {
  return {_mm512_add_pd(sum.low, low_half(x)), _mm512_add_pd(sum.high, high_half(x))};
}
inline D add_squares(D sum, F x) {
  const __m512d low = low_half(x), high = high_half(x);
  return {_mm512_fmadd_pd(low, low, sum.low), _mm512_fmadd_pd(high, high, sum.high)};
}
inline double total(D sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }
// float(double(x)^2 * factor)
inline F square_times(F x, double factor) {
  const __m512d low = low_half(x), high = high_half(x), f = _mm512_set1_pd(factor);
  const __m256 a = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_mul_pd(low, low), f));
  const __m256 b = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_mul_pd(high, high), f));
  return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}

inline I all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline I load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline void store_ints(void* p, I x) { _mm512_storeu_si512(p, x); }
inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
inline I max_(I a, I b) { return _mm512_max_epi32(a, b); }
inline I magnitudes(const float* p) { return and_(load_ints(p), all_ints(0x7fffffff)); }
inline int32_t largest_of(I x) { return _mm512_reduce_max_epi32(x); }
inline int64_t sum_of(I x) { return _mm512_reduce_add_epi32(x); }
inline I count_greater(I count, I x, I limit) {
  return _mm512_mask_add_epi32(count, _mm512_cmpgt_epi32_mask(x, limit), count, all_ints(1));
}
inline F add_one_above(F scores, I x, I limit) {
  return _mm512_mask_add_ps(scores, _mm512_cmpgt_epi32_mask(x, limit), scores, all(1.0f));
}
inline F load_codes(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_codes(int8_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// Copies the keys (x & mask) within [low, high] to out, in order. out has room for a vector more
// and may be `from`.
inline void keep_between(const void* from, int64_t n, int32_t mask, int32_t low, int32_t high,
                         int32_t* out) {
  const I bits = all_ints(mask), first = all_ints(low), last = all_ints(high);
  int64_t m = 0;
  const auto keep = [&](I keys, __mmask16 lanes) {
    const __mmask16 kept =
        _mm512_mask_cmple_epi32_mask(_mm512_mask_cmple_epi32_mask(lanes, first, keys), keys, last);
    _mm512_storeu_si512(out + m, _mm512_maskz_compress_epi32(kept, keys));
    m += std::popcount(static_cast<uint32_t>(kept));
  };
  const auto* words = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) keep(and_(load_ints(words + i * 4), bits), 0xffff);
  if (i < n) {
    const __mmask16 lanes = first_lanes(n - i);
    keep(and_(_mm512_maskz_loadu_epi32(lanes, words + i * 4), bits), lanes);
  }
}

#include "kernels/vector_simd.inc"

}  // namespace

void use_avx512(VectorTables& tables) { use_all(tables); }

}  // namespace coreinfer::kernels
#pragma GCC pop_options
#endif
