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
//
#include "kernels/packed_scales.inc"
//
#include "kernels/packed_strip.inc"

// Whether strips are packed by plan_strip's plans.
bool by_plan(Isa isa) { return has_avx512(isa) && has_avx512_vbmi(); }

PackStripFn find_pack_strip(Isa isa, DType type) {
  if (by_plan(isa)) return pack_strip_avx512(type);
  switch (isa) {
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
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
  if (by_plan(isa)) plans_ = plan_strip(from.type, from.cols, columns);
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
  map_.picks = columns.picks.data();
  map_.first_pick = first_pick_.data();
}

void StripPacker::find_rows(int64_t strip, const std::byte* (&rows)[kStripRows]) const {
  const size_t stride = from_.stride();
  for (int64_t r = 0; r < kStripRows; ++r) {
    const int64_t row = strip * kStripRows + r;
    const bool picked = !row_picks_.empty() && row < to_.rows;
    const int64_t source = picked ? row_picks_[static_cast<size_t>(row)] : row;
    rows[r] = row < to_.rows ? from_.data + static_cast<size_t>(source) * stride : nullptr;
  }
}

void StripPacker::pack(int64_t begin, int64_t end) const {
  StripJob job;
  job.map = map_;
  job.plans = &plans_;
  job.cols = from_.cols;
  job.to = &to_;
  for (int64_t s = begin; s < end; ++s) {
    job.strip = to_.strip(s);
    find_rows(s, job.rows);
    find_rows(s + 1 < end ? s + 1 : s, job.next);
    pack_(job);
  }
}

}  // namespace coreinfer
