// What one token's activations say about the neurons: the exact k-th largest entry, and sums over
// tokens. A row is float32 (n); keys are its bits as signed integers, which order positive floats
// as the floats themselves (magnitude clears the sign first, for |h|).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/isa.h"

namespace coreinfer {

// The chosen entries of a row: every key above `key`, and those equal to it below index `end`.
struct Threshold {
  int32_t key = 0;
  int64_t end = 0;

  static constexpr int32_t kNone = INT32_MAX;  // as key: nothing is chosen
};

struct CountKernels {
  // Entries with a positive key; *finite is cleared when the row holds NaN or Inf.
  int64_t (*positives)(const float* h, int64_t n, bool magnitude, bool* finite);
  // The k entries of largest key among the positive ones, ties to the lower index;
  // 1 <= k <= positives. `scratch` keeps its memory from row to row.
  Threshold (*threshold)(const float* h, int64_t n, bool magnitude, int64_t k,
                         std::vector<int32_t>& scratch);
  // scores[i] += 1 for each chosen i in [begin, end).
  void (*add_chosen)(const float* h, int64_t begin, int64_t end, bool magnitude, Threshold chosen,
                     float* scores);
  // Sum of h^2 in double.
  double (*sum_squares)(const float* h, int64_t n);
  // scores[i] += float(double(h[i])^2 * factor) for i in [begin, end).
  void (*add_squares)(const float* h, int64_t begin, int64_t end, double factor, float* scores);
};

// The table of one of available_isas().
const CountKernels& count_kernels(Isa isa);

// max(1, round(share * count)) with round(x) = floor(x + 0.5); 0 when count is 0, never over count.
int64_t share_of(double share, int64_t count);

}  // namespace coreinfer
