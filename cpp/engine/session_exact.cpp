// Exact mode of a session. A decoded token is either one that was expected, whose logits are there,
// or it starts a round: drafts are made, by the core neurons or from an earlier place in the text,
// and the dense weights look at the token and its drafts in one pass of at most kExactRows rows,
// each with the bits that it would have alone. Drafts that do not come true leave nothing behind:
// their cache entries are written over, their activations never counted.
#include <algorithm>

#include "base/clock.h"
#include "base/error.h"
#include "engine/session.h"
#include "engine/text_drafts.h"

namespace coreinfer {
namespace {

KeptActivations room_for(int64_t rows, const ModelConfig& config, Backend& backend) {
  KeptActivations room;
  room.buffer = backend.allocate(config.n_layer * rows * config.n_ff);
  room.capacity = rows;
  room.n_ff = config.n_ff;
  return room;
}

// The set is chosen anew when the text has grown by this share, and replaced when it shares less.
// Measured on SmolLM2 at beta 0.2, 256 tokens after 64, four drafts a verification: 2.58 tokens a
// verification where the set is never replaced, 3.03 below 0.8, 3.04 below 0.9 and 3.04 where it
// always is; 0.60, 0.69, 0.70 and 0.67 of dense decoding's speed.
constexpr double kGrowth = 0.25, kDrifted = 0.9;
constexpr int64_t kLeastGrowth = 64;  // tokens
// Compaction reads and writes with about this many times the seconds a byte that decoding takes.
constexpr double kCompactCost = 3.0;

}  // namespace

void check(const ExactSpec& spec) {
  if (spec.max_drafts < 0 || spec.max_drafts > DraftPace::kMaxDrafts) {
    throw_error(ErrorKind::kValue, "max_drafts is %lld, expected 0 to %lld",
                static_cast<long long>(spec.max_drafts),
                static_cast<long long>(DraftPace::kMaxDrafts));
  }
}

void Session::set_exact(const std::optional<ExactSpec>& spec) {
  forget_expected();
  if (!spec) {
    // Fresh pages would take a twentieth of the next short answer's time of a small model.
    if (speculation_ && !engine_->memory().limited()) {
      spare_rows_ = {std::move(speculation_->seen), std::move(speculation_->kept)};
    }
    speculation_.reset();
    return;
  }
  check(*spec);
  check(spec->share, engine_->config().n_layer, engine_->config().n_ff);
  if (!engine_->weights().ffn_resident) {
    throw_error(
        ErrorKind::kState,
        "exact mode verifies drafts with the dense FFN weights, which %s does not hold: raise "
        "it, or decode with core neurons (core=\"stable\")",
        engine_->memory().limit_name().c_str());
  }
  if (!speculation_) {
    const ModelConfig& c = engine_->config();
    SessionMemory with_rows = memory();
    with_rows.counts += static_cast<uint64_t>(c.n_layer * kExactSamples * c.n_ff) * sizeof(float);
    engine_->memory().check_session(with_rows);
    speculation_ = std::make_unique<Speculation>();
    speculation_->seen = std::move(spare_rows_.seen);
    speculation_->kept = std::move(spare_rows_.kept);
  }
  speculation_->spec = *spec;
}

std::optional<int32_t> Session::expected() const {
  if (!exact()) return std::nullopt;
  const Speculation& s = *speculation_;
  if (!s.looked || s.taken >= s.drafts.size()) return std::nullopt;
  return s.drafts[s.taken];
}

void Session::decode_exact(int32_t token, const Sampler* sampler) {
  check_tokens({&token, 1});
  check_room(1);
  if (n_dense_ != n_past()) {
    throw_error(ErrorKind::kState,
                "exact mode continues a dense text, but %lld positions were decoded with core "
                "neurons: keep(n_dense) and prefill them again",
                static_cast<long long>(n_past() - n_dense_));
  }
  const int64_t start = now_ns();
  if (expected() == token) {
    take_expected(token);
  } else {
    engine_->file().check_unchanged();
    judge(true);
    draft(token, sampler);
    engine_->file().check_unchanged();
  }
  ++timings_.decode_tokens;
  timings_.decode_bytes += decode_weight_bytes();
  timings_.decode_seconds += seconds_since(start);
}

void Session::take_expected(int32_t token) {
  Speculation& s = *speculation_;
  ++s.taken;
  tokens_.push_back(token);
  n_dense_ = n_past();
  const std::span<const float> row = transformer_->logits(static_cast<int64_t>(s.taken));
  logits_.assign(row.begin(), row.end());
}

// Drafts what may follow `token`, and looks at both with the dense weights.
void Session::draft(int32_t token, const Sampler* sampler) {
  Speculation& s = *speculation_;
  logits_.clear();
  const int64_t limit = std::min(s.spec.max_drafts, n_ctx() - n_past() - 1);
  const int64_t from_text = s.spec.text ? s.length(DraftPace::kText, limit) : 0;
  if (from_text > 0) {
    std::vector<int32_t> text = tokens_;
    text.push_back(token);
    s.drafts = text_drafts(text, from_text);
    s.source = DraftPace::kText;
  }
  if (s.drafts.empty() && s.spec.core) draft_with_core(token, limit, sampler);

  std::vector<int32_t> rows = {token};
  rows.insert(rows.end(), s.drafts.begin(), s.drafts.end());
  const auto n_rows = static_cast<int64_t>(rows.size());
  // Only where the statistics reach up to here.
  s.counting = counts_ && counts_->n_tokens() + s.n_kept == n_past();
  if (s.counting && !s.kept.buffer) {
    s.seen = room_for(kSeenRows, engine_->config(), engine_->backend());
    s.kept = room_for(kKeptRows, engine_->config(), engine_->backend());
  }
  const int64_t start = now_ns();
  s.seen.of_gate = s.counting && counts_->spec().statistic == Statistic::kCountGate;
  Batch batch;
  batch.tokens = rows;
  batch.first = n_past();
  batch.kept = s.counting ? &s.seen : nullptr;
  batch.logits = WantLogits::kAll;
  transformer_->run(batch, *cache_);
  s.pace.verified(n_rows, seconds_since(start));
  s.looked = true;
  if (!s.drafts.empty()) ++timings_.verifications;
  timings_.drafted_tokens += std::ssize(s.drafts);

  tokens_.push_back(token);
  n_dense_ = n_past();
  const std::span<const float> row = transformer_->logits(0);
  logits_.assign(row.begin(), row.end());
}

void Session::draft_with_core(int32_t token, int64_t limit, const Sampler* sampler) {
  Speculation& s = *speculation_;
  const int64_t n = prepare_core(limit);
  if (n == 0) return;
  const int64_t start = now_ns();
  if (!s.sampler) {
    SamplingParams greedy;
    greedy.temperature = 0.0f;
    s.sampler.emplace(greedy);
  }
  if (sampler != nullptr) s.sampler->follow(*sampler);
  s.source = DraftPace::kCore;
  for (int64_t i = 0; i < n; ++i) {
    Batch batch;
    batch.tokens = {&token, 1};
    batch.first = n_past() + i;
    batch.ffn = compact_.layers;
    transformer_->run(batch, *cache_);
    token = s.sampler->sample(transformer_->logits());
    s.sampler->accept(token);
    s.drafts.push_back(token);
  }
  s.pace.drafted(n, seconds_since(start));
  timings_.draft_seconds += seconds_since(start);
}

// How many tokens to draft with the core neurons; chooses and compacts them where that is due.
int64_t Session::prepare_core(int64_t limit) {
  Speculation& s = *speculation_;
  if (!counts_ || counts_->n_tokens() == 0) {
    return core_set_ ? s.length(DraftPace::kCore, limit) : 0;  // a set from outside
  }
  const int64_t n_tokens = counts_->n_tokens() + s.n_kept;
  const int64_t growth =
      std::max(kLeastGrowth, static_cast<int64_t>(kGrowth * static_cast<double>(s.chosen_at)));
  const bool due = s.chosen_at == 0 || n_tokens >= s.chosen_at + growth;
  if (!due) return s.length(DraftPace::kCore, limit);

  const ModelWeights& weights = engine_->weights();
  const double share = s.spec.share.beta * static_cast<double>(weights.ffn_bytes()) /
                       static_cast<double>(weights.bytes_per_token());
  const double entry = 2.0 * share * kCompactCost * s.pace.dense_seconds();
  const int64_t n = s.length(DraftPace::kCore, limit, entry);
  if (n == 0) return 0;
  const int64_t start = now_ns();
  try {
    CoreSet set = select(s.spec.share);
    const bool first = s.chosen_at == 0 || !core_set_;
    if (first || similarity(*core_set_, set) < kDrifted) set_core(std::move(set));
    s.chosen_at = counts_->n_tokens();
  } catch (const Error& e) {
    // A layer without active neurons, or no memory for a second set of weights: then without.
    if (e.kind() != ErrorKind::kNumeric && e.kind() != ErrorKind::kMemory) throw;
    s.spec.core = false;
  }
  s.pace.spent(seconds_since(start));
  return s.spec.core ? n : 0;
}

// The round is over. `all`: drafts that were not taken were wrong; otherwise nobody knows.
void Session::judge(bool all) {
  Speculation& s = *speculation_;
  const auto taken = static_cast<int64_t>(s.taken);
  if (s.looked) s.pace.judged(s.source, all ? std::ssize(s.drafts) : taken, taken);
  timings_.accepted_tokens += taken;
  if (s.counting && s.looked) keep_seen(1 + taken);
  s.drafts.clear();
  s.taken = 0;
  s.looked = false;
}

// Of the present verification the first n tokens are text.
void Session::keep_seen(int64_t n) {
  Speculation& s = *speculation_;
  if (s.n_kept + n > kKeptRows) count_kept();
  engine_->backend().copy(s.seen.layers(0, n), s.kept.layers(s.n_kept, n));
  s.n_kept += n;
}

// Adds the kept activations to the statistics.
void Session::count_kept() {
  Speculation& s = *speculation_;
  if (s.n_kept == 0) return;
  for (int64_t i = 0; i < engine_->config().n_layer; ++i) {
    counts_->add(i, s.kept.layer(i, s.n_kept));
  }
  counts_->check_finite();
  counts_->advance(s.n_kept);
  s.n_kept = 0;
}

// Before the session does anything else than decode.
void Session::forget_expected() {
  if (!exact()) return;
  judge(false);
  count_kept();
}

}  // namespace coreinfer
