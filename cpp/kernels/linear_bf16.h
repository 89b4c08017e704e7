// The third family of matrix kernels, for many tokens at once where the CPU multiplies bf16: pairs
// (AVX-512 BF16) or tiles of them (AMX). Weights of 16 outputs are unpacked into a panel,
// activations are rounded once into tiles; both keep 8 significant bits, sums are float32. A row's
// bits may differ from those of the other families, so this one serves only more than 16 tokens.
// Dense matrices only.
//
// Panel: [column / 2][16 outputs][2], columns rounded up to whole tiles of 32 with zeros.
// Tokens: [token / 16][column / 32][16 tokens][32 columns].
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"
#include "kernels/packed_format.h"
#include "tensor/dtype.h"

namespace coreinfer {

inline constexpr int kTileCols = 32;
inline constexpr int kTileTokens = 16;
inline constexpr int kTileSize = kTileCols * kTileTokens;  // bf16 numbers

struct Bf16Kernels {
  // Rounds one token of n elements into the row of its tiles; tiles starts at token 0.
  void (*round_token)(const float* x, int64_t n, int64_t token, uint16_t* tiles);

  // Columns [begin, end) of strip s, bounds of whole tiles, into a panel.
  using UnpackFn = void (*)(const PackedView& w, int64_t s, int64_t begin, int64_t end,
                            uint16_t* panel);
  UnpackFn (*unpack)(DType type);

  // The same of n_rows <= 16 rows of a float matrix; `end` may be the last, incomplete tile's.
  using TransposeFn = void (*)(const std::byte* rows, size_t row_stride, int64_t n_rows,
                               int64_t begin, int64_t end, uint16_t* panel);
  TransposeFn (*transpose)(DType type);

  // The same of 16 rows of a float matrix that is stored column by column, `first` in column 0.
  using ColumnsFn = void (*)(const std::byte* first, size_t stride, int64_t begin, int64_t end,
                             uint16_t* panel);
  ColumnsFn (*columns)(DType type);

  // Whether packed matrices are faster so than by the integer family.
  bool packed;

  // For each of n_panels (1 or 2) panels of n_tiles tiles of columns:
  // sums[p][token * 16 + output] += panel[p] * tokens, or = where `first`. Token tile i starts at
  // tokens + i * token_stride; sums hold whole token tiles.
  void (*multiply)(const uint16_t* const* panels, int n_panels, int64_t n_tiles,
                   const uint16_t* tokens, int64_t token_stride, int64_t n_token_tiles, bool first,
                   float* const* sums);

  // A thread calls these around its calls of multiply().
  void (*begin)();
  void (*end)();
};

// nullptr where the instruction set has no such kernels.
const Bf16Kernels* bf16_kernels(Isa isa);

#if defined(__x86_64__)
// The tables, one a file.
const Bf16Kernels& bf16_kernels_avx512();
const Bf16Kernels& bf16_kernels_amx();
#endif

}  // namespace coreinfer
