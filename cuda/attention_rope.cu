// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "attention_rope.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// grid: (rows, parts of the heads)
__global__ void __launch_bounds__(kThreads) rope_kernel(COREINFER_PARAMETER RopeArgs a) {
  let_next_start();
  __shared__ float2 turns[kMaxPairs];
  const int64_t row = blockIdx.x;
  const int64_t position = a.first + (a.position != nullptr ? *a.position : 0) + row;
  for (int i = static_cast<int>(threadIdx.x); i < a.pairs; i += kThreads) {
    turns[i] = turn_of(a, position, i);
  }
  wait_for_previous();
  __syncthreads();
  const int warp = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int n_warps = static_cast<int>(gridDim.y) * kWarps;
  for (int head = warp; head < a.n_head + 2 * a.n_head_kv; head += n_warps) {
    if (head < a.n_head) {
      turn_head(a, a.q_norm, turns, a.q + row * a.q_stride + head * a.head_dim);
    } else if (head < a.n_head + a.n_head_kv) {
      const int h = head - a.n_head;
      float* k = a.k + row * a.k_stride + h * a.head_dim;
      turn_head(a, a.k_norm, turns, k);
      store_row(a.keys, h, a.head_dim, position, k);
    } else {
      const int h = head - a.n_head - a.n_head_kv;
      store_row(a.values, h, a.head_dim, position, a.v + row * a.v_stride + h * a.head_dim);
    }
  }
}

}  // namespace

RopeArgs rope_arguments(const AttentionSpec& spec, const AttentionCall& c) {
  RopeArgs a{};
  a.q = c.q.data;
  a.k = c.k.data;
  a.v = c.v.data;
  a.q_stride = c.q.stride;
  a.k_stride = c.k.stride;
  a.v_stride = c.v.stride;
  a.keys = c.keys;
  a.values = c.values;
  a.position = c.position;
  a.frequencies = c.frequencies;
  a.q_norm = {spec.q_norm.weight ? spec.q_norm.weight->data() : nullptr, spec.q_norm.eps};
  a.k_norm = {spec.k_norm.weight ? spec.k_norm.weight->data() : nullptr, spec.k_norm.eps};
  a.first = c.first;
  a.n_head = static_cast<int32_t>(spec.n_head);
  a.n_head_kv = static_cast<int32_t>(spec.n_head_kv);
  a.head_dim = static_cast<int32_t>(spec.head_dim);
  a.pairs = spec.rope == RopeKind::kNone ? 0 : static_cast<int32_t>(spec.rope_dim / 2);
  a.interleaved = spec.rope == RopeKind::kInterleaved ? 1 : 0;
  a.rope_scale = spec.rope_scale;
  return a;
}

void rope_and_store(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  // More heads than warps, so that cos and sin of a position serve several.
  const int64_t parts = divide_up<int64_t>(spec.n_head + 2 * spec.n_head_kv, 4 * kWarps);
  context.launch(rope_kernel, dim3(static_cast<unsigned>(c.q.n), static_cast<unsigned>(parts)),
                 dim3(kThreads), 0, rope_arguments(spec, c));
}

}  // namespace coreinfer::cuda
