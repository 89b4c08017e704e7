// The CPU backend's operations around matrix products: load, embed, linear, ffn_hidden. What is
// multiplied how is cpu_product.h's and cpu_columns.h's matter.
#include <algorithm>
#include <array>
#include <cstring>

#include "backend/cpu_backend.h"
#include "backend/cpu_columns.h"
#include "backend/cpu_product.h"
#include "base/error.h"
#include "kernels/dequantize.h"
#include "kernels/packed_pack.h"

namespace coreinfer {
namespace {

int64_t strips_of(int64_t rows) { return (rows + kStripRows - 1) / kStripRows; }
int64_t strips_of(const Weight& w) { return strips_of(w.rows()); }

// Outputs of a strip, fewer than 16 in a matrix's last.
int64_t rows_of(const Weight& w, int64_t strip) {
  return std::min<int64_t>(kStripRows, w.rows() - strip * kStripRows);
}

void add_bias(const Buffer* bias, int64_t row, int64_t rows, int64_t n, float* tile) {
  if (bias == nullptr) return;
  const float* const b = bias->data() + row;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < rows; ++r) tile[t * kStripRows + r] += b[r];
  }
}

// y = sums, or y += sums; the loops over whole strips have a constant length.
void store_sums(const float* sums, int64_t rows, bool accumulate, float* y) {
  if (rows == kStripRows && accumulate) {
    for (int r = 0; r < kStripRows; ++r) y[r] += sums[r];
  } else if (rows == kStripRows) {
    std::memcpy(y, sums, kStripRows * sizeof(float));
  } else {
    for (int64_t r = 0; r < rows; ++r) y[r] = accumulate ? y[r] + sums[r] : sums[r];
  }
}

// A unit is two strips of one weight. For few tokens one of each half: a thread then reads two
// streams of memory, each of which it asks for across the ends of strips. For many, two neighbours,
// whose outputs are neighbours, too.
class LinearTask final : public ProductTask {
 public:
  LinearTask(Product& product, std::span<const Linear> linears, int64_t n_tokens)
      : linears_(linears), halves_(n_tokens <= kExactRows) {
    for (size_t i = 0; i < linears.size(); ++i) {
      product.add(linears[i].weight);
      first_[i + 1] = first_[i] + half_of(*linears[i].weight);
    }
  }

  int64_t n_units() const { return first_[linears_.size()]; }

  ProductUnit unit(int64_t number) const override {
    size_t i = 0;
    while (number >= first_[i + 1]) ++i;
    const Weight& w = *linears_[i].weight;
    const int64_t nth = number - first_[i];
    const int64_t strip = halves_ ? nth : 2 * nth, other = halves_ ? nth + half_of(w) : strip + 1;
    return {{{{i, strip}, {i, other}}}, other < strips_of(w) ? 2 : 1};
  }

  void expect(const ProductUnit& unit) const override {
    const Linear& l = linears_[unit.parts[0].weight];
    if (!l.accumulate) return;
    for (int p = 0; p < unit.n_parts; ++p) {
      constexpr int kToWrite = 1;
      __builtin_prefetch(l.out.data + unit.parts[static_cast<size_t>(p)].strip * kStripRows,
                         kToWrite);
    }
  }

  void finish(const ProductUnit& unit, int64_t first, int64_t n,
              float* const* tiles) const override {
    const Linear& l = linears_[unit.parts[0].weight];
    int64_t row[2] = {}, rows[2] = {};
    for (int p = 0; p < unit.n_parts; ++p) {
      const int64_t strip = unit.parts[static_cast<size_t>(p)].strip;
      row[p] = strip * kStripRows;
      rows[p] = rows_of(*l.weight, strip);
      add_bias(l.bias, row[p], rows[p], n, tiles[p]);
    }
    for (int64_t t = 0; t < n; ++t) {
      float* const y = l.out.data + (first + t) * l.out.stride;
      for (int p = 0; p < unit.n_parts; ++p) {
        store_sums(tiles[p] + t * kStripRows, rows[p], l.accumulate, y + row[p]);
      }
    }
  }

 private:
  static int64_t half_of(const Weight& w) { return (strips_of(w) + 1) / 2; }

  std::span<const Linear> linears_;
  bool halves_;
  std::array<int64_t, Product::kMaxWeights + 1> first_{};  // unit of each weight
};

// A unit is the same strip of up and gate.
class HiddenTask final : public ProductTask {
 public:
  HiddenTask(Product& product, const FfnWeights& ffn, ActivateFn activate, float threshold, Rows h,
             Rows act_gate)
      : ffn_(ffn), activate_(activate), threshold_(threshold), h_(h), act_gate_(act_gate) {
    up_ = product.add(ffn.up.get());
    if (ffn.gate) gate_ = product.add(ffn.gate.get());
  }

  int64_t n_units() const { return strips_of(*ffn_.up); }

  ProductUnit unit(int64_t strip) const override {
    return {{{{up_, strip}, {gate_, strip}}}, ffn_.gate ? 2 : 1};
  }

  void finish(const ProductUnit& unit, int64_t first, int64_t n,
              float* const* tiles) const override {
    const int64_t strip = unit.parts[0].strip, row = strip * kStripRows;
    const int64_t rows = rows_of(*ffn_.up, strip);
    add_bias(ffn_.up_bias.get(), row, rows, n, tiles[0]);
    if (ffn_.gate) add_bias(ffn_.gate_bias.get(), row, rows, n, tiles[1]);
    for (int64_t t = 0; t < n; ++t) {
      float* const up = tiles[0] + t * kStripRows;
      float* const h = h_.data + (first + t) * h_.stride + row;
      float* const a =
          act_gate_.data ? act_gate_.data + (first + t) * act_gate_.stride + row : nullptr;
      if (ffn_.gate) {
        activate_(tiles[1] + t * kStripRows, up, rows, threshold_, h, a);
      } else {
        activate_(up, nullptr, rows, threshold_, h, a);
      }
    }
  }

 private:
  const FfnWeights& ffn_;
  ActivateFn activate_;
  float threshold_;
  Rows h_, act_gate_;
  size_t up_ = 0, gate_ = 0;
};

}  // namespace

// Float rows stay as they are, but in memory of huge pages, which a file's are not.
WeightPtr CpuBackend::load(const Mat& mat) {
  if (!traits(mat.type).quantized) {
    std::shared_ptr<std::byte> memory = weight_memory_.take(mat.bytes());
    pool_.share([&](ThreadPool::Context& context) {
      int64_t begin, end;
      while (context.next(static_cast<int64_t>(mat.bytes()), int64_t{1} << 20, &begin, &end)) {
        std::memcpy(memory.get() + begin, mat.data + begin, static_cast<size_t>(end - begin));
      }
    });
    const Mat copy{mat.type, mat.rows, mat.cols, memory.get()};
    return std::make_shared<CpuWeight>(copy, std::move(memory));
  }
  ColumnGroupsPtr columns = all_columns(mat.type, mat.cols);
  PackedView strips = packed_layout(mat.type, mat.rows, *columns);
  std::shared_ptr<std::byte> memory = weight_memory_.take(strips.bytes() + kPackedSlack);
  strips.data = memory.get();
  const StripPacker packer(isa_, mat, {}, strips);
  pool_.share([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(strips.n_strips(), 4, &begin, &end)) packer.pack(begin, end);
  });
  return std::make_shared<CpuWeight>(strips, std::move(columns), std::move(memory));
}

// Only float types have kernels that leave columns out.
WeightPtr CpuBackend::load_for_zeros(const Mat& mat) {
  if (traits(mat.type).quantized) return load(mat);
  ColumnsView columns = columns_layout(mat, {});
  std::shared_ptr<std::byte> memory = weight_memory_.take(columns.bytes());
  columns.data = memory.get();
  pool_.share([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(strips_of(mat.rows), 4, &begin, &end)) {
      store_columns(mat, {}, begin * kStripRows, std::min(end * kStripRows, mat.rows), columns);
    }
  });
  return std::make_shared<CpuWeight>(columns, std::move(memory));
}

void CpuBackend::embed(std::span<const int32_t> tokens, const Mat& table, float scale,
                       const Mat& positions, int64_t first_position, Rows out) {
  const auto n = static_cast<int64_t>(tokens.size());
  for (int32_t token : tokens) {
    if (token < 0 || token >= table.rows) {
      throw_error(ErrorKind::kValue, "token id %d, expected 0 to %lld", token,
                  static_cast<long long>(table.rows - 1));
    }
  }
  if (!positions.empty() && (first_position < 0 || first_position + n > positions.rows)) {
    throw_error(ErrorKind::kValue, "positions %lld to %lld, but the model has embeddings for %lld",
                static_cast<long long>(first_position),
                static_cast<long long>(first_position + n - 1),
                static_cast<long long>(positions.rows));
  }
  const std::lock_guard lock(mutex_);
  const VectorKernels& vectors = vector_kernels(isa_);
  float* position = nullptr;
  if (!positions.empty()) {
    if (!linear_scratch_) linear_scratch_ = std::make_shared<LinearScratch>();
    linear_scratch_->inputs.ensure(static_cast<size_t>(positions.cols) * sizeof(float));
    position = linear_scratch_->inputs.as<float>();
  }
  for (int64_t i = 0; i < n; ++i) {
    float* const row = out.data + i * out.stride;
    dequantize_row(table.type, table.row(tokens[static_cast<size_t>(i)]), row, table.cols);
    if (scale != 1.0f) vectors.scale(row, scale, table.cols);
    if (positions.empty()) continue;
    dequantize_row(positions.type, positions.row(first_position + i), position, positions.cols);
    vectors.add(row, position, table.cols);
  }
}

void CpuBackend::linear(Rows x, const Norm& norm, std::span<const Linear> linears) {
  const std::lock_guard lock(mutex_);
  std::array<Linear, Product::kMaxWeights> others;
  if (x.n <= kExactRows) {
    size_t n = 0;
    for (const Linear& l : linears) {
      if (!static_cast<const CpuWeight*>(l.weight)->stored_by_columns()) {
        others[n++] = l;
      } else if (norm.weight != nullptr) {
        throw_error(ErrorKind::kState, "a norm before a matrix that expects zeros");
      } else {
        if (!column_scratch_) column_scratch_ = std::make_shared<ColumnScratch>();
        multiply_columns(isa_, pool_, *column_scratch_, x, l);
      }
    }
    if (n == 0) return;
    linears = {others.data(), n};
  }
  const bool f32 = options_.f32_activations || std::any_of(linears.begin(), linears.end(),
                                                           [](const Linear& l) { return l.f32; });
  Product product(isa_, f32, pool_, linear_scratch_, x, norm);
  const LinearTask task(product, linears, x.n);
  product.run(task.n_units(), task);
}

void CpuBackend::ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act,
                            Rows h, Rows act_gate) {
  const std::lock_guard lock(mutex_);
  const ActivateFn activate = activation_kernel(vector_kernels(isa_), act);
  Product product(isa_, options_.f32_activations, pool_, linear_scratch_, x, norm);
  const HiddenTask task(product, ffn, activate, act.threshold, h, act_gate);
  product.run(task.n_units(), task);
}

}  // namespace coreinfer
