// The Backend of one CUDA device (cpp/backend/backend.h): its operations as launches of the kernels
// of this folder, on one stream. Up to kExactRows rows wait in a list that becomes a CUDA graph
// (context.h); larger batches are issued at once. Only read, select, compact and KvCache::save
// wait for the device. One operation at a time: sessions that share a backend take turns.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <map>
#include <memory>

#include "backend/cuda_loader.h"
#include "context.h"
#include "gemm.h"
#include "matvec.h"
#include "weight.h"

namespace coreinfer::cuda {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& options);

  BackendInfo info() const override;

  BufferPtr allocate(int64_t n_floats) override;
  void read(const float* from, float* to_host, int64_t n) override;
  void write(const float* from_host, float* to, int64_t n) override;
  void copy(Rows from, Rows to) override;
  BufferPtr load_vector(const Mat& mat) override;
  uint64_t loaded_bytes(DType type, int64_t rows, int64_t cols) const override;
  WeightPtr load(const Mat& mat) override;
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
  // Rows prepared for weights of one kind of input; made at most once an operation.
  class Inputs;
  // What an operation left beside its rows for a matrix that they go into next; whatever comes
  // between may change them.
  struct Ready {
    Rows rows;  // no data: nothing
    PreparedRows prepared;
    Norm norm;  // after which
  };
  class Operation;

  std::shared_ptr<const CudaWeight> resident(const Mat& mat);
  const float* frequencies(const std::shared_ptr<const std::vector<float>>& host);
  int32_t* zeros(size_t n);
  PreparedRows room_for_ready(Memory& memory, int64_t width, bool values, bool codes);
  void exact_linear(Rows x, const Norm& norm, std::span<const Linear> linears,
                    const Ready& ready = {});
  void exact_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act, Rows h,
                    Rows act_gate, const Ready& ready = {});
  size_t own_memory() const;
  void check_limit() const;
  bool can_multiply(const Weight& weight) const;
  const float* dense_values(Rows x, const Norm& norm, int64_t* stride);

  CudaOptions options_;
  ContextPtr context_;
  std::unique_ptr<Gemm> gemm_;  // null: no cuBLAS
  std::string no_gemm_;         // why
  // By where the file has it: compaction gathers from what is on the device already.
  std::map<const void*, std::weak_ptr<const CudaWeight>> loaded_;
  // By address; the key keeps the address its own.
  std::map<std::shared_ptr<const std::vector<float>>, Memory> frequencies_;
  Ready ready_{};
  // Grown at first use and kept.
  Memory inputs_, attended_, normed_, hidden_, partials_, zeros_, choices_, raw_, token_rows_,
      selected_;
};

}  // namespace coreinfer::cuda
