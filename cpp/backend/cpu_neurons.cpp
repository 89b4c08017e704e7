// Neuron statistics on the CPU. Two passes over the rows: first each row by itself (its threshold
// or its norm), by whichever thread comes first; then each neuron by itself, adding the rows in
// order, so that sums depend neither on threads nor on how a prompt was cut into calls. A row with
// NaN or Inf is found before anything is added.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "backend/cpu_backend.h"
#include "base/aligned_buffer.h"
#include "base/error.h"
#include "kernels/count_row.h"

namespace coreinfer {

struct NeuronScratch {
  std::vector<Threshold> chosen;           // per row
  std::vector<double> factor;              // per row: 1 / ||h||^2, or 0 for a row of zeros
  std::vector<char> finite;                // per row
  std::vector<std::vector<int32_t>> keys;  // per thread
};

namespace {

// Neurons that a thread adds at a time: their scores stay in its first-level cache.
constexpr int64_t kNeuronChunk = 1024;

}  // namespace

int64_t CpuBackend::accumulate(Statistic statistic, double alpha, Rows h, float* scores) {
  if (!(alpha > 0.0 && alpha <= 1.0) && statistic != Statistic::kFlock) {
    throw_error(ErrorKind::kValue, "alpha is %g, expected a share in (0, 1]", alpha);
  }
  if (h.n < 1 || h.width < 1) return -1;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!neuron_scratch_) neuron_scratch_ = std::make_shared<NeuronScratch>();
  NeuronScratch& s = *neuron_scratch_;
  const auto n_rows = static_cast<size_t>(h.n);
  s.chosen.resize(n_rows);
  s.factor.resize(n_rows);
  s.finite.assign(n_rows, 1);
  s.keys.resize(static_cast<size_t>(pool_.n_threads()));

  const CountKernels& kernels = count_kernels(isa_);
  const bool magnitude = statistic == Statistic::kCountAbs;
  const bool flock = statistic == Statistic::kFlock;
  const auto look_at_row = [&](size_t r, std::vector<int32_t>& keys) {
    const float* row = h.data + static_cast<int64_t>(r) * h.stride;
    if (flock) {
      const double squares = kernels.sum_squares(row, h.width);
      s.finite[r] = std::isfinite(squares);
      s.factor[r] = squares > 0 ? 1.0 / squares : 0.0;
      return;
    }
    bool finite = true;
    const int64_t n = kernels.positives(row, h.width, magnitude, &finite);
    s.finite[r] = finite;
    s.chosen[r] = {Threshold::kNone, 0};
    if (finite && n > 0) {
      s.chosen[r] = kernels.threshold(row, h.width, magnitude, share_of(alpha, n), keys);
    }
  };
  int64_t first_bad = -1;
  pool_.run([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(h.n, 1, &begin, &end)) {
      look_at_row(static_cast<size_t>(begin), s.keys[static_cast<size_t>(context.thread())]);
    }
    context.barrier();
    const auto bad = std::find(s.finite.begin(), s.finite.end(), char{0});
    if (bad != s.finite.end()) {
      if (context.thread() == 0) first_bad = bad - s.finite.begin();
      return;
    }
    while (context.next(h.width, kNeuronChunk, &begin, &end)) {
      for (size_t r = 0; r < n_rows; ++r) {
        const float* row = h.data + static_cast<int64_t>(r) * h.stride;
        if (flock) {
          if (s.factor[r] > 0) kernels.add_squares(row, begin, end, s.factor[r], scores);
        } else if (s.chosen[r].key != Threshold::kNone) {
          kernels.add_chosen(row, begin, end, magnitude, s.chosen[r], scores);
        }
      }
    }
  });
  return first_bad;
}

std::vector<int32_t> CpuBackend::select(std::span<const float> scores, int64_t k) {
  const auto n = static_cast<int64_t>(scores.size());
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(scores[static_cast<size_t>(i)])) {
      throw_error(ErrorKind::kNumeric, "the score of neuron %lld of %lld is NaN",
                  static_cast<long long>(i), static_cast<long long>(n));
    }
  }
  const CountKernels& kernels = count_kernels(isa_);
  bool finite = true;  // an infinite score is simply the largest
  const int64_t positive = kernels.positives(scores.data(), n, false, &finite);
  k = std::min(k, positive);
  std::vector<int32_t> neurons;
  if (k < 1) return neurons;
  std::vector<int32_t> keys;
  const Threshold chosen = kernels.threshold(scores.data(), n, false, k, keys);
  const float limit = std::bit_cast<float>(chosen.key);
  neurons.reserve(static_cast<size_t>(k));
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[static_cast<size_t>(i)];
    if (score > limit || (score == limit && i < chosen.end)) {
      neurons.push_back(static_cast<int32_t>(i));
    }
  }
  return neurons;
}

}  // namespace coreinfer
