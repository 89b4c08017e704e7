// SmolLM3: Llama without rope in every fourth layer.
#include "model/arch/arch.h"

namespace coreinfer::arch {
namespace {

constexpr size_t kNoRopeEvery = 4;

}  // namespace

ModelConfig read_smollm3(const GgufFile& file) {
  HyperParameters h(file);
  h.read_sizes();
  h.config.norm_eps = h.number("attention.layer_norm_rms_epsilon", 0.0);
  h.read_rope(RopeKind::kInterleaved, Presence::kNever);
  for (size_t i = kNoRopeEvery - 1; i < h.config.layers.size(); i += kNoRopeEvery) {
    h.config.layers[i].rope_freq = nullptr;
  }
  h.config.qkv_bias = h.config.attn_output_bias = h.config.ffn_bias = Presence::kMaybe;
  return h.config;
}

}  // namespace coreinfer::arch
