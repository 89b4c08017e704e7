// The pieces of coreinfer._core: each file binds one area and is called once by module.cpp.
// Translation only: one core call a def, the GIL released around anything that computes.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>

namespace coreinfer {
class GgufFile;
}

namespace coreinfer::python {

namespace nb = nanobind;

// A str, bytes or os.PathLike as the bytes that the system knows the file by.
std::string system_path(nb::handle path);

void bind_errors(nb::module_& m);                              // C++ Error -> Python exceptions
void bind_gguf(nb::module_& m);                                // GgufFile
nb::object gguf_object(std::shared_ptr<const GgufFile> file);  // as Python's GgufFile
std::shared_ptr<const GgufFile> gguf_file(nb::handle object);  // null if it is none
void bind_engine(nb::module_& m);                              // Engine, memory()
void bind_session(nb::module_& m);                             // CoreSet, Sampler, Session

// coreinfer._core.testing, an area a file:
void bind_testing(nb::module_& testing);          // calls the ones below
void bind_testing_gguf(nb::module_& testing);     // dequantize
void bind_testing_linear(nb::module_& testing);   // matrix kernels, packing, compaction
void bind_testing_vector(nb::module_& testing);   // row kernels, attention, statistics
void bind_testing_neurons(nb::module_& testing);  // select, similarity
void bind_testing_engine(nb::module_& testing);   // drafting of exact mode
void bind_testing_cuda(nb::module_& testing);     // any backend, the CUDA library too

}  // namespace coreinfer::python
