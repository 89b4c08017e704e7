// patch: a low-rank part of each compacted layer that lets the kept neurons answer for the dropped
// ones. Flows in: samples of what the dense FFN did in the prompt, the picked neurons and their
// compact weights. Flows out: LayerPatch values, and the weights that decode takes. No training and
// no data but the samples.
//
// Each of m sampled tokens is scaled to ||h|| = 1; older ones by less (decay ^ age). H (m, k) are
// its kept activations, Y (m, n_embd) its outputs and R = Y - H W^T what the dropped neurons added
// to them. A prior adds rows of its own. Ridge regression of R on H, with G = H H^T and mu = ridge
// * mean(diag G): A = (G + mu I)^-1 R fits F R, F = G (G + mu I)^-1. Of F R only `rank` directions
// T (rank, m) among the samples are kept, those that hold most of F Y: y += (T F R)^T B h, where B
// (rank, k) gives T F R's part in each sample.
#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"
#include "neurons/core_set.h"
#include "neurons/ffn_samples.h"
#include "neurons/patch_prior.h"

namespace coreinfer {

// Tokens to learn from: the latest, which are most like those to come. More of them help less than
// they cost.
inline constexpr int64_t kPatchSamples = 128;

inline constexpr int64_t kMaxPatchRank = 1024;

struct PatchSpec {
  int64_t rank = 64;
  double decay = 1.0;  // what a sample counts, of the next one's; above 0
  double ridge = 0.3;  // relative to the mean squared norm of the samples' kept activations
  double prior = 2.0;  // what a prior counts, all its rows together, in times the samples
};
void check(const PatchSpec& spec);  // kValue naming the field that is out of its bounds

// Fits the patches of the layers that were sampled, one by one, in the same working memory.
class PatchFitter {
 public:
  // `samples` and `prior`, where there is one, must outlive it. Throws kValue for a prior of
  // another model's shape.
  PatchFitter(Backend& backend, const FfnSamples& samples, const PatchSpec& spec,
              const PatchPrior* prior);
  ~PatchFitter();
  // The patch of one layer: `ffn` holds the picked neurons' weights. Rank 0 where there is nothing
  // to learn (no sample is active in a kept neuron); less than asked for when there are fewer
  // tokens. Throws kNumeric naming the layer for NaN or Inf.
  LayerPatch fit(int64_t layer, std::span<const int32_t> neurons, const FfnWeights& ffn);

 private:
  struct Work;
  const FfnSamples& samples_;
  const PatchSpec spec_;
  const PatchPrior* prior_;
  std::unique_ptr<Work> work_;
};

// Puts the patch in the layout for computing. Throws kValue where it does not fit the layer.
void attach(Backend& backend, const LayerPatch& patch, FfnWeights& ffn);

}  // namespace coreinfer
