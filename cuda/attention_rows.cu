// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>

#include "attention_spans.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// Positions [begin, end) of the span that a row at `position` sees, counted from the span's start.
__device__ __forceinline__ void visible(int64_t position, int64_t window, int64_t span, int* begin,
                                        int* end) {
  const int64_t start = span * kSpan;
  const int64_t last = position + 1 - start;
  const int64_t from = window == 0 ? 0 : position + 1 - window - start;
  *end = static_cast<int>(last > kSpan ? kSpan : last);
  *begin = static_cast<int>(from > 0 ? from : 0);
}

// Asks for the rows that a block will read of keys or values, while the kernel before still works.
__device__ __forceinline__ void prefetch_rows(const KvPlane& plane, int64_t head, int64_t head_dim,
                                              int64_t position, int64_t n) {
  const int64_t bytes = plane.element == KvElement::kF16   ? 2
                        : plane.element == KvElement::kF32 ? 4
                                                           : 1;
  const unsigned char* from = plane.data + head * plane.head_stride + position * head_dim * bytes;
#pragma unroll 1
  for (int64_t at = threadIdx.x * kLine; at < n * head_dim * bytes; at += kThreads * kLine) {
    prefetch(from + at);
  }
}

constexpr int kLanesPerPosition = 8;
constexpr int kPositionsAtOnce = kThreads / kLanesPerPosition;

// Positions of which a thread has loads under way together.
template <int kGroup>
constexpr int kBatchOf = kGroup == 1 ? 8 : 4;

__device__ __forceinline__ int within(int p, int begin, int end) {
  return p < begin ? begin : p < end ? p : end - 1;
}

// weights (kGroup, kSpan) = q k of the positions that are seen, eight lanes each; others are left.
template <int kGroup, KvElement kElement>
__device__ __forceinline__ void score(const AttentionArgs& a, const unsigned char* keys,
                                      int64_t first, int begin, int end, int n_group,
                                      const float* q, float* weights) {
  constexpr int kBatch = kBatchOf<kGroup>;
  const int dim = a.head_dim;
  const int sub = static_cast<int>(threadIdx.x) % kLanesPerPosition;
  const int mine = static_cast<int>(threadIdx.x) / kLanesPerPosition;
  for (int p0 = begin / kPositionsAtOnce * kPositionsAtOnce; p0 < end;
       p0 += kPositionsAtOnce * kBatch) {
    float sums[kBatch][kGroup];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) sums[b][g] = 0.0f;
    }
    for (int at = sub * 8; at < dim; at += kLanesPerPosition * 8) {
      RawElements raw[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = within(p0 + b * kPositionsAtOnce + mine, begin, end);
        raw[b] = load_raw<kElement>(a.keys, keys, dim, first + p, at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float k[8];
        values_of<kElement>(raw[b], k);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (kGroup > 1 && g >= n_group) break;
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[b][g] = fmaf(k[i], q[g * dim + at + i], sums[b][g]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = p0 + b * kPositionsAtOnce + mine;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float s = sums[b][g];
        s += __shfl_xor_sync(kAllLanes, s, 4);
        s += __shfl_xor_sync(kAllLanes, s, 2);
        s += __shfl_xor_sync(kAllLanes, s, 1);
        if (sub == 0 && g < n_group && p >= begin && p < end) weights[g * kSpan + p] = s;
      }
    }
  }
}

// acc += weight * value of eight columns from `column` on, at every step-th position from p0 on.
template <int kGroup, KvElement kElement>
__device__ __forceinline__ void add_values(const AttentionArgs& a, const unsigned char* values,
                                           int64_t first, int begin, int end, int n_group, int p0,
                                           int step, int column, const float* weights,
                                           float (&acc)[kGroup][8]) {
  constexpr int kBatch = kBatchOf<kGroup>;
  for (; p0 < end; p0 += step * kBatch) {
    if (p0 + step * (kBatch - 1) < begin) continue;
    RawElements raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = within(p0 + b * step, begin, end);
      raw[b] = load_raw<kElement>(a.values, values, a.head_dim, first + p, column);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float v[8];
      values_of<kElement>(raw[b], v);
      const int p = p0 + b * step;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (kGroup > 1 && g >= n_group) break;
        const float w = p < end ? weights[g * kSpan + p] : 0.0f;  // and 0 before begin
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[g][i] = fmaf(w, v[i], acc[g][i]);
      }
    }
  }
}

// grid: (spans, key-value heads, each as many times as its query heads make groups, rows)
template <int kGroup>
__global__ void __launch_bounds__(kThreads) span_kernel(COREINFER_PARAMETER AttentionArgs a) {
  let_next_start();
  COREINFER_DYNAMIC_SHARED(memory);
  const int dim = a.head_dim;
  auto* q = reinterpret_cast<float*>(memory);  // (kGroup, dim)
  float* weights = q + kGroup * dim;           // (kGroup, kSpan)
  float* sums = weights + kGroup * kSpan;      // (kWarps, dim), a group at a time
  const int64_t span = blockIdx.x;
  const int64_t row = blockIdx.z;
  const int heads_each = a.n_head / a.n_head_kv;
  const int groups = divide_up(heads_each, kGroup);
  const int kv_head = static_cast<int>(blockIdx.y) / groups;
  const int part = static_cast<int>(blockIdx.y) % groups;
  const int head = kv_head * heads_each + part * kGroup;
  const int rest = heads_each - part * kGroup;
  const int n_group = rest < kGroup ? rest : kGroup;
  const int64_t position = first_position(a) + row;
  const int64_t first = span * kSpan;
  int begin, end;
  visible(position, a.window, span, &begin, &end);
  if (begin < end) {
    prefetch_rows(a.keys, kv_head, dim, first + begin, end - begin);
    prefetch_rows(a.values, kv_head, dim, first + begin, end - begin);
  }
  wait_for_previous();
  if (begin >= end) return;

  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < n_group * dim; i += kThreads) {
    q[i] = a.q[row * a.q_stride + static_cast<int64_t>(head) * dim + i] * a.scale;
  }
  __syncthreads();
  const unsigned char* keys = a.keys.data + kv_head * a.keys.head_stride;
  with_element(a.keys.element, [&](auto element) {
    score<kGroup, decltype(element)::value>(a, keys, first, begin, end, n_group, q, weights);
  });
  __syncthreads();

  // Weights, maximum and sum: a warp a query head.
  const int lane = tid % kWarp;
  for (int g = tid / kWarp; g < n_group; g += kWarps) {
    float s[kSpan / kWarp];
    float largest = __int_as_float(static_cast<int>(0xff800000u));
#pragma unroll
    for (int i = 0; i < kSpan / kWarp; ++i) {
      const int p = i * kWarp + lane;
      s[i] = 0.0f;
      if (p < begin || p >= end) continue;
      s[i] = weights[g * kSpan + p];
      if (a.softcap > 0.0f) s[i] = a.softcap * tanhf(s[i] / a.softcap);
      largest = s[i] > largest ? s[i] : largest;
    }
    largest = warp_max(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kSpan / kWarp; ++i) {
      const int p = i * kWarp + lane;
      const float w = p >= begin && p < end ? expf(s[i] - largest) : 0.0f;
      weights[g * kSpan + p] = w;
      total += w;
    }
    total = warp_sum(total);
    if (lane == 0) {
      float* to = partial_of(a, row, head + g, span);
      to[dim] = largest;
      to[dim + 1] = total;
    }
  }
  __syncthreads();

  // Weighted values: a thread takes eight elements at every so manieth position, and the threads of
  // a warp, then the warps, are added up in order.
  const unsigned char* values = a.values.data + kv_head * a.values.head_stride;
  const int columns = dim / 8;  // threads a position
  const int lanes_a_position = columns <= 1    ? 1
                               : columns <= 2  ? 2
                               : columns <= 4  ? 4
                               : columns <= 8  ? 8
                               : columns <= 16 ? 16
                                               : 32;
  const int column = lane % lanes_a_position;
  const int at_once = kWarp / lanes_a_position;  // positions of a warp
  float acc[kGroup][8];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[g][i] = 0.0f;
  }
  if (column < columns) {
    const int p0 = (tid / kWarp) * at_once + lane / lanes_a_position;
    with_element(a.values.element, [&](auto element) {
      add_values<kGroup, decltype(element)::value>(a, values, first, begin, end, n_group, p0,
                                                   kWarps * at_once, column * 8, weights, acc);
    });
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (g >= n_group) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int offset = lanes_a_position; offset < kWarp; offset *= 2) {
        acc[g][i] += __shfl_xor_sync(kAllLanes, acc[g][i], offset);
      }
      if (lane < columns) sums[(tid / kWarp) * dim + lane * 8 + i] = acc[g][i];
    }
    __syncthreads();
    float* to = partial_of(a, row, head + g, span);
    for (int i = tid; i < dim; i += kThreads) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += sums[w * dim + i];
      to[i] = total;
    }
    __syncthreads();
  }
}

template <int kGroup>
void launch_spans(Context& context, const AttentionArgs& a) {
  const int groups = divide_up(a.n_head / a.n_head_kv, kGroup);
  const auto dim = static_cast<size_t>(a.head_dim);
  const size_t shared = (kGroup * (dim + kSpan) + kWarps * dim) * sizeof(float);
  context.launch(span_kernel<kGroup>,
                 dim3(static_cast<unsigned>(a.n_spans), static_cast<unsigned>(a.n_head_kv * groups),
                      static_cast<unsigned>(a.n_rows)),
                 dim3(kThreads), shared, a);
}

}  // namespace

size_t partial_bytes_of_rows(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans) {
  const auto bytes = [&](int64_t n) {
    return static_cast<size_t>(partial_floats(spec, n, n_spans)) * sizeof(float);
  };
  return std::max(bytes(1), std::min(bytes(n_rows), kPartialBytes));
}

void attend_rows(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  AttentionArgs a = arguments(spec, c);
  const int64_t group = spec.n_head / spec.n_head_kv;
  // As many rows at a time as the partials have room for.
  const size_t row_bytes = partial_bytes_of_rows(spec, 1, c.n_spans);
  const auto most = static_cast<int64_t>(std::max<size_t>(kPartialBytes / row_bytes, 1));
  for (int64_t row = 0; row < c.q.n; row += a.n_rows) {
    a.n_rows = std::min(most, c.q.n - row);
    a.first = c.first + row;
    a.q = c.q.data + row * c.q.stride;
    a.out = c.out.data + row * c.out.stride;
    if (group == 1) {
      launch_spans<1>(context, a);
    } else if (group <= 4) {
      launch_spans<4>(context, a);
    } else {
      launch_spans<kMaxGroup>(context, a);
    }
    merge_spans(context, a);
  }
}

}  // namespace coreinfer::cuda
