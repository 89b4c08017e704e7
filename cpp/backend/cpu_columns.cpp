#include "backend/cpu_columns.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "kernels/linear.h"

namespace coreinfer {
namespace {

// Rows that a thread adds up at once, at most: their sums stay in the first-level cache, and a
// column gives it a kilobyte or two in one piece.
constexpr int64_t kUnitRows = 512;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// As many rows at a time as a line of a column holds. Their elements are picked row by row first,
// which is the order that a CPU foresees, and turned in the second-level cache.
template <class Element>
void turn(const Mat& from, std::span<const int32_t> picks, int64_t begin, int64_t end,
          const ColumnsView& to) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  constexpr int64_t kCols = 1024;
  Element picked[kLine][kCols + kLine];  // a line more: rows must not meet in one set of a cache
  for (int64_t r = begin; r < end; r += kLine) {
    const int64_t n = std::min(kLine, end - r);
    const int64_t padding = r + n == to.rows ? to.padded_rows() - to.rows : 0;
    for (int64_t c = 0; c < to.cols; c += kCols) {
      const int64_t n_cols = std::min(kCols, to.cols - c);
      for (int64_t i = 0; i < n; ++i) {
        const auto* const row = reinterpret_cast<const Element*>(from.row(r + i));
        if (picks.empty()) {
          std::copy_n(row + c, n_cols, picked[i]);
        } else {
          for (int64_t j = 0; j < n_cols; ++j)
            picked[i][j] = row[picks[static_cast<size_t>(c + j)]];
        }
      }
      for (int64_t j = 0; j < n_cols; ++j) {
        auto* const column = reinterpret_cast<Element*>(to.at(c + j, r));
        for (int64_t i = 0; i < n; ++i) column[i] = picked[i][j];
        std::fill_n(column + n, padding, Element{0});
      }
    }
  }
}

// The elements of a token that are not zero.
struct NonZeros {
  int64_t n;
  int32_t* columns;
  float* values;

  static size_t bytes(int64_t width) {
    return kCacheLine + 2 * static_cast<size_t>(round_up(width + 1, 16)) * 4;
  }

  // `memory` has bytes(width) and keeps them from collect() on.
  static void collect(const float* x, int64_t width, std::byte* memory) {
    NonZeros at = in(memory, width);
    int64_t n = 0;
    for (int64_t c = 0; c < width; ++c) {  // without a branch; NaN is not zero
      at.columns[n] = static_cast<int32_t>(c);
      at.values[n] = x[c];
      n += x[c] != 0.0f;
    }
    std::memcpy(memory, &n, sizeof(n));
  }

  static NonZeros in(std::byte* memory, int64_t width) {
    NonZeros at;
    std::memcpy(&at.n, memory, sizeof(at.n));
    at.columns = reinterpret_cast<int32_t*>(memory + kCacheLine);
    at.values = reinterpret_cast<float*>(at.columns + round_up(width + 1, 16));
    return at;
  }
};

}  // namespace

ColumnsView columns_layout(const Mat& from, std::span<const int32_t> picks) {
  const auto cols = picks.empty() ? from.cols : static_cast<int64_t>(picks.size());
  return {from.type, from.rows, cols, nullptr};
}

void store_columns(const Mat& from, std::span<const int32_t> picks, int64_t begin, int64_t end,
                   const ColumnsView& to) {
  if (row_bytes(from.type, 1) == 2) {
    turn<uint16_t>(from, picks, begin, end, to);
  } else {
    turn<uint32_t>(from, picks, begin, end, to);
  }
}

void multiply_columns(Isa isa, ThreadPool& pool, ColumnScratch& scratch, Rows x,
                      const Linear& linear) {
  const ColumnsView w = static_cast<const CpuWeight&>(*linear.weight).by_columns();
  if (w.cols != x.width) {
    throw_error(ErrorKind::kState, "a matrix of %lld columns times rows of %lld elements",
                static_cast<long long>(w.cols), static_cast<long long>(x.width));
  }
  if (x.n == 0) return;
  const AddColumnsFn add_columns = linear_kernels(isa).add_columns(w.type);
  const int64_t n_threads = pool.n_threads();
  const int64_t unit = std::clamp(round_up(w.padded_rows() / (4 * n_threads), kStripRows),
                                  int64_t{kStripRows}, kUnitRows);
  const int64_t n_units = (w.rows + unit - 1) / unit;
  // Of one token each thread makes its own list: that is cheaper than to wait for each other.
  const bool own = x.n == 1;
  const size_t list_bytes = NonZeros::bytes(x.width);
  scratch.nonzeros.ensure(static_cast<size_t>(own ? n_threads : x.n) * list_bytes);
  scratch.sums.ensure(static_cast<size_t>(n_threads * kUnitRows) * sizeof(float));
  const auto on_thread = [&](ThreadPool::Context& context) {
    const auto list = [&](int64_t i) {
      return scratch.nonzeros.as<std::byte>() + static_cast<size_t>(i) * list_bytes;
    };
    int64_t begin, end;
    if (own) {
      NonZeros::collect(x.data, x.width, list(context.thread()));
    } else {
      while (context.next(x.n, 1, &begin, &end)) {
        NonZeros::collect(x.data + begin * x.stride, x.width, list(begin));
      }
      context.barrier();
    }
    float* const sums = scratch.sums.as<float>() + context.thread() * kUnitRows;
    while (context.next(n_units, 1, &begin, &end)) {
      const int64_t row = begin * unit;
      const int64_t n_rows = std::min(unit, w.rows - row);
      for (int64_t t = 0; t < x.n; ++t) {
        const NonZeros from = NonZeros::in(list(own ? context.thread() : t), x.width);
        std::fill_n(sums, round_up(n_rows, kStripRows), 0.0f);
        add_columns(w.at(0, row), w.stride(), from.columns, from.values, from.n,
                    round_up(n_rows, kStripRows), sums);
        const float* const bias = linear.bias ? linear.bias->data() + row : nullptr;
        float* const y = linear.out.data + t * linear.out.stride + row;
        for (int64_t r = 0; r < n_rows; ++r) {
          const float sum = bias ? sums[r] + bias[r] : sums[r];
          y[r] = linear.accumulate ? y[r] + sum : sum;
        }
      }
    }
  };
  if (own) {
    pool.share(on_thread);
  } else {
    pool.run(on_thread);
  }
}

}  // namespace coreinfer
