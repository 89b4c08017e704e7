// A Backend of two, for a model of which only some layers fit a GPU: whole layers are computed
// there, the others, the embeddings and the head on the CPU. Flows in: both backends and what lies
// on the GPU. Rows are in host memory; each operation of a GPU layer brings its rows over and back,
// a few microseconds a step beside the milliseconds that the layer would take on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "backend/backend.h"

namespace coreinfer {

struct GpuPart {
  int64_t first_layer = 0;  // this one and all after it
  // Where the model file has theirs: each tensor's begin and end.
  std::map<const std::byte*, const std::byte*> tensors;
};

std::unique_ptr<Backend> make_split_backend(std::unique_ptr<Backend> cpu,
                                            std::unique_ptr<Backend> gpu, GpuPart part);

}  // namespace coreinfer
