// The CUDA backend as the rest of the core sees it: a shared library of its own, opened when a GPU
// is asked for. Flows in: which device and how much of its memory. Flows out: a Backend, or an
// Error that says what is missing. Nothing here needs CUDA to be compiled or linked.
#pragma once

#include <cstddef>
#include <memory>

#include "backend/backend.h"

namespace coreinfer {

struct CudaOptions {
  int device = 0;
  bool f32_activations = false;  // no 8-bit or 16-bit rounding of activations anywhere
  size_t memory_limit = 0;       // bytes of device memory; 0: what is free
};

// The library and this header must be of one build: raised with every change of backend.h or of
// the options.
inline constexpr int kCudaInterface = 4;

// What the library exports, as coreinfer_make_cuda_backend. Null where it failed: then *kind is the
// ErrorKind and `message` (size bytes) says why.
using MakeCudaBackend = Backend* (*)(int interface, const CudaOptions* options, int* kind,
                                     char* message, size_t size);

// Looked for: $COREINFER_CUDA_LIBRARY, else libcoreinfer_cuda.so beside the file that holds this
// code, or in the folder above. Throws kState where it is not there (built without CUDA), does not
// open, or finds no usable device or driver.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

}  // namespace coreinfer
