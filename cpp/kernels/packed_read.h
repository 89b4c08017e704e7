// Plain reading of the packed layout, one number at a time: what packed_format.h says, as code.
// The scalar kernels are made of it, and with them every other kernel is compared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "kernels/packed_format.h"
#include "tensor/blocks.h"

namespace coreinfer {

// A weight of row r is scale[r] * (code - offset) + add[r].
struct GroupScales {
  float scale[kStripRows];
  float add[kStripRows];
};

inline float read_half(const std::byte* halves, int i) {
  uint16_t bits;
  std::memcpy(&bits, halves + 2 * i, 2);
  return f16_to_f32(bits);
}

// Scales of group p (in packed order) of a strip.
inline GroupScales read_scales(const PackedView& w, const std::byte* strip, int64_t p) {
  const PackedFormat f = packed_format(w.type);
  const ColumnGroup& group = w.columns->groups[static_cast<size_t>(p)];
  const int64_t super = int64_t{group.source} * w.columns->group_size / kSuperCols;
  const std::byte* const d = strip + super * f.super_bytes();
  const std::byte* const s = strip + w.scales_offset + p * f.group_scale_bytes();
  GroupScales out;
  for (int r = 0; r < kStripRows; ++r) {
    out.add[r] = 0.0f;
    switch (f.scales) {
      case ScaleKind::kHalfPair:
        out.add[r] = read_half(s + 32, r);
        [[fallthrough]];
      case ScaleKind::kHalf:
        out.scale[r] = read_half(s, r);
        break;
      case ScaleKind::kSuperPair:
        out.add[r] = -(read_half(d + 32, r) * static_cast<float>(std::to_integer<int>(s[16 + r])));
        [[fallthrough]];
      case ScaleKind::kSuper:
        out.scale[r] = read_half(d, r) * static_cast<float>(static_cast<int8_t>(s[r]));
        break;
      case ScaleKind::kSuperNibbles:
        out.scale[r] = read_half(d, r) * static_cast<float>(std::to_integer<int>(s[r]) & 15);
        out.add[r] = -(read_half(d + 32, r) * static_cast<float>(std::to_integer<int>(s[r]) >> 4));
        break;
    }
  }
  return out;
}

// Code of row r in column c of a plane of n columns.
template <int kBits>
int read_plane(const std::byte* plane, int n, int r, int c) {
  constexpr int kLines = 2 * kBits;
  const int line = r % kLines, part = r / kLines;
  const int step = c / kStepCols * kStepCols;
  const bool whole = step + kStepCols <= n;
  const int at = whole ? step * kLines + line * kStepCols + (c - step) : c * kLines + line;
  return (std::to_integer<int>(plane[at]) >> (kBits * part)) & ((1 << kBits) - 1);
}

// Code of row r in column c of a group's codes; of the lookup types, the table's 8-bit code.
inline int read_code(const PackedFormat& f, const std::byte* codes, int n, int r, int c) {
  const std::byte* const second = codes + n * 2 * f.plane_bits(0);
  switch (f.bits) {
    case 8:
      return read_plane<8>(codes, n, r, c);
    case 6:
      return read_plane<4>(codes, n, r, c) | read_plane<2>(second, n, r, c) << 4;
    case 5:
      return read_plane<4>(codes, n, r, c) | read_plane<1>(second, n, r, c) << 4;
    case 4: {
      const int code = read_plane<4>(codes, n, r, c);
      return f.lookup ? kIQ4Values[code] + 128 : code;
    }
    case 3:
      return read_plane<2>(codes, n, r, c) | read_plane<1>(second, n, r, c) << 2;
    default:
      return read_plane<2>(codes, n, r, c);
  }
}

}  // namespace coreinfer
