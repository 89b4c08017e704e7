// The Backend of the host CPU: coarse operations cut into rows for the kernels, which are chosen by
// instruction set, and dealt to one thread pool. Memory is ordinary host memory.
// One operation computes at a time: sessions that share a backend wait for each other, and the
// scratch below belongs to whoever holds the mutex. Two backends run side by side.
//
// cpu_backend.cpp: memory, norm, add; cpu_attend.cpp: attend; cpu_neurons.cpp: accumulate, select;
// cpu_linear.cpp: load, embed, linear, ffn_hidden; cpu_compact.cpp: compact.
#pragma once

#include <memory>
#include <mutex>

#include "backend/backend.h"
#include "backend/cpu_memory.h"
#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/isa.h"
#include "kernels/vector.h"

namespace coreinfer {

// The row function of an activation.
inline ActivateFn activation_kernel(const VectorKernels& kernels, const Activation& act) {
  return act.kind == Activation::kSilu       ? kernels.silu
         : act.kind == Activation::kGeluTanh ? kernels.gelu_tanh
         : act.both                          ? kernels.relu_both
                                             : kernels.relu;
}

// One row through a norm that has a weight; out may be x.
inline void norm_row(const VectorKernels& kernels, const Norm& norm, const float* x, int64_t n,
                     float* out) {
  if (norm.kind == NormKind::kRms) {
    kernels.rms_norm(x, norm.weight->data(), norm.eps, n, out);
  } else {
    kernels.layer_norm(x, norm.weight->data(), norm.bias ? norm.bias->data() : nullptr, norm.eps, n,
                       out);
  }
}

struct ColumnScratch;
struct LinearScratch;
struct AttendScratch;
struct NeuronScratch;

class CpuBackend final : public Backend {
 public:
  // `isa` is one of available_isas().
  CpuBackend(const CpuOptions& options, Isa isa);
  ~CpuBackend() override;

  BackendInfo info() const override;

  BufferPtr allocate(int64_t n_floats) override;
  void read(const float* from, float* to_host, int64_t n) override;
  void write(const float* from_host, float* to, int64_t n) override;
  void copy(Rows from, Rows to) override;
  BufferPtr load_vector(const Mat& mat) override;
  WeightPtr load(const Mat& mat) override;
  WeightPtr load_for_zeros(const Mat& mat) override;
  KvCachePtr make_kv_cache(const KvSpec& spec) override;

  void embed(std::span<const int32_t> tokens, const Mat& table, float scale, const Mat& positions,
             int64_t first_position, Rows out) override;
  void norm(Rows x, const Norm& norm, Rows out) override;
  void linear(Rows x, const Norm& norm, std::span<const Linear> linears) override;
  void ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act, Rows h,
                  Rows act_gate) override;
  void attend(const AttentionSpec& spec, Rows q, Rows k, Rows v, KvCache& cache, int64_t layer,
              int64_t first, Rows out) override;
  void add(Rows x, Rows y, const Norm& norm, const Norm& next) override;

  void accumulate(Statistic statistic, double alpha, Rows h, float* scores,
                  std::span<const ScoreMark> marks, int64_t first_row, float* bad) override;
  std::vector<std::vector<int32_t>> select(Rows scores, int64_t k) override;
  CompactWeights compact(std::span<const CompactSource> layers, Room* room) override;

 private:
  // Room for a core of `bytes`; the mutex is held.
  std::shared_ptr<AlignedBuffer> take_compact_memory(size_t bytes);

  CpuOptions options_;
  Isa isa_;
  WeightMemory weight_memory_;
  ThreadPool pool_;
  std::mutex mutex_;  // held by every operation that computes; guards the scratch
  // Grown at first use and kept; each is defined and made in the file of its operation, which is
  // why the pointers are shared ones (they may point to a type that is incomplete here).
  std::shared_ptr<LinearScratch> linear_scratch_;
  std::shared_ptr<ColumnScratch> column_scratch_;
  std::shared_ptr<AttendScratch> attend_scratch_;
  std::shared_ptr<NeuronScratch> neuron_scratch_;
  std::shared_ptr<AlignedBuffer> compact_memory_;  // of the last core, for the next
};

}  // namespace coreinfer
