#include "bench/params.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/thread_pool.h"
#include "bench/usage.h"
#include "bench/value_list.h"
#include "engine/draft_pace.h"
#include "engine/session.h"
#include "model/activation.h"

namespace coreinfer::bench {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 26;
constexpr int64_t kMaxBatch = 65536;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxLayers = 65536;
constexpr int64_t kMaxGpus = 1023;
constexpr int64_t kMaxDrafts = DraftPace::kMaxDrafts;
constexpr int64_t kMaxVerify = kExactRows;  // tokens that one decode step can take

std::string one_of(const std::string& flag, const std::string& text,
                   const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), text) != known.end()) return text;
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
  throw_error(ErrorKind::kValue, "%s is \"%s\", expected one of %s", flag.c_str(), text.c_str(),
              names.c_str());
}

std::string parse_kv_type(const std::string&, const std::string& text) {
  kv_type_from_name(text);  // throws for an unknown one
  return text;
}

std::string parse_core(const std::string& flag, const std::string& text) {
  return one_of(flag, text, {"off", "stable", "exact"});
}

Statistic parse_statistic(const std::string&, const std::string& text) {
  return statistic_from_name(text);
}

double parse_share(const std::string& flag, const std::string& text) {
  const double value = parse_number(flag, text);
  if (value > 0.0 && value <= 1.0) return value;
  throw_error(ErrorKind::kValue, "%s is %g, expected more than 0 and at most 1", flag.c_str(),
              value);
}

// Whether it suits the model is seen when that is loaded.
std::string parse_activation(const std::string& flag, const std::string& text) {
  std::string expected;
  if (activation_for(text, true, &expected)) return text;
  throw_error(ErrorKind::kValue, "%s is \"%s\", expected one of %s", flag.c_str(), text.c_str(),
              expected.c_str());
}

LayerRange parse_layers(const std::string& flag, const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos) {
    throw_error(ErrorKind::kValue,
                "%s: \"%s\" is not FIRST:LAST, for example 6:26, :20 or 4:", flag.c_str(),
                text.c_str());
  }
  LayerRange range = kAllLayers;
  if (colon > 0) range.first = parse_integer(flag, text.substr(0, colon), 0, kMaxTokens);
  if (colon + 1 < text.size()) {
    range.last = parse_integer(flag, text.substr(colon + 1), 0, kMaxTokens);
  }
  if (range.first < range.last) return range;
  throw_error(ErrorKind::kValue, "%s: \"%s\" has no layer, since LAST is not part of it",
              flag.c_str(), text.c_str());
}

class Parser {
 public:
  Parser() {
    list({"-m", "--model"}, params_.models, [](const auto&, const auto& text) { return text; });
    integers({"-p", "--n-prompt"}, params_.n_prompt, kMaxTokens);
    integers({"-n", "--n-gen"}, params_.n_gen, kMaxTokens);
    integers({"-d", "--n-depth"}, params_.n_depth, kMaxTokens);
    integers({"--verify"}, params_.n_verify, kMaxVerify);
    integers({"-b", "--batch-size"}, params_.n_batch, kMaxBatch);
    integers({"-ub", "--ubatch-size"}, params_.n_ubatch, kMaxBatch);
    integers({"-t", "--threads"}, params_.n_threads, kMaxThreads);
    list({"-ctk", "--cache-type-k"}, params_.type_k, parse_kv_type);
    list({"-ctv", "--cache-type-v"}, params_.type_v, parse_kv_type);
    list({"--core"}, params_.core, parse_core);
    list({"--statistic"}, params_.statistic, parse_statistic);
    list({"--alpha"}, params_.alpha, parse_share);
    list({"--beta"}, params_.beta, parse_share);
    list({"--layers"}, params_.layers, parse_layers);
    integers({"--patch"}, params_.patch, kMaxPatchRank);
    integers({"--drafts"}, params_.drafts, kMaxDrafts);
    list({"--accept"}, params_.accept, parse_share);
    flag({"--weighted"}, [this] { params_.weighted = true; });
    option({"-pg"}, [this](const auto& flag, const auto& text) {
      const std::vector<std::string> pair = split_list(flag, text, ',');
      if (pair.size() != 2) {
        throw_error(ErrorKind::kValue, "-pg: \"%s\" is not PROMPT,GENERATED", text.c_str());
      }
      params_.n_pg.emplace_back(parse_integer(flag, pair[0], 1, kMaxTokens),
                                parse_integer(flag, pair[1], 1, kMaxTokens));
    });
    list({"-ngl", "--n-gpu-layers"}, params_.n_gpu_layers, [](const auto& flag, const auto& text) {
      return parse_integer(flag, text, -1, kMaxLayers);
    });
    integers({"-mg", "--main-gpu"}, params_.main_gpu, kMaxGpus);
    integer({"-r", "--repetitions"}, params_.repetitions, 1, 1000000);
    integer({"--delay"}, params_.delay_seconds, 0, 3600);
    integer({"--seed"}, params_.seed, 0, INT64_MAX);
    option({"--tokens"}, [this](const auto&, const auto& text) { params_.tokens_file = text; });
    option({"--activation"}, [this](const auto& flag, const auto& text) {
      params_.activation = parse_activation(flag, text);
    });
    option({"--memory-limit"}, [this](const auto& flag, const auto& text) {
      params_.memory_limit = parse_bytes(flag, text);
    });
    option({"--bandwidth"}, [this](const auto& flag, const auto& text) {
      params_.bandwidth_gib = parse_number(flag, text);
      if (params_.bandwidth_gib < 0.0 || params_.bandwidth_gib > 1024.0) {
        throw_error(ErrorKind::kValue, "--bandwidth is %s, expected 0 (skip) to 1024 GiB",
                    text.c_str());
      }
    });
    const std::vector<std::string> formats = {"md", "csv", "json", "jsonl", "sql"};
    option({"-o", "--output"}, [this, formats](const auto& flag, const auto& text) {
      params_.output = one_of(flag, text, formats);
    });
    option({"-oe", "--output-err"}, [this, formats](const auto& flag, const auto& text) {
      params_.output_err = text == "none" ? text : one_of(flag, text, formats);
    });
    flag({"--no-warmup"}, [this] { params_.warmup = false; });
    flag({"--progress"}, [this] { params_.progress = true; });
    flag({"-v", "--verbose"}, [this] { params_.verbose = true; });
    flag({"-h", "--help"}, [this] { params_.action = Action::kHelp; });
    flag({"--version"}, [this] { params_.action = Action::kVersion; });
    flag({"--list-devices"}, [this] { params_.action = Action::kListDevices; });
  }

  BenchParams parse(int argc, const char* const* argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string arg = argv[i];
      if (const auto found = flags_.find(arg); found != flags_.end()) {
        found->second();
        continue;
      }
      const auto found = options_.find(arg);
      const bool has_value = i + 1 < argc;
      if (found == options_.end()) {
        unknown(arg, has_value ? argv[i + 1] : "");
        ++i;
        continue;
      }
      if (!has_value) {
        throw_error(ErrorKind::kValue, "%s needs a value (see --help)", arg.c_str());
      }
      found->second(arg, argv[++i]);
    }
    return std::move(params_);
  }

 private:
  using Names = std::initializer_list<const char*>;
  using Handler = std::function<void(const std::string& flag, const std::string& text)>;

  void option(Names names, const Handler& handler) {
    for (const char* name : names) options_[name] = handler;
  }
  void flag(Names names, const std::function<void()>& handler) {
    for (const char* name : names) flags_[name] = handler;
  }
  template <typename T>
  void integer(Names names, T& value, int64_t low, int64_t high) {
    option(names, [&value, low, high](const auto& flag, const auto& text) {
      value = static_cast<T>(parse_integer(flag, text, low, high));
    });
  }
  void integers(Names names, std::vector<int64_t>& values, int64_t high) {
    option(names, [this, &values, high](const auto& flag, const auto& text) {
      extend(values, parse_integers(flag, text, high));
    });
  }
  template <typename T, typename ParseOne>
  void list(Names names, std::vector<T>& values, ParseOne parse_one) {
    option(names, [this, &values, parse_one](const auto& flag, const auto& text) {
      std::vector<T> more;
      for (const std::string& m : split_list(flag, text, ',')) more.push_back(parse_one(flag, m));
      extend(values, more);
    });
  }
  // The first values given for a list replace its default, later ones join them.
  template <typename T>
  void extend(std::vector<T>& values, const std::vector<T>& more) {
    if (given_.insert(&values).second) values.clear();
    values.insert(values.end(), more.begin(), more.end());
  }

  // Returns for what llama-bench's scripts may say, since it changes nothing.
  void unknown(const std::string& arg, const std::string& value) {
    const auto known = meaningless(arg, value);
    if (!known) throw_error(ErrorKind::kValue, "unknown argument \"%s\" (see --help)", arg.c_str());
    const std::string note =
        format_string("llama-bench's %s has no meaning here: %s", arg.c_str(), known->why);
    if (!known->harmless) throw_error(ErrorKind::kValue, "%s", note.c_str());
    params_.notes.push_back(note);
  }

  BenchParams params_;
  std::set<const void*> given_;  // lists of params_ that are no longer their defaults
  std::map<std::string, Handler> options_;
  std::map<std::string, std::function<void()>> flags_;
};

void check_positive(const char* flag, const std::vector<int64_t>& values) {
  if (std::find(values.begin(), values.end(), 0) != values.end()) {
    throw_error(ErrorKind::kValue, "%s is 0, expected at least 1", flag);
  }
}

}  // namespace

BenchParams parse_params(int argc, const char* const* argv) {
  BenchParams params = Parser().parse(argc, argv);
  if (params.action != Action::kRun) return params;
  if (params.n_threads.empty()) params.n_threads = {ThreadPool::default_threads()};
  check_positive("-b", params.n_batch);
  check_positive("-ub", params.n_ubatch);
  check_positive("-t", params.n_threads);
  check_positive("--verify", params.n_verify);
  if (params.models.empty()) {
    throw_error(ErrorKind::kValue, "no model: give the path of a GGUF file with -m (see --help)");
  }
  return params;
}

}  // namespace coreinfer::bench
