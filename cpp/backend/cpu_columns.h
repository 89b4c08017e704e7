// Float matrices that are stored column by column, for inputs that are mostly zeros (what ReLU
// gives): the columns that meet a zero are not read. Up to kExactRows tokens at a time are
// multiplied so, each by itself; larger batches go through Product, which reads every column.
#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"
#include "backend/cpu_weight.h"
#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/isa.h"

namespace coreinfer {

// The layout of `picks`, or all, of a float matrix's columns, with data null.
ColumnsView columns_layout(const Mat& from, std::span<const int32_t> picks);

// Copies rows [begin, end) of `from` into such a layout; begin is a multiple of 16, end too or the
// last row, behind which the padding is filled.
void store_columns(const Mat& from, std::span<const int32_t> picks, int64_t begin, int64_t end,
                   const ColumnsView& to);

// One linear whose weight is stored by columns, of x.n <= kExactRows tokens. Grows `scratch`.
struct ColumnScratch {
  AlignedBuffer nonzeros;  // which elements of a token, and their values
  AlignedBuffer sums;      // of each thread
};
void multiply_columns(Isa isa, ThreadPool& pool, ColumnScratch& scratch, Rows x,
                      const Linear& linear);

}  // namespace coreinfer
