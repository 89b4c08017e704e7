// Every access to memory of cuda/ and of its kernels, for what a device minds and fibers do not:
// - threads of a block that use the same bytes, one of them writing, without a barrier between, or
//   in one warp a __syncwarp (shuffles order no memory); other blocks are left aside
// - a kernel that may overlap with those before it, and reads what they write, or writes, too soon
// - memory that is not the device's in a kernel; the device's in host code; what lies around it
// The compiler calls the functions at the end, which are those of its thread sanitizer.
#include "accesses.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda_runtime.h"

namespace cuda_host {
namespace {

// Who used a word of four bytes last, or some bytes of it; block 0: nobody.
struct Mark {
  uint32_t block = 0;
  uint16_t barriers = 0, syncs = 0, thread = 0;
  uint8_t bytes = 0;  // a bit each
  bool atomic = false;
};
struct Word {
  Mark written, read;
};
constexpr uintptr_t kWord = 4;
struct Memory {
  uintptr_t begin = 0;  // of a word
  size_t bytes = 0;
  Kind kind = Kind::kDevice;
  Word* words = nullptr;  // pages come as they are used

  size_t words_bytes() const { return (bytes + kWord - 1) / kWord * sizeof(Word); }
};

// Guarded by one_kernel.
std::map<uintptr_t, Memory> memories;  // by their ends
Memory last;                           // that was used
// All of them, of all times: an address outside needs no look.
std::atomic<uintptr_t> lowest = ~uintptr_t{0}, highest = 0;

const Memory* find(uintptr_t at) {
  if (at - last.begin < last.bytes) return &last;
  const auto found = memories.upper_bound(at);
  if (found == memories.end() || at < found->second.begin) return nullptr;
  return &(last = found->second);
}

bool within(uintptr_t at, size_t size, const void* begin, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(begin);
  return at >= start && at + size <= start + bytes;
}

bool apart(const Mark& before, const Mark& now) {
  if (before.block != now.block || before.thread == now.thread) return true;
  if ((before.bytes & now.bytes) == 0 || (before.atomic && now.atomic)) return true;
  if (before.barriers != now.barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.syncs != now.syncs;
}

void in_kernel(uintptr_t at, size_t size, bool writes, bool atomic) {
  const Running& r = running;
  if (within(at, size, r.stack, r.stack_bytes) || within(at, size, r.args, r.args_bytes)) return;
  if (within(at, size, here, sizeof(*here)) || within(at, size, &here, sizeof(here))) return;
  const Memory* memory = find(at);
  if (memory == nullptr || memory->kind == Kind::kPinned ||
      at + size > memory->begin + memory->bytes) {
    fail("memory that is not the device's");
  }
  const bool device = memory->kind == Kind::kDevice;
  if (writes && device && !r.waited) fail("a write before the kernel has waited");
  Mark now{r.block,
           static_cast<uint16_t>(r.barriers),
           static_cast<uint16_t>(r.syncs),
           static_cast<uint16_t>(r.thread),
           0,
           atomic};
  const uintptr_t begin = at - memory->begin, end = begin + size;
  for (uintptr_t w = begin / kWord; w * kWord < end; ++w) {
    const uintptr_t first = std::max(begin, w * kWord), last_one = std::min(end, (w + 1) * kWord);
    now.bytes = static_cast<uint8_t>(((1u << (last_one - first)) - 1) << (first % kWord));
    Word& word = memory->words[w];
    if (device && !r.waited && word.written.block >= r.unfinished) {
      fail("a read of what a kernel before may still write");
    }
    if (!apart(word.written, now)) fail("a race with a write");
    if (writes && !apart(word.read, now)) fail("a race with a read");
    (writes ? word.written : word.read) = now;
  }
}

void access(const volatile void* p, size_t size, bool writes, bool atomic = false) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (running.in_kernel) return in_kernel(at, size, writes, atomic);
  if (at < lowest || at >= highest) return;
  const std::lock_guard lock(one_kernel);
  const Memory* memory = find(at);
  if (memory != nullptr && memory->kind != Kind::kPinned) fail("device memory in host code");
}

}  // namespace

std::recursive_mutex one_kernel;
constinit thread_local Running running;

void fail(const char* what) {
  if (running.in_kernel) {
    const dim3& b = here->block;
    std::fprintf(stderr, "cuda_host: %s (block %u,%u,%u, thread %u)\n", what, b.x, b.y, b.z,
                 running.thread);
  } else {
    std::fprintf(stderr, "cuda_host: %s\n", what);
  }
  std::abort();
}

void note_atomic(const void* p, size_t size) { access(p, size, true, true); }

void add_memory(const void* p, size_t bytes, Kind kind) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  Memory memory{begin, bytes, kind};
  void* const words = mmap(nullptr, memory.words_bytes(), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (words == MAP_FAILED) fail("no memory for who used memory");
  memory.words = static_cast<Word*>(words);
  const std::lock_guard lock(one_kernel);
  memories[begin + bytes] = memory;
  lowest = std::min<uintptr_t>(lowest, begin);
  highest = std::max<uintptr_t>(highest, begin + bytes);
}

void drop_memory(const void* p) {
  const std::lock_guard lock(one_kernel);
  const auto found = memories.upper_bound(reinterpret_cast<uintptr_t>(p));
  munmap(found->second.words, found->second.words_bytes());
  memories.erase(found);
  last = {};
}

bool is_memory(const void* p, size_t bytes, Kind kind) {
  const std::lock_guard lock(one_kernel);
  const auto at = reinterpret_cast<uintptr_t>(p);
  const Memory* memory = find(at);
  return memory != nullptr && memory->kind == kind && at + bytes <= memory->begin + memory->bytes;
}

}  // namespace cuda_host

#define ACCESSES(size)                                                             \
  void __tsan_read##size(void* p) { cuda_host::access(p, size, false); }           \
  void __tsan_write##size(void* p) { cuda_host::access(p, size, true); }           \
  void __tsan_unaligned_read##size(void* p) { cuda_host::access(p, size, false); } \
  void __tsan_unaligned_write##size(void* p) { cuda_host::access(p, size, true); }
extern "C" {
ACCESSES(1)
ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16) void __tsan_read_range(void* p, size_t size) {
  cuda_host::access(p, size, false);
}
void __tsan_write_range(void* p, size_t size) { cuda_host::access(p, size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
// Of the host's code alone.
unsigned __tsan_atomic32_load(const volatile unsigned* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
unsigned __tsan_atomic32_fetch_add(volatile unsigned* p, unsigned by, int) {
  return __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_compare_exchange_weak(volatile unsigned* p, unsigned* expected, unsigned to,
                                          int, int) {
  return __atomic_compare_exchange_n(p, expected, to, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
}
