// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "attention.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxPairs = 128;  // head_dim / 2 at most

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

// A head's norm and rope by one warp, in place.
__device__ void turn_head(const RopeArgs& a, const HeadNorm& norm, const float* cos,
                          const float* sin, float* x) {
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
    x[step * i] = u[t] * cos[i] - w[t] * sin[i];
    x[step * i + other] = u[t] * sin[i] + w[t] * cos[i];
  }
  __syncwarp();
}

// A row of one head into the cache, by one warp.
__device__ void store_row(const KvPlane& plane, int head, int64_t head_dim, int64_t position,
                          const float* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* base = plane.data + head * plane.head_stride;
  const int64_t start = position * head_dim;
  constexpr int kTurns = 2 * kMaxPairs / kWarp;
  float values[kTurns];
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    values[t] = t * kWarp + lane < head_dim ? x[t * kWarp + lane] : 0.0f;
  }
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
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

// grid: (rows, parts of the heads)
__global__ void __launch_bounds__(kThreads) rope_kernel(COREINFER_PARAMETER RopeArgs a) {
  let_next_start();
  __shared__ float cos[kMaxPairs], sin[kMaxPairs];
  const int64_t row = blockIdx.x;
  const int64_t position = a.first + (a.position != nullptr ? *a.position : 0) + row;
  for (int i = static_cast<int>(threadIdx.x); i < a.pairs; i += kThreads) {
    // In double: at position 100,000 a float32 angle is off by hundredths of a radian.
    const double angle = static_cast<double>(position) * static_cast<double>(a.frequencies[i]);
    cos[i] = static_cast<float>(::cos(angle)) * a.rope_scale;
    sin[i] = static_cast<float>(::sin(angle)) * a.rope_scale;
  }
  wait_for_previous();
  __syncthreads();
  const int warp = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int n_warps = static_cast<int>(gridDim.y) * kWarps;
  for (int head = warp; head < a.n_head + 2 * a.n_head_kv; head += n_warps) {
    if (head < a.n_head) {
      turn_head(a, a.q_norm, cos, sin, a.q + row * a.q_stride + head * a.head_dim);
    } else if (head < a.n_head + a.n_head_kv) {
      const int h = head - a.n_head;
      float* k = a.k + row * a.k_stride + h * a.head_dim;
      turn_head(a, a.k_norm, cos, sin, k);
      store_row(a.keys, h, a.head_dim, position, k);
    } else {
      const int h = head - a.n_head - a.n_head_kv;
      store_row(a.values, h, a.head_dim, position, a.v + row * a.v_stride + h * a.head_dim);
    }
  }
}

}  // namespace

void rope_and_store(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
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
  // A few rows: a warp a head. Many: cos and sin of a position serve more heads.
  const int64_t heads = spec.n_head + 2 * spec.n_head_kv;
  const int64_t parts = c.q.n <= kExactRows ? divide_up<int64_t>(heads, kWarps)
                                            : divide_up<int64_t>(heads, 4 * kWarps);
  context.launch(rope_kernel, dim3(static_cast<unsigned>(c.q.n), static_cast<unsigned>(parts)),
                 dim3(kThreads), 0, a);
}

}  // namespace coreinfer::cuda
