// Transformer: the one forward pass. Flows in: token ids, their first position, a KV cache and the
// FFN weights to use. Flows out: logits, and for a dense prefill the activations' neuron counts.
// It knows neither architectures (ModelConfig is data) nor whether an FFN is dense or compacted.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"
#include "neurons/ffn_samples.h"
#include "neurons/statistic.h"

namespace coreinfer {

enum class WantLogits { kNone, kLast, kAll };

// FFN activations that a batch leaves for counting, in rows [0, n) of each layer. Counting waits
// until it is known which of the batch's tokens the text keeps.
struct KeptActivations {
  BufferPtr buffer;      // (n_layer, capacity, n_ff)
  int64_t capacity = 0;  // rows of a layer
  int64_t n_ff = 0;
  bool of_gate = false;  // act(gate) is kept (count_gate), not what enters the down projection

  Rows layer(int64_t i, int64_t n) const {
    return {buffer->data() + i * capacity * n_ff, n, n_ff, n_ff};
  }
  // Rows [begin, begin + n) of all layers; a row here is those of one layer.
  Rows layers(int64_t begin, int64_t n) const {
    const int64_t stride = capacity * n_ff;
    return {buffer->data() + begin * n_ff, buffer->size() / stride, n * n_ff, stride};
  }
};

struct Batch {
  std::span<const int32_t> tokens;
  int64_t first = 0;                // position of tokens[0]
  std::span<const FfnWeights> ffn;  // per layer; empty: the model's dense ones
  NeuronCounts* counts = nullptr;   // receives every FFN activation of the batch
  KeptActivations* kept = nullptr;  // receives them, too, to be counted later; dense FFN only
  FfnSamples* samples = nullptr;    // receives FFN inputs and outputs of the batch
  WantLogits logits = WantLogits::kLast;
  // Told of each layer when its counts are complete, while its dense weights are at hand.
  const std::function<void(const FfnWeights&)>* passing = nullptr;
  // Asked before each layer on the calling thread; true stops with kCancelled.
  const std::function<bool()>* cancelled = nullptr;
};

class Transformer {
 public:
  // max_rows: the largest batch that run() will be given; working memory is sized for it.
  Transformer(Backend& backend, const ModelConfig& config, const ModelWeights& weights,
              int64_t max_rows);

  // Runs the batch and writes its keys and values to the cache. After an exception the positions
  // of the batch, and the counts, are undefined.
  void run(const Batch& batch, KvCache& cache);

  // Host memory: logits of the last run, row r of those wanted (n_vocab).
  std::span<const float> logits(int64_t row = 0) const;
  int64_t n_logits() const { return n_logits_; }

  // Bytes of working memory, what the backend needs for the same rows included, at most.
  static uint64_t workspace_bytes(const ModelConfig& config, int64_t max_rows);

  // Seconds that run() has spent counting; where a GPU does it, handing it over.
  double count_seconds() const { return count_seconds_; }

 private:
  void embed(std::span<const int32_t> tokens, int64_t first, Rows x);
  void attention(const LayerWeights& w, int64_t layer, int64_t first, Rows x, KvCache& cache);
  void feed_forward(const LayerWeights& w, const FfnWeights& ffn, int64_t layer, Rows x,
                    const Batch& batch);
  void down(const FfnWeights& ffn, Rows hidden, Rows out, bool accumulate);
  void head(Rows x, WantLogits want);

  Backend& backend_;
  const ModelConfig& config_;
  const ModelWeights& weights_;
  int64_t max_rows_;
  BufferPtr x_, q_, k_, v_, attended_, block_, hidden_, act_gate_, patch_, device_logits_;
  std::vector<float> logits_;
  int64_t n_logits_ = 0;
  double count_seconds_ = 0.0;
};

}  // namespace coreinfer
