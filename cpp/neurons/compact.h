// compact: a CoreSet and a model's FFN weights in the mapped file become the FFN weights that
// decode takes: the picked neurons of every layer in one contiguous buffer, values exactly kept.
// Layers that stay dense, or of which every neuron was picked, are the dense weights themselves.
#pragma once

#include "model/weights.h"
#include "neurons/core_set.h"

namespace coreinfer {

CompactWeights compact(Backend& backend, const ModelWeights& weights, const CoreSet& set);

}  // namespace coreinfer
