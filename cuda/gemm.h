// Matrix products for batches of more than 16 rows, by cuBLAS with float32 sums. Its library is
// opened when the backend is made, so that nothing here links to it: half a gigabyte that a machine
// with PyTorch has already. Without it larger batches are cut into rows of matvec.h, and the
// backend's description says so.
//
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <memory>
#include <span>
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

  struct Product {
    const CudaWeight* weight;  // not picked
    Rows out;
    bool accumulate;
    bool exact;  // float32 throughout
  };
  // out = W x (+ out where accumulate) of each product, for n rows of x, padded as
  // PreparedRows::values. Weights and rows are rounded to float16 (BF16 weights: rows to bfloat16),
  // rows scaled by a power of two so that none overflows; once for all products.
  void multiply(std::span<const Product> products, const float* x, int64_t x_stride, int64_t n);

 private:
  struct Calls;
  // What the rows are multiplied as.
  struct Operand {
    const void* rows = nullptr;
    int64_t stride = 0;
    const float* alpha = nullptr;
  };
  Operand narrowed(bool brain, const float* x, int64_t x_stride, int64_t n, int64_t cols);
  void multiply(const Product& product, int type, const Operand& operand, int64_t n);
  Gemm(const ContextPtr& context, std::unique_ptr<Calls> calls, std::string library);
  void start();  // what may fail
  void check(int status, const char* call) const;

  ContextPtr context_;
  std::unique_ptr<Calls> calls_;
  std::string library_;
  void* handle_ = nullptr;
  Memory workspace_;  // cuBLAS's own
  Memory scalars_;    // float: alpha, 0, 1
  Memory largest_;    // int32 a row: bits of the largest |x|
  Memory rows_[2];    // x as float16, as bfloat16
  Memory tile_;       // dequantised rows of a weight
};

// out += bias, row by row.
void add_bias(Context& context, Rows out, const float* bias);

}  // namespace coreinfer::cuda
