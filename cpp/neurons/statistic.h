// NeuronCounts: how strongly a text has activated each FFN neuron, per layer, summed over tokens.
// Flows in: the activation rows of one layer at a time, during a dense prefill. Flows out: scores
// (n_ff) a layer, at the text's end and at every power of two, from which core_set.h takes core
// sets. Everything stays in backend memory, so that counting does not wait for a device.
//
// With h_t the input of the down projection at token t (act(gate) * up, or relu(fc1)), P_t its
// positive entries and alpha the token-wise share (CoreInfer, arXiv 2410.18311, Eq. 1 and 3):
//   count       1 for each of the max(1, round(alpha P_t)) largest positive entries of h_t
//   count_gate  the same on act(gate)
//   count_abs   the same on |h_t|, with P_t its non-zero entries
//   flock       h_t^2 / ||h_t||^2 (GRIFFIN, arXiv 2404.01365; the square of its score)
// Each of them weighted: of h_t * w (act(gate) * w), w_n = ||W_down[:, n]||, so that a neuron is
// judged by what it adds to the residual stream; flock then ranks by energy there, h^2 w^2.
// Scores add over tokens, so the counts of a prefix plus those of the rest are those of the whole.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"

namespace coreinfer {

std::string_view statistic_name(Statistic statistic);
// Throws kValue naming the known statistics.
Statistic statistic_from_name(std::string_view name);

struct StatisticSpec {
  Statistic statistic = Statistic::kFlock;
  double alpha = 0.4;  // in (0, 1]; flock does not use it
  bool weighted = false;
  int64_t samples = 0;  // FFN samples that the prefill keeps (ffn_samples.h), for a patch

  bool operator==(const StatisticSpec&) const = default;
};
void check(const StatisticSpec& spec);

class NeuronCounts {
 public:
  // Scores of the first n_tokens tokens, in backend memory.
  struct Snapshot {
    int64_t n_tokens = 0;
    int64_t n_ff = 0;
    BufferPtr scores;  // (n_layer, n_ff)

    Rows rows() const { return scores->rows(scores->size() / n_ff, n_ff); }
  };
  // The same in host memory; layers[i] has n_ff elements.
  struct Scores {
    int64_t n_tokens = 0;
    std::vector<std::vector<float>> layers;
  };

  // norms: w of each layer (n_ff), in backend memory; empty unless the statistic is weighted.
  NeuronCounts(Backend& backend, const StatisticSpec& spec, int64_t n_layer, int64_t n_ff,
               const std::vector<BufferPtr>& norms);

  const StatisticSpec& spec() const { return spec_; }
  int64_t n_tokens() const { return now_.n_tokens; }
  int64_t n_ff() const { return now_.n_ff; }

  // Adds the rows of one layer; the same number of rows for every layer, then advance(rows).
  void add(int64_t layer, Rows h);
  // Waits for what was added since the last advance. Throws kNumeric naming layer and token if a
  // NaN or Inf was among it; the counts are then of no use.
  void check_finite() const;
  void advance(int64_t n_rows) { now_.n_tokens += n_rows; }

  // The scores as they are now; later tokens change them.
  const Snapshot& now() const { return now_; }
  // The longest prefix of at most n tokens whose scores are known: all tokens, or a power of two.
  int64_t known_at_most(int64_t n) const;
  // Null unless the scores of exactly the first n tokens are known and n > 0.
  const Snapshot* snapshot(int64_t n) const;
  const std::vector<Snapshot>& snapshots() const { return snapshots_; }  // shortest first
  Scores read(const Snapshot& snapshot) const;
  // Forgets all after the first n tokens; n must be a length that known_at_most gave.
  void keep(int64_t n);
  // Back to a state of which snapshots() and now() were read.
  void restore(const std::vector<Scores>& snapshots, const Scores& now);

 private:
  float* row(const Snapshot& snapshot, int64_t layer) const {
    return snapshot.scores->data() + layer * snapshot.n_ff;
  }
  Rows weighted(int64_t layer, Rows h);
  Snapshot make(int64_t n_tokens) const;
  void write(const Scores& scores, Snapshot& to) const;

  Backend* backend_;  // a pointer, so that counts can be moved
  StatisticSpec spec_;
  int64_t n_layer_;
  Snapshot now_;
  std::vector<BufferPtr> norms_;
  BufferPtr scratch_;  // weighted rows
  std::vector<Snapshot> snapshots_;
  BufferPtr bad_;  // per layer: the first row since advance() with a NaN or Inf
};

}  // namespace coreinfer
