// The layout that quantised matrices are computed in: a permutation of the file's codes, so that
// rows lie in SIMD lanes and no horizontal sums are needed.
//
// A matrix is a row of strips; a strip holds 16 rows (the last one is padded with rows of scale
// zero) and is cut along the columns into groups that share one scale a row: 32 columns, or 16. In
// a strip come first the super-blocks' scales (types with 256-column super-blocks), then every
// group's scales, then every group's codes. Codes stand in steps of 4 columns: unpacked, a step is
// the 64 bytes [row][column] that one VNNI instruction takes. A group whose columns are not a
// multiple of 4 ends in a tail of 1 to 3 columns without padding; so a matrix of picked columns
// (a compacted down projection) is the same layout with fewer columns in a group.
//
// Codes wider than 2 bits that are not 4 or 8 are split in two planes, 5 = 4 + 1, 6 = 4 + 2,
// 3 = 2 + 1; a group holds all its columns of the first plane, then all of the second. One column
// of a plane of b bits is 2 * b bytes, called lines; in a step the 4 columns of a line lie side by
// side, [line][column], in a tail the lines of a column do, [column][line]. Line i holds
//   8 bits: row i          4 bits: rows i (low), i + 8 (high)
//   2 bits: rows i, i + 4, i + 8, i + 12 from low to high
//   1 bit:  rows i, i + 2, i + 4, … from low to high
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "tensor/dtype.h"

namespace coreinfer {

inline constexpr int kStripRows = 16;
inline constexpr int kStepCols = 4;
inline constexpr int kSuperCols = 256;
// A kernel may read this far past the last strip.
inline constexpr size_t kPackedSlack = 64;

// What stands in a strip for the scales; each entry is for 16 rows.
enum class ScaleKind {
  kHalf,          // per group: float16 d
  kHalfPair,      // per group: float16 d, float16 m
  kSuper,         // per super-block: float16 d; per group: int8 s.               scale d * s
  kSuperPair,     // per super-block: float16 d, dmin; per group: int8 s, uint8 m. d * s, dmin * m
  kSuperNibbles,  // the same with s and m of 4 bits in one byte, s the low half
};

// A weight is scale * (code - offset), or scale * code + m (kHalfPair), or scale * code - minimum
// (the pairs of super-blocks). Where `lookup`, 4-bit codes index kIQ4Values, which are taken as
// 8-bit codes with offset 128; int8 weights are 8-bit codes with offset 128, too.
struct PackedFormat {
  int bits = 0;
  int offset_log2 = 0;  // the offset is 1 << offset_log2, or 0 for the types with minima
  bool lookup = false;
  ScaleKind scales = ScaleKind::kHalf;

  constexpr bool has_offset() const {
    return scales == ScaleKind::kHalf || scales == ScaleKind::kSuper;
  }
  constexpr bool has_super() const {
    return scales != ScaleKind::kHalf && scales != ScaleKind::kHalfPair;
  }
  // Bits of the two planes; the second is 0 where there is one.
  constexpr int plane_bits(int plane) const {
    const int first = bits >= 8 ? 8 : bits >= 4 ? 4 : 2;
    return plane == 0 ? first : bits - first;
  }
  constexpr int column_bytes() const { return 2 * bits; }  // of 16 rows
  constexpr int super_bytes() const {
    return scales == ScaleKind::kSuper ? 32 : has_super() ? 64 : 0;
  }
  constexpr int group_scale_bytes() const {
    switch (scales) {
      case ScaleKind::kHalf:
      case ScaleKind::kSuperPair:
        return 32;
      case ScaleKind::kHalfPair:
        return 64;
      case ScaleKind::kSuper:
      case ScaleKind::kSuperNibbles:
        return 16;
    }
    return 0;
  }
};

constexpr PackedFormat packed_format(DType type) {
  switch (type) {
    case DType::kQ4_0:
      return {4, 3, false, ScaleKind::kHalf};
    case DType::kQ4_1:
      return {4, 0, false, ScaleKind::kHalfPair};
    case DType::kQ5_0:
      return {5, 4, false, ScaleKind::kHalf};
    case DType::kQ5_1:
      return {5, 0, false, ScaleKind::kHalfPair};
    case DType::kQ8_0:
      return {8, 7, false, ScaleKind::kHalf};
    case DType::kQ2_K:
      return {2, 0, false, ScaleKind::kSuperNibbles};
    case DType::kQ3_K:
      return {3, 2, false, ScaleKind::kSuper};
    case DType::kQ4_K:
      return {4, 0, false, ScaleKind::kSuperPair};
    case DType::kQ5_K:
      return {5, 0, false, ScaleKind::kSuperPair};
    case DType::kQ6_K:
      return {6, 5, false, ScaleKind::kSuper};
    case DType::kIQ4_NL:
      return {4, 7, true, ScaleKind::kHalf};
    case DType::kIQ4_XS:
      return {4, 7, true, ScaleKind::kSuper};
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      break;
  }
  return {};  // float types are not packed
}

// One scale group of a packed matrix.
struct ColumnGroup {
  int32_t first = 0;   // its columns are [first, first + n) of the input vector
  int32_t n = 0;       // 1 to the type's group size
  int32_t source = 0;  // which group of the file's row it is
  int32_t padded = 0;  // columns before it in packed order, each group rounded up to whole steps
  int64_t before = 0;  // columns before it in packed order
};

// The columns of a packed matrix, in the order in which they are stored: groups with equally many
// columns stand together, so that a kernel's branches are predictable; groups without columns are
// left out. All columns of a row: the file's own order.
struct ColumnGroups {
  int group_size = 0;
  bool dense = false;       // every group is whole and in the file's order
  int64_t source_cols = 0;  // columns of a row in the file
  int64_t n_cols = 0;       // columns stored
  int64_t padded_cols = 0;  // the same with each group rounded up to whole steps
  std::vector<ColumnGroup> groups;
  std::vector<int32_t> picks;  // per stored column, in input order: its column in the file; empty
                               // when dense

  int64_t n_groups() const { return static_cast<int64_t>(groups.size()); }
};
using ColumnGroupsPtr = std::shared_ptr<const ColumnGroups>;

// All `cols` columns; a multiple of the type's block size.
ColumnGroupsPtr all_columns(DType type, int64_t cols);

// The ascending columns `picks` of `cols`.
ColumnGroupsPtr picked_columns(DType type, int64_t cols, std::span<const int32_t> picks);

// A packed matrix in memory; not an owner.
struct PackedView {
  DType type = DType::kQ4_0;
  int64_t rows = 0;
  const ColumnGroups* columns = nullptr;
  std::byte* data = nullptr;  // n_strips() strips, then kPackedSlack readable bytes
  size_t scales_offset = 0;   // of the groups' scales in a strip
  size_t codes_offset = 0;    // of the codes in a strip
  size_t strip_bytes = 0;

  int64_t n_strips() const { return (rows + kStripRows - 1) / kStripRows; }
  size_t bytes() const { return strip_bytes * static_cast<size_t>(n_strips()); }
  std::byte* strip(int64_t s) const { return data + strip_bytes * static_cast<size_t>(s); }
};

// The layout of such a matrix, with data null.
PackedView packed_layout(DType type, int64_t rows, const ColumnGroups& columns);

}  // namespace coreinfer
