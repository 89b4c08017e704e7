// Steps of attention over one block of kKvBlock cached positions: scores, softmax, weighted values,
// and the packing of keys and values. Every sum runs over its depth in ascending order, so a row's
// bits do not depend on the rows beside it. Which block a row may see is the caller's knowledge.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"

namespace coreinfer {

// Positions of a block, counted from position 0.
inline constexpr int64_t kKvBlock = 64;
// Elements that share a scale in 8-bit keys and values.
inline constexpr int64_t kKvGroup = 32;

// Rows of bf16; not an owner. With `low`, a value is high + low: 16 bits of mantissa.
struct Bf16Rows {
  const uint16_t* high = nullptr;
  const uint16_t* low = nullptr;  // may be null
  int64_t stride = 0;             // elements from row to row
};

// Products of large batches on matrix tiles. Depths and widths are multiples of kMultiple; rows are
// read and written in whole tiles of kRows, so what lies past the last one must be memory of ours.
struct TileKernels {
  static constexpr int64_t kMultiple = 32;
  static constexpr int64_t kRows = 16;
  // x (n) as bf16 high and low; low may be null.
  void (*split)(const float* x, int64_t n, uint16_t* high, uint16_t* low);
  // b (depth, cols) with its rows in pairs: (depth / 2, cols, 2), zeros from `depth` to the next
  // multiple of kMultiple. low may be null.
  void (*pair_f32)(const float* b, int64_t ldb, int64_t depth, int64_t cols, uint16_t* high,
                   uint16_t* low);
  void (*pair_f16)(const uint16_t* b, int64_t ldb, int64_t depth, int64_t cols, uint16_t* high,
                   uint16_t* low);
  // c = a b, or c += a b: a (rows, depth), b in pairs; both have low parts, or neither. The product
  // of the two low parts is left out.
  void (*multiply)(Bf16Rows a, Bf16Rows b, float* c, int64_t ldc, int64_t rows, int64_t depth,
                   int64_t cols, bool accumulate);
};

struct AttentionKernels {
  // c[i][j] = (accumulate ? c[i][j] : 0) + sum over k of a[i][k] * b[k][j], fused, k ascending.
  // a: (rows, depth), b: (depth, cols), c: (rows, cols); ld*: elements from row to row. Memory at
  // `ahead` that is shaped as b is asked for meanwhile; null: none.
  void (*multiply_f32)(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                       int64_t ldc, int64_t rows, int64_t depth, int64_t cols, bool accumulate,
                       const float* ahead);
  void (*multiply_f16)(const float* a, int64_t lda, const uint16_t* b, int64_t ldb, float* c,
                       int64_t ldc, int64_t rows, int64_t depth, int64_t cols, bool accumulate,
                       const uint16_t* ahead);
  // One row's scores s[0, cols) become weights: exp(s' - max) inside [begin, end), zero outside,
  // with s' = softcap * tanh(s / softcap) (0: s' = s) and the maximum over this and earlier blocks.
  // max and sum are carried from block to block (first: -inf, 0). Returns the factor by which what
  // was summed before must be multiplied. cols <= kKvBlock, begin < end.
  float (*softmax)(float* s, int64_t cols, int64_t begin, int64_t end, float softcap, float* max,
                   float* sum);
  void (*f16_to_f32)(const uint16_t* x, int64_t n, float* out);
  void (*f32_to_f16)(const float* x, int64_t n, uint16_t* out);  // to nearest, ties to even
  // Groups of kKvGroup: scale = max |x| / 127 rounded to f16, codes = round(x / scale).
  void (*quantize)(const float* x, int64_t n, int8_t* codes, uint16_t* scales);
  // out[g * kKvGroup + i] = codes[…] * scales[g]: a row of values.
  void (*unpack_row)(const int8_t* codes, const uint16_t* scales, int64_t n, float* out);
  // A block of keys lies element by element: codes (n, kKvBlock), scales (n / kKvGroup, kKvBlock);
  // out (n, kKvBlock).
  void (*unpack_block)(const int8_t* codes, const uint16_t* scales, int64_t n, float* out);
  const TileKernels* tiles;  // null where there are none
};

// The table of one of available_isas().
const AttentionKernels& attention_kernels(Isa isa);

}  // namespace coreinfer
