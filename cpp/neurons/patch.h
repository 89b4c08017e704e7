// patch: a low-rank part of each compacted layer that lets the kept neurons answer for the dropped
// ones. Flows in: samples of what the dense FFN did in the prompt, the picked neurons and their
// compact weights. Flows out: LayerPatch values, and the weights that decode takes. No training and
// no data but the samples.
#pragma once

#include "backend/backend.h"
#include "neurons/core_set.h"

namespace coreinfer {

// Puts the patch in the layout for computing. Throws kValue where it does not fit the layer.
void attach(Backend& backend, const LayerPatch& patch, FfnWeights& ffn);

}  // namespace coreinfer
