#include "base/memory_use.h"

#include <sys/resource.h>
#include <unistd.h>

#include <fstream>

namespace coreinfer {

MemoryUse memory_use() {
  MemoryUse use;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
#ifdef __APPLE__
    use.peak_rss = static_cast<uint64_t>(usage.ru_maxrss);
#else
    use.peak_rss = static_cast<uint64_t>(usage.ru_maxrss) * 1024;
#endif
  }
  std::ifstream statm("/proc/self/statm");
  uint64_t total_pages = 0, resident_pages = 0;
  if (statm >> total_pages >> resident_pages) {
    use.rss = resident_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  }
  return use;
}

}  // namespace coreinfer
