// Packing compiled for AVX-512 with VBMI2, which gathers picked columns 64 codes at a time: their
// mask is the same for all rows.
#include "kernels/packed_strip.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "kernels/linear_types.h"
#include "tensor/blocks.h"

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2")

namespace coreinfer {
namespace {

#include "kernels/packed_source.inc"

inline void pick_codes(const uint8_t* codes, const ColumnMap& map, int64_t column, int n,
                       uint8_t* to) {
  for (int c = 0; c < n; c += 64) {
    const uint64_t mask = map.masks[(column + c) / 64];
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(mask, _mm512_loadu_si512(codes + c)));
    to += __builtin_popcountll(mask);
  }
}

#include "kernels/packed_strip.inc"

}  // namespace
#pragma GCC pop_options

PackStripFn pack_strip_avx512(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

}  // namespace coreinfer

#endif
