// Brings rows of a GGUF matrix into packed strips: a pure permutation of codes, scales kept bit for
// bit. In: rows in the file (any rows, any picked columns). Out: strips of packed_format.h. Packing
// is single-threaded over a range of strips; several threads may share a packer and pack different
// ranges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/isa.h"
#include "kernels/packed_strip.h"
#include "tensor/mat.h"

namespace coreinfer {

class StripPacker {
 public:
  // Row r of the packed matrix `to` is row r of `from`, or row row_picks[r] where those are given;
  // its columns are to.columns. All of them must outlive the packer.
  StripPacker(Isa isa, const Mat& from, std::span<const int32_t> row_picks, const PackedView& to);

  // Overwrites strips [begin, end) of `to`.
  void pack(int64_t begin, int64_t end) const;

 private:
  // Where a strip's rows stand in the file; null past the last.
  void find_rows(int64_t strip, const std::byte* (&rows)[kStripRows]) const;

  Mat from_;
  std::span<const int32_t> row_picks_;
  PackedView to_;
  PackStripFn pack_;
  std::vector<StripPlan> plans_;  // for AVX-512
  std::vector<int32_t> packed_groups_, first_pick_;
  ColumnMap map_;
};

}  // namespace coreinfer
