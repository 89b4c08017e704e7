// Phi-3, Phi-3.5 and Phi-4: gate and up in one tensor, as queries, keys and values, perhaps a part
// of each head rotated. Files for long contexts have two sets of frequency divisors (longrope).
// llama.cpp and this library take the long one where a session's context is above the original one,
// from its first token; Transformers once a text is.
#include "base/error.h"
#include "model/arch/arch.h"

namespace coreinfer::arch {

ModelConfig read_phi3(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  ModelConfig& c = h.config;
  c.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  c.fused_ffn = true;
  c.qkv_bias = Presence::kMaybe;

  h.read_rope_shape(RopeKind::kHalves);
  const float base = h.number_or("rope.freq_base", 10000.0f, 0.0);
  const char *short_name = "rope_factors_short.weight", *long_name = "rope_factors_long.weight";
  const bool named = file.metadata().maybe_string(h.key("rope.scaling.type")) == "longrope";
  const bool has_short = file.has(short_name), has_long = file.has(long_name);
  if ((named || has_short || has_long) && !(has_short && has_long)) {
    throw_error(ErrorKind::kGguf, "%s: %s is missing; longrope needs it and %s",
                file.path().c_str(), has_short ? long_name : short_name,
                has_short ? short_name : long_name);
  }
  const RopeScaling scaling = h.linear_scaling("longrope");
  LayerConfig layer;
  layer.rope_freq = h.rope_frequencies(base, scaling, short_name);
  if (has_long) {
    c.long_rope_factors = Presence::kAlways;
    c.short_rope_context = h.integer("rope.scaling.original_context_length", 1, int64_t{1} << 30);
    layer.rope_freq_long = h.rope_frequencies(base, scaling, long_name);
  }
  // llama.cpp passes the window over. Phi-3-mini-4k was trained with one of 2047, which
  // Transformers computes; where a file's is as long as its context it hides nothing.
  layer.window = h.integer_or("attention.sliding_window", 0, 0, int64_t{1} << 30);
  for (LayerConfig& each : c.layers) each = layer;
  return c;
}

}  // namespace coreinfer::arch
