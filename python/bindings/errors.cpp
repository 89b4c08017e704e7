// C++ Error to Python exceptions, by kind.
#include <cstring>

#include "base/error.h"
#include "bindings/module.h"

namespace coreinfer::python {

void bind_errors(nb::module_& m) {
  // Never released: exceptions may still be raised while the interpreter shuts down.
  static PyObject* gguf_error = PyErr_NewExceptionWithDoc(
      "coreinfer._core.GGUFError", "A model file is malformed, or needs what is not supported.",
      PyExc_ValueError, nullptr);
  static PyObject* numeric_error = PyErr_NewExceptionWithDoc(
      "coreinfer._core.NumericError",
      "NaN or Inf in an activation, or a layer without activity; names layer and token.",
      PyExc_ArithmeticError, nullptr);
  m.attr("GGUFError") = nb::borrow(gguf_error);
  m.attr("NumericError") = nb::borrow(numeric_error);
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error& e) {
      PyObject* type = PyExc_RuntimeError;
      switch (e.kind()) {
        case ErrorKind::kValue:
          type = PyExc_ValueError;
          break;
        case ErrorKind::kGguf:
          type = gguf_error;
          break;
        case ErrorKind::kIo:
          type = PyExc_OSError;
          break;
        case ErrorKind::kState:
          type = PyExc_RuntimeError;
          break;
        case ErrorKind::kNumeric:
          type = numeric_error;
          break;
        case ErrorKind::kMemory:
          type = PyExc_MemoryError;
          break;
        case ErrorKind::kCancelled:
          // The signal handler's own exception is the one to see, where it raised one.
          if (PyErr_Occurred()) return;
          type = PyExc_KeyboardInterrupt;
          break;
      }
      // A path in it may hold bytes that are not UTF-8.
      const nb::object message = nb::steal(PyUnicode_DecodeUTF8(
          e.what(), static_cast<Py_ssize_t>(std::strlen(e.what())), "backslashreplace"));
      if (message.is_valid()) PyErr_SetObject(type, message.ptr());
    }
  });
}

}  // namespace coreinfer::python
