// PatchPrior: what other texts taught about each layer's FFN, beside the prompt's own samples. Made
// outside (python/coreinfer/patch_prior.py) and read by patch.h; it owns none of its numbers.
//
// A row is an input h of the down projection and its output y without bias, no token's own but a
// direction of many; its weight is the share of tokens that it stands for, so that sum of weight
// h h^T is the mean of h h^T / ||h||^2 over those texts.
#pragma once

#include <cstdint>
#include <vector>

namespace coreinfer {

struct PatchPrior {
  struct Layer {
    const uint16_t* h = nullptr;     // (rows, n_ff), float16
    const uint16_t* y = nullptr;     // (rows, n_embd), float16
    const float* weights = nullptr;  // (rows)
  };
  int64_t rows = 0;
  int64_t n_ff = 0;
  int64_t n_embd = 0;
  std::vector<Layer> layers;
};

}  // namespace coreinfer
