#include "bench/model_facts.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "base/error.h"
#include "tensor/dtype.h"

namespace coreinfer::bench {
namespace {

// GGUF's general.file_type, where its name is not simply that of a tensor type.
const std::map<uint32_t, const char*> kMixtures = {
    {10, "Q2_K - Medium"}, {11, "Q3_K - Small"},  {12, "Q3_K - Medium"},
    {13, "Q3_K - Large"},  {14, "Q4_K - Small"},  {15, "Q4_K - Medium"},
    {16, "Q5_K - Small"},  {17, "Q5_K - Medium"}, {21, "Q2_K - Small"},
};

// The named mixture, else the type that holds most bytes.
std::string file_type(const GgufFile& file) {
  if (const auto id = file.metadata().maybe_u32("general.file_type")) {
    const auto found = kMixtures.find(*id);
    if (found != kMixtures.end()) return found->second;
  }
  std::map<uint32_t, uint64_t> bytes;
  for (const TensorInfo& tensor : file.tensors()) bytes[tensor.type] += tensor.nbytes;
  const auto most = std::max_element(
      bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return std::string(gguf_type_name(most->first));
}

std::string size_label(const GgufFile& file, uint64_t n_params) {
  const std::string label = file.metadata().maybe_string("general.size_label").value_or("");
  const auto plain = [](unsigned char c) { return std::isalnum(c) != 0 || c == '.' || c == '-'; };
  if (!label.empty() && label.size() <= 16 && std::all_of(label.begin(), label.end(), plain)) {
    return label;
  }
  const auto n = static_cast<double>(n_params);
  if (n >= 0.95e9) return format_string("%.*fB", n < 3e9 ? 1 : 0, n * 1e-9);
  if (n >= 0.95e6) return format_string("%.0fM", n * 1e-6);
  return format_string("%.0fK", n * 1e-3);
}

}  // namespace

ModelFacts model_facts(const GgufFile& file) {
  ModelFacts facts;
  facts.path = file.path();
  for (const TensorInfo& tensor : file.tensors()) {
    facts.bytes += tensor.nbytes;
    uint64_t elements = 1;
    for (const int64_t n : tensor.ne) elements *= static_cast<uint64_t>(n);
    facts.n_params += elements;
  }
  facts.type = file.metadata().string("general.architecture") + " " +
               size_label(file, facts.n_params) + " " + file_type(file);
  return facts;
}

}  // namespace coreinfer::bench
