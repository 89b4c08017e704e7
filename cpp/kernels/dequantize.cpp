#include "kernels/dequantize.h"

#include <cstring>
#include <string>

#include "base/error.h"
#include "base/half.h"
#include "tensor/blocks.h"

namespace coreinfer {
namespace {

// ---- Simple types: 32 elements a block ----------------------------------------------------------

void unpack(const BlockQ4_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * static_cast<float>((b.qs[j] & 15) - 8);
    y[j + 16] = d * static_cast<float>((b.qs[j] >> 4) - 8);
  }
}

void unpack(const BlockQ4_1& b, float* y) {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * static_cast<float>(b.qs[j] & 15) + m;
    y[j + 16] = d * static_cast<float>(b.qs[j] >> 4) + m;
  }
}

// The fifth bit of element i, as 16 or 0.
int fifth_bit(const uint8_t (&qh)[4], int i) { return ((qh[i / 8] >> (i % 8)) & 1) << 4; }

void unpack(const BlockQ5_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * static_cast<float>(((b.qs[j] & 15) | fifth_bit(b.qh, j)) - 16);
    y[j + 16] = d * static_cast<float>(((b.qs[j] >> 4) | fifth_bit(b.qh, j + 16)) - 16);
  }
}

void unpack(const BlockQ5_1& b, float* y) {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * static_cast<float>((b.qs[j] & 15) | fifth_bit(b.qh, j)) + m;
    y[j + 16] = d * static_cast<float>((b.qs[j] >> 4) | fifth_bit(b.qh, j + 16)) + m;
  }
}

void unpack(const BlockQ8_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(b.qs[j]);
}

void unpack(const BlockIQ4_NL& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * static_cast<float>(kIQ4Values[b.qs[j] & 15]);
    y[j + 16] = d * static_cast<float>(kIQ4Values[b.qs[j] >> 4]);
  }
}

// ---- "K" types: 256 elements a super-block ------------------------------------------------------

// Two bits of element i, for the layouts in which 32 bytes hold 128 elements.
int two_bits(const uint8_t* qs, int i) {
  const int half = i / 128, k = (i % 128) / 32;
  return (qs[32 * half + i % 32] >> (2 * k)) & 3;
}

// Four bits of element i, for the layouts in which 32 bytes hold 64 elements.
int four_bits(const uint8_t* qs, int i) {
  const uint8_t byte = qs[32 * (i / 64) + i % 32];
  return (i % 64) < 32 ? byte & 15 : byte >> 4;
}

void unpack(const BlockQ2_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int g = 0; g < 16; ++g) {
    const float scale = d * static_cast<float>(b.scales[g] & 15);
    const float minimum = dmin * static_cast<float>(b.scales[g] >> 4);
    for (int i = 16 * g; i < 16 * g + 16; ++i) {
      y[i] = scale * static_cast<float>(two_bits(b.qs, i)) - minimum;
    }
  }
}

void unpack(const BlockQ3_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int g = 0; g < 16; ++g) {
    const int low = g < 8 ? b.scales[g] & 15 : b.scales[g - 8] >> 4;
    const int high = (b.scales[8 + g % 4] >> (2 * (g / 4))) & 3;
    const float scale = d * static_cast<float>((low | (high << 4)) - 32);
    for (int i = 16 * g; i < 16 * g + 16; ++i) {
      const int third = (b.hmask[i % 32] >> (i / 32)) & 1;
      y[i] = scale * static_cast<float>(two_bits(b.qs, i) - (third ? 0 : 4));
    }
  }
}

// The 6-bit scale and minimum of group g of Q4_K and Q5_K.
void scale_and_minimum(const uint8_t (&s)[12], int g, int* scale, int* minimum) {
  if (g < 4) {
    *scale = s[g] & 63;
    *minimum = s[g + 4] & 63;
  } else {
    *scale = (s[g + 4] & 15) | ((s[g - 4] >> 6) << 4);
    *minimum = (s[g + 4] >> 4) | ((s[g] >> 6) << 4);
  }
}

void unpack(const BlockQ4_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int g = 0; g < 8; ++g) {
    int s, m;
    scale_and_minimum(b.scales, g, &s, &m);
    const float scale = d * static_cast<float>(s), minimum = dmin * static_cast<float>(m);
    for (int i = 32 * g; i < 32 * g + 32; ++i) {
      y[i] = scale * static_cast<float>(four_bits(b.qs, i)) - minimum;
    }
  }
}

void unpack(const BlockQ5_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int g = 0; g < 8; ++g) {
    int s, m;
    scale_and_minimum(b.scales, g, &s, &m);
    const float scale = d * static_cast<float>(s), minimum = dmin * static_cast<float>(m);
    for (int i = 32 * g; i < 32 * g + 32; ++i) {
      const int fifth = ((b.qh[i % 32] >> g) & 1) << 4;
      y[i] = scale * static_cast<float>(four_bits(b.qs, i) | fifth) - minimum;
    }
  }
}

void unpack(const BlockQ6_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int g = 0; g < 16; ++g) {
    const float scale = d * static_cast<float>(b.scales[g]);
    for (int i = 16 * g; i < 16 * g + 16; ++i) {
      const uint8_t byte = b.ql[64 * (i / 128) + i % 64];
      const int low = (i % 128) < 64 ? byte & 15 : byte >> 4;
      y[i] = scale * static_cast<float>((low | (two_bits(b.qh, i) << 4)) - 32);
    }
  }
}

void unpack(const BlockIQ4_XS& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int g = 0; g < 8; ++g) {
    const int low = (b.scales_l[g / 2] >> (4 * (g % 2))) & 15;
    const int high = (b.scales_h >> (2 * g)) & 3;
    const float scale = d * static_cast<float>((low | (high << 4)) - 32);
    for (int j = 0; j < 16; ++j) {
      const uint8_t byte = b.qs[16 * g + j];
      y[32 * g + j] = scale * static_cast<float>(kIQ4Values[byte & 15]);
      y[32 * g + j + 16] = scale * static_cast<float>(kIQ4Values[byte >> 4]);
    }
  }
}

// ---- Rows ---------------------------------------------------------------------------------------

template <class Block, int kElements>
void unpack_row(const std::byte* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += kElements, src += sizeof(Block)) {
    Block block;
    std::memcpy(&block, src, sizeof block);  // src may be unaligned
    unpack(block, dst + i);
  }
}

template <float (*kConvert)(uint16_t)>
void convert_row(const std::byte* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, src + 2 * i, 2);
    dst[i] = kConvert(bits);
  }
}

}  // namespace

void dequantize_row(DType type, const std::byte* src, float* dst, int64_t n) {
  const DTypeTraits& t = traits(type);
  if (n < 0 || n % t.block_size != 0) {
    throw_error(ErrorKind::kValue, "%lld elements of %s, expected a multiple of its block size %d",
                static_cast<long long>(n), std::string(t.name).c_str(), t.block_size);
  }
  if (n == 0) return;
  switch (type) {
    case DType::kF32:
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return;
    case DType::kF16:
      return convert_row<f16_to_f32>(src, dst, n);
    case DType::kBF16:
      return convert_row<bf16_to_f32>(src, dst, n);
    case DType::kQ4_0:
      return unpack_row<BlockQ4_0, 32>(src, dst, n);
    case DType::kQ4_1:
      return unpack_row<BlockQ4_1, 32>(src, dst, n);
    case DType::kQ5_0:
      return unpack_row<BlockQ5_0, 32>(src, dst, n);
    case DType::kQ5_1:
      return unpack_row<BlockQ5_1, 32>(src, dst, n);
    case DType::kQ8_0:
      return unpack_row<BlockQ8_0, 32>(src, dst, n);
    case DType::kQ2_K:
      return unpack_row<BlockQ2_K, 256>(src, dst, n);
    case DType::kQ3_K:
      return unpack_row<BlockQ3_K, 256>(src, dst, n);
    case DType::kQ4_K:
      return unpack_row<BlockQ4_K, 256>(src, dst, n);
    case DType::kQ5_K:
      return unpack_row<BlockQ5_K, 256>(src, dst, n);
    case DType::kQ6_K:
      return unpack_row<BlockQ6_K, 256>(src, dst, n);
    case DType::kIQ4_NL:
      return unpack_row<BlockIQ4_NL, 32>(src, dst, n);
    case DType::kIQ4_XS:
      return unpack_row<BlockIQ4_XS, 256>(src, dst, n);
  }
}

}  // namespace coreinfer
