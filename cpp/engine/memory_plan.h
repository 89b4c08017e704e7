// MemoryPlan: what a memory limit leaves room for. Flows in: the limit, what the process holds
// without the model, and the sizes of a model's parts and of the session to come. Flows out:
// whether dense FFN weights may stay resident, and an error that says what would be needed where a
// limit cannot be met. It allocates nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "backend/backend.h"
#include "engine/session_options.h"
#include "gguf/gguf_file.h"
#include "model/config.h"

namespace coreinfer {

// Bytes of a share of an FFN's neurons, at most: rows of gate and up are exact, columns of a
// quantised down projection keep their groups' scales, for which a fifth of its dense bytes is
// allowed.
uint64_t core_weight_bytes(double share, uint64_t gate_and_up, uint64_t down, bool quantized);

struct MemoryBudget {
  uint64_t limit = 0;       // bytes that may be resident; 0: no limit
  uint64_t process = 0;     // bytes that are, before the model is loaded; those a GPU backend needs
  bool file_pages = true;   // pages of the mapped model file count when they are read
  double core_share = 0.0;  // of the FFN weights that decoding will want beside the dense ones
  std::optional<bool> dense;  // the dense FFN weights must stay, or the limit is too low; must not
  SessionMemory session;      // of the session to come
  int64_t first_layer = 0;    // above 0: only this layer and all after it are here
  std::string name = "memory_limit";  // of the limit, in messages
};

class MemoryPlan {
 public:
  // Throws kMemory when not even the way of working that needs least would fit.
  MemoryPlan(const MemoryBudget& budget, const GgufFile& file, const ModelConfig& config,
             const Backend& backend);

  bool limited() const { return budget_.limit > 0; }
  const std::string& limit_name() const { return budget_.name; }  // in messages
  bool ffn_resident() const { return ffn_resident_; }
  // Throws kMemory, naming `what_to_do`, unless dense FFN weights may stay resident.
  void check_resident(const char* what_to_do) const;

  // Throws kMemory unless such a session fits beside the weights.
  void check_session(const SessionMemory& session) const;
  // Whether core weights of these bytes fit, too, also while the next prompt is read.
  bool fits_core(const SessionMemory& session, uint64_t core_bytes) const;
  // Throws kMemory unless they do.
  void check_core(const SessionMemory& session, uint64_t core_bytes) const;

 private:
  uint64_t needed(bool ffn_resident, const SessionMemory& session, uint64_t core_bytes) const;
  void require(uint64_t needed, const char* for_what) const;

  MemoryBudget budget_;
  uint64_t head_bytes_ = 0;    // the output matrix, which is loaded first
  uint64_t other_bytes_ = 0;   // weights that are not FFN, as computed with
  uint64_t embd_bytes_ = 0;    // pages of the embeddings in the file that are resident at a time
  uint64_t ffn_bytes_ = 0;     // all layers
  uint64_t layer_bytes_ = 0;   // FFN of the largest layer
  uint64_t matrix_bytes_ = 0;  // the largest matrix of an FFN
  uint64_t core_bytes_ = 0;    // of core_share
  bool ffn_resident_ = true;
};

}  // namespace coreinfer
