// ModelConfig: every difference between the supported architectures, as data, so that there is one
// forward pass and no test of a name in it. Flows in: GGUF metadata, through model/arch. Flows out:
// checked hyperparameters. It holds no weights and no device memory.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace coreinfer {

// Whether the architecture's files carry a group of tensors.
enum class Presence { kNever, kMaybe, kAlways };

struct LayerConfig {
  int64_t window = 0;  // sliding attention window, own position included; 0: all positions
  // (rope_dim / 2) angles per position, scaling applied; null: no rope in this layer.
  std::shared_ptr<const std::vector<float>> rope_freq;
  std::shared_ptr<const std::vector<float>> rope_freq_long;  // null: there is one kind alone
};

struct ModelConfig {
  std::string architecture;  // GGUF's general.architecture

  int64_t n_layer = 0;
  int64_t n_embd = 0;
  int64_t n_ff = 0;
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  int64_t n_vocab = 0;
  int64_t n_ctx = 0;  // positions the model was trained for

  NormKind norm = NormKind::kRms;
  float norm_eps = 1e-5f;
  Activation activation;
  bool gated = true;
  bool fused_ffn = false;  // gate and up are one tensor in the file, the gate's rows first

  RopeKind rope = RopeKind::kNone;
  int64_t rope_dim = 0;
  float rope_scale = 1.0f;  // cos and sin are multiplied by it
  float attention_scale = 0.0f;
  float attention_softcap = 0.0f;  // 0: none
  float final_softcap = 0.0f;      // 0: none
  float logit_scale = 1.0f;        // logits are multiplied by it
  float embedding_scale = 1.0f;
  // Learned positions: table row of position p is p + position_offset; -1: none.
  int64_t position_offset = -1;

  Presence rope_factors = Presence::kNever;  // rope_freqs.weight, which is in rope_freq then
  // rope_factors_short.weight and rope_factors_long.weight, in rope_freq and rope_freq_long then.
  Presence long_rope_factors = Presence::kNever;
  // A session with a longer context than this takes rope_freq_long for all of its positions.
  int64_t short_rope_context = std::numeric_limits<int64_t>::max();
  Presence qkv_bias = Presence::kNever;
  Presence attn_output_bias = Presence::kNever;
  Presence ffn_bias = Presence::kNever;
  Presence norm_bias = Presence::kNever;  // of every norm but the head norms
  Presence pre_norm = Presence::kAlways;  // before attention and before the FFN
  Presence qk_norm = Presence::kNever;
  bool qk_norm_of_rows = false;           // over all heads together, not head by head
  Presence post_norm = Presence::kNever;  // after attention and after the FFN
  std::vector<LayerConfig> layers;

  bool has_long_rope() const { return long_rope_factors != Presence::kNever; }
  bool takes_long_rope(int64_t context) const { return context > short_rope_context; }
  int64_t n_embd_q() const { return n_head * head_dim; }
  int64_t n_embd_kv() const { return n_head_kv * head_dim; }
};

}  // namespace coreinfer
