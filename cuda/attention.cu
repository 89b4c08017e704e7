// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "attention.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxPairs = 128;  // head_dim / 2 at most

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

// ---- Rope and store

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
  for (int i = lane; i < a.pairs; i += kWarp) {
    float* p = a.interleaved != 0 ? x + 2 * i : x + i;
    float* r = a.interleaved != 0 ? x + 2 * i + 1 : x + i + a.pairs;
    const float u = *p, w = *r;
    *p = u * cos[i] - w * sin[i];
    *r = u * sin[i] + w * cos[i];
  }
  __syncwarp();
}

// A row of one head into the cache, by one warp.
__device__ void store_row(const KvPlane& plane, int head, int64_t head_dim, int64_t position,
                          const float* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* base = plane.data + head * plane.head_stride;
  const int64_t start = position * head_dim;
  for (int64_t i0 = 0; i0 < head_dim; i0 += kWarp) {
    const int64_t i = i0 + lane;
    const float value = i < head_dim ? x[i] : 0.0f;
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
  begin_kernel();
  __shared__ float cos[kMaxPairs], sin[kMaxPairs];
  const int64_t row = blockIdx.x;
  const int64_t position = (a.position != nullptr ? *a.position : a.first) + row;
  for (int i = static_cast<int>(threadIdx.x); i < a.pairs; i += kThreads) {
    // In double: at position 100,000 a float32 angle is off by hundredths of a radian.
    const double angle = static_cast<double>(position) * static_cast<double>(a.frequencies[i]);
    cos[i] = static_cast<float>(::cos(angle)) * a.rope_scale;
    sin[i] = static_cast<float>(::sin(angle)) * a.rope_scale;
  }
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

// ---- One span of one row, for some query heads of a key-value head

struct SpanArgs {
  const float* q;
  int64_t q_stride;
  KvPlane keys, values;
  const int32_t* position;
  int64_t first;
  int64_t window;
  float* partials;  // (row, head, span): head_dim sums, then maximum, then sum of weights
  int64_t n_spans;
  float scale, softcap;
  int32_t n_head, n_head_kv, head_dim;
  int32_t group_parts;  // blocks that share the query heads of a key-value head
};

__device__ __forceinline__ float* partial_of(float* partials, int64_t row, int n_head, int head,
                                             int64_t n_spans, int64_t span, int head_dim) {
  return partials + ((row * n_head + head) * n_spans + span) * (head_dim + 2);
}

// Positions [begin, end) of the span that a row at `position` sees, counted from the span's start.
__device__ __forceinline__ void visible(int64_t position, int64_t window, int64_t span, int* begin,
                                        int* end) {
  const int64_t start = span * kSpan;
  const int64_t last = position + 1 - start;
  const int64_t from = window == 0 ? 0 : position + 1 - window - start;
  *end = static_cast<int>(last > kSpan ? kSpan : last);
  *begin = static_cast<int>(from > 0 ? from : 0);
}

constexpr int kLanesPerPosition = 8;
constexpr int kPositionsAtOnce = kThreads / kLanesPerPosition;

// grid: (spans, key-value heads * group_parts, rows)
template <int kGroup>
__global__ void __launch_bounds__(kThreads) span_kernel(COREINFER_PARAMETER SpanArgs a) {
  begin_kernel();
  COREINFER_DYNAMIC_SHARED(memory);
  const int dim = a.head_dim;
  auto* q = reinterpret_cast<float*>(memory);  // (kGroup, dim)
  float* weights = q + kGroup * dim;           // (kGroup, kSpan)
  float* sums = weights + kGroup * kSpan;      // (kWarps, dim), a group at a time
  const int64_t span = blockIdx.x;
  const int64_t row = blockIdx.z;
  const int kv_head = static_cast<int>(blockIdx.y) / a.group_parts;
  const int part = static_cast<int>(blockIdx.y) % a.group_parts;
  const int heads_each = a.n_head / a.n_head_kv;
  const int head = kv_head * heads_each + part * kGroup;
  const int rest = heads_each - part * kGroup;
  const int n_group = rest < kGroup ? rest : kGroup;
  const int64_t position = (a.position != nullptr ? *a.position : a.first) + row;
  int begin, end;
  visible(position, a.window, span, &begin, &end);
  if (begin >= end) return;

  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < n_group * dim; i += kThreads) {
    q[i] = a.q[row * a.q_stride + static_cast<int64_t>(head) * dim + i] * a.scale;
  }
  __syncthreads();

  // Scores: eight lanes a position.
  const unsigned char* keys = a.keys.data + kv_head * a.keys.head_stride;
  const int sub = tid % kLanesPerPosition;
  for (int p0 = 0; p0 < kSpan; p0 += kPositionsAtOnce) {
    const int p = p0 + tid / kLanesPerPosition;
    const bool seen = p >= begin && p < end;
    float score[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) score[g] = 0.0f;
    if (seen) {
      for (int at = sub * 8; at < dim; at += kLanesPerPosition * 8) {
        float k[8];
        load8(a.keys, keys, dim, span * kSpan + p, at, k);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g >= n_group) break;
#pragma unroll
          for (int i = 0; i < 8; ++i) score[g] = fmaf(k[i], q[g * dim + at + i], score[g]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float s = score[g];
      s += __shfl_xor_sync(kAllLanes, s, 4);
      s += __shfl_xor_sync(kAllLanes, s, 2);
      s += __shfl_xor_sync(kAllLanes, s, 1);
      if (sub == 0 && g < n_group) {
        if (a.softcap > 0.0f) s = a.softcap * tanhf(s / a.softcap);
        weights[g * kSpan + p] = seen ? s : __int_as_float(static_cast<int>(0xff800000u));
      }
    }
  }
  __syncthreads();

  // Weights, maximum and sum: a warp a query head.
  const int lane = tid % kWarp;
  for (int g = tid / kWarp; g < n_group; g += kWarps) {
    float s[kSpan / kWarp];
    float largest = __int_as_float(static_cast<int>(0xff800000u));
    for (int i = 0; i < kSpan / kWarp; ++i) {
      s[i] = weights[g * kSpan + i * kWarp + lane];
      largest = s[i] > largest ? s[i] : largest;
    }
    largest = warp_max(largest);
    float total = 0.0f;
    for (int i = 0; i < kSpan / kWarp; ++i) {
      const int p = i * kWarp + lane;
      const float w = p >= begin && p < end ? expf(s[i] - largest) : 0.0f;
      weights[g * kSpan + p] = w;
      total += w;
    }
    total = warp_sum(total);
    if (lane == 0) {
      float* to = partial_of(a.partials, row, a.n_head, head + g, a.n_spans, span, dim);
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
    for (int p = (tid / kWarp) * at_once + lane / lanes_a_position; p < end;
         p += kWarps * at_once) {
      if (p < begin) continue;
      float v[8];
      load8(a.values, values, dim, span * kSpan + p, column * 8, v);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (g >= n_group) break;
        const float w = weights[g * kSpan + p];
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[g][i] = fmaf(w, v[i], acc[g][i]);
      }
    }
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
    float* to = partial_of(a.partials, row, a.n_head, head + g, a.n_spans, span, dim);
    for (int i = tid; i < dim; i += kThreads) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += sums[w * dim + i];
      to[i] = total;
    }
    __syncthreads();
  }
}

// ---- Spans of a row together

struct MergeArgs {
  float* partials;
  float* out;
  int64_t out_stride;
  const int32_t* position;
  int64_t first;
  int64_t window;
  int64_t n_spans;
  int64_t span;
  int32_t n_head, head_dim;
};

// grid: (rows, heads)
__global__ void merge_kernel(COREINFER_PARAMETER MergeArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t position = (a.position != nullptr ? *a.position : a.first) + row;
  const int64_t last = position / a.span;
  const int64_t oldest = a.window == 0 ? 0 : position + 1 - a.window;
  const int64_t start = oldest > 0 ? oldest / a.span : 0;
  const int dim = a.head_dim;
  const auto part = [&](int64_t span) {
    return partial_of(a.partials, row, a.n_head, head, a.n_spans, span, dim);
  };
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

void merge_spans(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  context.launch(merge_kernel,
                 dim3(static_cast<unsigned>(c.q.n), static_cast<unsigned>(spec.n_head)), dim3(64),
                 0,
                 {c.partials, c.out.data, c.out.stride, c.position, c.first, spec.window, c.n_spans,
                  c.span, static_cast<int32_t>(spec.n_head), static_cast<int32_t>(spec.head_dim)});
}

// ---- Tiles of many rows

constexpr int kTile = 64;        // queries of a block, and positions at a time
constexpr int kTileSlice = 32;   // elements of queries and keys at a time
constexpr int kTileValues = 16;  // positions of values at a time
constexpr int kTileThreads = 256;
constexpr int kTileColumns = 64;  // columns of values for one float4 of each thread of a row

struct TileArgs {
  const float* q;
  int64_t q_stride;
  int64_t n_rows;
  KvPlane keys, values;
  const int32_t* position;
  int64_t first;
  int64_t window;
  int64_t span, n_spans;
  float* partials;
  float* out;  // null: to partials
  int64_t out_stride;
  float scale, softcap;
  int32_t n_head, n_head_kv, head_dim;
};

// A block has kTile queries, the rows of the heads that share a key-value head, and goes over the
// positions of a span with a running softmax. Thread (ty, tx) has queries 4 ty to 4 ty + 3; of the
// scores positions 4 tx to 4 tx + 3, of the result columns 4 tx to 4 tx + 3 of every 64.
// grid: (tiles, key-value heads, spans)
template <int kParts>
__global__ void __launch_bounds__(kTileThreads, kParts < 4 ? 2 : 1)
    tile_kernel(COREINFER_PARAMETER TileArgs a) {
  begin_kernel();
  constexpr int kWidth = kParts * kTileColumns;  // head_dim with padding
  constexpr int kStaged =
      2 * kTileSlice * kTile > kTileValues * kWidth ? 2 * kTileSlice * kTile : kTileValues * kWidth;
  __shared__ float4 staged4[kStaged / 4];
  __shared__ float4 weights[kTile * kTile / 4];  // (position, four queries)
  auto* const staged = reinterpret_cast<float*>(staged4);
  float* const q_slice = staged;                       // (element, query)
  float* const k_slice = staged + kTileSlice * kTile;  // (element, position)
  const float none = __int_as_float(static_cast<int>(0xff800000u));

  const int dim = a.head_dim;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int heads_each = a.n_head / a.n_head_kv;
  const int64_t n_queries = a.n_rows * heads_each;
  // The last tiles see most: they start first.
  const int64_t tile = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * kTile;
  const int64_t n_here = n_queries - tile < kTile ? n_queries - tile : kTile;
  const int64_t base = a.position != nullptr ? *a.position : a.first;
  const int64_t first_position = base + tile / heads_each;
  const int64_t last_position = base + (tile + n_here - 1) / heads_each;
  const int64_t span_start = static_cast<int64_t>(blockIdx.z) * a.span;
  const int64_t oldest = a.window == 0 ? 0 : first_position + 1 - a.window;
  const int64_t begin = oldest > span_start ? oldest : span_start;
  const int64_t span_end = span_start + a.span;
  const int64_t end = last_position + 1 < span_end ? last_position + 1 : span_end;
  if (begin >= end) return;

  const int tid = static_cast<int>(threadIdx.x);
  const int tx = tid % 16, ty = tid / 16;
  int see_begin[4], see_end[4];  // positions are below 2^31
  float largest[4], total[4];
  float acc[4][kParts * 4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t query = tile + ty * 4 + i;
    const int64_t position = base + query / heads_each;
    const int64_t from = a.window == 0 ? 0 : position + 1 - a.window;
    see_begin[i] = static_cast<int>(from > begin ? from : begin);
    see_end[i] = query >= n_queries ? 0 : static_cast<int>(position < end ? position + 1 : end);
    largest[i] = none;
    total[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < kParts * 4; ++j) acc[i][j] = 0.0f;
  }
  const unsigned char* keys = a.keys.data + kv_head * a.keys.head_stride;
  const unsigned char* values = a.values.data + kv_head * a.values.head_stride;
  // What this thread stages of queries and keys: eight elements of one, in places that change with
  // the eighth, for the banks.
  const int of = tid / (kTileSlice / 8), part = tid % (kTileSlice / 8) * 8;
  const int64_t query = tile + of;
  const float* q = nullptr;
  if (of < n_here) {
    const int64_t head = static_cast<int64_t>(kv_head) * heads_each + query % heads_each;
    q = a.q + query / heads_each * a.q_stride + head * dim;
  }

  for (int64_t p0 = begin / kTile * kTile; p0 < end; p0 += kTile) {
    float s[4][4] = {};
    for (int slice = 0; slice < dim; slice += kTileSlice) {
      const int at = slice + part;
      const int64_t p = p0 + of;
      float u[8] = {}, k[8] = {};
      if (at < dim && q != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) u[i] = q[at + i] * a.scale;
      }
      if (at < dim && p >= begin && p < end) load8(a.keys, keys, dim, p, at, k);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q_slice[(part + i) * kTile + (of ^ part)] = u[i];
        k_slice[(part + i) * kTile + (of ^ part)] = k[i];
      }
      __syncthreads();
#pragma unroll 8
      for (int e = 0; e < kTileSlice; ++e) {
        const int turn = e / 8 * 8;
        const float4 u = *reinterpret_cast<const float4*>(q_slice + e * kTile + (ty * 4 ^ turn));
        const float4 w = *reinterpret_cast<const float4*>(k_slice + e * kTile + (tx * 4 ^ turn));
        const float of_q[4] = {u.x, u.y, u.z, u.w}, of_k[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) s[i][j] = fmaf(of_q[i], of_k[j], s[i][j]);
        }
      }
    }

    // The 16 threads of a query are half a warp.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float most = largest[i];
      bool seen[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int p = static_cast<int>(p0) + tx * 4 + j;
        seen[j] = p >= see_begin[i] && p < see_end[i];
        if (a.softcap > 0.0f) s[i][j] = a.softcap * tanhf(s[i][j] / a.softcap);
        if (seen[j]) most = s[i][j] > most ? s[i][j] : most;
      }
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, most, offset);
        most = other > most ? other : most;
      }
      const float shrink = largest[i] == none ? 0.0f : expf(largest[i] - most);
      largest[i] = most;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kParts * 4; ++j) acc[i][j] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = seen[j] ? expf(s[i][j] - most) : 0.0f;
        total[i] += s[i][j];
      }
    }
    // They change places with the position, for the banks.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weights[(tx * 4 + j) * (kTile / 4) + (ty ^ tx)] = {s[0][j], s[1][j], s[2][j], s[3][j]};
    }

    for (int v0 = 0; v0 < kTile && p0 + v0 < end; v0 += kTileValues) {
      __syncthreads();
      for (int i = tid * 8; i < kTileValues * kWidth; i += kTileThreads * 8) {
        const int column = i % kWidth;
        const int64_t p = p0 + v0 + i / kWidth;
        float v[8] = {};
        if (column < dim && p >= begin && p < end) load8(a.values, values, dim, p, column, v);
        auto* to = reinterpret_cast<float4*>(staged + i);
        to[0] = {v[0], v[1], v[2], v[3]};
        to[1] = {v[4], v[5], v[6], v[7]};
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kTileValues; ++k) {
        const int p = v0 + k;
        const float4 u = weights[p * (kTile / 4) + (ty ^ (p / 4))];
        const float w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int c = 0; c < kParts; ++c) {
          const float4 x =
              *reinterpret_cast<const float4*>(staged + k * kWidth + c * kTileColumns + tx * 4);
          const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (w[i] == 0.0f) continue;  // a NaN behind this query's position is not its own
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i][c * 4 + j] = fmaf(w[i], v[j], acc[i][c * 4 + j]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
      total[i] += __shfl_xor_sync(kAllLanes, total[i], offset);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t of_tile = tile + ty * 4 + i;
    if (of_tile >= n_queries) continue;
    const int64_t row = of_tile / heads_each;
    const int head = kv_head * heads_each + static_cast<int>(of_tile % heads_each);
    float* to = a.out != nullptr ? a.out + row * a.out_stride + static_cast<int64_t>(head) * dim
                                 : partial_of(a.partials, row, a.n_head, head, a.n_spans,
                                              static_cast<int64_t>(blockIdx.z), dim);
#pragma unroll
    for (int j = 0; j < kParts * 4; ++j) {
      const int column = j / 4 * kTileColumns + tx * 4 + j % 4;
      if (column < dim) to[column] = a.out != nullptr ? acc[i][j] / total[i] : acc[i][j];
    }
    if (a.out == nullptr && tx == 0) {
      to[dim] = largest[i];
      to[dim + 1] = total[i];
    }
  }
}

template <int kParts>
void launch_tiles(Context& context, const TileArgs& a) {
  const int64_t tiles = divide_up<int64_t>(a.n_rows * (a.n_head / a.n_head_kv), kTile);
  context.launch(tile_kernel<kParts>,
                 dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(a.n_head_kv),
                      static_cast<unsigned>(a.n_spans)),
                 dim3(kTileThreads), 0, a);
}

template <int kGroup>
void launch_spans(Context& context, const SpanArgs& args, int64_t n_rows) {
  SpanArgs a = args;
  a.group_parts = divide_up(a.n_head / a.n_head_kv, kGroup);
  const auto dim = static_cast<size_t>(a.head_dim);
  const size_t shared = (kGroup * (dim + kSpan) + kWarps * dim) * sizeof(float);
  context.launch(
      span_kernel<kGroup>,
      dim3(static_cast<unsigned>(a.n_spans), static_cast<unsigned>(a.n_head_kv * a.group_parts),
           static_cast<unsigned>(n_rows)),
      dim3(kThreads), shared, a);
}

}  // namespace

int64_t partial_floats(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans) {
  return n_rows * spec.n_head * n_spans * (spec.head_dim + 2);
}

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

void attend_rows(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  SpanArgs a{};
  a.q = c.q.data;
  a.q_stride = c.q.stride;
  a.keys = c.keys;
  a.values = c.values;
  a.position = c.position;
  a.first = c.first;
  a.window = spec.window;
  a.partials = c.partials;
  a.n_spans = c.n_spans;
  a.scale = spec.scale;
  a.softcap = spec.softcap;
  a.n_head = static_cast<int32_t>(spec.n_head);
  a.n_head_kv = static_cast<int32_t>(spec.n_head_kv);
  a.head_dim = static_cast<int32_t>(spec.head_dim);
  const int64_t group = spec.n_head / spec.n_head_kv;
  if (group == 1) {
    launch_spans<1>(context, a, c.q.n);
  } else if (group <= 4) {
    launch_spans<4>(context, a, c.q.n);
  } else {
    launch_spans<kMaxGroup>(context, a, c.q.n);
  }
  merge_spans(context, spec, c);
}

void choose_spans(const Context& context, const AttentionSpec& spec, int64_t n, int64_t end,
                  AttentionCall* call) {
  const int64_t tiles = divide_up<int64_t>(n * (spec.n_head / spec.n_head_kv), kTile);
  const int64_t wanted =
      divide_up<int64_t>(2 * context.properties().multiProcessorCount, tiles * spec.n_head_kv);
  call->span = divide_up<int64_t>(divide_up<int64_t>(end, wanted), kSpan) * kSpan;
  call->n_spans = divide_up<int64_t>(end, call->span);
}

void attend_tiles(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  TileArgs a{};
  a.q = c.q.data;
  a.q_stride = c.q.stride;
  a.n_rows = c.q.n;
  a.keys = c.keys;
  a.values = c.values;
  a.position = c.position;
  a.first = c.first;
  a.window = spec.window;
  a.span = c.span;
  a.n_spans = c.n_spans;
  a.partials = c.partials;
  a.out = c.n_spans == 1 ? c.out.data : nullptr;
  a.out_stride = c.out.stride;
  a.scale = spec.scale;
  a.softcap = spec.softcap;
  a.n_head = static_cast<int32_t>(spec.n_head);
  a.n_head_kv = static_cast<int32_t>(spec.n_head_kv);
  a.head_dim = static_cast<int32_t>(spec.head_dim);
  if (a.head_dim <= 64) {
    launch_tiles<1>(context, a);
  } else if (a.head_dim <= 128) {
    launch_tiles<2>(context, a);
  } else {
    launch_tiles<4>(context, a);
  }
  if (a.out == nullptr) merge_spans(context, spec, c);
}

}  // namespace coreinfer::cuda
