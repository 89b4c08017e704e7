// Compares the matrix kernels of every instruction set that can run here with the plain ones, bit
// for bit, and packed weights with the file's. For machines without Python, such as an emulated
// AArch64; the comparison with NumPy is in tests/test_linear.py. Exits with 1 and names what
// differs.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
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

std::vector<float> normal_values(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random_bits);
  return x;
}

// Random bytes; where a block keeps float16 scales these are small numbers.
std::vector<std::byte> random_matrix(DType type, int64_t rows, int64_t cols) {
  const DTypeTraits& t = traits(type);
  std::vector<std::byte> data(row_bytes(type, cols) * static_cast<size_t>(rows));
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
  return data;
}

// Tokens in 8 bits, with their memory.
struct Tokens {
  std::vector<int8_t> codes;
  std::vector<float> scale, scaled_sum;
  std::vector<int32_t> minus_sum;
  QuantizedRows rows;

  Tokens(const LinearKernels& kernels, const ColumnGroups& columns, const std::vector<float>& x,
         int64_t n) {
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
    const std::vector<float> zeros(static_cast<size_t>(n * kStripRows));
    std::array<std::vector<float>, 2> sums = {zeros, zeros}, others = sums;
    const std::array<StripProduct, 2> expected = {
        {{&view, s, sums[0].data()}, {&view, beside, sums[1].data()}}};
    const std::array<StripProduct, 2> products = {
        {{&view, s, others[0].data()}, {&view, beside, others[1].data()}}};
    plain_dot(expected, plain_tokens, n);
    dot(products, tokens, n);
    check(same(sums[0], others[0]) && same(sums[1], others[1]), isa, view.type,
          "integer product of two strips");
    std::copy(zeros.begin(), zeros.end(), others[0].begin());
    dot({products.data(), 1}, tokens, n);
    check(same(sums[0], others[0]), isa, view.type, "integer product");
  }
}

void check_packed(Isa isa, DType type) {
  constexpr int64_t kRows = 21, kCols = 512, kTokens = 15;
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  const std::vector<std::byte> data = random_matrix(type, kRows, kCols);
  const Mat mat{type, kRows, kCols, data.data()};
  std::vector<int32_t> picks;
  for (int32_t c = 0; c < kCols; ++c) {
    if (random_bits() % 5 < 2) picks.push_back(c);
  }
  for (const ColumnGroupsPtr& columns :
       {all_columns(type, kCols), picked_columns(type, kCols, picks)}) {
    PackedView view = packed_layout(type, kRows, *columns);
    std::vector<std::byte> memory(view.bytes() + kPackedSlack);
    view.data = memory.data();
    StripPacker(isa, mat, {}, view).pack(0, view.n_strips());

    const auto n_cols = static_cast<size_t>(columns->n_cols);
    const std::vector<float> x = normal_values(kTokens * n_cols);
    const Tokens a(plain, *columns, x, kTokens), b(fast, *columns, x, kTokens);
    check(a.codes == b.codes && same(a.scale, b.scale) && a.minus_sum == b.minus_sum &&
              same(a.scaled_sum, b.scaled_sum),
          isa, type, "activations");

    std::vector<float> row(kCols), panel(n_cols * kStripRows), other(panel.size());
    for (int64_t s = 0; s < view.n_strips(); ++s) {
      plain.unpack_panel(type)(view, s, 0, columns->n_groups(), panel.data());
      fast.unpack_panel(type)(view, s, 0, columns->n_groups(), other.data());
      check(same(panel, other), isa, type, "panel");
      for (int64_t r = 0; r < kStripRows && s * kStripRows + r < kRows; ++r) {
        dequantize_row(type, mat.row(s * kStripRows + r), row.data(), kCols);
        bool good = true;
        for (const ColumnGroup& g : columns->groups) {
          for (int32_t i = 0; i < g.n; ++i) {
            const int32_t c =
                columns->dense ? g.first + i : picks[static_cast<size_t>(g.first + i)];
            good &= other[static_cast<size_t>((g.before + i) * kStripRows + r)] ==
                    row[static_cast<size_t>(c)];
          }
        }
        check(good, isa, type, "weights");
      }
      check_strips(isa, view, s, a.rows, b.rows, kTokens);
      std::vector<float> sums(kTokens * kStripRows), others(sums.size());
      const FloatRows tokens{x.data(), columns->n_cols};
      plain.dot_panel(panel.data(), columns->n_cols, tokens, kTokens, sums.data());
      fast.dot_panel(panel.data(), columns->n_cols, tokens, kTokens, others.data());
      check(same(sums, others), isa, type, "float product");
    }
  }
}

void check_plain(Isa isa, DType type) {
  constexpr int64_t kRows = 11, kTokens = 7;
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  for (int64_t n : {1, 15, 16, 31, 32, 33, 100}) {
    const std::vector<std::byte> data = random_matrix(type, kRows, n);
    const Mat mat{type, kRows, n, data.data()};
    std::vector<float> panel(static_cast<size_t>(n) * kStripRows), other(panel.size());
    plain.transpose_panel(type, data.data(), mat.stride(), kRows, 0, n, panel.data());
    fast.transpose_panel(type, data.data(), mat.stride(), kRows, 0, n, other.data());
    check(same(panel, other), isa, type, "transposed panel");
    const std::vector<float> x = normal_values(static_cast<size_t>(kTokens * n));
    for (int64_t tokens = 1; tokens <= kTokens; ++tokens) {
      std::vector<float> sums(static_cast<size_t>(tokens) * kStripRows), others(sums.size());
      const RowsProduct all{mat.data, kRows, sums.data()};
      plain.dot_rows(type)({&all, 1}, mat.stride(), n, {x.data(), n}, tokens);
      for (const int64_t cut : {int64_t{0}, int64_t{4}, kRows}) {
        std::vector<float> seconds(sums.size());
        const std::byte* const rest = mat.data + mat.stride() * static_cast<size_t>(cut);
        const std::array<RowsProduct, 2> parts = {
            {{mat.data, cut, others.data()}, {rest, kRows - cut, seconds.data()}}};
        std::fill(others.begin(), others.end(), 0.0f);
        fast.dot_rows(type)(parts, mat.stride(), n, {x.data(), n}, tokens);
        for (int64_t t = 0; t < tokens; ++t) {
          float* const to = others.data() + t * kStripRows;
          std::copy_n(seconds.data() + t * kStripRows, kRows - cut, to + cut);
        }
        check(same(sums, others), isa, type, "row product");
      }
    }
  }
}

// Matrices that are stored column by column.
void check_columns(Isa isa, DType type) {
  constexpr int64_t kRows = 48, kCols = 37;
  const LinearKernels& plain = linear_kernels(Isa::kScalar);
  const LinearKernels& fast = linear_kernels(isa);
  const std::vector<std::byte> data = random_matrix(type, kCols, kRows);
  const size_t stride = row_bytes(type, kRows);
  std::vector<float> panel(kCols * kStripRows), other(panel.size());
  plain.columns_panel(type)(data.data(), stride, kCols, panel.data());
  fast.columns_panel(type)(data.data(), stride, kCols, other.data());
  check(same(panel, other), isa, type, "panel of columns");
  std::vector<int32_t> columns;
  for (int32_t c = 0; c < kCols; c += 2) columns.push_back(c);
  for (size_t n = 0; n <= columns.size(); ++n) {
    const std::vector<float> x = normal_values(n);
    std::vector<float> sums = normal_values(kRows), others = sums;
    const auto count = static_cast<int64_t>(n);
    plain.add_columns(type)(data.data(), stride, columns.data(), x.data(), count, kRows,
                            sums.data());
    fast.add_columns(type)(data.data(), stride, columns.data(), x.data(), count, kRows,
                           others.data());
    check(same(sums, others), isa, type, "sum of columns");
  }
}

}  // namespace

int main() {
  for (Isa isa : available_isas()) {
    for (const DTypeTraits& t : kDTypes) {
      if (t.quantized) {
        check_packed(isa, t.type);
      } else {
        check_plain(isa, t.type);
        check_columns(isa, t.type);
      }
    }
    std::printf("checked %s\n", std::string(isa_name(isa)).c_str());
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
