// The packed blocks of GGUF's quantised types, byte for byte as they lie in a file, and how each
// gives back its values. Scales d, m are float16 bits (base/half.h). They hold no code: unpacking
// lives in kernels/. Alignment is at most 2; blocks of a row lie one after the other.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace coreinfer {

// 4-bit codes of the simple types: byte j holds element j (low) and element j + 16 (high).
// x = d * (q - 8)
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// x = d * q + m
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// Bit i of qh (little endian) is the fifth bit of element i. x = d * (q - 16)
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

// x = d * q + m
struct BlockQ5_1 {
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

// x = d * q
struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// 16 groups of 16. scales[g]: scale (low 4 bits) and minimum (high 4 bits) of group g.
// Each 32 bytes of qs hold 128 elements: bits 2k, 2k+1 of byte j are element 32k + j.
// x = (d * scale) * q - dmin * minimum
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84);

// 16 groups of 16, codes as in Q2_K. Bit k of hmask[j] belongs to element 32k + j; where it is
// clear, 4 is subtracted. scales: sixteen 6-bit numbers, low 4 bits in bytes 0-7 (first the low
// halves), high 2 bits in bytes 8-11.
// x = (d * (scale - 32)) * (q - 4 * !high)
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};
static_assert(sizeof(BlockQ3_K) == 110);

// 8 groups of 32. scales: eight 6-bit scales and eight 6-bit minima; bytes 0-3 and 4-7 hold the
// first four of each (low 6 bits) and the top 2 bits of the others, bytes 8-11 their low 4 bits.
// Each 32 bytes of qs hold 64 elements: low halves the first 32, high halves the second.
// x = (d * scale) * q - dmin * minimum
struct BlockQ4_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// As Q4_K; bit g of qh[j] is the fifth bit of element j of group g.
struct BlockQ5_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

// 16 groups of 16. Each 64 bytes of ql hold 128 elements: the low halves elements 0-63, the high
// halves 64-127; bits 2k, 2k+1 of byte j of the 32 bytes of qh belong to element 32k + j.
// x = (d * scale) * (q - 32)
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210);

// Codes as in Q4_0, but an index into kIQ4Values. x = d * kIQ4Values[q]
struct BlockIQ4_NL {
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

// 8 groups of 32, each as IQ4_NL. scales: eight 6-bit numbers, low 4 bits in scales_l (two a byte,
// low half first), high 2 bits in scales_h (group g at bit 2g).
// x = (d * (scale - 32)) * kIQ4Values[q]
struct BlockIQ4_XS {
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

inline constexpr int8_t kIQ4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};

// The type table says the same.
static_assert(sizeof(BlockQ4_0) == traits(DType::kQ4_0).block_bytes);
static_assert(sizeof(BlockQ4_1) == traits(DType::kQ4_1).block_bytes);
static_assert(sizeof(BlockQ5_0) == traits(DType::kQ5_0).block_bytes);
static_assert(sizeof(BlockQ5_1) == traits(DType::kQ5_1).block_bytes);
static_assert(sizeof(BlockQ8_0) == traits(DType::kQ8_0).block_bytes);
static_assert(sizeof(BlockQ2_K) == traits(DType::kQ2_K).block_bytes);
static_assert(sizeof(BlockQ3_K) == traits(DType::kQ3_K).block_bytes);
static_assert(sizeof(BlockQ4_K) == traits(DType::kQ4_K).block_bytes);
static_assert(sizeof(BlockQ5_K) == traits(DType::kQ5_K).block_bytes);
static_assert(sizeof(BlockQ6_K) == traits(DType::kQ6_K).block_bytes);
static_assert(sizeof(BlockIQ4_NL) == traits(DType::kIQ4_NL).block_bytes);
static_assert(sizeof(BlockIQ4_XS) == traits(DType::kIQ4_XS).block_bytes);

}  // namespace coreinfer
