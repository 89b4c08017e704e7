// OLMo 2: Llama with norms after attention and FFN instead of before them, and norms of all queries
// and of all keys of a token.
#include "model/arch/arch.h"

namespace coreinfer::arch {

ModelConfig read_olmo2(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  h.config.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  h.read_rope(RopeKind::kHalves, Presence::kNever);
  h.config.pre_norm = Presence::kNever;
  h.config.post_norm = h.config.qk_norm = Presence::kAlways;
  h.config.qk_norm_of_rows = true;
  return h.config;
}

}  // namespace coreinfer::arch
