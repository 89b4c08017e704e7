#include "bindings/module.h"

namespace nb = nanobind;
using namespace coreinfer::python;

NB_MODULE(_core, m) {
  m.doc() = "The C++ core: GGUF files, engines, sessions. Users want coreinfer.Llama instead.";
  bind_errors(m);
  bind_gguf(m);
  bind_engine(m);
  bind_session(m);
  nb::module_ testing = m.def_submodule(
      "testing",
      "Kernels and neuron steps by themselves, for the test suite; not a public interface.");
  bind_testing(testing);
}
