#include "bench/plan.h"

#include <algorithm>

#include "base/error.h"

namespace coreinfer::bench {
namespace {

void add_stable(const BenchParams& params, CoreSetting setting, std::vector<CoreSetting>* all) {
  for (const int64_t patch : params.patch) {
    setting.patch = patch;
    setting.spec.samples = patch > 0 ? kPatchSamples : 0;
    all->push_back(setting);
  }
}

void add_exact(const BenchParams& params, CoreSetting setting, std::vector<CoreSetting>* all) {
  setting.exact = true;
  for (const int64_t drafts : params.drafts) {
    for (const double accept : params.accept) {
      setting.drafts = drafts;
      setting.accept = accept;
      all->push_back(setting);
    }
  }
}

// Dense, then every core setting that differs from those before it.
std::vector<CoreSetting> core_settings(const BenchParams& params) {
  std::vector<CoreSetting> settings = {CoreSetting{}};
  const auto asked = [&](const char* mode) {
    return std::find(params.core.begin(), params.core.end(), mode) != params.core.end();
  };
  const bool stable = asked("stable"), exact = asked("exact");
  if (!stable && !exact) return settings;
  if (exact && !params.n_verify.empty()) {
    throw_error(ErrorKind::kValue,
                "--verify with --core exact: decoding verifies by itself there; use off or stable");
  }
  for (const Statistic statistic : params.statistic) {
    for (const double alpha : params.alpha) {
      for (const double beta : params.beta) {
        for (const LayerRange layers : params.layers) {
          CoreSetting setting;
          setting.on = true;
          setting.spec.statistic = statistic;
          setting.spec.alpha = alpha;
          setting.spec.weighted = params.weighted;
          setting.beta = beta;
          setting.layers = layers;
          if (stable) add_stable(params, setting, &settings);
          if (exact) add_exact(params, setting, &settings);
        }
      }
      if (statistic == Statistic::kFlock) break;  // has no alpha
    }
  }
  return settings;
}

// Every test at one depth. `prompted`: decoding follows a prefill of -p tokens, too.
std::vector<Test> tests_at(const BenchParams& params, int64_t depth, bool prompted) {
  std::vector<Test> tests;
  for (const int64_t p : params.n_prompt) {
    if (p > 0) tests.push_back({TestKind::kPrompt, p, 0, depth});
  }
  const std::vector<int64_t> prompts = prompted ? params.n_prompt : std::vector<int64_t>{0};
  for (const int64_t n : params.n_gen) {
    for (const int64_t p : prompts) {
      if (n > 0) tests.push_back({TestKind::kGenerate, 0, n, depth + p});
    }
  }
  for (const auto& [p, n] : params.n_pg) {
    tests.push_back({TestKind::kPromptGenerate, p, n, depth});
  }
  for (const int64_t n : params.n_verify) {
    for (const int64_t p : prompts) {
      tests.push_back({TestKind::kVerify, 0, n, depth + p});
    }
  }
  return tests;
}

void check_prompt(const Test& test) {
  if (test.n_prompt + test.n_depth > 0) return;
  throw_error(ErrorKind::kValue,
              "%s with core neurons has no prompt to choose them from: give -p (or -d) of at least "
              "1, or leave such tests out (-n 0) and use -pg",
              test.name().c_str());
}

// The group with every session and test.
void add_sessions(const BenchParams& params, Group group, bool prompted, std::vector<Group>* plan) {
  for (const int64_t n_batch : params.n_batch) {
    for (const int64_t n_ubatch : params.n_ubatch) {
      for (const std::string& type_k : params.type_k) {
        for (const std::string& type_v : params.type_v) {
          for (const int64_t depth : params.n_depth) {
            for (const Test& test : tests_at(params, depth, prompted)) {
              if (prompted) check_prompt(test);
              group.n_batch = n_batch;
              group.n_ubatch = n_ubatch;
              group.type_k = type_k;
              group.type_v = type_v;
              group.test = test;
              plan->push_back(group);
            }
          }
        }
      }
    }
  }
}

}  // namespace

std::string Test::name() const {
  const auto p = static_cast<long long>(n_prompt);
  const auto n = static_cast<long long>(n_gen);
  std::string text;
  switch (kind) {
    case TestKind::kPrompt:
      text = format_string("pp%lld", p);
      break;
    case TestKind::kGenerate:
      text = format_string("tg%lld", n);
      break;
    case TestKind::kPromptGenerate:
      text = format_string("pp%lld+tg%lld", p, n);
      break;
    case TestKind::kVerify:
      text = format_string("verify%lld", n);
      break;
  }
  if (n_depth > 0) text += format_string(" @ d%lld", static_cast<long long>(n_depth));
  return text;
}

std::string CoreSetting::name() const {
  if (!on) return "off";
  std::string text(exact ? "exact " : "");
  if (spec.weighted) text += "weighted ";
  text += statistic_name(spec.statistic);
  if (spec.statistic != Statistic::kFlock) text += format_string("(%g)", spec.alpha);
  text += format_string(" %g", beta);
  if (layers.first != kAllLayers.first || layers.last != kAllLayers.last) {
    text += format_string(" %lld:", static_cast<long long>(layers.first));
    if (layers.last != kAllLayers.last) {
      text += format_string("%lld", static_cast<long long>(layers.last));
    }
  }
  if (patch > 0) text += format_string(" patch %lld", static_cast<long long>(patch));
  if (exact) text += format_string(" %lld drafts %g", static_cast<long long>(drafts), accept);
  return text;
}

std::vector<Group> make_plan(const BenchParams& params) {
  const std::vector<CoreSetting> settings = core_settings(params);
  const bool prompted = settings.size() > 1;
  std::vector<Group> plan;
  // Model, threads and GPU outermost: they decide which engine is loaded.
  for (const std::string& model : params.models) {
    for (const int64_t n_threads : params.n_threads) {
      for (const int64_t n_gpu_layers : params.n_gpu_layers) {
        for (const int64_t main_gpu : params.main_gpu) {
          Group group;
          group.model = model;
          group.n_threads = static_cast<int>(n_threads);
          group.n_gpu_layers = n_gpu_layers;
          group.main_gpu = main_gpu;
          group.settings = settings;
          add_sessions(params, group, prompted, &plan);
        }
      }
    }
  }
  if (plan.empty()) {
    throw_error(ErrorKind::kValue,
                "no test to run: all of -p, -n, -pg and --verify are 0 or absent");
  }
  return plan;
}

}  // namespace coreinfer::bench
