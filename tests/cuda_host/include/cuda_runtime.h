// The CUDA runtime as far as cuda/ uses it, carried out on the host: a grid's blocks one after the
// other, the threads of a block as fibers that take turns at barriers and warp operations. It
// stands in for <cuda_runtime.h> when the tests compile cuda/ with the C++ compiler. One thread at
// a time may launch. It says nothing about speed and finds no data races between blocks; it stops
// at divergent barriers and at what accesses.cpp looks for, and what is used before it was waited
// for is not there yet.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
// Blocks run one after the other. The section of these variables is build.py's.
#define __shared__ static
#define __align__(n) alignas(n)
#define CUDA_HOST_UNSEEN __attribute__((no_sanitize("thread"), noinline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace cuda_host {

struct Position {
  dim3 thread, block, block_dim, grid_dim;
};
extern Position* const here;  // of the running fiber

unsigned char* dynamic_shared();
// Returns when every thread of the block is there.
void block_barrier();
void warp_barrier(unsigned mask);
// Every lane of the warp, and the mask is all of them, hands in 8 bytes and gets those of a lane.
uint64_t exchange(unsigned mask, uint64_t value, unsigned from);
// In a kernel that may overlap with those before it: they count as done from here on.
void wait_for_grid();
void note_atomic(const void* p, size_t size);
// Carries out one kernel: thunk(kernel, args) in every thread. unfinished: of its stream, the
// number of the first block that may still run when an overlapping kernel starts.
void run(void (*thunk)(const void*, const void*), const void* kernel, const void* args,
         size_t args_size, dim3 grid, dim3 block, size_t shared, bool overlaps,
         uint32_t* unfinished);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

#define threadIdx (cuda_host::here->thread)
#define blockIdx (cuda_host::here->block)
#define blockDim (cuda_host::here->block_dim)
#define gridDim (cuda_host::here->grid_dim)

inline void __syncthreads() { cuda_host::block_barrier(); }
inline void __threadfence() {}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::warp_barrier(mask); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { cuda_host::wait_for_grid(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_host::from_bits<T>(
      cuda_host::exchange(mask, cuda_host::to_bits(value), static_cast<unsigned>(lane) % 32));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ by);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, static_cast<int>(lane < by ? lane : lane - by));
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * i)) *
         static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * i));
  }
  return c;
}
// Byte i of the result is byte (s >> 4 i) & 7 of the eight bytes of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    r |= static_cast<unsigned>((bytes >> (8 * ((s >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return r;
}
template <typename T>
CUDA_HOST_UNSEEN T atomicAdd(T* to, T value) {
  cuda_host::note_atomic(to, sizeof(T));
  const T old = *to;
  *to += value;
  return old;
}
template <typename T>
CUDA_HOST_UNSEEN T atomicMax(T* to, T value) {
  cuda_host::note_atomic(to, sizeof(T));
  const T old = *to;
  if (value > old) *to = value;
  return old;
}
template <typename T>
CUDA_HOST_UNSEEN T atomicMin(T* to, T value) {
  cuda_host::note_atomic(to, sizeof(T));
  const T old = *to;
  if (value < old) *to = value;
  return old;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

// ---- The runtime: one device, host memory; streams do their work when somebody waits for it.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };
enum { cudaHostRegisterDefault = 0, cudaHostRegisterMapped = 2, cudaHostRegisterReadOnly = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
struct CudaHostStream {
  void (*finish)(CudaHostStream*);  // does all that waits in it
};
struct CudaHostEvent;
struct CudaHostGraph;
using cudaStream_t = CudaHostStream*;
using cudaEvent_t = CudaHostEvent*;
using cudaGraph_t = CudaHostGraph*;
using cudaGraphExec_t = CudaHostGraph*;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

struct cudaFuncAttributes {
  int binaryVersion, ptxVersion;
};

const char* cudaGetErrorString(cudaError_t status);
const char* cudaGetErrorName(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, size_t bytes);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long);
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
// In place of cudaLaunchKernelExC, whose kernels carry no type: the thunk knows it.
cudaError_t cuda_host_launch(void (*thunk)(const void*, const void*), const void* kernel,
                             const void* args, size_t args_size, dim3 grid, dim3 block,
                             size_t shared, cudaStream_t stream, bool overlaps);
