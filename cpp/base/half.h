// Exact scalar conversions between float32 and the two 16-bit formats, as the hardware does them:
// to nearest, ties to even; subnormals kept; NaN stays NaN (made quiet, sign and payload kept).
// Choices instead of branches, so that compilers turn loops of them into vector code. Flushing
// subnormals to zero changes nothing: those of float32 are nothing in float16 either way.
#pragma once

#include <bit>
#include <cstdint>

namespace coreinfer {

// a where the condition holds, else b: a form that compilers do not turn back into a branch.
inline uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & (0u - static_cast<uint32_t>(condition)));
}

inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  // Zero and subnormals are multiples of 2^-24, and normal in float32.
  const auto small =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t endless =
      0x7f800000u | (magnitude << 13) | choose(magnitude > 0x7c00u, 0x400000u, 0);  // Inf, NaN
  const uint32_t finite = choose(magnitude < 0x400u, small, normal);
  return std::bit_cast<float>(sign | choose(magnitude < 0x7c00u, finite, endless));
}

inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Rounded by what is shifted away; a carry out of the mantissa runs into the exponent, which is
  // what rounding up to the next power of two means.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // In 0.5 + x the last bit of the mantissa is 2^-24, the unit of float16's subnormals.
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = choose(magnitude < 0x38800000u, small, normal);    // below 2^-14
  const uint32_t number = choose(magnitude < 0x477ff000u, finite, 0x7c00u);  // from 65520 on: Inf
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  return static_cast<uint16_t>(sign | choose(magnitude > 0x7f800000u, nan, number));
}

inline float bf16_to_f32(uint16_t brain) {
  return std::bit_cast<float>(static_cast<uint32_t>(brain) << 16);
}

inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace coreinfer
