// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>

#include "source_chunk.h"
#include "weight.h"

namespace coreinfer::cuda {
namespace {

constexpr size_t kPlaneAlign = 256;
constexpr int kThreads = 128;

size_t align(size_t n) { return (n + kPlaneAlign - 1) / kPlaneAlign * kPlaneAlign; }

dim3 grid_of(int64_t threads) {
  return dim3(static_cast<unsigned>(divide_up<int64_t>(threads, kThreads)));
}

// ---- From the file's blocks to planes

struct RepackArgs {
  const uint8_t* source;
  int64_t source_stride;
  int64_t first_row;  // of the matrix, of these rows
  int64_t rows;
  WeightView w;  // pointers may be written
  DType type;
  int32_t unused;
};

__global__ void repack(COREINFER_PARAMETER RepackArgs a) {
  begin_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i / a.w.n_chunks;
  const int64_t chunk = i % a.w.n_chunks;
  if (row >= a.rows) return;
  SourceChunk c;
  read_chunk(a.type, a.source + row * a.source_stride, chunk, &c);
  const int64_t to = a.first_row + row;
  const auto plane = [to](const uint8_t* base, int64_t stride) {
    return const_cast<uint8_t*>(base) + to * stride;
  };
  store_codes(a.w.codes, c.codes, plane(a.w.lo, a.w.lo_stride) + chunk * lo_bytes(a.w.codes),
              plane(a.w.hi, a.w.hi_stride) + chunk * hi_bytes(a.w.codes));
  uint8_t* meta = plane(a.w.meta, a.w.meta_stride);
  if (a.w.scales == Scales::kHalfPair) {
    reinterpret_cast<uint32_t*>(meta)[chunk] = c.scales.meta;
  } else {
    reinterpret_cast<uint16_t*>(meta)[chunk] = static_cast<uint16_t>(c.scales.meta);
  }
  if (super_bytes(a.w.scales) > 0 && chunk % 8 == 0) {
    reinterpret_cast<uint32_t*>(plane(a.w.super, a.w.super_stride))[chunk / 8] = c.scales.super;
  }
}

// ---- From the file's blocks to float32

struct SourceValuesArgs {
  const uint8_t* source;
  int64_t source_stride;
  int64_t rows;
  int64_t cols;
  float* out;
  int64_t out_stride;
  float scale;
  int32_t add;
  DType type;
  Format format;
};

__global__ void source_values(COREINFER_PARAMETER SourceValuesArgs a) {
  begin_kernel();
  const int64_t chunks = divide_up<int64_t>(a.cols, kChunk);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i / chunks;
  const int64_t chunk = i % chunks;
  if (row >= a.rows) return;
  const uint8_t* source = a.source + row * a.source_stride;
  const int n =
      static_cast<int>(a.cols - chunk * kChunk < kChunk ? a.cols - chunk * kChunk : kChunk);
  float values[kChunk];
  if (a.format.scales == Scales::kNone) {
    for (int e = 0; e < n; ++e) {
      const int64_t at = chunk * kChunk + e;
      if (a.type == DType::kF32) {
        values[e] =
            __uint_as_float(read_u16(source + 4 * at) | read_u16(source + 4 * at + 2) << 16);
      } else {
        const uint32_t bits = read_u16(source + 2 * at);
        values[e] = a.type == DType::kF16 ? half_to_float(static_cast<uint16_t>(bits))
                                          : brain_to_float(bits);
      }
    }
  } else {
    SourceChunk c;
    read_chunk(a.type, source, chunk, &c);
    const ChunkScales s = decode_scales(a.format.scales, c.scales);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      values[e] = value_of(a.format.codes, a.format.offset, s, e,
                           static_cast<uint8_t>(c.codes[e / 4] >> (8 * (e % 4))));
    }
  }
  float* out = a.out + row * a.out_stride + chunk * kChunk;
  for (int e = 0; e < n; ++e) out[e] = a.add ? out[e] + values[e] : a.scale * values[e];
}

// ---- From planes to float16 or float32

struct WeightValuesArgs {
  WeightView w;
  int64_t cols;
  int64_t first_row;
  int64_t rows;
  void* out;
  int64_t to_float;
};

constexpr int kRun = 8;  // values of a thread: 16 bytes of float16

// Codes of the run of eight in a chunk, four a word.
__device__ uint2 run_codes(const WeightView& w, int64_t row, int64_t chunk, int run) {
  const uint8_t* lo = w.lo + row * w.lo_stride + chunk * lo_bytes(w.codes);
  if (w.codes == Codes::k8) return reinterpret_cast<const uint2*>(lo)[run];
  uint2 c;
  if (lo_bytes(w.codes) == 16) {
    c = reinterpret_cast<const uint2*>(lo)[run % 2];
    const int shift = 4 * (run / 2);
    c = {(c.x >> shift) & 0x0f0f0f0fu, (c.y >> shift) & 0x0f0f0f0fu};
  } else {
    c = *reinterpret_cast<const uint2*>(lo);
    c = {(c.x >> (2 * run)) & 0x03030303u, (c.y >> (2 * run)) & 0x03030303u};
  }
  const uint8_t* hi = w.hi + row * w.hi_stride + chunk * hi_bytes(w.codes);
  if (hi_bytes(w.codes) == 4) {
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(hi) >> (2 * run);
    const int shift = w.codes == Codes::k5 ? 4 : 2;
    c.x |= (bits & 0x01010101u) << shift;
    c.y |= ((bits >> 1) & 0x01010101u) << shift;
  } else if (hi_bytes(w.codes) == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(hi);
    c.x |= ((bits.x >> (2 * run)) & 0x03030303u) << 4;
    c.y |= ((bits.y >> (2 * run)) & 0x03030303u) << 4;
  }
  return c;
}

// A thread eight values, neighbours beside each other: a warp writes without gaps.
__global__ void __launch_bounds__(kThreads) weight_values(COREINFER_PARAMETER WeightValuesArgs a) {
  begin_kernel();
  const int64_t runs = divide_up<int64_t>(a.cols, kRun);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i / runs;
  const int64_t column = i % runs * kRun;
  if (row >= a.rows) return;
  const int n = static_cast<int>(a.cols - column < kRun ? a.cols - column : kRun);
  float values[kRun];
  if (a.w.scales == Scales::kNone) {
    const uint8_t* lo = a.w.lo + (a.first_row + row) * a.w.lo_stride;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (e >= n) break;
      if (a.w.codes == Codes::kF32) {
        values[e] = reinterpret_cast<const float*>(lo)[column + e];
      } else {
        const uint16_t bits = reinterpret_cast<const uint16_t*>(lo)[column + e];
        values[e] = a.w.codes == Codes::kF16 ? half_to_float(bits) : brain_to_float(bits);
      }
    }
  } else {
    const int64_t chunk = column / kChunk;
    const int run = static_cast<int>(column % kChunk / kRun);
    const uint2 c = run_codes(a.w, a.first_row + row, chunk, run);
    const RawScales raw =
        load_scales(a.w.scales, row_of(a.w, a.first_row + row), static_cast<int>(chunk));
    const ChunkScales s = decode_scales(a.w.scales, raw);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      const auto code = static_cast<uint8_t>((e < 4 ? c.x : c.y) >> (8 * (e % 4)));
      values[e] = value_of(a.w.codes, a.w.offset, s, run * kRun + e, code);
    }
  }
  const int64_t to = row * a.cols + column;
  auto* floats = static_cast<float*>(a.out) + to;
  auto* halves = static_cast<uint16_t*>(a.out) + to;
  if (a.cols % kRun != 0) {  // rows that begin anywhere
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (e >= n) break;
      if (a.to_float != 0) {
        floats[e] = values[e];
      } else {
        halves[e] = float_to_half(values[e]);
      }
    }
  } else if (a.to_float != 0) {
    auto* out = reinterpret_cast<float4*>(floats);
    out[0] = {values[0], values[1], values[2], values[3]};
    out[1] = {values[4], values[5], values[6], values[7]};
  } else {
    const auto pair = [&values](int e) {
      return float_to_half(values[e]) | static_cast<unsigned>(float_to_half(values[e + 1])) << 16;
    };
    *reinterpret_cast<uint4*>(halves) = {pair(0), pair(2), pair(4), pair(6)};
  }
}

}  // namespace

PickedColumns pick_columns(int group, std::span<const int32_t> picks) {
  PickedColumns r;
  for (size_t i = 0; i < picks.size();) {
    const int32_t g = picks[i] / group;
    while (i < picks.size() && picks[i] / group == g) {
      r.steps.push_back(static_cast<uint16_t>(picks[i] / 16));
      for (int j = 0; j < kStep; ++j) {
        const bool here = i < picks.size() && picks[i] / group == g;
        r.source.push_back(here ? picks[i] : -1);
        r.input.push_back(here ? static_cast<int32_t>(i) : -1);
        i += here ? 1 : 0;
      }
    }
  }
  while (r.steps.size() % kStepsPerChunk != 0) {
    r.steps.push_back(r.steps.back());
    r.source.insert(r.source.end(), kStep, -1);
    r.input.insert(r.input.end(), kStep, -1);
  }
  return r;
}

int32_t chunks_of(DType type, int64_t cols) {
  const Format f = format_of(type);
  const int step = f.scales == Scales::kNone ? float_step(f.codes) : kChunk;
  return static_cast<int32_t>(divide_up<int64_t>(cols, step));
}

PlaneLayout layout_planes(DType type, int64_t rows, int64_t source_cols, int32_t n_chunks,
                          size_t offset, WeightView* view) {
  const Format f = format_of(type);
  *view = {};
  view->rows = rows;
  view->n_chunks = n_chunks;
  view->codes = f.codes;
  view->scales = f.scales;
  view->offset = f.offset;
  PlaneLayout at;
  const auto plane = [&](size_t* begin, int64_t* stride, int64_t bytes) {
    *begin = align(offset);
    *stride = bytes;
    offset = *begin + static_cast<size_t>(bytes * rows);
    at.bytes += static_cast<size_t>(bytes * rows);
  };
  if (f.scales == Scales::kNone) {
    plane(&at.lo, &view->lo_stride, int64_t{n_chunks} * 16);
  } else {
    const int64_t source_chunks = source_cols / kChunk;
    plane(&at.lo, &view->lo_stride, int64_t{n_chunks} * lo_bytes(f.codes));
    plane(&at.hi, &view->hi_stride, int64_t{n_chunks} * hi_bytes(f.codes));
    plane(&at.meta, &view->meta_stride, source_chunks * meta_bytes(f.scales));
    plane(&at.super, &view->super_stride, source_chunks / 8 * super_bytes(f.scales));
  }
  at.end = align(offset);
  return at;
}

void place(const PlaneLayout& layout, unsigned char* base, WeightView* view) {
  view->lo = base + layout.lo;
  if (view->scales == Scales::kNone) return;
  view->hi = base + layout.hi;
  view->meta = base + layout.meta;
  view->super = super_bytes(view->scales) > 0 ? base + layout.super : nullptr;
}

CudaWeight::~CudaWeight() {
  if (!loaded_) return;
  const Context::Lock lock(*context_);
  try {
    await();  // or the memory would go to other work while it is written
  } catch (const Error&) {
    // The device is of no use any more, and says so at the next call.
  }
}

void CudaWeight::await() const {
  context_->await(*loaded_);
  loaded_.reset();
}

namespace {

bool stays_as_it_is(const Mat& mat, const WeightView& view) {
  return view.scales == Scales::kNone && static_cast<int64_t>(mat.stride()) == view.lo_stride;
}

void load_planes(Context& context, const Mat& mat, const WeightView& view, unsigned char* memory,
                 Memory& raw, int64_t rows_a_piece) {
  const size_t row = mat.stride();
  cudaStream_t stream = context.begin_load();
  if (stays_as_it_is(mat, view)) return context.load_copy(memory, mat.data, mat.bytes());
  for (int64_t first = 0; first < mat.rows; first += rows_a_piece) {
    const int64_t rows = std::min(rows_a_piece, mat.rows - first);
    context.load_copy(raw.as<void>(), mat.row(first), static_cast<size_t>(rows) * row);
    if (view.scales == Scales::kNone) {
      unsigned char* to = memory + first * view.lo_stride;
      const auto pitch = static_cast<size_t>(view.lo_stride);
      COREINFER_CUDA_CHECK(cudaMemsetAsync(to, 0, pitch * static_cast<size_t>(rows), stream));
      COREINFER_CUDA_CHECK(cudaMemcpy2DAsync(to, pitch, raw.as<void>(), row, row,
                                             static_cast<size_t>(rows), cudaMemcpyDeviceToDevice,
                                             stream));
    } else {
      context.load_launch(
          repack, grid_of(rows * view.n_chunks), dim3(kThreads),
          {raw.as<uint8_t>(), static_cast<int64_t>(row), first, rows, view, mat.type, 0});
    }
  }
}

}  // namespace

std::shared_ptr<CudaWeight> load_weight(const ContextPtr& context, const Mat& mat, Memory* raw) {
  WeightView view;
  const PlaneLayout layout =
      layout_planes(mat.type, mat.rows, mat.cols, chunks_of(mat.type, mat.cols), 0, &view);
  auto memory = std::make_shared<Memory>(context, layout.end, "weights");
  place(layout, memory->as<unsigned char>(), &view);
  const auto rows_a_piece =
      std::min(mat.rows, static_cast<int64_t>(std::max<size_t>(1, kLoadPiece / mat.stride())));
  const size_t piece = static_cast<size_t>(rows_a_piece) * mat.stride();
  if (!stays_as_it_is(mat, view) && raw->size() < piece) {
    context->finish_loads();  // the smaller one may still be read
    raw->ensure(context, std::max(piece, kLoadPiece), "loading");
  }
  try {
    load_planes(*context, mat, view, memory->as<unsigned char>(), *raw, rows_a_piece);
    auto weight =
        std::make_shared<CudaWeight>(mat.type, mat.rows, mat.cols, layout.bytes, view, memory);
    weight->set_loading(context, context->end_load());
    return weight;
  } catch (const Error&) {
    context->finish_loads();
    throw;
  }
}

void dequantize_source(Context& context, DType type, const uint8_t* source, int64_t rows,
                       int64_t cols, float scale, bool add, float* out, int64_t out_stride) {
  context.launch(source_values, grid_of(rows * divide_up<int64_t>(cols, kChunk)), dim3(kThreads), 0,
                 {source, static_cast<int64_t>(row_bytes(type, cols)), rows, cols, out, out_stride,
                  scale, add ? 1 : 0, type, format_of(type)});
}

void dequantize_weight(Context& context, const WeightView& view, int64_t cols, int64_t begin,
                       int64_t rows, bool to_float, void* out) {
  context.launch(weight_values, grid_of(rows * divide_up<int64_t>(cols, kRun)), dim3(kThreads), 0,
                 {view, cols, begin, rows, out, to_float ? 1 : 0});
}

}  // namespace coreinfer::cuda
