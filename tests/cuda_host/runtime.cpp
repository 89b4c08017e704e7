// The runtime calls of cuda_runtime.h on the host: memory is poisoned; what is put on a stream
// waits there until somebody waits for it, so that a wait that is missing shows; a captured graph
// keeps what was called and does it again when launched. Calls that would end a capture fail.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "accesses.h"

using Step = std::function<void()>;

struct CudaHostGraph {
  std::vector<Step> steps;
  size_t bytes = 0;  // that it takes of the device
};
struct QueuedStream : CudaHostStream {
  CudaHostGraph* capturing = nullptr;
  std::deque<Step> waiting;
  uint64_t issued = 0, done = 0;
  uint32_t unfinished = 0;  // see cuda_host::run
};
// The stream's first `issued` steps; no stream: never recorded, nothing to wait for.
struct CudaHostEvent {
  QueuedStream* stream = nullptr;
  uint64_t issued = 0;
};

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMostArguments = 4096;  // that every device takes
std::recursive_mutex queues_mutex;       // guards the streams
std::set<QueuedStream*> streams;
std::mutex sizes_mutex;
std::map<void*, size_t> sizes;
std::atomic<long> copies{0};
std::atomic<size_t> graph_bytes{0};
std::atomic<long> alive{0};  // streams, events, graphs and memory
thread_local int current_device = 0;
thread_local bool capturing = false;  // this thread, on some stream
std::atomic<long> calls_on[2];
std::atomic<long> graph_launches{0}, kernel_launches{0}, overlapping_launches{0}, allocations{0};

void carry_out(QueuedStream& stream, uint64_t until) {
  const std::lock_guard lock(queues_mutex);
  while (stream.done < until && !stream.waiting.empty()) {
    const Step step = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    ++stream.done;
    step();
  }
}
void carry_out(const CudaHostEvent& event) {
  const std::lock_guard lock(queues_mutex);
  if (event.stream != nullptr && streams.count(event.stream) != 0) {
    carry_out(*event.stream, event.issued);
  }
}
void carry_out_all(CudaHostStream* stream) {
  carry_out(*static_cast<QueuedStream*>(stream), ~0ull);
}

cudaError_t issue(cudaStream_t to, Step step) {
  ++calls_on[current_device];
  const std::lock_guard lock(queues_mutex);
  auto* stream = static_cast<QueuedStream*>(to);
  if (stream->capturing != nullptr) {
    stream->capturing->steps.push_back(std::move(step));
  } else {
    stream->waiting.push_back(std::move(step));
    ++stream->issued;
  }
  return cudaSuccess;
}

}  // namespace

// What tests set: CUDA_HOST_DEVICES, CUDA_HOST_MEMORY (bytes of the device), CUDA_HOST_LARGEST (of
// the largest block of it, as where others have taken the rest), CUDA_HOST_PINNED (of the host's
// memory that can be pinned at once), CUDA_HOST_GRAPH (of a graph), CUDA_HOST_DRIVER and
// CUDA_HOST_PTX (the architecture that the kernels were compiled for; 0: one that this device
// cannot run).
namespace {
long long given(const char* variable, long long otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr ? std::atoll(value) : otherwise;
}
constexpr int kRuntime = 13000;
size_t device_memory() { return static_cast<size_t>(given("CUDA_HOST_MEMORY", 8ll << 30)); }
}  // namespace

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "invalid argument";
  }
}
const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
                                             : "cudaErrorInvalidValue";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
  *n = static_cast<int>(given("CUDA_HOST_DEVICES", 1));
  // Within a major version an older driver does.
  const bool too_old = given("CUDA_HOST_DRIVER", kRuntime) / 1000 < kRuntime / 1000;
  return too_old ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
// For tests: how many calls were made while the thread's device was that one; they would make a
// context on it.
extern "C" __attribute__((visibility("default"))) long cuda_host_calls_on(int device) {
  return calls_on[device];
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {"host threads in turn", 9, 0, 2, device_memory()};
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = device_memory();
  return *free = *total - graph_bytes, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = static_cast<int>(given("CUDA_HOST_DRIVER", kRuntime)), cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kRuntime, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const int ptx = static_cast<int>(given("CUDA_HOST_PTX", 90));
  if (ptx == 0) return cudaErrorNoKernelImageForDevice;
  return *attributes = {90, ptx}, cudaSuccess;  // compiled for this device by the driver, if older
}

// Ends where a page that nobody may touch begins, so that a kernel that runs over is caught.
namespace {
cudaError_t take(void** p, size_t bytes, cuda_host::Kind kind) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  ++calls_on[current_device];
  const size_t size = (bytes + 15) / 16 * 16;
  const size_t pages = (size + kPage - 1) / kPage * kPage;
  void* const memory =
      mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  mprotect(static_cast<char*>(memory) + pages, kPage, PROT_NONE);
  *p = static_cast<char*>(memory) + (pages - size);
  std::memset(*p, 0xff, bytes);
  cuda_host::add_memory(*p, bytes, kind);
  const std::lock_guard lock(sizes_mutex);
  sizes[*p] = pages + kPage;
  ++allocations;
  ++alive;
  return cudaSuccess;
}
}  // namespace
cudaError_t cudaMalloc(void** p, size_t bytes) {
  const bool fits = bytes <= static_cast<size_t>(given("CUDA_HOST_LARGEST", 8ll << 30));
  return fits ? take(p, bytes, cuda_host::Kind::kDevice) : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  ++calls_on[current_device];
  if (p == nullptr) return cudaSuccess;
  {
    const std::lock_guard lock(queues_mutex);
    for (QueuedStream* stream : streams) carry_out_all(stream);
  }
  const std::lock_guard lock(sizes_mutex);
  const auto found = sizes.find(p);
  if (found == sizes.end()) return cudaErrorInvalidValue;
  cuda_host::drop_memory(p);
  const auto start = reinterpret_cast<uintptr_t>(p) / kPage * kPage;
  munmap(reinterpret_cast<void*>(start), found->second);
  sizes.erase(found);
  --alive;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  if (bytes > static_cast<size_t>(given("CUDA_HOST_PINNED", 8ll << 30))) {
    return cudaErrorMemoryAllocation;
  }
  return take(p, bytes, cuda_host::Kind::kPinned);
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

namespace {
// From memory of the one kind to memory of the other; what is pageable would make the host wait.
void check_copy(const void* to, const void* from, size_t to_bytes, size_t from_bytes,
                cudaMemcpyKind kind) {
  using cuda_host::Kind;
  const Kind target = kind == cudaMemcpyDeviceToHost ? Kind::kPinned : Kind::kDevice;
  const Kind source = kind == cudaMemcpyHostToDevice ? Kind::kPinned : Kind::kDevice;
  if (!cuda_host::is_memory(to, to_bytes, target)) cuda_host::fail("a copy to other memory");
  if (!cuda_host::is_memory(from, from_bytes, source)) cuda_host::fail("a copy of other memory");
}
}  // namespace
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                            cudaStream_t s) {
  check_copy(to, from, n, n, kind);
  ++copies;
  return issue(s, [=] { std::memmove(to, from, n); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t s) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  check_copy(to, from, (height - 1) * to_pitch + width, (height - 1) * from_pitch + width, kind);
  ++copies;
  return issue(s, [=] {
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch,
                  static_cast<const char*>(from) + i * from_pitch, width);
    }
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t s) {
  if (!cuda_host::is_memory(to, n, cuda_host::Kind::kDevice)) cuda_host::fail("other memory set");
  return issue(s, [=] { std::memset(to, value, n); });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned) {
  ++calls_on[current_device];
  const std::lock_guard lock(queues_mutex);
  auto* stream = new QueuedStream;
  stream->finish = carry_out_all;
  streams.insert(stream);
  ++alive;
  return *to = stream, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(queues_mutex);
  carry_out_all(stream);
  streams.erase(static_cast<QueuedStream*>(stream));
  --alive;
  return delete static_cast<QueuedStream*>(stream), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  ++calls_on[current_device];
  return carry_out_all(stream), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  return issue(stream, [point = *event] { carry_out(point); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ++calls_on[current_device];
  ++alive;
  return *event = new CudaHostEvent, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  ++calls_on[current_device];
  --alive;
  return delete event, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  ++calls_on[current_device];
  const std::lock_guard lock(queues_mutex);
  auto* stream = static_cast<QueuedStream*>(on);
  return *event = {stream, stream->issued}, cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  ++calls_on[current_device];
  return carry_out(*event), cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static_cast<QueuedStream*>(stream)->capturing = new CudaHostGraph;
  return capturing = true, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t on, cudaGraph_t* graph) {
  auto* stream = static_cast<QueuedStream*>(on);
  *graph = stream->capturing;
  capturing = false;
  return stream->capturing = nullptr, cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  ++alive;
  *exec = new CudaHostGraph(*graph);
  graph_bytes += (*exec)->bytes = static_cast<size_t>(given("CUDA_HOST_GRAPH", 0));
  return cudaSuccess;
}
// For tests: how many graphs were launched.
extern "C" __attribute__((visibility("default"))) long cuda_host_graph_launches() {
  return graph_launches;
}
// How many kernels were launched, those of graphs left aside.
extern "C" __attribute__((visibility("default"))) long cuda_host_kernel_launches() {
  return kernel_launches;
}
// How many of those may start before the kernel before them is done.
extern "C" __attribute__((visibility("default"))) long cuda_host_overlapping_launches() {
  return overlapping_launches;
}
// How many copies of memory were asked for.
extern "C" __attribute__((visibility("default"))) long cuda_host_copies() { return copies; }
// How much there is that was made and not given back.
extern "C" __attribute__((visibility("default"))) long cuda_host_alive() { return alive; }
// How often device memory was asked for.
extern "C" __attribute__((visibility("default"))) long cuda_host_allocations() {
  return allocations;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  ++calls_on[current_device];
  ++graph_launches;
  for (const Step& step : exec->steps) issue(stream, step);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  --alive;
  graph_bytes -= exec->bytes;
  return delete exec, cudaSuccess;
}

cudaError_t cuda_host_launch(void (*thunk)(const void*, const void*), const void* kernel,
                             const void* args, size_t args_size, dim3 grid, dim3 block,
                             size_t shared, cudaStream_t stream, bool overlaps) {
  if (args_size > kMostArguments) return cudaErrorInvalidValue;
  const auto* bytes = static_cast<const char*>(args);
  std::vector<char> copy(bytes, bytes + args_size);
  ++kernel_launches;
  if (overlaps) ++overlapping_launches;
  auto* unfinished = &static_cast<QueuedStream*>(stream)->unfinished;
  return issue(stream, [=, copy = std::move(copy)] {
    // Arguments are copied to aligned memory of their own, as a device would.
    alignas(16) char args[kMostArguments];
    std::memcpy(args, copy.data(), copy.size());
    cuda_host::run(thunk, kernel, args, copy.size(), grid, block, shared, overlaps, unfinished);
  });
}
