// What rows say about a model file: a short name, its size and its parameters.
#pragma once

#include <cstdint>
#include <string>

#include "gguf/gguf_file.h"

namespace coreinfer::bench {

struct ModelFacts {
  std::string path;
  std::string type;        // architecture, size and file type: "llama 7B Q4_0"
  uint64_t bytes = 0;      // of all tensors
  uint64_t n_params = 0;   // elements of all tensors
  std::string activation;  // that is computed
};

// All but the activation, which is not the file's alone to say.
ModelFacts model_facts(const GgufFile& file);

}  // namespace coreinfer::bench
