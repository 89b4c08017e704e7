// How much memory this process holds, as the operating system counts it.
#pragma once

#include <cstdint>

namespace coreinfer {

struct MemoryUse {
  uint64_t rss = 0;       // bytes resident now, mapped files included; 0 where it cannot be told
  uint64_t peak_rss = 0;  // bytes resident at most since the process began
};
MemoryUse memory_use();

}  // namespace coreinfer
