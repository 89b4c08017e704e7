// Gemma 3 text models: five local layers (sliding window, own rope base) to one global layer,
// unless the file has another pattern, norms on the heads of q and k and after each block,
// embeddings scaled by sqrt(n_embd), tanh-GELU. GGUF stores the norm weights with Gemma's +1
// already added.
#include <cmath>

#include "base/error.h"
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

constexpr int64_t kGlobalEvery = 6;
constexpr float kGlobalRopeBase = 1000000.0f;
constexpr float kLocalRopeBase = 10000.0f;
constexpr int64_t kLayers27B = 62;

// Which layers see the window alone: a flag for each, or a number of which every last one is global
// (1: all are; 0: none is).
std::vector<bool> local_layers(const HyperParameters& h) {
  const int64_t n_layer = h.config.n_layer;
  const char* name = "attention.sliding_window_pattern";
  const std::string key = h.key(name);
  const Metadata& metadata = h.file.metadata();
  std::vector<bool> local;
  const auto entry = metadata.find(key);
  if (entry && entry->type == ValueType::kArray) {
    if (entry->element == ValueType::kBool) {
      local = metadata.booleans(key);
    } else {
      for (int64_t flag : metadata.integers(key)) local.push_back(flag != 0);
    }
    if (static_cast<int64_t>(local.size()) != n_layer) {
      throw_error(ErrorKind::kGguf, "%s: %s has %zu values, expected one for each of %lld layers",
                  h.file.path().c_str(), key.c_str(), local.size(),
                  static_cast<long long>(n_layer));
    }
    return local;
  }
  const int64_t every = h.integer_or(name, kGlobalEvery, 0, int64_t{1} << 30);
  for (int64_t i = 0; i < n_layer; ++i) local.push_back(every == 0 || (i + 1) % every != 0);
  return local;
}

}  // namespace

ModelConfig read_gemma3(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  ModelConfig& c = h.config;
  c.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  c.activation = {Activation::kGeluTanh};
  c.embedding_scale = std::sqrt(static_cast<float>(c.n_embd));
  c.qk_norm = Presence::kAlways;
  c.post_norm = Presence::kAlways;
  // The 27B model alone scales queries by its n_embd / n_head instead of by the head's length.
  if (c.n_layer == kLayers27B) {
    c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.n_embd / c.n_head));
  }

  h.read_rope_shape(RopeKind::kHalves);
  const float global_base = h.number_or("rope.freq_base", kGlobalRopeBase, 0.0);
  const auto global = h.rope_frequencies(global_base, h.rope_scaling_factor());
  const float local_base = h.number_or("rope.freq_base_swa", kLocalRopeBase, 0.0);
  const auto local = h.rope_frequencies(local_base, 1.0f);
  const int64_t window = h.integer_or("attention.sliding_window", 0, 0, int64_t{1} << 30);
  const std::vector<bool> slides = local_layers(h);
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const bool is_local = window > 0 && slides[i];
    c.layers[i].window = is_local ? window : 0;
    c.layers[i].rope_freq = is_local ? local : global;
  }
  return c;
}

}  // namespace coreinfer::arch
