// column_norms: how strongly each neuron of a layer can act on the residual stream,
// ||W_down[:, n]||. Flows in: the down projection in the mapped file. Flows out: (n_ff) float32.
#pragma once

#include <vector>

#include "tensor/mat.h"

namespace coreinfer {

std::vector<float> column_norms(const Mat& down);

}  // namespace coreinfer
