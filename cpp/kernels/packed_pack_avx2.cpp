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

inline void pick_codes(const uint8_t* codes, const ColumnMap& map, int64_t column, int,
                       uint8_t* to) {
  const int32_t* const first = map.first_pick + column / kSuperCols;
  for (int32_t i = first[0]; i < first[1]; ++i) *to++ = codes[map.picks[i] - column];
}

#include "kernels/packed_strip.inc"

}  // namespace
#pragma GCC pop_options

PackStripFn pack_strip_avx2(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

}  // namespace coreinfer

#endif
