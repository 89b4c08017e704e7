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

constexpr int64_t kMaxSamples = 4096;

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
  if (spec.samples < 0 || spec.samples > kMaxSamples) {
    throw_error(ErrorKind::kValue, "%lld FFN samples to keep, expected 0 to %lld",
                static_cast<long long>(spec.samples), static_cast<long long>(kMaxSamples));
  }
}

NeuronCounts::NeuronCounts(Backend& backend, const StatisticSpec& spec, int64_t n_layer,
                           int64_t n_ff, const std::vector<BufferPtr>& norms)
    : backend_(&backend), spec_(spec), n_layer_(n_layer), norms_(norms) {
  check(spec);
  now_.n_ff = n_ff;
  now_ = make(0);
  const std::vector<float> zeros(static_cast<size_t>(n_layer * n_ff), 0.0f);
  backend.write(zeros.data(), now_.scores->data(), n_layer * n_ff);
  const std::vector<float> none(static_cast<size_t>(n_layer), kNoBadRow);
  bad_ = backend.allocate(n_layer);
  backend.write(none.data(), bad_->data(), n_layer);
}

NeuronCounts::Snapshot NeuronCounts::make(int64_t n_tokens) const {
  return {n_tokens, now_.n_ff, backend_->allocate(n_layer_ * now_.n_ff)};
}

void NeuronCounts::add(int64_t layer, Rows h) {
  if (spec_.weighted) h = weighted(layer, h);
  // At every power of two on the way, so that snapshots do not depend on the batches.
  std::vector<ScoreMark> marks;
  auto due = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n_tokens()) + 1));
  for (; due <= n_tokens() + h.n; due *= 2) {
    if (layer == 0) snapshots_.push_back(make(due));
    const Snapshot* s = snapshot(due);
    if (s != nullptr) marks.push_back({due - n_tokens(), row(*s, layer)});
  }
  backend_->accumulate(spec_.statistic, spec_.alpha, h, row(now_, layer), marks, 0,
                       bad_->data() + layer);
}

void NeuronCounts::check_finite() const {
  std::vector<float> bad(static_cast<size_t>(n_layer_));
  backend_->read(bad_->data(), bad.data(), n_layer_);
  const auto first = std::find_if(bad.begin(), bad.end(), [](float r) { return r < kNoBadRow; });
  if (first == bad.end()) return;
  throw_error(ErrorKind::kNumeric,
              "NaN or Inf in the FFN activations of layer %lld at prompt token %lld: the weights "
              "are damaged or overflow",
              static_cast<long long>(first - bad.begin()),
              static_cast<long long>(n_tokens() + static_cast<int64_t>(*first)));
}

// Rows h * w, each times some positive number: a norm does it, and no statistic sees a row's scale.
Rows NeuronCounts::weighted(int64_t layer, Rows h) {
  constexpr float kTiny = 1e-30f;  // keeps rows of zeros finite
  if (!scratch_ || scratch_->size() < h.n * h.width) scratch_ = backend_->allocate(h.n * h.width);
  const Rows out = scratch_->rows(h.n, h.width);
  backend_->norm(h, {NormKind::kRms, norms_[static_cast<size_t>(layer)], nullptr, kTiny}, out);
  return out;
}

NeuronCounts::Scores NeuronCounts::read(const Snapshot& snapshot) const {
  std::vector<float> all(static_cast<size_t>(snapshot.scores->size()));
  backend_->read(snapshot.scores->data(), all.data(), snapshot.scores->size());
  Scores scores;
  scores.n_tokens = snapshot.n_tokens;
  for (auto at = all.begin(); at != all.end(); at += n_ff()) {
    scores.layers.emplace_back(at, at + n_ff());
  }
  return scores;
}

int64_t NeuronCounts::known_at_most(int64_t n) const {
  if (n >= n_tokens()) return n_tokens();
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
  if (n == n_tokens()) return;
  std::erase_if(snapshots_, [n](const Snapshot& s) { return s.n_tokens > n; });
  const Snapshot* found = snapshot(n);
  if (n != 0 && found == nullptr) {
    throw_error(ErrorKind::kState, "no neuron scores are known for the first %lld tokens",
                static_cast<long long>(n));
  }
  const int64_t size = now_.scores->size();
  if (found != nullptr) {
    backend_->copy(found->rows(), now_.rows());
  } else {
    const std::vector<float> zeros(static_cast<size_t>(size), 0.0f);
    backend_->write(zeros.data(), now_.scores->data(), size);
  }
  now_.n_tokens = n;
}

void NeuronCounts::write(const Scores& scores, Snapshot& to) const {
  for (int64_t i = 0; i < n_layer_; ++i) {
    backend_->write(scores.layers[static_cast<size_t>(i)].data(), row(to, i), n_ff());
  }
  to.n_tokens = scores.n_tokens;
}

void NeuronCounts::restore(const std::vector<Scores>& snapshots, const Scores& now) {
  write(now, now_);
  snapshots_.clear();
  for (const Scores& s : snapshots) {
    snapshots_.push_back(make(s.n_tokens));
    write(s, snapshots_.back());
  }
}

}  // namespace coreinfer
