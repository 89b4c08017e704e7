#include "base/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "base/clock.h"
#include "base/error.h"

namespace coreinfer {
namespace {

constexpr int kMaxThreads = 1024;
// How long a thread that has nothing to do burns its core before it gives way or sleeps: longer
// than the gaps between the jobs of one decode step, short against a token.
constexpr int64_t kSpinNs = 50'000;
// How long a worker then goes on looking for a job, giving way to others between two looks: longer
// than sampling a token takes. To be woken takes a worker tens of microseconds, a small model's
// token two thousand.
constexpr int64_t kLookNs = 1'000'000;
// Two cache lines: neighbouring lines are fetched in pairs.
constexpr size_t kApart = 128;

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Looks until done() or until the time is over, pausing between two looks; true when done.
template <typename Pause, typename Done>
bool poll(int64_t budget_ns, const Pause& pause, const Done& done) {
  if (done()) return true;
  if (budget_ns <= 0) return false;
  const int64_t end = now_ns() + budget_ns;
  do {
    for (int i = 0; i < 8; ++i) {
      pause();
      if (done()) return true;
    }
  } while (now_ns() < end);
  return false;
}

template <typename Done>
bool spin(int64_t budget_ns, const Done& done) {
  return poll(budget_ns, cpu_pause, done);
}

}  // namespace

struct ThreadPool::State {
  // What `door` holds: the number of the job, times kJob; kClosed when no more workers may come to
  // it; how many came.
  static constexpr uint64_t kJob = 1 << 16, kClosed = 1 << 15, kCame = kClosed - 1;
  static_assert(kMaxThreads <= static_cast<int>(kCame));

  std::mutex run_mutex;  // one job at a time
  const std::function<void(Context&)>* job = nullptr;
  std::atomic<bool> stop{false};
  int64_t spin_ns = kSpinNs;
  int64_t look_ns = kLookNs;
  std::vector<std::thread> workers;
  const pid_t process = getpid();  // threads do not survive fork()

  std::mutex error_mutex;
  std::exception_ptr error;  // the first of the running job

  alignas(kApart) std::atomic<uint64_t> door{kClosed};
  alignas(kApart) std::atomic<int32_t> finished{0};  // workers that came and are done
  alignas(kApart) std::atomic<int32_t> arrived{0};   // threads that wait at the barrier
  alignas(kApart) std::atomic<uint32_t> phase{0};    // one more for each barrier passed
  alignas(kApart) std::atomic<int64_t> counter{0};   // of next()

  void execute(Context& context) {
    try {
      (*job)(context);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  void work(ThreadPool* pool, int thread, int n_threads) {
    uint64_t seen = 0;  // number of the last job
    for (;;) {
      uint64_t now = door.load(std::memory_order_acquire);
      const auto new_job = [&] {
        now = door.load(std::memory_order_acquire);
        return now / kJob != seen;
      };
      if (!spin(spin_ns, new_job) && !poll(look_ns, std::this_thread::yield, new_job)) {
        while (!new_job()) door.wait(now, std::memory_order_acquire);
      }
      while (!(now & kClosed) && !door.compare_exchange_weak(now, now + 1)) {
      }
      // Behind the door, not before it: join() opens it once more, when there is no job.
      if (stop.load(std::memory_order_acquire)) return;
      seen = now / kJob;
      if (now & kClosed) continue;
      Context context(pool, thread, n_threads);
      execute(context);
      finished.fetch_add(1, std::memory_order_acq_rel);
      finished.notify_one();
    }
  }

  void open() {
    const uint64_t last = door.load(std::memory_order_relaxed) / kJob;
    door.store((last + 1) * kJob, std::memory_order_release);
    door.notify_all();
  }

  // Returns how many workers came.
  int32_t close() { return static_cast<int32_t>(door.fetch_or(kClosed) & kCame); }

  void join() {
    stop.store(true, std::memory_order_release);
    open();
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
  if (n_threads < 1 || n_threads > kMaxThreads) {
    throw_error(ErrorKind::kValue, "n_threads is %d, expected 1 to %d", n_threads, kMaxThreads);
  }
  state_ = std::make_unique<State>();
  // With fewer cores than threads a spinning thread keeps the one it waits for from running.
  if (n_threads > default_threads()) state_->spin_ns = state_->look_ns = 0;
  try {
    for (int t = 1; t < n_threads; ++t) {
      state_->workers.emplace_back([this, t] { state_->work(this, t, n_threads_); });
    }
  } catch (const std::system_error& e) {
    const size_t started = state_->workers.size() + 1;
    state_->join();
    throw_error(ErrorKind::kState, "the system refused thread %zu of %d (%s); use fewer threads",
                started + 1, n_threads, e.what());
  }
}

ThreadPool::~ThreadPool() {
  if (state_->process == getpid()) {
    state_->join();
  } else {
    state_.release();  // after fork(): the threads are the parent's, there is nothing to join
  }
}

void ThreadPool::run(const std::function<void(Context&)>& job) { run(job, true); }

void ThreadPool::share(const std::function<void(Context&)>& job) { run(job, false); }

void ThreadPool::run(const std::function<void(Context&)>& job, bool wait_for_all) {
  State& s = *state_;
  if (s.process != getpid()) {
    throw_error(
        ErrorKind::kState,
        "this model was loaded before fork(), and its threads stayed behind: load it in the "
        "child process, or start children with multiprocessing's \"spawn\"");
  }
  std::lock_guard<std::mutex> lock(s.run_mutex);
  s.job = &job;
  s.counter.store(0, std::memory_order_relaxed);
  s.finished.store(0, std::memory_order_relaxed);
  if (n_threads_ > 1) s.open();
  Context context(this, 0, n_threads_);
  s.execute(context);
  const int32_t awaited = n_threads_ == 1 ? 0 : wait_for_all ? n_threads_ - 1 : s.close();
  const auto all_done = [&] { return s.finished.load(std::memory_order_acquire) == awaited; };
  if (!spin(s.spin_ns, all_done)) {
    for (int32_t n; (n = s.finished.load(std::memory_order_acquire)) != awaited;) {
      s.finished.wait(n, std::memory_order_acquire);
    }
  }
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

void ThreadPool::Context::barrier() {
  State& s = *pool_->state_;
  if (n_threads_ == 1) {
    s.counter.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = s.phase.load(std::memory_order_relaxed);
  if (s.arrived.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
    s.arrived.store(0, std::memory_order_relaxed);
    s.counter.store(0, std::memory_order_relaxed);
    s.phase.store(phase + 1, std::memory_order_release);
    return;
  }
  const auto passed = [&] { return s.phase.load(std::memory_order_acquire) != phase; };
  if (spin(s.spin_ns, passed)) return;
  while (!passed()) std::this_thread::yield();
}

bool ThreadPool::Context::next(int64_t n, int64_t chunk, int64_t* begin, int64_t* end) {
  const int64_t claimed = pool_->state_->counter.fetch_add(chunk, std::memory_order_relaxed);
  if (claimed >= n) return false;
  *begin = claimed;
  *end = claimed + chunk < n ? claimed + chunk : n;
  return true;
}

bool ThreadPool::Context::next_share(int64_t n, int64_t least, int64_t* begin, int64_t* end) {
  std::atomic<int64_t>& counter = pool_->state_->counter;
  int64_t claimed = counter.load(std::memory_order_relaxed), chunk;
  do {
    const int64_t left = n - claimed;
    if (left <= 0) return false;
    chunk = std::min(left, std::max(least, left / (2 * n_threads_)));
  } while (!counter.compare_exchange_weak(claimed, claimed + chunk, std::memory_order_relaxed));
  *begin = claimed;
  *end = claimed + chunk;
  return true;
}

namespace {

#if defined(__linux__)
// The first integer of a small text file, or `missing`.
long read_number(const char* path, long missing) {
  std::FILE* file = std::fopen(path, "r");
  if (!file) return missing;
  long value = missing;
  if (std::fscanf(file, "%ld", &value) != 1) value = missing;
  std::fclose(file);
  return value;
}

// Processors that a container's quota amounts to, rounded down; `missing` when there is no quota.
int quota_cpus(int missing) {
  long quota = -1;
  long period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {  // cgroup 2: "max 100000"
    if (std::fscanf(file, "%ld %ld", &quota, &period) != 2) quota = -1;
    std::fclose(file);
  } else {
    quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1);
    period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
  }
  if (quota <= 0 || period <= 0) return missing;
  return quota < period ? 1 : static_cast<int>(quota / period);
}

// Cores among the processors of the affinity mask: two hyper-threads of a core count once, since
// they share the units that the kernels keep busy. 0 when it cannot be told.
int affinity_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return 0;
  std::set<std::pair<long, long>> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    char path[96];
    const char* const folder = "/sys/devices/system/cpu/cpu";
    std::snprintf(path, sizeof(path), "%s%d/topology/core_id", folder, cpu);
    const long core = read_number(path, -1);
    std::snprintf(path, sizeof(path), "%s%d/topology/physical_package_id", folder, cpu);
    const long package = read_number(path, -1);
    // A processor without a known core counts by itself.
    cores.insert(core < 0 ? std::pair<long, long>(-2, cpu) : std::pair<long, long>(package, core));
  }
  return static_cast<int>(cores.size());
}
#endif

}  // namespace

int ThreadPool::default_threads() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  if (const int allowed = affinity_cores(); allowed > 0) cores = allowed;
  if (const int quota = quota_cpus(cores); quota < cores) cores = quota;
#endif
  return cores < 1 ? 1 : cores > kMaxThreads ? kMaxThreads : cores;
}

}  // namespace coreinfer
