// Head norms, rope, and rows on their way into the cache: what the kernels of attention_rope.cu and
// attention_rows.cu have in common.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "attention.h"

namespace coreinfer::cuda {

inline constexpr int kMaxPairs = 128;                     // head_dim / 2 at most
inline constexpr int kHeadTurns = 2 * kMaxPairs / kWarp;  // of a warp over a head

struct HeadNorm {
  const float* weight;  // (head_dim) or null
  double eps;
};

struct RopeArgs {
  float* q;
  float* k;
  float* v;
  int64_t q_stride, k_stride, v_stride;
  KvPlane keys, values;
  const int32_t* position;
  const float* frequencies;
  HeadNorm q_norm, k_norm;
  int64_t first;
  int32_t n_head, n_head_kv, head_dim, pairs;
  int32_t interleaved;
  float rope_scale;
};

RopeArgs rope_arguments(const AttentionSpec& spec, const AttentionCall& call);

// Cosine and sine of pair i at the position. The angle is in double: as float32 it is off by
// hundredths of a radian at position 100,000.
__device__ __forceinline__ float2 turn_of(const RopeArgs& a, int64_t position, int i) {
  const double angle = static_cast<double>(position) * static_cast<double>(a.frequencies[i]);
  return {static_cast<float>(cos(angle)) * a.rope_scale,
          static_cast<float>(sin(angle)) * a.rope_scale};
}

// A head's norm and rope by one warp, in place; turns: of each pair.
__device__ __forceinline__ void turn_head(const RopeArgs& a, const HeadNorm& norm,
                                          const float2* turns, float* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (norm.weight != nullptr) {
    double squares = 0;
    for (int i = lane; i < a.head_dim; i += kWarp) squares += static_cast<double>(x[i]) * x[i];
    const auto inverse = static_cast<float>(
        1.0 / sqrt(warp_sum(squares) / static_cast<double>(a.head_dim) + norm.eps));
    for (int i = lane; i < a.head_dim; i += kWarp) x[i] = x[i] * inverse * norm.weight[i];
    __syncwarp();
  }
  // All pairs of a lane are read before the first is written, so that they are under way together.
  const int step = a.interleaved != 0 ? 2 : 1, other = a.interleaved != 0 ? 1 : a.pairs;
  float u[kMaxPairs / kWarp], w[kMaxPairs / kWarp];
#pragma unroll
  for (int t = 0; t < kMaxPairs / kWarp; ++t) {
    const int i = t * kWarp + lane;
    if (i >= a.pairs) break;
    u[t] = x[step * i];
    w[t] = x[step * i + other];
  }
#pragma unroll
  for (int t = 0; t < kMaxPairs / kWarp; ++t) {
    const int i = t * kWarp + lane;
    if (i >= a.pairs) break;
    const float2 by = turns[i];
    x[step * i] = u[t] * by.x - w[t] * by.y;
    x[step * i + other] = u[t] * by.y + w[t] * by.x;
  }
  __syncwarp();
}

// This lane's elements of a head, every kWarp-th, and zeros behind them: under way together.
__device__ __forceinline__ void head_values(const float* x, int64_t head_dim,
                                            float (&values)[kHeadTurns]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int t = 0; t < kHeadTurns; ++t) {
    values[t] = t * kWarp + lane < head_dim ? x[t * kWarp + lane] : 0.0f;
  }
}

// A head's elements from `x` to `to` by one warp.
__device__ __forceinline__ void load_head(const float* x, int head_dim, float* to) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float values[kHeadTurns];
  head_values(x, head_dim, values);
#pragma unroll
  for (int t = 0; t < kHeadTurns; ++t) {
    if (t * kWarp + lane < head_dim) to[t * kWarp + lane] = values[t];
  }
  __syncwarp();
}

// A row of one head into the cache, by one warp.
__device__ __forceinline__ void store_row(const KvPlane& plane, int head, int64_t head_dim,
                                          int64_t position, const float* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* base = plane.data + head * plane.head_stride;
  const int64_t start = position * head_dim;
  float values[kHeadTurns];
  head_values(x, head_dim, values);
#pragma unroll
  for (int t = 0; t < kHeadTurns; ++t) {
    if (t * kWarp >= head_dim) break;
    const int64_t i = t * kWarp + lane;
    const float value = values[t];
    if (plane.element == KvElement::kF16) {
      if (i < head_dim) reinterpret_cast<uint16_t*>(base)[start + i] = float_to_half(value);
    } else if (plane.element == KvElement::kF32) {
      if (i < head_dim) reinterpret_cast<float*>(base)[start + i] = value;
    } else {  // a group of 32 is a turn of the warp
      float largest = fabsf(value);
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, largest, offset);
        largest = !(other <= largest) ? other : largest;  // NaN is kept
      }
      const uint16_t bits = float_to_half(largest / 127.0f);
      const float scale = half_to_float(bits);
      const float scaled = value * (scale > 0.0f ? 1.0f / scale : 0.0f);
      const int code = scaled == scaled ? __float2int_rn(scaled) : -127;
      reinterpret_cast<int8_t*>(base)[start + i] = static_cast<int8_t>(code > 127    ? 127
                                                                       : code < -127 ? -127
                                                                                     : code);
      if (lane == 0) {
        reinterpret_cast<uint16_t*>(base + plane.scales_start)[(start + i) / kKvGroup] = bits;
      }
    }
  }
}

}  // namespace coreinfer::cuda
