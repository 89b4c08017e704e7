// Llama 1, 2 and 3.x (rope_freqs.weight carries Llama 3.1's scaling), Mistral, SmolLM.
#include "model/arch/arch.h"

namespace coreinfer::arch {

ModelConfig read_llama(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  h.config.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  h.read_rope(RopeKind::kInterleaved);
  h.config.qkv_bias = Presence::kMaybe;
  h.config.attn_output_bias = Presence::kMaybe;
  h.config.ffn_bias = Presence::kMaybe;
  return h.config;
}

}  // namespace coreinfer::arch
