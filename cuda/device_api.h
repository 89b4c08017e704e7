// What every file of cuda/ needs of the CUDA runtime: checked calls, the first statement of a
// kernel, number conversions, warp sums. The same sources are compiled for the host by the tests,
// with COREINFER_CUDA_HOST and a cuda_runtime.h that carries out grids and barriers in plain C++;
// so kernels use no more of the language than that header knows.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifndef COREINFER_CUDA_HOST
#include <cuda_fp16.h>
#endif

#include "base/error.h"
#include "base/half.h"

// A kernel takes one parameter, a plain struct; it stays in the parameter memory of the grid.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
#define COREINFER_PARAMETER __grid_constant__ const
#else
#define COREINFER_PARAMETER const
#endif

#ifdef COREINFER_CUDA_HOST
#define COREINFER_DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::dynamic_shared()
#else
#define COREINFER_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace coreinfer::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Throws kState naming the call and the runtime's reason; kMemory where memory ran out.
void check(cudaError_t status, const char* call);
#define COREINFER_CUDA_CHECK(call) ::coreinfer::cuda::check((call), #call)

#if defined(COREINFER_CUDA_HOST)
#define COREINFER_KERNELS_OVERLAP 1
#elif defined(__CUDA_ARCH__)
#define COREINFER_KERNELS_OVERLAP (__CUDA_ARCH__ >= 900)
#else
#define COREINFER_KERNELS_OVERLAP 0
#endif

// From sm_90 on a kernel may be started while the one before it still runs. It says at once that
// the next may be started, too, and waits for the results of the one before where it needs them.
// Until then it may read what no kernel writes that was launched since the stream's last full stop
// (Context::full_stop): weights, positions, rope frequencies; it writes nothing. Every block
// waits, also one that has nothing to do: otherwise the grid would count as finished before its
// predecessor.
__device__ inline void let_next_start() {
#if COREINFER_KERNELS_OVERLAP
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_previous() {
#if COREINFER_KERNELS_OVERLAP
  cudaGridDependencySynchronize();
#endif
}
// The first statement of a kernel that has nothing to do before it waits.
__device__ inline void begin_kernel() {
  let_next_start();
  wait_for_previous();
}

// Brings a line of 128 bytes into the L2 cache; whoever writes it later is heard.
inline constexpr int64_t kLine = 128;
__device__ inline void prefetch(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

__device__ inline float half_to_float(uint16_t bits) {
#ifdef COREINFER_CUDA_HOST
  return f16_to_f32(bits);
#else
  return __half2float(__ushort_as_half(bits));
#endif
}

// To nearest, ties to even.
__device__ inline uint16_t float_to_half(float value) {
#ifdef COREINFER_CUDA_HOST
  return f32_to_f16(value);
#else
  return __half_as_ushort(__float2half_rn(value));
#endif
}

__device__ inline float brain_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }

// To nearest, ties to even; NaN stays NaN.
__device__ inline uint16_t float_to_brain(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Sum over the lanes of a warp, the same bits in every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

template <typename T>
__device__ inline T warp_max(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// What the first lane of each warp has, of a block of at most 1024 threads: a warp's number is the
// lane that gets it; further lanes get `rest`.
template <typename T>
__device__ static T of_warps(T value, T rest) {
  __shared__ T parts[kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int n_warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
  __syncthreads();  // parts may still be read from an earlier call
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return lane < n_warps ? parts[lane] : rest;
}

// Sum over the threads of such a block, in a fixed order; every thread gets it.
template <typename T>
__device__ inline T block_sum(T value) {
  return warp_sum(of_warps(warp_sum(value), T{}));
}

template <typename T>
__device__ inline T block_max(T value) {
  value = warp_max(value);
  return warp_max(of_warps(value, value));
}

template <typename T>
__host__ __device__ constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace coreinfer::cuda
