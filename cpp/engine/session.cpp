#include "engine/session.h"

#include <algorithm>

#include "base/clock.h"
#include "base/error.h"

namespace coreinfer {
namespace {

size_t patch_bytes_of(const CoreSet& set) {
  size_t values = 0;
  for (const LayerPatch& p : set.patch) values += p.in.size() + p.out.size();
  return sizeof(uint16_t) * values;
}

}  // namespace

Session::Session(std::shared_ptr<const Engine> engine, const SessionOptions& options)
    : engine_(std::move(engine)), options_(checked(options, engine_->config())) {
  const ModelConfig& c = engine_->config();
  engine_->memory().check_session(session_memory(options_, c));
  cache_ = engine_->backend().make_kv_cache(kv_spec(options_, c));
  transformer_ =
      std::make_unique<Transformer>(engine_->backend(), c, engine_->weights(), max_rows(options_));
}

void Session::check_tokens(std::span<const int32_t> tokens) const {
  const int64_t n_vocab = engine_->config().n_vocab;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= n_vocab) {
      throw_error(ErrorKind::kValue, "token %d at position %zu, expected an id from 0 to %lld",
                  tokens[i], i, static_cast<long long>(n_vocab - 1));
    }
  }
}

void Session::check_room(size_t n) const {
  const int64_t wanted = n_past() + static_cast<int64_t>(n);
  if (wanted > n_ctx()) {
    throw_error(ErrorKind::kValue, "Requested tokens (%lld) exceed context window of %lld",
                static_cast<long long>(wanted), static_cast<long long>(n_ctx()));
  }
}

int64_t Session::reusable(std::span<const int32_t> tokens,
                          const std::optional<StatisticSpec>& spec) {
  if (tokens.empty()) return 0;
  forget_expected();
  const auto same =
      std::mismatch(tokens_.begin(), tokens_.begin() + n_dense_, tokens.begin(), tokens.end() - 1);
  const int64_t common = same.first - tokens_.begin();
  if (!spec) return common;
  if (!counts_ || !(counts_->spec() == *spec)) return 0;
  const int64_t known = counts_->known_at_most(common);
  // The last tokens that a fresh prefill would sample must be at hand, or run again.
  const int64_t from = std::max<int64_t>(static_cast<int64_t>(tokens.size()) - spec->samples, 0);
  if (spec->samples == 0 || from >= known) return known;
  const bool at_hand = samples_ && samples_->first() <= from && samples_->n_tokens() >= known;
  return at_hand ? known : counts_->known_at_most(from);
}

void Session::keep(int64_t n) {
  if (n < 0 || n > n_past()) {
    throw_error(ErrorKind::kValue, "cannot keep %lld positions: %lld are in the cache",
                static_cast<long long>(n), static_cast<long long>(n_past()));
  }
  forget_expected();
  if (n == n_past()) return;
  tokens_.resize(static_cast<size_t>(n));
  n_dense_ = std::min(n_dense_, n);
  logits_.clear();
  if (counts_ && n < counts_->n_tokens()) {
    if (n > 0 && counts_->known_at_most(n) == n) {
      counts_->keep(n);
    } else {
      counts_.reset();
    }
  }
  if (samples_ && n < samples_->n_tokens()) samples_->keep(n);
}

void Session::prefill(std::span<const int32_t> tokens, const std::optional<StatisticSpec>& spec,
                      const std::function<void(int64_t, int64_t)>& progress,
                      const std::function<bool()>& cancelled,
                      const std::optional<CoreShare>& expected) {
  if (tokens.empty()) {
    throw_error(ErrorKind::kValue, "the prompt has no tokens, expected at least one");
  }
  check_tokens(tokens);
  check_room(tokens.size());
  if (expected) check(*expected, engine_->config().n_layer, engine_->config().n_ff);
  forget_expected();
  if (n_dense_ != n_past()) {
    throw_error(ErrorKind::kState,
                "the cache holds %lld positions of core-neuron decoding: keep(reusable(tokens)) "
                "first",
                static_cast<long long>(n_past() - n_dense_));
  }
  if (spec) {
    check(*spec);
    if (n_past() == 0) {
      counts_ = make_counts(*spec);
    } else if (!counts_ || !(counts_->spec() == *spec) || counts_->n_tokens() != n_past()) {
      throw_error(ErrorKind::kState,
                  "the scores of the %lld cached positions are not known for this statistic: "
                  "keep(reusable(tokens, statistic)) first",
                  static_cast<long long>(n_past()));
    }
    make_samples(spec->samples);
  } else if (n_past() == 0) {
    counts_.reset();
    samples_.reset();
  }
  if (exact()) speculation_->chosen_at = 0;  // another text may want another set
  passing_.reset();
  const int64_t start = now_ns();
  const double count_before = transformer_->count_seconds();
  const auto total = static_cast<int64_t>(tokens.size());
  try {
    engine_->file().check_unchanged();
    for (int64_t done = 0; done < total;) {
      const int64_t n = std::min(n_batch(), total - done);
      Batch batch;
      batch.tokens = tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(n));
      batch.first = n_past();
      batch.counts = spec ? &*counts_ : nullptr;
      batch.samples = spec && spec->samples > 0 ? &*samples_ : nullptr;
      batch.logits = done + n == total ? WantLogits::kLast : WantLogits::kNone;
      batch.cancelled = cancelled ? &cancelled : nullptr;
      if (spec && expected && done + n == total) expect(*expected);
      const std::function<void(const FfnWeights&)> passing = [this](const FfnWeights& dense) {
        passing_->layer(dense);
      };
      batch.passing = passing_ ? &passing : nullptr;
      transformer_->run(batch, *cache_);
      if (spec) counts_->advance(n);
      if (spec && spec->samples > 0) samples_->advance(n);
      tokens_.insert(tokens_.end(), batch.tokens.begin(), batch.tokens.end());
      n_dense_ = n_past();
      done += n;
      if (progress) progress(done, total);
    }
    engine_->file().check_unchanged();
  } catch (...) {
    reset();
    passing_.reset();
    counts_.reset();
    samples_.reset();
    throw;
  }
  const std::span<const float> last = transformer_->logits();
  logits_.assign(last.begin(), last.end());
  timings_.prefill_tokens += total;
  timings_.prefill_seconds += seconds_since(start);
  timings_.count_seconds += transformer_->count_seconds() - count_before;
}

void Session::replay(const std::optional<StatisticSpec>& spec,
                     const std::function<bool()>& cancelled) {
  forget_expected();
  const bool counted =
      !spec || (counts_ && counts_->spec() == *spec && counts_->n_tokens() == n_past());
  const bool sampled =
      !spec || spec->samples == 0 || (samples_ && samples_->n_tokens() == n_past());
  if (tokens_.empty() || (n_dense_ == n_past() && counted && sampled)) return;
  const int64_t from = reusable(tokens_, spec);
  const std::vector<int32_t> again(tokens_.begin() + from, tokens_.end());
  const Timings before = timings_;
  keep(from);
  prefill(again, spec, {}, cancelled);
  // It is no part of reading the prompt.
  timings_.replay_tokens += timings_.prefill_tokens - before.prefill_tokens;
  timings_.replay_seconds += timings_.prefill_seconds - before.prefill_seconds;
  timings_.prefill_tokens = before.prefill_tokens;
  timings_.prefill_seconds = before.prefill_seconds;
  timings_.count_seconds = before.count_seconds;
}

SessionMemory Session::memory() const {
  SessionMemory m = session_memory(options_, engine_->config());
  if (samples_) m.counts += samples_->bytes();
  return m;
}

const NeuronCounts& Session::counted() {
  forget_expected();
  if (!counts_ || counts_->n_tokens() == 0) {
    throw_error(ErrorKind::kState,
                "no neuron scores: prefill a prompt with a statistic before selecting");
  }
  return *counts_;
}

NeuronCounts Session::make_counts(const StatisticSpec& spec) const {
  static const std::vector<BufferPtr> none;
  const ModelConfig& c = engine_->config();
  return NeuronCounts(engine_->backend(), spec, c.n_layer, c.n_ff,
                      spec.weighted ? engine_->column_norms() : none);
}

// Room for the samples of the tokens that come next.
void Session::make_samples(int64_t capacity) {
  if (!samples_ || samples_->capacity() != capacity) {
    samples_.reset();
    if (capacity == 0) return;
    const ModelConfig& c = engine_->config();
    const size_t bytes = FfnSamples::bytes(capacity, c.n_layer, c.n_ff, c.n_embd);
    SessionMemory with_samples = memory();
    with_samples.counts += bytes;
    engine_->memory().check_session(with_samples);
    samples_.emplace(engine_->backend(), capacity, c.n_layer, c.n_ff, c.n_embd);
  }
  if (samples_->n_tokens() != n_past()) samples_->restart(n_past());
}

const FfnSamples& Session::samples() const {
  if (!samples_ || samples_->size() == 0) {
    throw_error(ErrorKind::kState,
                "no FFN samples: prefill a prompt with a statistic that keeps some");
  }
  return *samples_;
}

CoreSet Session::select(const CoreShare& share) {
  const int64_t start = now_ns();
  const NeuronCounts& counts = counted();
  CoreSet set = select_core(engine_->backend(), counts, share);
  timings_.select_seconds += seconds_since(start);
  return set;
}

std::optional<double> Session::stability(const CoreShare& share) {
  return coreinfer::stability(engine_->backend(), counted(), share);
}

// Gathers what the share will pick while the next batch runs, if the weights do not stay and the
// core fits; where it does not, set_core says so.
void Session::expect(const CoreShare& share) {
  if (engine_->weights().ffn_resident || !(share.beta > 0.0 && share.beta < 1.0)) return;
  const int64_t n_ff = engine_->config().n_ff, n_layer = engine_->config().n_layer;
  const LayerRange picked = share.range(n_layer);
  const std::vector<int64_t> sizes = core_sizes(share, n_layer, n_ff);
  const auto bytes_with = [&](int64_t others) {
    return estimated_bytes([&](size_t i) {
      const auto layer = static_cast<int64_t>(i);
      return picked.contains(layer) ? sizes[static_cast<size_t>(layer - picked.first)] : others;
    });
  };
  if (!engine_->memory().fits_core(memory(), bytes_with(n_ff))) return;
  core_set_.reset();
  compact_ = {};
  // Layers that stay dense are kept as they were brought in.
  passing_.emplace(engine_->backend(), engine_->weights(), *counts_, share, bytes_with(0));
}

void Session::set_core(std::optional<CoreSet> set) {
  if (!set) {
    passing_.reset();
    core_set_.reset();
    compact_ = {};
    return;
  }
  const ModelConfig& c = engine_->config();
  check(*set, c.n_layer, c.n_ff);
  const int64_t start = now_ns();
  if (core_set_ && core_set_->same_neurons(*set)) {
    compact_.layers = patched(*set);
  } else {
    // The old buffer goes first: two at once would double the memory.
    core_set_.reset();
    compact_ = {};
    if (passing_ && passing_->take(*set, &compact_)) {
      compact_.layers = patched(*set);
    } else {
      passing_.reset();
      engine_->memory().check_core(
          memory(), estimated_bytes([&](size_t i) {
                      return set->layers[i] ? static_cast<int64_t>(set->layers[i]->size())
                                            : set->n_ff;
                    }) + patch_bytes_of(*set));
      engine_->file().check_unchanged();
      CompactWeights compacted = compact(engine_->backend(), engine_->weights(), *set);
      engine_->file().check_unchanged();
      compact_ = std::move(compacted);
    }
  }
  passing_.reset();
  core_set_ = std::move(set);
  timings_.compact_seconds += seconds_since(start);
}

// The present compact layers with the patch of `set`.
std::vector<FfnWeights> Session::patched(const CoreSet& set) const {
  std::vector<FfnWeights> layers = compact_.layers;
  for (size_t i = 0; i < layers.size(); ++i) {
    attach(engine_->backend(), set.patch.empty() ? LayerPatch{} : set.patch[i], layers[i]);
  }
  return layers;
}

void Session::fit_patch(const PatchSpec& spec, const PatchPrior* prior) {
  check(spec);
  const FfnSamples& from = samples();
  if (!core_set_) {
    throw_error(ErrorKind::kState, "no core set to patch: set_core comes first");
  }
  const int64_t start = now_ns();
  core_set_->patch.clear();
  compact_.layers = patched(*core_set_);
  CoreSet set = *core_set_;
  set.patch.resize(set.layers.size());
  PatchFitter fitter(engine_->backend(), from, spec, prior);
  for (size_t i = 0; i < set.layers.size(); ++i) {
    const auto& neurons = set.layers[i];
    if (!neurons || static_cast<int64_t>(neurons->size()) == set.n_ff) continue;
    set.patch[i] = fitter.fit(static_cast<int64_t>(i), *neurons, compact_.layers[i]);
  }
  const size_t bytes = compact_.buffer_bytes + patch_bytes_of(set);
  engine_->memory().check_core(memory(), bytes);
  compact_.layers = patched(set);
  core_set_ = std::move(set);
  // Where memory is short they go; the next prefill that keeps some has room made for them.
  if (engine_->memory().limited()) samples_.reset();
  timings_.patch_seconds += seconds_since(start);
}

size_t Session::patch_bytes() const {
  size_t bytes = 0;
  for (const FfnWeights& ffn : compact_.layers) bytes += ffn.patch_bytes();
  return bytes;
}

size_t Session::decode_weight_bytes() const {
  const ModelWeights& weights = engine_->weights();
  if (compact_.layers.empty() || exact()) return weights.bytes_per_token();
  size_t bytes = weights.bytes_per_token() - weights.ffn_bytes();
  for (const FfnWeights& ffn : compact_.layers) bytes += ffn.bytes();
  return bytes;
}

size_t Session::kv_read_bytes(int64_t position) const {
  int64_t n = 0;
  for (const LayerConfig& layer : engine_->config().layers) {
    n += layer.window > 0 ? std::min(position + 1, layer.window) : position + 1;
  }
  return static_cast<size_t>(n) * cache_->position_bytes();
}

// Weight bytes of a core set, before it is made, by the neurons kept of each layer.
uint64_t Session::estimated_bytes(const std::function<int64_t(size_t)>& kept) const {
  const int64_t n_ff = engine_->config().n_ff;
  uint64_t bytes = 0;
  for (size_t i = 0; i < engine_->weights().layers.size(); ++i) {
    const int64_t k = kept(i);
    if (k == 0 || (k == n_ff && engine_->weights().ffn_resident)) continue;  // nothing is copied
    const CompactSource& s = engine_->weights().layers[i].source;
    const double share = static_cast<double>(k) / static_cast<double>(n_ff);
    const auto loaded = [this](const Mat& m) {
      return m.empty() ? 0 : engine_->backend().loaded_bytes(m.type, m.rows, m.cols);
    };
    bytes += core_weight_bytes(share, loaded(s.gate) + loaded(s.up), loaded(s.down),
                               traits(s.down.type).quantized);
  }
  return bytes;
}

// At most kExactRows tokens, so that each row's bits are those of decoding it alone.
void Session::run_decode(std::span<const int32_t> tokens, WantLogits want,
                         const std::function<bool()>& cancelled) {
  check_tokens(tokens);
  check_room(tokens.size());
  const int64_t start = now_ns();
  engine_->file().check_unchanged();
  Batch batch;
  batch.tokens = tokens;
  batch.first = n_past();
  if (!exact()) batch.ffn = compact_.layers;
  batch.logits = want;
  batch.cancelled = cancelled ? &cancelled : nullptr;
  logits_.clear();
  transformer_->run(batch, *cache_);
  engine_->file().check_unchanged();
  const bool dense = decodes_dense() && n_dense_ == n_past();
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  if (dense) n_dense_ = n_past();
  if (want != WantLogits::kNone) {
    const std::span<const float> last = transformer_->logits(transformer_->n_logits() - 1);
    logits_.assign(last.begin(), last.end());
  }
  timings_.decode_tokens += static_cast<int64_t>(tokens.size());
  timings_.decode_bytes += tokens.size() * decode_weight_bytes();
  timings_.decode_seconds += seconds_since(start);
}

void Session::decode(int32_t token, const Sampler* sampler) {
  if (exact()) return decode_exact(token, sampler);
  run_decode({&token, 1}, WantLogits::kLast, {});
}

void Session::verify(std::span<const int32_t> tokens, std::span<float> logits,
                     const std::function<bool()>& cancelled) {
  if (tokens.empty()) throw_error(ErrorKind::kValue, "no tokens to verify, expected at least one");
  forget_expected();
  check_tokens(tokens);
  check_room(tokens.size());
  const auto n_vocab = static_cast<size_t>(engine_->config().n_vocab);
  for (size_t done = 0; done < tokens.size();) {
    const size_t n = std::min<size_t>(kExactRows, tokens.size() - done);
    run_decode(tokens.subspan(done, n), WantLogits::kAll, cancelled);
    for (size_t r = 0; r < n; ++r) {
      const std::span<const float> row = transformer_->logits(static_cast<int64_t>(r));
      std::copy(row.begin(), row.end(),
                logits.begin() + static_cast<ptrdiff_t>((done + r) * n_vocab));
    }
    done += n;
  }
}

void Session::score(std::span<const int32_t> continuation, std::span<float> out,
                    const std::function<bool()>& cancelled) {
  if (continuation.empty()) {
    throw_error(ErrorKind::kValue, "the continuation has no tokens, expected at least one");
  }
  check_tokens(continuation);
  check_room(continuation.size() - 1);
  const auto n_vocab = static_cast<size_t>(engine_->config().n_vocab);
  log_softmax(logits(), out.first(n_vocab));
  if (continuation.size() == 1) return;
  const std::span<float> rest = out.subspan(n_vocab);
  verify(continuation.first(continuation.size() - 1), rest, cancelled);
  for (size_t r = 0; r + 1 < continuation.size(); ++r) {
    const std::span<float> row = rest.subspan(r * n_vocab, n_vocab);
    log_softmax(row, row);
  }
}

std::span<const float> Session::logits() const {
  if (logits_.empty()) throw_error(ErrorKind::kState, "no logits yet: prefill a prompt first");
  return logits_;
}

}  // namespace coreinfer
