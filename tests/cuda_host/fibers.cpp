// The blocks of a grid on the host: every thread is a fiber; fibers of a warp run one after the
// other until all stand at the same warp operation, warps until all stand at the block's barrier.
// In which order is CUDA_HOST_ORDER's: kernels may not mind.
#include <cuda_runtime.h>

#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "accesses.h"
#include "stacks.h"

// All static __shared__ variables; the linker makes the names.
extern "C" __attribute__((visibility("hidden"))) unsigned char __start_cuda_shared[],
    __stop_cuda_shared[];

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 256 * 1024;

enum class State { kReady, kAtWarpOperation, kAtBarrier, kDone };

struct Fiber {
  Place place;
  State state = State::kDone;
  bool waited = false;
  unsigned operations = 0;  // warp operations so far
  Mark mark;
  uint64_t (*slots)[32] = nullptr;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  uint64_t slots[2][32];
};

uint32_t last_block = 0;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
Place scheduler;
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

// The lanes of a warp in turn.
struct Round {
  Fiber* lanes = nullptr;
  Order order;
  size_t turn = 0;

  // The next that is ready; nullptr: none.
  Fiber* next() {
    while (turn < 32) {
      Fiber& fiber = lanes[order(turn++, 32)];
      if (fiber.state == State::kReady) return &fiber;
    }
    return nullptr;
  }
} round_of_warp;

// From the place of the fiber before, or of the scheduler.
void resume(Fiber& fiber, Place& from) {
  current = &fiber;
  here->thread.x = fiber.mark.thread;
  running.mark = fiber.mark;
  running.waited = fiber.waited;
  running.stack = fiber.stack.get();
  running.in_kernel = true;
  go_on(from, fiber.place);
}

// Goes on with the next lane of the round.
void yield(State state) {
  Fiber& self = *current;
  self.state = state;
  if (Fiber* const next = round_of_warp.next()) return resume(*next, self.place);
  running.in_kernel = false;
  go_on(self.place, scheduler);
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

// Until every lane stands at the block's barrier or is done.
void run_warp(Fiber* lanes) {
  for (;;) {
    order.draw();
    round_of_warp = {lanes, order};
    if (Fiber* const first = round_of_warp.next()) resume(*first, scheduler);
    size_t at_operation = 0;
    for (size_t i = 0; i < 32; ++i) {
      at_operation += lanes[i].state == State::kAtWarpOperation;
      if (lanes[i].operations != lanes[0].operations) fail("divergent warp operation");
    }
    if (at_operation == 0) return;
    if (at_operation != 32) fail("a warp operation that not all lanes reach");
    for (size_t i = 0; i < 32; ++i) lanes[i].state = State::kReady;
  }
}

void run_block(size_t n) {
  for (;;) {
    order.draw();
    const Order of_warps = order;
    for (size_t turn = 0; turn < n / 32; ++turn) {
      run_warp(&fibers[32 * of_warps(turn, n / 32)]);
    }
    size_t done = 0;
    for (size_t i = 0; i < n; ++i) done += fibers[i].state == State::kDone;
    if (done == n) return;
    for (size_t i = 0; i < n; ++i) {
      if (fibers[i].state == State::kAtBarrier) fibers[i].state = State::kReady;
    }
  }
}

}  // namespace

unsigned char* dynamic_shared() { return shared_memory; }

void block_barrier() {
  running.mark.barriers = ++current->mark.barriers;
  yield(State::kAtBarrier);
}

void warp_barrier(unsigned mask) {
  exchange(mask, 0, 0);
  running.mark.syncs = ++current->mark.syncs;
}

void wait_for_grid() { running.waited = current->waited = true; }

uint64_t exchange(unsigned mask, uint64_t value, unsigned from) {
  if (mask != 0xffffffffu) fail("a warp operation of some lanes");
  uint64_t* slots = current->slots[current->operations++ & 1];
  slots[current->mark.thread % 32] = value;
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
  while (fibers.size() < n) {
    Fiber& fiber = fibers.emplace_back();
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    // Begun at different lines of a page: else those of a warp would drive each other out of the
    // same few places of the cache.
    const size_t lane = (fibers.size() - 1) % 32;
    begin(fiber.place, fiber.stack.get(), kStackBytes - 128 * lane, entry);
  }
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
    *here = {dim3(0), at, block, grid};
    ++last_block;
    for (size_t i = 0; i < n; ++i) {
      Fiber& f = fibers[i];
      f.mark = {last_block, static_cast<uint16_t>(i)};
      f.operations = 0;
      f.waited = !overlaps;
      f.slots = warps[i / 32].slots;
      f.state = State::kReady;
    }
    run_block(n);
  }
}

}  // namespace cuda_host
