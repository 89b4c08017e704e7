// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>

#include "context.h"

namespace coreinfer::cuda {
namespace {

constexpr size_t kStaging = size_t{16} << 20;
// Verifications of every length, a draft, and some of them twice while attention takes more spans.
constexpr size_t kKeptGraphs = 24;
// Shorter lists are no decode steps, and would push those out of what is kept.
constexpr int kWorthAGraph = 8;

// Kept back of the memory that is free: other programs want some, and the driver puts the code of
// kernels there when they are first launched.
constexpr size_t kLeastReserve = size_t{256} << 20;
size_t without_reserve(size_t free) {
  return free - std::min(free, std::max(kLeastReserve, free / 100 * 3));
}

// Memory that was given back and is kept for the next of its size.
constexpr size_t kMostSpare = size_t{1} << 30;

constexpr int kMaxCopiers = 8;
constexpr int64_t kCopyPart = int64_t{1} << 18;

void copy_shared(ThreadPool& pool, unsigned char* to, const unsigned char* from, size_t n) {
  const auto size = static_cast<int64_t>(n);
  if (size <= 2 * kCopyPart || pool.n_threads() == 1) {
    std::memcpy(to, from, n);
    return;
  }
  pool.run([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(divide_up(size, kCopyPart), 1, &begin, &end)) {
      const int64_t start = begin * kCopyPart;
      const int64_t stop = std::min(end * kCopyPart, size);
      std::memcpy(to + start, from + start, static_cast<size_t>(stop - start));
    }
  });
}

struct NoArgs {
  int32_t none;
};
// What it was compiled to says what all kernels were.
__global__ void probe_kernel(COREINFER_PARAMETER NoArgs) { begin_kernel(); }

// Programmatic edges came to graphs with CUDA 12.3.
constexpr int kOverlapDriver = 12030;

// Whether kernels wait for the one before them, so that they may be started early: that is in code
// compiled for sm_90, not in older PTX that a newer device's driver compiles. Throws where the
// device can run neither.
bool kernels_wait(const cudaDeviceProp& device) {
  cudaFuncAttributes made{};
  const cudaError_t status =
      cudaFuncGetAttributes(&made, reinterpret_cast<const void*>(&probe_kernel));
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    throw_error(ErrorKind::kState,
                "this build has no kernels that run on %s (compute capability %d.%d): %s; build "
                "with COREINFER_CUDA_ARCHITECTURES=%d%d, or load with n_gpu_layers=0",
                device.name, device.major, device.minor, cudaGetErrorString(status), device.major,
                device.minor);
  }
  check(status, "cudaFuncGetAttributes(");
  int driver = 0;
  COREINFER_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return made.ptxVersion >= 90 && made.binaryVersion >= 90 && driver >= kOverlapDriver;
}

bool switched_off(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::string_view(value) == "0";
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this one again
  const ErrorKind kind =
      status == cudaErrorMemoryAllocation ? ErrorKind::kMemory : ErrorKind::kState;
  throw_error(kind, "%.*s failed: %s (%s)", static_cast<int>(std::string_view(call).find('(')),
              call, cudaGetErrorString(status), cudaGetErrorName(status));
}

Context::Context(int device)
    : device_(device), copiers_(std::min(kMaxCopiers, ThreadPool::default_threads())) {}

// From here on the destructor gives back what there is, also where this throws.
Context::Context(int device, size_t limit) : Context(device) {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status != cudaSuccess || n == 0) {
    cudaGetLastError();
    throw_error(ErrorKind::kState,
                "no usable NVIDIA GPU (%s): a device and its driver are needed; load with "
                "n_gpu_layers=0 to compute on the CPU",
                status == cudaSuccess ? "no device found" : cudaGetErrorString(status));
  }
  if (device < 0 || device >= n) {
    throw_error(ErrorKind::kValue, "main_gpu is %d, expected 0 to %d", device, n - 1);
  }
  COREINFER_CUDA_CHECK(cudaSetDevice(device));
  COREINFER_CUDA_CHECK(cudaGetDeviceProperties(&properties_, device));
  const bool waits = kernels_wait(properties_);
  size_t free = 0, total = 0;
  COREINFER_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  limit_ = limit == 0 ? without_reserve(free) : limit;
  if (limit_ > total) {
    throw_error(ErrorKind::kMemory,
                "vram_limit is %.1f MiB, but the device (%s) has %.1f MiB of memory",
                static_cast<double>(limit_) / 0x1p20, properties_.name,
                static_cast<double>(total) / 0x1p20);
  }
  COREINFER_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  COREINFER_CUDA_CHECK(cudaStreamCreateWithFlags(&load_stream_, cudaStreamNonBlocking));
  COREINFER_CUDA_CHECK(cudaEventCreateWithFlags(&released_, cudaEventDisableTiming));
  COREINFER_CUDA_CHECK(cudaEventCreateWithFlags(&positions_sent_, cudaEventDisableTiming));
  COREINFER_CUDA_CHECK(
      cudaMallocHost(reinterpret_cast<void**>(&host_positions_), kPositions * sizeof(int32_t)));
  for (int i = 0; i < 2; ++i) {
    COREINFER_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&staging_[i]), kStaging));
    COREINFER_CUDA_CHECK(cudaEventCreateWithFlags(&staged_[i], cudaEventDisableTiming));
  }
  // Not counted: whether a limit leaves room is told by who knows all that is needed.
  COREINFER_CUDA_CHECK(
      cudaMalloc(reinterpret_cast<void**>(&device_positions_), kPositions * sizeof(int32_t)));
  graphs_ = !switched_off("COREINFER_CUDA_GRAPHS");
  overlap_ = !switched_off("COREINFER_CUDA_OVERLAP") && waits;
}

Context::~Context() {
  if (stream_ != nullptr) {
    use_device();
    cudaStreamSynchronize(stream_);
  }
  if (load_stream_ != nullptr) cudaStreamSynchronize(load_stream_);
  for (Graph& g : kept_) drop(g);
  for (int i = 0; i < 2; ++i) {
    if (staging_[i] != nullptr) cudaFreeHost(staging_[i]);
    if (staged_[i] != nullptr) cudaEventDestroy(staged_[i]);
  }
  if (host_positions_ != nullptr) cudaFreeHost(host_positions_);
  if (device_positions_ != nullptr) cudaFree(device_positions_);
  for (const Block& b : spare_) cudaFree(b.p);
  if (positions_sent_ != nullptr) cudaEventDestroy(positions_sent_);
  if (released_ != nullptr) cudaEventDestroy(released_);
  if (load_stream_ != nullptr) cudaStreamDestroy(load_stream_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

size_t Context::taken_by(size_t bytes) {
  constexpr size_t kSmall = size_t{1} << 20, kPage = size_t{2} << 20;
  const size_t unit = bytes < kSmall ? 512 : kPage;
  return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
}

void* Context::allocate(size_t bytes, const char* what) {
  bytes = std::max<size_t>(bytes, 1);
  const auto kept = std::find_if(spare_.begin(), spare_.end(),
                                 [bytes](const Block& b) { return b.bytes == bytes; });
  void* p = nullptr;
  if (kept != spare_.end()) {
    p = kept->p;
    spare_.erase(kept);
  } else {
    p = take(bytes, what);
  }
  used_ += taken_by(bytes);
  return p;
}

void* Context::take(size_t bytes, const char* what) {
  const size_t taken = taken_by(bytes);
  const auto mib = [](size_t n) { return static_cast<double>(n) / 0x1p20; };
  // Core weights of ever new sizes would fill the device.
  const auto too_much = [&] { return taken_ + graph_bytes_ + taken > limit_; };
  if (too_much() || taken_ - used_ > kMostSpare) free_spare();
  if (too_much()) drop_graphs(nullptr);
  if (too_much()) {
    throw_error(ErrorKind::kMemory,
                "%s: %.1f MiB of GPU memory wanted, %.1f MiB in use, limit %.1f MiB: use a "
                "smaller model, n_ctx or n_batch, or a higher limit",
                what, mib(taken), mib(used_), mib(limit_));
  }
  void* p = nullptr;
  use_device();
  cudaError_t status = cudaMalloc(&p, bytes);
  if (status == cudaErrorMemoryAllocation && !spare_.empty()) {
    cudaGetLastError();
    free_spare();
    status = cudaMalloc(&p, bytes);
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw_error(ErrorKind::kMemory,
                "%s: %.1f MiB of GPU memory wanted beside %.1f MiB in use, but only %.1f MiB are "
                "free: other programs have taken some; set vram_limit to what is left",
                what, mib(taken), mib(used_), mib(free));
  }
  check(status, "cudaMalloc(");
  taken_ += taken;
  peak_ = std::max(peak_, taken_ + graph_bytes_);
  return p;
}

void Context::release(void* p, size_t bytes) noexcept {
  const Lock lock(*this);
  bytes = std::max<size_t>(bytes, 1);
  used_ -= taken_by(bytes);
  try {
    flush();  // launches that wait may use the memory
    COREINFER_CUDA_CHECK(cudaEventRecord(released_, stream_));
    after_kernel_ = false;
    spare_.push_back({p, bytes});
  } catch (...) {  // what went wrong shows again at the next call
    cudaStreamSynchronize(stream_);
    cudaStreamSynchronize(load_stream_);
    cudaFree(p);
    taken_ -= taken_by(bytes);
  }
}

void Context::free_spare() {
  synchronize();
  finish_loads();
  for (const Block& b : spare_) {
    cudaFree(b.p);
    taken_ -= taken_by(b.bytes);
  }
  spare_.clear();
}

void Context::defer(bool deferred) {
  if (!deferred) flush();
  deferred_ = deferred;
}

void Context::add(const Launch& launch, const void* args) {
  if (!deferred_) return issue(launch, args);
  // Equal lists are equal byte for byte.
  static_assert(std::has_unique_object_representations_v<Launch>);
  const size_t at = list_.size();
  list_.resize(at + sizeof(launch) + launch.args_size);
  std::memcpy(list_.data() + at, &launch, sizeof(launch));
  std::memcpy(list_.data() + at + sizeof(launch), args, launch.args_size);
  ++listed_;
}

void Context::issue(const Launch& launch, const void* args, cudaStream_t stream,
                    bool after_kernel) {
  const bool overlaps = overlap_ && after_kernel;
#ifdef COREINFER_CUDA_HOST
  check(cuda_host_launch(launch.thunk, launch.kernel, args, launch.args_size, launch.grid,
                         launch.block, launch.shared, stream, overlaps),
        "cuda_host_launch(");
#else
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared;
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  void* pointers[] = {const_cast<void*>(args)};
  COREINFER_CUDA_CHECK(cudaLaunchKernelExC(&config, launch.kernel, pointers));
#endif
}

void Context::issue_list() {
  after_kernel_ = false;
  alignas(16) unsigned char args[4096];
  for (size_t at = 0; at < list_.size();) {
    Launch launch;
    std::memcpy(&launch, list_.data() + at, sizeof(launch));
    std::memcpy(args, list_.data() + at + sizeof(launch), launch.args_size);
    issue(launch, args);
    at += sizeof(launch) + launch.args_size;
  }
}

void Context::run_list() {
  if (!graphs_ || listed_ < kWorthAGraph) return issue_list();
  ++clock_;
  auto graph =
      std::find_if(kept_.begin(), kept_.end(), [this](const Graph& g) { return g.list == list_; });
  if (graph == kept_.end()) {
    issue_list();
    return remember_list();
  }
  graph->used = clock_;
  if (graph->exec == nullptr) make(*graph);
  COREINFER_CUDA_CHECK(cudaGraphLaunch(graph->exec, stream_));
}

void Context::remember_list() {
  if (kept_.size() == kKeptGraphs) {
    auto oldest = std::min_element(kept_.begin(), kept_.end(),
                                   [](const Graph& a, const Graph& b) { return a.used < b.used; });
    drop(*oldest);
    kept_.erase(oldest);
  }
  kept_.push_back({list_, nullptr, clock_});
}

cudaGraphExec_t Context::capture_list() {
  COREINFER_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    issue_list();
  } catch (const Error&) {
    if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess) cudaGraphDestroy(graph);
    throw;
  }
  COREINFER_CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t exec = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate(");
  return exec;
}

// The driver takes memory for a graph, how much it does not say. What others take or give back in
// between is mistaken for it; the limit is the worse for that, not the work.
void Context::make(Graph& graph) {
  const auto free_bytes = [] {
    size_t free = 0, total = 0;
    COREINFER_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return free;
  };
  const size_t before = free_bytes();
  graph.exec = capture_list();
  COREINFER_CUDA_CHECK(cudaGraphUpload(graph.exec, stream_));
  const size_t after = free_bytes();
  graph.bytes = before > after ? before - after : 0;
  graph_bytes_ += graph.bytes;
  if (taken_ + graph_bytes_ > limit_) drop_graphs(&graph);
  peak_ = std::max(peak_, taken_ + graph_bytes_);
}

// One that still runs is given back by the driver when it is done.
void Context::drop(Graph& graph) {
  if (graph.exec != nullptr) cudaGraphExecDestroy(graph.exec);
  graph.exec = nullptr;
  graph_bytes_ -= std::exchange(graph.bytes, 0);
}

void Context::drop_graphs(const Graph* but) {
  for (Graph& g : kept_) {
    if (&g != but) drop(g);
  }
}

void Context::flush() {
  use_device();
  if (!positions_.empty()) {
    const size_t n = positions_.size() * sizeof(int32_t);
    COREINFER_CUDA_CHECK(cudaEventSynchronize(positions_sent_));
    std::memcpy(host_positions_, positions_.data(), n);
    positions_.clear();
    COREINFER_CUDA_CHECK(
        cudaMemcpyAsync(device_positions_, host_positions_, n, cudaMemcpyHostToDevice, stream_));
    COREINFER_CUDA_CHECK(cudaEventRecord(positions_sent_, stream_));
    after_kernel_ = false;
  }
  if (list_.empty()) return;
  try {
    run_list();
  } catch (...) {
    list_.clear();
    listed_ = 0;
    throw;
  }
  list_.clear();
  listed_ = 0;
  after_kernel_ = false;
}

void Context::synchronize() {
  flush();
  COREINFER_CUDA_CHECK(cudaStreamSynchronize(stream_));
  after_kernel_ = false;
}

const int32_t* Context::position(int64_t value) {
  if (!deferred_) return nullptr;
  const auto wanted = static_cast<int32_t>(value);
  auto found = std::find(positions_.begin(), positions_.end(), wanted);
  if (found == positions_.end()) {
    if (positions_.size() == kPositions) flush();
    positions_.push_back(wanted);
    found = positions_.end() - 1;
  }
  return device_positions_ + (found - positions_.begin());
}

void Context::stage(void* device, const void* host, size_t n, cudaStream_t stream) {
  auto* to = static_cast<unsigned char*>(device);
  const auto* from = static_cast<const unsigned char*>(host);
  for (size_t done = 0; done < n;) {
    const int i = next_staging_;
    next_staging_ = 1 - next_staging_;
    const size_t count = std::min(n - done, kStaging);
    COREINFER_CUDA_CHECK(cudaEventSynchronize(staged_[i]));
    copy_shared(copiers_, staging_[i], from + done, count);
    COREINFER_CUDA_CHECK(
        cudaMemcpyAsync(to + done, staging_[i], count, cudaMemcpyHostToDevice, stream));
    COREINFER_CUDA_CHECK(cudaEventRecord(staged_[i], stream));
    done += count;
  }
}

void Context::copy_in(void* device, const void* host, size_t n) {
  flush();
  stage(device, host, n, stream_);
  after_kernel_ = false;
}

void Context::clear(void* device, size_t n) {
  use_device();
  COREINFER_CUDA_CHECK(cudaMemsetAsync(device, 0, n, stream_));
  after_kernel_ = false;
}

cudaStream_t Context::begin_load() {
  flush();  // so that the device computes while the host copies
  COREINFER_CUDA_CHECK(cudaStreamWaitEvent(load_stream_, released_, 0));
  return load_stream_;
}

void Context::load_copy(void* device, const void* host, size_t n) {
  stage(device, host, n, load_stream_);
}

EventPtr Context::end_load() {
  auto event = std::make_unique<Event>();
  COREINFER_CUDA_CHECK(cudaEventRecord(event->get(), load_stream_));
  return event;
}

void Context::await(const Event& event) {
  use_device();
  COREINFER_CUDA_CHECK(cudaStreamWaitEvent(stream_, event.get(), 0));
  after_kernel_ = false;
}

void Context::finish_loads() {
  use_device();
  COREINFER_CUDA_CHECK(cudaStreamSynchronize(load_stream_));
}

void Context::copy_out(void* host, const void* device, size_t n) {
  flush();
  const auto* from = static_cast<const unsigned char*>(device);
  auto* to = static_cast<unsigned char*>(host);
  for (size_t done = 0; done < n;) {
    const size_t count = std::min(n - done, kStaging);
    COREINFER_CUDA_CHECK(cudaEventSynchronize(staged_[0]));
    COREINFER_CUDA_CHECK(
        cudaMemcpyAsync(staging_[0], from + done, count, cudaMemcpyDeviceToHost, stream_));
    synchronize();
    std::memcpy(to + done, staging_[0], count);
    done += count;
  }
}

Memory::Memory(ContextPtr context, size_t bytes, const char* what)
    : context_(std::move(context)), data_(context_->allocate(bytes, what)), bytes_(bytes) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  if (this != &other) {
    reset();
    context_ = std::move(other.context_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void Memory::reset() {
  if (data_ != nullptr) context_->release(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

void Memory::ensure(const ContextPtr& context, size_t bytes, const char* what) {
  if (bytes <= bytes_) return;
  reset();
  *this = Memory(context, bytes, what);
}

}  // namespace coreinfer::cuda
