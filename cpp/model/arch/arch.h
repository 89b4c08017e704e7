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
  // Inverse frequencies base^(-2i/rope_dim) / factor, divided by rope_freqs.weight where the
  // architecture may have it and the file does.
  std::shared_ptr<const std::vector<float>> rope_frequencies(float base, float factor) const;
  // How many elements of a head are rotated, and in which order.
  void read_rope_shape(RopeKind kind);
  // The same and base, linear scaling and Llama-3 factors, alike for all layers, which all see the
  // whole context.
  void read_rope(RopeKind kind, Presence factors = Presence::kMaybe);
  // The linear scaling factor (1: none); an error for kinds that are not supported.
  float rope_scaling_factor() const;

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
ModelConfig read_granite(const GgufFile& file);
ModelConfig read_minicpm(const GgufFile& file);
ModelConfig read_smollm3(const GgufFile& file);
ModelConfig read_olmo2(const GgufFile& file);
ModelConfig read_opt(const GgufFile& file);

}  // namespace arch
}  // namespace coreinfer
