#include "neurons/statistic.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace coreinfer {
namespace {

struct Name {
  Statistic statistic;
  std::string_view name;
};
constexpr Name kNames[] = {
    {Statistic::kCount, "count"},
    {Statistic::kCountGate, "count_gate"},
    {Statistic::kCountAbs, "count_abs"},
    {Statistic::kFlock, "flock"},
};

}  // namespace

std::string_view statistic_name(Statistic statistic) {
  for (const Name& n : kNames) {
    if (n.statistic == statistic) return n.name;
  }
  return "unknown";
}

Statistic statistic_from_name(std::string_view name) {
  std::string known;
  for (const Name& n : kNames) {
    if (n.name == name) return n.statistic;
    known += (known.empty() ? "" : ", ") + std::string(n.name);
  }
  throw_error(ErrorKind::kValue, "statistic is \"%.*s\", expected one of %s",
              static_cast<int>(name.size()), name.data(), known.c_str());
}

void check(const StatisticSpec& spec) {
  if (!(spec.alpha > 0.0 && spec.alpha <= 1.0)) {
    throw_error(ErrorKind::kValue, "alpha is %g, expected above 0 and at most 1", spec.alpha);
  }
}

NeuronCounts::NeuronCounts(Backend& backend, const StatisticSpec& spec, int64_t n_layer,
                           int64_t n_ff)
    : backend_(&backend), spec_(spec), n_ff_(n_ff) {
  check(spec);
  const std::vector<float> zeros(static_cast<size_t>(n_ff), 0.0f);
  for (int64_t i = 0; i < n_layer; ++i) {
    scores_.push_back(backend.allocate(n_ff));
    backend.write(zeros.data(), scores_.back()->data(), n_ff);
  }
}

void NeuronCounts::add(int64_t layer, Rows h) {
  float* scores = scores_[static_cast<size_t>(layer)]->data();
  // In pieces that end where a snapshot is due, so that snapshots do not depend on the batches.
  for (int64_t done = 0; done < h.n;) {
    const int64_t position = n_tokens_ + done;
    const auto due = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(position) + 1));
    const int64_t count = std::min(h.n - done, due - position);
    const int64_t bad =
        backend_->accumulate(spec_.statistic, spec_.alpha, h.slice(done, count), scores);
    if (bad >= 0) {
      throw_error(
          ErrorKind::kNumeric,
          "NaN or Inf in the FFN activations of layer %lld at prompt token %lld: the weights "
          "are damaged or overflow",
          static_cast<long long>(layer), static_cast<long long>(position + bad));
    }
    done += count;
    if (n_tokens_ + done == due) {
      if (layer == 0) snapshots_.push_back({due, {}});
      for (Snapshot& s : snapshots_) {
        if (s.n_tokens != due) continue;
        s.scores.emplace_back(static_cast<size_t>(n_ff_));
        backend_->read(scores, s.scores.back().data(), n_ff_);
      }
    }
  }
}

void NeuronCounts::advance(int64_t n_rows) { n_tokens_ += n_rows; }

NeuronCounts::Snapshot NeuronCounts::now() const {
  Snapshot s;
  s.n_tokens = n_tokens_;
  for (const BufferPtr& buffer : scores_) {
    s.scores.emplace_back(static_cast<size_t>(n_ff_));
    backend_->read(buffer->data(), s.scores.back().data(), n_ff_);
  }
  return s;
}

int64_t NeuronCounts::known_at_most(int64_t n) const {
  if (n >= n_tokens_) return n_tokens_;
  int64_t best = 0;
  for (const Snapshot& s : snapshots_) {
    if (s.n_tokens <= n) best = std::max(best, s.n_tokens);
  }
  return best;
}

const NeuronCounts::Snapshot* NeuronCounts::snapshot(int64_t n) const {
  for (const Snapshot& s : snapshots_) {
    if (s.n_tokens == n) return &s;
  }
  return nullptr;
}

void NeuronCounts::keep(int64_t n) {
  if (n == n_tokens_) return;
  std::erase_if(snapshots_, [n](const Snapshot& s) { return s.n_tokens > n; });
  const std::vector<float> zeros(static_cast<size_t>(n_ff_), 0.0f);
  const Snapshot* found = snapshot(n);
  if (n != 0 && found == nullptr) {
    throw_error(ErrorKind::kState, "no neuron scores are known for the first %lld tokens",
                static_cast<long long>(n));
  }
  for (size_t i = 0; i < scores_.size(); ++i) {
    backend_->write(found ? found->scores[i].data() : zeros.data(), scores_[i]->data(), n_ff_);
  }
  n_tokens_ = n;
}

void NeuronCounts::restore(std::vector<Snapshot> snapshots, const Snapshot& now) {
  for (size_t i = 0; i < scores_.size(); ++i) {
    backend_->write(now.scores[i].data(), scores_[i]->data(), n_ff_);
  }
  n_tokens_ = now.n_tokens;
  snapshots_ = std::move(snapshots);
}

}  // namespace coreinfer
