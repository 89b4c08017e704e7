// coreinfer-bench: the command line. Results to stdout, everything else to stderr; exit status 1
// for any failure, with the rows measured so far already written.
#include <algorithm>
#include <clocale>
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "backend/cuda_loader.h"
#include "bench/bandwidth.h"
#include "bench/host.h"
#include "bench/params.h"
#include "bench/plan.h"
#include "bench/printers.h"
#include "bench/runner.h"
#include "bench/usage.h"

namespace coreinfer::bench {
namespace {

// Before any engine: it needs a process without threads. Nothing where it would not be used.
std::unique_ptr<BandwidthMeter> make_meter(const BenchParams& params) {
  const bool on_cpu = std::count(params.n_gpu_layers.begin(), params.n_gpu_layers.end(), 0) > 0;
  if (params.bandwidth_gib <= 0.0 || !on_cpu) return nullptr;
  const double gib = static_cast<double>(uint64_t{1} << 30);
  const auto wanted = static_cast<uint64_t>(params.bandwidth_gib * gib);
  const uint64_t bytes = bandwidth_bytes(wanted);
  if (bytes + (uint64_t{1} << 20) <= wanted) {
    std::fprintf(stderr,
                 "coreinfer-bench: the read bandwidth is measured over %.2f GiB, less than asked "
                 "for: memory is short\n",
                 static_cast<double>(bytes) / gib);
  }
  return std::make_unique<BandwidthMeter>(bytes);
}

// Before anything is printed: throws where a GPU is asked for that cannot be used.
void check_gpus(const BenchParams& params) {
  if (std::all_of(params.n_gpu_layers.begin(), params.n_gpu_layers.end(),
                  [](int64_t n) { return n == 0; })) {
    return;
  }
  for (const int64_t gpu : params.main_gpu) {
    CudaOptions options;
    options.device = static_cast<int>(gpu);
    make_cuda_backend(options);
  }
}

void run(const BenchParams& params) {
  for (const std::string& warning : build_warnings()) {
    std::fprintf(stderr, "coreinfer-bench: warning: %s\n", warning.c_str());
  }
  const std::vector<Group> plan = make_plan(params);
  if (plan[0].settings.size() > 1) {
    std::fprintf(stderr,
                 "coreinfer-bench: core neurons come from a prefill of all tokens of -d and "
                 "-p before each tg and verify test, also in its dense row\n");
  }
  const TokenSource tokens(params.tokens_file, params.seed);
  for (const Group& group : plan) tokens.require(group.test.n_tokens());
  const std::unique_ptr<BandwidthMeter> meter = make_meter(params);
  Runner runner(params, tokens, meter.get());
  check_gpus(params);
  for (const std::string& note : params.notes) {
    std::fprintf(stderr, "coreinfer-bench: %s\n", note.c_str());
  }
  std::vector<std::unique_ptr<Printer>> printers;
  printers.push_back(make_printer(params.output, stdout, plan));
  if (params.output_err != "none") {
    printers.push_back(make_printer(params.output_err, stderr, plan));
  }
  const auto all = [&](const auto& call) {
    for (const auto& printer : printers) {
      call(*printer);
      printer->flush();
    }
  };
  all([](Printer& p) { p.header(); });
  try {
    runner.run(plan, [&](const Row& row) { all([&](Printer& p) { p.row(row); }); });
  } catch (...) {
    all([](Printer& p) { p.footer(); });  // so that what was measured can be parsed
    throw;
  }
  all([](Printer& p) { p.footer(); });
}

void act(const BenchParams& params) {
  switch (params.action) {
    case Action::kHelp:
      std::fputs(usage().c_str(), stdout);
      break;
    case Action::kVersion: {
      const BuildInfo build = build_info();
      std::printf("coreinfer-bench %s (commit %s, build %lld)\n", build.version, build.commit,
                  static_cast<long long>(build.number));
      break;
    }
    case Action::kListDevices:
      std::puts("Available devices:");
      for (const std::string& device : devices()) std::printf("  %s\n", device.c_str());
      break;
    case Action::kRun:
      run(params);
      break;
  }
  flush_results(stdout);
}

}  // namespace
}  // namespace coreinfer::bench

int main(int argc, char** argv) {
  std::setlocale(LC_NUMERIC, "C");  // a decimal point whatever the user's locale
  try {
    coreinfer::bench::act(coreinfer::bench::parse_params(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "coreinfer-bench: error: %s\n", error.what());
    return 1;
  }
}
