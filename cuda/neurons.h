// Neuron statistics and selection on the device (the definitions: neurons/statistic.h). Counts and
// chosen neurons are those of the CPU wherever the activations are equal: thresholds come from a
// radix select over the bits of the floats, ties go to the lower index, and rows are added in
// order.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <span>
#include <vector>

#include "backend/backend.h"
#include "context.h"

namespace coreinfer::cuda {

// A row's choice: keys above `key`, and those equal to it below `end`. Flock: 1 / ||h||^2.
struct alignas(16) RowChoice {
  double factor;
  int32_t key;
  int32_t end;
};

// Adds the rows to scores (h.width), and writes the marks' on the way. choices: device memory for
// h.n. *bad, device memory, is lowered to first_row + r for a row r with NaN or Inf; while it is
// below kNoBadRow nothing is added. Two launches.
void accumulate_rows(Context& context, Statistic statistic, double share, Rows h, float* scores,
                     std::span<const ScoreMark> marks, RowChoice* choices, int64_t first_row,
                     float* bad);

// The k largest positive entries of each row of scores. `found`, device memory: of a row, from
// `found_stride` on to the next, how many there are, the first NaN (INT32_MAX: none), then they,
// ascending.
void select_neurons(Context& context, Rows scores, int64_t k, int32_t* found, int64_t found_stride);

}  // namespace coreinfer::cuda
