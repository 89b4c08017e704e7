// Turns a run-time type into a template argument, in one place for the matrix kernels.
#pragma once

#include "base/error.h"
#include "tensor/dtype.h"

namespace coreinfer {

// f.template operator()<type>() for a quantised type.
template <class F>
constexpr auto for_packed_type(DType type, const F& f) {
  switch (type) {
    case DType::kQ4_0:
      return f.template operator()<DType::kQ4_0>();
    case DType::kQ4_1:
      return f.template operator()<DType::kQ4_1>();
    case DType::kQ5_0:
      return f.template operator()<DType::kQ5_0>();
    case DType::kQ5_1:
      return f.template operator()<DType::kQ5_1>();
    case DType::kQ8_0:
      return f.template operator()<DType::kQ8_0>();
    case DType::kQ2_K:
      return f.template operator()<DType::kQ2_K>();
    case DType::kQ3_K:
      return f.template operator()<DType::kQ3_K>();
    case DType::kQ4_K:
      return f.template operator()<DType::kQ4_K>();
    case DType::kQ5_K:
      return f.template operator()<DType::kQ5_K>();
    case DType::kQ6_K:
      return f.template operator()<DType::kQ6_K>();
    case DType::kIQ4_NL:
      return f.template operator()<DType::kIQ4_NL>();
    case DType::kIQ4_XS:
      return f.template operator()<DType::kIQ4_XS>();
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      break;
  }
  throw_error(ErrorKind::kState, "no packed kernel for %s", traits(type).name.data());
}

// f.template operator()<type>() for a float type.
template <class F>
constexpr auto for_float_type(DType type, const F& f) {
  switch (type) {
    case DType::kF32:
      return f.template operator()<DType::kF32>();
    case DType::kF16:
      return f.template operator()<DType::kF16>();
    case DType::kBF16:
      return f.template operator()<DType::kBF16>();
    default:
      break;
  }
  throw_error(ErrorKind::kState, "no float kernel for %s", traits(type).name.data());
}

}  // namespace coreinfer
