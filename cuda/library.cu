// The one function that the shared library exports; see backend/cuda_loader.h. Errors of making a
// backend go back as text; later ones are thrown, as coreinfer::Error.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <cstdio>

#include "backend.h"

extern "C" __attribute__((visibility("default"))) coreinfer::Backend* coreinfer_make_cuda_backend(
    int interface, const coreinfer::CudaOptions* options, int* kind, char* message, size_t size) {
  try {
    if (interface != coreinfer::kCudaInterface) {
      coreinfer::throw_error(coreinfer::ErrorKind::kState,
                             "the CUDA backend has interface %d, the core wants %d: install both "
                             "from one build",
                             coreinfer::kCudaInterface, interface);
    }
    return new coreinfer::cuda::CudaBackend(*options);
  } catch (const coreinfer::Error& e) {
    *kind = static_cast<int>(e.kind());
    std::snprintf(message, size, "%s", e.what());
  } catch (const std::exception& e) {
    *kind = static_cast<int>(coreinfer::ErrorKind::kState);
    std::snprintf(message, size, "%s", e.what());
  }
  return nullptr;
}
