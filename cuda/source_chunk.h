// Chunks of 32 columns read from a row of GGUF blocks (tensor/blocks.h), one byte a code and the
// scales as WeightView keeps them. Used where weights come onto the device and for embeddings; it
// is not fast.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "weight_view.h"

namespace coreinfer::cuda {

struct SourceChunk {
  uint8_t codes[kChunk];  // 8-bit codes are signed; looked-up ones are indices
  RawScales scales;
};

__device__ inline uint32_t read_u16(const uint8_t* p) {
  return p[0] | static_cast<uint32_t>(p[1]) << 8;
}

namespace source {

__device__ inline void nibbles(const uint8_t* qs, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = qs[j] & 15;
    codes[j + 16] = qs[j] >> 4;
  }
}

__device__ inline void fifth_bits(const uint8_t* qh, uint8_t* codes) {
  for (int e = 0; e < kChunk; ++e) codes[e] |= ((qh[e / 8] >> (e % 8)) & 1) << 4;
}

// Group g of the types whose 32 bytes of qs hold 64 elements.
__device__ inline void half_bytes(const uint8_t* qs, int g, uint8_t* codes) {
  for (int j = 0; j < kChunk; ++j) codes[j] = (qs[32 * (g / 2) + j] >> (4 * (g % 2))) & 15;
}

// Group g of the types whose 32 bytes hold 128 elements, two bits each.
__device__ inline void quarter_bytes(const uint8_t* qs, int g, uint8_t* codes) {
  for (int j = 0; j < kChunk; ++j) codes[j] = (qs[32 * (g / 4) + j] >> (2 * (g % 4))) & 3;
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
  uint8_t* codes = out->codes;
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
      for (int e = 0; e < kChunk; ++e) codes[e] = b[2 + e];
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
      for (int j = 0; j < kChunk; ++j) codes[j] |= ((b[j] >> g) & 1) << 2;
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
      for (int j = 0; j < kChunk; ++j) codes[j] |= ((b[16 + j] >> g) & 1) << 4;
      break;
    }
    case DType::kQ6_K: {
      const uint8_t* b = row + chunk / 8 * static_cast<int64_t>(sizeof(BlockQ6_K));
      out->scales.super = read_u16(b + 208);
      out->scales.meta = b[192 + 2 * g] | static_cast<uint32_t>(b[193 + 2 * g]) << 8;
      source::quarter_bytes(b + 128, g, codes);
      const uint8_t* low = b + 64 * (g / 4) + 32 * (g % 2);
      const int shift = g % 4 < 2 ? 0 : 4;
      for (int j = 0; j < kChunk; ++j) codes[j] = codes[j] << 4 | ((low[j] >> shift) & 15);
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

// The 32 values, as the format defines them (kernels/dequantize.h says the order of operations).
__device__ inline void chunk_values(Codes kind, Scales scales, int offset, const SourceChunk& chunk,
                                    float* values) {
  const ChunkScales s = decode_scales(scales, chunk.scales);
  for (int e = 0; e < kChunk; ++e) {
    int q = chunk.codes[e];
    if (kind == Codes::k8) q = static_cast<int8_t>(chunk.codes[e]);
    if (kind == Codes::k4Lookup) q = code_of(look_up(static_cast<unsigned>(q)), 0);
    values[e] = s.s[e / 16] * static_cast<float>(q - offset) + s.m[e / 16];
  }
}

// Writes codes to their places in the planes.
__device__ inline void store_codes(Codes kind, const uint8_t* codes, uint8_t* lo, uint8_t* hi) {
  if (kind == Codes::k8) {
    for (int e = 0; e < kChunk; ++e) lo[e] = codes[e];
  } else if (lo_bytes(kind) == 16) {
    for (int j = 0; j < 16; ++j) lo[j] = (codes[j] & 15) | (codes[j + 16] & 15) << 4;
  } else {
    for (int j = 0; j < 8; ++j) {
      lo[j] = (codes[j] & 3) | (codes[j + 8] & 3) << 2 | (codes[j + 16] & 3) << 4 |
              (codes[j + 24] & 3) << 6;
    }
  }
  if (hi_bytes(kind) == 4) {
    const int shift = kind == Codes::k5 ? 4 : 2;
    for (int j = 0; j < 4; ++j) {
      uint8_t bits = 0;
      for (int k = 0; k < 8; ++k) bits |= ((codes[4 * k + j] >> shift) & 1) << k;
      hi[j] = bits;
    }
  } else if (hi_bytes(kind) == 8) {
    for (int j = 0; j < 8; ++j) {
      hi[j] = codes[j] >> 4 | (codes[j + 8] >> 4) << 2 | (codes[j + 16] >> 4) << 4 |
              (codes[j + 24] >> 4) << 6;
    }
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
