// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "gemm.h"

namespace coreinfer::cuda {
namespace {

// cuBLAS's own numbers (cublas_api.h, library_types.h), the same since version 11.
constexpr int kTransposed = 1, kPlain = 0, kPointersOnDevice = 1, kCompute32F = 68, kDefault = -1;
constexpr int kType32F = 0, kType16F = 2, kType16BF = 14;

constexpr size_t kWorkspace = size_t{32} << 20;
constexpr size_t kTile = size_t{128} << 20;  // bytes of dequantised weights at a time
constexpr int kThreads = 256;

enum Scalar { kAlpha, kZero, kOne, kScalars };

struct LargestArgs {
  const float* x;
  int64_t stride;
  int64_t width;
  int32_t* bits;  // a row
};

// grid: (rows)
__global__ void __launch_bounds__(kThreads) largest_kernel(COREINFER_PARAMETER LargestArgs a) {
  begin_kernel();
  const float* x = a.x + static_cast<int64_t>(blockIdx.x) * a.stride;
  int32_t bits = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    const int32_t b = __float_as_int(x[i]) & 0x7fffffff;
    bits = b > bits ? b : bits;
  }
  bits = block_max(bits);
  if (threadIdx.x == 0) a.bits[blockIdx.x] = bits;
}

struct NarrowArgs {
  const float* x;
  int64_t stride;
  int64_t width;
  uint16_t* out;
  int64_t out_stride;
  const int32_t* largest;  // a row; null: bfloat16, not scaled
  int64_t n_rows;
  float* alpha;  // receives what undoes the scale
};

// grid: (rows). float16: times the power of two that brings the largest |x| to [2^13, 2^14).
__global__ void __launch_bounds__(kThreads) narrow_kernel(COREINFER_PARAMETER NarrowArgs a) {
  begin_kernel();
  const float* x = a.x + static_cast<int64_t>(blockIdx.x) * a.stride;
  uint16_t* out = a.out + static_cast<int64_t>(blockIdx.x) * a.out_stride;
  if (a.largest == nullptr) {
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) out[i] = float_to_brain(x[i]);
    return;
  }
  int32_t largest = 0;
  for (int64_t r = threadIdx.x; r < a.n_rows; r += kThreads) {
    largest = a.largest[r] > largest ? a.largest[r] : largest;
  }
  const int exponent = (block_max(largest) >> 23) - 127;
  int shift = exponent < -126 || exponent > 127 ? 0 : 13 - exponent;
  shift = shift > 100 ? 100 : shift;
  const float scale = __int_as_float((127 + shift) << 23);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.alpha = __int_as_float((127 - shift) << 23);
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) out[i] = float_to_half(x[i] * scale);
}

struct BiasArgs {
  float* out;
  int64_t stride;
  int64_t width;
  const float* bias;
};

__global__ void __launch_bounds__(kThreads) bias_kernel(COREINFER_PARAMETER BiasArgs a) {
  begin_kernel();
  float* out = a.out + static_cast<int64_t>(blockIdx.x) * a.stride;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) out[i] += a.bias[i];
}

// Where wheels put it, seen from the folder of this library (site-packages/coreinfer).
std::vector<std::string> candidates() {
  std::vector<std::string> names;
  if (const char* given = std::getenv("COREINFER_CUBLAS_LIBRARY")) return {given};
  Dl_info info;
  static const int here = 0;
  if (dladdr(&here, &info) != 0 && info.dli_fname != nullptr) {
    const std::string path(info.dli_fname);
    const std::string site = path.substr(0, path.rfind('/') + 1) + "../nvidia/";
    names.push_back(site + "cu13/lib/libcublas.so.13");
    names.push_back(site + "cublas/lib/libcublas.so.12");
  }
  int version = 0;
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) {
    names.insert(names.begin(), "libcublas.so." + std::to_string(version / 1000));
  }
  return names;
}

}  // namespace

struct Gemm::Calls {
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, cudaStream_t stream);
  int (*set_workspace)(void* handle, void* workspace, size_t bytes);
  int (*set_pointer_mode)(void* handle, int mode);
  int (*gemm)(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
              const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
              const void* beta, void* c, int c_type, int ldc, int compute_type, int algo);
};

std::unique_ptr<Gemm> Gemm::open(const ContextPtr& context, std::string* why) {
  for (const std::string& name : candidates()) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      *why += (why->empty() ? "" : "; ") + std::string(dlerror());
      continue;
    }
    auto calls = std::make_unique<Calls>();
    bool found = true;
    const auto find = [&](auto* function, const char* symbol) {
      void* address = dlsym(library, symbol);
      found = found && address != nullptr;
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(address);
    };
    find(&calls->create, "cublasCreate_v2");
    find(&calls->destroy, "cublasDestroy_v2");
    find(&calls->set_stream, "cublasSetStream_v2");
    find(&calls->set_workspace, "cublasSetWorkspace_v2");
    find(&calls->set_pointer_mode, "cublasSetPointerMode_v2");
    find(&calls->gemm, "cublasGemmEx");
    if (found) {
      std::unique_ptr<Gemm> gemm(new Gemm(context, std::move(calls), name));
      gemm->start();
      return gemm;
    }
    *why += (why->empty() ? "" : "; ") + name + " lacks a function (older than version 11?)";
  }
  return nullptr;
}

Gemm::Gemm(const ContextPtr& context, std::unique_ptr<Calls> calls, std::string library)
    : context_(context), calls_(std::move(calls)), library_(std::move(library)) {}

void Gemm::start() {
  context_->use_device();
  check(calls_->create(&handle_), "cublasCreate");
  check(calls_->set_stream(handle_, context_->stream_for_copy()), "cublasSetStream");
  workspace_ = Memory(context_, kWorkspace, "cuBLAS workspace");
  check(calls_->set_workspace(handle_, workspace_.as<void>(), kWorkspace), "cublasSetWorkspace");
  check(calls_->set_pointer_mode(handle_, kPointersOnDevice), "cublasSetPointerMode");
  scalars_ = Memory(context_, kScalars * sizeof(float), "scalars");
  const float values[kScalars] = {1.0f, 0.0f, 1.0f};
  context_->copy_in(scalars_.as<void>(), values, sizeof(values));
}

size_t Gemm::own_memory() { return kWorkspace + kTile; }

Gemm::~Gemm() {
  const Context::Lock lock(*context_);
  context_->use_device();  // in whatever thread
  if (handle_ != nullptr) calls_->destroy(handle_);
}

void Gemm::check(int status, const char* call) const {
  if (status != 0) {
    throw_error(ErrorKind::kState, "%s failed with status %d (%s)", call, status, library_.c_str());
  }
}

Gemm::Operand Gemm::narrowed(bool brain, const float* x, int64_t x_stride, int64_t n,
                             int64_t cols) {
  const int64_t stride = divide_up<int64_t>(cols, 8) * 8;
  Memory& rows = rows_[brain ? 1 : 0];
  rows.ensure(context_, static_cast<size_t>(n * stride) * 2, "rows of a matrix product");
  auto* scalars = scalars_.as<float>();
  const dim3 grid(static_cast<unsigned>(n));
  const int32_t* largest = nullptr;
  if (!brain) {
    largest_.ensure(context_, static_cast<size_t>(n) * sizeof(int32_t), "largest of rows");
    context_->launch(largest_kernel, grid, dim3(kThreads), 0,
                     {x, x_stride, cols, largest_.as<int32_t>()});
    largest = largest_.as<int32_t>();
  }
  context_->launch(narrow_kernel, grid, dim3(kThreads), 0,
                   {x, x_stride, cols, rows.as<uint16_t>(), stride, largest, n, scalars + kAlpha});
  return {rows.as<void>(), stride, scalars + (brain ? kOne : kAlpha)};
}

void Gemm::multiply(std::span<const Product> products, const float* x, int64_t x_stride,
                    int64_t n) {
  context_->defer(false);
  Operand halves, brains;
  for (const Product& p : products) {
    const Codes codes = p.weight->view().codes;
    // bfloat16 products came with sm_80.
    if (p.exact || codes == Codes::kF32 ||
        (codes == Codes::kBF16 && context_->properties().major < 8)) {
      multiply(p, kType32F, {x, x_stride, scalars_.as<float>() + kOne}, n);
      continue;
    }
    const bool brain = codes == Codes::kBF16;
    Operand& operand = brain ? brains : halves;
    if (operand.rows == nullptr) operand = narrowed(brain, x, x_stride, n, p.weight->cols());
    multiply(p, brain ? kType16BF : kType16F, operand, n);
  }
}

void Gemm::multiply(const Product& p, int type, const Operand& operand, int64_t n) {
  const CudaWeight& weight = *p.weight;
  const WeightView& w = weight.view();
  const int64_t cols = weight.cols();
  const bool floats = type == kType32F;
  const bool in_place = floats              ? w.codes == Codes::kF32
                        : type == kType16BF ? w.codes == Codes::kBF16
                                            : w.codes == Codes::kF16;
  const size_t element = floats ? 4 : 2;
  const auto* scalars = scalars_.as<float>();
  const int64_t tile = in_place ? weight.rows()
                                : std::clamp<int64_t>(static_cast<int64_t>(kTile / element) / cols,
                                                      1, weight.rows());
  if (!in_place) {
    tile_.ensure(context_, static_cast<size_t>(tile * cols) * element, "dequantised weights");
  }
  for (int64_t first = 0; first < weight.rows(); first += tile) {
    const int64_t count = std::min(tile, weight.rows() - first);
    const void* matrix = w.lo + first * w.lo_stride;
    int64_t stride = w.lo_stride / static_cast<int64_t>(element);
    if (!in_place) {
      dequantize_weight(*context_, w, cols, first, count, floats, tile_.as<void>());
      matrix = tile_.as<void>();
      stride = cols;
    }
    context_->stream_for_copy();
    // Column-major: out^T (count, n) = matrix^T^T (count, cols) * rows^T (cols, n).
    check(
        calls_->gemm(handle_, kTransposed, kPlain, static_cast<int>(count), static_cast<int>(n),
                     static_cast<int>(cols), operand.alpha, matrix, type, static_cast<int>(stride),
                     operand.rows, type, static_cast<int>(operand.stride),
                     scalars + (p.accumulate ? kOne : kZero), p.out.data + first, kType32F,
                     static_cast<int>(p.out.stride), kCompute32F, kDefault),
        "cublasGemmEx");
  }
}

void add_bias(Context& context, Rows out, const float* bias) {
  context.launch(bias_kernel, dim3(static_cast<unsigned>(out.n)), dim3(kThreads), 0,
                 {out.data, out.stride, out.width, bias});
}

}  // namespace coreinfer::cuda
