#include "bench/test_run.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "base/clock.h"
#include "base/error.h"

namespace coreinfer::bench {
namespace {

// Decode steps and verifications measured in turn in one repetition.
constexpr int kVerifyRounds = 8;

int64_t to_ns(double seconds) { return std::llround(seconds * 1e9); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

}  // namespace

SessionOptions session_options(const Group& group) {
  SessionOptions options;
  options.n_ctx = group.test.n_tokens();
  options.n_batch = std::min(group.n_batch, group.n_ubatch);
  options.type_k = kv_type_from_name(group.type_k);
  options.type_v = kv_type_from_name(group.type_v);
  return options;
}

TestRun::TestRun(std::shared_ptr<const Engine> engine, const Group& group,
                 const CoreSetting& setting, std::span<const int32_t> ids)
    : group_(group),
      test_(group.test),
      setting_(setting),
      ids_(ids),
      session_(std::move(engine), session_options(group)) {
  if (setting.on) spec_ = setting.spec;
}

LayerRange TestRun::layers() const {
  const int64_t n_layer = session_.engine().config().n_layer;
  LayerRange range = setting_.layers;
  if (range.last == kAllLayers.last) range.last = n_layer;
  return range;
}

TestRun::Ids TestRun::ids(int64_t begin, int64_t count) const {
  return ids_.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
}

void TestRun::to_depth() {
  session_.set_exact(std::nullopt);
  session_.set_core(std::nullopt);
  // Scores cannot be taken back to any length, as the cache can.
  const bool scores_grow = spec_ && (test_.n_prompt > 0 || setting_.exact);
  // Within a memory limit fitting a patch lets the samples go.
  const bool samples_gone = setting_.patch > 0 && session_.engine().memory().limited();
  if (at_depth_ && !scores_grow && !samples_gone) {
    session_.keep(test_.n_depth);
    return;
  }
  if (!depth_state_.empty()) {
    session_.load_state(depth_state_);
    return;
  }
  session_.reset();
  if (test_.n_depth > 0) {
    const Timings before = session_.timings();
    prefill(ids(0, test_.n_depth));
    depth_timings_ = session_.timings();
    depth_timings_.prefill_seconds -= before.prefill_seconds;
    depth_timings_.count_seconds -= before.count_seconds;
    // A state has no samples: where a patch needs them the depth is read again.
    if (scores_grow && spec_->samples == 0) depth_state_ = session_.save_state();
  }
  at_depth_ = true;
}

// Where weights do not stay, their core is gathered as they pass by.
void TestRun::prefill(Ids tokens) {
  std::optional<CoreShare> expected;
  if (setting_.on && !setting_.exact) expected = share();
  session_.prefill(tokens, spec_, {}, {}, expected);
}

void TestRun::choose() {
  if (!setting_.on) return;
  if (setting_.exact) {
    session_.set_exact(ExactSpec{share(), setting_.drafts, true, false, false});
    return;
  }
  session_.set_core(session_.select(share()));
  if (setting_.patch > 0) session_.fit_patch({.rank = setting_.patch});
}

void TestRun::warm_up() {
  // One batch of what comes before the first decoded token, which is then timed warm.
  const int64_t before = test_.n_prompt > 0 ? test_.n_prompt : test_.n_depth;
  const int64_t n = test_.n_prompt > 0 ? before : std::min(before, session_.n_batch());
  if (n > 0) {
    prefill(ids(0, n));
    choose();
  }
  if (test_.n_gen > 0) session_.decode(ids_[static_cast<size_t>(session_.n_past())]);
  session_.set_exact(std::nullopt);
  session_.set_core(std::nullopt);
  session_.reset();
}

int64_t TestRun::timed_prompt(LogitsHash& hash) {
  const int64_t start = now_ns();
  prefill(ids(test_.n_depth, test_.n_prompt));
  choose();
  const int64_t ns = now_ns() - start;
  prompt_ns_.push_back(ns);
  hash.add(session_.logits());
  return ns;
}

int64_t TestRun::timed_decode(LogitsHash& hash) {
  int64_t ns = 0;
  for (const int32_t id : ids(session_.n_past(), test_.n_gen)) {
    const int64_t start = now_ns();
    session_.decode(id);
    ns += now_ns() - start;
    hash.add(session_.logits());
  }
  return ns;
}

// As timed_decode, but the text takes some of what was drafted for it.
int64_t TestRun::timed_drafting(LogitsHash& hash) {
  std::mt19937 random(1);  // the same in every repetition
  int64_t ns = 0;
  for (int32_t id : ids(session_.n_past(), test_.n_gen)) {
    const bool comes_true = static_cast<double>(random()) < setting_.accept * 0x1p32;
    if (const auto expected = session_.expected()) {
      if (comes_true) {
        id = *expected;
      } else if (id == *expected) {
        id = id == 0 ? 1 : 0;
      }
    }
    const int64_t start = now_ns();
    session_.decode(id);
    ns += now_ns() - start;
    hash.add(session_.logits());
  }
  session_.set_exact(std::nullopt);  // what was drafted last counts as judged
  return ns;
}

int64_t TestRun::timed_verify(LogitsHash& hash) {
  const Ids tokens = ids(test_.n_depth, test_.n_gen);
  const auto n_vocab = static_cast<size_t>(session_.engine().config().n_vocab);
  std::vector<float> logits(tokens.size() * n_vocab);
  int64_t total = 0;
  for (int round = 0; round < kVerifyRounds; ++round) {
    int64_t start = now_ns();
    session_.decode(tokens[0]);
    const int64_t decode_ns = now_ns() - start;
    hash.add(session_.logits());
    session_.keep(test_.n_depth);
    start = now_ns();
    session_.verify(tokens, logits);
    const int64_t verify_ns = now_ns() - start;
    hash.add(logits);
    session_.keep(test_.n_depth);
    total += verify_ns;
    verify_ratios_.push_back(static_cast<double>(verify_ns) / static_cast<double>(decode_ns));
  }
  return total / kVerifyRounds;
}

int64_t TestRun::repeat() {
  to_depth();
  const Timings before = session_.timings();
  LogitsHash hash;
  int64_t ns = 0;
  if (test_.n_prompt > 0) {
    ns += timed_prompt(hash);
  } else {
    choose();
  }
  if (test_.kind == TestKind::kVerify) {
    ns += timed_verify(hash);
  } else if (test_.n_gen > 0) {
    ns += setting_.exact ? timed_drafting(hash) : timed_decode(hash);
  }
  const Timings& after = session_.timings();
  totals_.count_seconds += after.count_seconds - before.count_seconds;
  totals_.select_seconds += after.select_seconds - before.select_seconds;
  totals_.compact_seconds += after.compact_seconds - before.compact_seconds;
  totals_.patch_seconds += after.patch_seconds - before.patch_seconds;
  totals_.drafted_tokens += after.drafted_tokens - before.drafted_tokens;
  totals_.accepted_tokens += after.accepted_tokens - before.accepted_tokens;
  samples_ns_.push_back(ns);
  if (hash_ && *hash_ != hash.value()) {
    throw_error(ErrorKind::kState,
                "%s, core %s: repetition %zu gave other logits (%016llx) than those before "
                "(%016llx); the same tokens must give the same bits, so this is a race",
                test_.name().c_str(), setting_.name().c_str(), samples_ns_.size(),
                static_cast<unsigned long long>(hash.value()),
                static_cast<unsigned long long>(*hash_));
  }
  hash_ = hash.value();
  return ns;
}

// Of a decode step's keys and values, the mean of all steps; a verification reads those of its last
// position.
int64_t TestRun::kv_read_bytes() const {
  const int64_t first = test_.n_depth + test_.n_prompt, n = test_.n_gen;
  const auto at = [this](int64_t position) {
    return static_cast<int64_t>(session_.kv_read_bytes(position));
  };
  if (test_.kind == TestKind::kVerify) return at(first + n - 1);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += at(first + i);
  return sum / n;
}

void TestRun::fill(Row& row) const {
  const auto n = static_cast<double>(samples_ns_.size());
  row.samples_ns = samples_ns_;
  row.logits_hash = *hash_;
  row.kv_bytes = static_cast<int64_t>(session_.kv_bytes());
  if (test_.n_gen > 0 && !setting_.exact) {
    row.weight_bytes = static_cast<int64_t>(session_.decode_weight_bytes());
    row.kv_read_bytes = kv_read_bytes();
  }
  if (!verify_ratios_.empty()) row.verify_over_decode = median(verify_ratios_);

  const double choice_seconds =
      (totals_.select_seconds + totals_.compact_seconds + totals_.patch_seconds) / n;
  const bool prompt_timed = !prompt_ns_.empty();
  if (prompt_timed) {
    double sum = 0.0;
    for (const int64_t ns : prompt_ns_) sum += static_cast<double>(ns);
    row.ttft_ns = std::llround(sum / n);
  } else if (test_.n_depth > 0) {
    row.ttft_ns = to_ns(depth_timings_.prefill_seconds + choice_seconds);
  }
  if (!setting_.on) return;

  row.n_prompt_select = test_.n_depth + test_.n_prompt;
  row.count_ns = to_ns(prompt_timed ? totals_.count_seconds / n : depth_timings_.count_seconds);
  row.select_ns = to_ns(totals_.select_seconds / n);
  row.compact_ns = to_ns(totals_.compact_seconds / n);
  if (setting_.patch > 0) {
    row.patch_ns = to_ns(totals_.patch_seconds / n);
    row.patch_bytes = static_cast<int64_t>(session_.patch_bytes());
  }
  if (totals_.drafted_tokens > 0) {
    row.acceptance =
        static_cast<double>(totals_.accepted_tokens) / static_cast<double>(totals_.drafted_tokens);
  }
  if (!session_.core_set()) return;  // nothing was drafted
  row.compact_bytes = static_cast<int64_t>(session_.compact_bytes());
  row.compact_source_bytes = static_cast<int64_t>(session_.compact_source_bytes());
  const CoreSet& set = *session_.core_set();
  double kept = 0.0;
  for (const auto& layer : set.layers) {
    kept += layer ? static_cast<double>(layer->size()) : static_cast<double>(set.n_ff);
  }
  row.ffn_kept_frac =
      kept / (static_cast<double>(set.n_ff) * static_cast<double>(set.layers.size()));
}

}  // namespace coreinfer::bench
