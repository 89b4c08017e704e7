#include "backend/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu_kv_cache.h"
#include "base/aligned_buffer.h"
#include "base/error.h"
#include "kernels/dequantize.h"

namespace coreinfer {
namespace {

class CpuBuffer final : public Buffer {
 public:
  explicit CpuBuffer(int64_t n) : memory_(static_cast<size_t>(n) * sizeof(float)) {
    data_ = memory_.as<float>();
    size_ = n;
  }

 private:
  AlignedBuffer memory_;
};

// Rows of width elements below which a second thread costs more than it brings.
constexpr int64_t kWorthSharing = 8192;

// Calls fn(begin, end) for parts of [0, n) on the pool's threads, or once when there is too little.
template <typename Fn>
void share_rows(ThreadPool& pool, int64_t n, int64_t width, const Fn& fn) {
  if (n < 2 || n * width < kWorthSharing || pool.n_threads() == 1) return fn(int64_t{0}, n);
  pool.run([&](ThreadPool::Context& context) {
    const int64_t t = context.thread();
    fn(n * t / context.n_threads(), n * (t + 1) / context.n_threads());
  });
}

void check_same_shape(const char* operation, Rows a, Rows b) {
  if (a.n == b.n && a.width == b.width) return;
  throw_error(ErrorKind::kValue, "%s: rows of %lld x %lld and %lld x %lld, expected equal shapes",
              operation, static_cast<long long>(a.n), static_cast<long long>(a.width),
              static_cast<long long>(b.n), static_cast<long long>(b.width));
}

void check_norm(const char* operation, const Norm& norm, int64_t width) {
  const bool bias_fits = !norm.bias || norm.bias->size() == width;
  if (!norm.weight || (norm.weight->size() == width && bias_fits)) return;
  throw_error(ErrorKind::kValue, "%s: a norm of %lld elements on rows of %lld", operation,
              static_cast<long long>(norm.weight->size()), static_cast<long long>(width));
}

}  // namespace

CpuBackend::CpuBackend(const CpuOptions& options, Isa isa)
    : options_(options),
      isa_(isa),
      weight_memory_(options.memory_limited),
      pool_(options.n_threads == 0 ? ThreadPool::default_threads() : options.n_threads) {
  options_.n_threads = pool_.n_threads();
}

CpuBackend::~CpuBackend() = default;

BackendInfo CpuBackend::info() const {
  const std::string isa(isa_name(isa_));
  const int n = pool_.n_threads();
  return {"CPU", isa, n,
          format_string("CPU, %s, %d thread%s%s", isa.c_str(), n, n == 1 ? "" : "s",
                        options_.f32_activations ? ", float32 activations" : "")};
}

BufferPtr CpuBackend::allocate(int64_t n_floats) {
  if (n_floats < 0 || n_floats > (int64_t{1} << 44)) {
    throw_error(ErrorKind::kValue, "a buffer of %lld floats cannot be allocated",
                static_cast<long long>(n_floats));
  }
  return std::make_shared<CpuBuffer>(n_floats);
}

void CpuBackend::read(const float* from, float* to_host, int64_t n) {
  if (n > 0) std::memcpy(to_host, from, static_cast<size_t>(n) * sizeof(float));
}

void CpuBackend::write(const float* from_host, float* to, int64_t n) {
  if (n > 0) std::memcpy(to, from_host, static_cast<size_t>(n) * sizeof(float));
}

void CpuBackend::copy(Rows from, Rows to) {
  check_same_shape("copy", from, to);
  for (int64_t r = 0; r < from.n; ++r) {
    write(from.data + r * from.stride, to.data + r * to.stride, from.width);
  }
}

BufferPtr CpuBackend::load_vector(const Mat& mat) {
  BufferPtr buffer = allocate(mat.rows * mat.cols);
  for (int64_t r = 0; r < mat.rows; ++r) {
    dequantize_row(mat.type, mat.row(r), buffer->data() + r * mat.cols, mat.cols);
  }
  return buffer;
}

KvCachePtr CpuBackend::make_kv_cache(const KvSpec& spec) {
  return std::make_unique<CpuKvCache>(spec, isa_);
}

void CpuBackend::norm(Rows x, const Norm& norm, Rows out) {
  check_same_shape("norm", x, out);
  check_norm("norm", norm, x.width);
  const std::lock_guard<std::mutex> lock(mutex_);
  const VectorKernels& kernels = vector_kernels(isa_);
  share_rows(pool_, x.n, x.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = x.data + i * x.stride;
      float* to = out.data + i * out.stride;
      if (norm.weight) {
        norm_row(kernels, norm, from, x.width, to);
      } else if (to != from) {
        std::memcpy(to, from, static_cast<size_t>(x.width) * sizeof(float));
      }
    }
  });
}

void CpuBackend::add(Rows x, Rows y, const Norm& norm, const Norm& /*next*/) {
  check_same_shape("add", x, y);
  check_norm("add", norm, y.width);
  const std::lock_guard<std::mutex> lock(mutex_);
  const VectorKernels& kernels = vector_kernels(isa_);
  share_rows(pool_, x.n, x.width, [&](int64_t begin, int64_t end) {
    std::vector<float> normed(norm.weight ? static_cast<size_t>(y.width) : 0);
    for (int64_t i = begin; i < end; ++i) {
      const float* term = y.data + i * y.stride;
      if (norm.weight) {
        norm_row(kernels, norm, term, y.width, normed.data());
        term = normed.data();
      }
      kernels.add(x.data + i * x.stride, term, x.width);
    }
  });
}

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) {
  return std::make_unique<CpuBackend>(options, best_isa());
}

}  // namespace coreinfer
