// Gemma 3 text models: five local layers (sliding window, own rope base) to one global layer, norms
// on the heads of q and k and after each block, embeddings scaled by sqrt(n_embd), tanh-GELU.
// GGUF stores the norm weights with Gemma's +1 already added.
#include <cmath>

#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

constexpr size_t kGlobalEvery = 6;
constexpr float kGlobalRopeBase = 1000000.0f;
constexpr float kLocalRopeBase = 10000.0f;
constexpr int64_t kLayers27B = 62;

}  // namespace

ModelConfig read_gemma3(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  ModelConfig& c = h.config;
  c.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  c.activation = Activation::kGeluTanh;
  c.embedding_scale = std::sqrt(static_cast<float>(c.n_embd));
  c.qk_norm = Presence::kAlways;
  c.post_norm = Presence::kAlways;
  c.final_softcap = h.number_or("final_logit_softcapping", 0.0f, -1e-30);
  // The 27B model alone scales queries by its n_embd / n_head instead of by the head's length.
  if (c.n_layer == kLayers27B) {
    c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.n_embd / c.n_head));
  }

  h.read_rope_shape(RopeKind::kHalves);
  const float global_base = h.number_or("rope.freq_base", kGlobalRopeBase, 0.0);
  const auto global = h.rope_frequencies(global_base, h.rope_scaling_factor(), false);
  const float local_base = h.number_or("rope.freq_base_swa", kLocalRopeBase, 0.0);
  const auto local = h.rope_frequencies(local_base, 1.0f, false);
  const int64_t window = h.integer_or("attention.sliding_window", 0, 0, int64_t{1} << 30);
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const bool is_local = window > 0 && i % kGlobalEvery != kGlobalEvery - 1;
    c.layers[i].window = is_local ? window : 0;
    c.layers[i].rope_freq = is_local ? local : global;
  }
  return c;
}

}  // namespace coreinfer::arch
