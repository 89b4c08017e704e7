// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "attention_spans.h"

namespace coreinfer::cuda {
namespace {

constexpr int kMergeThreads = 256;  // head_dim at most

// A thread a span for its factor, then a thread a column of every so manieth span. What is added in
// which order follows from the row's own spans alone.
// grid: (rows, heads)
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(COREINFER_PARAMETER AttentionArgs a) {
  begin_kernel();
  __shared__ float factors[kMergeThreads];
  __shared__ float sums[kMergeThreads];
  const int64_t row = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t position = first_position(a) + row;
  const int64_t last = position / a.span;
  const int64_t oldest = a.window == 0 ? 0 : position + 1 - a.window;
  const int64_t start = oldest > 0 ? oldest / a.span : 0;
  const int dim = a.head_dim;
  const int64_t step = dim + 2;
  const float* const parts = partial_of(a, row, head, 0);
  const int tid = static_cast<int>(threadIdx.x);

  float largest = __int_as_float(static_cast<int>(0xff800000u));
  for (int64_t s = start + tid; s <= last; s += kMergeThreads) {
    const float m = parts[s * step + dim];
    largest = m > largest ? m : largest;
  }
  largest = block_max(largest);
  const int n_groups = kMergeThreads / dim, group = tid / dim, column = tid % dim;
  float total = 0.0f, sum = 0.0f;
  for (int64_t first = start; first <= last; first += kMergeThreads) {
    const int n =
        static_cast<int>(last + 1 - first < kMergeThreads ? last + 1 - first : kMergeThreads);
    float factor = 0.0f;
    if (tid < n) {
      const float* const of_span = parts + (first + tid) * step + dim;
      factor = expf(of_span[0] - largest);
      total = fmaf(of_span[1], factor, total);
    }
    __syncthreads();  // factors may still be read
    factors[tid] = factor;
    __syncthreads();
    if (group < n_groups) {
#pragma unroll 8
      for (int s = group; s < n; s += n_groups) {
        sum = fmaf(parts[(first + s) * step + column], factors[s], sum);
      }
    }
  }
  total = block_sum(total);
  sums[tid] = sum;
  __syncthreads();
  if (tid >= dim) return;
  for (int g = 1; g < n_groups; ++g) sum += sums[g * dim + tid];
  a.out[row * a.out_stride + static_cast<int64_t>(head) * dim + tid] = sum / total;
}

}  // namespace

AttentionArgs arguments(const AttentionSpec& spec, const AttentionCall& c) {
  AttentionArgs a{};
  a.q = c.q.data;
  a.q_stride = c.q.stride;
  a.keys = c.keys;
  a.values = c.values;
  a.position = c.position;
  a.first = c.first;
  a.n_rows = c.q.n;
  a.window = spec.window;
  a.span = c.span;
  a.n_spans = c.n_spans;
  a.partials = c.partials;
  a.arrived = c.arrived;
  a.out = c.out.data;
  a.out_stride = c.out.stride;
  a.prepared = c.prepared;
  a.scale = spec.scale;
  a.softcap = spec.softcap;
  a.n_head = a.n_partial_heads = static_cast<int32_t>(spec.n_head);
  a.n_head_kv = static_cast<int32_t>(spec.n_head_kv);
  a.head_dim = static_cast<int32_t>(spec.head_dim);
  return a;
}

int64_t partial_floats(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans) {
  return n_rows * spec.n_head * n_spans * (spec.head_dim + 2);
}

void merge_spans(Context& context, const AttentionArgs& a) {
  context.launch(merge_kernel,
                 dim3(static_cast<unsigned>(a.n_rows), static_cast<unsigned>(a.n_head)),
                 dim3(kMergeThreads), 0, a);
}

}  // namespace coreinfer::cuda
