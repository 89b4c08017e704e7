#include "backend/cuda_loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "base/error.h"

namespace coreinfer {
namespace {

constexpr const char* kLibrary = "libcoreinfer_cuda.so";
constexpr const char* kSymbol = "coreinfer_make_cuda_backend";

std::string folder_of_this_code() {
  Dl_info info;
  static const int here = 0;
  std::string path;
  if (dladdr(&here, &info) != 0 && info.dli_fname != nullptr) path = info.dli_fname;
  if (path.find('/') == std::string::npos) {  // a program that was found in PATH
    char program[4096];
    const ssize_t n = readlink("/proc/self/exe", program, sizeof(program));
    path.assign(program, n > 0 ? static_cast<size_t>(n) : 0);
  }
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string library_path() {
  const std::string folder = folder_of_this_code();
  const std::string above = folder + "/../" + kLibrary;  // of coreinfer/bin
  return access(above.c_str(), F_OK) == 0 ? above : folder + "/" + kLibrary;
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  const char* given = std::getenv("COREINFER_CUDA_LIBRARY");
  const bool is_given = given != nullptr && *given != '\0';
  const std::string path = is_given ? given : library_path();
  if (!is_given && access(path.c_str(), F_OK) != 0) {
    throw_error(ErrorKind::kState,
                "this build has no CUDA backend (%s is not there): build with COREINFER_CUDA=ON, "
                "or compute on the CPU with n_gpu_layers=0",
                path.c_str());
  }
  // Stays open: backends, and what they made, live in it.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw_error(ErrorKind::kState, "the CUDA backend cannot be opened: %s", dlerror());
  }
  const auto make = reinterpret_cast<MakeCudaBackend>(dlsym(library, kSymbol));
  if (make == nullptr) {
    throw_error(ErrorKind::kState, "%s is no CUDA backend: it has no function %s", path.c_str(),
                kSymbol);
  }
  char message[2048] = "";
  int kind = static_cast<int>(ErrorKind::kState);
  Backend* backend = make(kCudaInterface, &options, &kind, message, sizeof(message));
  if (backend == nullptr) throw Error(static_cast<ErrorKind>(kind), message);
  return std::unique_ptr<Backend>(backend);
}

}  // namespace coreinfer
