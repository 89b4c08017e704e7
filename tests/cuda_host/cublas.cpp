// The few functions of cuBLAS that cuda/gemm.cu calls, on the host and plainly: what it passes is
// what is tested, not speed. A library of its own, named by COREINFER_CUBLAS_LIBRARY.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "base/half.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };

float element(const void* p, int type, int64_t i) {
  if (type == 0) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == 2 ? coreinfer::f16_to_f32(bits) : coreinfer::bf16_to_f32(bits);
}

long handles = 0;

bool known(int type) { return type == 0 || type == 2 || type == 14; }

}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
  *handle = new cudaStream_t{};
  ++handles;
  return kSuccess;
}
EXPORT int cublasDestroy_v2(void* handle) {
  delete static_cast<cudaStream_t*>(handle);
  --handles;
  return kSuccess;
}
// For tests: how many there are.
EXPORT long cublas_host_handles() { return handles; }
EXPORT int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  *static_cast<cudaStream_t*>(handle) = stream;
  return kSuccess;
}
// CUBLAS_HOST_WORKSPACE=0: a library that refuses it.
EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) {
  const char* value = std::getenv("CUBLAS_HOST_WORKSPACE");
  return value != nullptr && *value == '0' ? kInvalidValue : kSuccess;
}
// Only scalars in device memory.
EXPORT int cublasSetPointerMode_v2(void*, int mode) { return mode == 1 ? kSuccess : kNotSupported; }

// c (m, n) = alpha a^T b + beta c, column-major: a (k, m), b (k, n).
EXPORT int cublasGemmEx(void* handle, int transa, int transb, int m, int n, int k,
                        const void* alpha, const void* a, int a_type, int lda, const void* b,
                        int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                        int compute_type, int) {
  if (transa != 1 || transb != 0 || c_type != 0 || compute_type != 68) return kNotSupported;
  if (a_type != b_type || !known(a_type)) return kNotSupported;
  if (lda < k || ldb < k || ldc < m) return kInvalidValue;
  cudaStream_t stream = *static_cast<cudaStream_t*>(handle);
  stream->finish(stream);
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < m; ++i) {
      float sum = 0.0f;
      for (int l = 0; l < k; ++l) {
        sum += element(a, a_type, int64_t{i} * lda + l) * element(b, b_type, int64_t{j} * ldb + l);
      }
      float& out = static_cast<float*>(c)[int64_t{j} * ldc + i];
      out = scale * sum + (keep == 0.0f ? 0.0f : keep * out);
    }
  }
  return kSuccess;
}
