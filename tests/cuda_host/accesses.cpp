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
#include <iterator>
#include <map>

#include "cuda_runtime.h"

namespace cuda_host {
namespace {

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
// What places of the code used last, by a part of their addresses: mostly that is used again.
Memory recent[256];
// All of them, of all times: an address outside needs no look.
std::atomic<uintptr_t> lowest = ~uintptr_t{0}, highest = 0;

const Memory* find(uintptr_t at) {
  const auto found = memories.upper_bound(at);
  return found == memories.end() || at < found->second.begin ? nullptr : &found->second;
}

bool within(uintptr_t at, size_t size, const Memory& memory) {
  const uintptr_t begin = at - memory.begin;
  return begin < memory.bytes && size <= memory.bytes - begin;
}

bool within(uintptr_t at, size_t size, const void* begin, size_t bytes) {
  return within(at, size, Memory{reinterpret_cast<uintptr_t>(begin), bytes});
}

// False where it is the thread's own memory.
[[gnu::noinline]] bool look_up(uintptr_t at, size_t size, Memory& memory) {
  const Running& r = running;
  if (within(at, size, r.args, r.args_bytes) || within(at, size, here, sizeof(*here)) ||
      within(at, size, &here, sizeof(here))) {
    return false;
  }
  const Memory* found = find(at);
  if (found == nullptr || found->kind == Kind::kPinned || !within(at, size, *found)) {
    fail("memory that is not the device's");
  }
  memory = *found;
  return true;
}

// Of two threads of one block.
[[gnu::noinline]] bool apart(const Mark& before, const Mark& now) {
  if ((before.bytes & now.bytes) == 0 || (before.atomic && now.atomic)) return true;
  if (before.barriers != now.barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.syncs != now.syncs;
}

template <bool kWrites>
[[gnu::always_inline]] inline void use(Word& word, const Mark& now) {
  const auto races = [&](const Mark& before) {
    return before.block == now.block && before.thread != now.thread && !apart(before, now);
  };
  if (races(word.written)) fail("a race with a write");
  if (kWrites && races(word.read)) fail("a race with a read");
  (kWrites ? word.written : word.read) = now;
}

// Of any bytes, at any time.
template <bool kWrites>
[[gnu::noinline]] void use_bytes(const Memory& memory, uintptr_t at, size_t size, bool atomic) {
  const Running& r = running;
  const uintptr_t begin = at - memory.begin, end = begin + size;
  Mark now = r.mark;
  now.atomic = atomic;
  for (uintptr_t w = begin / kWord; w * kWord < end; ++w) {
    Word& word = memory.words[w];
    if (!r.waited && memory.kind == Kind::kDevice) {
      if (kWrites) fail("a write before the kernel has waited");
      if (word.written.block >= r.unfinished)
        fail("a read of what a kernel before may still write");
    }
    const uintptr_t first = std::max(begin, w * kWord), last = std::min(end, (w + 1) * kWord);
    now.bytes = static_cast<uint8_t>(((1u << (last - first)) - 1) << (first % kWord));
    use<kWrites>(word, now);
  }
}

// The common case of it first and inlined, since it is most of what a kernel takes here.
template <bool kWrites>
[[gnu::always_inline]] inline void in_kernel(uintptr_t at, size_t size, bool atomic,
                                             const void* place) {
  const Running& r = running;
  if (within(at, size, r.stack, r.stack_bytes)) return;
  Memory& memory = recent[reinterpret_cast<uintptr_t>(place) % std::size(recent)];
  if (!within(at, size, memory) && !look_up(at, size, memory)) return;
  const uintptr_t begin = at - memory.begin;
  if (!r.waited || atomic || (begin | size) % kWord != 0) {
    return use_bytes<kWrites>(memory, at, size, atomic);
  }
  Word* const words = memory.words + begin / kWord;
  for (size_t i = 0; i < size / kWord; ++i) use<kWrites>(words[i], r.mark);
}

[[gnu::noinline]] void in_host(uintptr_t at) {
  if (at < lowest || at >= highest) return;
  const std::lock_guard lock(one_kernel);
  const Memory* memory = find(at);
  if (memory != nullptr && memory->kind != Kind::kPinned) fail("device memory in host code");
}

template <bool kWrites>
[[gnu::always_inline]] inline void access(const void* p, size_t size, const void* place,
                                          bool atomic = false) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  running.in_kernel ? in_kernel<kWrites>(at, size, atomic, place) : in_host(at);
}

}  // namespace

std::recursive_mutex one_kernel;
constinit thread_local Running running;

void fail(const char* what) {
  if (running.in_kernel) {
    const dim3& b = here->block;
    std::fprintf(stderr, "cuda_host: %s (block %u,%u,%u, thread %u)\n", what, b.x, b.y, b.z,
                 running.mark.thread);
  } else {
    std::fprintf(stderr, "cuda_host: %s\n", what);
  }
  std::abort();
}

void note_atomic(const void* p, size_t size) {
  access<true>(p, size, __builtin_return_address(0), true);
}

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
  for (Memory& memory : recent) {
    if (memory.words == found->second.words) memory = {};
  }
  memories.erase(found);
}

bool is_memory(const void* p, size_t bytes, Kind kind) {
  const std::lock_guard lock(one_kernel);
  const auto at = reinterpret_cast<uintptr_t>(p);
  const Memory* memory = find(at);
  return memory != nullptr && memory->kind == kind && within(at, bytes, *memory);
}

}  // namespace cuda_host

#define ACCESS(name, writes, size) \
  void __tsan_##name(void* p) { cuda_host::access<writes>(p, size, __builtin_return_address(0)); }
#define ACCESSES(size)                      \
  ACCESS(read##size, false, size)           \
  ACCESS(write##size, true, size)           \
  ACCESS(unaligned_read##size, false, size) \
  ACCESS(unaligned_write##size, true, size)
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t size) {
  cuda_host::access<false>(p, size, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  cuda_host::access<true>(p, size, __builtin_return_address(0));
}
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
