// Chunks of 32 columns read from a row of GGUF blocks (tensor/blocks.h), a byte a code, four a
// word, and the scales as WeightView keeps them. Used where weights come onto the device and for
// embeddings.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "weight_view.h"

namespace coreinfer::cuda {

struct SourceChunk {
  // Element e: byte e % 4 of word e / 4. 8-bit codes are signed; looked-up ones are indices.
  uint32_t codes[kChunk / 4];
  RawScales scales;
};

// Blocks and their parts begin at even addresses.
__device__ inline uint32_t read_u16(const uint8_t* p) {
  return *reinterpret_cast<const uint16_t*>(p);
}
__device__ inline uint32_t read_u32(const uint8_t* p) {
  return read_u16(p) | read_u16(p + 2) << 16;
}

namespace source {

constexpr int kWords = kChunk / 4;

__device__ inline void nibbles(const uint8_t* qs, uint32_t* codes) {
#pragma unroll
  for (int i = 0; i < kWords / 2; ++i) {
    const uint32_t word = read_u32(qs + 4 * i);
    codes[i] = word & 0x0f0f0f0fu;
    codes[i + kWords / 2] = (word >> 4) & 0x0f0f0f0fu;
  }
}

// Four bits to the lowest of four bytes each.
__device__ inline uint32_t spread(uint32_t bits) {
  return ((bits & 15u) * 0x00204081u) & 0x01010101u;
}

__device__ inline void fifth_bits(const uint8_t* qh, uint32_t* codes) {
  const uint32_t bits = read_u32(qh);
#pragma unroll
  for (int i = 0; i < kWords; ++i) codes[i] |= spread(bits >> (4 * i)) << 4;
}

// codes = those bits of 32 bytes from p on, from bit `shift` of each.
__device__ inline void take_bits(const uint8_t* p, int shift, uint32_t mask, uint32_t* codes) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) codes[i] = (read_u32(p + 4 * i) >> shift) & mask;
}

// Puts bit `bit` of 32 bytes from p on above the lower `shift` bits of the codes.
__device__ inline void add_bit(const uint8_t* p, int bit, int shift, uint32_t* codes) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    codes[i] |= ((read_u32(p + 4 * i) >> bit) & 0x01010101u) << shift;
  }
}

// Group g of the types whose 32 bytes of qs hold 64 elements.
__device__ inline void half_bytes(const uint8_t* qs, int g, uint32_t* codes) {
  take_bits(qs + 32 * (g / 2), 4 * (g % 2), 0x0f0f0f0fu, codes);
}

// Group g of the types whose 32 bytes hold 128 elements, two bits each.
__device__ inline void quarter_bytes(const uint8_t* qs, int g, uint32_t* codes) {
  take_bits(qs + 32 * (g / 4), 2 * (g % 4), 0x03030303u, codes);
}

// The 6-bit scale and minimum of group g of Q4_K and Q5_K, as two bytes.
__device__ inline uint32_t scale_and_minimum(const uint8_t* s, int g) {
  if (g < 4) return (s[g] & 63u) | (s[g + 4] & 63u) << 8;
  const uint32_t scale = (s[g + 4] & 15u) | (s[g - 4] >> 6) << 4;
  const uint32_t minimum = (s[g + 4] >> 4) | (s[g] >> 6) << 4;
  return scale | minimum << 8;
}

// The centred scale of group g (of 16) of Q3_K, as a byte.
__device__ inline uint32_t scale_q3(const uint8_t* s, int g) {
  const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
  const int high = (s[8 + g % 4] >> (2 * (g / 4))) & 3;
  return static_cast<uint8_t>((low | high << 4) - 32);
}

}  // namespace source

// Chunk number `chunk` of a row of a quantised type.
__device__ inline void read_chunk(DType type, const uint8_t* row, int64_t chunk, SourceChunk* out) {
  const int g = static_cast<int>(chunk % 8);
  uint32_t* codes = out->codes;
  out->scales = {0, 0};
  switch (type) {
    case DType::kQ4_0:
    case DType::kIQ4_NL: {
      const uint8_t* b = row + chunk * static_cast<int64_t>(sizeof(BlockQ4_0));
      out->scales.meta = read_u16(b);
      source::nibbles(b + 2, codes);
      break;
    }
    case DType::kQ4_1: {
      const uint8_t* b = row + chunk * static_cast<int64_t>(sizeof(BlockQ4_1));
      out->scales.meta = read_u16(b) | read_u16(b + 2) << 16;
      source::nibbles(b + 4, codes);
      break;
    }
    case DType::kQ5_0: {
      const uint8_t* b = row + chunk * static_cast<int64_t>(sizeof(BlockQ5_0));
      out->scales.meta = read_u16(b);
      source::nibbles(b + 6, codes);
      source::fifth_bits(b + 2, codes);
      break;
    }
    case DType::kQ5_1: {
      const uint8_t* b = row + chunk * static_cast<int64_t>(sizeof(BlockQ5_1));
      out->scales.meta = read_u16(b) | read_u16(b + 2) << 16;
      source::nibbles(b + 8, codes);
      source::fifth_bits(b + 4, codes);
      break;
    }
    case DType::kQ8_0: {
      const uint8_t* b = row + chunk * static_cast<int64_t>(sizeof(BlockQ8_0));
      out->scales.meta = read_u16(b);
      source::take_bits(b + 2, 0, 0xffffffffu, codes);
      break;
    }
    case DType::kQ2_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ2_K));
      out->scales.meta = b[2 * g] | static_cast<uint32_t>(b[2 * g + 1]) << 8;
      out->scales.super = read_u16(b + 80) | read_u16(b + 82) << 16;
      source::quarter_bytes(b + 16, g, codes);
      break;
    }
    case DType::kQ3_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ3_K));
      out->scales.meta = source::scale_q3(b + 96, 2 * g) | source::scale_q3(b + 96, 2 * g + 1) << 8;
      out->scales.super = read_u16(b + 108);
      source::quarter_bytes(b + 32, g, codes);
      source::add_bit(b, g, 2, codes);
      break;
    }
    case DType::kQ4_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ4_K));
      out->scales.super = read_u16(b) | read_u16(b + 2) << 16;
      out->scales.meta = source::scale_and_minimum(b + 4, g);
      source::half_bytes(b + 16, g, codes);
      break;
    }
    case DType::kQ5_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ5_K));
      out->scales.super = read_u16(b) | read_u16(b + 2) << 16;
      out->scales.meta = source::scale_and_minimum(b + 4, g);
      source::half_bytes(b + 48, g, codes);
      source::add_bit(b + 16, g, 4, codes);
      break;
    }
    case DType::kQ6_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ6_K));
      out->scales.super = read_u16(b + 208);
      out->scales.meta = b[192 + 2 * g] | static_cast<uint32_t>(b[193 + 2 * g]) << 8;
      source::quarter_bytes(b + 128, g, codes);
      const uint8_t* low = b + 64 * (g / 4) + 32 * (g % 2);
      const int shift = g % 4 < 2 ? 0 : 4;
#pragma unroll
      for (int i = 0; i < source::kWords; ++i) {
        codes[i] = codes[i] << 4 | ((read_u32(low + 4 * i) >> shift) & 0x0f0f0f0fu);
      }
      break;
    }
    case DType::kIQ4_XS: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockIQ4_XS));
      const int low = (b[4 + g / 2] >> (4 * (g % 2))) & 15;
      const int high = (read_u16(b + 2) >> (2 * g)) & 3;
      const uint32_t scale = static_cast<uint8_t>((low | high << 4) - 32);
      out->scales.meta = scale | scale << 8;
      out->scales.super = read_u16(b);
      source::nibbles(b + 8 + 16 * g, codes);
      break;
    }
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      break;
  }
}

// Value e of a chunk whose code is q, as the format defines it (kernels/dequantize.h says the order
// of operations).
__device__ inline float value_of(Codes kind, int offset, const ChunkScales& s, int e,
                                 uint8_t code) {
  int q = code;
  if (kind == Codes::k8) q = static_cast<int8_t>(code);
  if (kind == Codes::k4Lookup) q = code_of(look_up(code), 0);
  const bool second = e >= kChunk / 2;
  const float scale = second ? s.s[1] : s.s[0], minimum = second ? s.m[1] : s.m[0];
  return scale * static_cast<float>(q - offset) + minimum;
}

// Writes a chunk's codes to their places in the planes, in words as wide as they allow.
__device__ inline void store_codes(Codes kind, const uint32_t (&c)[kChunk / 4], uint8_t* lo,
                                   uint8_t* hi) {
  if (kind == Codes::k8) {
    auto* to = reinterpret_cast<uint4*>(lo);
    to[0] = {c[0], c[1], c[2], c[3]};
    to[1] = {c[4], c[5], c[6], c[7]};
  } else if (lo_bytes(kind) == 16) {
    const auto both = [&c](int i) { return (c[i] & 0x0f0f0f0fu) | (c[i + 4] & 0x0f0f0f0fu) << 4; };
    *reinterpret_cast<uint4*>(lo) = {both(0), both(1), both(2), both(3)};
  } else {
    const auto all = [&c](int i) {
      return (c[i] & 0x03030303u) | (c[i + 2] & 0x03030303u) << 2 | (c[i + 4] & 0x03030303u) << 4 |
             (c[i + 6] & 0x03030303u) << 6;
    };
    *reinterpret_cast<uint2*>(lo) = {all(0), all(1)};
  }
  if (hi_bytes(kind) == 4) {
    const int shift = kind == Codes::k5 ? 4 : 2;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) bits |= ((c[i] >> shift) & 0x01010101u) << i;
    *reinterpret_cast<uint32_t*>(hi) = bits;
  } else if (hi_bytes(kind) == 8) {
    const auto all = [&c](int i) {
      return ((c[i] >> 4) & 0x03030303u) | ((c[i + 2] >> 4) & 0x03030303u) << 2 |
             ((c[i + 4] >> 4) & 0x03030303u) << 4 | ((c[i + 6] >> 4) & 0x03030303u) << 6;
    };
    *reinterpret_cast<uint2*>(hi) = {all(0), all(1)};
  }
}

// The code of element e of a chunk, out of the planes.
__device__ inline uint8_t load_code(Codes kind, const uint8_t* lo, const uint8_t* hi, int e) {
  if (kind == Codes::k8) return lo[e];
  uint8_t code;
  if (lo_bytes(kind) == 16) {
    code = (lo[e % 16] >> (4 * (e / 16))) & 15;
  } else {
    code = (lo[e % 8] >> (2 * (e / 8))) & 3;
  }
  if (hi_bytes(kind) == 4) {
    code |= ((hi[e % 4] >> (e / 4)) & 1) << (kind == Codes::k5 ? 4 : 2);
  } else if (hi_bytes(kind) == 8) {
    code |= ((hi[e % 8] >> (2 * (e / 8))) & 3) << 4;
  }
  return code;
}

}  // namespace coreinfer::cuda
