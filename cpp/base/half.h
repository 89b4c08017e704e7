// Exact scalar conversions between float32 and the two 16-bit formats, as the hardware does them:
// to nearest, ties to even; subnormals kept; NaN stays NaN (made quiet, sign and payload kept).
// Integer code only, so the result does not depend on flush-to-zero settings of the thread.
#pragma once

#include <bit>
#include <cstdint>

namespace coreinfer {

inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) {  // Inf, NaN
    const uint32_t quiet = mantissa ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, a normal float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  // Shift away the bits that do not fit, then round by what was lost; a carry out of the mantissa
  // runs into the exponent, which is what rounding up to the next power of two means.
  uint32_t kept, lost, half_way;
  if (magnitude >= 0x38800000u) {  // normal in float16: from 2^-14
    kept = (magnitude - 0x38000000u) >> 13;
    lost = magnitude & 0x1fffu;
    half_way = 0x1000u;
  } else if (magnitude >= 0x33000000u) {  // subnormal in float16: from 2^-25
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t shift = 126 - (magnitude >> 23);  // 14 … 24
    kept = mantissa >> shift;
    half_way = 1u << (shift - 1);
    lost = mantissa & ((1u << shift) - 1);
  } else {
    return static_cast<uint16_t>(sign);
  }
  kept += (lost > half_way || (lost == half_way && (kept & 1u))) ? 1u : 0u;
  return static_cast<uint16_t>(sign | kept);
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
