// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "prepare_chunk.h"

namespace coreinfer::cuda {
namespace {

constexpr int kMaxThreads = 1024;

struct NormArgs {
  const float* weight;  // null: no normalisation
  const float* bias;
  int64_t layer;  // 1: LayerNorm, 0: RMS
  double eps;
};

NormArgs norm_args(const Norm& norm) {
  return {norm.weight ? norm.weight->data() : nullptr, norm.bias ? norm.bias->data() : nullptr,
          norm.kind == NormKind::kLayer ? 1 : 0, static_cast<double>(norm.eps)};
}

// Normalised element i is (x[i] - mean) * inverse * weight[i] (+ bias[i]).
struct Moments {
  float mean;
  float inverse;
};

__device__ Moments moments_of(const NormArgs& norm, const float* x, int64_t width) {
  Moments m{0.0f, 1.0f};
  if (norm.weight == nullptr) return m;
  const auto n = static_cast<double>(width);
  if (norm.layer != 0) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum += x[i];
    m.mean = static_cast<float>(block_sum(sum) / n);
  }
  // Four at a time, so that they are under way together; what lies behind the end adds nothing.
  double squares = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < width; i += 4 * static_cast<int64_t>(blockDim.x)) {
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * static_cast<int64_t>(blockDim.x);
      v[j] = at < width ? x[at] : m.mean;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float centred = v[j] - m.mean;
      squares += static_cast<double>(centred) * centred;
    }
  }
  m.inverse = static_cast<float>(1.0 / sqrt(block_sum(squares) / n + norm.eps));
  return m;
}

// Asks for what a norm reads, while the kernel before still works.
__device__ void prefetch_norm(const NormArgs& norm, int64_t width) {
  if (norm.weight == nullptr) return;
  constexpr int64_t kStep = kLine / static_cast<int64_t>(sizeof(float));
  for (int64_t i = threadIdx.x * kStep; i < width; i += blockDim.x * kStep) {
    prefetch(norm.weight + i);
    if (norm.bias != nullptr) prefetch(norm.bias + i);
  }
}

__device__ float normalised(const NormArgs& norm, Moments m, float x, float weight, float bias) {
  if (norm.weight == nullptr) return x;
  const float v = (norm.layer != 0 ? x - m.mean : x) * m.inverse * weight;
  return norm.bias != nullptr ? v + bias : v;
}

// Columns of row `row`, in chunks: this thread's is `group`, and every n_groups-th after it.
__device__ __forceinline__ void prepare_columns(const NormArgs& norm, Moments m, const float* x,
                                                int64_t width, const int32_t* columns,
                                                int64_t n_columns, const PreparedRows& out,
                                                int64_t row, int64_t group, int64_t n_groups) {
  const int64_t n_chunks = divide_up<int64_t>(n_columns, kChunk);
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerChunk;
  // All lanes of a warp make the same number of turns.
#pragma unroll 1
  for (int64_t first = 0; first < n_chunks; first += n_groups) {
    const int64_t chunk = first + group;
    const int64_t column = chunk * kChunk + lane * 4;
    // All that is read first, so that it is under way together.
    int64_t from[4];
    float v[4] = {}, weight[4] = {}, bias[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      from[j] = column + j;
      if (column + j >= n_columns) {
        from[j] = -1;
      } else if (columns != nullptr) {
        from[j] = columns[column + j];
      }
      if (from[j] >= width) from[j] = -1;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (from[j] < 0) continue;
      v[j] = x[from[j]];
      if (norm.weight != nullptr) weight[j] = norm.weight[from[j]];
      if (norm.bias != nullptr) bias[j] = norm.bias[from[j]];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (from[j] >= 0) v[j] = normalised(norm, m, v[j], weight[j], bias[j]);
      if (out.values != nullptr && column + j < n_columns) {
        const_cast<float*>(out.values)[row * out.values_stride + column + j] = v[j];
      }
    }
    if (out.codes != nullptr) store_chunk(out, row, chunk, lane, v, chunk < n_chunks);
  }
}

struct PrepareArgs {
  const float* x;
  int64_t stride;
  int64_t width;
  NormArgs norm;
  const int32_t* columns;
  int64_t n_columns;
  PreparedRows out;
};

// grid: (rows, parts of a row)
__global__ void __launch_bounds__(kMaxThreads) prepare(COREINFER_PARAMETER PrepareArgs a) {
  let_next_start();
  prefetch_norm(a.norm, a.width);
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const float* x = a.x + row * a.stride;
  const Moments m = moments_of(a.norm, x, a.width);
  const int64_t thread = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  prepare_columns(a.norm, m, x, a.width, a.columns, a.n_columns, a.out, row,
                  thread / kLanesPerChunk,
                  static_cast<int64_t>(gridDim.y) * blockDim.x / kLanesPerChunk);
}

struct AddArgs {
  float* x;
  int64_t x_stride;
  const float* y;
  int64_t y_stride;
  int64_t width;
  NormArgs norm;
  NormArgs next;
  PreparedRows out;
};

// grid: (rows)
__global__ void __launch_bounds__(kMaxThreads) add_normalised(COREINFER_PARAMETER AddArgs a) {
  let_next_start();
  prefetch_norm(a.norm, a.width);
  if (a.out.values != nullptr) prefetch_norm(a.next, a.width);
  wait_for_previous();
  float* x = a.x + static_cast<int64_t>(blockIdx.x) * a.x_stride;
  const float* y = a.y + static_cast<int64_t>(blockIdx.x) * a.y_stride;
  const Moments m = moments_of(a.norm, y, a.width);
  for (int64_t i = threadIdx.x; i < a.width; i += blockDim.x) {
    const float weight = a.norm.weight != nullptr ? a.norm.weight[i] : 0.0f;
    const float bias = a.norm.bias != nullptr ? a.norm.bias[i] : 0.0f;
    x[i] += normalised(a.norm, m, y[i], weight, bias);
  }
  if (a.out.values == nullptr) return;
  const Moments of_sum = moments_of(a.next, x, a.width);  // of this thread's own elements
  __syncthreads();
  prepare_columns(a.next, of_sum, x, a.width, nullptr, divide_up<int64_t>(a.width, kChunk) * kChunk,
                  a.out, blockIdx.x, threadIdx.x / kLanesPerChunk, blockDim.x / kLanesPerChunk);
}

// Threads for a row: whole warps, four elements a thread.
unsigned threads_for(int64_t width) {
  const int64_t threads = divide_up<int64_t>(divide_up<int64_t>(width, 4), kWarp) * kWarp;
  return static_cast<unsigned>(threads > kMaxThreads ? kMaxThreads : threads);
}

}  // namespace

void prepare_rows(Context& context, Rows x, const Norm& norm, const int32_t* columns,
                  int64_t n_columns, const PreparedRows& out) {
  // Without a norm a row may be cut; with one, the block needs all of it.
  const bool whole = norm.weight != nullptr;
  const unsigned threads = whole ? threads_for(x.width) : 128;
  const int64_t parts = whole ? 1 : divide_up<int64_t>(n_columns, 4 * 128);
  context.launch(prepare, dim3(static_cast<unsigned>(x.n), static_cast<unsigned>(parts)),
                 dim3(threads), 0,
                 {x.data, x.stride, x.width, norm_args(norm), columns, n_columns, out});
}

void add_rows(Context& context, Rows x, Rows y, const Norm& norm, const Norm& next,
              const PreparedRows& out) {
  context.launch(
      add_normalised, dim3(static_cast<unsigned>(x.n)), dim3(threads_for(x.width)), 0,
      {x.data, x.stride, y.data, y.stride, x.width, norm_args(norm), norm_args(next), out});
}

}  // namespace coreinfer::cuda
