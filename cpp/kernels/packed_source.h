// What packing reads: a quantised block of a GGUF row taken apart into one byte a code and one
// number a scale, the same for all types. It changes no value and computes none.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/packed_format.h"
#include "tensor/dtype.h"

namespace coreinfer {

// 256 columns of one row: a super-block, or up to 8 blocks of 32. Simple types have d and m per
// block; super-block types have d[0], m[0] (the file's dmin) and a scale and minimum per group.
struct SourceBlock {
  uint16_t d[8];     // float16
  uint16_t m[8];     // float16
  int8_t scale[16];  // centred: the 6-bit scales of Q3_K and IQ4_XS minus 32
  uint8_t minimum[16];
  uint8_t codes[kSuperCols];
};

// Reads n columns (a multiple of the type's block size, at most 256) from `src`, of any alignment.
using ReadBlockFn = void (*)(const std::byte* src, int n, SourceBlock* out);

// nullptr for the float types.
ReadBlockFn find_read_block(DType type);

}  // namespace coreinfer
