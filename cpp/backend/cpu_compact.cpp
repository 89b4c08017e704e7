// compact of the CPU backend: the picked neurons of all layers, gathered from the mapped file into
// one contiguous buffer in the layout that the matrix kernels compute with. Rows of gate and up are
// picked whole; of down, columns are picked inside the quantisation groups, values exactly kept.
#include <algorithm>
#include <cstring>

#include "backend/cpu_backend.h"
#include "backend/cpu_columns.h"
#include "backend/cpu_weight.h"
#include "base/aligned_buffer.h"
#include "base/error.h"
#include "kernels/packed_pack.h"

namespace coreinfer {
namespace {

// Strips that a thread claims at once. Within them the next one is fetched ahead.
constexpr int64_t kChunkUnits = 8;

// One matrix to be made: rows or columns of `from`.
struct Target {
  const Mat* from = nullptr;
  std::span<const int32_t> rows{};        // picked rows; empty: all
  std::span<const int32_t> columns{};     // picked columns; empty: all
  ColumnGroupsPtr groups{};               // when packed
  PackedView strips{};                    // when packed
  std::shared_ptr<StripPacker> packer{};  // when packed, once the buffer is there
  ColumnsView by_columns{};               // a float `down` for zeros
  Mat plain{};                            // when neither
  size_t offset = 0;                      // in the buffer

  int64_t n_rows() const { return rows.empty() ? from->rows : static_cast<int64_t>(rows.size()); }
  bool stored_by_columns() const { return by_columns.rows > 0; }
  size_t bytes() const {
    return groups ? strips.bytes() : stored_by_columns() ? by_columns.bytes() : plain.bytes();
  }
  // Units of work: strips of 16 rows.
  int64_t units() const { return (n_rows() + kStripRows - 1) / kStripRows; }
};

Target make_target(const Mat& from, std::span<const int32_t> rows, std::span<const int32_t> columns,
                   bool zeros = false) {
  Target t{.from = &from, .rows = rows, .columns = columns};
  if (traits(from.type).quantized) {
    t.groups = columns.empty() ? all_columns(from.type, from.cols)
                               : picked_columns(from.type, from.cols, columns);
    t.strips = packed_layout(from.type, t.n_rows(), *t.groups);
  } else if (zeros) {
    t.by_columns = columns_layout(from, columns);
  } else {
    const auto cols = columns.empty() ? from.cols : static_cast<int64_t>(columns.size());
    t.plain = {from.type, t.n_rows(), cols, nullptr};
  }
  return t;
}

// Rows [begin, end) of a float matrix.
void copy_plain(const Target& t, int64_t begin, int64_t end) {
  const size_t element = row_bytes(t.from->type, 1);
  for (int64_t r = begin; r < end; ++r) {
    const std::byte* const row = t.from->row(t.rows.empty() ? r : t.rows[static_cast<size_t>(r)]);
    auto* const to = const_cast<std::byte*>(t.plain.row(r));
    if (t.columns.empty()) {
      std::memcpy(to, row, t.plain.stride());
    } else if (element == 2) {
      for (size_t i = 0; i < t.columns.size(); ++i) {
        std::memcpy(to + 2 * i, row + 2 * static_cast<size_t>(t.columns[i]), 2);
      }
    } else {
      for (size_t i = 0; i < t.columns.size(); ++i) {
        std::memcpy(to + 4 * i, row + 4 * static_cast<size_t>(t.columns[i]), 4);
      }
    }
  }
}

void copy_units(const Target& t, int64_t begin, int64_t end) {
  if (t.groups) {
    t.packer->pack(begin, end);
    return;
  }
  begin *= kStripRows;
  end = std::min(end * kStripRows, t.n_rows());
  if (t.stored_by_columns()) return store_columns(*t.from, t.columns, begin, end, t.by_columns);
  copy_plain(t, begin, end);
}

void check(const CompactSource& source) {
  const auto& neurons = source.neurons;
  const int64_t n_ff = source.up.rows;
  if (neurons.empty()) throw_error(ErrorKind::kValue, "a core set without neurons");
  for (size_t i = 0; i < neurons.size(); ++i) {
    if (neurons[i] < 0 || neurons[i] >= n_ff || (i > 0 && neurons[i] <= neurons[i - 1])) {
      throw_error(ErrorKind::kValue, "core neurons must ascend within [0, %lld); entry %zu is %d",
                  static_cast<long long>(n_ff), i, neurons[i]);
    }
  }
}

}  // namespace

// Fresh pages cost more than all the copying into them: the system has to find and to clear them.
// So the last core's buffer is written again once that core is gone, unless it is twice as large as
// needed or memory is short. What it held needs no clearing: every byte of a core is written.
std::shared_ptr<AlignedBuffer> CpuBackend::take_compact_memory(size_t bytes) {
  std::shared_ptr<AlignedBuffer> memory = std::move(compact_memory_);
  const bool serves =
      memory && memory.use_count() == 1 && memory->size() >= bytes && memory->size() / 2 <= bytes;
  if (!serves) {
    memory.reset();
    // Cores of one size differ a little in bytes; pages that are never written are not there.
    memory = std::make_shared<AlignedBuffer>(bytes + bytes / 16);
  }
  if (!options_.memory_limited) compact_memory_ = memory;
  return memory;
}

CompactWeights CpuBackend::compact(std::span<const CompactSource> layers, Room* room) {
  const std::lock_guard lock(mutex_);
  const auto gather = [&](std::span<const Target> matrices) {
    std::vector<int64_t> first{0};  // unit of each matrix
    for (const Target& t : matrices) first.push_back(first.back() + t.units());
    pool_.share([&](ThreadPool::Context& context) {
      int64_t begin, end;
      while (context.next(first.back(), kChunkUnits, &begin, &end)) {
        auto i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) -
                                     first.begin() - 1);
        for (; begin < end; ++i) {
          const int64_t to = std::min(end, first[i + 1]);
          copy_units(matrices[i], begin - first[i], to - first[i]);
          begin = to;
        }
      }
    });
  };
  CompactWeights result;
  std::vector<Target> targets;
  for (const CompactSource& source : layers) {
    check(source);
    if (!source.gate.empty()) targets.push_back(make_target(source.gate, source.neurons, {}));
    targets.push_back(make_target(source.up, source.neurons, {}));
    targets.push_back(make_target(source.down, {}, source.neurons, source.zeros));
  }
  for (Target& t : targets) {
    t.offset = result.buffer_bytes;
    result.buffer_bytes += (t.bytes() + kCacheLine - 1) / kCacheLine * kCacheLine;
    result.source_bytes +=
        t.columns.empty() ? t.from->stride() * static_cast<size_t>(t.n_rows()) : t.from->bytes();
  }

  const size_t needed = result.buffer_bytes + kPackedSlack;
  std::shared_ptr<const void> memory;
  std::byte* base;
  if (room != nullptr && room->left() >= needed) {
    memory = room->buffer;
    base = reinterpret_cast<std::byte*>(room->buffer->data()) + room->used;
    room->used += result.buffer_bytes;
  } else {
    const std::shared_ptr<AlignedBuffer> own = take_compact_memory(needed);
    base = own->as<std::byte>();
    memory = own;
  }
  for (Target& t : targets) {
    t.strips.data = base + t.offset;
    t.by_columns.data = base + t.offset;
    t.plain.data = base + t.offset;
    if (t.groups) t.packer = std::make_shared<StripPacker>(isa_, *t.from, t.rows, t.strips);
  }
  // All at once, or a layer after the other where the file's pages of each are to be given back.
  if (std::none_of(layers.begin(), layers.end(), [](const auto& l) { return bool(l.finished); })) {
    gather(targets);
  } else {
    auto first = targets.begin();
    for (const CompactSource& source : layers) {
      const auto last = first + (source.gate.empty() ? 2 : 3);
      gather({first, last});
      if (source.finished) source.finished();
      first = last;
    }
  }

  auto target = targets.begin();
  const auto take = [&]() -> WeightPtr {
    const Target& t = *target++;
    if (t.groups) return std::make_shared<CpuWeight>(t.strips, t.groups, memory);
    if (t.stored_by_columns()) return std::make_shared<CpuWeight>(t.by_columns, memory);
    return std::make_shared<CpuWeight>(t.plain, memory);
  };
  for (const CompactSource& source : layers) {
    FfnWeights ffn;
    if (!source.gate.empty()) ffn.gate = take();
    ffn.up = take();
    ffn.down = take();
    const auto picked = [&](const BufferPtr& bias) -> BufferPtr {
      if (!bias) return nullptr;
      BufferPtr values = allocate(static_cast<int64_t>(source.neurons.size()));
      for (size_t i = 0; i < source.neurons.size(); ++i) {
        values->data()[i] = bias->data()[source.neurons[i]];
      }
      return values;
    };
    ffn.gate_bias = picked(source.gate_bias);
    ffn.up_bias = picked(source.up_bias);
    ffn.down_bias = source.down_bias;
    result.layers.push_back(std::move(ffn));
  }
  return result;
}

}  // namespace coreinfer
