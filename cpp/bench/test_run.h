// TestRun: one row being measured: a session, what the test does with it, and the clock. In: an
// engine, a group, a setting and token ids. Out: the measured half of a Row. Hashing the logits and
// preparing the context are outside the clock, as tokenising and sampling are; choosing and
// compacting the neurons of a prompt that is timed are inside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bench/logits_hash.h"
#include "bench/plan.h"
#include "bench/row.h"
#include "engine/session.h"

namespace coreinfer::bench {

// Of the sessions of a group's tests.
SessionOptions session_options(const Group& group);

class TestRun {
 public:
  // ids: test.n_tokens() of them. All three must outlive the run.
  TestRun(std::shared_ptr<const Engine> engine, const Group& group, const CoreSetting& setting,
          std::span<const int32_t> ids);

  // Once before the repetitions: the prompt, or a batch of the depth, and one decode step.
  void warm_up();
  // One repetition; its time in nanoseconds. Throws kState when its logits are not those of the
  // repetitions before.
  int64_t repeat();
  // The figures of all repetitions so far.
  void fill(Row& row) const;

  // The setting's range, an open end resolved.
  LayerRange layers() const;

 private:
  using Ids = std::span<const int32_t>;
  Ids ids(int64_t begin, int64_t count) const;
  int64_t kv_read_bytes() const;
  CoreShare share() const { return {setting_.beta, layers()}; }
  void prefill(Ids tokens);
  // Brings the session to n_depth positions and its decode weights to the dense ones.
  void to_depth();
  // Selects and compacts; nothing for a dense setting.
  void choose();
  int64_t timed_prompt(LogitsHash& hash);
  int64_t timed_decode(LogitsHash& hash);
  int64_t timed_drafting(LogitsHash& hash);
  int64_t timed_verify(LogitsHash& hash);

  const Group& group_;
  const Test& test_;
  const CoreSetting& setting_;
  Ids ids_;
  std::optional<StatisticSpec> spec_;
  Session session_;
  bool at_depth_ = false;               // the cache begins with the depth's positions
  std::vector<std::byte> depth_state_;  // with scores, where a prompt is counted on top of it
  Timings depth_timings_;               // of prefilling the depth

  std::vector<int64_t> samples_ns_;
  std::vector<int64_t> prompt_ns_;  // prefill and choice, where they are timed
  std::vector<double> verify_ratios_;
  Timings totals_;  // select, compact and count of all repetitions
  std::optional<uint64_t> hash_;
};

}  // namespace coreinfer::bench
