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

void CpuBackend::accumulate(Statistic statistic, double alpha, Rows h, float* scores,
                            std::span<const ScoreMark> marks, int64_t first_row, float* bad) {
  if (!(alpha > 0.0 && alpha <= 1.0) && statistic != Statistic::kFlock) {
    throw_error(ErrorKind::kValue, "alpha is %g, expected a share in (0, 1]", alpha);
  }
  if (h.n < 1 || h.width < 1) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (*bad < kNoBadRow) return;
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
  pool_.run([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(h.n, 1, &begin, &end)) {
      look_at_row(static_cast<size_t>(begin), s.keys[static_cast<size_t>(context.thread())]);
    }
    context.barrier();
    const auto not_finite = std::find(s.finite.begin(), s.finite.end(), char{0});
    if (not_finite != s.finite.end()) {
      if (context.thread() == 0) {
        *bad = static_cast<float>(first_row + (not_finite - s.finite.begin()));
      }
      return;
    }
    while (context.next(h.width, kNeuronChunk, &begin, &end)) {
      auto mark = marks.begin();
      for (size_t r = 0; r < n_rows; ++r) {
        const float* row = h.data + static_cast<int64_t>(r) * h.stride;
        if (flock) {
          if (s.factor[r] > 0) kernels.add_squares(row, begin, end, s.factor[r], scores);
        } else if (s.chosen[r].key != Threshold::kNone) {
          kernels.add_chosen(row, begin, end, magnitude, s.chosen[r], scores);
        }
        if (mark != marks.end() && mark->row == static_cast<int64_t>(r) + 1) {
          std::copy(scores + begin, scores + end, mark++->scores + begin);
        }
      }
    }
  });
}

std::vector<std::vector<int32_t>> CpuBackend::select(Rows scores, int64_t k) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const CountKernels& kernels = count_kernels(isa_);
  std::vector<std::vector<int32_t>> chosen(static_cast<size_t>(scores.n));
  std::vector<int64_t> first_nan(static_cast<size_t>(scores.n), -1);
  pool_.share([&](ThreadPool::Context& context) {
    std::vector<int32_t> keys;
    int64_t row, end;
    while (context.next(scores.n, 1, &row, &end)) {
      const float* s = scores.data + row * scores.stride;
      const float* nan = std::find_if(s, s + scores.width, [](float v) { return std::isnan(v); });
      if (nan != s + scores.width) {
        first_nan[static_cast<size_t>(row)] = nan - s;
        continue;
      }
      bool finite = true;  // an infinite score is simply the largest
      const int64_t positive = kernels.positives(s, scores.width, false, &finite);
      const int64_t wanted = std::min(k, positive);
      if (wanted < 1) continue;
      const Threshold threshold = kernels.threshold(s, scores.width, false, wanted, keys);
      const float limit = std::bit_cast<float>(threshold.key);
      std::vector<int32_t>& neurons = chosen[static_cast<size_t>(row)];
      neurons.reserve(static_cast<size_t>(wanted));
      for (int64_t i = 0; i < scores.width; ++i) {
        if (s[i] > limit || (s[i] == limit && i < threshold.end)) {
          neurons.push_back(static_cast<int32_t>(i));
        }
      }
    }
  });
  for (const int64_t i : first_nan) {
    if (i < 0) continue;
    throw_error(ErrorKind::kNumeric, "the score of neuron %lld of %lld is NaN",
                static_cast<long long>(i), static_cast<long long>(scores.width));
  }
  return chosen;
}

}  // namespace coreinfer
