// Compares the matrix kernels of every instruction set that can run here with the plain ones, bit
// for bit, and packed weights with the file's, for every short input, every short number of rows,
// and at odd addresses. For machines without Python, such as an emulated AArch64; the comparison
// with NumPy is in tests/test_linear.py. Exits with 1 and names what differs.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/half.h"
#include "kernels/dequantize.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/packed_pack.h"

using namespace coreinfer;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

void check(bool good, Isa isa, DType type, const char* what) {
  if (good) return;
  ++failures;
  std::printf("%s of %s on %s differs\n", what, traits(type).name.data(),
              std::string(isa_name(isa)).c_str());
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return a.size() == b.size();
}

// n values that start one element behind an aligned address, with a guard at both ends.
struct Floats {
  std::vector<float> all;

  explicit Floats(int64_t n) : all(static_cast<size_t>(n) + 2) {}
  static Floats normal(int64_t n) {
    Floats x(n);
    std::normal_distribution<float> normal;
    for (float& v : x.all) v = normal(random_bits);
    return x;
  }
  float* data() { return all.data() + 1; }
  const float* data() const { return all.data() + 1; }
};

bool same(const Floats& a, const Floats& b) { return same(a.all, b.all); }

// Random bytes; where a block keeps float16 scales these are small numbers. The matrix starts one
// block (of a float type: one element) behind an aligned address.
struct Matrix {
  std::vector<std::byte> all;
  Mat mat;
};

Matrix random_matrix(DType type, int64_t rows, int64_t cols) {
  const DTypeTraits& t = traits(type);
  const auto before = static_cast<size_t>(t.block_bytes);
  std::vector<std::byte> data(before + row_bytes(type, cols) * static_cast<size_t>(rows));
  for (std::byte& b : data) b = static_cast<std::byte>(random_bits());
  std::normal_distribution<float> normal;
  const auto put = [&](std::byte* at) {
    const uint16_t half = f32_to_f16(0.01f * normal(random_bits));
    std::memcpy(at, &half, 2);
  };
  for (size_t i = 0; i < data.size(); i += static_cast<size_t>(t.block_bytes)) {
    std::byte* const block = data.data() + i;
    switch (type) {
      case DType::kF32: {
        const float value = normal(random_bits);
        std::memcpy(block, &value, 4);
        break;
      }
      case DType::kBF16: {
        const uint16_t value = f32_to_bf16(normal(random_bits));
        std::memcpy(block, &value, 2);
        break;
      }
      case DType::kQ2_K:
        put(block + 80);
        put(block + 82);
        break;
      case DType::kQ3_K:
        put(block + 108);
        break;
      case DType::kQ6_K:
        put(block + 208);
        break;
      case DType::kQ4_1:
      case DType::kQ5_1:
      case DType::kQ4_K:
      case DType::kQ5_K:
        put(block + 2);
        [[fallthrough]];
      default:
        put(block);
    }
  }
  Matrix made{std::move(data), {}};
  made.mat = {type, rows, cols, made.all.data() + before};
  return made;
}

// Tokens in 8 bits, with their memory.
struct Tokens {
  std::vector<int8_t> codes;
  std::vector<float> scale, scaled_sum;
  std::vector<int32_t> minus_sum;
  QuantizedRows rows;

  Tokens(const LinearKernels& kernels, const ColumnGroups& columns, const Floats& x, int64_t n) {
    const auto groups = static_cast<size_t>(columns.n_groups());
    codes.resize(static_cast<size_t>(n * columns.padded_cols));
    scale.resize(static_cast<size_t>(n) * groups);
    scaled_sum.resize(scale.size());
    minus_sum.resize(scale.size());
    rows = {codes.data(),      scale.data(),        minus_sum.data(),
            scaled_sum.data(), columns.padded_cols, columns.n_groups()};
    for (int64_t t = 0; t < n; ++t) {
      kernels.quantize(columns, x.data() + t * columns.n_cols, rows.from(t));
    }
  }
};

// Strip s alone, and beside another: each number of tokens may take another path.
void check_strips(Isa isa, const PackedView& view, int64_t s, const QuantizedRows& plain_tokens,
                  const QuantizedRows& tokens, int64_t most_tokens) {
  const auto dot = linear_kernels(isa).dot_strips(view.type, view.columns->dense);
  const auto plain_dot = linear_kernels(Isa::kScalar).dot_strips(view.type, view.columns->dense);
  const int64_t beside = (s + 1) % view.n_strips();
  for (int64_t n = 1; n <= most_tokens; ++n) {
    const Floats zeros(n * kStripRows);
    std::array<Floats, 2> sums = {zeros, zeros}, others = sums;
    const std::array<StripProduct, 2> expected = {
        {{&view, s, sums[0].data()}, {&view, beside, sums[1].data()}}};
    const std::array<StripProduct, 2> products = {
        {{&view, s, others[0].data()}, {&view, beside, others[1].data()}}};
    plain_dot(expected, plain_tokens, n);
    dot(products, tokens, n);
    check(same(sums[0], others[0]) && same(sums[1], others[1]), isa, view.type,
          "integer product of two strips");
    std::fill_n(others[0].data(), n * kStripRows, 1.0f);
    dot({products.data(), 1}, tokens, n);
    check(same(sums[0], others[0]), isa, view.type, "integer product");
  }
}

// The weights of some rows and columns of a matrix; `picks` where not all columns are there.
void check_packed(Isa isa, const Mat& mat, const ColumnGroups& columns,
                  const std::vector<int32_t>& picks, int64_t n_tokens) {
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  const DType type = mat.type;
  PackedView view = packed_layout(type, mat.rows, columns);
  std::vector<std::byte> memory(view.bytes() + kPackedSlack);
  view.data = memory.data();
  StripPacker(isa, mat, {}, view).pack(0, view.n_strips());

  const Floats x = Floats::normal(n_tokens * columns.n_cols);
  const Tokens a(plain, columns, x, n_tokens), b(fast, columns, x, n_tokens);
  check(a.codes == b.codes && same(a.scale, b.scale) && a.minus_sum == b.minus_sum &&
            same(a.scaled_sum, b.scaled_sum),
        isa, type, "activations");

  std::vector<float> row(static_cast<size_t>(mat.cols));
  std::vector<float> panel(static_cast<size_t>(columns.n_cols * kStripRows)), other(panel.size());
  for (int64_t s = 0; s < view.n_strips(); ++s) {
    plain.unpack_panel(type)(view, s, 0, columns.n_groups(), panel.data());
    fast.unpack_panel(type)(view, s, 0, columns.n_groups(), other.data());
    check(same(panel, other), isa, type, "panel");
    for (int64_t r = 0; r < kStripRows && s * kStripRows + r < mat.rows; ++r) {
      dequantize_row(type, mat.row(s * kStripRows + r), row.data(), mat.cols);
      bool good = true;
      for (const ColumnGroup& g : columns.groups) {
        for (int32_t i = 0; i < g.n; ++i) {
          const int32_t c = columns.dense ? g.first + i : picks[static_cast<size_t>(g.first + i)];
          good &= other[static_cast<size_t>((g.before + i) * kStripRows + r)] ==
                  row[static_cast<size_t>(c)];
        }
      }
      check(good, isa, type, "weights");
    }
    check_strips(isa, view, s, a.rows, b.rows, n_tokens);
    Floats sums = Floats::normal(n_tokens * kStripRows), others = sums;
    const FloatRows tokens{x.data(), columns.n_cols};
    plain.dot_panel(panel.data(), columns.n_cols, tokens, n_tokens, sums.data());
    fast.dot_panel(panel.data(), columns.n_cols, tokens, n_tokens, others.data());
    check(same(sums, others), isa, type, "float product");
  }
}

void check_all_columns(Isa isa, DType type, int64_t rows, int64_t cols, int64_t n_tokens) {
  const Matrix m = random_matrix(type, rows, cols);
  check_packed(isa, m.mat, *all_columns(type, cols), {}, n_tokens);
}

void check_picks(Isa isa, DType type, int64_t rows, int64_t cols, const std::vector<int32_t>& picks,
                 int64_t n_tokens) {
  const Matrix m = random_matrix(type, rows, cols);
  check_packed(isa, m.mat, *picked_columns(type, cols, picks), picks, n_tokens);
}

void check_packed_type(Isa isa, DType type) {
  std::vector<int32_t> all(512), picks;
  for (int32_t c = 0; c < 512; ++c) {
    all[static_cast<size_t>(c)] = c;
    if (random_bits() % 5 < 2) picks.push_back(c);
  }
  check_all_columns(isa, type, 21, 512, 15);
  check_picks(isa, type, 21, 512, picks, 15);
  for (int64_t rows = 1; rows <= 17; ++rows) {
    check_all_columns(isa, type, rows, traits(type).block_size * (1 + rows % 5), 3);
  }
  for (int64_t n = 0; n <= 70; ++n) {
    const int64_t rows = 1 + n % 17;
    picks.clear();
    std::sample(all.begin(), all.end(), std::back_inserter(picks), n, random_bits);
    check_picks(isa, type, rows, 512, picks, 3);  // few of each group
    picks.assign(all.begin() + 13, all.begin() + 13 + n);
    check_picks(isa, type, rows, 512, picks, 3);  // whole groups, and parts at both ends
  }
}

// All rows times some tokens, [token][row]; the first `cut` rows in one run, the others in another.
std::vector<float> rows_product(Isa isa, const Mat& mat, int64_t cut, const Floats& x,
                                int64_t n_tokens) {
  std::array<Floats, 2> tiles = {Floats(n_tokens * kStripRows), Floats(n_tokens * kStripRows)};
  const std::byte* const rest = mat.data + mat.stride() * static_cast<size_t>(cut);
  const std::array<RowsProduct, 2> runs = {
      {{mat.data, cut, tiles[0].data()}, {rest, mat.rows - cut, tiles[1].data()}}};
  const auto dot = linear_kernels(isa).dot_rows(mat.type);
  const size_t n_runs = cut == mat.rows ? 1 : 2;
  dot({runs.data(), n_runs}, mat.stride(), mat.cols, {x.data(), mat.cols}, n_tokens);
  std::vector<float> y;
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* const first = tiles[0].data() + t * kStripRows;
    const float* const second = tiles[1].data() + t * kStripRows;
    y.insert(y.end(), first, first + cut);
    y.insert(y.end(), second, second + mat.rows - cut);
  }
  for (const Floats& tile : tiles) {
    check(tile.all.front() == 0.0f && tile.all.back() == 0.0f, isa, mat.type, "what lies around");
  }
  return y;
}

void check_plain(Isa isa, DType type, int64_t rows, int64_t cols) {
  constexpr int64_t kTokens = 7;
  const Matrix m = random_matrix(type, rows, cols);
  const Floats x = Floats::normal(kTokens * cols);
  const int64_t most = std::min<int64_t>(rows, kStripRows);
  for (int64_t tokens = 1; tokens <= kTokens; ++tokens) {
    const std::vector<float> y = rows_product(Isa::kScalar, m.mat, most, x, tokens);
    for (const int64_t cut : {rows - most, rows / 3, most}) {
      check(same(y, rows_product(isa, m.mat, cut, x, tokens)), isa, type, "row product");
    }
  }
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  for (const int64_t begin : {int64_t{0}, cols / 3}) {
    const auto size = static_cast<size_t>((cols - begin) * kStripRows);
    std::vector<float> panel(size), other(size, 1.0f);
    plain.transpose_panel(type, m.mat.data, m.mat.stride(), most, begin, cols, panel.data());
    fast.transpose_panel(type, m.mat.data, m.mat.stride(), most, begin, cols, other.data());
    check(same(panel, other), isa, type, "transposed panel");
  }
}

// Matrices that are stored column by column.
void check_columns(Isa isa, DType type) {
  constexpr int64_t kRows = 48, kCols = 141;
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  const Matrix m = random_matrix(type, kCols, kRows);
  const std::byte* const data = m.mat.data;
  const size_t stride = m.mat.stride();
  std::vector<int32_t> columns = {0};  // one index before those that are passed
  for (int32_t c = 0; c < kCols; c += 2) columns.push_back(c);
  for (int64_t n = 0; n <= 70; ++n) {
    std::vector<float> panel(static_cast<size_t>(n * kStripRows)), other(panel.size());
    plain.columns_panel(type)(data, stride, n, panel.data());
    fast.columns_panel(type)(data, stride, n, other.data());
    check(same(panel, other), isa, type, "panel of columns");
    const Floats x = Floats::normal(n);
    for (int64_t rows = kStripRows; rows <= kRows; rows += kStripRows) {
      Floats sums = Floats::normal(rows), others = sums;
      plain.add_columns(type)(data, stride, &columns[1], x.data(), n, rows, sums.data());
      fast.add_columns(type)(data, stride, &columns[1], x.data(), n, rows, others.data());
      check(same(sums, others), isa, type, "sum of columns");
    }
  }
}

}  // namespace

int main() {
  for (Isa isa : available_isas()) {
    for (const DTypeTraits& t : kDTypes) {
      if (t.quantized) {
        check_packed_type(isa, t.type);
        continue;
      }
      for (int64_t rows = 1; rows <= 17; ++rows) {
        for (int64_t cols = 0; cols <= 70; ++cols) check_plain(isa, t.type, rows, cols);
        check_plain(isa, t.type, rows, 100);
      }
      check_columns(isa, t.type);
    }
    std::printf("checked %s\n", std::string(isa_name(isa)).c_str());
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
