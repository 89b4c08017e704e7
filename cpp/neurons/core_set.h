// CoreSet: which neurons of which layers decode the text, a plain value. Flows in: scores and the
// share to keep, or indices from outside. Flows out: ascending indices a layer, checked. It holds
// no weights; compact.h makes them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "neurons/statistic.h"

namespace coreinfer {

// Half-open range of layers that take part; the others stay dense.
struct LayerRange {
  int64_t first = 0;
  int64_t last = 0;

  bool contains(int64_t layer) const { return layer >= first && layer < last; }
};

// How many neurons are kept: the share beta of those of the layers that take part, the same number
// in each, but `first_layer` times as many in the model's first, on which all others build.
struct CoreShare {
  double beta = 0.0;
  std::optional<LayerRange> layers{};  // none: all
  double first_layer = 1.0;

  LayerRange range(int64_t n_layer) const { return layers.value_or(LayerRange{0, n_layer}); }
};

// What the kept neurons of a layer add for the dropped ones: y += out (in h), h their activations.
// Float16 values, as they are decoded with.
struct LayerPatch {
  int64_t rank = 0;           // 0: none
  std::vector<uint16_t> in;   // (rank, neurons)
  std::vector<uint16_t> out;  // (n_embd, rank)

  bool operator==(const LayerPatch&) const = default;
};

struct CoreSet {
  int64_t n_ff = 0;
  // Per layer: ascending neurons, or nothing where the layer stays dense.
  std::vector<std::optional<std::vector<int32_t>>> layers;
  std::vector<std::vector<float>> scores;  // per layer (n_ff), or empty when handed in without
  std::string statistic;                   // "" when handed in
  double alpha = 0.0;
  bool weighted = false;
  double beta = 0.0;
  int64_t n_tokens = 0;           // that the scores were summed over
  std::vector<LayerPatch> patch;  // per layer, or empty where no layer has one

  bool same_neurons(const CoreSet& other) const {
    return n_ff == other.n_ff && layers == other.layers;
  }
};

// Throws kValue naming layer and position for a set that does not fit the model: wrong number of
// layers, indices not ascending or outside [0, n_ff), an empty layer, a patch of another shape or
// with NaN or Inf.
void check(const CoreSet& set, int64_t n_layer, int64_t n_ff);

// kValue naming the field of a share that is out of its bounds or, as for the layers, no share of a
// model of this shape: beta must be one neuron of a layer at least.
void check(const CoreShare& share, int64_t n_layer, int64_t n_ff);

// Neurons that each layer of the range keeps, beta * n_ff on average, rounded (half up) and at
// least one: the first layer at most all, and no more than leaves half their share to the others.
// Throws kValue as check does.
std::vector<int64_t> core_sizes(const CoreShare& share, int64_t n_layer, int64_t n_ff);

// The neurons of highest score in each layer of the range, core_sizes of them (Eq. 2, as its prose:
// the top beta); ties to the lower index, neurons of score 0 never. Throws kValue as core_sizes
// does, kNumeric for a layer in which no neuron was ever active.
CoreSet select_core(Backend& backend, const NeuronCounts& counts, const CoreShare& share);

// Shared neurons over the size of a set (of the larger one), averaged over the layers that both
// have (Insight 2).
double similarity(const CoreSet& a, const CoreSet& b);

// Stability of a text (Insight 1): similarity of the core sets of its first p tokens, p the largest
// power of two <= n / 2, and of all n, made free of chance: (overlap - chance) / (1 - chance),
// where random sets of their sizes overlap by chance: beta, less where neurons were silent. It is
// in
// [-1, 1]. Nothing for fewer than two tokens, with beta = 1, or while a layer has not been active.
// The sets are of the same size in every layer, whatever `first_layer` says.
std::optional<double> stability(Backend& backend, const NeuronCounts& counts, CoreShare share);

}  // namespace coreinfer
