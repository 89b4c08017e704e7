#include "base/memory_use.h"

#include <sys/resource.h>

#include <fstream>
#include <string>

namespace coreinfer {
namespace {

// A line "VmHWM:   1234 kB" of Linux's /proc/self/status, in bytes; 0 where there is none.
uint64_t status_bytes(const char* name) {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    if (key == std::string(name) + ":") {
      uint64_t kib = 0;
      status >> kib;
      return kib * 1024;
    }
    status.ignore(4096, '\n');
  }
  return 0;
}

}  // namespace

MemoryUse memory_use() {
  MemoryUse use;
  use.rss = status_bytes("VmRSS");
  // Not getrusage first: on Linux its maximum includes the process that started this one.
  use.peak_rss = status_bytes("VmHWM");
  rusage usage{};
  if (use.peak_rss == 0 && getrusage(RUSAGE_SELF, &usage) == 0) {
    use.peak_rss = static_cast<uint64_t>(usage.ru_maxrss);
#ifndef __APPLE__
    use.peak_rss *= 1024;
#endif
  }
  return use;
}

}  // namespace coreinfer
