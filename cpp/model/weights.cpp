#include "model/weights.h"

#include <set>
#include <string>

#include "base/error.h"

namespace coreinfer {
namespace {

// Asks for tensors by name and shape, and remembers what was asked for: a tensor that nobody wanted
// means that the file is another model than its architecture says, and would be computed wrongly.
class Loader {
 public:
  Loader(const GgufFile& file, const ModelConfig& config, Backend& backend)
      : file_(file), config_(config), backend_(backend) {}

  void set_layer(int64_t layer) { prefix_ = "blk." + std::to_string(layer) + "."; }
  void leave_layers() { prefix_.clear(); }

  Mat mat(const char* name, std::initializer_list<int64_t> ne, Presence presence) {
    const std::string full = prefix_ + name;
    if (presence == Presence::kNever) return {};
    asked_.insert(full);
    return presence == Presence::kAlways ? file_.require(full, ne) : file_.maybe(full, ne);
  }

  WeightPtr matrix(const Mat& mat, bool zeros = false) {
    const WeightPtr weight = zeros ? backend_.load_for_zeros(mat) : backend_.load(mat);
    file_.check_unchanged();
    file_.advise_dontneed(mat);  // the weight is a copy
    return weight;
  }

  bool has(const char* name) const { return file_.has(prefix_ + name); }

  BufferPtr vector(const char* name, int64_t n, Presence presence) {
    const Mat m = mat(name, {n}, presence);
    return m.empty() ? nullptr : backend_.load_vector(m);
  }

  Norm norm(const std::string& name, int64_t n, Presence presence, Presence bias) {
    Norm norm;
    norm.kind = config_.norm;
    norm.eps = config_.norm_eps;
    norm.weight = vector((name + ".weight").c_str(), n, presence);
    norm.bias = vector((name + ".bias").c_str(), n, bias);
    return norm;
  }

  // Elements [first, first + n) of a vector of floats.
  BufferPtr part(const char* name, const Mat& whole, int64_t first, int64_t n) {
    if (whole.empty()) return nullptr;
    if (traits(whole.type).quantized) {
      throw_error(ErrorKind::kGguf, "%s: %s%s is %s, expected floats", file_.path().c_str(),
                  prefix_.c_str(), name, std::string(traits(whole.type).name).c_str());
    }
    return backend_.load_vector({whole.type, 1, n, whole.data + row_bytes(whole.type, first)});
  }

  void finish() {
    for (const TensorInfo& info : file_.tensors()) {
      if (asked_.count(info.name) == 0) {
        throw_error(ErrorKind::kGguf,
                    "%s: tensor %s %s is not part of a %s model with %lld layers; the file needs "
                    "something that is not supported here",
                    file_.path().c_str(), info.name.c_str(), info.shape().c_str(),
                    config_.architecture.c_str(), static_cast<long long>(config_.n_layer));
      }
    }
  }

 private:
  const GgufFile& file_;
  const ModelConfig& config_;
  Backend& backend_;
  std::string prefix_;
  std::set<std::string> asked_;
};

// Queries, keys and values: a tensor each, or one after the other in one.
void load_qkv(Loader& loader, const ModelConfig& c, LayerWeights& w) {
  const int64_t q = c.n_embd_q(), kv = c.n_embd_kv();
  if (!loader.has("attn_qkv.weight")) {
    const auto always = Presence::kAlways;
    w.q = loader.matrix(loader.mat("attn_q.weight", {c.n_embd, q}, always));
    w.k = loader.matrix(loader.mat("attn_k.weight", {c.n_embd, kv}, always));
    w.v = loader.matrix(loader.mat("attn_v.weight", {c.n_embd, kv}, always));
  } else {
    const Mat all = loader.mat("attn_qkv.weight", {c.n_embd, q + 2 * kv}, Presence::kAlways);
    w.q = loader.matrix(all.slice(0, q));
    w.k = loader.matrix(all.slice(q, kv));
    w.v = loader.matrix(all.slice(q + kv, kv));
  }
  const char* fused = "attn_qkv.bias";
  if (!loader.has(fused)) {
    w.q_bias = loader.vector("attn_q.bias", q, c.qkv_bias);
    w.k_bias = loader.vector("attn_k.bias", kv, c.qkv_bias);
    w.v_bias = loader.vector("attn_v.bias", kv, c.qkv_bias);
  } else {
    const Mat all = loader.mat(fused, {q + 2 * kv}, c.qkv_bias);
    w.q_bias = loader.part(fused, all, 0, q);
    w.k_bias = loader.part(fused, all, q, kv);
    w.v_bias = loader.part(fused, all, q + kv, kv);
  }
}

LayerWeights load_layer(Loader& loader, const ModelConfig& c, const LayerConfig& layer,
                        bool ffn_resident) {
  LayerWeights w;
  const auto always = Presence::kAlways;
  w.attn_norm = loader.norm("attn_norm", c.n_embd, c.pre_norm, c.norm_bias);
  load_qkv(loader, c, w);
  w.o = loader.matrix(loader.mat("attn_output.weight", {c.n_embd_q(), c.n_embd}, always));
  w.o_bias = loader.vector("attn_output.bias", c.n_embd, c.attn_output_bias);

  AttentionSpec& a = w.attention;
  a.n_head = c.n_head;
  a.n_head_kv = c.n_head_kv;
  a.head_dim = c.head_dim;
  a.scale = c.attention_scale;
  a.softcap = c.attention_softcap;
  a.window = layer.window;
  const bool rows = c.qk_norm_of_rows;
  (rows ? w.q_norm : a.q_norm) =
      loader.norm("attn_q_norm", rows ? c.n_embd_q() : c.head_dim, c.qk_norm, Presence::kNever);
  (rows ? w.k_norm : a.k_norm) =
      loader.norm("attn_k_norm", rows ? c.n_embd_kv() : c.head_dim, c.qk_norm, Presence::kNever);
  a.rope = layer.rope_freq ? c.rope : RopeKind::kNone;
  a.rope_dim = c.rope_dim;
  a.rope_freq = layer.rope_freq;
  a.rope_scale = c.rope_scale;
  w.attention_long = a;
  w.attention_long.rope_freq = layer.rope_freq_long;

  w.attn_post_norm = loader.norm("post_attention_norm", c.n_embd, c.post_norm, Presence::kNever);
  w.ffn_norm = loader.norm("ffn_norm", c.n_embd, c.pre_norm, c.norm_bias);
  w.ffn_post_norm = loader.norm("post_ffw_norm", c.n_embd, c.post_norm, Presence::kNever);
  CompactSource& s = w.source;
  if (c.fused_ffn) {
    const Mat both = loader.mat("ffn_up.weight", {c.n_embd, 2 * c.n_ff}, always);
    s.gate = both.slice(0, c.n_ff);
    s.up = both.slice(c.n_ff, c.n_ff);
  } else {
    s.gate = loader.mat("ffn_gate.weight", {c.n_embd, c.n_ff}, c.gated ? always : Presence::kNever);
    s.up = loader.mat("ffn_up.weight", {c.n_embd, c.n_ff}, always);
  }
  s.down = loader.mat("ffn_down.weight", {c.n_ff, c.n_embd}, always);
  s.gate_bias = loader.vector("ffn_gate.bias", c.n_ff, c.gated ? c.ffn_bias : Presence::kNever);
  s.up_bias = loader.vector("ffn_up.bias", c.n_ff, c.ffn_bias);
  s.down_bias = loader.vector("ffn_down.bias", c.n_embd, c.ffn_bias);
  s.zeros = c.activation.kind == Activation::kRelu;
  if (!ffn_resident) return w;
  if (c.gated) w.ffn.gate = loader.matrix(s.gate);
  w.ffn.up = loader.matrix(s.up);
  w.ffn.down = loader.matrix(s.down, s.zeros);
  w.ffn.gate_bias = s.gate_bias;
  w.ffn.up_bias = s.up_bias;
  w.ffn.down_bias = s.down_bias;
  return w;
}

}  // namespace

std::vector<int64_t> rows_of_matrices(const TensorInfo& info, const ModelConfig& config) {
  if (info.name.ends_with(".attn_qkv.weight")) {
    return {config.n_embd_q(), config.n_embd_kv(), config.n_embd_kv()};
  }
  if (config.fused_ffn && info.name.ends_with(".ffn_up.weight")) return {config.n_ff, config.n_ff};
  return {info.ne[1]};
}

size_t ModelWeights::ffn_bytes() const {
  size_t bytes = 0;
  for (const LayerWeights& w : layers) {
    const CompactSource& s = w.source;
    // Repacking is a permutation, so the file's bytes are those that a resident layer reads.
    bytes += ffn_resident ? w.ffn.bytes() : s.gate.bytes() + s.up.bytes() + s.down.bytes();
  }
  return bytes;
}

size_t ModelWeights::bytes_per_token() const {
  size_t bytes = output->bytes() + ffn_bytes();
  for (const LayerWeights& w : layers) {
    bytes += w.q->bytes() + w.k->bytes() + w.v->bytes() + w.o->bytes();
  }
  return bytes;
}

FfnWeights ModelWeights::stage_ffn(size_t layer) const {
  const LayerWeights& w = layers[layer];
  if (w.ffn.up) return w.ffn;
  const auto load = [&](const Mat& mat, bool zeros = false) -> WeightPtr {
    if (mat.empty()) return nullptr;
    WeightPtr weight = zeros ? backend->load_for_zeros(mat) : backend->load(mat);
    if (backend->info().device_memory == 0) file->advise_dontneed(mat);
    return weight;
  };
  FfnWeights ffn;
  ffn.gate = load(w.source.gate);
  ffn.up = load(w.source.up);
  ffn.down = load(w.source.down, w.source.zeros);
  ffn.gate_bias = w.source.gate_bias;
  ffn.up_bias = w.source.up_bias;
  ffn.down_bias = w.source.down_bias;
  return ffn;
}

void ModelWeights::drop_ffn_pages(size_t layer) const {
  if (!memory_limited) return;
  const CompactSource& source = layers[layer].source;
  for (const Mat* mat : {&source.gate, &source.up, &source.down}) {
    if (!mat->empty()) file->advise_dontneed(*mat);
  }
}

void ModelWeights::drop_embedding_pages() const {
  file->advise_dontneed(token_embd);
  if (!position_embd.empty()) file->advise_dontneed(position_embd);
}

ModelWeights load_weights(const GgufFile& file, const ModelConfig& config, Backend& backend,
                          const WeightOptions& options) {
  file.require_supported_types();
  Loader loader(file, config, backend);
  ModelWeights w;
  w.ffn_resident = options.ffn_resident;
  w.memory_limited = options.memory_limited;
  w.file = &file;
  w.backend = &backend;
  const auto always = Presence::kAlways;
  w.token_embd = loader.mat("token_embd.weight", {config.n_embd, config.n_vocab}, always);
  if (config.position_offset >= 0) {
    w.position_embd = loader.mat("position_embd.weight",
                                 {config.n_embd, config.n_ctx + config.position_offset}, always);
  }
  w.output_norm = loader.norm("output_norm", config.n_embd, always, config.norm_bias);
  const Mat head = loader.mat("output.weight", {config.n_embd, config.n_vocab}, Presence::kMaybe);
  w.output = loader.matrix(head.empty() ? w.token_embd : head);
  for (int64_t i = 0; i < config.n_layer; ++i) {
    loader.set_layer(i);
    w.layers.push_back(
        load_layer(loader, config, config.layers[static_cast<size_t>(i)], options.ffn_resident));
    if (options.progress) {
      options.progress(static_cast<float>(i + 1) / static_cast<float>(config.n_layer));
    }
  }
  loader.leave_layers();
  const int64_t n_pairs = config.rope_dim / 2;
  loader.mat("rope_freqs.weight", {n_pairs}, config.rope_factors);
  loader.mat("rope_factors_short.weight", {n_pairs}, config.long_rope_factors);
  loader.mat("rope_factors_long.weight", {n_pairs}, config.long_rope_factors);
  loader.finish();
  return w;
}

}  // namespace coreinfer
