// Plan: what is measured, in order. In: BenchParams. Out: groups; the rows of a group differ only
// in the neurons that decode, dense first, so that the dense row of the same setting stands beside
// each core row. It throws kValue for combinations that make no sense and measures nothing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/params.h"

namespace coreinfer::bench {

enum class TestKind { kPrompt, kGenerate, kPromptGenerate, kVerify };

struct Test {
  TestKind kind = TestKind::kPrompt;
  int64_t n_prompt = 0;  // timed prefill
  int64_t n_gen = 0;     // decoded tokens; for kVerify those of one verification
  int64_t n_depth = 0;   // prefilled before the clock starts

  int64_t n_tokens() const { return n_depth + n_prompt + n_gen; }  // that the context must hold
  std::string name() const;  // "pp512", "tg128 @ d512", "pp512+tg128", "verify4 @ d512"
};

// Which FFN weights a row decodes with.
struct CoreSetting {
  bool on = false;     // false: dense, and the rest has no meaning
  bool exact = false;  // the core neurons only draft; dense weights verify
  StatisticSpec spec;
  double beta = 0.0;
  LayerRange layers = kAllLayers;
  int64_t patch = 0;    // rank, unless exact
  int64_t drafts = 0;   // if exact: in one verification
  double accept = 0.0;  // if exact: share of drafts that come true

  // "off", "flock 0.4", "weighted count(0.4) 0.2 6:26 patch 64", "exact flock 0.2 4 drafts 0.9"
  std::string name() const;
};

struct Group {
  std::string model;
  int n_threads = 0;
  int64_t n_batch = 0;
  int64_t n_ubatch = 0;
  int64_t n_gpu_layers = 0;
  int64_t main_gpu = 0;
  std::string type_k;
  std::string type_v;
  Test test;
  std::vector<CoreSetting> settings;  // [0] is dense
};

std::vector<Group> make_plan(const BenchParams& params);

}  // namespace coreinfer::bench
