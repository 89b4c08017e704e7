#include "sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace coreinfer {
namespace {

void expect(bool ok, const char* name, double value, const char* expected) {
  if (!ok) throw_error(ErrorKind::kValue, "%s is %g, expected %s", name, value, expected);
}

// The first of the largest, NaN aside. In lanes: by itself each comparison waits for the one before
// it, which took 91 us of a vocabulary of 152,000, while a GPU waits for the token.
int32_t arg_max(std::span<const float> logits) {
  constexpr size_t kLanes = 16, kBlock = 64 * kLanes;
  float top = logits[0];
  size_t start = 0, at = 0;  // of the block with the largest; of what is left
  for (; at + kBlock <= logits.size(); at += kBlock) {
    const float* const block = logits.data() + at;
    float most[kLanes];
    std::copy_n(block, kLanes, most);
    for (size_t i = kLanes; i < kBlock; i += kLanes) {
      for (size_t j = 0; j < kLanes; ++j) {
        most[j] = most[j] < block[i + j] ? block[i + j] : most[j];
      }
    }
    const float of_block = *std::max_element(most, most + kLanes);
    if (of_block > top) {
      top = of_block;
      start = at;
    }
  }
  const auto rest = std::max_element(logits.begin() + static_cast<ptrdiff_t>(at), logits.end());
  if (rest != logits.end() && *rest > top) {
    return static_cast<int32_t>(rest - logits.begin());
  }
  const auto found = std::find(logits.begin() + static_cast<ptrdiff_t>(start), logits.end(), top);
  return found == logits.end() ? 0 : static_cast<int32_t>(found - logits.begin());
}

// Probabilities of candidates, in their order, computed in double.
template <typename Candidate>
std::vector<double> probabilities(const std::vector<Candidate>& candidates, double temperature) {
  double top = candidates.front().logit;
  for (const Candidate& c : candidates) top = std::max<double>(top, c.logit);
  std::vector<double> p;
  p.reserve(candidates.size());
  double sum = 0.0;
  for (const Candidate& c : candidates) {
    p.push_back(std::exp((c.logit - top) / temperature));
    sum += p.back();
  }
  for (double& v : p) v /= sum;
  return p;
}

}  // namespace

void check(const SamplingParams& p) {
  expect(std::isfinite(p.temperature) && p.temperature >= 0.0f, "temperature", p.temperature,
         "a finite number of at least 0");
  expect(p.top_p > 0.0f && p.top_p <= 1.0f, "top_p", p.top_p, "above 0 and at most 1");
  expect(p.min_p >= 0.0f && p.min_p <= 1.0f, "min_p", p.min_p, "0 to 1");
  expect(p.typical_p > 0.0f && p.typical_p <= 1.0f, "typical_p", p.typical_p,
         "above 0 and at most 1");
  expect(std::isfinite(p.repeat_penalty) && p.repeat_penalty > 0.0f, "repeat_penalty",
         p.repeat_penalty, "a finite number above 0");
  expect(std::isfinite(p.frequency_penalty), "frequency_penalty", p.frequency_penalty,
         "a finite number");
  expect(std::isfinite(p.presence_penalty), "presence_penalty", p.presence_penalty,
         "a finite number");
  expect(p.penalty_last_n >= 0 && p.penalty_last_n <= (1 << 20), "penalty_last_n", p.penalty_last_n,
         "0 to 1048576");
  for (const auto& [id, bias] : p.logit_bias) {
    expect(id >= 0, "a token id in logit_bias", id, "at least 0");
    const bool forbids = bias == -std::numeric_limits<float>::infinity();
    expect(std::isfinite(bias) || forbids, "a value in logit_bias", bias,
           "a finite number, or -inf to forbid the token");
  }
}

Sampler::Sampler(const SamplingParams& params) : params_(params), random_(params.seed) {
  check(params_);
}

void Sampler::accept(int32_t token) {
  const auto capacity = static_cast<size_t>(params_.penalty_last_n);
  if (capacity == 0) return;
  if (recent_.size() < capacity) {
    recent_.push_back(token);
  } else {
    recent_[next_] = token;
    next_ = (next_ + 1) % capacity;
  }
}

void Sampler::follow(const Sampler& other) {
  params_ = other.params_;
  recent_ = other.recent_;
  next_ = other.next_;
  random_ = other.random_;
}

bool Sampler::changes_logits() const {
  const bool penalties = params_.repeat_penalty != 1.0f || params_.frequency_penalty != 0.0f ||
                         params_.presence_penalty != 0.0f;
  return !params_.logit_bias.empty() || (penalties && !recent_.empty());
}

void Sampler::bias_and_penalize(std::vector<float>& logits) const {
  const auto n_vocab = static_cast<int64_t>(logits.size());
  for (const auto& [id, bias] : params_.logit_bias) {
    expect(id < n_vocab, "a token id in logit_bias", id, "an id of the vocabulary");
    logits[static_cast<size_t>(id)] += bias;
  }
  std::map<int32_t, int32_t> seen;
  for (int32_t token : recent_) ++seen[token];
  for (const auto& [id, count] : seen) {
    if (id < 0 || id >= n_vocab) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit <= 0.0f ? logit * params_.repeat_penalty : logit / params_.repeat_penalty;
    logit -= static_cast<float>(count) * params_.frequency_penalty + params_.presence_penalty;
  }
}

// Locally typical sampling (arXiv 2202.00666): the candidates whose surprise is nearest to the
// distribution's entropy, until their probabilities reach typical_p.
void Sampler::keep_typical(std::vector<Candidate>& candidates) const {
  if (params_.typical_p >= 1.0f || candidates.size() < 2) return;
  const std::vector<double> p = probabilities(candidates, 1.0);
  double entropy = 0.0;
  for (double v : p) entropy -= v > 0.0 ? v * std::log(v) : 0.0;
  std::vector<size_t> order(candidates.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto shift = [&](size_t i) { return std::abs(-std::log(p[i]) - entropy); };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return shift(a) < shift(b); });
  double sum = 0.0;
  size_t n = 0;
  while (n < order.size() && sum < params_.typical_p) sum += p[order[n++]];
  order.resize(n);
  std::sort(order.begin(), order.end());  // back to likeliest first
  std::vector<Candidate> kept;
  for (size_t i : order) kept.push_back(candidates[i]);
  candidates = std::move(kept);
}

void Sampler::keep_top_p(std::vector<Candidate>& candidates) const {
  if (params_.top_p >= 1.0f) return;
  const std::vector<double> p = probabilities(candidates, 1.0);
  double sum = 0.0;
  size_t n = 0;
  while (n < p.size() && sum < params_.top_p) sum += p[n++];
  candidates.resize(std::max<size_t>(n, 1));
}

void Sampler::keep_min_p(std::vector<Candidate>& candidates) const {
  if (params_.min_p <= 0.0f) return;
  const float least = candidates.front().logit + std::log(params_.min_p);
  size_t n = 1;
  while (n < candidates.size() && candidates[n].logit >= least) ++n;
  candidates.resize(n);
}

int32_t Sampler::sample(std::span<const float> logits) {
  if (logits.empty()) throw_error(ErrorKind::kState, "no logits to sample from");
  if (changes_logits()) {
    adjusted_.assign(logits.begin(), logits.end());
    bias_and_penalize(adjusted_);
    logits = adjusted_;
  }
  const int32_t best = arg_max(logits);
  const bool has_nan = std::any_of(logits.begin(), logits.end(), [](float l) { return l != l; });
  if (has_nan || !std::isfinite(logits[static_cast<size_t>(best)])) {
    throw_error(ErrorKind::kNumeric,
                "cannot sample: the logits hold NaN or +Inf, or forbid every token (a logits "
                "processor or logit_bias may have made them so)");
  }
  if (params_.temperature == 0.0f) return best;

  candidates_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  }
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const size_t k = params_.top_k > 0
                       ? std::min(static_cast<size_t>(params_.top_k), candidates_.size())
                       : candidates_.size();
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(k),
                    candidates_.end(), likelier);
  candidates_.resize(k);
  keep_typical(candidates_);
  keep_top_p(candidates_);
  keep_min_p(candidates_);

  const std::vector<double> p = probabilities(candidates_, params_.temperature);
  // 53 random bits, the same on every standard library (unlike std::uniform_real_distribution).
  double u = static_cast<double>(random_() >> 11) * 0x1.0p-53;
  for (size_t i = 0; i < p.size(); ++i) {
    u -= p[i];
    if (u < 0.0) return candidates_[i].id;
  }
  return candidates_.back().id;
}

double log_sum_exp(std::span<const float> logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (float l : logits) sum += std::exp(static_cast<double>(l) - top);
  return top + std::log(sum);
}

void log_softmax(std::span<const float> logits, std::span<float> out) {
  const double norm = log_sum_exp(logits);
  for (size_t i = 0; i < logits.size(); ++i) {
    out[i] = static_cast<float>(static_cast<double>(logits[i]) - norm);
  }
}

std::vector<std::pair<int32_t, float>> top_logprobs(std::span<const float> logits, int32_t n) {
  const size_t k = std::min(logits.size(), static_cast<size_t>(std::max(n, 0)));
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(k), ids.end(),
                    [&](int32_t a, int32_t b) {
                      const float la = logits[static_cast<size_t>(a)];
                      const float lb = logits[static_cast<size_t>(b)];
                      return la != lb ? la > lb : a < b;
                    });
  const double norm = log_sum_exp(logits);
  std::vector<std::pair<int32_t, float>> top;
  for (size_t i = 0; i < k; ++i) {
    const double l = logits[static_cast<size_t>(ids[i])];
    top.emplace_back(ids[i], static_cast<float>(l - norm));
  }
  return top;
}

}  // namespace coreinfer
