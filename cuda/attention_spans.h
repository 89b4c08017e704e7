// What the kernels of attention_rows.cu and attention_tiles.cu have in common: their arguments, how
// they read a cache, and where the sums over a span of positions lie until they are merged.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "attention.h"

namespace coreinfer::cuda {

struct AttentionArgs {
  const float* q;
  int64_t q_stride;
  KvPlane keys, values;
  const int32_t* position;  // null: 0
  int64_t first;            // row 0 is at *position + first
  int64_t n_rows;
  int64_t window;
  int64_t span, n_spans;  // positions of a span, and how many the grid covers
  float* partials;        // (row, head, span): head_dim sums, then maximum, then sum of weights
  float* out;
  int64_t out_stride;
  float scale, softcap;
  int32_t n_head, n_head_kv, head_dim;
  int32_t unused;
};
AttentionArgs arguments(const AttentionSpec& spec, const AttentionCall& call);

// From the partials to out, the spans of a row in order.
void merge_spans(Context& context, const AttentionArgs& args);

__device__ __forceinline__ int64_t first_position(const AttentionArgs& a) {
  return a.first + (a.position != nullptr ? *a.position : 0);
}

__device__ __forceinline__ float* partial_of(const AttentionArgs& a, int64_t row, int head,
                                             int64_t span) {
  return a.partials + ((row * a.n_head + head) * a.n_spans + span) * (a.head_dim + 2);
}

// Eight elements from `at` on of a row of the cache.
__device__ __forceinline__ void load8(const KvPlane& plane, const unsigned char* head,
                                      int64_t head_dim, int64_t position, int at, float (&v)[8]) {
  const int64_t element = position * head_dim + at;
  if (plane.element == KvElement::kF16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(head + 2 * element);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
      v[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  } else if (plane.element == KvElement::kF32) {
    const auto* raw = reinterpret_cast<const float4*>(head + 4 * element);
    const float4 a = raw[0], b = raw[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(head + element);
    const auto* scales = reinterpret_cast<const uint16_t*>(head + plane.scales_start);
    const float scale = half_to_float(scales[position * (head_dim / kKvGroup) + at / kKvGroup]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = scale * static_cast<float>(static_cast<int8_t>(raw.x >> (8 * i)));
      v[4 + i] = scale * static_cast<float>(static_cast<int8_t>(raw.y >> (8 * i)));
    }
  }
}

}  // namespace coreinfer::cuda
