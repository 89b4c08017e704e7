// Runner: carries a plan out. In: params, plan, a bandwidth meter. Out: rows, one by one, to
// whoever takes them. It keeps an engine as long as model and threads stay the same, and says on
// stderr what it does where the params ask for it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "bench/bandwidth.h"
#include "bench/params.h"
#include "bench/plan.h"
#include "bench/row.h"
#include "bench/token_source.h"
#include "engine/engine.h"

namespace coreinfer::bench {

class Runner {
 public:
  // meter: null where the bandwidth is not measured. All three must outlive the runner.
  Runner(const BenchParams& params, const TokenSource& tokens, BandwidthMeter* meter);

  void run(const std::vector<Group>& plan, const std::function<void(const Row&)>& take);

 private:
  // What a group will want beside the weights.
  struct MemoryNeeds {
    double core_share = 0.0;
    int64_t samples = 0;
    int64_t n_ctx = 0;

    bool operator==(const MemoryNeeds&) const = default;
  };

  MemoryNeeds needs_of(const Group& group) const;
  const Engine& engine_for(const Group& group);
  void check_layers(const Group& group);
  Row measure(const Group& group, const CoreSetting& setting, const char* where);

  const BenchParams& params_;
  const TokenSource& tokens_;
  BandwidthMeter* meter_;
  std::string cpu_;
  std::shared_ptr<const Engine> engine_;
  Group engine_group_;  // that it was loaded for
  MemoryNeeds needs_;   // that a limit was planned with
  ModelFacts facts_;    // of the engine's model
};

}  // namespace coreinfer::bench
