// Neuron statistics and selection on the device (the definitions: neurons/statistic.h). Counts and
// chosen neurons are those of the CPU wherever the activations are equal: thresholds come from a
// radix select over the bits of the floats, ties go to the lower index, and rows are added in
// order.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

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

// Adds the rows to scores (h.width). choices: device memory for h.n; first_bad: device int32, set
// to the first row with NaN or Inf, or to INT32_MAX; then nothing is added.
void accumulate_rows(Context& context, Statistic statistic, double share, Rows h, float* scores,
                     RowChoice* choices, int32_t* first_bad);

// The k largest positive entries of scores (n), ascending, to `neurons`; *count of them. *nan: the
// first NaN, or INT32_MAX.
void select_neurons(Context& context, const float* scores, int64_t n, int64_t k, int32_t* neurons,
                    int32_t* count, int32_t* nan);

}  // namespace coreinfer::cuda
