// Product: one call of matrix products on the CPU. Tokens come in as float32 rows; they are brought
// into the forms that the weights ask for (normalised; 8-bit codes; bf16 tiles), once for all
// weights of the call. Then threads claim units of one or two strips of 16 outputs, compute them
// for all tokens and hand the sums to the caller's Task. It adds no bias and writes no output; the
// Task must not write where the tokens lie.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/backend.h"
#include "backend/cpu_weight.h"
#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/linear_bf16.h"
#include "kernels/vector.h"

namespace coreinfer {

// Memory that the products of a backend share, one call at a time.
struct LinearScratch {
  AlignedBuffer inputs;   // the tokens in their forms
  AlignedBuffer threads;  // an equal part for each thread
};

// Strips that are computed and finished together.
struct ProductUnit {
  struct Part {
    size_t weight = 0;  // as numbered by Product::add
    int64_t strip = 0;
  };
  std::array<Part, 2> parts;
  int n_parts = 1;
};

class ProductTask {
 public:
  virtual ProductUnit unit(int64_t number) const = 0;
  // Before the products of one token: asks for the memory that finish() will read, which another
  // core may have written.
  virtual void expect(const ProductUnit&) const {}
  // tiles[part][t * 16 + r]: output 16 * strip + r of token first + t, for n tokens. The tiles may
  // be overwritten. Called by the thread that computed them.
  virtual void finish(const ProductUnit& unit, int64_t first, int64_t n,
                      float* const* tiles) const = 0;

 protected:
  ~ProductTask() = default;
};

class Product {
 public:
  static constexpr size_t kMaxWeights = 8;

  // `scratch` is made at first use.
  Product(Isa isa, bool f32_activations, ThreadPool& pool, std::shared_ptr<LinearScratch>& scratch,
          Rows x, const Norm& norm);

  // Registers a weight of x.width columns; returns its number.
  size_t add(const Weight* weight);

  // Computes units [0, n_units).
  void run(int64_t n_units, const ProductTask& task);

 private:
  // The tokens in one form.
  struct Input {
    const ColumnGroups* columns = nullptr;  // null: plain rows
    bool quantized = false;
    QuantizedRows codes;      // when quantized
    FloatRows values;         // when not; in packed order when columns are not dense
    bool in_scratch = false;  // `values` lie there, not where the caller keeps the tokens

    bool serves(const CpuWeight& w, bool quantize) const;
    bool rearranged() const { return !quantized && columns != nullptr && !columns->dense; }
  };

  struct Output {
    const CpuWeight* weight = nullptr;
    size_t input = 0;
  };

  bool has_norm() const { return norm_.weight != nullptr; }
  size_t row_bytes() const;
  size_t thread_bytes() const;
  void reserve();
  std::byte* thread_memory(const ThreadPool::Context& context) const;
  const float* normalise(int64_t token, float* row) const;
  void prepare(int64_t token, float* row, size_t copy) const;
  QuantizedRows codes_of(const Input& in, int64_t first, size_t copy) const;
  FloatRows values_of(const Input& in, int64_t first, size_t copy) const;
  void work(ThreadPool::Context& context, size_t copy, int64_t n_units,
            const ProductTask& task) const;
  void work_bf16(ThreadPool::Context& context, int64_t n_units, const ProductTask& task) const;
  void fill(const ProductUnit& unit, size_t copy, int64_t first, int64_t n, float* panel,
            float* const (&tiles)[2]) const;
  // A float matrix that few tokens are multiplied with row by row.
  bool read_by_rows(const CpuWeight& w) const;
  void tile(const ProductUnit::Part& part, size_t copy, int64_t first, int64_t n, float* panel,
            float* tile) const;
  void packed_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n, float* panel,
                   float* tile) const;
  void plain_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n, float* panel,
                  float* tile) const;
  void bf16_panel(const ProductUnit::Part& part, int64_t begin, int64_t end, uint16_t* panel) const;

  const LinearKernels& kernels_;
  const VectorKernels& vectors_;
  const Bf16Kernels* bf16_;  // null: not for this call
  bool f32_;
  ThreadPool& pool_;
  LinearScratch& scratch_;
  Rows x_;
  const Norm& norm_;
  // Copy `i` of whatever lies in scratch_.inputs is i * copy_bytes_ further on. For one token each
  // thread has its own: to prepare it twice is cheaper than to wait for each other.
  size_t copy_bytes_ = 0;
  bool copy_per_thread_;
  float* normed_ = nullptr;      // all tokens, where a weight reads them as they are
  uint16_t* rounded_ = nullptr;  // all tokens in bf16 tiles
  std::array<Input, 4> inputs_;
  std::array<Output, kMaxWeights> outputs_;
  size_t n_inputs_ = 0;
  size_t n_outputs_ = 0;
};

}  // namespace coreinfer
