// Saved states: a session's tokens, cache, scores and core set as bytes. The bytes may come from
// anywhere, so every length and index is checked before the session is changed.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/error.h"
#include "engine/session.h"

namespace coreinfer {
namespace {

constexpr char kMagic[8] = {'C', 'O', 'R', 'E', 'S', 'T', '0', '2'};

class Writer {
 public:
  template <typename T>
  void value(const T& v) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* p = reinterpret_cast<const std::byte*>(&v);
    bytes.insert(bytes.end(), p, p + sizeof(T));
  }
  template <typename T>
  void array(const std::vector<T>& v) {
    value(static_cast<uint64_t>(v.size()));
    const auto* p = reinterpret_cast<const std::byte*>(v.data());
    bytes.insert(bytes.end(), p, p + v.size() * sizeof(T));
  }
  std::vector<std::byte> bytes;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}
  template <typename T>
  T value() {
    T v;
    std::memcpy(&v, take(sizeof(T)).data(), sizeof(T));
    return v;
  }
  template <typename T>
  std::vector<T> array() {
    const auto n = value<uint64_t>();
    if (n > rest_.size() / sizeof(T)) damaged("it ends too early");
    std::vector<T> v(n);
    const auto from = take(n * sizeof(T));
    if (n > 0) std::memcpy(v.data(), from.data(), from.size());
    return v;
  }
  void finish() const {
    if (!rest_.empty()) damaged("it is longer than it says");
  }
  [[noreturn]] static void damaged(const char* why) {
    throw_error(ErrorKind::kValue, "the saved state is damaged: %s", why);
  }

 private:
  std::span<const std::byte> take(size_t n) {
    if (n > rest_.size()) damaged("it ends too early");
    const auto taken = rest_.first(n);
    rest_ = rest_.subspan(n);
    return taken;
  }
  std::span<const std::byte> rest_;
};

void write(Writer& w, const NeuronCounts::Scores& s) {
  w.value(s.n_tokens);
  for (const std::vector<float>& layer : s.layers) w.array(layer);
}

NeuronCounts::Scores read_scores(Reader& r, int64_t n_layer, int64_t n_ff, int64_t n_past) {
  NeuronCounts::Scores s;
  s.n_tokens = r.value<int64_t>();
  if (s.n_tokens < 1 || s.n_tokens > n_past) Reader::damaged("scores of more tokens than it has");
  for (int64_t i = 0; i < n_layer; ++i) {
    s.layers.push_back(r.array<float>());
    if (static_cast<int64_t>(s.layers.back().size()) != n_ff)
      Reader::damaged("scores of another n_ff");
  }
  return s;
}

std::string string_of(const std::vector<char>& v) { return {v.begin(), v.end()}; }

}  // namespace

std::vector<std::byte> Session::save_state() {
  forget_expected();
  Writer w;
  for (char c : kMagic) w.value(c);
  w.value(engine_->fingerprint());
  w.value(cache_->spec().type_k);
  w.value(cache_->spec().type_v);
  const ModelConfig& c = engine_->config();
  if (c.has_long_rope()) w.value(static_cast<uint8_t>(c.takes_long_rope(n_ctx())));
  w.array(tokens_);
  w.value(n_dense_);
  w.array(logits_);
  w.value(static_cast<uint8_t>(counts_.has_value() && counts_->n_tokens() > 0));
  if (counts_ && counts_->n_tokens() > 0) {
    w.value(counts_->spec().statistic);
    w.value(counts_->spec().alpha);
    w.value(static_cast<uint8_t>(counts_->spec().weighted));
    w.value(counts_->spec().samples);
    w.value(static_cast<uint64_t>(counts_->snapshots().size()));
    for (const NeuronCounts::Snapshot& s : counts_->snapshots()) write(w, counts_->read(s));
    write(w, counts_->read(counts_->now()));
  }
  w.value(static_cast<uint8_t>(core_set_.has_value()));
  if (core_set_) {
    w.array(std::vector<char>(core_set_->statistic.begin(), core_set_->statistic.end()));
    w.value(core_set_->alpha);
    w.value(static_cast<uint8_t>(core_set_->weighted));
    w.value(core_set_->beta);
    w.value(core_set_->n_tokens);
    for (const auto& layer : core_set_->layers) {
      w.value(static_cast<uint8_t>(layer.has_value()));
      if (layer) w.array(*layer);
    }
    w.value(static_cast<uint64_t>(core_set_->scores.size()));
    for (const std::vector<float>& scores : core_set_->scores) w.array(scores);
    w.value(static_cast<uint64_t>(core_set_->patch.size()));
    for (const LayerPatch& patch : core_set_->patch) {
      w.value(patch.rank);
      w.array(patch.in);
      w.array(patch.out);
    }
  }
  w.array(cache_->save(n_past()));
  return std::move(w.bytes);
}

void Session::load_state(std::span<const std::byte> state) {
  const ModelConfig& c = engine_->config();
  Reader r(state);
  for (char expected : kMagic) {
    if (r.value<char>() != expected) Reader::damaged("it is not a state of this version");
  }
  if (r.value<uint64_t>() != engine_->fingerprint()) {
    throw_error(ErrorKind::kValue,
                "the saved state is of another model, or another activation, than %s",
                engine_->file().path().c_str());
  }
  const auto type_k = r.value<KvType>();
  const auto type_v = r.value<KvType>();
  if (type_k != cache_->spec().type_k || type_v != cache_->spec().type_v) {
    throw_error(ErrorKind::kValue, "the saved state has other cache types (type_k, type_v)");
  }
  if (c.has_long_rope() && (r.value<uint8_t>() != 0) != c.takes_long_rope(n_ctx())) {
    throw_error(ErrorKind::kValue,
                "the saved state has a context on the other side of this model's original one, "
                "%lld, than n_ctx (%lld): its keys are rotated by other angles",
                static_cast<long long>(c.short_rope_context), static_cast<long long>(n_ctx()));
  }
  std::vector<int32_t> tokens = r.array<int32_t>();
  check_tokens(tokens);
  const auto n_past = static_cast<int64_t>(tokens.size());
  if (n_past > n_ctx()) {
    throw_error(ErrorKind::kValue, "the saved state has %lld tokens, more than n_ctx (%lld)",
                static_cast<long long>(n_past), static_cast<long long>(n_ctx()));
  }
  const auto n_dense = r.value<int64_t>();
  if (n_dense < 0 || n_dense > n_past) Reader::damaged("more dense positions than tokens");
  std::vector<float> logits = r.array<float>();
  if (!logits.empty() && static_cast<int64_t>(logits.size()) != c.n_vocab) {
    Reader::damaged("logits of another vocabulary");
  }
  std::optional<NeuronCounts> counts;
  if (r.value<uint8_t>() != 0) {
    StatisticSpec spec;
    spec.statistic = r.value<Statistic>();
    if (statistic_name(spec.statistic) == "unknown") Reader::damaged("an unknown statistic");
    spec.alpha = r.value<double>();
    spec.weighted = r.value<uint8_t>() != 0;
    spec.samples = r.value<int64_t>();
    counts = make_counts(spec);
    const auto n = r.value<uint64_t>();
    if (n > 64) Reader::damaged("too many score snapshots");
    std::vector<NeuronCounts::Scores> snapshots;
    for (uint64_t i = 0; i < n; ++i) {
      snapshots.push_back(read_scores(r, c.n_layer, c.n_ff, n_past));
    }
    counts->restore(snapshots, read_scores(r, c.n_layer, c.n_ff, n_past));
  }
  std::optional<CoreSet> set;
  if (r.value<uint8_t>() != 0) {
    set.emplace();
    set->n_ff = c.n_ff;
    set->statistic = string_of(r.array<char>());
    set->alpha = r.value<double>();
    set->weighted = r.value<uint8_t>() != 0;
    set->beta = r.value<double>();
    set->n_tokens = r.value<int64_t>();
    for (int64_t i = 0; i < c.n_layer; ++i) {
      set->layers.emplace_back();
      if (r.value<uint8_t>() != 0) set->layers.back() = r.array<int32_t>();
    }
    const auto n = r.value<uint64_t>();
    if (n != 0 && n != static_cast<uint64_t>(c.n_layer)) Reader::damaged("scores of other layers");
    for (uint64_t i = 0; i < n; ++i) set->scores.push_back(r.array<float>());
    const auto n_patch = r.value<uint64_t>();
    if (n_patch != 0 && n_patch != static_cast<uint64_t>(c.n_layer)) {
      Reader::damaged("patches of other layers");
    }
    for (uint64_t i = 0; i < n_patch; ++i) {
      LayerPatch patch;
      patch.rank = r.value<int64_t>();
      patch.in = r.array<uint16_t>();
      patch.out = r.array<uint16_t>();
      set->patch.push_back(std::move(patch));
    }
    check(*set, c.n_layer, c.n_ff);
  }
  const std::vector<std::byte> cache = r.array<std::byte>();
  r.finish();

  // Empty until all of it is in place, so that a failure leaves a usable session.
  reset();
  counts_.reset();
  cache_->restore(cache, n_past);
  samples_.reset();  // not part of a state: later tokens are sampled anew
  set_core(std::move(set));
  tokens_ = std::move(tokens);
  n_dense_ = n_dense;
  logits_ = std::move(logits);
  counts_ = std::move(counts);
}

}  // namespace coreinfer
