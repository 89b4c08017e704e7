// BenchParams: the command line as values, before they are multiplied out. In: argv. Out: lists and
// switches with their defaults, or an Error (kValue) that names the flag and what it takes.
// Flags, defaults and meanings are llama-bench's where it has them; `--core`, `--verify` and what
// belongs to them are ours. It opens no file and knows no model.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "neurons/core_set.h"
#include "neurons/patch.h"

namespace coreinfer::bench {

// What the command line asks for: running the tests, or only a few lines of text.
enum class Action { kRun, kHelp, kVersion, kListDevices };

// An open end stands for the model's last layer.
inline constexpr LayerRange kAllLayers = {0, std::numeric_limits<int64_t>::max()};

struct BenchParams {
  Action action = Action::kRun;

  // ---- every value of each is run with every value of all others
  std::vector<std::string> models;
  std::vector<int64_t> n_prompt = {512};
  std::vector<int64_t> n_gen = {128};
  std::vector<std::pair<int64_t, int64_t>> n_pg;  // prompt and generation timed as one
  std::vector<int64_t> n_verify;                  // tokens verified in one decode step
  std::vector<int64_t> n_depth = {0};
  std::vector<int64_t> n_batch = {2048};
  std::vector<int64_t> n_ubatch = {512};
  std::vector<int64_t> n_threads;           // default: the cores that this process may use
  std::vector<int64_t> n_gpu_layers = {0};  // 0: on the CPU; -1: all on a GPU
  std::vector<int64_t> main_gpu = {0};
  std::vector<std::string> type_k = {"f16"};
  std::vector<std::string> type_v = {"f16"};
  std::vector<std::string> core = {"off"};  // "off", "stable", "exact"
  std::vector<Statistic> statistic = {StatisticSpec{}.statistic};
  std::vector<double> alpha = {0.4};
  std::vector<double> beta = {0.4};
  std::vector<LayerRange> layers = {kAllLayers};
  std::vector<int64_t> patch = {0};    // ranks; 0: no patch; of "stable"
  std::vector<int64_t> drafts = {4};   // in one verification, of "exact"
  std::vector<double> accept = {0.9};  // share of drafts that come true, of "exact"

  // ---- one for the whole run
  int64_t repetitions = 5;
  int64_t delay_seconds = 0;  // before each test
  std::string tokens_file;    // "": ids drawn with `seed`
  uint64_t seed = 0;
  std::string activation;      // instead of the file's; "": that
  uint64_t memory_limit = 0;   // bytes that the process may hold; 0: no limit
  double bandwidth_gib = 1.0;  // memory that the bandwidth measurement reads; 0: do not measure
  bool weighted = false;
  bool warmup = true;
  bool progress = false;
  bool verbose = false;
  std::string output = "md";
  std::string output_err = "none";
  std::vector<std::string> notes;  // for stderr: flags that were taken and set nothing
};

BenchParams parse_params(int argc, const char* const* argv);

}  // namespace coreinfer::bench
