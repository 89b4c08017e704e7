// The blocks of a grid on the host: every thread is a fiber; fibers of a warp run in lane order
// until all stand at the same warp operation, warps until all stand at the block's barrier.
#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an error
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

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
  uint64_t (*slots)[32] = nullptr;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
};

struct Warp {
  uint64_t slots[2][32];
};

std::mutex running;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
jmp_buf scheduler;
void (*the_thunk)(const void*, const void*) = nullptr;
const void* the_kernel = nullptr;
const void* the_args = nullptr;
alignas(128) unsigned char shared_memory[kSharedBytes];

[[noreturn]] void fail(const char* what) {
  const Position& p = *here;
  std::fprintf(stderr, "cuda_host: %s (block %u,%u,%u, thread %u)\n", what, p.block.x, p.block.y,
               p.block.z, p.thread.x);
  std::abort();
}

void yield(State state) {
  current->state = state;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void entry() {
  for (;;) {
    the_thunk(the_kernel, the_args);
    yield(State::kDone);
  }
}

}  // namespace

Position* const here = new Position;

namespace {

void resume(Fiber& fiber) {
  current = &fiber;
  *here = fiber.position;
  if (_setjmp(scheduler) != 0) return;
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
    for (size_t i = begin; i < end; ++i) {
      if (fibers[i]->state == State::kReady) resume(*fibers[i]);
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
    for (size_t w = 0; w < n; w += 32) run_warp(w, w + 32 < n ? w + 32 : n);
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
  yield(State::kAtBarrier);
  *here = current->position;
}

const uint64_t* exchange(uint64_t value) {
  uint64_t* slots = current->slots[current->operations++ & 1];
  slots[current->position.thread.x % 32] = value;
  yield(State::kAtWarpOperation);
  return slots;
}

void run(void (*thunk)(const void*, const void*), const void* kernel, const void* args, dim3 grid,
         dim3 block, size_t shared) {
  const std::lock_guard lock(running);
  const size_t n = block.x;
  if (block.y != 1 || block.z != 1 || n > 1024 || n == 0) fail("a block of that shape");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of that shape");
  }
  if (shared > 48 * 1024) fail("more dynamic shared memory than every device gives");
  while (fibers.size() < n) fibers.push_back(std::make_unique<Fiber>());
  warps.resize((n + 31) / 32);
  the_thunk = thunk;
  the_kernel = kernel;
  the_args = args;
  std::memset(shared_memory, 0xff, shared);  // NaN to whoever reads before writing
  // CUDA_HOST_BACKWARDS: the last block first; kernels may not mind.
  const bool backwards = std::getenv("CUDA_HOST_BACKWARDS") != nullptr;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t b = backwards ? blocks - 1 - turn : turn;
    const dim3 at(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y));
    for (size_t i = 0; i < n; ++i) {
      Fiber& f = *fibers[i];
      f.position = {dim3(static_cast<unsigned>(i)), at, block, grid};
      f.operations = 0;
      f.slots = warps[i / 32].slots;
      f.state = State::kReady;
    }
    run_block(n);
  }
}

}  // namespace cuda_host
