// NumPy arrays in and out: inputs are read in place (C-contiguous, exact type), outputs own their
// memory through a capsule.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "bindings/module.h"

namespace coreinfer::python {

template <typename T>
using Array = nb::ndarray<nb::numpy, T>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T, typename ArrayT>
std::span<const T> span_of(const ArrayT& a) {
  return {static_cast<const T*>(a.data()), a.size()};
}

// An array of the given shape, not initialised.
template <typename T>
Array<T> make_array(std::initializer_list<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  T* data = new T[n];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Array<T>(data, shape.size(), shape.begin(), owner);
}

template <typename T>
Array<T> copy_array(std::span<const T> from) {
  Array<T> a = make_array<T>({from.size()});
  std::copy(from.begin(), from.end(), a.data());
  return a;
}

}  // namespace coreinfer::python
