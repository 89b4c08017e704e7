// Matrix products for batches of more than 16 rows, by cuBLAS with float32 sums. Its library is
// opened when the backend is made, so that nothing here links to it: half a gigabyte that a machine
// with PyTorch has already. Without it larger batches are cut into rows of matvec.h, and the
// backend's description says so.
//
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"
#include "context.h"
#include "weight.h"

namespace coreinfer::cuda {

class Gemm {
 public:
  // Null where no cuBLAS is found; `why` then says what was tried.
  static std::unique_ptr<Gemm> open(const ContextPtr& context, std::string* why);
  ~Gemm();

  // Bytes that it takes beside the rows.
  static size_t own_memory();

  // out = W x (+ out where accumulate) for n rows of x, padded as PreparedRows::values; W not
  // picked. Weights and rows are rounded to float16 (BF16 weights: rows to bfloat16), rows scaled
  // by a power of two so that none overflows; `exact`: float32 throughout.
  void multiply(const CudaWeight& weight, const float* x, int64_t x_stride, int64_t n, Rows out,
                bool accumulate, bool exact);

 private:
  struct Calls;
  Gemm(const ContextPtr& context, std::unique_ptr<Calls> calls, std::string library);
  void check(int status, const char* call) const;

  ContextPtr context_;
  std::unique_ptr<Calls> calls_;
  std::string library_;
  void* handle_ = nullptr;
  Memory workspace_;  // cuBLAS's own
  Memory scalars_;    // float: alpha, 0, 1; int32: bits of the largest |x|
  Memory rows_;       // x in 16 bits
  Memory tile_;       // dequantised rows of a weight
};

// out += bias, row by row.
void add_bias(Context& context, Rows out, const float* bias);

}  // namespace coreinfer::cuda
