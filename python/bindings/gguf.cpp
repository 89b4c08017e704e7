// coreinfer._core.GgufFile: the GGUF reader as Python sees it. Values become Python objects when
// they are first asked for; weights are only dequantised, never handed out raw.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "gguf/byte_reader.h"
#include "gguf/gguf_file.h"
#include "kernels/dequantize.h"

namespace coreinfer::python {

std::string system_path(nb::handle path) {
  PyObject* bytes = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw nb::python_error();
  const nb::bytes owner = nb::steal<nb::bytes>(bytes);
  return {owner.c_str(), owner.size()};
}

namespace {

// str where the bytes are UTF-8, else bytes.
nb::object to_text(std::string_view text) {
  PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr);
  if (str == nullptr) {
    PyErr_Clear();
    return nb::bytes(text.data(), text.size());
  }
  return nb::steal(str);
}

template <class T>
nb::object values_of(const MetadataEntry& entry) {
  if (entry.type != ValueType::kArray) {
    T value;
    std::memcpy(&value, entry.data.data(), sizeof value);
    return nb::cast(value);
  }
  Array<T> values = make_array<T>({entry.count});
  if (entry.count > 0) std::memcpy(values.data(), entry.data.data(), entry.data.size());
  return nb::cast(values);
}

nb::object to_python(const MetadataEntry& entry) {
  switch (entry.element) {
    case ValueType::kU8:
      return values_of<uint8_t>(entry);
    case ValueType::kI8:
      return values_of<int8_t>(entry);
    case ValueType::kU16:
      return values_of<uint16_t>(entry);
    case ValueType::kI16:
      return values_of<int16_t>(entry);
    case ValueType::kU32:
      return values_of<uint32_t>(entry);
    case ValueType::kI32:
      return values_of<int32_t>(entry);
    case ValueType::kU64:
      return values_of<uint64_t>(entry);
    case ValueType::kI64:
      return values_of<int64_t>(entry);
    case ValueType::kF32:
      return values_of<float>(entry);
    case ValueType::kF64:
      return values_of<double>(entry);
    case ValueType::kBool:
      return values_of<bool>(entry);  // the reader lets only 0 and 1 pass
    case ValueType::kString:
      break;
    case ValueType::kArray:
      throw_error(ErrorKind::kGguf, "arrays of arrays are not supported");
  }
  const std::vector<std::string_view> strings = Metadata::strings_of(entry);
  if (entry.type != ValueType::kArray) return to_text(strings.front());
  nb::list out;
  for (const std::string_view s : strings) out.append(to_text(s));
  return out;
}

nb::object to_python_path(const std::string& path) {
  return nb::steal(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

struct PyGgufFile {
  explicit PyGgufFile(std::shared_ptr<const GgufFile> opened) : file(std::move(opened)) {}
  explicit PyGgufFile(nb::handle path) {
    const std::string bytes = system_path(path);
    nb::gil_scoped_release release;
    file = GgufFile::open(bytes);
  }

  nb::dict metadata() {
    if (!metadata_cache.is_valid()) {
      nb::dict out;
      for (size_t i = 0; i < file->metadata().size(); ++i) {
        const MetadataEntry entry = file->metadata().entry(i);
        out[to_text(entry.key)] = to_python(entry);
      }
      metadata_cache = out;
    }
    return nb::borrow<nb::dict>(metadata_cache);
  }

  nb::object dequantize(const std::string& name) const {
    const TensorInfo* info = file->find(name);
    if (info == nullptr) {
      throw_error(ErrorKind::kGguf, "%s: tensor '%s' is missing", file->path().c_str(),
                  printable(name).c_str());
    }
    const Mat mat = file->mat(*info);
    const size_t rows = static_cast<size_t>(mat.rows), cols = static_cast<size_t>(mat.cols);
    file->check_unchanged();
    Array<float> values = make_array<float>({rows, cols});
    {
      nb::gil_scoped_release release;
      for (int64_t r = 0; r < mat.rows; ++r) {
        dequantize_row(mat.type, mat.row(r), values.data() + r * mat.cols, mat.cols);
      }
    }
    file->check_unchanged();
    return nb::cast(values);
  }

  std::shared_ptr<const GgufFile> file;
  nb::object metadata_cache;
};

}  // namespace

nb::object gguf_object(std::shared_ptr<const GgufFile> file) {
  return nb::cast(PyGgufFile(std::move(file)));
}

std::shared_ptr<const GgufFile> gguf_file(nb::handle object) {
  if (!nb::isinstance<PyGgufFile>(object)) return nullptr;
  return nb::cast<const PyGgufFile&>(object).file;
}

void bind_gguf(nb::module_& m) {
  nb::class_<TensorInfo>(m, "TensorInfo", "Name, type, shape and place of one tensor of a file.")
      .def_prop_ro("name", [](const TensorInfo& t) { return t.name; })
      .def_prop_ro(
          "type", [](const TensorInfo& t) { return gguf_type_name(t.type); },
          "GGUF's name of the element type, for example 'Q4_K'.")
      .def_prop_ro(
          "shape",
          [](const TensorInfo& t) {
            nb::list shape;
            for (int i = 0; i < t.n_dims; ++i) shape.append(t.ne[static_cast<size_t>(i)]);
            return nb::tuple(shape);
          },
          "Dimensions in GGUF's order: shape[0] is the length of a row.")
      .def_ro("nbytes", &TensorInfo::nbytes)
      .def_ro("offset", &TensorInfo::offset, "Bytes from the start of its file.")
      .def_ro("part", &TensorInfo::part, "Index of its file in GgufFile.files.")
      .def("__repr__", [](const TensorInfo& t) {
        return "TensorInfo(" + t.name + ", " + std::string(gguf_type_name(t.type)) + ", " +
               t.shape() + ")";
      });

  nb::class_<PyGgufFile>(m, "GgufFile",
                         "A GGUF model file (or split set), checked and mapped read-only.\n\n"
                         "Raises GGUFError when it is malformed, OSError when it cannot be read.")
      .def(nb::init<nb::handle>(), nb::arg("path"),
           nb::sig("def __init__(self, path: str | bytes | os.PathLike) -> None"))
      .def_prop_ro("path", [](const PyGgufFile& f) { return to_python_path(f.file->path()); })
      .def_prop_ro("version", [](const PyGgufFile& f) { return f.file->version(); })
      .def_prop_ro("files",
                   [](const PyGgufFile& f) {
                     nb::list out;
                     for (const std::string& path : f.file->files()) {
                       out.append(to_python_path(path));
                     }
                     return out;
                   })
      .def_prop_ro("metadata", &PyGgufFile::metadata,
                   "Key -> value: int, float, bool, str (bytes where not UTF-8), NumPy arrays of\n"
                   "numbers, lists of strings. The same dict on every access.")
      .def_prop_ro("tensors",
                   [](const PyGgufFile& f) {
                     nb::list out;
                     for (const TensorInfo& t : f.file->tensors()) out.append(nb::cast(t));
                     return out;
                   })
      .def_prop_ro("fingerprint",
                   [](const PyGgufFile& f) {
                     nb::gil_scoped_release release;
                     return f.file->fingerprint();
                   })
      .def("dequantize", &PyGgufFile::dequantize, nb::arg("name"),
           "The tensor as float32 of shape (rows, cols); dimensions above the first are rows.\n\n"
           "Raises GGUFError when it is missing or of an unsupported type, OSError when the file\n"
           "was truncated or written to since it was opened.")
      .def(
          "check_unchanged", [](const PyGgufFile& f) { f.file->check_unchanged(); },
          "Raise OSError when the file was truncated or written to since it was opened.");
}

}  // namespace coreinfer::python
