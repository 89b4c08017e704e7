// compact: a CoreSet and a model's FFN weights in the mapped file become the FFN weights that
// decode takes: the picked neurons of every layer in one contiguous buffer, values exactly kept.
// Layers that stay dense, or of which every neuron was picked, are the dense weights themselves.
#pragma once

#include "model/weights.h"
#include "neurons/core_set.h"

namespace coreinfer {

CompactWeights compact(Backend& backend, const ModelWeights& weights, const CoreSet& set);

// The same a layer at a time, for dense weights that are not resident: each layer is selected and
// gathered while the last batch of a prompt has it at hand, so that it need not be brought in
// again.
class PassingCompact {
 public:
  // `counts` is completed by the batch, layer by layer. room_bytes: about what the layers of the
  // range will take.
  PassingCompact(Backend& backend, const ModelWeights& weights, const NeuronCounts& counts,
                 const CoreShare& share, size_t room_bytes);

  // The next layer, whose counts are complete and whose dense weights these are.
  void layer(const FfnWeights& dense);
  // The weights for this set, if its neurons are those of all layers; else nothing has changed.
  bool take(const CoreSet& set, CompactWeights* to);

 private:
  Backend& backend_;
  const ModelWeights& weights_;
  const NeuronCounts& counts_;
  const LayerRange range_;
  const std::vector<int64_t> sizes_;  // of its layers
  Room room_;
  CoreSet set_;  // layers so far
  CompactWeights made_;
};

}  // namespace coreinfer
