// OPT: LayerNorm before each block, ReLU without a gate, biases everywhere, learned positions whose
// table starts two rows in, head tied to the embeddings. llama.cpp has no OPT; the names of keys
// and tensors are GGUF's usual ones.
#include "base/error.h"
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

constexpr int64_t kPositionOffset = 2;

}  // namespace

ModelConfig read_opt(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  ModelConfig& c = h.config;
  c.norm = NormKind::kLayer;
  c.norm_eps = h.number("attention.layer_norm_epsilon", 0.0);
  c.activation = {Activation::kRelu};
  c.gated = false;
  c.position_offset = kPositionOffset;
  c.qkv_bias = c.attn_output_bias = c.ffn_bias = c.norm_bias = Presence::kAlways;
  return c;
}

}  // namespace coreinfer::arch
