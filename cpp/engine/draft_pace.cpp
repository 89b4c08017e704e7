#include "engine/draft_pace.h"

#include <algorithm>
#include <cmath>

namespace coreinfer {
namespace {

constexpr double kBudget = 0.02;      // share of the time spent that trying may lose
constexpr double kWorthwhile = 1.03;  // expected gain from which drafting is used
constexpr double kForget = 0.97;      // weight of older verdicts, a verification
constexpr double kSmooth = 0.1;       // least weight of a new time in a running mean
// Before anything is known: six drafts in ten are right, a core step takes half a dense one, a
// further row a tenth.
constexpr double kPriorHits = 2.4, kPriorTrials = 4.0, kPriorDraft = 0.5, kPriorRow = 0.1;
constexpr int64_t kFirstProbe = 64, kLastProbe = 4096;  // tokens between tries that do not pay
constexpr int64_t kDenseSteps = 3;                      // timed before the first draft
constexpr int64_t kDenseEvery = 64;  // verifications after which a dense step is timed again

}  // namespace

void DraftPace::Mean::add(double v) {
  const double weight = std::max(kSmooth, 1.0 / static_cast<double>(++n));
  value += weight * (v - value);
}

double DraftPace::Acceptance::rate() const { return (hits + kPriorHits) / (trials + kPriorTrials); }

void DraftPace::verified(int64_t rows, double seconds) {
  total_ += seconds;
  balance_ -= seconds;
  if (rows == 1) {
    dense_.add(seconds);
    since_dense_ = 0;
  } else {
    const double share = (seconds / dense_.value - 1.0) / static_cast<double>(rows - 1);
    row_share_.add(std::clamp(share, 0.0, 1.0));
    ++since_dense_;
  }
  // The first row is the token itself, which dense decoding would have computed, too.
  ++tokens_;
  balance_ += rows == 1 ? seconds : dense_.value;
}

void DraftPace::drafted(int64_t n, double seconds) {
  spent(seconds);
  if (n > 0) draft_.add(seconds / static_cast<double>(n));
}

void DraftPace::spent(double seconds) {
  total_ += seconds;
  balance_ -= seconds;
}

void DraftPace::judged(Source source, int64_t offered, int64_t accepted) {
  if (offered == 0) return;
  Acceptance& a = of_[source];
  a.hits = kForget * a.hits + static_cast<double>(accepted);
  a.trials = kForget * a.trials + static_cast<double>(std::min(accepted + 1, offered));
  tokens_ += accepted;
  balance_ += dense_.value * static_cast<double>(accepted);
  if (ratio(source, best(source, kMaxDrafts)) > kWorthwhile) {
    a.probe_interval = 0;
  } else {
    a.probe_interval = std::clamp(2 * a.probe_interval, kFirstProbe, kLastProbe);
    a.next_probe = tokens_ + a.probe_interval;
  }
}

double DraftPace::verify_seconds(int64_t rows) const {
  const double share = row_share_.n > 0 ? row_share_.value : kPriorRow;
  return dense_.value * (1.0 + share * static_cast<double>(rows - 1));
}

double DraftPace::draft_seconds(Source source, int64_t n) const {
  if (source == kText) return 0.0;
  return static_cast<double>(n) * (draft_.n > 0 ? draft_.value : kPriorDraft * dense_.value);
}

double DraftPace::ratio(Source source, int64_t k) const {
  if (k == 0) return 1.0;
  const double a = std::min(of_[source].rate(), 0.999);
  const double tokens = (1.0 - std::pow(a, static_cast<double>(k + 1))) / (1.0 - a);
  return tokens * dense_.value / (verify_seconds(k + 1) + draft_seconds(source, k));
}

int64_t DraftPace::best(Source source, int64_t limit) const {
  int64_t best = 0;
  for (int64_t k = 1; k <= std::min(limit, kMaxDrafts); ++k) {
    if (ratio(source, k) > ratio(source, best)) best = k;
  }
  return best;
}

int64_t DraftPace::length(Source source, int64_t limit, double entry) const {
  if (limit < 1 || dense_.n < kDenseSteps || since_dense_ >= kDenseEvery) return 0;
  const Acceptance& a = of_[source];
  int64_t k = best(source, limit);
  const bool worthwhile = k > 0 && ratio(source, k) > kWorthwhile;
  if (worthwhile && known(source)) return k;
  if (!worthwhile) {
    if (tokens_ < a.next_probe) return 0;
    k = std::min<int64_t>(2, limit);
  }
  const double at_stake = entry + verify_seconds(k + 1) - dense_.value + draft_seconds(source, k);
  return at_stake - balance_ <= kBudget * total_ ? k : 0;
}

double DraftPace::gain(Source source) const {
  return dense_.n == 0 ? 1.0 : ratio(source, best(source, kMaxDrafts));
}

}  // namespace coreinfer
