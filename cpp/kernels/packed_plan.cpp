#include "kernels/packed_plan.h"

#include <algorithm>
#include <cstddef>
#include <span>

#include "tensor/blocks.h"

namespace coreinfer {
namespace {

// Vectors of codes whose bytes are asked for before they are wanted.
constexpr size_t kAhead = 3;

// Where a code stands: bits of one byte, or of two. Bytes count from the row's start.
struct Place {
  int64_t low = 0;
  int low_shift = 0;
  int64_t high = -1;  // none
  int high_shift = 0;
};

template <class Block>
Place nibble(int64_t block, int byte, bool upper) {
  return {.low = block * static_cast<int64_t>(sizeof(Block)) +
                 static_cast<int64_t>(offsetof(Block, qs)) + byte,
          .low_shift = upper ? 4 : 0};
}

template <class Block>
Place with_fifth(Place place, int64_t block, int byte, int bit) {
  place.high = block * static_cast<int64_t>(sizeof(Block)) +
               static_cast<int64_t>(offsetof(Block, qh)) + byte;
  place.high_shift = bit;
  return place;
}

// Two bits a code: 32 bytes hold 128.
template <class Block>
Place pair(int64_t block, int i) {
  return {.low = block * static_cast<int64_t>(sizeof(Block)) +
                 static_cast<int64_t>(offsetof(Block, qs)) + 32 * (i / 128) + i % 32,
          .low_shift = i % 128 / 32 * 2};
}

// As tensor/blocks.h describes the types.
Place place_of(DType type, int64_t column) {
  const int64_t block = column / traits(type).block_size;
  const auto i = static_cast<int>(column % traits(type).block_size);
  switch (type) {
    case DType::kQ4_0:
      return nibble<BlockQ4_0>(block, i % 16, i >= 16);
    case DType::kQ4_1:
      return nibble<BlockQ4_1>(block, i % 16, i >= 16);
    case DType::kIQ4_NL:
      return nibble<BlockIQ4_NL>(block, i % 16, i >= 16);
    case DType::kQ5_0:
      return with_fifth<BlockQ5_0>(nibble<BlockQ5_0>(block, i % 16, i >= 16), block, i / 8, i % 8);
    case DType::kQ5_1:
      return with_fifth<BlockQ5_1>(nibble<BlockQ5_1>(block, i % 16, i >= 16), block, i / 8, i % 8);
    case DType::kQ8_0:
      return nibble<BlockQ8_0>(block, i, false);
    case DType::kQ2_K:
      return pair<BlockQ2_K>(block, i);
    case DType::kQ3_K: {
      Place place = pair<BlockQ3_K>(block, i);
      place.high = block * static_cast<int64_t>(sizeof(BlockQ3_K)) +
                   static_cast<int64_t>(offsetof(BlockQ3_K, hmask)) + i % 32;
      place.high_shift = i / 32;
      return place;
    }
    case DType::kQ4_K:
      return nibble<BlockQ4_K>(block, 32 * (i / 64) + i % 32, i % 64 >= 32);
    case DType::kQ5_K:
      return with_fifth<BlockQ5_K>(nibble<BlockQ5_K>(block, 32 * (i / 64) + i % 32, i % 64 >= 32),
                                   block, i % 32, i / 32);
    case DType::kQ6_K: {
      const int64_t start = block * static_cast<int64_t>(sizeof(BlockQ6_K));
      return {
          .low = start + static_cast<int64_t>(offsetof(BlockQ6_K, ql)) + 64 * (i / 128) + i % 64,
          .low_shift = i % 128 >= 64 ? 4 : 0,
          .high = start + static_cast<int64_t>(offsetof(BlockQ6_K, qh)) + 32 * (i / 128) + i % 32,
          .high_shift = i % 128 / 32 * 2};
    }
    case DType::kIQ4_XS:
      return nibble<BlockIQ4_XS>(block, 16 * (i / 32) + i % 16, i % 32 >= 16);
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      break;
  }
  return {};
}

bool fits(int64_t begin, int64_t end) { return end - begin <= 64 * ByteFetch::kMaxWindows; }

// Bytes that one vector will take, until there are 64 or they lie too far apart.
class FetchBuilder {
 public:
  bool takes(int64_t byte) const {
    return n_ == 0 || fits(std::min(begin_, byte), std::max(end_, byte + 1));
  }
  void put(int entry, int64_t byte) {
    begin_ = n_ == 0 ? byte : std::min(begin_, byte);
    end_ = n_ == 0 ? byte + 1 : std::max(end_, byte + 1);
    bytes_[entry] = byte;
    used_ |= uint64_t{1} << entry;
    ++n_;
  }
  int64_t begin() const { return begin_; }
  // `limit` bytes of the row may be read.
  ByteFetch build(int64_t limit) const {
    ByteFetch f;
    if (n_ == 0) return f;
    f.base = begin_;
    f.n_windows = static_cast<int>((end_ - begin_ + 63) / 64);
    for (int i = 0; i < 64; ++i) {
      if ((used_ >> i & 1) == 0) continue;
      const int64_t at = bytes_[i] - begin_;
      f.index[i] = static_cast<uint8_t>(at % 64);
      f.take[at / 64] |= uint64_t{1} << i;
    }
    const int64_t left = limit - (begin_ + 64 * (f.n_windows - 1));
    f.last = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    return f;
  }

 private:
  int64_t bytes_[64] = {}, begin_ = 0, end_ = 0;
  uint64_t used_ = 0;
  int n_ = 0;
};

// A step before its vector is known: up to 4 columns of a group.
struct Step {
  int64_t columns[kStepCols];
  StepTarget target;
};

class StepsBuilder {
 public:
  // `whole`: groups have all their columns.
  StepsBuilder(DType type, int64_t limit, bool whole) : type_(type), limit_(limit), whole_(whole) {}

  void add(const Step& step) {
    Place places[kStepCols];
    bool room = n_ < StepsPlan::kSteps;
    for (int c = 0; c < kStepCols; ++c) {
      places[c] = place_of(type_, step.columns[c]);
      room = room && low_.takes(places[c].low);
      if (places[c].high >= 0) room = room && high_.takes(places[c].high);
    }
    if (!room) close();
    for (int c = 0; c < kStepCols; ++c) {
      const Place& p = places[c];
      const int entry = kStepCols * StepsPlan::slot(n_) + c;
      const uint64_t bit = uint64_t{1} << entry;
      low_.put(entry, p.low);
      if ((p.low_shift & 2) != 0) plan_.low_by_2 |= bit;
      if ((p.low_shift & 4) != 0) plan_.low_by_4 |= bit;
      if (p.high < 0) continue;
      high_.put(entry, p.high);
      if ((p.high_shift & 2) != 0) plan_.high_by_2 |= bit;
      if ((p.high_shift & 4) != 0) plan_.high_by_4 |= bit;
      plan_.high_bit[entry] = static_cast<uint8_t>(1 << p.high_shift);
    }
    plan_.steps[n_++] = step.target;
  }

  std::vector<StepsPlan> take() {
    close();
    return std::move(done_);
  }

 private:
  void close() {
    if (n_ == 0) return;
    plan_.low = low_.build(limit_);
    plan_.high = high_.build(limit_);
    plan_.whole = whole_ && n_ == StepsPlan::kSteps;
    done_.push_back(plan_);
    plan_ = {};
    low_ = {};
    high_ = {};
    n_ = 0;
  }

  DType type_;
  int64_t limit_;
  bool whole_;
  std::vector<StepsPlan> done_;
  StepsPlan plan_;
  FetchBuilder low_, high_;
  int n_ = 0;
};

// The groups, in the file's order, of rows of which `limit` bytes may be read.
StripPlan plan_groups(DType type, const ColumnGroups& columns, std::span<const int32_t> groups,
                      int64_t limit) {
  const PackedFormat f = packed_format(type);
  StepsBuilder steps(type, limit, columns.dense);
  for (const int32_t i : groups) {
    const ColumnGroup& group = columns.groups[static_cast<size_t>(i)];
    const auto to = static_cast<int32_t>(group.before * f.column_bytes());
    const int lines[2] = {2 * f.plane_bits(0), 2 * f.plane_bits(1)};
    for (int32_t c = 0; c < group.n; c += kStepCols) {
      Step step{};
      step.target.n = std::min<int32_t>(kStepCols, group.n - c);
      step.target.plane[0] = to + c * lines[0];
      step.target.plane[1] = to + group.n * lines[0] + c * lines[1];
      for (int32_t j = 0; j < kStepCols; ++j) {
        const int32_t nth = group.first + c + (j < step.target.n ? j : 0);
        step.columns[j] = columns.dense ? nth : columns.picks[static_cast<size_t>(nth)];
      }
      steps.add(step);
    }
  }
  StripPlan plan;
  plan.steps = steps.take();
  if (f.has_super()) return plan;

  FetchBuilder fetch;
  ScalesPlan scales;
  const auto close = [&] {
    if (scales.n == 0) return;
    scales.fetch = fetch.build(limit);
    plan.scales.push_back(scales);
    fetch = {};
    scales = {};
  };
  const auto block_bytes = static_cast<int64_t>(traits(type).block_bytes);
  for (const int32_t i : groups) {
    // d comes first in a block, then m.
    const int64_t block = columns.groups[static_cast<size_t>(i)].source * block_bytes;
    const int halves = f.scales == ScaleKind::kHalfPair ? 2 : 1;
    if (scales.n == ScalesPlan::kGroups || !fetch.takes(block + 2 * halves - 1)) close();
    for (int b = 0; b < 2 * halves; ++b) fetch.put(16 * (b / 2) + 2 * scales.n + b % 2, block + b);
    scales.to[scales.n++] = i * f.group_scale_bytes();
  }
  close();
  return plan;
}

}  // namespace

std::vector<StripPlan> plan_strip(DType type, int64_t cols, const ColumnGroups& columns) {
  const PackedFormat f = packed_format(type);
  const auto row = static_cast<int64_t>(row_bytes(type, cols));
  std::vector<int32_t> order(columns.groups.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  if (!columns.dense) {
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return columns.groups[static_cast<size_t>(a)].source <
             columns.groups[static_cast<size_t>(b)].source;
    });
    std::vector<StripPlan> plans{plan_groups(type, columns, order, row)};
    // Each vector's stretch of the row begins where its first byte is; together they are the row.
    std::vector<StepsPlan>& steps = plans[0].steps;
    const auto begin = [&](size_t i) { return i == 0 ? 0 : steps[i % steps.size()].low.base; };
    for (size_t i = 0; i < steps.size(); ++i) {
      const size_t ahead = i + std::min(kAhead, steps.size());
      const size_t nth = ahead % steps.size();
      const int64_t past = ahead >= steps.size() ? row : 0;
      steps[i].ahead_begin = past + begin(nth);
      steps[i].ahead_end = past + (nth + 1 == steps.size() ? row : begin(nth + 1));
    }
    return plans;
  }
  const int64_t n_whole = cols / kSuperCols;
  const auto groups_of_one = static_cast<size_t>(kSuperCols / columns.group_size);
  const std::span<const int32_t> all(order);
  std::vector<StripPlan> plans;
  if (n_whole > 0) {
    const auto step = static_cast<int64_t>(row_bytes(type, kSuperCols));
    StripPlan plan = plan_groups(type, columns, all.first(groups_of_one), step);
    plan.repeat = n_whole;
    plan.row_step = step;
    plan.codes_step = kSuperCols * f.column_bytes();
    plan.scales_step = static_cast<int64_t>(groups_of_one) * f.group_scale_bytes();
    plan.steps[0].ahead_begin = std::min<int64_t>(2, n_whole) * step;
    plan.steps[0].ahead_end = plan.steps[0].ahead_begin + step;
    plans.push_back(std::move(plan));
  }
  if (cols % kSuperCols != 0) {
    plans.push_back(
        plan_groups(type, columns, all.subspan(static_cast<size_t>(n_whole) * groups_of_one), row));
  }
  return plans;
}

}  // namespace coreinfer
