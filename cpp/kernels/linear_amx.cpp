// Matrix kernels of the bf16 family with AMX tiles; unpacking and rounding are AVX-512's.
#include "kernels/linear_bf16.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/amx_tiles.h"

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

namespace coreinfer {
namespace {

// ---- Tiles: 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights ------------------------------------

void begin() { configure_tiles(); }
void end() { _tile_release(); }

template <bool kTwoTokens, bool kTwoPanels>
inline void multiply_block(const uint16_t* const* panels, int64_t n_tiles, const uint16_t* tokens,
                           int64_t token_stride, bool first, float* const* sums, int64_t at) {
  constexpr int kStride = 64;
  const uint16_t* const tokens1 = tokens + token_stride;
  const uint16_t* const panel0 = panels[0];
  const uint16_t* const panel1 = kTwoPanels ? panels[1] : nullptr;
  constexpr int64_t kSums = kTileTokens * kStripRows;
  float* const c0 = sums[0] + at;
  float* const c1 = kTwoPanels ? sums[1] + at : nullptr;
  if (first) {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoTokens) _tile_zero(2);
    if constexpr (kTwoTokens && kTwoPanels) _tile_zero(3);
  } else {
    _tile_loadd(0, c0, kStride);
    if constexpr (kTwoPanels) _tile_loadd(1, c1, kStride);
    if constexpr (kTwoTokens) _tile_loadd(2, c0 + kSums, kStride);
    if constexpr (kTwoTokens && kTwoPanels) _tile_loadd(3, c1 + kSums, kStride);
  }
  for (int64_t k = 0; k < n_tiles; ++k) {
    _tile_loadd(4, tokens + k * kTileSize, kStride);
    _tile_loadd(6, panel0 + k * kTileSize, kStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, panel1 + k * kTileSize, kStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoTokens) {
      _tile_loadd(5, tokens1 + k * kTileSize, kStride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c0, kStride);
  if constexpr (kTwoPanels) _tile_stored(1, c1, kStride);
  if constexpr (kTwoTokens) _tile_stored(2, c0 + kSums, kStride);
  if constexpr (kTwoTokens && kTwoPanels) _tile_stored(3, c1 + kSums, kStride);
}

void multiply(const uint16_t* const* panels, int n_panels, int64_t n_tiles, const uint16_t* tokens,
              int64_t token_stride, int64_t n_token_tiles, bool first, float* const* sums) {
  constexpr int64_t kSums = kTileTokens * kStripRows;
  compiler_barrier();
  int64_t t = 0;
  for (; t + 2 <= n_token_tiles; t += 2) {
    const uint16_t* const from = tokens + t * token_stride;
    if (n_panels == 2) {
      multiply_block<true, true>(panels, n_tiles, from, token_stride, first, sums, t * kSums);
    } else {
      multiply_block<true, false>(panels, n_tiles, from, token_stride, first, sums, t * kSums);
    }
  }
  if (t < n_token_tiles) {
    const uint16_t* const from = tokens + t * token_stride;
    if (n_panels == 2) {
      multiply_block<false, true>(panels, n_tiles, from, token_stride, first, sums, t * kSums);
    } else {
      multiply_block<false, false>(panels, n_tiles, from, token_stride, first, sums, t * kSums);
    }
  }
  compiler_barrier();
}

}  // namespace
#pragma GCC pop_options

const Bf16Kernels& bf16_kernels_amx() {
  static const Bf16Kernels table = [] {
    Bf16Kernels t = bf16_kernels_avx512();
    t.packed = true;
    t.multiply = multiply;
    t.begin = begin;
    t.end = end;
    return t;
  }();
  return table;
}

}  // namespace coreinfer

#endif
