#include "kernels/packed_pack.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "kernels/packed_source.h"

namespace coreinfer {
namespace {

// Codes are moved as four columns in a 32-bit word, first column lowest.
static_assert(std::endian::native == std::endian::little);

uint32_t load4(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

void store4(std::byte* p, uint32_t word) { std::memcpy(p, &word, 4); }

// Codes of 16 rows, one byte each.
struct Codes {
  const uint8_t* data;
  size_t stride;
  const uint8_t* row(int r) const { return data + stride * static_cast<size_t>(r); }
};

// Line i of a step: the codes of the rows that share it, each moved to its place in the byte.
template <int kBits>
uint32_t line(const Codes& codes, int i, int column, int shift) {
  constexpr int kLines = 2 * kBits;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
  uint32_t word = 0;
  for (int part = 0; part < 8 / kBits; ++part) {
    word |= ((load4(codes.row(i + kLines * part) + column) >> shift) & kMask) << (kBits * part);
  }
  return word;
}

// One plane of n columns, codes shifted right by `shift`. Codes may be read up to 3 columns past n.
template <int kBits>
std::byte* write_plane(const Codes& codes, int n, int shift, std::byte* to) {
  constexpr int kLines = 2 * kBits;
  int c = 0;
  for (; c + kStepCols <= n; c += kStepCols, to += kStepCols * kLines) {
    for (int i = 0; i < kLines; ++i) store4(to + 4 * i, line<kBits>(codes, i, c, shift));
  }
  const int tail = n - c;
  if (tail > 0) {
    for (int i = 0; i < kLines; ++i) {
      const uint32_t word = line<kBits>(codes, i, c, shift);
      for (int j = 0; j < tail; ++j) to[j * kLines + i] = static_cast<std::byte>(word >> (8 * j));
    }
  }
  return to + tail * kLines;
}

void write_codes(const PackedFormat& f, const Codes& codes, int n, std::byte* to) {
  switch (f.bits) {
    case 8:
      write_plane<8>(codes, n, 0, to);
      break;
    case 6:
      to = write_plane<4>(codes, n, 0, to);
      write_plane<2>(codes, n, 4, to);
      break;
    case 5:
      to = write_plane<4>(codes, n, 0, to);
      write_plane<1>(codes, n, 4, to);
      break;
    case 4:
      write_plane<4>(codes, n, 0, to);
      break;
    case 3:
      to = write_plane<2>(codes, n, 0, to);
      write_plane<1>(codes, n, 2, to);
      break;
    default:
      write_plane<2>(codes, n, 0, to);
  }
}

void put16(std::byte* to, int r, uint16_t value) { std::memcpy(to + 2 * r, &value, 2); }

// 16 rows x 256 columns of the file at a time.
class StripPacker {
 public:
  StripPacker(const Mat& from, const PackedView& to)
      : from_(from),
        to_(to),
        format_(packed_format(from.type)),
        read_(find_read_block(from.type)),
        packed_(static_cast<size_t>(from.cols / to.columns->group_size), -1),
        blocks_(kStripRows) {
    for (int32_t i = 0; const ColumnGroup& g : to.columns->groups) {
      packed_[static_cast<size_t>(g.source)] = i++;
    }
  }

  void pack(std::span<const int32_t> row_picks, int64_t s) {
    std::byte* const strip = to_.strip(s);
    const int rows = static_cast<int>(std::min<int64_t>(kStripRows, to_.rows - s * kStripRows));
    for (int r = rows; r < kStripRows; ++r) blocks_[static_cast<size_t>(r)] = {};
    const std::byte* sources[kStripRows];
    for (int r = 0; r < rows; ++r) {
      const int64_t row = s * kStripRows + r;
      sources[r] = from_.row(row_picks.empty() ? row : row_picks[static_cast<size_t>(row)]);
    }
    for (int64_t column = 0; column < from_.cols; column += kSuperCols) {
      const int n = static_cast<int>(std::min<int64_t>(kSuperCols, from_.cols - column));
      const size_t offset = row_bytes(from_.type, column);
      for (int r = 0; r < rows; ++r)
        read_(sources[r] + offset, n, &blocks_[static_cast<size_t>(r)]);
      if (format_.has_super()) {
        put_super(strip + static_cast<size_t>(column / kSuperCols) *
                              static_cast<size_t>(format_.super_bytes()));
      }
      const int group_size = to_.columns->group_size;
      for (int g = 0; g < n / group_size; ++g) {
        const int32_t p = packed_[static_cast<size_t>(column / group_size + g)];
        if (p >= 0) put_group(strip, column, g, p);
      }
    }
  }

 private:
  void put_super(std::byte* to) {
    for (int r = 0; r < kStripRows; ++r) {
      put16(to, r, blocks_[static_cast<size_t>(r)].d[0]);
      if (format_.scales != ScaleKind::kSuper) {
        put16(to + 32, r, blocks_[static_cast<size_t>(r)].m[0]);
      }
    }
  }

  // Group g of the 256 columns from `column` on, which is group p of the packed matrix.
  void put_group(std::byte* strip, int64_t column, int g, int32_t p) {
    const ColumnGroup& group = to_.columns->groups[static_cast<size_t>(p)];
    std::byte* const scales =
        strip + to_.scales_offset +
        static_cast<size_t>(p) * static_cast<size_t>(format_.group_scale_bytes());
    for (int r = 0; r < kStripRows; ++r) {
      const SourceBlock& block = blocks_[static_cast<size_t>(r)];
      switch (format_.scales) {
        case ScaleKind::kHalfPair:
          put16(scales + 32, r, block.m[g]);
          [[fallthrough]];
        case ScaleKind::kHalf:
          put16(scales, r, block.d[g]);
          break;
        case ScaleKind::kSuperPair:
          scales[16 + r] = static_cast<std::byte>(block.minimum[g]);
          [[fallthrough]];
        case ScaleKind::kSuper:
          scales[r] = static_cast<std::byte>(block.scale[g]);
          break;
        case ScaleKind::kSuperNibbles:
          scales[r] = static_cast<std::byte>(block.scale[g] | block.minimum[g] << 4);
          break;
      }
    }
    std::byte* const codes =
        strip + to_.codes_offset +
        static_cast<size_t>(group.before) * static_cast<size_t>(format_.column_bytes());
    const int first = g * to_.columns->group_size;
    if (group.n == to_.columns->group_size) {
      write_codes(format_, {blocks_[0].codes + first, sizeof(SourceBlock)}, group.n, codes);
      return;
    }
    const int32_t* const picks = to_.columns->picks.data() + group.first;
    for (int r = 0; r < kStripRows; ++r) {
      const uint8_t* const row = blocks_[static_cast<size_t>(r)].codes;
      for (int j = 0; j < group.n; ++j) picked_[r][j] = row[picks[j] - column];
    }
    write_codes(format_, {picked_[0], sizeof picked_[0]}, group.n, codes);
  }

  const Mat& from_;
  const PackedView& to_;
  PackedFormat format_;
  ReadBlockFn read_;
  std::vector<int32_t> packed_;      // packed position of each group of the file, or -1
  std::vector<SourceBlock> blocks_;  // one a row
  uint8_t picked_[kStripRows][32] = {};
};

}  // namespace

void pack_strips(const Mat& from, std::span<const int32_t> row_picks, const PackedView& to,
                 int64_t begin, int64_t end) {
  StripPacker packer(from, to);
  for (int64_t s = begin; s < end; ++s) packer.pack(row_picks, s);
}

}  // namespace coreinfer
