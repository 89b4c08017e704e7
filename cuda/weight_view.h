// WeightView: a matrix in device memory as kernels read it, and how its codes and scales come out.
//
// A quantised matrix is cut along its rows into chunks of 32 columns and laid out in planes, row
// after row, so that the lanes of a warp read neighbouring chunks with full-width loads:
//   lo     8, 4 or 2 bits a code: 32, 16 or 8 bytes a chunk
//   hi     the bits above: 2 (8 bytes), 1 (4 bytes) or none
//   meta   the scales of a chunk: 2 or 4 bytes
//   super  float16 d and dmin of 8 chunks, for the types with super-blocks: 4 bytes
// Values and bits are the file's; only their places change. Codes stand so that one mask takes four
// neighbours out of a word: element e of a chunk is
//   4 bits: byte e % 16, low nibble for e < 16       2 bits: byte e % 8, bits 2 (e / 8)
//   1 bit:  byte e % 4, bit e / 4                    8 bits: byte e
// Float matrices are plain rows, padded to 16 bytes.
//
// A matrix of picked columns (a compacted down projection) has its own code planes, in which the
// columns picked from one group of the source (16 or 32 columns, as the type shares its scales)
// fill whole steps of 4, and the meta and super planes of all source columns; `steps` says which
// half chunk of the source a step's scale is. It is shared by all rows.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "device_api.h"
#include "tensor/blocks.h"
#include "tensor/dtype.h"

namespace coreinfer::cuda {

inline constexpr int kChunk = 32;
inline constexpr int kStep = 4;
inline constexpr int kStepsPerChunk = kChunk / kStep;

enum class Codes : int32_t { kF32, kF16, kBF16, k8, k4, k4Lookup, k5, k6, k3, k2 };

enum class Scales : int32_t {
  kNone,
  kHalf,      // meta: f16 d.                       w = d (q - offset)
  kHalfPair,  // meta: f16 d, f16 m.                w = d q + m
  kPair,      // meta: u8 s, u8 m.                  w = (d s) q - dmin m
  kSigned,    // meta: i8 s of each half chunk.     w = (d s) (q - offset)
  kNibbles,   // meta: s, m << 4 of each half.      w = (d s) q - dmin m
};

struct Format {
  Codes codes;
  Scales scales;
  int offset;
  bool operator==(const Format&) const = default;
};

__host__ __device__ constexpr Format format_of(DType type) {
  switch (type) {
    case DType::kF32:
      return {Codes::kF32, Scales::kNone, 0};
    case DType::kF16:
      return {Codes::kF16, Scales::kNone, 0};
    case DType::kBF16:
      return {Codes::kBF16, Scales::kNone, 0};
    case DType::kQ4_0:
      return {Codes::k4, Scales::kHalf, 8};
    case DType::kQ4_1:
      return {Codes::k4, Scales::kHalfPair, 0};
    case DType::kQ5_0:
      return {Codes::k5, Scales::kHalf, 16};
    case DType::kQ5_1:
      return {Codes::k5, Scales::kHalfPair, 0};
    case DType::kQ8_0:
      return {Codes::k8, Scales::kHalf, 0};
    case DType::kQ2_K:
      return {Codes::k2, Scales::kNibbles, 0};
    case DType::kQ3_K:
      return {Codes::k3, Scales::kSigned, 4};
    case DType::kQ4_K:
      return {Codes::k4, Scales::kPair, 0};
    case DType::kQ5_K:
      return {Codes::k5, Scales::kPair, 0};
    case DType::kQ6_K:
      return {Codes::k6, Scales::kSigned, 32};
    case DType::kIQ4_NL:
      return {Codes::k4Lookup, Scales::kHalf, 0};
    case DType::kIQ4_XS:
      return {Codes::k4Lookup, Scales::kSigned, 0};
  }
  return {Codes::kF32, Scales::kNone, 0};
}

// Bytes of a chunk in each plane.
__host__ __device__ constexpr int lo_bytes(Codes c) {
  return c == Codes::k8 ? 32 : c == Codes::k2 || c == Codes::k3 ? 8 : 16;
}
__host__ __device__ constexpr int hi_bytes(Codes c) {
  return c == Codes::k6 ? 8 : c == Codes::k5 || c == Codes::k3 ? 4 : 0;
}
__host__ __device__ constexpr int meta_bytes(Scales s) { return s == Scales::kHalfPair ? 4 : 2; }
__host__ __device__ constexpr int super_bytes(Scales s) {
  return s == Scales::kPair || s == Scales::kSigned || s == Scales::kNibbles ? 4 : 0;
}
// Elements of a 16-byte load of a float type.
__host__ __device__ constexpr int float_step(Codes c) { return c == Codes::kF32 ? 4 : 8; }

struct WeightView {
  const uint8_t* lo;
  const uint8_t* hi;
  const uint8_t* meta;
  const uint8_t* super;
  const uint16_t* steps;  // (n_chunks * 8) source half chunks, or null: columns as in the file
  int64_t lo_stride;      // bytes from row to row
  int64_t hi_stride;
  int64_t meta_stride;
  int64_t super_stride;
  int64_t rows;
  int32_t n_chunks;  // of a row as stored; float types: 16-byte loads
  Codes codes;
  Scales scales;
  int32_t offset;

  Format format() const { return {codes, scales, offset}; }
};

// ---- Codes --------------------------------------------------------------------------------------

// A chunk as loaded.
struct RawCodes {
  uint4 lo[2];
  uint2 hi;
};

// Where a row lies in each plane.
struct WeightRow {
  const uint8_t* lo;
  const uint8_t* hi;
  const uint8_t* meta;
  const uint8_t* super;
};
__device__ __forceinline__ WeightRow row_of(const WeightView& w, int64_t row) {
  return {w.lo + row * w.lo_stride, w.hi + row * w.hi_stride, w.meta + row * w.meta_stride,
          w.super + row * w.super_stride};
}

// Codes are read once: they leave the caches first. Of a float type: 16 bytes.
template <Codes kCodes>
__device__ __forceinline__ void load_codes(const WeightRow& w, int chunk, RawCodes* raw) {
  const uint8_t* lo = w.lo + static_cast<int64_t>(chunk) * lo_bytes(kCodes);
  if constexpr (lo_bytes(kCodes) == 8) {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(lo));
    raw->lo[0].x = v.x;
    raw->lo[0].y = v.y;
  } else {
    raw->lo[0] = __ldcs(reinterpret_cast<const uint4*>(lo));
    if constexpr (lo_bytes(kCodes) == 32) {
      raw->lo[1] = __ldcs(reinterpret_cast<const uint4*>(lo) + 1);
    }
  }
  if constexpr (hi_bytes(kCodes) > 0) {
    const uint8_t* hi = w.hi + static_cast<int64_t>(chunk) * hi_bytes(kCodes);
    if constexpr (hi_bytes(kCodes) == 8) {
      raw->hi = __ldcs(reinterpret_cast<const uint2*>(hi));
    } else {
      raw->hi.x = __ldcs(reinterpret_cast<const unsigned*>(hi));
    }
  }
}

// kIQ4Values at four nibbles, one in each byte of `nibbles`.
__device__ __forceinline__ unsigned look_up(unsigned nibbles) {
  // Selector nibble i of __byte_perm names the byte that becomes byte i.
  const unsigned s = (nibbles & 7) | ((nibbles >> 4) & 0x70) | ((nibbles >> 8) & 0x700) |
                     ((nibbles >> 12) & 0x7000);
  const unsigned low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, s);   // -127 … -65, -49 … -10
  const unsigned high = __byte_perm(0x26190d01u, 0x71594535u, s);  // 1 … 38, 53 … 113
  const unsigned mask = ((nibbles >> 3) & 0x01010101u) * 0xffu;
  return (low & ~mask) | (high & mask);
}

// words[i]: the codes of elements 4 i to 4 i + 3, a byte each.
template <Codes kCodes>
__device__ __forceinline__ void unpack_codes(const RawCodes& raw, unsigned (&words)[8]) {
  if constexpr (kCodes == Codes::k8) {
    words[0] = raw.lo[0].x, words[1] = raw.lo[0].y, words[2] = raw.lo[0].z, words[3] = raw.lo[0].w;
    words[4] = raw.lo[1].x, words[5] = raw.lo[1].y, words[6] = raw.lo[1].z, words[7] = raw.lo[1].w;
  } else if constexpr (lo_bytes(kCodes) == 16) {
    const unsigned v[4] = {raw.lo[0].x, raw.lo[0].y, raw.lo[0].z, raw.lo[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = v[i] & 0x0f0f0f0fu;
      words[4 + i] = (v[i] >> 4) & 0x0f0f0f0fu;
    }
  } else {
    const unsigned v[2] = {raw.lo[0].x, raw.lo[0].y};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = (v[i % 2] >> (2 * (i / 2))) & 0x03030303u;
  }
  if constexpr (kCodes == Codes::k4Lookup) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = look_up(words[i]);
  }
  if constexpr (hi_bytes(kCodes) == 4) {
    constexpr int kShift = kCodes == Codes::k5 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] |= ((raw.hi.x >> i) & 0x01010101u) << kShift;
  } else if constexpr (hi_bytes(kCodes) == 8) {
    const unsigned v[2] = {raw.hi.x, raw.hi.y};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] |= ((v[i % 2] >> (2 * (i / 2))) & 0x03030303u) << 4;
  }
}

// Byte i of a word of codes as a number; 8-bit and looked-up codes are signed.
__device__ __forceinline__ int code_of(unsigned word, int i) {
  return static_cast<int8_t>(word >> (8 * i));
}

// ---- Scales -------------------------------------------------------------------------------------

// w = s[half] * (q - offset) + m[half]
struct ChunkScales {
  float s[2];
  float m[2];
};

// What a chunk's scales are kept as: its bytes of the meta plane and of the super plane.
struct RawScales {
  uint32_t meta;
  uint32_t super;
};

__device__ __forceinline__ RawScales load_scales(Scales kind, const WeightRow& w, int chunk) {
  RawScales raw{0, 0};
  if (kind == Scales::kHalfPair) {
    raw.meta = __ldg(reinterpret_cast<const uint32_t*>(w.meta) + chunk);
  } else {
    raw.meta = __ldg(reinterpret_cast<const uint16_t*>(w.meta) + chunk);
  }
  if (super_bytes(kind) > 0) {
    raw.super = __ldg(reinterpret_cast<const uint32_t*>(w.super) + chunk / 8);
  }
  return raw;
}

__device__ __forceinline__ ChunkScales decode_scales(Scales kind, RawScales raw) {
  ChunkScales r;
  const float d = half_to_float(static_cast<uint16_t>(raw.super));
  const float dmin = half_to_float(static_cast<uint16_t>(raw.super >> 16));
  r.m[0] = r.m[1] = 0.0f;
  switch (kind) {
    case Scales::kHalf:
    case Scales::kNone:
      r.s[0] = r.s[1] = half_to_float(static_cast<uint16_t>(raw.meta));
      break;
    case Scales::kHalfPair:
      r.s[0] = r.s[1] = half_to_float(static_cast<uint16_t>(raw.meta));
      r.m[0] = r.m[1] = half_to_float(static_cast<uint16_t>(raw.meta >> 16));
      break;
    case Scales::kPair:
      r.s[0] = r.s[1] = d * static_cast<float>(raw.meta & 0xff);
      r.m[0] = r.m[1] = -(dmin * static_cast<float>((raw.meta >> 8) & 0xff));
      break;
    case Scales::kSigned:
      r.s[0] = d * static_cast<float>(static_cast<int8_t>(raw.meta));
      r.s[1] = d * static_cast<float>(static_cast<int8_t>(raw.meta >> 8));
      break;
    case Scales::kNibbles:
      r.s[0] = d * static_cast<float>(raw.meta & 15);
      r.m[0] = -(dmin * static_cast<float>((raw.meta >> 4) & 15));
      r.s[1] = d * static_cast<float>((raw.meta >> 8) & 15);
      r.m[1] = -(dmin * static_cast<float>((raw.meta >> 12) & 15));
      break;
  }
  return r;
}

}  // namespace coreinfer::cuda
