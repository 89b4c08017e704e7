// coreinfer._core.testing: the scalar dequantisers and number conversions by themselves, so that
// tests can compare them with NumPy and with the gguf package.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "base/error.h"
#include "base/half.h"
#include "bindings/module.h"
#include "bindings/numpy_array.h"
#include "kernels/dequantize.h"

namespace coreinfer::python {
namespace {

template <class T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::ndarray<nb::numpy, float> dequantize(const std::string& type_name, nb::bytes data) {
  const DTypeTraits* type = nullptr;
  for (const DTypeTraits& t : kDTypes) {
    if (t.name == type_name) type = &t;
  }
  if (type == nullptr) {
    throw_error(ErrorKind::kValue, "unknown tensor type '%s'", type_name.c_str());
  }
  if (data.size() % static_cast<size_t>(type->block_bytes) != 0) {
    throw_error(ErrorKind::kValue, "%zu bytes of %s, expected a multiple of %d", data.size(),
                type_name.c_str(), type->block_bytes);
  }
  const size_t n =
      data.size() / static_cast<size_t>(type->block_bytes) * static_cast<size_t>(type->block_size);
  std::unique_ptr<float[]> values(new float[n]);
  dequantize_row(type->type, reinterpret_cast<const std::byte*>(data.c_str()), values.get(),
                 static_cast<int64_t>(n));
  return owned_array(std::move(values), {n});
}

template <class To, class From, To (*kConvert)(From)>
nb::ndarray<nb::numpy, To> convert(Input<From> in) {
  std::unique_ptr<To[]> out(new To[in.size()]);
  for (size_t i = 0; i < in.size(); ++i) out[i] = kConvert(in.data()[i]);
  return owned_array(std::move(out), {in.size()});
}

}  // namespace

void bind_testing_gguf(nb::module_& testing) {
  testing.def("dequantize", &dequantize, nb::arg("type_name"), nb::arg("data"),
              "Packed blocks (bytes) of the named type as float32 of shape (n,).");
  testing.def("f16_to_f32", &convert<float, uint16_t, f16_to_f32>, nb::arg("bits"));
  testing.def("f32_to_f16", &convert<uint16_t, float, f32_to_f16>, nb::arg("values"));
  testing.def("bf16_to_f32", &convert<float, uint16_t, bf16_to_f32>, nb::arg("bits"));
  testing.def("f32_to_bf16", &convert<uint16_t, float, f32_to_bf16>, nb::arg("values"));
}

}  // namespace coreinfer::python
