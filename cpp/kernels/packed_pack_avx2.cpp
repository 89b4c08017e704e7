// Packing compiled for AVX2: the plain text, in wider vectors.
#include "kernels/packed_strip.h"

#if defined(__x86_64__)
#include <cstring>

#include "kernels/linear_types.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")

namespace coreinfer {
namespace {

#include "kernels/packed_source.inc"
//
#include "kernels/packed_scales.inc"
//
#include "kernels/packed_strip.inc"

}  // namespace
#pragma GCC pop_options

PackStripFn pack_strip_avx2(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

}  // namespace coreinfer

#endif
