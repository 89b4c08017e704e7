// Context: one device as the backend uses it: its stream, its memory against a limit, and a queue
// of kernel launches. Flows in: launches with plain arguments. Flows out: work on the stream.
//
// Deferred launches wait in a list until flush(). A list that comes a second time, byte for byte,
// is captured as a CUDA graph and from then on costs one launch; a decode step is such a list. What
// differs from step to step (positions) is read by kernels from device memory, see position().
// Weights come onto the device on a second stream, beside the work: begin_load to end_load, and who
// uses them waits for the event that came out. Callers hold a Lock; what only gives memory back
// need not.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "base/thread_pool.h"
#include "device_api.h"

namespace coreinfer::cuda {

// A point of a stream that others can wait for.
class Event {
 public:
  Event() { COREINFER_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};
using EventPtr = std::unique_ptr<Event>;

class Context {
 public:
  // limit: bytes that may be allocated at one time; 0: what is free on the device, less a reserve.
  Context(int device, size_t limit);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const cudaDeviceProp& properties() const { return properties_; }
  // Held by who uses the context. A thread may hold several: memory is given back by who uses the
  // context, too.
  class Lock {
   public:
    explicit Lock(Context& context) : lock_(context.mutex_) {}

   private:
    std::lock_guard<std::recursive_mutex> lock_;
  };

  // Throws kMemory saying what was wanted for `what`, what is in use and what the limit is. What
  // is released is kept for the next allocation of its size: there is one stream, so that work
  // which still uses it comes before any that will.
  void* allocate(size_t bytes, const char* what);
  // What an allocation takes of the device: the driver has pages of 2 MiB, which small ones share.
  static size_t taken_by(size_t bytes);
  void release(void* p, size_t bytes) noexcept;
  size_t peak() const { return peak_; }  // of all that was taken from the device, graphs included
  size_t limit() const { return limit_; }

  // Makes the context's device that of the thread, as all below do that ask the runtime for
  // something; what only adds to the list does not.
  void use_device() const { cudaSetDevice(device_); }

  // Whether the launches that follow wait in the list; changing to false flushes.
  void defer(bool deferred);
  template <typename Args>
  void launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared,
              const std::type_identity_t<Args>& args) {
    add(describe(kernel, grid, block, shared), &args);
  }
  // Issues what waits.
  void flush();
  // flush, then waits; an error of any earlier launch is thrown here.
  void synchronize();

  // Where kernels of the list find this number. It may differ between otherwise equal lists.
  const int32_t* position(int64_t value);

  // Flushes, then copies on the stream. Host memory that is not ours is read or written before the
  // call returns.
  void copy_in(void* device, const void* host, size_t n);
  void copy_out(void* host, const void* device, size_t n);  // synchronizes

  // Loading: between begin and end, copies and kernels on the second stream. They come after all
  // work that was issued when memory was last given back, so they may write into any that is free.
  cudaStream_t begin_load();
  void load_copy(void* device, const void* host, size_t n);  // host memory as for copy_in
  template <typename Args>
  void load_launch(void (*kernel)(Args), dim3 grid, dim3 block,
                   const std::type_identity_t<Args>& args) {
    issue(describe(kernel, grid, block, 0), &args, load_stream_, false);
  }
  EventPtr end_load();
  // Work issued from now on comes after the event.
  void await(const Event& event);
  void finish_loads();  // waits until the second stream is empty

  // What is launched from now on starts after all that was launched before: for weights, which
  // kernels read before they wait (device_api.h).
  void full_stop() {
    flush();
    after_kernel_ = false;
  }

  // Zeros, before what waits in the list.
  void clear(void* device, size_t n);

  // For work put on the stream by others: flush first, and tell that the last work is no kernel.
  cudaStream_t stream_for_copy() {
    flush();
    after_kernel_ = false;
    return stream_;
  }

 private:
  explicit Context(int device);

  struct Launch {
    const void* kernel;
    void (*thunk)(const void*, const void*);
    dim3 grid, block;
    uint32_t shared, args_size;
  };
  struct Graph {
    std::vector<unsigned char> list;
    cudaGraphExec_t exec = nullptr;  // null: seen once
    uint64_t used = 0;
    size_t bytes = 0;  // that the driver took for it
  };
  static constexpr int kPositions = 64;

  template <typename Args>
  static Launch describe(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared) {
    return {reinterpret_cast<const void*>(kernel),
            [](const void* k, const void* a) {
              reinterpret_cast<void (*)(Args)>(const_cast<void*>(k))(*static_cast<const Args*>(a));
            },
            grid,
            block,
            static_cast<uint32_t>(shared),
            static_cast<uint32_t>(sizeof(Args))};
  }
  void add(const Launch& launch, const void* args);
  // after_kernel: the stream's last work is a kernel, which this one may overlap with.
  void issue(const Launch& launch, const void* args, cudaStream_t stream, bool after_kernel);
  void issue(const Launch& launch, const void* args) {
    issue(launch, args, stream_, after_kernel_);
    after_kernel_ = true;
  }
  void stage(void* device, const void* host, size_t n, cudaStream_t stream);
  void issue_list();
  void run_list();
  void remember_list();
  cudaGraphExec_t capture_list();
  void make(Graph& graph);
  void drop(Graph& graph);
  void drop_graphs(const Graph* but);

  cudaDeviceProp properties_{};
  int device_;
  std::recursive_mutex mutex_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t load_stream_ = nullptr;
  cudaEvent_t released_ = nullptr;  // on stream_, when memory was last given back
  cudaEvent_t positions_sent_ = nullptr;
  struct Block {
    void* p;
    size_t bytes;
  };
  void* take(size_t bytes, const char* what);  // from the device
  void free_spare();
  size_t limit_ = 0, used_ = 0, taken_ = 0, peak_ = 0;
  size_t graph_bytes_ = 0;  // beside taken_
  std::vector<Block> spare_;
  bool deferred_ = false;
  bool graphs_ = true;         // COREINFER_CUDA_GRAPHS=0 turns them off
  bool overlap_ = true;        // COREINFER_CUDA_OVERLAP=0: each kernel starts after the one before
  bool after_kernel_ = false;  // the stream's last work is a kernel
  std::vector<unsigned char> list_;
  int listed_ = 0;           // launches in it
  std::vector<Graph> kept_;  // a few, the least recently used makes room
  uint64_t clock_ = 0;
  std::vector<int32_t> positions_;
  int32_t* host_positions_ = nullptr;    // pinned
  int32_t* device_positions_ = nullptr;  // (kPositions)
  unsigned char* staging_[2] = {};       // pinned
  cudaEvent_t staged_[2] = {};
  int next_staging_ = 0;
  ThreadPool copiers_;  // one thread reads a mapped file slower than the device takes it
};
using ContextPtr = std::shared_ptr<Context>;

// Device memory with an owner.
class Memory {
 public:
  Memory() = default;
  Memory(ContextPtr context, size_t bytes, const char* what);
  ~Memory() { reset(); }
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return bytes_; }
  void reset();
  // At least `bytes`; contents are lost when it grows.
  void ensure(const ContextPtr& context, size_t bytes, const char* what);

 private:
  ContextPtr context_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace coreinfer::cuda
