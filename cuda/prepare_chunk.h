// How a chunk of a row becomes 8-bit codes: by eight neighbouring lanes with four elements each.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "prepare.h"

namespace coreinfer::cuda {

inline constexpr int kLanesPerChunk = 8;

// Larger of two, NaN if one is: it must show in the result and not vanish in the codes.
__device__ __forceinline__ float larger(float a, float b) {
  return !(a <= b) ? a : b != b ? b : (a > b ? a : b);
}

// v: elements from 4 * lane on. For all lanes of a warp; `there`: the row has that chunk.
__device__ __forceinline__ void store_chunk(const PreparedRows& out, int64_t row, int64_t chunk,
                                            int lane, const float (&v)[4], bool there) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) largest = larger(fabsf(v[j]), largest);
  // Four lanes are a half chunk.
  largest = larger(__shfl_xor_sync(kAllLanes, largest, 1), largest);
  largest = larger(__shfl_xor_sync(kAllLanes, largest, 2), largest);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  unsigned word = 0;
  int sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float scaled = v[j] * inverse;
    const int code = scaled == scaled ? __float2int_rn(scaled) : 0;
    word |= (static_cast<unsigned>(code) & 0xffu) << (8 * j);
    sum += code;
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  const int other = __shfl_xor_sync(kAllLanes, sum, 4);
  const float other_largest = __shfl_xor_sync(kAllLanes, largest, 4);
  if (!there) return;
  constexpr int kHalf = kLanesPerChunk / 2;
  const int64_t half = lane / kHalf * (out.codes_stride / 8);
  const_cast<unsigned*>(reinterpret_cast<const unsigned*>(
      out.codes + row * out.codes_stride))[half + chunk * kHalf + lane % kHalf] = word;
  if (lane == 0) {
    const float scale = largest / 127.0f, other_scale = other_largest / 127.0f;
    const_cast<ChunkInput*>(out.chunks)[row * out.chunks_stride + chunk] = {
        {scale, other_scale},
        static_cast<int32_t>((static_cast<unsigned>(sum) & 0xffffu) | static_cast<unsigned>(other)
                                                                          << 16),
        scale * static_cast<float>(sum) + other_scale * static_cast<float>(other)};
  }
}

}  // namespace coreinfer::cuda
