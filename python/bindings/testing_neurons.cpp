#include <algorithm>

#include "bindings/arrays.h"
#include "neurons/dense_algebra.h"

namespace coreinfer::python {

void bind_testing_neurons(nb::module_& testing) {
  testing.def(
      "orthonormalise",
      [](const nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& x) {
        Array<float> out = make_array<float>({x.shape(0), x.shape(1)});
        std::copy_n(x.data(), x.size(), out.data());
        orthonormalise(out.data(), static_cast<int64_t>(x.shape(0)),
                       static_cast<int64_t>(x.shape(1)));
        return out;
      },
      nb::arg("x").noconvert(), "The rows made orthonormal, dependent ones zero.");
}

}  // namespace coreinfer::python
