// Brings rows of a GGUF matrix into packed strips: a pure permutation of codes, scales kept bit for
// bit. In: rows in the file (any rows, any picked columns). Out: strips of packed_format.h. It runs
// single-threaded over a range of strips; who deals the ranges to threads is the caller's matter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/packed_format.h"
#include "tensor/mat.h"

namespace coreinfer {

// Packs strips [begin, end) of `to`. Row r of the packed matrix is row r of `from`, or row
// row_picks[r] where those are given. Whatever lies in the strips before is overwritten.
void pack_strips(const Mat& from, std::span<const int32_t> row_picks, const PackedView& to,
                 int64_t begin, int64_t end);

}  // namespace coreinfer
