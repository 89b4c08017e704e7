// Products of attention over large batches on AMX tiles of bf16; rounding and pairing with AVX-512.
#include "kernels/vector_tables.h"

#if defined(__x86_64__)
// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/amx_tiles.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

namespace coreinfer::kernels {
namespace {

constexpr int64_t kTile = 16;   // rows of a tile; columns of a tile of sums
constexpr int64_t kDepth = 32;  // products that one tile instruction adds up

// The bf16 of 32 floats, in order.
inline __m512i to_bf16(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

inline __m512 low_half(__m512i bf16) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16));
}

inline __m512 high_half(__m512i bf16) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1)), 16));
}

// What rounding to bf16 has taken away, as bf16.
inline __m512i rest_of(__m512 first, __m512 second, __m512i rounded) {
  return to_bf16(_mm512_sub_ps(first, low_half(rounded)),
                 _mm512_sub_ps(second, high_half(rounded)));
}

void split(const float* x, int64_t n, uint16_t* high, uint16_t* low) {
  for (int64_t i = 0; i < n; i += kDepth) {
    const __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + i + 16);
    const __m512i rounded = to_bf16(first, second);
    _mm512_storeu_si512(high + i, rounded);
    if (low) _mm512_storeu_si512(low + i, rest_of(first, second, rounded));
  }
}

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <typename T>
void pair_rows(const T* b, int64_t ldb, int64_t depth, int64_t cols, uint16_t* high,
               uint16_t* low) {
  // Lanes of (16 of the even row, 16 of the odd row) in the order of their columns.
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  const int64_t padded = (depth + kDepth - 1) / kDepth * kDepth;
  for (int64_t k = 0; k < padded; k += 2) {
    for (int64_t j = 0; j < cols; j += kTile) {
      const __m512 even = k < depth ? load16(b + k * ldb + j) : _mm512_setzero_ps();
      const __m512 odd = k + 1 < depth ? load16(b + (k + 1) * ldb + j) : _mm512_setzero_ps();
      const __m512i rounded = to_bf16(even, odd);
      const int64_t at = k * cols + 2 * j;
      _mm512_storeu_si512(high + at, _mm512_permutexvar_epi16(order, rounded));
      if (low) {
        _mm512_storeu_si512(low + at, _mm512_permutexvar_epi16(order, rest_of(even, odd, rounded)));
      }
    }
  }
}

// The sums of 32 (or 16) rows and 32 columns: c (+)= a (rows, depth) * b (depth, columns).
template <bool kTwo, bool kParts>
inline void multiply_block(const Bf16Rows& a, const Bf16Rows& b, float* c, int64_t ldc,
                           int64_t depth, int64_t cols, bool accumulate) {
  float* const c1 = c + kTile * ldc;
  if (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + kTile, ldc * 4);
    if constexpr (kTwo) _tile_loadd(2, c1, ldc * 4);
    if constexpr (kTwo) _tile_loadd(3, c1 + kTile, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) _tile_zero(2);
    if constexpr (kTwo) _tile_zero(3);
  }
  const auto load_a = [&](const uint16_t* from) {
    _tile_loadd(4, from, a.stride * 2);
    if constexpr (kTwo) _tile_loadd(5, from + kTile * a.stride, a.stride * 2);
  };
  const auto load_b = [&](const uint16_t* from) {
    _tile_loadd(6, from, cols * 4);
    _tile_loadd(7, from + 2 * kTile, cols * 4);
  };
  const auto add_products = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwo) _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t k = 0; k < depth; k += kDepth) {
    load_a(a.high + k);
    if constexpr (kParts) {
      load_b(b.low + k * cols);
      add_products();
    }
    load_b(b.high + k * cols);
    add_products();
    if constexpr (kParts) {
      load_a(a.low + k);
      add_products();
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (kTwo) _tile_stored(2, c1, ldc * 4);
  if constexpr (kTwo) _tile_stored(3, c1 + kTile, ldc * 4);
}

template <bool kParts>
inline void multiply_rows(const Bf16Rows& a, const Bf16Rows& b, float* c, int64_t ldc, int64_t rows,
                          int64_t depth, int64_t cols, bool accumulate) {
  // Rows outside: a block of them and all of b stay in the first-level cache.
  for (int64_t i = 0; i < rows; i += 2 * kTile) {
    const int64_t from = i * a.stride;
    const Bf16Rows a_part{a.high + from, kParts ? a.low + from : nullptr, a.stride};
    for (int64_t j = 0; j < cols; j += 2 * kTile) {
      const Bf16Rows b_part{b.high + 2 * j, kParts ? b.low + 2 * j : nullptr, b.stride};
      float* const c_part = c + i * ldc + j;
      if (rows - i > kTile) {
        multiply_block<true, kParts>(a_part, b_part, c_part, ldc, depth, cols, accumulate);
      } else {
        multiply_block<false, kParts>(a_part, b_part, c_part, ldc, depth, cols, accumulate);
      }
    }
  }
}

void multiply(Bf16Rows a, Bf16Rows b, float* c, int64_t ldc, int64_t rows, int64_t depth,
              int64_t cols, bool accumulate) {
  configure_tiles();
  if (a.low) {
    multiply_rows<true>(a, b, c, ldc, rows, depth, cols, accumulate);
  } else {
    multiply_rows<false>(a, b, c, ldc, rows, depth, cols, accumulate);
  }
  _tile_release();
  compiler_barrier();
}

constexpr TileKernels kTileKernels = {
    .split = split,
    .pair_f32 = pair_rows<float>,
    .pair_f16 = pair_rows<uint16_t>,
    .multiply = multiply,
};

}  // namespace

void use_amx(VectorTables& tables) { tables.attention.tiles = &kTileKernels; }

}  // namespace coreinfer::kernels
#pragma GCC pop_options
#endif
