// The thread pool under load: phases meet at barriers, every chunk is claimed once, an exception
// comes out and leaves the pool usable, callers of one pool wait for each other, and pools come and
// go. Made for a thread sanitizer build, where tests/test_thread_pool.py cannot run. Exits with 1
// and names what is wrong.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/thread_pool.h"

using namespace coreinfer;

namespace {

int failures = 0;

void check(bool good, const char* what, int n_threads) {
  if (good) return;
  ++failures;
  std::printf("%s, %d threads\n", what, n_threads);
}

void run_at_once(int n, const std::function<void()>& call) {
  std::vector<std::thread> callers;
  for (int i = 0; i < n; ++i) callers.emplace_back(call);
  for (std::thread& caller : callers) caller.join();
}

// Squares of [0, kN), shared out, and after a barrier their sum, for which each thread reads what
// the others wrote: plain memory, so that a missing order is a race.
int64_t sum_of_squares(ThreadPool& pool) {
  constexpr int64_t kN = 500, kChunk = 7;
  std::vector<int64_t> squares(kN);
  std::vector<int64_t> sums(static_cast<size_t>(pool.n_threads()));
  pool.run([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(kN, kChunk, &begin, &end)) {
      for (int64_t i = begin; i < end; ++i) squares[static_cast<size_t>(i)] += i * i;
    }
    context.barrier();
    int64_t& sum = sums[static_cast<size_t>(context.thread())];
    while (context.next_share(kN, kChunk, &begin, &end)) {
      for (int64_t i = begin; i < end; ++i) sum += squares[static_cast<size_t>(kN - 1 - i)];
    }
  });
  int64_t sum = 0;
  for (const int64_t part : sums) sum += part;
  return sum;
}

// The same sum by a job that not every thread has to come to.
int64_t shared_sum_of_squares(ThreadPool& pool) {
  constexpr int64_t kN = 500, kChunk = 7;
  std::vector<int64_t> squares(kN);
  pool.share([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(kN, kChunk, &begin, &end)) {
      for (int64_t i = begin; i < end; ++i) squares[static_cast<size_t>(i)] += i * i;
    }
  });
  int64_t sum = 0;
  for (const int64_t square : squares) sum += square;
  return sum;
}

constexpr int64_t kSum = 499 * 500 * 999 / 6;

void check_pool(int n_threads) {
  ThreadPool pool(n_threads);
  for (int i = 0; i < 300; ++i) {
    check(sum_of_squares(pool) == kSum, "a wrong sum", n_threads);
    check(shared_sum_of_squares(pool) == kSum, "a wrong sum of shared work", n_threads);
    // Long enough for the workers to fall asleep, now and then.
    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (int thrower = 0; thrower < n_threads; ++thrower) {
    bool thrown = false;
    try {
      pool.run([&](ThreadPool::Context& context) {
        if (context.thread() == thrower) throw std::runtime_error("on purpose");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    check(thrown, "an exception was lost", n_threads);
    check(sum_of_squares(pool) == kSum, "a wrong sum after an exception", n_threads);
  }
  std::atomic<int> wrong{0};
  run_at_once(3, [&] {
    for (int i = 0; i < 50; ++i) {
      wrong += sum_of_squares(pool) != kSum || shared_sum_of_squares(pool) != kSum;
    }
  });
  check(wrong == 0, "a wrong sum with three callers", n_threads);
}

}  // namespace

int main() {
  // 3: more than the cores of a small machine, so that waiting threads give way.
  for (const int n_threads : {1, 2, 3}) check_pool(n_threads);
  std::atomic<int> wrong{0};
  run_at_once(3, [&] {
    for (int i = 0; i < 20; ++i) {
      ThreadPool pool(2);
      wrong += sum_of_squares(pool) != kSum;
    }
  });
  check(wrong == 0, "a wrong sum in pools side by side", 2);
  // Whoever comes late to the last job of a pool comes to no job.
  for (int i = 0; i < 300; ++i) {
    ThreadPool pool(16);
    check(shared_sum_of_squares(pool) == kSum, "a wrong sum of a pool that goes at once", 16);
  }
  if (failures == 0) std::printf("the thread pool is right\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
