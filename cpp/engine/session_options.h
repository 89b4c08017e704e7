// SessionOptions: how much text a session holds, and in which types. Flows in: what the caller asks
// for. Flows out: the same with defaults filled in and checked against the model, and the memory
// that it will take, which can so be known before there is a session.
#pragma once

#include <cstdint>
#include <string>

#include "backend/backend.h"
#include "model/config.h"

namespace coreinfer {

struct SessionOptions {
  int64_t n_ctx = 0;      // 0: what the model was trained for
  int64_t n_batch = 512;  // tokens that one prefill step takes
  KvType type_k = KvType::kF16;
  KvType type_v = KvType::kF16;
};
KvType kv_type_from_name(const std::string& name);

// n_ctx filled in, n_batch no larger. Throws kValue for what is out of range.
SessionOptions checked(const SessionOptions& options, const ModelConfig& config);

// Of checked options.
KvSpec kv_spec(const SessionOptions& options, const ModelConfig& config);
// The largest batch that a session gives the transformer.
int64_t max_rows(const SessionOptions& options);

struct SessionMemory {
  uint64_t cache = 0;      // keys and values when the context is full
  uint64_t workspace = 0;  // what every batch works in
  uint64_t counts = 0;     // neuron scores, core sets made of them, and FFN samples where kept
};
SessionMemory session_memory(const SessionOptions& options, const ModelConfig& config);

}  // namespace coreinfer
