// A kernel with one of several faults that only a device would show, for what ends the process.
#include "device_api.h"

using namespace coreinfer::cuda;

namespace {

enum Fault : int64_t {
  kNone,
  kNoBarrier,
  kNoSyncwarp,
  kReadTooSoon,
  kWrittenTooSoon,
  kNeverWaits,
  kUnaligned,
  kOverTheEnd,
  kMemoryOfTheHost,
  kSomeLanes,  // at a warp operation
  kTouchedByHost,
};

constexpr int kThreads = 64;

struct FaultArgs {
  float* memory;  // (kThreads) of the device
  float* other;   // of the host
  int64_t fault;
};

__global__ void __launch_bounds__(kThreads) faulty(COREINFER_PARAMETER FaultArgs a) {
  __shared__ float shared[kThreads];
  const unsigned i = threadIdx.x;
  float before = 0.0f;
  if (a.fault == kReadTooSoon) before = a.memory[i];
  if (a.fault == kWrittenTooSoon) a.memory[i] = 1.0f;
  if (a.fault == kNeverWaits && i == kThreads - 1) return;
  wait_for_previous();
  shared[i] = before + a.memory[i];
  if (a.fault == kSomeLanes && i == 3) return;
  if (a.fault != kNoSyncwarp) __syncwarp();
  float sum = shared[i ^ 1];
  __shfl_xor_sync(kAllLanes, sum, 1);
  if (a.fault != kNoBarrier) __syncthreads();
  sum += shared[kThreads - 1 - i];
  if (a.fault == kUnaligned) sum += reinterpret_cast<const float4*>(a.memory + 1)->x;
  if (a.fault == kOverTheEnd && i == kThreads / 2) sum += a.memory[2 * i];
  if (a.fault == kMemoryOfTheHost) sum += *a.other;
  a.memory[i] = sum;
}

}  // namespace

// Launches it without a fault, then with it, over the first. 0: nothing was found.
extern "C" __attribute__((visibility("default"))) int run_faulty(int64_t fault) {
  FaultArgs args{nullptr, nullptr, kNone};
  cudaStream_t stream = nullptr;
  int failed = cudaMalloc(reinterpret_cast<void**>(&args.memory), kThreads * sizeof(float));
  failed |= cudaMallocHost(reinterpret_cast<void**>(&args.other), sizeof(float));
  failed |= cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  const auto thunk = [](const void*, const void* a) { faulty(*static_cast<const FaultArgs*>(a)); };
  for (const bool overlaps : {false, true}) {
    failed |= cuda_host_launch(thunk, nullptr, &args, sizeof(args), dim3(1), dim3(kThreads), 0,
                               stream, overlaps);
    args.fault = fault;
  }
  failed |= cudaStreamSynchronize(stream);
  return fault == kTouchedByHost && *args.memory != 0.0f ? 1 : failed;
}
