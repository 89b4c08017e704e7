#include "kernels/packed_pack.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/linear_types.h"
#include "tensor/blocks.h"

namespace coreinfer {
namespace {

static_assert(std::endian::native == std::endian::little);

#include "kernels/packed_source.inc"

inline void pick_codes(const uint8_t* codes, const ColumnMap& map, int64_t column, int,
                       uint8_t* to) {
  const int32_t* const first = map.first_pick + column / kSuperCols;
  for (int32_t i = first[0]; i < first[1]; ++i) *to++ = codes[map.picks[i] - column];
}

#include "kernels/packed_strip.inc"

PackStripFn find_pack_strip(Isa isa, DType type) {
  switch (isa) {
    case Isa::kAmx:
    case Isa::kAvx512:
      return has_avx512_vbmi2() ? pack_strip_avx512(type) : pack_strip_avx2(type);
    case Isa::kAvx2:
      return pack_strip_avx2(type);
    case Isa::kScalar:
    case Isa::kNeon:
      break;
  }
  return pack_strip_plain(type);
}

}  // namespace

PackStripFn pack_strip_plain(DType type) {
  return for_packed_type(type, []<DType kType>() -> PackStripFn { return pack_strip<kType>; });
}

#if !defined(__x86_64__)
PackStripFn pack_strip_avx2(DType) { return nullptr; }
PackStripFn pack_strip_avx512(DType) { return nullptr; }
#endif

StripPacker::StripPacker(Isa isa, const Mat& from, std::span<const int32_t> row_picks,
                         const PackedView& to)
    : from_(from), row_picks_(row_picks), to_(to), pack_(find_pack_strip(isa, from.type)) {
  const ColumnGroups& columns = *to.columns;
  packed_groups_.assign(static_cast<size_t>(from.cols / columns.group_size), -1);
  for (int32_t i = 0; const ColumnGroup& g : columns.groups) {
    packed_groups_[static_cast<size_t>(g.source)] = i++;
  }
  map_.groups = columns.groups.data();
  map_.packed_groups = packed_groups_.data();
  if (columns.dense) return;
  for (int64_t column = 0; column < from.cols + kSuperCols; column += kSuperCols) {
    const auto first = std::lower_bound(columns.picks.begin(), columns.picks.end(), column);
    first_pick_.push_back(static_cast<int32_t>(first - columns.picks.begin()));
  }
  masks_.resize(static_cast<size_t>((from.cols + 63) / 64));
  for (int32_t pick : columns.picks) masks_[static_cast<size_t>(pick / 64)] |= 1ull << (pick % 64);
  map_.picks = columns.picks.data();
  map_.first_pick = first_pick_.data();
  map_.masks = masks_.data();
}

void StripPacker::pack(int64_t begin, int64_t end) const {
  StripJob job;
  job.map = map_;
  job.cols = from_.cols;
  job.to = &to_;
  for (int64_t s = begin; s < end; ++s) {
    job.strip = to_.strip(s);
    for (int64_t r = 0; r < kStripRows; ++r) {
      const int64_t row = s * kStripRows + r;
      const bool present = row < to_.rows;
      const int64_t source =
          present && !row_picks_.empty() ? row_picks_[static_cast<size_t>(row)] : row;
      job.rows[r] = present ? from_.row(source) : nullptr;
    }
    pack_(job);
  }
}

}  // namespace coreinfer
