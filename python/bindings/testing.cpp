// coreinfer._core.testing: what the test suite needs of the core by itself.
#include "bindings/module.h"

namespace coreinfer::python {

void bind_testing(nb::module_& testing) {
  bind_testing_gguf(testing);
  bind_testing_linear(testing);
  bind_testing_vector(testing);
  bind_testing_neurons(testing);
  bind_testing_engine(testing);
  bind_testing_cuda(testing);
}

}  // namespace coreinfer::python
