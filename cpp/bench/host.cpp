#include "bench/host.h"

#include <ctime>
#include <fstream>

#include "backend/cuda_loader.h"
#include "base/error.h"
#include "base/memory_use.h"
#include "base/thread_pool.h"
#include "kernels/isa.h"

namespace coreinfer::bench {

BuildInfo build_info() {
  return {COREINFER_VERSION, COREINFER_BUILD_COMMIT, COREINFER_BUILD_NUMBER};
}

std::vector<std::string> build_warnings() {
  std::vector<std::string> warnings;
#ifndef NDEBUG
  warnings.push_back("assertions are on (a debug build): figures are too slow");
#endif
#ifndef __OPTIMIZE__
  warnings.push_back("built without optimisation: figures are too slow");
#endif
  const std::string sanitizers = COREINFER_BUILD_SANITIZERS;
  if (!sanitizers.empty()) {
    warnings.push_back("built with sanitizers (" + sanitizers + "): figures are too slow");
  }
  return warnings;
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    // x86 says "model name", some Arm systems "Model" or "Hardware".
    for (const char* key : {"model name", "Model", "Hardware"}) {
      if (line.rfind(key, 0) != 0) continue;
      const size_t colon = line.find(':');
      if (colon == std::string::npos) continue;
      const size_t begin = line.find_first_not_of(" \t", colon + 1);
      if (begin != std::string::npos) return line.substr(begin);
    }
  }
  return "unknown";
}

std::vector<std::string> devices() {
  std::vector<std::string> lines = {format_string(
      "CPU: %s (%d threads; %s, uses %s)", cpu_name().c_str(), ThreadPool::default_threads(),
      available_isa_names().c_str(), std::string(isa_name(best_isa())).c_str())};
  for (CudaOptions gpu;; ++gpu.device) {
    try {
      lines.push_back(format_string("CUDA%d: %s", gpu.device,
                                    make_cuda_backend(gpu)->info().description.c_str()));
    } catch (const Error&) {
      return lines;  // no more, or none
    }
  }
}

void reset_peak_rss() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5";  // "reset the peak"; where it is not allowed the peak stays the process's
}

uint64_t peak_rss() {
  std::ifstream file("/proc/self/status");
  for (std::string word; file >> word;) {
    uint64_t kib = 0;
    if (word == "VmHWM:" && file >> kib) return kib * 1024;
  }
  return memory_use().peak_rss;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

}  // namespace coreinfer::bench
