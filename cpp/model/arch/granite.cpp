// Granite 3.x and MiniCPM: Llama with embeddings, scores, residual branches and logits scaled by
// keys.
//
// What attention and feed-forward networks add is multiplied by residual_scale r. Divided by r, the
// residual stream is one to which they are added as they are; only RMSNorm sees it, which does not
// care but for its epsilon: x / sqrt(mean(x^2) + e) = (x / r) / sqrt(mean((x / r)^2) + e / r^2).
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

// A factor of the file's; 0 is none.
float factor_or(const HyperParameters& h, const char* name, float fallback) {
  constexpr double kBelowZero = -1e-30;
  const float factor = h.number_or(name, 0.0f, kBelowZero);
  return factor == 0.0f ? fallback : factor;
}

HyperParameters read_scaled(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes(true);
  ModelConfig& c = h.config;
  const float residual = factor_or(h, "residual_scale", 1.0f);
  c.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0) / (residual * residual);
  c.embedding_scale = factor_or(h, "embedding_scale", 1.0f) / residual;
  c.logit_scale = 1.0f / h.number("logit_scale", 0.0);
  c.attention_scale = factor_or(h, "attention.scale", c.attention_scale);
  h.read_rope(RopeKind::kInterleaved);
  c.qkv_bias = c.attn_output_bias = c.ffn_bias = Presence::kMaybe;
  return h;
}

}  // namespace

ModelConfig read_granite(const GgufFile& file) {
  HyperParameters h = read_scaled(file);
  // Here, and in Granite alone, the switch for rope.
  if (!file.metadata().maybe_boolean(h.key("rope.scaling.finetuned")).value_or(true)) {
    for (LayerConfig& layer : h.config.layers) layer.rope_freq = nullptr;
  }
  return h.config;
}

ModelConfig read_minicpm(const GgufFile& file) {
  const HyperParameters h = read_scaled(file);
  // Required: what llama.cpp takes for the factor of logits in files older than these keys is the
  // inverse of what files have now.
  for (const char* name : {"embedding_scale", "residual_scale"}) h.number(name, 0.0);
  return h.config;
}

}  // namespace coreinfer::arch
