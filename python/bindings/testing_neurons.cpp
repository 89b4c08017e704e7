#include "bindings/arrays.h"
#include "neurons/core_set.h"

namespace coreinfer::python {

void bind_testing_neurons(nb::module_& testing) {
  testing.def("core_size", &core_size, nb::arg("beta"), nb::arg("n"));
  testing.def("similarity", &similarity, nb::arg("a"), nb::arg("b"));
}

}  // namespace coreinfer::python
