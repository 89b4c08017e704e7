// coreinfer._core.testing: the scalar dequantisers and number conversions by themselves, the
// typed getters of the GGUF reader and the file mapping under it, so that tests can reach them.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "base/mmap_file.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "gguf/gguf_file.h"
#include "kernels/dequantize.h"

namespace coreinfer::python {
namespace {

template <class T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Array<float> dequantize(const std::string& type_name, nb::bytes data) {
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
  Array<float> values = make_array<float>({n});
  dequantize_row(type->type, reinterpret_cast<const std::byte*>(data.c_str()), values.data(),
                 static_cast<int64_t>(n));
  return values;
}

template <class To, class From, To (*kConvert)(From)>
Array<To> convert(Input<From> in) {
  Array<To> out = make_array<To>({in.size()});
  for (size_t i = 0; i < in.size(); ++i) out.data()[i] = kConvert(in.data()[i]);
  return out;
}

// One of Metadata's getters by its name, opened anew: what the model loader would get.
nb::object metadata_value(const std::string& path, const std::string& getter,
                          const std::string& key) {
  const auto file = GgufFile::open(path);
  const Metadata& m = file->metadata();
  if (getter == "u32") return nb::cast(m.u32(key));
  if (getter == "i32") return nb::cast(m.i32(key));
  if (getter == "u64") return nb::cast(m.u64(key));
  if (getter == "f32") return nb::cast(m.f32(key));
  if (getter == "boolean") return nb::cast(m.boolean(key));
  if (getter == "string") return nb::cast(m.string(key));
  if (getter == "maybe_u32") return nb::cast(m.maybe_u32(key));
  if (getter == "maybe_i32") return nb::cast(m.maybe_i32(key));
  if (getter == "maybe_u64") return nb::cast(m.maybe_u64(key));
  if (getter == "maybe_f32") return nb::cast(m.maybe_f32(key));
  if (getter == "maybe_boolean") return nb::cast(m.maybe_boolean(key));
  if (getter == "maybe_string") return nb::cast(m.maybe_string(key));
  if (getter == "array_size") return nb::cast(m.array_size(key));
  if (getter == "integers") return nb::cast(m.integers(key));
  if (getter == "floats") return nb::cast(m.floats(key));
  if (getter == "booleans") return nb::cast(m.booleans(key));
  if (getter == "strings") {
    nb::list out;
    for (const std::string_view s : m.strings(key)) out.append(nb::bytes(s.data(), s.size()));
    return out;
  }
  throw_error(ErrorKind::kValue, "unknown getter '%s'", getter.c_str());
}

// (type name, rows, cols) of GgufFile::require or maybe with a shape of one or two dimensions.
nb::object tensor_as(const std::string& path, const std::string& name,
                     const std::vector<int64_t>& ne, bool required) {
  const auto file = GgufFile::open(path);
  if (ne.empty() || ne.size() > 2) throw_error(ErrorKind::kValue, "expected 1 or 2 dimensions");
  const auto ask = [&](std::initializer_list<int64_t> shape) {
    return required ? file->require(name, shape) : file->maybe(name, shape);
  };
  const Mat mat = ne.size() == 1 ? ask({ne[0]}) : ask({ne[0], ne[1]});
  if (mat.empty()) return nb::none();
  return nb::make_tuple(std::string(traits(mat.type).name), mat.rows, mat.cols);
}

}  // namespace

void bind_testing_gguf(nb::module_& testing) {
  testing.def("dequantize", &dequantize, nb::arg("type_name"), nb::arg("data"),
              "Packed blocks (bytes) of the named type as float32 of shape (n,).");
  testing.def("f16_to_f32", &convert<float, uint16_t, f16_to_f32>, nb::arg("bits"));
  testing.def("f32_to_f16", &convert<uint16_t, float, f32_to_f16>, nb::arg("values"));
  testing.def("bf16_to_f32", &convert<float, uint16_t, bf16_to_f32>, nb::arg("bits"));
  testing.def("f32_to_bf16", &convert<uint16_t, float, f32_to_bf16>, nb::arg("values"));

  testing.def("metadata_value", &metadata_value, nb::arg("path"), nb::arg("getter"),
              nb::arg("key"));
  testing.def("tensor_as", &tensor_as, nb::arg("path"), nb::arg("name"), nb::arg("ne"),
              nb::arg("required") = true);
  testing.def(
      "require_supported_types",
      [](const std::string& path) { GgufFile::open(path)->require_supported_types(); },
      nb::arg("path"));

  nb::class_<MmapFile>(testing, "MmapFile", "A file mapped read-only, without the GGUF reader.")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def_prop_ro("size", &MmapFile::size)
      .def("read_mapped",
           [](const MmapFile& f, size_t offset, size_t n) {
             if (offset > f.size() || n > f.size() - offset) {
               throw_error(ErrorKind::kValue, "outside the mapping");
             }
             return nb::bytes(f.data() + offset, n);
           })
      .def("advise_dontneed", [](const MmapFile& f) { f.advise_dontneed(f.data(), f.size()); })
      .def("advise_willneed", [](const MmapFile& f) { f.advise_willneed(f.data(), f.size()); })
      .def("check_unchanged", &MmapFile::check_unchanged);
}

}  // namespace coreinfer::python
