// Rows on their way into a matrix: normalised, picked, padded with zeros, as float32 and as 8-bit
// codes with a scale for every 16. Flows in: rows of float32. Flows out: the forms that the matrix
// kernels read. Every row by itself: its bits do not depend on the others.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "backend/backend.h"
#include "context.h"
#include "weight_view.h"

namespace coreinfer::cuda {

// Of a chunk of codes.
struct alignas(16) ChunkInput {
  float scale[2];  // of each half chunk: x = scale * code
  int32_t sums;    // of the codes of each half chunk, 16 bits each
  float weighted;  // both sums, each times its scale, added
};

// Rows as the kernels take them; padded columns are zero. A row of codes is the first halves of all
// chunks, then, from its middle on, the second halves: a warp reads either without gaps.
struct PreparedRows {
  const float* values;  // null where not wanted
  const int8_t* codes;  // null where not wanted
  const ChunkInput* chunks;
  int64_t values_stride;
  int64_t codes_stride;  // bytes
  int64_t chunks_stride;
};

// columns: for every one of n_columns outputs the input column, -1: zero; null: as they are.
// n_columns is a multiple of 32, or with values only whatever is to be written.
void prepare_rows(Context& context, Rows x, const Norm& norm, const int32_t* columns,
                  int64_t n_columns, const PreparedRows& out);

// x += norm(y); where `out` has room, x normalised by `next` goes there, padded to whole chunks.
void add_rows(Context& context, Rows x, Rows y, const Norm& norm, const Norm& next,
              const PreparedRows& out);

}  // namespace coreinfer::cuda
