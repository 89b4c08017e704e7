// Qwen2 and Qwen2.5 (biases on q, k, v) and Qwen3 (norms on the heads of q and k instead).
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

HyperParameters read_common(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  h.config.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  h.read_rope(RopeKind::kHalves);
  return h;
}

}  // namespace

ModelConfig read_qwen2(const GgufFile& file) {
  HyperParameters h = read_common(file);
  h.config.qkv_bias = Presence::kAlways;
  return h.config;
}

ModelConfig read_qwen3(const GgufFile& file) {
  HyperParameters h = read_common(file);
  h.config.qk_norm = Presence::kAlways;
  h.config.qkv_bias = Presence::kMaybe;
  h.config.attn_output_bias = Presence::kMaybe;
  return h.config;
}

}  // namespace coreinfer::arch
