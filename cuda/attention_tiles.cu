// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>

#include "attention_spans.h"

namespace coreinfer::cuda {
namespace {

constexpr int kTile = 64;        // queries of a block, and positions at a time
constexpr int kTileSlice = 32;   // elements of queries and keys at a time
constexpr int kTileValues = 16;  // positions of values at a time
constexpr int kTileThreads = 256;
constexpr int kTileColumns = 64;  // columns of values for one float4 of each thread of a row

// A block has kTile queries, the rows of the heads that share a key-value head, and goes over the
// positions of a span with a running softmax. Thread (ty, tx) has queries 4 ty to 4 ty + 3; of the
// scores positions 4 tx to 4 tx + 3, of the result columns 4 tx to 4 tx + 3 of every 64.
// grid: (tiles, key-value heads, spans)
template <int kParts>
__global__ void __launch_bounds__(kTileThreads, kParts < 4 ? 2 : 1)
    tile_kernel(COREINFER_PARAMETER AttentionArgs a) {
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
  const int64_t base = first_position(a);
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
  const bool alone = a.n_spans == 1;  // no other span: nothing is left to be merged
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t of_tile = tile + ty * 4 + i;
    if (of_tile >= n_queries) continue;
    const int64_t row = of_tile / heads_each;
    const int head = kv_head * heads_each + static_cast<int>(of_tile % heads_each);
    float* to = alone ? a.out + row * a.out_stride + static_cast<int64_t>(head) * dim
                      : partial_of(a, row, head, blockIdx.z);
#pragma unroll
    for (int j = 0; j < kParts * 4; ++j) {
      const int column = j / 4 * kTileColumns + tx * 4 + j % 4;
      if (column < dim) to[column] = alone ? acc[i][j] / total[i] : acc[i][j];
    }
    if (!alone && tx == 0) {
      to[dim] = largest[i];
      to[dim + 1] = total[i];
    }
  }
}

template <int kParts>
void launch_tiles(Context& context, const AttentionArgs& a) {
  const int64_t tiles = divide_up<int64_t>(a.n_rows * (a.n_head / a.n_head_kv), kTile);
  context.launch(tile_kernel<kParts>,
                 dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(a.n_head_kv),
                      static_cast<unsigned>(a.n_spans)),
                 dim3(kTileThreads), 0, a);
}

}  // namespace

void choose_spans(const Context& context, const AttentionSpec& spec, int64_t n, int64_t end,
                  AttentionCall* call) {
  const int64_t tiles = divide_up<int64_t>(n * (spec.n_head / spec.n_head_kv), kTile);
  const int64_t idle =
      divide_up<int64_t>(2 * context.properties().multiProcessorCount, tiles * spec.n_head_kv);
  const auto room =
      static_cast<int64_t>(kPartialBytes / sizeof(float)) / partial_floats(spec, n, 1);
  const int64_t wanted = std::max<int64_t>(std::min(idle, room), 1);
  call->span = divide_up<int64_t>(divide_up<int64_t>(end, wanted), kSpan) * kSpan;
  call->n_spans = divide_up<int64_t>(end, call->span);
}

void attend_tiles(Context& context, const AttentionSpec& spec, const AttentionCall& c) {
  const AttentionArgs a = arguments(spec, c);
  if (a.head_dim <= 64) {
    launch_tiles<1>(context, a);
  } else if (a.head_dim <= 128) {
    launch_tiles<2>(context, a);
  } else {
    launch_tiles<4>(context, a);
  }
  if (a.n_spans > 1) merge_spans(context, a);
}

}  // namespace coreinfer::cuda
