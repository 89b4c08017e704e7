// Row functions with AVX2, FMA and F16C: the words that vector_simd.inc is made of.
#include "kernels/vector_tables.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "base/half.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")

namespace coreinfer::kernels {
namespace {

using F = __m256;
using I = __m256i;
constexpr int64_t kLanes = 8;
constexpr int64_t kProductRows = 6;  // 6 x 2 sums, 2 vectors of a line, 1 factor: 15 registers
constexpr int kProductCols = 2;

inline I first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline F load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_half(const uint16_t* p, int64_t n) {
  alignas(16) uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_half(lanes);
}
inline __m128i to_half(F x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store_half(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(x));
}
inline void store_half(uint16_t* p, F x, int64_t n) {
  alignas(16) uint16_t lanes[kLanes];
  store_half(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
}
inline F load_any(const float* p) { return load(p); }
inline F load_any(const float* p, int64_t n) { return load(p, n); }
inline F load_any(const uint16_t* p) { return load_half(p); }
inline F load_any(const uint16_t* p, int64_t n) { return load_half(p, n); }

inline F all(float x) { return _mm256_set1_ps(x); }
inline F add_(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div_(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma_(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min_(F a, F b) { return _mm256_min_ps(a, b); }
inline F max_(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs_(F x) { return _mm256_andnot_ps(all(-0.0f), x); }
inline F negate(F x) { return _mm256_xor_ps(x, all(-0.0f)); }
inline F copy_sign(F size, F sign) {
  return _mm256_or_ps(abs_(size), _mm256_and_ps(sign, all(-0.0f)));
}
inline F round_(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F pick_le(F x, F y, F a, F b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LE_OQ));
}
inline F pow2(I n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline F times_pow2(F x, F n) {
  const I whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return mul(mul(x, pow2(half)), pow2(_mm256_sub_epi32(whole, half)));
}
inline float sum_of(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest_of(F x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline void load_pairs(const float* p, F& even, F& odd) {
  const F a = load(p), b = load(p + kLanes);
  const F low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  even = _mm256_shuffle_ps(low, high, 0x88);
  odd = _mm256_shuffle_ps(low, high, 0xdd);
}
inline void store_pairs(float* p, F even, F odd) {
  const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  store(p, _mm256_permute2f128_ps(low, high, 0x20));
  store(p + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
}

struct D {
  __m256d low, high;
};
inline __m256d low_half(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline __m256d high_half(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline D zero_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline D add_values(D sum, F x) {
  return {_mm256_add_pd(sum.low, low_half(x)), _mm256_add_pd(sum.high, high_half(x))};
}
inline D add_squares(D sum, F x) {
  const __m256d low = low_half(x), high = high_half(x);
  return {_mm256_fmadd_pd(low, low, sum.low), _mm256_fmadd_pd(high, high, sum.high)};
}
inline double total(D sum) {
  const __m256d s = _mm256_add_pd(sum.low, sum.high);
  const __m128d t = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
  return _mm_cvtsd_f64(_mm_add_sd(t, _mm_unpackhi_pd(t, t)));
}
// float(double(x)^2 * factor)
inline F square_times(F x, double factor) {
  const __m256d low = low_half(x), high = high_half(x), f = _mm256_set1_pd(factor);
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_mul_pd(_mm256_mul_pd(high, high), f)),
                         _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_mul_pd(low, low), f)));
}

inline I all_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline I load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_ints(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
inline I max_(I a, I b) { return _mm256_max_epi32(a, b); }
inline I magnitudes(const float* p) { return and_(load_ints(p), all_ints(0x7fffffff)); }
inline int32_t largest_of(I x) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline int64_t sum_of(I x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline I count_greater(I count, I x, I limit) {
  return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(x, limit));
}
inline F add_one_above(F scores, I x, I limit) {
  const F above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(x, limit));
  return add_(scores, _mm256_and_ps(above, all(1.0f)));
}
inline F load_codes(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store_codes(int8_t* p, F x) {
  const I codes = _mm256_cvtps_epi32(x);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// For each set of lanes, the lanes in it, in order: what AVX-512's compress does by itself.
struct Compress {
  alignas(64) uint8_t lanes[256][kLanes] = {};
  constexpr Compress() {
    for (int set = 0; set < 256; ++set) {
      int m = 0;
      for (uint8_t lane = 0; lane < kLanes; ++lane) {
        if (set >> lane & 1) lanes[set][m++] = lane;
      }
    }
  }
};
constexpr Compress kCompress;

// Copies the keys (x & mask) within [low, high] to out, in order. out has room for a vector more
// and may be `from`.
inline void keep_between(const void* from, int64_t n, int32_t mask, int32_t low, int32_t high,
                         int32_t* out) {
  const I bits = all_ints(mask), first = all_ints(low), last = all_ints(high);
  const auto* words = static_cast<const char*>(from);
  int64_t m = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I keys = and_(load_ints(words + i * 4), bits);
    const I outside =
        _mm256_or_si256(_mm256_cmpgt_epi32(first, keys), _mm256_cmpgt_epi32(keys, last));
    const auto kept = static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(outside)));
    const I order = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[kept])));
    store_ints(out + m, _mm256_permutevar8x32_epi32(keys, order));
    m += std::popcount(kept);
  }
  for (; i < n; ++i) {
    int32_t key;
    std::memcpy(&key, words + i * 4, 4);
    key &= mask;
    out[m] = key;  // always written, kept only if it counts: no branch to mispredict
    m += (key >= low) & (key <= high);
  }
}

#include "kernels/vector_simd.inc"

}  // namespace

void use_avx2(VectorTables& tables) { use_all(tables); }

}  // namespace coreinfer::kernels
#pragma GCC pop_options
#endif
