// Compaction on the device: the picked neurons of a layer, rows of gate and up and columns of down,
// copied from matrices in device memory to their places in one buffer; no value changes. Flows in:
// a source matrix and index tables in device memory. It chooses no neurons.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "context.h"
#include "weight_view.h"

namespace coreinfer::cuda {

// to.rows rows of from: row i is from's row rows[i].
void gather_rows(Context& context, const WeightView& from, const int32_t* rows,
                 const WeightView& to);

// All rows, columns[i] of from for column i of to; -1 and what lies behind n_columns become zero.
// A quantised matrix: the scales of all of from's columns, see weight_view.h.
void gather_columns(Context& context, const WeightView& from, const int32_t* columns,
                    int64_t n_columns, const WeightView& to);

// to[i] = from[indices[i]]
void gather_floats(Context& context, const float* from, const int32_t* indices, int64_t n,
                   float* to);

}  // namespace coreinfer::cuda
