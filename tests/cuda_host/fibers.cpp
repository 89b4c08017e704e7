// The blocks of a grid on the host: every thread is a fiber; fibers of a warp run one after the
// other until all stand at the same warp operation, warps until all stand at the block's barrier.
// In which order is CUDA_HOST_ORDER's: kernels may not mind.
#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an error
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "accesses.h"

// All static __shared__ variables; the linker makes the names.
extern "C" __attribute__((visibility("hidden"))) unsigned char __start_cuda_shared[],
    __stop_cuda_shared[];

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 256 * 1024;

enum class State { kReady, kAtWarpOperation, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::kDone;
  Position position;
  unsigned operations = 0;  // warp operations so far
  unsigned barriers = 0, syncs = 0;
  bool waited = false;
  uint64_t (*slots)[32] = nullptr;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
};

struct Warp {
  uint64_t slots[2][32];
};

uint32_t last_block = 0;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
jmp_buf scheduler;
void (*the_thunk)(const void*, const void*) = nullptr;
const void* the_kernel = nullptr;
const void* the_args = nullptr;
alignas(128) unsigned char shared_memory[kSharedBytes];

// First to last, CUDA_HOST_ORDER=backwards: last to first, or a number: anyhow, from that seed on.
struct Order {
  uint64_t seed = 0;
  bool backwards = false;
  size_t start = 0;

  void read() {
    const char* value = std::getenv("CUDA_HOST_ORDER");
    backwards = value != nullptr && std::string_view(value) == "backwards";
    start = 0;
    seed = value != nullptr ? std::strtoull(value, nullptr, 10) : 0;
  }
  // For the turns that follow.
  void draw() {
    if (seed == 0) return;
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    backwards = (seed >> 63) != 0;
    start = static_cast<size_t>(seed >> 33 & 0xffff);
  }
  size_t operator()(size_t turn, size_t n) const {
    const size_t at = (turn + start) % n;
    return backwards ? n - 1 - at : at;
  }
} order;

void yield(State state) {
  current->state = state;
  running.in_kernel = false;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void entry() {
  for (;;) {
    the_thunk(the_kernel, the_args);
    if (!current->waited) fail("a thread that leaves without waiting for the kernel before");
    yield(State::kDone);
  }
}

}  // namespace

Position* const here = new Position;

namespace {

void resume(Fiber& fiber) {
  current = &fiber;
  *here = fiber.position;
  running.thread = fiber.position.thread.x;
  running.barriers = fiber.barriers;
  running.syncs = fiber.syncs;
  running.waited = fiber.waited;
  running.stack = fiber.stack.get();
  if (_setjmp(scheduler) != 0) return;
  running.in_kernel = true;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

// Until every lane stands at the block's barrier or is done.
void run_warp(size_t begin, size_t end) {
  for (;;) {
    size_t at_operation = 0;
    order.draw();
    const Order of_lanes = order;
    for (size_t turn = 0; turn < end - begin; ++turn) {
      Fiber& fiber = *fibers[begin + of_lanes(turn, end - begin)];
      if (fiber.state == State::kReady) resume(fiber);
    }
    for (size_t i = begin; i < end; ++i) {
      at_operation += fibers[i]->state == State::kAtWarpOperation;
      if (fibers[i]->operations != fibers[begin]->operations) fail("divergent warp operation");
    }
    if (at_operation == 0) return;
    if (at_operation != end - begin) fail("a warp operation that not all lanes reach");
    for (size_t i = begin; i < end; ++i) fibers[i]->state = State::kReady;
  }
}

void run_block(size_t n) {
  for (;;) {
    order.draw();
    const Order of_warps = order;
    for (size_t turn = 0; turn < n / 32; ++turn) {
      const size_t first = 32 * of_warps(turn, n / 32);
      run_warp(first, first + 32);
    }
    size_t done = 0;
    for (size_t i = 0; i < n; ++i) done += fibers[i]->state == State::kDone;
    if (done == n) return;
    for (size_t i = 0; i < n; ++i) {
      if (fibers[i]->state == State::kAtBarrier) fibers[i]->state = State::kReady;
    }
  }
}

}  // namespace

unsigned char* dynamic_shared() { return shared_memory; }

void block_barrier() {
  running.barriers = ++current->barriers;
  yield(State::kAtBarrier);
}

void warp_barrier(unsigned mask) {
  exchange(mask, 0, 0);
  running.syncs = ++current->syncs;
}

void wait_for_grid() { running.waited = current->waited = true; }

uint64_t exchange(unsigned mask, uint64_t value, unsigned from) {
  if (mask != 0xffffffffu) fail("a warp operation of some lanes");
  uint64_t* slots = current->slots[current->operations++ & 1];
  slots[current->position.thread.x % 32] = value;
  yield(State::kAtWarpOperation);
  return slots[from];
}

void run(void (*thunk)(const void*, const void*), const void* kernel, const void* args,
         size_t args_size, dim3 grid, dim3 block, size_t shared, bool overlaps,
         uint32_t* unfinished) {
  const std::lock_guard lock(one_kernel);
  const size_t n = block.x;
  if (block.y != 1 || block.z != 1 || n > 1024 || n == 0 || n % 32 != 0) {
    fail("a block of that shape");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    fail("a grid of that shape");
  }
  if (shared > 48 * 1024) fail("more dynamic shared memory than every device gives");
  const size_t static_bytes = static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared);
  if (fibers.empty()) {
    add_memory(shared_memory, kSharedBytes, Kind::kShared);
    add_memory(__start_cuda_shared, static_bytes, Kind::kShared);
  }
  while (fibers.size() < n) fibers.push_back(std::make_unique<Fiber>());
  warps.resize(n / 32);
  the_thunk = thunk;
  the_kernel = kernel;
  the_args = args;
  running.args = static_cast<const char*>(args);
  running.args_bytes = args_size;
  running.stack_bytes = kStackBytes;
  if (!overlaps) *unfinished = last_block + 1;
  running.unfinished = *unfinished;
  // NaN to whoever reads before writing.
  std::memset(shared_memory, 0xff, shared);
  std::memset(__start_cuda_shared, 0xff, static_bytes);
  order.read();
  order.draw();
  const Order of_blocks = order;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t b = of_blocks(turn, blocks);
    const dim3 at(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y));
    running.block = ++last_block;
    for (size_t i = 0; i < n; ++i) {
      Fiber& f = *fibers[i];
      f.position = {dim3(static_cast<unsigned>(i)), at, block, grid};
      f.operations = f.barriers = f.syncs = 0;
      f.waited = !overlaps;
      f.slots = warps[i / 32].slots;
      f.state = State::kReady;
    }
    run_block(n);
  }
}

}  // namespace cuda_host
