// owned_array: hands a C++ buffer to NumPy without a copy; the array frees it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <memory>

namespace coreinfer::python {

template <class T>
nanobind::ndarray<nanobind::numpy, T> owned_array(std::unique_ptr<T[]> values,
                                                  std::initializer_list<size_t> shape) {
  T* data = values.release();
  nanobind::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nanobind::ndarray<nanobind::numpy, T>(data, shape, owner);
}

}  // namespace coreinfer::python
