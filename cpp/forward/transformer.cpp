#include "forward/transformer.h"

#include <algorithm>
#include <cmath>

#include "base/clock.h"
#include "base/error.h"

namespace coreinfer {
namespace {

// From one hidden row to the next, so that a row can be padded with zeros.
int64_t hidden_stride(int64_t n_ff) { return (n_ff + 31) / 32 * 32; }

}  // namespace

Transformer::Transformer(Backend& backend, const ModelConfig& config, const ModelWeights& weights,
                         int64_t max_rows)
    : backend_(backend), config_(config), weights_(weights), max_rows_(max_rows) {
  x_ = backend.allocate(max_rows * config.n_embd);
  q_ = backend.allocate(max_rows * config.n_embd_q());
  k_ = backend.allocate(max_rows * config.n_embd_kv());
  v_ = backend.allocate(max_rows * config.n_embd_kv());
  attended_ = backend.allocate(max_rows * config.n_embd_q());
  if (config.post_norm != Presence::kNever) block_ = backend.allocate(max_rows * config.n_embd);
  hidden_ = backend.allocate(max_rows * hidden_stride(config.n_ff));
  device_logits_ = backend.allocate(std::min(max_rows, kExactRows) * config.n_vocab);
}

uint64_t Transformer::workspace_bytes(const ModelConfig& config, int64_t max_rows) {
  const int64_t embd = config.n_embd, q = config.n_embd_q(), kv = config.n_embd_kv();
  // As allocated above, and act_gate_.
  const int64_t own = (config.post_norm != Presence::kNever ? 2 : 1) * embd + 2 * (q + kv) +
                      hidden_stride(config.n_ff) + config.n_ff;
  // The widest input in another form, at most as floats; queries as floats and as pairs of bf16.
  const int64_t backend = std::max({embd, q, config.n_ff}) + 2 * q;
  const int64_t logits = 2 * std::min(max_rows, kExactRows) * config.n_vocab;  // and on the host
  return sizeof(float) * static_cast<uint64_t>(max_rows * (own + backend) + logits);
}

void Transformer::run(const Batch& batch, KvCache& cache) {
  const auto n = static_cast<int64_t>(batch.tokens.size());
  if (n < 1 || n > max_rows_) {
    throw_error(ErrorKind::kState, "a batch of %lld tokens, expected 1 to %lld",
                static_cast<long long>(n), static_cast<long long>(max_rows_));
  }
  n_logits_ = 0;
  const Rows x = x_->rows(n, config_.n_embd);
  embed(batch.tokens, batch.first, x);
  // Dense weights that are not resident come in a layer at a time; the next one while this one
  // computes, where the backend can do both.
  FfnWeights staged, ahead;
  const bool loads_ahead = !weights_.ffn_resident && backend_.info().loads_ahead;
  for (int64_t i = 0; i < config_.n_layer; ++i) {
    if (batch.cancelled != nullptr && (*batch.cancelled)()) {
      throw_error(ErrorKind::kCancelled, "stopped in layer %lld", static_cast<long long>(i));
    }
    const LayerWeights& w = weights_.layers[static_cast<size_t>(i)];
    attention(w, i, batch.first, x, cache);
    if (batch.ffn.empty()) {
      staged = ahead.up ? std::move(ahead) : weights_.stage_ffn(static_cast<size_t>(i));
      feed_forward(w, staged, i, x, batch);
      ahead = {};
      if (loads_ahead && i + 1 < config_.n_layer) {
        ahead = weights_.stage_ffn(static_cast<size_t>(i + 1));
      }
      if (batch.passing != nullptr) {
        (*batch.passing)(staged);  // reads the file again
        if (!weights_.ffn_resident) weights_.drop_ffn_pages(static_cast<size_t>(i));
      }
      staged = {};
    } else {
      feed_forward(w, batch.ffn[static_cast<size_t>(i)], i, x, batch);
    }
  }
  if (batch.counts != nullptr) batch.counts->check_finite();
  head(x, batch.logits);
}

// Within a memory limit a few rows at a time, since each makes pages around it resident.
void Transformer::embed(std::span<const int32_t> tokens, int64_t first, Rows x) {
  const int64_t position = first + std::max<int64_t>(config_.position_offset, 0);
  const int64_t step = weights_.memory_limited ? ModelWeights::kEmbeddingRows : x.n;
  for (int64_t r = 0; r < x.n; r += step) {
    const int64_t n = std::min(step, x.n - r);
    backend_.embed(tokens.subspan(static_cast<size_t>(r), static_cast<size_t>(n)),
                   weights_.token_embd, config_.embedding_scale, weights_.position_embd,
                   position + r, x.slice(r, n));
    if (weights_.memory_limited) weights_.drop_embedding_pages();
  }
}

void Transformer::attention(const LayerWeights& w, int64_t layer, int64_t first, Rows x,
                            KvCache& cache) {
  const Rows q = q_->rows(x.n, config_.n_embd_q());
  const Rows k = k_->rows(x.n, config_.n_embd_kv());
  const Rows v = v_->rows(x.n, config_.n_embd_kv());
  const Rows attended = attended_->rows(x.n, config_.n_embd_q());
  const Linear qkv[] = {{w.q.get(), w.q_bias.get(), q, false},
                        {w.k.get(), w.k_bias.get(), k, false},
                        {w.v.get(), w.v_bias.get(), v, false}};
  backend_.linear(x, w.attn_norm, qkv);
  if (w.q_norm.weight) backend_.norm(q, w.q_norm, q);
  if (w.k_norm.weight) backend_.norm(k, w.k_norm, k);
  const bool is_long = config_.takes_long_rope(cache.spec().n_ctx);
  backend_.attend(is_long ? w.attention_long : w.attention, q, k, v, cache, layer, first, attended);
  if (w.attn_post_norm.weight) {
    const Rows block = block_->rows(x.n, config_.n_embd);
    const Linear o[] = {{w.o.get(), w.o_bias.get(), block, false}};
    backend_.linear(attended, Norm{}, o);
    backend_.add(x, block, w.attn_post_norm, w.ffn_norm);
  } else {
    const Linear o[] = {{w.o.get(), w.o_bias.get(), x, true}};
    backend_.linear(attended, Norm{}, o);
  }
}

void Transformer::feed_forward(const LayerWeights& w, const FfnWeights& ffn, int64_t layer, Rows x,
                               const Batch& batch) {
  Rows hidden{hidden_->data(), x.n, ffn.n_ff(), hidden_stride(ffn.n_ff())};
  Rows act_gate;
  NeuronCounts* const counts = batch.counts;
  const bool of_gate = counts != nullptr && counts->spec().statistic == Statistic::kCountGate;
  if (of_gate) {
    if (!act_gate_) act_gate_ = backend_.allocate(max_rows_ * config_.n_ff);
    act_gate = act_gate_->rows(x.n, ffn.n_ff());
  }
  if (batch.kept != nullptr) {
    const Rows kept = batch.kept->layer(layer, x.n);
    (batch.kept->of_gate ? act_gate : hidden) = kept;
  }
  backend_.ffn_hidden(x, w.ffn_norm, ffn, config_.activation, hidden, act_gate);
  if (counts != nullptr) {
    const int64_t start = now_ns();
    counts->add(layer, of_gate ? act_gate : hidden);
    count_seconds_ += seconds_since(start);
  }
  if (!w.ffn_post_norm.weight && batch.samples == nullptr) return down(ffn, hidden, x, true);
  if (!block_) block_ = backend_.allocate(max_rows_ * config_.n_embd);
  const Rows block = block_->rows(x.n, config_.n_embd);
  down(ffn, hidden, block, false);
  if (batch.samples != nullptr) batch.samples->add(layer, hidden, block);
  const auto next = static_cast<size_t>(layer + 1);
  backend_.add(
      x, block, w.ffn_post_norm,
      next < weights_.layers.size() ? weights_.layers[next].attn_norm : weights_.output_norm);
}

// out = down(hidden), with the low-rank part where the layer has one.
void Transformer::down(const FfnWeights& ffn, Rows hidden, Rows out, bool accumulate) {
  const Linear down{ffn.down.get(), ffn.down_bias.get(), out, accumulate};
  if (!ffn.patch_in) return backend_.linear(hidden, Norm{}, {&down, 1});
  const int64_t rank = ffn.patch_in->rows();
  if (!patch_ || patch_->size() < hidden.n * rank) {
    patch_ = backend_.allocate(std::max(hidden.n, std::min(max_rows_, kExactRows)) * rank);
  }
  const Rows inner = patch_->rows(hidden.n, rank);
  const Linear both[] = {down, {ffn.patch_in.get(), nullptr, inner, false}};
  backend_.linear(hidden, Norm{}, both);
  const Linear outer[] = {{ffn.patch_out.get(), nullptr, out, true}};
  backend_.linear(inner, Norm{}, outer);
}

void Transformer::head(Rows x, WantLogits want) {
  if (want == WantLogits::kNone) return;
  const int64_t n = want == WantLogits::kAll ? x.n : 1;
  const int64_t n_vocab = config_.n_vocab;
  logits_.resize(static_cast<size_t>(n * n_vocab));
  for (int64_t done = 0; done < n;) {
    const int64_t count = std::min(n - done, kExactRows);
    const Rows out = device_logits_->rows(count, n_vocab);
    const Linear head[] = {{weights_.output.get(), nullptr, out, false}};
    backend_.linear(x.slice(x.n - n + done, count), weights_.output_norm, head);
    backend_.read(out.data, logits_.data() + done * n_vocab, count * n_vocab);
    done += count;
  }
  if (config_.logit_scale != 1.0f) {
    for (float& l : logits_) l *= config_.logit_scale;
  }
  if (config_.final_softcap > 0.0f) {
    const float cap = config_.final_softcap;
    for (float& l : logits_) l = cap * std::tanh(l / cap);
  }
  for (int64_t r = 0; r < n; ++r) {
    const float* row = logits_.data() + r * n_vocab;
    const bool finite = std::all_of(row, row + n_vocab, [](float l) { return std::isfinite(l); });
    if (!finite) {
      throw_error(
          ErrorKind::kNumeric,
          "NaN or Inf in the logits of batch token %lld: the weights are damaged or overflow",
          static_cast<long long>(x.n - n + r));
    }
  }
  n_logits_ = n;
}

std::span<const float> Transformer::logits(int64_t row) const {
  if (row < 0 || row >= n_logits_) {
    throw_error(ErrorKind::kState, "no logits for row %lld: %lld are there",
                static_cast<long long>(row), static_cast<long long>(n_logits_));
  }
  const auto n_vocab = static_cast<size_t>(config_.n_vocab);
  return {logits_.data() + static_cast<size_t>(row) * n_vocab, n_vocab};
}

}  // namespace coreinfer
