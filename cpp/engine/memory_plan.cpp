#include "engine/memory_plan.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace coreinfer {
namespace {

double mib(uint64_t bytes) { return static_cast<double>(bytes) / (1024.0 * 1024.0); }

}  // namespace

MemoryPlan::MemoryPlan(uint64_t limit, uint64_t process_bytes, double core_share,
                       const GgufFile& file, const ModelConfig& config)
    : limit_(limit), process_bytes_(process_bytes) {
  if (limit == 0) return;
  uint64_t layer_bytes = 0, all_bytes = 0;
  for (int64_t i = 0; i < config.n_layer; ++i) {
    uint64_t bytes = 0;
    for (const char* name : {"ffn_gate", "ffn_up", "ffn_down"}) {
      const TensorInfo* info = file.find("blk." + std::to_string(i) + "." + name + ".weight");
      if (info != nullptr) bytes += info->nbytes;
    }
    layer_bytes = std::max(layer_bytes, bytes);
    ffn_bytes_ += bytes;
  }
  for (const TensorInfo& info : file.tensors()) all_bytes += info.nbytes;
  other_bytes_ = all_bytes - ffn_bytes_;
  staging_bytes_ = 2 * layer_bytes;
  const auto core_bytes = static_cast<uint64_t>(core_share * static_cast<double>(ffn_bytes_));
  ffn_resident_ = process_bytes_ + all_bytes + staging_bytes_ + core_bytes <= limit_;
  if (!ffn_resident_) {
    require(process_bytes_ + other_bytes_ + staging_bytes_,
            "attention and head weights and one layer's FFN at a time");
  }
}

void MemoryPlan::require(uint64_t needed, const char* for_what) const {
  if (limit_ == 0 || needed <= limit_) return;
  throw_error(
      ErrorKind::kMemory,
      "memory_limit is %.1f MiB, but %.1f MiB are needed for %s (process %.1f, weights other "
      "than FFN %.1f, FFN %.1f)",
      mib(limit_), mib(needed), for_what, mib(process_bytes_), mib(other_bytes_), mib(ffn_bytes_));
}

void MemoryPlan::check_session(uint64_t cache_bytes, uint64_t workspace_bytes) const {
  const uint64_t ffn = ffn_resident_ ? ffn_bytes_ : staging_bytes_;
  require(process_bytes_ + other_bytes_ + ffn + cache_bytes + workspace_bytes,
          "this context: lower n_ctx or n_batch, or use a smaller cache type");
}

uint64_t MemoryPlan::with_core(uint64_t cache_bytes, uint64_t workspace_bytes,
                               uint64_t core_bytes) const {
  const uint64_t ffn = ffn_resident_ ? ffn_bytes_ : staging_bytes_;
  return process_bytes_ + other_bytes_ + ffn + cache_bytes + workspace_bytes + core_bytes;
}

bool MemoryPlan::fits_core(uint64_t cache_bytes, uint64_t workspace_bytes,
                           uint64_t core_bytes) const {
  return limit_ == 0 || with_core(cache_bytes, workspace_bytes, core_bytes) <= limit_;
}

void MemoryPlan::check_core(uint64_t cache_bytes, uint64_t workspace_bytes,
                            uint64_t core_bytes) const {
  require(with_core(cache_bytes, workspace_bytes, core_bytes),
          "this core set: lower beta or n_ctx");
}

}  // namespace coreinfer
