// Row functions with NEON on AArch64: the words that vector_simd.inc is made of.
#include "kernels/vector_tables.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "base/half.h"

namespace coreinfer::kernels {
namespace {

using F = float32x4_t;
using I = int32x4_t;
constexpr int64_t kLanes = 4;
constexpr int64_t kProductRows = 6;  // 6 x 4 sums, 4 vectors of a line, 1 factor: 29 registers
constexpr int kProductCols = 4;

inline F load(const float* p) { return vld1q_f32(p); }
inline F load(const float* p, int64_t n) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline void store(float* p, F x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}
inline F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F load_half(const uint16_t* p, int64_t n) {
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_half(lanes);
}
inline void store_half(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void store_half(uint16_t* p, F x, int64_t n) {
  uint16_t lanes[kLanes];
  store_half(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
}
inline F load_any(const float* p) { return load(p); }
inline F load_any(const float* p, int64_t n) { return load(p, n); }
inline F load_any(const uint16_t* p) { return load_half(p); }
inline F load_any(const uint16_t* p, int64_t n) { return load_half(p, n); }

inline F all(float x) { return vdupq_n_f32(x); }
inline F add_(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div_(F a, F b) { return vdivq_f32(a, b); }
inline F fma_(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F min_(F a, F b) { return vminq_f32(a, b); }
inline F max_(F a, F b) { return vmaxq_f32(a, b); }
inline F abs_(F x) { return vabsq_f32(x); }
inline F negate(F x) { return vnegq_f32(x); }
inline F copy_sign(F size, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size); }
inline F round_(F x) { return vrndnq_f32(x); }
inline F pick_le(F x, F y, F a, F b) { return vbslq_f32(vcleq_f32(x, y), a, b); }
inline F pow2(I n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline F times_pow2(F x, F n) {
  const I whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return mul(mul(x, pow2(half)), pow2(vsubq_s32(whole, half)));
}
inline float sum_of(F x) { return vaddvq_f32(x); }
inline float largest_of(F x) { return vmaxvq_f32(x); }

inline void load_pairs(const float* p, F& even, F& odd) {
  const float32x4x2_t pairs = vld2q_f32(p);
  even = pairs.val[0];
  odd = pairs.val[1];
}
inline void store_pairs(float* p, F even, F odd) { vst2q_f32(p, {{even, odd}}); }

struct D {
  float64x2_t low, high;
};
inline float64x2_t low_half(F x) { return vcvt_f64_f32(vget_low_f32(x)); }
inline float64x2_t high_half(F x) { return vcvt_high_f64_f32(x); }
inline D zero_sum() { return {vdupq_n_f64(0), vdupq_n_f64(0)}; }
inline D add_values(D sum, F x) {
  return {vaddq_f64(sum.low, low_half(x)), vaddq_f64(sum.high, high_half(x))};
}
inline D add_squares(D sum, F x) {
  const float64x2_t low = low_half(x), high = high_half(x);
  return {vfmaq_f64(sum.low, low, low), vfmaq_f64(sum.high, high, high)};
}
inline double total(D sum) { return vaddvq_f64(vaddq_f64(sum.low, sum.high)); }
// float(double(x)^2 * factor)
inline F square_times(F x, double factor) {
  const float64x2_t low = low_half(x), high = high_half(x);
  return vcombine_f32(vcvt_f32_f64(vmulq_n_f64(vmulq_f64(low, low), factor)),
                      vcvt_f32_f64(vmulq_n_f64(vmulq_f64(high, high), factor)));
}

inline I all_ints(int32_t x) { return vdupq_n_s32(x); }
inline I load_ints(const void* p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline void store_ints(void* p, I x) {
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(x));
}
inline I and_(I a, I b) { return vandq_s32(a, b); }
inline I max_(I a, I b) { return vmaxq_s32(a, b); }
inline I magnitudes(const float* p) { return and_(load_ints(p), all_ints(0x7fffffff)); }
inline int32_t largest_of(I x) { return vmaxvq_s32(x); }
inline int64_t sum_of(I x) { return vaddvq_s32(x); }
inline I count_greater(I count, I x, I limit) {
  return vsubq_s32(count, vreinterpretq_s32_u32(vcgtq_s32(x, limit)));
}
inline F add_one_above(F scores, I x, I limit) {
  const uint32x4_t one = vreinterpretq_u32_f32(all(1.0f));
  return add_(scores, vreinterpretq_f32_u32(vandq_u32(vcgtq_s32(x, limit), one)));
}
inline F load_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}
inline void store_codes(int8_t* p, F x) {
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
  const int32_t four =
      vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(p, &four, sizeof(four));
}

// Copies the keys (x & mask) within [low, high] to out, in order. out has room for a vector more
// and may be `from`.
inline void keep_between(const void* from, int64_t n, int32_t mask, int32_t low, int32_t high,
                         int32_t* out) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t key;
    std::memcpy(&key, static_cast<const char*>(from) + i * 4, 4);
    key &= mask;
    out[m] = key;  // always written, kept only if it counts: no branch to mispredict
    m += (key >= low) & (key <= high);
  }
}

#include "kernels/vector_simd.inc"

}  // namespace

void use_neon(VectorTables& tables) { use_all(tables); }

}  // namespace coreinfer::kernels
#endif
