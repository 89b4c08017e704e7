// The one owner of threads. run() executes a function on every thread of the pool (the caller is
// thread 0) and returns when all are done; inside, barrier() separates phases and next() hands out
// chunks of work. share() does not wait for threads that are not there. Kernels know nothing of it.
// Between jobs workers spin briefly, then look while they give way, then sleep.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace coreinfer {

class ThreadPool {
 public:
  // One thread's view of the running job.
  class Context {
   public:
    int thread() const { return thread_; }
    int n_threads() const { return n_threads_; }
    // All threads of the job meet here. Resets the counter of next().
    void barrier();
    // Claims the next chunk of [0, n): false when none is left. Chunks go to whoever asks first, so
    // results must not depend on which thread computed them.
    bool next(int64_t n, int64_t chunk, int64_t* begin, int64_t* end);
    // The same, a chunk being half of an even share of what is left, `least` where that is less:
    // long runs at first, short ones for all to finish together.
    bool next_share(int64_t n, int64_t least, int64_t* begin, int64_t* end);

   private:
    friend class ThreadPool;
    Context(ThreadPool* pool, int thread, int n_threads)
        : pool_(pool), thread_(thread), n_threads_(n_threads) {}
    ThreadPool* pool_;
    int thread_;
    int n_threads_;
  };

  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }

  // Runs job on every thread. One job at a time: concurrent callers wait for their turn. The first
  // exception of a job is rethrown here after all threads have finished; a job that calls
  // barrier() must not throw between barriers.
  void run(const std::function<void(Context&)>& job);

  // The same on the threads that come while there is work: one that cannot, since another program
  // has taken its core, is not waited for. For jobs whose work is claimed with next() alone,
  // without barrier().
  void share(const std::function<void(Context&)>& job);

  // Threads that make sense on this machine: the cores that this process may use.
  static int default_threads();

 private:
  struct State;
  void run(const std::function<void(Context&)>& job, bool wait_for_all);
  std::unique_ptr<State> state_;
  int n_threads_;
};

}  // namespace coreinfer
