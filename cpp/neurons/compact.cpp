#include "neurons/compact.h"

#include <numeric>

#include "neurons/patch.h"

namespace coreinfer {
namespace {

constexpr size_t kTablesOfALayer = 8192;  // what does not grow with the neurons

}  // namespace

CompactWeights compact(Backend& backend, const ModelWeights& weights, const CoreSet& set) {
  std::vector<CompactSource> sources;
  std::vector<size_t> picked;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    if (!set.layers[i] || static_cast<int64_t>(set.layers[i]->size()) == set.n_ff) continue;
    CompactSource source = weights.layers[i].source;
    source.neurons = *set.layers[i];
    if (weights.memory_limited) source.finished = [&weights, i] { weights.drop_ffn_pages(i); };
    sources.push_back(std::move(source));
    picked.push_back(i);
  }
  CompactWeights result;
  if (!sources.empty()) result = backend.compact(sources, nullptr);
  std::vector<FfnWeights> layers;
  for (size_t i = 0, j = 0; i < weights.layers.size(); ++i) {
    const bool is_picked = j < picked.size() && picked[j] == i;
    layers.push_back(is_picked ? std::move(result.layers[j++]) : weights.stage_ffn(i));
    if (!set.patch.empty()) attach(backend, set.patch[i], layers.back());
  }
  result.layers = std::move(layers);
  return result;
}

PassingCompact::PassingCompact(Backend& backend, const ModelWeights& weights,
                               const NeuronCounts& counts, const CoreShare& share,
                               size_t room_bytes)
    : backend_(backend),
      weights_(weights),
      counts_(counts),
      range_(share.range(static_cast<int64_t>(weights.layers.size()))),
      sizes_(core_sizes(share, static_cast<int64_t>(weights.layers.size()), counts.n_ff())) {
  // A backend may put tables of the picked neurons beside the weights.
  const int64_t picked = std::accumulate(sizes_.begin(), sizes_.end(), int64_t{0});
  const auto tables = static_cast<size_t>(20 * picked) + sizes_.size() * kTablesOfALayer;
  room_.buffer = backend.allocate(static_cast<int64_t>((room_bytes + tables) / sizeof(float)));
  set_.n_ff = counts.n_ff();
}

void PassingCompact::layer(const FfnWeights& dense) {
  const size_t i = set_.layers.size();
  set_.layers.emplace_back();
  made_.layers.push_back(dense);
  if (!range_.contains(static_cast<int64_t>(i))) return;
  const Rows scores = counts_.now().rows().slice(static_cast<int64_t>(i), 1);
  // Without any, select_core will say so; until then the layer is as good as dense.
  set_.layers[i] =
      std::move(backend_.select(scores, sizes_[i - static_cast<size_t>(range_.first)])[0]);
  const auto k = static_cast<int64_t>(set_.layers[i]->size());
  if (k == 0 || k == set_.n_ff) return;
  CompactSource source = weights_.layers[i].source;
  source.neurons = *set_.layers[i];
  CompactWeights one = backend_.compact({&source, 1}, &room_);
  made_.layers[i] = std::move(one.layers[0]);
  made_.buffer_bytes += one.buffer_bytes;
  made_.source_bytes += one.source_bytes;
}

bool PassingCompact::take(const CoreSet& set, CompactWeights* to) {
  if (!set_.same_neurons(set)) return false;
  *to = std::move(made_);
  return true;
}

}  // namespace coreinfer
