#include "neurons/core_set.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"

namespace coreinfer {
namespace {

void check_range(LayerRange range, int64_t n_layer) {
  if (range.first < 0 || range.last > n_layer || range.first >= range.last) {
    throw_error(ErrorKind::kValue,
                "layers are %lld:%lld, expected FIRST:LAST with 0 <= FIRST < LAST <= %lld",
                static_cast<long long>(range.first), static_cast<long long>(range.last),
                static_cast<long long>(n_layer));
  }
}

int64_t core_size(double beta, int64_t n) {
  const auto k = static_cast<int64_t>(std::floor(beta * static_cast<double>(n) + 0.5));
  return std::clamp<int64_t>(k, 1, n);
}

// The neurons alone.
CoreSet pick(Backend& backend, const NeuronCounts::Snapshot& snapshot, const CoreShare& share) {
  const Rows scores = snapshot.rows();
  const std::vector<int64_t> sizes = core_sizes(share, scores.n, snapshot.n_ff);
  const int64_t first = share.range(scores.n).first;
  CoreSet set;
  set.n_ff = snapshot.n_ff;
  set.beta = share.beta;
  set.n_tokens = snapshot.n_tokens;
  set.layers.resize(static_cast<size_t>(scores.n));
  for (size_t done = 0; done < sizes.size();) {
    const auto of_other_size = [&](int64_t size) { return size != sizes[done]; };
    const auto end =
        std::find_if(sizes.begin() + static_cast<int64_t>(done), sizes.end(), of_other_size);
    const auto next = static_cast<size_t>(end - sizes.begin());
    std::vector<std::vector<int32_t>> chosen = backend.select(
        scores.slice(first + static_cast<int64_t>(done), static_cast<int64_t>(next - done)),
        sizes[done]);
    for (std::vector<int32_t>& neurons : chosen) {
      const size_t layer = static_cast<size_t>(first) + done++;
      if (neurons.empty()) {
        throw_error(ErrorKind::kNumeric,
                    "no neuron of layer %zu was active in %lld prompt tokens, so it has no core "
                    "set; leave the layer out (layers) or decode dense",
                    layer, static_cast<long long>(snapshot.n_tokens));
      }
      set.layers[layer] = std::move(neurons);
    }
  }
  return set;
}

void check_patch(const LayerPatch& patch, const std::optional<std::vector<int32_t>>& neurons,
                 size_t layer) {
  if (patch.rank == 0 && patch.in.empty() && patch.out.empty()) return;
  const size_t k = neurons ? neurons->size() : 0;
  const auto rank = static_cast<size_t>(patch.rank);
  if (patch.rank < 1 || k == 0 || patch.in.size() != rank * k || patch.out.empty() ||
      patch.out.size() % rank != 0) {
    throw_error(
        ErrorKind::kValue,
        "the patch of layer %zu has rank %lld with %zu and %zu values, expected (rank, %zu) "
        "for the layer's neurons and (n_embd, rank)",
        layer, static_cast<long long>(patch.rank), patch.in.size(), patch.out.size(), k);
  }
  const auto finite = [](uint16_t half) { return (half & 0x7c00u) != 0x7c00u; };
  if (!std::all_of(patch.in.begin(), patch.in.end(), finite) ||
      !std::all_of(patch.out.begin(), patch.out.end(), finite)) {
    throw_error(ErrorKind::kValue, "the patch of layer %zu holds NaN or Inf", layer);
  }
}

}  // namespace

void check(const CoreSet& set, int64_t n_layer, int64_t n_ff) {
  if (set.n_ff != n_ff || static_cast<int64_t>(set.layers.size()) != n_layer) {
    throw_error(ErrorKind::kValue,
                "the core set is for %zu layers of %lld neurons, the model has %lld layers of %lld",
                set.layers.size(), static_cast<long long>(set.n_ff),
                static_cast<long long>(n_layer), static_cast<long long>(n_ff));
  }
  if (!set.patch.empty() && set.patch.size() != set.layers.size()) {
    throw_error(ErrorKind::kValue, "the core set has patches for %zu layers, expected %zu or none",
                set.patch.size(), set.layers.size());
  }
  for (size_t i = 0; i < set.layers.size(); ++i) {
    if (!set.patch.empty()) check_patch(set.patch[i], set.layers[i], i);
    if (!set.layers[i]) continue;
    const std::vector<int32_t>& neurons = *set.layers[i];
    if (neurons.empty()) {
      throw_error(ErrorKind::kValue,
                  "layer %zu of the core set has no neurons, expected at least 1", i);
    }
    for (size_t j = 0; j < neurons.size(); ++j) {
      if (neurons[j] < 0 || neurons[j] >= n_ff || (j > 0 && neurons[j] <= neurons[j - 1])) {
        throw_error(ErrorKind::kValue,
                    "neuron %d at position %zu of layer %zu: expected ascending indices below %lld",
                    neurons[j], j, i, static_cast<long long>(n_ff));
      }
    }
  }
}

void check(const CoreShare& share, int64_t n_layer, int64_t n_ff) {
  if (!(share.beta > 0.0 && share.beta <= 1.0)) {
    throw_error(ErrorKind::kValue, "beta is %g, expected above 0 and at most 1", share.beta);
  }
  if (!(share.first_layer >= 1.0 && std::isfinite(share.first_layer))) {
    throw_error(ErrorKind::kValue, "first_layer is %g, expected at least 1", share.first_layer);
  }
  constexpr double kRounding = 1e-9;  // 1 / 49 of 49 is less than 1
  if (share.beta * static_cast<double>(n_ff) < 1.0 - kRounding) {
    throw_error(ErrorKind::kValue,
                "beta is %g, which is less than one of a layer's %lld neurons; expected at least "
                "1 / %lld",
                share.beta, static_cast<long long>(n_ff), static_cast<long long>(n_ff));
  }
  check_range(share.range(n_layer), n_layer);
}

std::vector<int64_t> core_sizes(const CoreShare& share, int64_t n_layer, int64_t n_ff) {
  check(share, n_layer, n_ff);
  const LayerRange range = share.range(n_layer);
  const auto others = range.last - range.first - 1;
  std::vector<int64_t> sizes(static_cast<size_t>(others + 1), core_size(share.beta, n_ff));
  if (range.first > 0 || others == 0) return sizes;
  const double most = share.beta * (1.0 + 0.5 * static_cast<double>(others));
  const double first = std::min({share.beta * share.first_layer, most, 1.0});
  const double rest = share.beta + (share.beta - first) / static_cast<double>(others);
  std::fill(sizes.begin(), sizes.end(), core_size(rest, n_ff));
  sizes[0] = core_size(first, n_ff);
  return sizes;
}

CoreSet select_core(Backend& backend, const NeuronCounts& counts, const CoreShare& share) {
  CoreSet set = pick(backend, counts.now(), share);
  set.scores = counts.read(counts.now()).layers;
  set.statistic = statistic_name(counts.spec().statistic);
  set.alpha = counts.spec().alpha;
  set.weighted = counts.spec().weighted;
  return set;
}

double similarity(const CoreSet& a, const CoreSet& b) {
  double sum = 0.0;
  int64_t n = 0;
  for (size_t i = 0; i < a.layers.size() && i < b.layers.size(); ++i) {
    if (!a.layers[i] || !b.layers[i]) continue;
    std::vector<int32_t> shared;
    std::set_intersection(a.layers[i]->begin(), a.layers[i]->end(), b.layers[i]->begin(),
                          b.layers[i]->end(), std::back_inserter(shared));
    const size_t larger = std::max(a.layers[i]->size(), b.layers[i]->size());
    sum += larger == 0 ? 0.0 : static_cast<double>(shared.size()) / static_cast<double>(larger);
    ++n;
  }
  return n == 0 ? 0.0 : sum / static_cast<double>(n);
}

namespace {

// What similarity() is on average for random sets of these sizes.
double chance_similarity(const CoreSet& a, const CoreSet& b) {
  double sum = 0.0;
  int64_t n = 0;
  for (size_t i = 0; i < a.layers.size(); ++i) {
    if (!a.layers[i] || !b.layers[i]) continue;
    sum += static_cast<double>(std::min(a.layers[i]->size(), b.layers[i]->size()));
    ++n;
  }
  return n == 0 ? 0.0 : sum / static_cast<double>(n * a.n_ff);
}

}  // namespace

std::optional<double> stability(Backend& backend, const NeuronCounts& counts, CoreShare share) {
  share.first_layer = 1.0;
  const int64_t n = counts.n_tokens();
  if (n < 2 || share.beta >= 1.0) return std::nullopt;
  const auto half = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n / 2)));
  const NeuronCounts::Snapshot* early = counts.snapshot(half);
  if (early == nullptr) return std::nullopt;
  CoreSet a;
  try {
    a = pick(backend, *early, share);
  } catch (const Error& e) {
    // A layer may still be silent after a few tokens: then there is nothing to compare with.
    if (e.kind() == ErrorKind::kNumeric) return std::nullopt;
    throw;
  }
  const CoreSet b = pick(backend, counts.now(), share);
  const double chance = chance_similarity(a, b);
  if (chance >= 1.0) return std::nullopt;
  return (similarity(a, b) - chance) / (1.0 - chance);
}

}  // namespace coreinfer
