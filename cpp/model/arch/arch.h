// The architectures that this library runs: one reader of hyperparameters each. A reader turns GGUF
// metadata into a ModelConfig or throws kGguf naming the key, what was expected and what was found.
#pragma once

#include <string>

#include "gguf/gguf_file.h"
#include "model/config.h"

namespace coreinfer {

// Reads and checks the configuration of a supported architecture; any other one is an error that
// names it.
ModelConfig read_config(const GgufFile& file);

// "llama, qwen2, ...", for messages.
std::string supported_architectures();

namespace arch {

// How the angles of rotary positions are scaled: all divided by `factor`, or, with YaRN, those of
// pairs that turn less than beta_slow times within the original context, while those that turn more
// than beta_fast times stay as they are, and between them there is a ramp.
struct RopeScaling {
  float factor = 1.0f;
  int64_t yarn_context = 0;  // positions of the original context; 0: no YaRN
  float beta_fast = 32.0f;
  float beta_slow = 1.0f;
};

// Metadata keys of one architecture, "llama.block_count" from key("block_count"), and the parts
// that all readers share.
class HyperParameters {
 public:
  explicit HyperParameters(const GgufFile& file);

  std::string key(const char* name) const { return config.architecture + "." + name; }
  // An integer in [low, high].
  int64_t integer(const char* name, int64_t low, int64_t high) const;
  int64_t integer_or(const char* name, int64_t fallback, int64_t low, int64_t high) const;
  // A finite number above `above`.
  float number(const char* name, double above) const;
  float number_or(const char* name, float fallback, double above) const;

  // n_layer, n_embd, n_ff, heads, head_dim, n_vocab, n_ctx, softcaps; refuses mixture-of-experts
  // files, and keys that ask for what no architecture here does.
  // `scales`: the architecture reads the factors of embeddings, scores, residuals and logits.
  void read_sizes(bool scales = false);
  // Inverse frequencies base^(-2i/rope_dim), scaled, divided by those in the tensor `divisors`
  // where one is named and the file has it.
  std::shared_ptr<const std::vector<float>> rope_frequencies(float base, const RopeScaling& scaling,
                                                             const char* divisors) const;
  // How many elements of a head are rotated, in which order, and the factor on cos and sin.
  void read_rope_shape(RopeKind kind);
  // The same and base, linear scaling, YaRN and Llama-3 factors, alike for all layers, which all
  // see the whole context.
  void read_rope(RopeKind kind, Presence factors = Presence::kMaybe);
  // Linear scaling; an error for kinds that are not supported, but `also`.
  RopeScaling linear_scaling(const char* also = "linear") const;
  // YaRN's, and its factor on cos and sin into the configuration.
  RopeScaling read_yarn(float base);

  const GgufFile& file;
  ModelConfig config;

 private:
  void refuse_unsupported(bool scales) const;
};

ModelConfig read_llama(const GgufFile& file);
ModelConfig read_qwen2(const GgufFile& file);
ModelConfig read_qwen3(const GgufFile& file);
ModelConfig read_gemma(const GgufFile& file);
ModelConfig read_gemma2(const GgufFile& file);
ModelConfig read_gemma3(const GgufFile& file);
ModelConfig read_phi3(const GgufFile& file);
ModelConfig read_granite(const GgufFile& file);
ModelConfig read_minicpm(const GgufFile& file);
ModelConfig read_smollm3(const GgufFile& file);
ModelConfig read_olmo2(const GgufFile& file);
ModelConfig read_opt(const GgufFile& file);

}  // namespace arch
}  // namespace coreinfer
