#include "model/arch/arch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "gguf/byte_reader.h"
#include "model/activation.h"

namespace coreinfer {
namespace {

struct Architecture {
  const char* name;
  ModelConfig (*read)(const GgufFile&);
};

constexpr Architecture kArchitectures[] = {
    {"llama", arch::read_llama},     {"qwen2", arch::read_qwen2},
    {"qwen3", arch::read_qwen3},     {"gemma", arch::read_gemma},
    {"gemma2", arch::read_gemma2},   {"gemma3", arch::read_gemma3},
    {"phi3", arch::read_phi3},       {"granite", arch::read_granite},
    {"smollm3", arch::read_smollm3}, {"minicpm", arch::read_minicpm},
    {"olmo2", arch::read_olmo2},     {"opt", arch::read_opt},
};

// Above any real model and far below what would overflow a product of two.
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxContext = int64_t{1} << 26;

// Keys that change what is computed, in other architectures or in other programs' files, and the
// value with which they change nothing. Anything else would be computed wrongly.
struct Unsupported {
  const char* name;
  double neutral;
  bool scale = false;  // some architectures read it
};
constexpr Unsupported kUnsupported[] = {
    {"attention.causal", 1},
    {"attention.clamp_kqv", 0},
    {"attention.max_alibi_bias", 0},
    {"attention.output_scale", 1},
    {"attention.scale", 0, true},
    {"attention.shared_kv_layers", 0},
    {"attention.temperature_length", 0},
    {"attention.temperature_scale", 0},
    {"attention.value_scale", 1},
    {"embedding_scale", 1, true},
    {"logit_scale", 1, true},
    {"residual_scale", 1, true},
    {"rope.scaling.alpha", 0},
    {"use_parallel_residual", 0},
};

// A number or a flag; nothing for text and arrays.
std::optional<double> scalar(const Metadata& metadata, const std::string& key, ValueType type) {
  switch (type) {
    case ValueType::kString:
    case ValueType::kArray:
      return std::nullopt;
    case ValueType::kBool:
      return metadata.boolean(key) ? 1.0 : 0.0;
    case ValueType::kF32:
    case ValueType::kF64:
      return metadata.f32(key);
    default:
      return metadata.i32(key);
  }
}

// hidden_activation, which llama.cpp knows for other architectures, and what its "fatrelu" needs.
void read_activation(const GgufFile& file, ModelConfig& config) {
  const std::string key = config.architecture + ".hidden_activation";
  const std::string threshold = key + "_threshold";
  const Metadata& metadata = file.metadata();
  std::optional<std::string> name = metadata.maybe_string(key);
  if (name == "fatrelu") {
    const float above = metadata.f32(threshold);
    if (!std::isfinite(above) || above < 0.0f) {
      throw_error(ErrorKind::kGguf, "%s: %s is %g, expected a finite number of at least 0",
                  file.path().c_str(), threshold.c_str(), above);
    }
    name = format_string("fatrelu:%.9g", above);
  }
  if (!name) return;
  std::string expected;
  const std::optional<Activation> activation = activation_for(*name, config.gated, &expected);
  if (!activation) {
    throw_error(ErrorKind::kGguf, "%s: %s is \"%s\", which is not supported; expected one of %s",
                file.path().c_str(), key.c_str(), printable(*name).c_str(), expected.c_str());
  }
  config.activation = *activation;
}

// PowerInfer's files have this matrix transposed, and more tensors.
void refuse_powerinfer(const GgufFile& file) {
  if (!file.has("blk.0.ffn_down_t.weight")) return;
  throw_error(ErrorKind::kGguf,
              "%s: tensor blk.0.ffn_down_t.weight: a file for PowerInfer, which is not supported; "
              "convert the original model with tools/convert_hf_to_gguf.py",
              file.path().c_str());
}

}  // namespace

std::string supported_architectures() {
  std::string names;
  for (const Architecture& a : kArchitectures) {
    names += (names.empty() ? "" : ", ") + std::string(a.name);
  }
  return names;
}

ModelConfig read_config(const GgufFile& file) {
  refuse_powerinfer(file);
  const std::string name = file.metadata().string("general.architecture");
  for (const Architecture& a : kArchitectures) {
    if (name != a.name) continue;
    ModelConfig config = a.read(file);
    read_activation(file, config);
    return config;
  }
  throw_error(ErrorKind::kGguf, "%s: architecture \"%s\" is not supported; supported: %s",
              file.path().c_str(), name.c_str(), supported_architectures().c_str());
}

namespace arch {

HyperParameters::HyperParameters(const GgufFile& f) : file(f) {
  config.architecture = f.metadata().string("general.architecture");
}

int64_t HyperParameters::integer(const char* name, int64_t low, int64_t high) const {
  const std::string k = key(name);
  uint64_t value = 0;
  const auto entry = file.metadata().find(k);
  if (entry && entry->type == ValueType::kArray) {
    // Some files give one value a layer; this library needs the same everywhere.
    const std::vector<int64_t> values = file.metadata().integers(k);
    for (int64_t v : values) {
      if (v < 0 || v != values.front()) {
        throw_error(ErrorKind::kGguf, "%s: %s differs between layers, which is not supported",
                    file.path().c_str(), k.c_str());
      }
    }
    value = values.empty() ? 0 : static_cast<uint64_t>(values.front());
  } else {
    value = file.metadata().u64(k);
  }
  if (value < static_cast<uint64_t>(low) || value > static_cast<uint64_t>(high)) {
    throw_error(ErrorKind::kGguf, "%s: %s is %llu, expected %lld to %lld", file.path().c_str(),
                k.c_str(), static_cast<unsigned long long>(value), static_cast<long long>(low),
                static_cast<long long>(high));
  }
  return static_cast<int64_t>(value);
}

int64_t HyperParameters::integer_or(const char* name, int64_t fallback, int64_t low,
                                    int64_t high) const {
  return file.metadata().has(key(name)) ? integer(name, low, high) : fallback;
}

float HyperParameters::number(const char* name, double above) const {
  const std::string k = key(name);
  const float value = file.metadata().f32(k);
  if (!std::isfinite(value) || value <= above) {
    throw_error(ErrorKind::kGguf, "%s: %s is %g, expected a finite number above %g",
                file.path().c_str(), k.c_str(), value, above);
  }
  return value;
}

float HyperParameters::number_or(const char* name, float fallback, double above) const {
  return file.metadata().has(key(name)) ? number(name, above) : fallback;
}

void HyperParameters::refuse_unsupported(bool scales) const {
  for (const Unsupported& u : kUnsupported) {
    if (u.scale && scales) continue;
    const auto entry = file.metadata().find(key(u.name));
    if (!entry) continue;
    const std::optional<double> value = scalar(file.metadata(), key(u.name), entry->type);
    if (value == u.neutral) continue;
    throw_error(ErrorKind::kGguf,
                "%s: %s is %s, which is not supported; expected %g or no such key",
                file.path().c_str(), key(u.name).c_str(),
                value ? format_string("%g", *value).c_str() : "no number", u.neutral);
  }
}

void HyperParameters::read_sizes(bool scales) {
  ModelConfig& c = config;
  refuse_unsupported(scales);
  if (integer_or("expert_count", 0, 0, kMaxWidth) > 0) {
    throw_error(ErrorKind::kGguf,
                "%s: %s is above 0: mixture-of-experts models are not supported, only dense ones",
                file.path().c_str(), key("expert_count").c_str());
  }
  c.n_layer = integer("block_count", 1, kMaxLayers);
  c.n_embd = integer("embedding_length", 1, kMaxWidth);
  c.n_ff = integer("feed_forward_length", 1, kMaxWidth);
  c.n_head = integer("attention.head_count", 1, 65536);
  c.n_head_kv = integer_or("attention.head_count_kv", c.n_head, 1, 65536);
  if (c.n_head % c.n_head_kv != 0) {
    throw_error(ErrorKind::kGguf, "%s: %s is %lld, expected a multiple of head_count_kv (%lld)",
                file.path().c_str(), key("attention.head_count").c_str(),
                static_cast<long long>(c.n_head), static_cast<long long>(c.n_head_kv));
  }
  if (!file.metadata().has(key("attention.key_length")) && c.n_embd % c.n_head != 0) {
    throw_error(ErrorKind::kGguf, "%s: %s is %lld, expected a multiple of head_count (%lld)",
                file.path().c_str(), key("embedding_length").c_str(),
                static_cast<long long>(c.n_embd), static_cast<long long>(c.n_head));
  }
  c.head_dim = integer_or("attention.key_length", c.n_embd / c.n_head, 1, 65536);
  const int64_t value_length = integer_or("attention.value_length", c.head_dim, 1, 65536);
  if (value_length != c.head_dim) {
    throw_error(ErrorKind::kGguf, "%s: %s is %lld, expected the key length (%lld)",
                file.path().c_str(), key("attention.value_length").c_str(),
                static_cast<long long>(value_length), static_cast<long long>(c.head_dim));
  }
  if (c.n_head * c.head_dim > kMaxWidth) {
    throw_error(ErrorKind::kGguf, "%s: head_count x key_length is %lld, expected at most %lld",
                file.path().c_str(), static_cast<long long>(c.n_head * c.head_dim),
                static_cast<long long>(kMaxWidth));
  }
  c.n_ctx = integer("context_length", 1, kMaxContext);
  c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  constexpr double kBelowZero = -1e-30;  // 0 is allowed, and means none
  c.attention_softcap = number_or("attn_logit_softcapping", 0.0f, kBelowZero);
  c.final_softcap = number_or("final_logit_softcapping", 0.0f, kBelowZero);

  const Metadata& metadata = file.metadata();
  if (metadata.has("tokenizer.ggml.tokens")) {
    c.n_vocab = static_cast<int64_t>(metadata.array_size("tokenizer.ggml.tokens"));
  } else if (metadata.has(key("vocab_size"))) {
    c.n_vocab = integer("vocab_size", 1, int64_t{1} << 31);
  } else if (const TensorInfo* table = file.find("token_embd.weight")) {
    c.n_vocab = table->ne[1];
  }
  if (c.n_vocab < 1) {
    throw_error(ErrorKind::kGguf,
                "%s: no vocabulary size: expected tokenizer.ggml.tokens, %s or token_embd.weight",
                file.path().c_str(), key("vocab_size").c_str());
  }
  c.layers.resize(static_cast<size_t>(c.n_layer));
}

RopeScaling HyperParameters::linear_scaling(const char* also) const {
  const Metadata& metadata = file.metadata();
  const std::string type = metadata.maybe_string(key("rope.scaling.type")).value_or("linear");
  if (type == "none") return {};
  if (type != "linear" && type != also) {
    throw_error(
        ErrorKind::kGguf,
        "%s: %s is \"%s\", supported: \"none\", \"linear\" (and rope_freqs.weight), in phi3 "
        "\"longrope\", and \"yarn\" in all but gemma2, gemma3 and phi3",
        file.path().c_str(), key("rope.scaling.type").c_str(), type.c_str());
  }
  float factor = 0.0f;
  if (metadata.has(key("rope.scaling.factor"))) {
    factor = metadata.f32(key("rope.scaling.factor"));
  } else if (metadata.has(key("rope.scale_linear"))) {
    factor = metadata.f32(key("rope.scale_linear"));
  }
  if (!std::isfinite(factor) || factor < 0.0f) {
    throw_error(ErrorKind::kGguf, "%s: %s is %g, expected a finite number of at least 0",
                file.path().c_str(), key("rope.scaling.factor").c_str(), factor);
  }
  return {factor == 0.0f ? 1.0f : factor};
}

// What llama.cpp and Transformers both compute. llama.cpp reads the two betas and the logarithm's
// multiplier (Transformers' mscale_all_dim, with an mscale of 1) in some architectures only, and
// takes the defaults in llama and qwen; here the file's values hold, as in Transformers.
RopeScaling HyperParameters::read_yarn(float base) {
  RopeScaling s;
  s.factor = number("rope.scaling.factor", 0.0);
  s.yarn_context = integer_or("rope.scaling.original_context_length", config.n_ctx, 1, kMaxContext);
  s.beta_slow = number_or("rope.scaling.yarn_beta_slow", s.beta_slow, 0.0);
  s.beta_fast = number_or("rope.scaling.yarn_beta_fast", s.beta_fast, s.beta_slow);
  if (base <= 1.0f) {
    throw_error(ErrorKind::kGguf, "%s: %s is %g, expected a number above 1 for YaRN",
                file.path().c_str(), key("rope.freq_base").c_str(), base);
  }
  constexpr double kAny = -std::numeric_limits<double>::infinity();
  const float ramp = number_or("rope.scaling.yarn_ext_factor", 1.0f, kAny);
  if (ramp >= 0.0f && ramp != 1.0f) {  // below 0: not set
    throw_error(ErrorKind::kGguf, "%s: %s is %g, which is not supported; expected 1 or no such key",
                file.path().c_str(), key("rope.scaling.yarn_ext_factor").c_str(), ramp);
  }
  const auto magnitude = [&](double weight) {
    return s.factor > 1.0f ? 0.1 * weight * std::log(static_cast<double>(s.factor)) + 1.0 : 1.0;
  };
  const double multiplier = number_or("rope.scaling.yarn_log_multiplier", 0.0f, -1e-30);
  const double scale = magnitude(1.0) / magnitude(multiplier);
  // In Transformers this takes the place of the computed factor, in the paper's code it is
  // multiplied by it, and llama.cpp passes it over. Where these agree it changes nothing.
  const double replaced = number_or("rope.scaling.yarn_attn_factor", 1.0f, 0.0);
  if (replaced != 1.0 && std::abs(replaced / scale - 1.0) > 1e-4) {
    throw_error(ErrorKind::kGguf,
                "%s: %s is %g, which is not supported; expected 1, %g or no such key",
                file.path().c_str(), key("rope.scaling.yarn_attn_factor").c_str(), replaced, scale);
  }
  config.rope_scale *= static_cast<float>(scale);
  return s;
}

std::shared_ptr<const std::vector<float>> HyperParameters::rope_frequencies(
    float base, const RopeScaling& scaling, const char* divisors) const {
  const int64_t n = config.rope_dim / 2;
  // YaRN: pairs up to the first keep their frequency, from the last on it is divided.
  const auto pair_turning = [&](double times) {
    return static_cast<double>(n) *
           std::log(static_cast<double>(scaling.yarn_context) / (times * 2.0 * std::numbers::pi)) /
           std::log(static_cast<double>(base));
  };
  double first = 0.0, last = 0.0;
  if (scaling.yarn_context > 0) {
    first = std::max(0.0, std::floor(pair_turning(scaling.beta_fast)));
    last = std::min(static_cast<double>(config.rope_dim - 1),
                    std::ceil(pair_turning(scaling.beta_slow)));
    last = std::max(last, first + 0.001);
  }
  auto freq = std::make_shared<std::vector<float>>(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const double power = -2.0 * static_cast<double>(i) / static_cast<double>(config.rope_dim);
    const double own = std::pow(base, power);
    double divided = 1.0;
    if (scaling.yarn_context > 0) {
      divided = std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
    }
    (*freq)[static_cast<size_t>(i)] =
        static_cast<float>(own / scaling.factor * divided + own * (1.0 - divided));
  }
  if (divisors == nullptr) return freq;
  const Mat factors = file.maybe(divisors, {n});
  if (!factors.empty()) {
    if (factors.type != DType::kF32) {
      throw_error(ErrorKind::kGguf, "%s: %s is %s, expected F32", file.path().c_str(), divisors,
                  std::string(traits(factors.type).name).c_str());
    }
    const float* divisor = reinterpret_cast<const float*>(factors.data);
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(divisor[i]) || divisor[i] <= 0.0f) {
        throw_error(ErrorKind::kGguf, "%s: %s[%lld] is %g, expected a finite number above 0",
                    file.path().c_str(), divisors, static_cast<long long>(i), divisor[i]);
      }
      (*freq)[static_cast<size_t>(i)] /= divisor[i];
    }
  }
  return freq;
}

void HyperParameters::read_rope_shape(RopeKind kind) {
  config.rope = kind;
  config.rope_dim = integer_or("rope.dimension_count", config.head_dim, 2, config.head_dim);
  if (config.rope_dim % 2 != 0) {
    throw_error(ErrorKind::kGguf, "%s: %s is %lld, expected an even number", file.path().c_str(),
                key("rope.dimension_count").c_str(), static_cast<long long>(config.rope_dim));
  }
  config.rope_scale = number_or("rope.scaling.attn_factor", 1.0f, 0.0);
}

void HyperParameters::read_rope(RopeKind kind, Presence factors) {
  read_rope_shape(kind);
  const int64_t window = integer_or("attention.sliding_window", 0, 0, int64_t{1} << 30);
  if (window > 0 && window < config.n_ctx) {
    throw_error(ErrorKind::kGguf,
                "%s: %s is %lld, less than the context of %lld, and sliding windows are supported "
                "for gemma2, gemma3 and phi3 only",
                file.path().c_str(), key("attention.sliding_window").c_str(),
                static_cast<long long>(window), static_cast<long long>(config.n_ctx));
  }
  config.rope_factors = factors;
  const float base = number_or("rope.freq_base", 10000.0f, 0.0);
  const bool yarn = file.metadata().maybe_string(key("rope.scaling.type")) == "yarn";
  const char* const divisors = factors == Presence::kNever ? nullptr : "rope_freqs.weight";
  const auto freq = rope_frequencies(base, yarn ? read_yarn(base) : linear_scaling(), divisors);
  for (LayerConfig& layer : config.layers) layer.rope_freq = freq;
}

}  // namespace arch
}  // namespace coreinfer
