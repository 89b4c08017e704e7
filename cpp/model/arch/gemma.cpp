// Gemma's text models: embeddings scaled by sqrt(n_embd), tanh-GELU. GGUF stores the norm weights
// with Gemma's +1 already added.
//   Gemma 2: a norm after each block, too, scores and logits capped, every other layer local
//     (sliding window).
//   Gemma 3: norms after each block and on the heads of q and k, five local layers with a rope base
//     of their own to one global layer.
// A file may have another pattern of local layers.
#include <cmath>
#include <utility>

#include "base/error.h"
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

constexpr float kRopeBase = 10000.0f;  // of Gemma 3 that of local layers
constexpr float kGlobalRopeBase = 1000000.0f;

// What differs between Gemma 2 and 3, as llama.cpp has it where a file does not say.
struct Windowed {
  int64_t window;
  int64_t global_every;
  int64_t layers_27b;  // the number of layers by which the 27B model is known
};
constexpr Windowed kGemma2{4096, 2, 46};
constexpr Windowed kGemma3{0, 6, 62};

// Which layers see the window alone: a flag for each, or a number of which every last one is global
// (1: all are; 0: none is).
std::vector<bool> local_layers(const HyperParameters& h, int64_t global_every) {
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
  const int64_t every = h.integer_or(name, global_every, 0, int64_t{1} << 30);
  for (int64_t i = 0; i < n_layer; ++i) local.push_back(every == 0 || (i + 1) % every != 0);
  return local;
}

HyperParameters read_common(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  h.config.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  h.config.activation = {Activation::kGeluTanh};
  h.config.embedding_scale = std::sqrt(static_cast<float>(h.config.n_embd));
  h.read_rope_shape(RopeKind::kHalves);
  return h;
}

// What Gemma 2 and 3 have in common, with their rope frequencies of global and local layers.
ModelConfig with_windows(HyperParameters h, const Windowed& kind,
                         std::shared_ptr<const std::vector<float>> global,
                         std::shared_ptr<const std::vector<float>> local) {
  ModelConfig& c = h.config;
  c.post_norm = Presence::kAlways;
  // The 27B models alone scale queries by n_embd / n_head instead of by the head's length.
  if (c.n_layer == kind.layers_27b) {
    c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.n_embd / c.n_head));
  }
  const int64_t window = h.integer_or("attention.sliding_window", kind.window, 0, int64_t{1} << 30);
  const std::vector<bool> slides = local_layers(h, kind.global_every);
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const bool is_local = window > 0 && slides[i];
    c.layers[i].window = is_local ? window : 0;
    c.layers[i].rope_freq = is_local ? local : global;
  }
  return c;
}

}  // namespace

ModelConfig read_gemma(const GgufFile& file) {
  HyperParameters h = read_common(file);
  h.read_rope(RopeKind::kHalves, Presence::kNever);
  return h.config;
}

ModelConfig read_gemma2(const GgufFile& file) {
  HyperParameters h = read_common(file);
  // Files older than these keys have the caps nevertheless.
  constexpr double kBelowZero = -1e-30;
  h.config.attention_softcap = h.number_or("attn_logit_softcapping", 50.0f, kBelowZero);
  h.config.final_softcap = h.number_or("final_logit_softcapping", 30.0f, kBelowZero);
  const float base = h.number_or("rope.freq_base", kRopeBase, 0.0);
  const RopeScaling scaling = h.linear_scaling();
  const auto global = h.rope_frequencies(base, scaling, nullptr);
  const float local_base = h.number_or("rope.freq_base_swa", base, 0.0);
  const auto local = h.rope_frequencies(local_base, scaling, nullptr);
  return with_windows(std::move(h), kGemma2, global, local);
}

ModelConfig read_gemma3(const GgufFile& file) {
  HyperParameters h = read_common(file);
  h.config.qk_norm = Presence::kAlways;
  h.config.qkv_bias = h.config.attn_output_bias = Presence::kMaybe;
  const float base = h.number_or("rope.freq_base", kGlobalRopeBase, 0.0);
  const auto global = h.rope_frequencies(base, h.linear_scaling(), nullptr);
  const float local_base = h.number_or("rope.freq_base_swa", kRopeBase, 0.0);
  const auto local = h.rope_frequencies(local_base, {}, nullptr);
  return with_windows(std::move(h), kGemma3, global, local);
}

}  // namespace coreinfer::arch
