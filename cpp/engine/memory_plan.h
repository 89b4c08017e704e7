// MemoryPlan: what a memory limit leaves room for. Flows in: the limit and the sizes of a model's
// parts. Flows out: whether dense FFN weights may stay resident, and an error that says what would
// be needed where a limit cannot be met. It allocates nothing.
#pragma once

#include <cstdint>

#include "gguf/gguf_file.h"
#include "model/config.h"

namespace coreinfer {

class MemoryPlan {
 public:
  // limit: bytes that this process may hold resident, 0 for none. process_bytes: what it holds
  // before the model is loaded. core_share: of FFN weights that decoding will want beside the dense
  // ones. Throws kMemory when not even the parts that every way of working
  // needs would fit.
  MemoryPlan(uint64_t limit, uint64_t process_bytes, double core_share, const GgufFile& file,
             const ModelConfig& config);

  uint64_t limit() const { return limit_; }
  bool ffn_resident() const { return ffn_resident_; }

  // Throws kMemory unless a session of this cache and working memory fits beside the weights.
  void check_session(uint64_t cache_bytes, uint64_t workspace_bytes) const;
  // Whether core weights of these bytes fit, too, also while the next prompt is read.
  bool fits_core(uint64_t cache_bytes, uint64_t workspace_bytes, uint64_t core_bytes) const;
  // Throws kMemory unless they do.
  void check_core(uint64_t cache_bytes, uint64_t workspace_bytes, uint64_t core_bytes) const;

 private:
  uint64_t with_core(uint64_t cache_bytes, uint64_t workspace_bytes, uint64_t core_bytes) const;
  void require(uint64_t needed, const char* for_what) const;

  uint64_t limit_ = 0;
  uint64_t process_bytes_ = 0;
  uint64_t other_bytes_ = 0;  // weights that are not FFN, as computed with
  uint64_t ffn_bytes_ = 0;    // all layers
  uint64_t staging_bytes_ =
      0;  // the largest layer's FFN, packed, and the file pages it is made from
  bool ffn_resident_ = true;
};

}  // namespace coreinfer
