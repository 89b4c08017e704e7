// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "gather.h"
#include "source_chunk.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 256;

struct RowsArgs {
  const uint8_t* from;
  uint8_t* to;
  const int32_t* rows;  // null: the same rows
  int64_t stride;
  int64_t n_rows;
};

template <typename Word>
__device__ void copy_row(const uint8_t* from, uint8_t* to, int64_t bytes) {
  const auto* source = reinterpret_cast<const Word*>(from);
  auto* target = reinterpret_cast<Word*>(to);
  for (int64_t i = threadIdx.x; i < bytes / static_cast<int64_t>(sizeof(Word)); i += kThreads) {
    target[i] = source[i];
  }
}

// grid: (rows)
__global__ void __launch_bounds__(kThreads) rows_kernel(COREINFER_PARAMETER RowsArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const uint8_t* from = a.from + (a.rows != nullptr ? a.rows[row] : row) * a.stride;
  uint8_t* to = a.to + row * a.stride;
  if (a.stride % 16 == 0) {
    copy_row<uint4>(from, to, a.stride);
  } else if (a.stride % 4 == 0) {
    copy_row<uint32_t>(from, to, a.stride);
  } else {
    copy_row<uint16_t>(from, to, a.stride);
  }
}

struct ColumnsArgs {
  WeightView from, to;
  const int32_t* columns;
  int64_t n_columns;
};

// grid: (rows, parts of a row)
template <typename Element>
__global__ void __launch_bounds__(kThreads) float_columns(COREINFER_PARAMETER ColumnsArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const auto* from = reinterpret_cast<const Element*>(a.from.lo + row * a.from.lo_stride);
  auto* to = reinterpret_cast<Element*>(const_cast<uint8_t*>(a.to.lo) + row * a.to.lo_stride);
  const int64_t n = a.to.lo_stride / static_cast<int64_t>(sizeof(Element));
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.y) * kThreads) {
    to[i] = i < a.n_columns ? from[a.columns[i]] : Element{};
  }
}

// A thread a chunk of `to`.
__global__ void __launch_bounds__(kThreads) code_columns(COREINFER_PARAMETER ColumnsArgs a) {
  begin_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / a.to.n_chunks;
  const int64_t chunk = i % a.to.n_chunks;
  if (row >= a.to.rows) return;
  const Codes kind = a.to.codes;
  const uint8_t* lo = a.from.lo + row * a.from.lo_stride;
  const uint8_t* hi = a.from.hi + row * a.from.hi_stride;
  uint32_t codes[kChunk / 4] = {};
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const int32_t column = a.columns[chunk * kChunk + e];
    if (column >= 0) {
      const uint32_t code = load_code(kind, lo + column / kChunk * lo_bytes(kind),
                                      hi + column / kChunk * hi_bytes(kind), column % kChunk);
      codes[e / 4] |= code << (8 * (e % 4));
    }
  }
  store_codes(kind, codes,
              const_cast<uint8_t*>(a.to.lo) + row * a.to.lo_stride + chunk * lo_bytes(kind),
              const_cast<uint8_t*>(a.to.hi) + row * a.to.hi_stride + chunk * hi_bytes(kind));
}

struct FloatsArgs {
  const float* from;
  const int32_t* indices;
  float* to;
  int64_t n;
};

__global__ void floats_kernel(COREINFER_PARAMETER FloatsArgs a) {
  begin_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < a.n) a.to[i] = a.from[a.indices[i]];
}

void copy_plane(Context& context, const uint8_t* from, const uint8_t* to, const int32_t* rows,
                int64_t stride, int64_t n_rows) {
  if (stride == 0 || from == nullptr) return;
  context.launch(rows_kernel, dim3(static_cast<unsigned>(n_rows)), dim3(kThreads), 0,
                 {from, const_cast<uint8_t*>(to), rows, stride, n_rows});
}

}  // namespace

void gather_rows(Context& context, const WeightView& from, const int32_t* rows,
                 const WeightView& to) {
  copy_plane(context, from.lo, to.lo, rows, from.lo_stride, to.rows);
  copy_plane(context, from.hi, to.hi, rows, from.hi_stride, to.rows);
  copy_plane(context, from.meta, to.meta, rows, from.meta_stride, to.rows);
  copy_plane(context, from.super, to.super, rows, from.super_stride, to.rows);
}

void gather_columns(Context& context, const WeightView& from, const int32_t* columns,
                    int64_t n_columns, const WeightView& to) {
  const ColumnsArgs args{from, to, columns, n_columns};
  if (to.scales == Scales::kNone) {
    const dim3 grid(static_cast<unsigned>(to.rows),
                    static_cast<unsigned>(divide_up<int64_t>(n_columns, 4 * kThreads)));
    context.launch(to.codes == Codes::kF32 ? float_columns<uint32_t> : float_columns<uint16_t>,
                   grid, dim3(kThreads), 0, args);
    return;
  }
  context.launch(code_columns,
                 dim3(static_cast<unsigned>(divide_up<int64_t>(to.rows * to.n_chunks, kThreads))),
                 dim3(kThreads), 0, args);
  copy_plane(context, from.meta, to.meta, nullptr, from.meta_stride, to.rows);
  copy_plane(context, from.super, to.super, nullptr, from.super_stride, to.rows);
}

void gather_floats(Context& context, const float* from, const int32_t* indices, int64_t n,
                   float* to) {
  context.launch(floats_kernel, dim3(static_cast<unsigned>(divide_up<int64_t>(n, kThreads))),
                 dim3(kThreads), 0, {from, indices, to, n});
}

}  // namespace coreinfer::cuda
