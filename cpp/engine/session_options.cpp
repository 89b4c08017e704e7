#include "engine/session_options.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "forward/transformer.h"

namespace coreinfer {
namespace {

constexpr int64_t kMaxBatch = 65536;

// Keys or values of a head are whole pages.
uint64_t head_bytes(KvType type, const KvSpec& kv) {
  int64_t row = kv.head_dim + 2 * ((kv.head_dim + 31) / 32);  // q8_0: codes and scales
  if (type == KvType::kF32) row = 4 * kv.head_dim;
  if (type == KvType::kF16) row = 2 * kv.head_dim;
  return static_cast<uint64_t>((kv.n_ctx * row + 4095) / 4096 * 4096);
}

}  // namespace

KvType kv_type_from_name(const std::string& name) {
  if (name == "f16") return KvType::kF16;
  if (name == "f32") return KvType::kF32;
  if (name == "q8_0") return KvType::kQ8_0;
  throw_error(ErrorKind::kValue, "cache type is \"%s\", expected f16, f32 or q8_0", name.c_str());
}

SessionOptions checked(const SessionOptions& options, const ModelConfig& config) {
  const int64_t n_ctx = options.n_ctx;
  if (n_ctx < 0 || n_ctx > (int64_t{1} << 26)) {
    throw_error(ErrorKind::kValue, "n_ctx is %lld, expected 0 (the model's %lld) to 67108864",
                static_cast<long long>(n_ctx), static_cast<long long>(config.n_ctx));
  }
  if (config.position_offset >= 0 && n_ctx > config.n_ctx) {
    throw_error(ErrorKind::kValue, "n_ctx is %lld, but this %s model has learned %lld positions",
                static_cast<long long>(n_ctx), config.architecture.c_str(),
                static_cast<long long>(config.n_ctx));
  }
  if (options.n_batch < 1 || options.n_batch > kMaxBatch) {
    throw_error(ErrorKind::kValue, "n_batch is %lld, expected 1 to %lld",
                static_cast<long long>(options.n_batch), static_cast<long long>(kMaxBatch));
  }
  SessionOptions result = options;
  if (n_ctx == 0) result.n_ctx = config.n_ctx;
  result.n_batch = std::min(options.n_batch, result.n_ctx);
  return result;
}

KvSpec kv_spec(const SessionOptions& options, const ModelConfig& config) {
  KvSpec kv;
  kv.type_k = options.type_k;
  kv.type_v = options.type_v;
  kv.n_layer = config.n_layer;
  kv.n_ctx = options.n_ctx;
  kv.row_width = config.n_embd_kv();
  kv.head_dim = config.head_dim;
  return kv;
}

int64_t max_rows(const SessionOptions& options) {
  return std::max(options.n_batch, std::min(kExactRows, options.n_ctx));
}

SessionMemory session_memory(const SessionOptions& options, const ModelConfig& config) {
  const KvSpec kv = kv_spec(options, config);
  SessionMemory memory;
  memory.cache = static_cast<uint64_t>(kv.n_layer * (kv.row_width / kv.head_dim)) *
                 (head_bytes(kv.type_k, kv) + head_bytes(kv.type_v, kv));
  memory.workspace = Transformer::workspace_bytes(config, max_rows(options));
  // Scores at every power of two and now; those of a selection, its indices, and their copies.
  const int64_t copies = std::bit_width(static_cast<uint64_t>(options.n_ctx)) + 5;
  // And a batch's weighted activations, and the weights of each layer.
  const int64_t rows = config.n_layer * (copies + 1) + max_rows(options);
  memory.counts = static_cast<uint64_t>(rows * config.n_ff) * sizeof(float);
  return memory;
}

}  // namespace coreinfer
