#include "backend/cpu_product.h"

#include <algorithm>

#include "base/error.h"

namespace coreinfer {
namespace {

// Tokens that are computed together: what they and their sums take stays in the second-level cache
// while the strips of a chunk pass over them.
constexpr int64_t kTokenBlock = 128;
constexpr int64_t kBf16TokenBlock = 512;
// Columns of a float panel: 32 KiB. Tiles of columns in a bf16 panel: 8 KiB, so that two panels and
// as much of two token tiles lie in the first-level cache.
constexpr int64_t kPanelCols = 512;
constexpr int64_t kPanelTiles = 8;
// Units that a thread claims at once, at least where few tokens make memory the limit: there long
// runs are read faster. In the bf16 family the units also share a pass over the tokens.
constexpr int64_t kChunkUnits = 4;
constexpr int64_t kBf16ChunkUnits = 16;

constexpr size_t kFloat = sizeof(float);
constexpr int64_t kLineFloats = kCacheLine / kFloat;

constexpr size_t round_up(size_t n) { return (n + kCacheLine - 1) / kCacheLine * kCacheLine; }

constexpr int64_t tiles_of(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// Hands out pieces of a block of memory; without one it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<std::byte*>(memory)) {}
  template <class T>
  T* take(size_t n) {
    T* const p = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(n * sizeof(T));
    return p;
  }
  size_t used() const { return used_; }

 private:
  std::byte* memory_;
  size_t used_ = 0;
};

const CpuWeight& cpu_weight(const Weight* weight) {
  if (weight == nullptr) throw_error(ErrorKind::kState, "a matrix product without a weight");
  return static_cast<const CpuWeight&>(*weight);
}

RowsProduct rows_of(const Mat& mat, int64_t strip, float* tile) {
  const int64_t row = strip * kStripRows;
  return {mat.row(row), std::min<int64_t>(kStripRows, mat.rows - row), tile};
}

// The same place `bytes` further on.
template <class T>
T* in_copy(T* p, size_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + bytes);
}

LinearScratch& made(std::shared_ptr<LinearScratch>& scratch) {
  if (!scratch) scratch = std::make_shared<LinearScratch>();
  return *scratch;
}

}  // namespace

bool Product::Input::serves(const CpuWeight& w, bool quantize) const {
  const ColumnGroups* const c = w.columns().get();
  if (quantized != (quantize && c != nullptr)) return false;
  if (columns == c) return true;
  const bool in_order = (columns == nullptr || columns->dense) && (c == nullptr || c->dense);
  if (!quantized) return in_order;
  return in_order && columns->group_size == c->group_size;
}

Product::Product(Isa isa, bool f32_activations, ThreadPool& pool,
                 std::shared_ptr<LinearScratch>& scratch, Rows x, const Norm& norm)
    : kernels_(linear_kernels(isa)),
      vectors_(vector_kernels(isa)),
      bf16_(x.n > kExactRows && !f32_activations ? bf16_kernels(isa) : nullptr),
      f32_(f32_activations),
      pool_(pool),
      scratch_(made(scratch)),
      x_(x),
      norm_(norm),
      copy_per_thread_(x.n == 1) {}

size_t Product::add(const Weight* weight) {
  const CpuWeight& w = cpu_weight(weight);
  if (w.cols() != x_.width) {
    throw_error(ErrorKind::kState, "a matrix of %lld columns times rows of %lld elements",
                static_cast<long long>(w.cols()), static_cast<long long>(x_.width));
  }
  if (bf16_ != nullptr && w.packed() && !(bf16_->packed && w.columns()->dense)) bf16_ = nullptr;
  size_t i = 0;
  while (i < n_inputs_ && !inputs_[i].serves(w, !f32_)) ++i;
  if (i == n_inputs_) {
    if (n_inputs_ == inputs_.size()) throw_error(ErrorKind::kState, "too many kinds of weights");
    Input& in = inputs_[n_inputs_++];
    in.columns = w.columns().get();
    in.quantized = w.packed() && !f32_;
  }
  if (n_outputs_ == kMaxWeights) throw_error(ErrorKind::kState, "too many weights in one call");
  outputs_[n_outputs_] = {&w, i};
  return n_outputs_++;
}

void Product::run(int64_t n_units, const ProductTask& task) {
  if (x_.n == 0) return;
  reserve();
  struct Job {
    const Product* product;
    int64_t n_units;
    const ProductTask* task;
  } const job{this, n_units, &task};
  // One pointer fits into a std::function without an allocation.
  const auto on_thread = [j = &job](ThreadPool::Context& context) {
    const Product& p = *j->product;
    auto* const row = reinterpret_cast<float*>(p.thread_memory(context));
    size_t copy = 0;
    if (p.copy_per_thread_) {
      copy = static_cast<size_t>(context.thread());
      // Other cores wrote most of it: all of it is asked for at once.
      for (int64_t i = 0; i < p.x_.width; i += kLineFloats) __builtin_prefetch(p.x_.data + i);
      p.prepare(0, row, copy);
    } else {
      int64_t begin, end;
      while (context.next(p.x_.n, 1, &begin, &end)) p.prepare(begin, row, 0);
      context.barrier();
    }
    if (p.bf16_ != nullptr) {
      p.work_bf16(context, j->n_units, *j->task);
    } else {
      p.work(context, copy, j->n_units, *j->task);
    }
  };
  if (copy_per_thread_) {
    pool_.share(on_thread);
  } else {
    pool_.run(on_thread);
  }
}

// ---- Memory -------------------------------------------------------------------------------------

size_t Product::row_bytes() const { return round_up(static_cast<size_t>(x_.width) * kFloat); }

// A normalised row; then panels and tiles.
size_t Product::thread_bytes() const {
  constexpr size_t kPlain = (kPanelCols + 2 * kTokenBlock) * kStripRows * kFloat;
  constexpr size_t kBf16Panels = 2 * kPanelTiles * kTileSize * sizeof(uint16_t);
  constexpr size_t kBf16Sums = 2 * kBf16ChunkUnits * kBf16TokenBlock * kStripRows * kFloat;
  return row_bytes() + (bf16_ != nullptr ? kBf16Panels + kBf16Sums : kPlain);
}

void Product::reserve() {
  const auto n = static_cast<size_t>(x_.n);
  const auto stride = static_cast<int64_t>(row_bytes() / kFloat);
  const auto cut_up = [&](Arena arena) {
    if (bf16_ != nullptr) {
      const int64_t tiles = tiles_of(x_.n, kTileTokens) * tiles_of(x_.width, kTileCols);
      rounded_ = arena.take<uint16_t>(static_cast<size_t>(tiles * kTileSize));
      return arena.used();
    }
    normed_ = nullptr;
    for (size_t i = 0; i < n_inputs_; ++i) {
      Input& in = inputs_[i];
      if (in.quantized) {
        const size_t codes = round_up(static_cast<size_t>(in.columns->padded_cols));
        const size_t groups = round_up(in.columns->groups.size() * kFloat) / kFloat;
        in.codes.codes = arena.take<int8_t>(n * codes);
        in.codes.scale = arena.take<float>(n * groups);
        in.codes.minus_sum = arena.take<int32_t>(n * groups);
        in.codes.scaled_sum = arena.take<float>(n * groups);
        in.codes.codes_stride = static_cast<int64_t>(codes);
        in.codes.groups_stride = static_cast<int64_t>(groups);
      } else if (in.rearranged() || has_norm()) {
        float* const rows = arena.take<float>(n * static_cast<size_t>(stride));
        if (!in.rearranged()) normed_ = rows;
        in.values = {rows, stride};
        in.in_scratch = true;
      } else {
        in.values = {x_.data, x_.stride};
      }
    }
    return arena.used();
  };
  copy_bytes_ = cut_up(Arena(nullptr));
  const int n_copies = copy_per_thread_ ? pool_.n_threads() : 1;
  scratch_.inputs.ensure(copy_bytes_ * static_cast<size_t>(n_copies));
  cut_up(Arena(scratch_.inputs.data()));
  scratch_.threads.ensure(thread_bytes() * static_cast<size_t>(pool_.n_threads()));
}

// ---- The tokens in every form -------------------------------------------------------------------

std::byte* Product::thread_memory(const ThreadPool::Context& context) const {
  return scratch_.threads.as<std::byte>() + thread_bytes() * static_cast<size_t>(context.thread());
}

const float* Product::normalise(int64_t token, float* row) const {
  const float* const x = x_.data + token * x_.stride;
  if (!has_norm()) return x;
  const float* const weight = norm_.weight->data();
  if (norm_.kind == NormKind::kRms) {
    vectors_.rms_norm(x, weight, norm_.eps, x_.width, row);
  } else {
    const float* const bias = norm_.bias ? norm_.bias->data() : nullptr;
    vectors_.layer_norm(x, weight, bias, norm_.eps, x_.width, row);
  }
  return row;
}

QuantizedRows Product::codes_of(const Input& in, int64_t first, size_t copy) const {
  QuantizedRows codes = in.codes.from(first);
  const size_t bytes = copy * copy_bytes_;
  codes.codes = in_copy(codes.codes, bytes);
  codes.scale = in_copy(codes.scale, bytes);
  codes.minus_sum = in_copy(codes.minus_sum, bytes);
  codes.scaled_sum = in_copy(codes.scaled_sum, bytes);
  return codes;
}

FloatRows Product::values_of(const Input& in, int64_t first, size_t copy) const {
  const float* const rows = in.values.data + first * in.values.stride;
  return {in.in_scratch ? in_copy(rows, copy * copy_bytes_) : rows, in.values.stride};
}

void Product::prepare(int64_t token, float* row, size_t copy) const {
  if (normed_ != nullptr) {
    row = in_copy(normed_ + token * static_cast<int64_t>(row_bytes() / kFloat), copy * copy_bytes_);
  }
  const float* const x = normalise(token, row);
  if (bf16_ != nullptr) return bf16_->round_token(x, x_.width, token, rounded_);
  for (size_t i = 0; i < n_inputs_; ++i) {
    const Input& in = inputs_[i];
    if (in.quantized) {
      kernels_.quantize(*in.columns, x, codes_of(in, token, copy));
    } else if (in.rearranged()) {
      auto* const out = const_cast<float*>(values_of(in, token, copy).data);
      for (const ColumnGroup& g : in.columns->groups) std::copy_n(x + g.first, g.n, out + g.before);
    }
  }
}

// ---- 8-bit and float32 products -----------------------------------------------------------------

void Product::work(ThreadPool::Context& context, size_t copy, int64_t n_units,
                   const ProductTask& task) const {
  float* const panel = reinterpret_cast<float*>(thread_memory(context) + row_bytes());
  float* const first_tile = panel + kPanelCols * kStripRows;
  float* const tiles[2] = {first_tile, first_tile + kTokenBlock * kStripRows};
  const int64_t chunk = std::clamp<int64_t>(n_units / (8 * context.n_threads()), 1, kChunkUnits);
  int64_t begin, end;
  const auto claim = [&] {
    return x_.n <= kExactRows ? context.next_share(n_units, chunk, &begin, &end)
                              : context.next(n_units, chunk, &begin, &end);
  };
  while (claim()) {
    for (int64_t t = 0; t < x_.n; t += kTokenBlock) {
      const int64_t n = std::min(kTokenBlock, x_.n - t);
      for (int64_t i = begin; i < end; ++i) {
        const ProductUnit unit = task.unit(i);
        if (x_.n == 1) task.expect(unit);
        fill(unit, copy, t, n, panel, tiles);
        task.finish(unit, t, n, tiles);
      }
    }
  }
}

void Product::fill(const ProductUnit& unit, size_t copy, int64_t first, int64_t n, float* panel,
                   float* const (&tiles)[2]) const {
  const Output& a = outputs_[unit.parts[0].weight];
  const Output& b = outputs_[unit.parts[1].weight];
  const Input& in = inputs_[a.input];
  if (unit.n_parts == 2 && in.quantized && a.input == b.input &&
      a.weight->type() == b.weight->type()) {
    const std::array<StripProduct, 2> products = {
        {{&a.weight->strips(), unit.parts[0].strip, tiles[0]},
         {&b.weight->strips(), unit.parts[1].strip, tiles[1]}}};
    const DotStripsFn dot = kernels_.dot_strips(a.weight->type(), in.columns->dense);
    return dot(products, codes_of(in, first, copy), n);
  }
  if (unit.n_parts == 2 && read_by_rows(*a.weight) && read_by_rows(*b.weight) &&
      a.weight->type() == b.weight->type()) {
    const Mat &mat = a.weight->plain(), &other = b.weight->plain();
    const std::array<RowsProduct, 2> products = {rows_of(mat, unit.parts[0].strip, tiles[0]),
                                                 rows_of(other, unit.parts[1].strip, tiles[1])};
    const DotRowsFn dot = kernels_.dot_rows(mat.type);
    return dot(products, mat.stride(), mat.cols, values_of(in, first, copy), n);
  }
  for (int p = 0; p < unit.n_parts; ++p) {
    tile(unit.parts[static_cast<size_t>(p)], copy, first, n, panel, tiles[p]);
  }
}

bool Product::read_by_rows(const CpuWeight& w) const {
  return x_.n <= kExactRows && !w.packed() && !w.stored_by_columns();
}

void Product::tile(const ProductUnit::Part& part, size_t copy, int64_t first, int64_t n,
                   float* panel, float* tile) const {
  const CpuWeight& w = *outputs_[part.weight].weight;
  const Input& in = inputs_[outputs_[part.weight].input];
  if (in.quantized) {
    const StripProduct product{&w.strips(), part.strip, tile};
    const DotStripsFn dot = kernels_.dot_strips(w.type(), w.columns()->dense);
    return dot({&product, 1}, codes_of(in, first, copy), n);
  }
  const FloatRows x = values_of(in, first, copy);
  if (w.packed()) return packed_tile(w, part.strip, x, n, panel, tile);
  plain_tile(w, part.strip, x, n, panel, tile);
}

void Product::packed_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n,
                          float* panel, float* tile) const {
  const UnpackPanelFn unpack = kernels_.unpack_panel(w.type());
  const auto& groups = w.columns()->groups;
  const auto n_groups = static_cast<int64_t>(groups.size());
  const int64_t step = kPanelCols / w.columns()->group_size;
  std::fill_n(tile, n * kStripRows, 0.0f);
  for (int64_t g = 0; g < n_groups; g += step) {
    const int64_t end = std::min(g + step, n_groups);
    const ColumnGroup& last = groups[static_cast<size_t>(end - 1)];
    const int64_t begin_col = groups[static_cast<size_t>(g)].before;
    unpack(w.strips(), strip, g, end, panel);
    kernels_.dot_panel(panel, last.before + last.n - begin_col, {x.data + begin_col, x.stride}, n,
                       tile);
  }
}

void Product::plain_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n,
                         float* panel, float* tile) const {
  const int64_t row = strip * kStripRows;
  if (w.stored_by_columns()) {
    const ColumnsView& columns = w.by_columns();
    const ColumnsPanelFn widen = kernels_.columns_panel(columns.type);
    std::fill_n(tile, n * kStripRows, 0.0f);
    for (int64_t c = 0; c < columns.cols; c += kPanelCols) {
      const int64_t n_cols = std::min(kPanelCols, columns.cols - c);
      widen(columns.at(c, row), columns.stride(), n_cols, panel);
      kernels_.dot_panel(panel, n_cols, {x.data + c, x.stride}, n, tile);
    }
    return;
  }
  const Mat& mat = w.plain();
  const RowsProduct rows = rows_of(mat, strip, tile);
  if (read_by_rows(w)) {
    return kernels_.dot_rows(mat.type)({&rows, 1}, mat.stride(), mat.cols, x, n);
  }
  std::fill_n(tile, n * kStripRows, 0.0f);
  for (int64_t c = 0; c < mat.cols; c += kPanelCols) {
    const int64_t end = std::min(c + kPanelCols, mat.cols);
    kernels_.transpose_panel(mat.type, rows.first, mat.stride(), rows.n_rows, c, end, panel);
    kernels_.dot_panel(panel, end - c, {x.data + c, x.stride}, n, tile);
  }
}

// ---- bf16 products ------------------------------------------------------------------------------

// Columns are cut into panels; for each, the units of a chunk pass over all tokens, whose part of
// these columns stays in the second-level cache meanwhile.
void Product::work_bf16(ThreadPool::Context& context, int64_t n_units,
                        const ProductTask& task) const {
  Arena arena(thread_memory(context) + row_bytes());
  uint16_t* const panels[2] = {arena.take<uint16_t>(kPanelTiles * kTileSize),
                               arena.take<uint16_t>(kPanelTiles * kTileSize)};
  float* const sums = arena.take<float>(2 * kBf16ChunkUnits * kBf16TokenBlock * kStripRows);
  const int64_t part_tokens = tiles_of(std::min(kBf16TokenBlock, x_.n), kTileTokens) * kTileTokens;
  const auto part_sums = [&](int64_t unit, int64_t part) {
    return sums + (2 * unit + part) * part_tokens * kStripRows;
  };
  const int64_t k_tiles = tiles_of(x_.width, kTileCols);
  const int64_t token_stride = k_tiles * kTileSize;
  const int64_t chunk =
      std::clamp<int64_t>(n_units / (4 * context.n_threads()), 1, kBf16ChunkUnits);
  bf16_->begin();
  int64_t begin, end;
  while (context.next(n_units, chunk, &begin, &end)) {
    for (int64_t t = 0; t < x_.n; t += kBf16TokenBlock) {
      const int64_t n = std::min(kBf16TokenBlock, x_.n - t);
      const uint16_t* const tokens = rounded_ + t / kTileTokens * token_stride;
      for (int64_t k = 0; k < k_tiles; k += kPanelTiles) {
        const int64_t k_end = std::min(k + kPanelTiles, k_tiles);
        for (int64_t i = begin; i < end; ++i) {
          const ProductUnit unit = task.unit(i);
          float* const to[2] = {part_sums(i - begin, 0), part_sums(i - begin, 1)};
          for (int p = 0; p < unit.n_parts; ++p) {
            bf16_panel(unit.parts[static_cast<size_t>(p)], k * kTileCols, k_end * kTileCols,
                       panels[p]);
          }
          bf16_->multiply(panels, unit.n_parts, k_end - k, tokens + k * kTileSize, token_stride,
                          tiles_of(n, kTileTokens), k == 0, to);
        }
      }
      for (int64_t i = begin; i < end; ++i) {
        float* const tiles[2] = {part_sums(i - begin, 0), part_sums(i - begin, 1)};
        task.finish(task.unit(i), t, n, tiles);
      }
    }
  }
  bf16_->end();
}

void Product::bf16_panel(const ProductUnit::Part& part, int64_t begin, int64_t end,
                         uint16_t* panel) const {
  const CpuWeight& w = *outputs_[part.weight].weight;
  if (w.packed()) return bf16_->unpack(w.type())(w.strips(), part.strip, begin, end, panel);
  const int64_t row = part.strip * kStripRows;
  if (w.stored_by_columns()) {
    const ColumnsView& columns = w.by_columns();
    return bf16_->columns(columns.type)(columns.at(0, row), columns.stride(), begin,
                                        std::min(end, columns.cols), panel);
  }
  const Mat& mat = w.plain();
  bf16_->transpose(mat.type)(mat.row(row), mat.stride(),
                             std::min<int64_t>(kStripRows, mat.rows - row), begin,
                             std::min(end, mat.cols), panel);
}

}  // namespace coreinfer
