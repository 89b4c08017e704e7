#include "bench/runner.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <thread>

#include "base/error.h"
#include "base/memory_use.h"
#include "bench/host.h"
#include "bench/test_run.h"
#include "model/activation.h"

namespace coreinfer::bench {
namespace {

// All that was read over all the time that it took, as the tokens of all repetitions are.
ReadBandwidth bandwidth_of(const std::vector<double>& passes, uint64_t bytes) {
  const double seconds = std::accumulate(passes.begin(), passes.end(), 0.0);
  if (std::find(passes.begin(), passes.end(), 0.0) != passes.end()) {
    std::fprintf(stderr,
                 "coreinfer-bench: warning: the read bandwidth could not be measured over %.2f GiB "
                 "(--bandwidth sets less)\n",
                 static_cast<double>(bytes) * 0x1p-30);
    return {};
  }
  return {static_cast<double>(bytes * passes.size()) * 1e-9 / seconds, bytes};
}

}  // namespace

Runner::Runner(const BenchParams& params, const TokenSource& tokens, BandwidthMeter* meter)
    : params_(params), tokens_(tokens), meter_(meter), cpu_(cpu_name()) {}

// Without a limit nothing is planned, and one engine serves all groups.
Runner::MemoryNeeds Runner::needs_of(const Group& group) const {
  MemoryNeeds needs;
  if (params_.memory_limit == 0) return needs;
  needs.n_ctx = group.test.n_tokens();
  for (const CoreSetting& setting : group.settings) {
    if (!setting.on) continue;
    needs.core_share = std::max(needs.core_share, setting.beta);
    needs.samples = std::max(needs.samples, setting.spec.samples);
  }
  return needs;
}

const Engine& Runner::engine_for(const Group& group) {
  const MemoryNeeds needs = needs_of(group);
  if (engine_ && needs_ == needs && engine_group_.model == group.model &&
      engine_group_.n_threads == group.n_threads &&
      engine_group_.n_gpu_layers == group.n_gpu_layers &&
      engine_group_.main_gpu == group.main_gpu) {
    return *engine_;
  }
  engine_.reset();  // before the next one: two at once would double the memory
  EngineOptions options;
  options.cpu.n_threads = group.n_threads;
  options.n_gpu_layers = group.n_gpu_layers;
  options.main_gpu = static_cast<int>(group.main_gpu);
  options.activation = params_.activation;
  if (params_.memory_limit > 0) {
    options.memory_limit = params_.memory_limit;
    options.core_share = needs.core_share;
    options.session = session_options(group);
    options.samples = needs.samples;
  }
  engine_ = Engine::load(group.model, options);
  engine_group_ = group;
  needs_ = needs;
  facts_ = model_facts(engine_->file());
  facts_.activation = activation_name(engine_->config().activation);
  if (params_.verbose) {
    std::fprintf(stderr, "coreinfer-bench: %s: %s, %.1f MiB, loaded in %.2f s on %s\n",
                 group.model.c_str(), facts_.type.c_str(),
                 static_cast<double>(facts_.bytes) / (1 << 20), engine_->load_seconds(),
                 engine_->backend().info().description.c_str());
  }
  return *engine_;
}

// Before the dense row is measured, not after.
void Runner::check_layers(const Group& group) {
  const int64_t n_layer = engine_for(group).config().n_layer;
  for (const CoreSetting& setting : group.settings) {
    const LayerRange& layers = setting.layers;
    if (layers.first < n_layer && (layers.last <= n_layer || layers.last == kAllLayers.last)) {
      continue;
    }
    throw_error(ErrorKind::kValue, "core %s: %s has layers 0:%lld", setting.name().c_str(),
                group.model.c_str(), static_cast<long long>(n_layer));
  }
}

Row Runner::measure(const Group& group, const CoreSetting& setting, const char* where) {
  const Engine& engine = engine_for(group);
  const std::string name =
      format_string("%s: %s, core %s", where, group.test.name().c_str(), setting.name().c_str());
  std::this_thread::sleep_for(std::chrono::seconds(params_.delay_seconds));
  reset_peak_rss();

  Row row;
  row.group = group;
  row.setting = setting;
  row.model = facts_;
  row.cpu = cpu_;
  const BackendInfo info = engine.backend().info();
  row.gpu = info.device;
  row.backend = info.name;
  row.isa = info.isa;
  row.load_ns = std::llround(engine.load_seconds() * 1e9);
  row.test_time = utc_now();
  const std::vector<int32_t> ids = tokens_.first(group.test.n_tokens(), engine.config().n_vocab);
  TestRun test(engine_, group, setting, ids);
  row.layers = test.layers();
  if (params_.warmup) {
    if (params_.progress) std::fprintf(stderr, "coreinfer-bench: %s: warm-up\n", name.c_str());
    test.warm_up();
  }
  // It is that of the host's memory.
  BandwidthMeter* const meter = info.device_memory == 0 ? meter_ : nullptr;
  const auto n_threads = static_cast<int>(group.n_threads);
  std::vector<double> passes;
  if (meter != nullptr) {
    meter->pass_seconds(n_threads);  // its threads start, its memory is written
    passes.push_back(meter->pass_seconds(n_threads));
  }
  for (int64_t i = 1; i <= params_.repetitions; ++i) {
    if (params_.progress) {
      std::fprintf(stderr, "coreinfer-bench: %s: repetition %lld/%lld\n", name.c_str(),
                   static_cast<long long>(i), static_cast<long long>(params_.repetitions));
    }
    const int64_t ns = test.repeat();
    if (params_.verbose) {
      std::fprintf(stderr, "coreinfer-bench: %s: %.3f ms\n", name.c_str(),
                   static_cast<double>(ns) * 1e-6);
    }
    if (meter != nullptr) passes.push_back(meter->pass_seconds(n_threads));
  }
  test.fill(row);
  if (meter != nullptr) row.bandwidth = bandwidth_of(passes, meter->bytes());
  if (params_.memory_limit > 0) row.memory_limit = static_cast<int64_t>(params_.memory_limit);
  row.rss = memory_use().rss;
  row.peak_rss = peak_rss();
  return row;
}

void Runner::run(const std::vector<Group>& plan, const std::function<void(const Row&)>& take) {
  for (size_t i = 0; i < plan.size(); ++i) {
    const Group& group = plan[i];
    const std::string where = format_string("test %zu/%zu", i + 1, plan.size());
    std::optional<double> dense_step_ns;
    check_layers(group);
    for (const CoreSetting& setting : group.settings) {
      Row row = measure(group, setting, where.c_str());
      if (!setting.on && group.test.kind == TestKind::kGenerate) {
        dense_step_ns = row.avg_ns() / static_cast<double>(group.test.n_gen);
      }
      row.dense_step_ns = dense_step_ns;
      take(row);
    }
  }
}

}  // namespace coreinfer::bench
