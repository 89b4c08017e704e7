// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "attention_spans.h"

namespace coreinfer::cuda {
namespace {

// grid: (rows, heads)
__global__ void merge_kernel(COREINFER_PARAMETER AttentionArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t position = first_position(a) + row;
  const int64_t last = position / a.span;
  const int64_t oldest = a.window == 0 ? 0 : position + 1 - a.window;
  const int64_t start = oldest > 0 ? oldest / a.span : 0;
  const int dim = a.head_dim;
  const auto part = [&](int64_t s) { return partial_of(a, row, head, s); };
  float largest = part(start)[dim];
  for (int64_t s = start + 1; s <= last; ++s) {
    const float m = part(s)[dim];
    largest = !(m <= largest) ? m : largest;
  }
  float total = 0.0f;
  for (int64_t s = start; s <= last; ++s) {
    total = fmaf(part(s)[dim + 1], expf(part(s)[dim] - largest), total);
  }
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int64_t s = start; s <= last; ++s) {
      sum = fmaf(part(s)[i], expf(part(s)[dim] - largest), sum);
    }
    a.out[row * a.out_stride + static_cast<int64_t>(head) * dim + i] = sum / total;
  }
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
  a.out = c.out.data;
  a.out_stride = c.out.stride;
  a.scale = spec.scale;
  a.softcap = spec.softcap;
  a.n_head = static_cast<int32_t>(spec.n_head);
  a.n_head_kv = static_cast<int32_t>(spec.n_head_kv);
  a.head_dim = static_cast<int32_t>(spec.head_dim);
  return a;
}

int64_t partial_floats(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans) {
  return n_rows * spec.n_head * n_spans * (spec.head_dim + 2);
}

void merge_spans(Context& context, const AttentionArgs& a) {
  context.launch(merge_kernel,
                 dim3(static_cast<unsigned>(a.n_rows), static_cast<unsigned>(a.n_head)), dim3(64),
                 0, a);
}

}  // namespace coreinfer::cuda
