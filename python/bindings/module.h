// The pieces of coreinfer._core: each file binds one area and is called once by module.cpp.
// Translation only: one core call a def, the GIL released around anything that computes.
#pragma once

#include <nanobind/nanobind.h>

namespace coreinfer::python {

namespace nb = nanobind;

void bind_errors(nb::module_& m);    // C++ Error -> Python exceptions
void bind_gguf(nb::module_& m);      // GgufFile
void bind_engine(nb::module_& m);    // Engine, Session
void bind_testing(nb::module_& m);   // coreinfer._core.testing: kernels and neuron steps by themselves
void bind_testing_gguf(nb::module_& testing);  // dequantisers and 16-bit floats

}  // namespace coreinfer::python
