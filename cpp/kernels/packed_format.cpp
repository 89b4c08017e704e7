#include "kernels/packed_format.h"

#include <algorithm>

namespace coreinfer {
namespace {

// Fills what follows from groups[].n and their order.
void number_groups(ColumnGroups& c) {
  for (ColumnGroup& g : c.groups) {
    g.before = c.n_cols;
    g.padded = static_cast<int32_t>(c.padded_cols);
    c.n_cols += g.n;
    c.padded_cols += (g.n + kStepCols - 1) / kStepCols * kStepCols;
  }
}

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

ColumnGroupsPtr all_columns(DType type, int64_t cols) {
  auto c = std::make_shared<ColumnGroups>();
  c->group_size = traits(type).group_size;
  c->dense = true;
  c->source_cols = cols;
  c->groups.resize(static_cast<size_t>(cols / c->group_size));
  for (int32_t i = 0; auto& g : c->groups) {
    g = {.first = i * c->group_size, .n = c->group_size, .source = i};
    ++i;
  }
  number_groups(*c);
  return c;
}

ColumnGroupsPtr picked_columns(DType type, int64_t cols, std::span<const int32_t> picks) {
  auto c = std::make_shared<ColumnGroups>();
  c->group_size = traits(type).group_size;
  c->source_cols = cols;
  c->picks.assign(picks.begin(), picks.end());
  for (size_t i = 0; i < picks.size();) {
    const int32_t source = picks[i] / c->group_size;
    ColumnGroup g{.first = static_cast<int32_t>(i), .source = source};
    for (; i < picks.size() && picks[i] / c->group_size == source; ++i) ++g.n;
    c->groups.push_back(g);
  }
  std::stable_sort(c->groups.begin(), c->groups.end(),
                   [](const ColumnGroup& a, const ColumnGroup& b) { return a.n < b.n; });
  number_groups(*c);
  return c;
}

PackedView packed_layout(DType type, int64_t rows, const ColumnGroups& columns) {
  const PackedFormat f = packed_format(type);
  PackedView v;
  v.type = type;
  v.rows = rows;
  v.columns = &columns;
  const size_t n_super =
      f.has_super() ? static_cast<size_t>(columns.source_cols / kSuperCols) : size_t{0};
  v.scales_offset = n_super * static_cast<size_t>(f.super_bytes());
  v.codes_offset =
      v.scales_offset + columns.groups.size() * static_cast<size_t>(f.group_scale_bytes());
  // Whole cache lines where steps are whole lines; picked columns have no alignment to keep.
  const size_t align = columns.dense ? 64 : 2;
  v.codes_offset = round_up(v.codes_offset, align);
  v.strip_bytes = round_up(
      v.codes_offset + static_cast<size_t>(columns.n_cols) * static_cast<size_t>(f.column_bytes()),
      align);
  return v;
}

}  // namespace coreinfer
