// What accesses.cpp is told: whose turn it is, and which memory is the device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace cuda_host {

// Held while a kernel runs.
extern std::recursive_mutex one_kernel;

// Who used a word of four bytes last, or some bytes of it.
struct Mark {
  uint32_t block = 0;  // its number among all blocks that ever ran, from 1 on; 0: nobody
  uint16_t thread = 0;
  uint16_t barriers = 0, syncs = 0;  // that it had passed, of its block and of its warp
  uint8_t bytes = 15;                // a bit each
  bool atomic = false;
};

// The thread of a kernel that this thread runs; in_kernel false: the host's own code.
struct Running {
  bool in_kernel = false;
  bool waited = true;       // for the kernels that this one may overlap with
  uint32_t unfinished = 0;  // blocks from here on count as running until it has waited
  Mark mark;                // what it leaves at a whole word that it uses
  const char* stack = nullptr;
  size_t stack_bytes = 0;
  const char* args = nullptr;
  size_t args_bytes = 0;
};
extern constinit thread_local Running running __attribute__((tls_model("initial-exec")));

enum class Kind { kDevice, kPinned, kShared };
void add_memory(const void* p, size_t bytes, Kind kind);
void drop_memory(const void* p);
// Whether all these bytes are of one piece of memory of that kind.
bool is_memory(const void* p, size_t bytes, Kind kind);

// Ends the process, naming the thread of the kernel.
[[noreturn]] void fail(const char* what);

}  // namespace cuda_host
