// Kernels of matrix products, one table an instruction set. All are single-threaded and work on a
// tile: 16 outputs (one strip of a packed matrix, or 16 rows of a float matrix) for some tokens,
// tile[token * 16 + output]. They know no norm, bias, or thread.
//
// Two families. Integer: activations as int8 with one scale a group and token; sums inside a group
// are exact integers, groups are added in packed order by one fused multiply-add each. Float: the
// weights as float32 values, one fused multiply-add a column in packed order. Both orders are
// fixed, so that the bits of a result depend neither on the number of tokens nor, for these
// kernels, on the instruction set. (A third family, linear_bf16.h, is for many tokens only.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/isa.h"
#include "kernels/packed_format.h"
#include "tensor/dtype.h"

namespace coreinfer {

// Tokens quantised to 8 bits for the columns of a packed matrix; not an owner.
struct QuantizedRows {
  int8_t* codes = nullptr;       // packed order, groups rounded up to whole steps with zeros
  float* scale = nullptr;        // per group: value = scale * code
  int32_t* minus_sum = nullptr;  // per group: -(sum of codes)
  float* scaled_sum = nullptr;   // per group: scale * (sum of codes)
  int64_t codes_stride = 0;      // from one token to the next
  int64_t groups_stride = 0;

  QuantizedRows from(int64_t token) const {
    return {codes + token * codes_stride,
            scale + token * groups_stride,
            minus_sum + token * groups_stride,
            scaled_sum + token * groups_stride,
            codes_stride,
            groups_stride};
  }
};

// Float32 tokens; not an owner.
struct FloatRows {
  const float* data = nullptr;
  int64_t stride = 0;
};

// Quantises one token, given in input order: to nearest, the largest magnitude of a group becomes
// 127. A group with NaN or Inf gets the scale NaN.
using QuantizeFn = void (*)(const ColumnGroups& columns, const float* x, const QuantizedRows& out);

// A strip and where its products go.
struct StripProduct {
  const PackedView* matrix = nullptr;
  int64_t strip = 0;
  float* tile = nullptr;
};

// tile = strip * tokens, for one strip or for two of the same type and columns. Two at once are
// faster: memory is read in more streams, and both use an activation that is loaded once.
using DotStripsFn = void (*)(std::span<const StripProduct> strips, const QuantizedRows& x,
                             int64_t n_tokens);

// Weight values of groups [begin, end) of a strip: panel[column * 16 + row], packed order.
using UnpackPanelFn = void (*)(const PackedView& w, int64_t strip, int64_t begin, int64_t end,
                               float* panel);

// The same for columns [begin, end) of n_rows <= 16 rows of a float matrix; absent rows are zero.
using TransposePanelFn = void (*)(DType type, const std::byte* rows, size_t row_stride,
                                  int64_t n_rows, int64_t begin, int64_t end, float* panel);

// tile += panel * tokens, over n_cols columns.
using DotPanelFn = void (*)(const float* panel, int64_t n_cols, const FloatRows& x,
                            int64_t n_tokens, float* tile);

// Up to 16 rows of a float matrix, and where their products go.
struct RowsProduct {
  const std::byte* first = nullptr;
  int64_t n_rows = 0;
  float* tile = nullptr;
};

// tile[t * 16 + r] = row r * token t, for one run of rows or for two of the same type and width,
// which are read side by side. Column c of n is added to partial sum c % 32; partial sums i and i +
// half are added until one is left.
using DotRowsFn = void (*)(std::span<const RowsProduct> products, size_t row_stride, int64_t n,
                           const FloatRows& x, int64_t n_tokens);

// 16 rows of a float matrix that is stored column by column, from `first` on: panel[column * 16 +
// row] of n_cols columns.
using ColumnsPanelFn = void (*)(const std::byte* first, size_t stride, int64_t n_cols,
                                float* panel);

// y += matrix * x for such a matrix, its n_rows (a multiple of 16) rows from `first` on. x has a
// value for each of n listed columns; they are added in that order, one fused multiply-add each.
using AddColumnsFn = void (*)(const std::byte* first, size_t stride, const int32_t* columns,
                              const float* x, int64_t n, int64_t n_rows, float* y);

struct LinearKernels {
  QuantizeFn quantize;
  DotStripsFn (*dot_strips)(DType type, bool dense);  // never null for a packed type
  UnpackPanelFn (*unpack_panel)(DType type);          // nor this
  TransposePanelFn transpose_panel;
  DotPanelFn dot_panel;
  DotRowsFn (*dot_rows)(DType type);            // never null for a float type
  ColumnsPanelFn (*columns_panel)(DType type);  // nor these
  AddColumnsFn (*add_columns)(DType type);
};

const LinearKernels& linear_kernels(Isa isa);

// The tables, one a file: linear_scalar.cpp and so on.
const LinearKernels& linear_kernels_scalar();
#if defined(__x86_64__)
const LinearKernels& linear_kernels_avx2();
const LinearKernels& linear_kernels_avx512();
#elif defined(__aarch64__)
const LinearKernels& linear_kernels_neon();
#endif

}  // namespace coreinfer
