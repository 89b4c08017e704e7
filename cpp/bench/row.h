// Row: one measured test and every figure about it. In: what the runner measured. Out: the same and
// what follows from it. How it is written is columns.h's and printers.h's business.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/bandwidth.h"
#include "bench/model_facts.h"
#include "bench/plan.h"

namespace coreinfer::bench {

struct Row {
  // ---- what was run
  Group group;  // its settings are not used
  CoreSetting setting;
  LayerRange layers;  // of the setting, its open end resolved
  ModelFacts model;
  std::string cpu;
  std::string gpu;      // "": on the CPU
  std::string backend;  // "CPU", "CUDA"
  std::string isa;      // that computed
  std::string test_time;
  ReadBandwidth bandwidth;

  // ---- measured; what has no meaning for the test is nothing
  std::vector<int64_t> samples_ns;         // one a repetition
  double ffn_kept_frac = 1.0;              // neurons that decode, over those of all layers
  std::optional<int64_t> n_prompt_select;  // tokens that the neurons were chosen from
  std::optional<int64_t> count_ns;         // of the prefill
  std::optional<int64_t> select_ns;
  std::optional<int64_t> compact_ns;
  std::optional<int64_t> patch_ns;              // fitting it
  std::optional<int64_t> patch_bytes;           // that one decode step reads of it
  std::optional<int64_t> compact_bytes;         // written
  std::optional<int64_t> compact_source_bytes;  // read from the file
  std::optional<int64_t> weight_bytes;          // that one decode step reads
  std::optional<int64_t> kv_read_bytes;         // keys and values that it reads, of the mean step
  std::optional<int64_t> kv_bytes;              // committed for the cache
  std::optional<int64_t> ttft_ns;               // prefill, counting, select and compact
  std::optional<double> dense_step_ns;          // of the dense row of the same setting
  std::optional<double> verify_over_decode;     // time of a verification over a decode step
  std::optional<double> acceptance;             // drafts that came true, over all
  int64_t load_ns = 0;
  std::optional<int64_t> memory_limit;
  uint64_t rss = 0;  // after the last repetition
  uint64_t peak_rss = 0;
  uint64_t logits_hash = 0;

  double avg_ns() const;
  double stddev_ns() const;
  std::vector<double> samples_ts() const;  // tokens per second, one a repetition
  double avg_ts() const;
  double stddev_ts() const;
  std::optional<int64_t> step_bytes() const;  // weights, keys and values
  // Those read per second while decoding, 10^9 bytes.
  std::optional<double> eff_gb_per_s() const;
  std::optional<double> bandwidth_share() const;
  // Select and compact, over the time in which their bytes, read and written, could be read.
  std::optional<double> choice_over_bandwidth() const;
  // Tokens after which the time saved by a core step has paid for select and compact.
  std::optional<double> break_even_tokens() const;
};

}  // namespace coreinfer::bench
