// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>

#include "attention_rope.h"
#include "attention_spans.h"
#include "prepare_chunk.h"

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

// Whether this block is the last of `n` that come here, so that what the others have written is
// there for it to read, in L2: with __ldcg. *arrived is zero before the first and after the last.
__device__ bool is_last_of(int64_t n, int32_t* arrived) {
  __shared__ int last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == n - 1 ? 1 : 0;
    if (last != 0) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

// From the partials of spans [start, last] to out, the spans in order: what is added in which order
// follows from the row's own spans alone. Shared memory: factors (kGroup, kSpan), totals (kGroup),
// merged (kGroup, head_dim).
template <int kGroup>
__device__ void merge_heads(const AttentionArgs& a, int64_t row, int head, int n_group,
                            int64_t start, int64_t last, float* factors, float* totals,
                            float* merged) {
  constexpr int kHeads = divide_up(kGroup, kWarps);  // whose factors a warp makes
  const int dim = a.head_dim;
  const int64_t step = dim + 2, head_step = a.n_spans * step;
  const float* const parts = partial_of(a, row, head, 0);
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarp, lane = tid % kWarp;
  float largest[kHeads], total[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    largest[h] = __int_as_float(static_cast<int>(0xff800000u));
    total[h] = 0.0f;
    const int g = warp + h * kWarps;
    if (g >= n_group) break;
    for (int64_t s = start + lane; s <= last; s += kWarp) {
      const float m = __ldcg(parts + g * head_step + s * step + dim);
      largest[h] = m > largest[h] ? m : largest[h];
    }
    largest[h] = warp_max(largest[h]);
  }
  const int pairs = dim / 2, n_pairs = n_group * pairs;  // a thread's: tid, tid + kThreads, ...
  float2 sum[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum[i] = {0.0f, 0.0f};
  for (int64_t first = start; first <= last; first += kSpan) {
    const int n = static_cast<int>(last + 1 - first < kSpan ? last + 1 - first : kSpan);
    __syncthreads();  // factors may still be read
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int g = warp + h * kWarps;
      if (g >= n_group) break;
      for (int i = lane; i < n; i += kWarp) {
        const float* const of_span = parts + g * head_step + (first + i) * step + dim;
        const float factor = expf(__ldcg(of_span) - largest[h]);
        total[h] = fmaf(__ldcg(of_span + 1), factor, total[h]);
        factors[g * kSpan + i] = factor;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int pair = tid + i * kThreads;
      if (pair >= n_pairs) break;
      const int g = pair / pairs;
      const float* const from = parts + g * head_step + first * step + 2 * (pair % pairs);
#pragma unroll 8
      for (int s = 0; s < n; ++s) {
        const float2 v = __ldcg(reinterpret_cast<const float2*>(from + s * step));
        sum[i].x = fmaf(v.x, factors[g * kSpan + s], sum[i].x);
        sum[i].y = fmaf(v.y, factors[g * kSpan + s], sum[i].y);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int g = warp + h * kWarps;
    if (g >= n_group) break;
    total[h] = warp_sum(total[h]);
    if (lane == 0) totals[g] = total[h];
  }
  __syncthreads();
  float* const out = a.out + row * a.out_stride + static_cast<int64_t>(head) * dim;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int pair = tid + i * kThreads;
    if (pair >= n_pairs) break;
    const float of_head = totals[pair / pairs];
    merged[2 * pair] = out[2 * pair] = sum[i].x / of_head;
    merged[2 * pair + 1] = out[2 * pair + 1] = sum[i].y / of_head;
  }
  if (a.prepared.codes == nullptr) return;
  __syncthreads();
  const int n_chunks = n_group * dim / kChunk;
  const int64_t before = static_cast<int64_t>(head) * dim / kChunk;
  for (int first = 0; first < n_chunks; first += kThreads / kLanesPerChunk) {
    const int chunk = first + tid / kLanesPerChunk, of_chunk = tid % kLanesPerChunk;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = chunk < n_chunks ? merged[chunk * kChunk + 4 * of_chunk + j] : 0.0f;
    }
    store_chunk(a.prepared, row, before + chunk, of_chunk, v, chunk < n_chunks);
  }
}

struct RowsArgs {
  AttentionArgs attention;
  RopeArgs rope;
};

// Brings the batch's rows [first, end) of a key-value head into the cache and the n_group query
// heads from `head` on into `q`, (n_group, head_dim), in their form for scores; the row at
// `position` is `row`. Shared memory: turns, (1 + kWarps, head_dim / 2), of which the first row is
// there; scratch (kWarps, head_dim).
__device__ __forceinline__ void turn_and_store(const AttentionArgs& a, const RopeArgs& rope,
                                               int64_t row, int64_t position, int kv_head, int head,
                                               int n_group, int64_t first, int64_t end, float* q,
                                               float2* turns, float* scratch) {
  const int dim = a.head_dim;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float2* const others = turns + (1 + warp) * (dim / 2);
  const int64_t n_tasks = n_group + (end > first ? 2 * (end - first) : 0);
#pragma unroll 1
  for (int64_t task = warp; task < n_tasks; task += kWarps) {  // a warp's
    const bool query = task < n_group;
    const bool value = !query && (task - n_group) % 2 != 0;
    const int64_t other = query ? row : first + (task - n_group) / 2;
    const int64_t at = position - row + other;
    const float* const from = query   ? a.q + row * a.q_stride + (head + task) * dim
                              : value ? rope.v + other * rope.v_stride + kv_head * dim
                                      : rope.k + other * rope.k_stride + kv_head * dim;
    float* const x = query ? q + task * dim : scratch + warp * dim;
    load_head(from, dim, x);
    if (!value) {
      if (other != row) {
#pragma unroll 1
        for (int i = lane; i < rope.pairs; i += kWarp) others[i] = turn_of(rope, at, i);
        __syncwarp();
      }
      turn_head(rope, query ? rope.q_norm : rope.k_norm, other == row ? turns : others, x);
    }
    if (query) {
      for (int i = lane; i < dim; i += kWarp) x[i] *= a.scale;
    } else {
      store_row(value ? a.values : a.keys, kv_head, dim, at, x);
    }
    __syncwarp();
  }
  __syncthreads();
}

// A block makes those keys and values of the batch that its span has, and reads no others of them:
// several may write the same bytes to the cache. The block that is the last of a row and its heads
// merges their spans.
// grid: (spans, parts: key-value heads, each as many times as its query heads make groups, rows)
template <int kGroup>
__global__ void __launch_bounds__(kThreads) span_kernel(COREINFER_PARAMETER RowsArgs args) {
  let_next_start();
  const AttentionArgs& a = args.attention;
  COREINFER_DYNAMIC_SHARED(memory);
  const int dim = a.head_dim;
  auto* q = reinterpret_cast<float*>(memory);                    // (kGroup, dim)
  float* weights = q + kGroup * dim;                             // (kGroup, kSpan)
  float* sums = weights + kGroup * kSpan;                        // (kWarps, dim), a group at a time
  auto* turns = reinterpret_cast<float2*>(sums + kWarps * dim);  // (1 + kWarps, dim / 2)
  const int64_t span = blockIdx.x;
  const int64_t row = blockIdx.z;
  const int heads_each = a.n_head / a.n_head_kv;
  const int groups = divide_up(heads_each, kGroup);
  const int kv_head = (a.first_part + static_cast<int>(blockIdx.y)) / groups;
  const int part = (a.first_part + static_cast<int>(blockIdx.y)) % groups;
  const int head = kv_head * heads_each + part * kGroup;
  const int rest = heads_each - part * kGroup;
  const int n_group = rest < kGroup ? rest : kGroup;
  const int64_t position = first_position(a) + row;
  const int64_t first = span * kSpan;
  int begin, end;
  visible(position, a.window, span, &begin, &end);
  const int tid = static_cast<int>(threadIdx.x);
  if (begin < end) {
    prefetch_rows(a.keys, kv_head, dim, first + begin, end - begin);
    prefetch_rows(a.values, kv_head, dim, first + begin, end - begin);
#pragma unroll 1
    for (int i = tid; i < args.rope.pairs; i += kThreads) {
      turns[i] = turn_of(args.rope, position, i);
    }
  }
  wait_for_previous();
  if (begin >= end) return;
  __syncthreads();

  // Rows of the batch that this span has.
  const int64_t before = first + begin - (position - row);
  turn_and_store(a, args.rope, row, position, kv_head, head, n_group, before > 0 ? before : 0,
                 first + end - (position - row), q, turns, sums);
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

  const int64_t oldest = a.window == 0 ? 0 : position + 1 - a.window;
  const int64_t start = oldest > 0 ? oldest / kSpan : 0, last = position / kSpan;
  if (is_last_of(last + 1 - start, a.arrived + row * gridDim.y + blockIdx.y)) {
    merge_heads<kGroup>(a, row, head, n_group, start, last, weights, sums, q);
  }
}

template <int kGroup>
void launch_spans(Context& context, const RowsArgs& args, int64_t n_parts) {
  const AttentionArgs& a = args.attention;
  const auto dim = static_cast<size_t>(a.head_dim);
  const size_t shared = (kGroup * (dim + kSpan) + (2 * kWarps + 1) * dim) * sizeof(float);
  context.launch(span_kernel<kGroup>,
                 dim3(static_cast<unsigned>(a.n_spans), static_cast<unsigned>(n_parts),
                      static_cast<unsigned>(a.n_rows)),
                 dim3(kThreads), shared, args);
}

// How the query heads of key-value heads are cut into parts.
struct Parts {
  explicit Parts(const AttentionSpec& spec)
      : heads_each(spec.n_head / spec.n_head_kv),
        size(heads_each == 1   ? 1
             : heads_each <= 4 ? 4
                               : kMaxGroup),
        each(divide_up(heads_each, size)),
        n(each * spec.n_head_kv) {}
  int64_t first_head(int64_t part) const { return part / each * heads_each + part % each * size; }

  int64_t heads_each, size, each, n;
};

size_t partial_bytes(const AttentionSpec& spec, int64_t n_heads, int64_t n_spans) {
  return static_cast<size_t>(n_heads * n_spans * (spec.head_dim + 2)) * sizeof(float);
}

}  // namespace

size_t partial_bytes_of_rows(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans) {
  const size_t part = partial_bytes(spec, std::min(Parts(spec).size, spec.n_head), n_spans);
  return std::max(part,
                  std::min(partial_bytes(spec, n_rows * spec.n_head, n_spans), kPartialBytes));
}

void attend_rows(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  RowsArgs args{arguments(spec, c), rope_arguments(spec, c)};
  AttentionArgs& a = args.attention;
  const Parts parts(spec);
  // As many rows at a time as the partials have room for, or as many parts of one.
  const auto room_for = [&](int64_t n_heads) {
    return static_cast<int64_t>(kPartialBytes / partial_bytes(spec, n_heads, c.n_spans));
  };
  const int64_t rows_at_once = std::max<int64_t>(room_for(spec.n_head), 1);
  const int64_t parts_at_once =
      room_for(spec.n_head) > 0 ? parts.n : std::max<int64_t>(room_for(parts.size), 1);
  for (int64_t row = 0; row < c.q.n; row += a.n_rows) {
    a.n_rows = std::min(rows_at_once, c.q.n - row);
    a.first = c.first + row;
    a.q = c.q.data + row * c.q.stride;
    a.out = c.out.data + row * c.out.stride;
    args.rope.k = c.k.data + row * c.k.stride;
    args.rope.v = c.v.data + row * c.v.stride;
    if (c.prepared.codes != nullptr) {
      a.prepared.codes = c.prepared.codes + row * c.prepared.codes_stride;
      a.prepared.chunks = c.prepared.chunks + row * c.prepared.chunks_stride;
    }
    for (int64_t part = 0; part < parts.n; part += parts_at_once) {
      const int64_t n = std::min(parts_at_once, parts.n - part);
      a.first_part = static_cast<int32_t>(part);
      a.first_head = static_cast<int32_t>(parts.first_head(part));
      a.n_partial_heads = static_cast<int32_t>(parts.first_head(part + n)) - a.first_head;
      if (parts.size == 1) {
        launch_spans<1>(context, args, n);
      } else if (parts.size == 4) {
        launch_spans<4>(context, args, n);
      } else {
        launch_spans<kMaxGroup>(context, args, n);
      }
    }
  }
}

}  // namespace coreinfer::cuda
