// Session: the story of one text, for one caller. prefill (dense, counting) -> select -> compact ->
// decode with the small FFN. Flows in: token ids. Flows out: logits, tokens, core sets, timings.
// The phase is said by which function is called, never guessed from a shape.
//
// Positions that were written while decoding with core weights are remembered as such: a later
// prefill keeps only the dense ones before them, so its cache and statistics are those of a fresh
// dense prefill.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/session_options.h"
#include "engine/speculation.h"
#include "forward/transformer.h"
#include "neurons/compact.h"
#include "neurons/core_set.h"
#include "neurons/ffn_samples.h"
#include "neurons/patch.h"
#include "sampling/sampler.h"

namespace coreinfer {

struct Timings {
  int64_t prefill_tokens = 0;
  double prefill_seconds = 0.0;  // counting included
  double count_seconds = 0.0;    // with a GPU: of handing it over
  double select_seconds = 0.0;
  double compact_seconds = 0.0;  // of set_core; what was gathered on the way is in the prefill's
  double patch_seconds = 0.0;
  int64_t decode_tokens = 0;
  uint64_t decode_bytes = 0;  // of the weights that these would have read one by one
  double decode_seconds = 0.0;
  // Of exact mode, inside decode_seconds: drafts made, those that were right, and verifications.
  int64_t drafted_tokens = 0;
  int64_t accepted_tokens = 0;
  int64_t verifications = 0;
  double draft_seconds = 0.0;
  // Of replay(): tokens read again.
  int64_t replay_tokens = 0;
  double replay_seconds = 0.0;
};

class Session {
 public:
  Session(std::shared_ptr<const Engine> engine, const SessionOptions& options);

  const Engine& engine() const { return *engine_; }
  int64_t n_ctx() const { return options_.n_ctx; }
  int64_t n_batch() const { return options_.n_batch; }
  int64_t n_past() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t n_dense() const { return n_dense_; }  // leading positions that the dense weights wrote
  const std::vector<int32_t>& tokens() const { return tokens_; }

  // How many leading ids of `tokens` a prefill of them may keep: the common prefix with the cache
  // that is dense and, with a statistic, whose scores are known. Always leaves the last id to run,
  // since logits are wanted.
  int64_t reusable(std::span<const int32_t> tokens, const std::optional<StatisticSpec>& spec);
  // Forgets all positions from n on.
  void keep(int64_t n);
  void reset() { keep(0); }

  // Appends tokens with the dense weights; the logits of the last are then available. With a
  // statistic their activations are counted. After an exception the cache is empty.
  // `expected`: where dense FFN weights are not resident, their core is gathered as they pass by in
  // the last batch, in place of the present core set, and set_core(select(...)) with the same
  // values need not bring them in again.
  void prefill(std::span<const int32_t> tokens, const std::optional<StatisticSpec>& spec,
               const std::function<void(int64_t, int64_t)>& progress = {},
               const std::function<bool()>& cancelled = {},
               const std::optional<CoreShare>& expected = {});

  // Core set, and stability, of the counted prefix. kState when nothing has been counted.
  CoreSet select(const CoreShare& share);
  std::optional<double> stability(const CoreShare& share);

  // What the prefill kept of its last tokens. kState when it kept nothing.
  const FfnSamples& samples() const;

  // From now on decode, verify and score use these neurons (nothing: the dense weights).
  void set_core(std::optional<CoreSet> set);
  // Fits a patch of the present core set to the prompt's samples, layer by layer, and decodes with
  // it from now on; core_set() then carries it. Layers of which every neuron is kept get none.
  // Without samples kState; after kNumeric the core set is there without a patch.
  void fit_patch(const PatchSpec& spec, const PatchPrior* prior = nullptr);
  const std::optional<CoreSet>& core_set() const { return core_set_; }
  size_t compact_bytes() const { return compact_.buffer_bytes; }
  size_t compact_source_bytes() const { return compact_.source_bytes; }  // read to make it
  size_t patch_bytes() const;          // that a decode step reads of patches
  size_t decode_weight_bytes() const;  // that one decode step reads

  // One token with the decode weights. `sampler` draws the text's tokens; in exact mode a copy of
  // it draws the drafts, so that both draw alike.
  void decode(int32_t token, const Sampler* sampler = nullptr);
  // Several at once, with logits for each; bit-equal to decoding them one by one.
  void verify(std::span<const int32_t> tokens, std::span<float> logits,
              const std::function<bool()>& cancelled = {});
  // ln p of every id before each token of the continuation: out is (n, n_vocab). Row 0 comes from
  // the present logits. The cache then holds all but the continuation's last token.
  void score(std::span<const int32_t> continuation, std::span<float> out,
             const std::function<bool()>& cancelled = {});

  // ---- exact mode: dense decoding, bit for bit, with the core set as a draft (session_exact.cpp).
  // From now on decode gives the dense weights' logits; it drafts some tokens, lets the dense
  // weights look at all of them in one pass, and has the answer ready when they come. The prompt's
  // statistics grow by every token. kState where dense FFN weights are not resident. Nothing: ends
  // it.
  void set_exact(const std::optional<ExactSpec>& spec);
  bool exact() const { return speculation_ != nullptr; }
  // What drafting gains over dense decoding, as far as it is known; null unless exact.
  const DraftPace* pace() const { return speculation_ ? &speculation_->pace : nullptr; }
  // The token that exact mode expects next and has looked at already, if any.
  std::optional<int32_t> expected() const;

  // Reads again, dense and in one batch, what was decoded with core weights, and what the statistic
  // has not counted or sampled: the session is then as after a prefill of all its tokens.
  void replay(const std::optional<StatisticSpec>& spec,
              const std::function<bool()>& cancelled = {});

  std::span<const float> logits() const;  // (n_vocab) of the last position
  int32_t sample(Sampler& sampler) const { return sampler.sample(logits()); }

  std::vector<std::byte> save_state();
  void load_state(std::span<const std::byte> state);

  const Timings& timings() const { return timings_; }
  size_t kv_bytes() const { return cache_->committed_bytes(); }
  // Keys and values that decoding reads at a position, its own included.
  size_t kv_read_bytes(int64_t position) const;

 private:
  void check_tokens(std::span<const int32_t> tokens) const;
  void check_room(size_t n) const;
  void run_decode(std::span<const int32_t> tokens, WantLogits want,
                  const std::function<bool()>& cancelled);
  uint64_t estimated_bytes(const std::function<int64_t(size_t)>& kept) const;
  void expect(const CoreShare& share);
  std::vector<FfnWeights> patched(const CoreSet& set) const;
  SessionMemory memory() const;
  const NeuronCounts& counted();
  NeuronCounts make_counts(const StatisticSpec& spec) const;
  void make_samples(int64_t capacity);
  bool decodes_dense() const { return !core_set_ || exact(); }

  // Exact mode.
  void decode_exact(int32_t token, const Sampler* sampler);
  void take_expected(int32_t token);
  void draft(int32_t token, const Sampler* sampler);
  void draft_with_core(int32_t token, int64_t limit, const Sampler* sampler);
  int64_t prepare_core(int64_t limit);
  void judge(bool all);
  void keep_seen(int64_t n);
  void count_kept();
  void forget_expected();

  std::shared_ptr<const Engine> engine_;
  SessionOptions options_;  // checked
  KvCachePtr cache_;
  std::unique_ptr<Transformer> transformer_;
  std::vector<int32_t> tokens_;
  int64_t n_dense_ = 0;                 // leading positions written by the dense weights
  std::optional<NeuronCounts> counts_;  // of the first counts_->n_tokens() positions
  std::optional<FfnSamples> samples_;   // of the same positions, where the statistic asks for them
  std::optional<CoreSet> core_set_;
  CompactWeights compact_;                 // layers empty: decode dense
  std::optional<PassingCompact> passing_;  // of the last prompt, where it was gathered on the way
  std::vector<float> logits_;              // of the last position; empty: none
  std::unique_ptr<Speculation> speculation_;  // in exact mode
  struct {
    KeptActivations seen, kept;
  } spare_rows_;  // of the last speculation
  Timings timings_;
};

}  // namespace coreinfer
