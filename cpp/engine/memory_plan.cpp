#include "engine/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "base/error.h"
#include "model/weights.h"
#include "tensor/dtype.h"

namespace coreinfer {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
// What is not worth counting one by one: threads, tables, lists of tokens, the allocator's rest.
constexpr uint64_t kSmallThings = 8 * kMiB;
// Between two runs a process differs by less, so a figure from a message works in the next.
constexpr uint64_t kReserve = 2 * kMiB;

double mib(uint64_t bytes) { return static_cast<double>(bytes) / static_cast<double>(kMiB); }

}  // namespace

uint64_t core_weight_bytes(double share, uint64_t gate_and_up, uint64_t down, bool quantized) {
  const double down_share = std::min(1.0, share + (quantized && share > 0.0 ? 0.2 : 0.0));
  return static_cast<uint64_t>(share * static_cast<double>(gate_and_up) +
                               down_share * static_cast<double>(down));
}

MemoryPlan::MemoryPlan(const MemoryBudget& budget, const GgufFile& file, const ModelConfig& config,
                       const Backend& backend)
    : budget_(budget) {
  if (!limited()) return;
  const auto loaded = [&](const TensorInfo& info) {
    if (info.n_dims != 2) return info.nbytes;
    const Mat mat = file.mat(info);
    uint64_t bytes = 0;
    for (const int64_t rows : rows_of_matrices(info, config)) {
      bytes += backend.loaded_bytes(mat.type, rows, mat.cols);
    }
    return bytes;
  };
  const auto bytes_of = [&](const std::string& name) {
    const TensorInfo* info = file.find(name);
    return info != nullptr ? loaded(*info) : uint64_t{0};
  };
  for (int64_t i = budget.first_layer; i < config.n_layer; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    uint64_t gate = bytes_of(layer + "ffn_gate.weight");
    uint64_t up = bytes_of(layer + "ffn_up.weight");
    if (config.fused_ffn) gate = up /= 2;
    const TensorInfo* info = file.find(layer + "ffn_down.weight");
    const uint64_t down = info != nullptr ? loaded(*info) : 0;
    const bool quantized = info != nullptr && traits(file.mat(*info).type).quantized;
    ffn_bytes_ += gate + up + down;
    layer_bytes_ = std::max(layer_bytes_, gate + up + down);
    matrix_bytes_ = std::max({matrix_bytes_, gate, up, down});
    core_bytes_ += core_weight_bytes(budget.core_share, gate + up, down, quantized);
  }
  for (const TensorInfo& info : file.tensors()) {
    long long layer = -1;
    std::sscanf(info.name.c_str(), "blk.%lld.", &layer);
    if (budget.first_layer == 0 || layer >= budget.first_layer) other_bytes_ += loaded(info);
  }
  other_bytes_ -= ffn_bytes_;
  uint64_t embeddings = 0;
  if (budget.first_layer == 0) {
    embeddings = bytes_of("token_embd.weight") + bytes_of("position_embd.weight");
    other_bytes_ -= embeddings;
    head_bytes_ = bytes_of("output.weight");
    if (head_bytes_ == 0) {  // the embeddings again, copied
      head_bytes_ = bytes_of("token_embd.weight");
      other_bytes_ += head_bytes_;
    }
  }
  if (budget.file_pages) {
    embd_bytes_ = std::min(embeddings, ModelWeights::kEmbeddingBytes);
  } else {
    matrix_bytes_ = layer_bytes_;  // the next layer, while this one is computed with
  }
  ffn_resident_ =
      budget.dense != false && needed(true, budget.session, core_bytes_) <= budget.limit;
  if (budget.dense == true) {
    check_resident(
        "all FFN weights, which exact mode and an answer's dense beginning (start) need, this "
        "context and these core neurons: lower beta, n_ctx or n_batch, use a smaller cache type, "
        "or do without either");
  }
  if (!ffn_resident_ && budget.first_layer == 0) {  // a part must be: check_resident
    require(needed(false, budget.session, core_bytes_),
            "a layer's FFN at a time, this context and these core neurons: lower beta, n_ctx or "
            "n_batch, use a smaller cache type, or no patch");
  }
}

uint64_t MemoryPlan::needed(bool ffn_resident, const SessionMemory& session,
                            uint64_t core_bytes) const {
  const uint64_t counts = core_bytes > 0 ? session.counts : 0;
  const uint64_t run = embd_bytes_ + session.cache + session.workspace + counts + core_bytes;
  uint64_t most = other_bytes_ + run + layer_bytes_ + matrix_bytes_;
  if (ffn_resident) {
    // Compaction reads a layer of the file, loading a matrix; a GPU gathers from what it has.
    const uint64_t read = budget_.file_pages && core_bytes > 0 ? layer_bytes_ : 0;
    const uint64_t loading = budget_.file_pages ? matrix_bytes_ : 0;
    most = other_bytes_ + ffn_bytes_ + std::max(run + read, loading);
  }
  const uint64_t small = budget_.file_pages ? kSmallThings : 0;
  return budget_.process + small + std::max(most, 2 * head_bytes_);
}

void MemoryPlan::require(uint64_t needed, const char* for_what) const {
  if (!limited() || needed <= budget_.limit) return;
  throw_error(
      ErrorKind::kMemory,
      "%s is %.1f MiB, but %.0f MiB are needed for %s (%.1f), weights other than FFN (%.1f) "
      "and %s",
      budget_.name.c_str(), mib(budget_.limit), std::ceil(mib(needed + kReserve)),
      budget_.file_pages ? "the process" : "the GPU backend's own work", mib(budget_.process),
      mib(other_bytes_), for_what);
}

void MemoryPlan::check_resident(const char* what_to_do) const {
  if (!ffn_resident_) require(needed(true, budget_.session, core_bytes_), what_to_do);
}

void MemoryPlan::check_session(const SessionMemory& session) const {
  require(needed(ffn_resident_, session, core_bytes_),
          ffn_resident_ ? "all FFN weights and this context: lower n_ctx or n_batch, or use a "
                          "smaller cache type"
                        : "a layer's FFN at a time and this context: lower n_ctx or n_batch, or "
                          "use a smaller cache type");
}

bool MemoryPlan::fits_core(const SessionMemory& session, uint64_t core_bytes) const {
  return !limited() || needed(ffn_resident_, session, core_bytes) <= budget_.limit;
}

void MemoryPlan::check_core(const SessionMemory& session, uint64_t core_bytes) const {
  require(needed(ffn_resident_, session, core_bytes),
          ffn_resident_ ? "all FFN weights, this context and this core set: lower beta or n_ctx"
                        : "a layer's FFN at a time, this context and this core set: lower beta or "
                          "n_ctx");
}

}  // namespace coreinfer
