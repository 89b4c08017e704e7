#include "neurons/compact.h"

namespace coreinfer {

CompactWeights compact(Backend& backend, const ModelWeights& weights, const CoreSet& set) {
  std::vector<CompactSource> sources;
  std::vector<size_t> picked;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    if (!set.layers[i] || static_cast<int64_t>(set.layers[i]->size()) == set.n_ff) continue;
    CompactSource source = weights.layers[i].source;
    source.neurons = *set.layers[i];
    source.finished = [&weights, i] { weights.drop_ffn_pages(i); };
    sources.push_back(std::move(source));
    picked.push_back(i);
  }
  CompactWeights result;
  if (!sources.empty()) result = backend.compact(sources);
  std::vector<FfnWeights> layers;
  for (size_t i = 0, j = 0; i < weights.layers.size(); ++i) {
    const bool is_picked = j < picked.size() && picked[j] == i;
    layers.push_back(is_picked ? std::move(result.layers[j++]) : weights.stage_ffn(i));
  }
  result.layers = std::move(layers);
  return result;
}

}  // namespace coreinfer
