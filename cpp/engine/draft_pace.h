// DraftPace: how many tokens to draft before the dense weights look at them. In: what drafting and
// verifying have cost, and how many drafts were right. Out: the length with the best expected rate,
// 0 where plain dense decoding is the faster. It keeps a ledger: what has been lost by trying may
// not pass a small share of the time spent, so decoding is never much slower than dense.
#pragma once

#include <array>
#include <cstdint>

#include "backend/backend.h"

namespace coreinfer {

class DraftPace {
 public:
  // Where drafts come from: decoding with the core neurons, or an earlier place in the text.
  enum Source { kCore, kText };
  static constexpr int64_t kMaxDrafts = kExactRows - 1;

  // What one verification of `rows` rows took; 1 row is a dense step.
  void verified(int64_t rows, double seconds);
  // What drafting n tokens with the core neurons took.
  void drafted(int64_t n, double seconds);
  // Of `offered` drafts the first `accepted` were right.
  void judged(Source source, int64_t offered, int64_t accepted);
  // Anything else that drafting needed (choosing and compacting a core set).
  void spent(double seconds);

  // How many tokens to draft now, at most `limit`. `entry` seconds are needed before the first.
  int64_t length(Source source, int64_t limit, double entry = 0.0) const;
  // Expected tokens a second with `source` over those of dense decoding; 1 where not drafting is
  // best. Nothing is known before the first verification.
  double gain(Source source) const;
  // Share of drafts that are right, as far as they were judged.
  double acceptance(Source source) const { return of_[source].rate(); }
  // Whether enough drafts have been judged for gain() to be more than a guess.
  bool known(Source source) const { return of_[source].trials >= kKnownTrials; }

  // Seconds of a dense step, 0 before the first.
  double dense_seconds() const { return dense_.value; }

 private:
  static constexpr double kKnownTrials = 8.0;

  struct Acceptance {
    double hits = 0.0;       // decayed
    double trials = 0.0;     // decayed
    int64_t next_probe = 0;  // in tokens decoded so far, once drafting did not pay
    int64_t probe_interval = 0;
    double rate() const;
  };

  double verify_seconds(int64_t rows) const;
  double draft_seconds(Source source, int64_t n) const;
  // Expected tokens a second of drafting k over those of dense decoding.
  double ratio(Source source, int64_t k) const;
  int64_t best(Source source, int64_t limit) const;

  // A running mean that forgets.
  struct Mean {
    double value = 0.0;
    int64_t n = 0;
    void add(double v);
  };

  std::array<Acceptance, 2> of_;
  Mean dense_;               // seconds of a dense step
  Mean row_share_;           // of a dense step that each further row takes
  Mean draft_;               // seconds of a core step
  int64_t since_dense_ = 0;  // verifications since a dense step was timed
  int64_t tokens_ = 0;
  double total_ = 0.0;    // seconds spent decoding
  double balance_ = 0.0;  // seconds saved against dense decoding, below 0: lost
};

}  // namespace coreinfer
