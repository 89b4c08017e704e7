#include "neurons/patch.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <random>

#include "base/error.h"
#include "base/half.h"
#include "kernels/attention_block.h"
#include "neurons/dense_algebra.h"
#include "tensor/blocks.h"

namespace coreinfer {
namespace {

// Directions of which the fit keeps less than this share (squared) are rounding noise.
constexpr float kLeastEnergy = 1e-6f;
// Outputs that the search for directions looks at, about; in runs of kRun with gaps between them.
constexpr int64_t kSearched = 1024;
constexpr int64_t kRun = 16;

// A matrix of float32 in host memory, by rows. It keeps its memory when it takes another shape.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values{};

  void shape(int64_t n_rows, int64_t n_cols) {
    rows = n_rows;
    cols = n_cols;
    values.resize(static_cast<size_t>(rows * cols));
  }
  float* row(int64_t r) { return values.data() + r * cols; }
  const float* row(int64_t r) const { return values.data() + r * cols; }
};

// Tiles go through a small square, so that both matrices are passed over in whole cache lines.
void transpose(const Matrix& a, Matrix& t) {
  constexpr int64_t kTile = 16;
  t.shape(a.cols, a.rows);
  for (int64_t r = 0; r < a.rows; r += kTile) {
    const int64_t n_rows = std::min(kTile, a.rows - r);
    for (int64_t c = 0; c < a.cols; c += kTile) {
      const int64_t n_cols = std::min(kTile, a.cols - c);
      float tile[kTile][kTile];
      for (int64_t i = 0; i < n_rows; ++i) {
        const float* const from = a.row(r + i) + c;
        for (int64_t j = 0; j < n_cols; ++j) tile[j][i] = from[j];
      }
      for (int64_t j = 0; j < n_cols; ++j) std::copy_n(tile[j], n_rows, t.row(c + j) + r);
    }
  }
}

// Conversions and products of rows on the host.
const AttentionKernels& row_kernels() {
  static const AttentionKernels& kernels = attention_kernels(best_isa());
  return kernels;
}

// c = a b. On the host: b would have to be transposed for the backend, which takes longer.
void multiply(const Matrix& a, const Matrix& b, Matrix& c) {
  constexpr int64_t kCols = 256;  // of b at a time, that stay in the second-level cache
  c.shape(a.rows, b.cols);
  for (int64_t at = 0; at < b.cols; at += kCols) {
    const int64_t n = std::min(kCols, b.cols - at);
    row_kernels().multiply_f32(a.row(0), a.cols, b.row(0) + at, b.cols, c.row(0) + at, c.cols,
                               a.rows, b.rows, n, false, nullptr);
  }
}

double sum_of_squares(const float* x, int64_t n) {
  constexpr int64_t kParts = 16, kRun = 512;  // float32 sums, which do not grow long
  double sum = 0.0;
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    float parts[kParts] = {};
    for (int64_t j = 0; j < kRun; j += kParts) {
      for (int64_t p = 0; p < kParts; ++p) parts[p] += x[i + j + p] * x[i + j + p];
    }
    sum = std::accumulate(std::begin(parts), std::end(parts), sum);
  }
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// Products of host matrices on the backend.
class Products {
 public:
  explicit Products(Backend& backend) : backend_(backend) {}

  WeightPtr load(const Matrix& a) {
    return backend_.load(
        {DType::kF32, a.rows, a.cols, reinterpret_cast<const std::byte*>(a.values.data())});
  }

  // y = x w^T, of the first n rows of x.
  void times(const Matrix& x, int64_t n, const Weight& w, bool f32, Matrix& y) {
    const Rows in = room(in_, n, x.cols);
    const Rows out = room(out_, n, w.rows());
    backend_.write(x.values.data(), in.data, n * x.cols);
    const Linear linear{&w, nullptr, out, false, f32};
    backend_.linear(in, Norm{}, {&linear, 1});
    y.shape(n, w.rows());
    backend_.read(out.data, y.values.data(), n * y.cols);
  }
  // y = a b^T
  void times(const Matrix& a, const Matrix& b, Matrix& y) { times(a, a.rows, *load(b), true, y); }

 private:
  Rows room(BufferPtr& buffer, int64_t n, int64_t width) {
    if (!buffer || buffer->size() < n * width) buffer = backend_.allocate(n * width);
    return buffer->rows(n, width);
  }

  Backend& backend_;
  BufferPtr in_, out_;
};

std::vector<uint16_t> halves(const Matrix& a) {
  std::vector<uint16_t> h(a.values.size());
  row_kernels().f32_to_f16(a.values.data(), static_cast<int64_t>(h.size()), h.data());
  return h;
}

// NaN and Inf have an exponent of ones. (Without branches: there are many.)
bool all_finite(const std::vector<uint16_t>& values) {
  constexpr uint16_t kExponent = 0x7c00;
  bool found = false;
  for (const uint16_t v : values) found |= (v & kExponent) == kExponent;
  return !found;
}

float largest_magnitude(const float* x, int64_t n) {
  constexpr int64_t kParts = 16;  // maxima that do not wait for each other
  float parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) parts[p] = std::max(parts[p], std::abs(x[i + p]));
  }
  for (; i < n; ++i) parts[0] = std::max(parts[0], std::abs(x[i]));
  return *std::max_element(std::begin(parts), std::end(parts));
}

WeightPtr load_halves(Backend& backend, const std::vector<uint16_t>& values, int64_t rows,
                      int64_t cols) {
  return backend.load({DType::kF16, rows, cols, reinterpret_cast<const std::byte*>(values.data())});
}

// In 8 bits where whole blocks fill the rows.
WeightPtr load_bytes(Backend& backend, const std::vector<uint16_t>& values, int64_t rows,
                     int64_t cols) {
  static_assert(kKvGroup == std::size(BlockQ8_0{}.qs));
  if (cols % kKvGroup != 0) return load_halves(backend, values, rows, cols);
  std::vector<BlockQ8_0> blocks(values.size() / kKvGroup);
  for (size_t b = 0; b < blocks.size(); ++b) {
    float x[kKvGroup];
    row_kernels().f16_to_f32(values.data() + b * kKvGroup, kKvGroup, x);
    row_kernels().quantize(x, kKvGroup, blocks[b].qs, &blocks[b].d);
  }
  const auto* const bytes = reinterpret_cast<const std::byte*>(blocks.data());
  return backend.load({DType::kQ8_0, rows, cols, bytes});
}

}  // namespace

void check(const PatchSpec& spec) {
  if (spec.rank < 1 || spec.rank > kMaxPatchRank) {
    throw_error(ErrorKind::kValue, "the patch's rank is %lld, expected 1 to %lld",
                static_cast<long long>(spec.rank), static_cast<long long>(kMaxPatchRank));
  }
  constexpr double kMost = 1e6;  // far from where float32 ends
  if (!(spec.decay > 0.0 && spec.decay <= 1.0)) {
    throw_error(ErrorKind::kValue, "the patch's decay is %g, expected above 0 and at most 1",
                spec.decay);
  }
  if (!(spec.ridge > 0.0 && spec.ridge <= kMost)) {
    throw_error(ErrorKind::kValue, "the patch's ridge is %g, expected above 0 and at most %g",
                spec.ridge, kMost);
  }
  if (!(spec.prior >= 0.0 && spec.prior <= kMost)) {
    throw_error(ErrorKind::kValue, "the patch's prior counts %g, expected 0 to %g", spec.prior,
                kMost);
  }
}

struct PatchFitter::Work {
  explicit Work(Backend& b) : backend(b), products(b) {}

  Backend& backend;
  Products products;
  std::vector<float> bias;                   // of the down projection
  Matrix kept, outputs;                      // H (m, k) and Y (m, n_embd), every row scaled
  Matrix searched;                           // some columns of Y
  Matrix gram, upper, inverse, energies;     // (m, m)
  Matrix x, fitted, energy, small;           // of `rank` rows
  Matrix coefficients, sides, answered, in;  // of 2 rank rows, or of `rank`
  Matrix turned, out;                        // (rank, n_embd) and (n_embd, rank)
  float mu = 0.0f;

  void set_up(const FfnSamples& samples, int64_t layer, std::span<const int32_t> neurons,
              const FfnWeights& ffn, const PatchSpec& spec, const PatchPrior* prior);
  void add_prior(const PatchPrior& prior, int64_t layer, std::span<const int32_t> neurons,
                 double tokens, int64_t first);
  void invert(double ridge, int64_t layer);
  void shrink(const Matrix& rows, Matrix& shrunk);
  void measure_energies();
  int64_t find_directions(int64_t rank);
  void find_factors(const FfnWeights& ffn);
};

// The regression's two sides: what the kept neurons did, and all that came out, without bias.
void PatchFitter::Work::set_up(const FfnSamples& samples, int64_t layer,
                               std::span<const int32_t> neurons, const FfnWeights& ffn,
                               const PatchSpec& spec, const PatchPrior* prior) {
  const int64_t m = samples.size(), k = static_cast<int64_t>(neurons.size());
  const int64_t rows = m + (prior != nullptr ? prior->rows : 0);
  kept.shape(rows, k);
  outputs.shape(rows, samples.n_embd());
  bias.assign(static_cast<size_t>(outputs.cols), 0.0f);
  if (ffn.down_bias) backend.read(ffn.down_bias->data(), bias.data(), outputs.cols);
  std::vector<float> scale(static_cast<size_t>(m));
  samples.visit_h(layer, [&](int64_t t, const float* h) {
    const double squares = sum_of_squares(h, samples.n_ff());
    const double weight = std::pow(spec.decay, static_cast<double>(m - 1 - t));
    const float s = squares > 0.0 ? static_cast<float>(weight / std::sqrt(squares)) : 0.0f;
    float* const row = kept.row(t);
    for (int64_t i = 0; i < k; ++i) row[i] = s * h[neurons[static_cast<size_t>(i)]];
    scale[static_cast<size_t>(t)] = s;
  });
  samples.visit_y(layer, [&](int64_t t, const float* y) {
    float* const row = outputs.row(t);
    const float s = scale[static_cast<size_t>(t)];
    for (int64_t i = 0; i < outputs.cols; ++i) row[i] = s * (y[i] - bias[static_cast<size_t>(i)]);
  });
  if (prior != nullptr) {
    add_prior(*prior, layer, neurons, spec.prior * static_cast<double>(m), m);
  }
}

// Rows from `first` on: the prior's, scaled so that all of them count as much as `tokens` samples.
void PatchFitter::Work::add_prior(const PatchPrior& prior, int64_t layer,
                                  std::span<const int32_t> neurons, double tokens, int64_t first) {
  const PatchPrior::Layer& from = prior.layers[static_cast<size_t>(layer)];
  for (int64_t r = 0; r < prior.rows; ++r) {
    const auto s = static_cast<float>(std::sqrt(static_cast<double>(from.weights[r]) * tokens));
    const uint16_t* const h = from.h + r * prior.n_ff;
    const uint16_t* const y = from.y + r * prior.n_embd;
    float* const row = kept.row(first + r);
    for (size_t i = 0; i < neurons.size(); ++i) row[i] = s * f16_to_f32(h[neurons[i]]);
    float* const output = outputs.row(first + r);
    for (int64_t i = 0; i < outputs.cols; ++i) output[i] = s * f16_to_f32(y[i]);
  }
}

// inverse = (G + mu I)^-1
void PatchFitter::Work::invert(double ridge, int64_t layer) {
  mu = static_cast<float>(ridge);
  const int64_t m = gram.rows;
  for (int64_t i = 0; i < m; ++i) gram.row(i)[i] += mu;
  if (cholesky(gram.values.data(), m, 0.0f) > 0) {
    throw_error(ErrorKind::kNumeric,
                "the patch of layer %lld has no solution: its regression is singular or holds NaN; "
                "decode without a patch, or with a larger ridge",
                static_cast<long long>(layer));
  }
  upper.shape(m, m);
  invert_upper(gram.values.data(), m, upper.values.data());
  products.times(upper, upper, inverse);
}

// Rows times F = G (G + mu I)^-1 = I - mu (G + mu I)^-1, symmetric: the fitted outputs are F R.
void PatchFitter::Work::shrink(const Matrix& rows, Matrix& shrunk) {
  multiply(rows, inverse, shrunk);
  for (size_t i = 0; i < rows.values.size(); ++i) {
    shrunk.values[i] = rows.values[i] - mu * shrunk.values[i];
  }
}

// Y Y^T, near enough: of some of its columns where there are many.
void PatchFitter::Work::measure_energies() {
  const int64_t step = kRun * std::max<int64_t>(outputs.cols / kSearched, 1);
  if (step == kRun) return products.times(outputs, outputs, energies);
  searched.shape(outputs.rows, outputs.cols / step * kRun);
  for (int64_t r = 0; r < searched.rows; ++r) {
    for (int64_t c = 0; c < searched.cols; c += kRun) {
      std::copy_n(outputs.row(r) + c / kRun * step, kRun, searched.row(r) + c);
    }
  }
  products.times(searched, searched, energies);
}

// Orthonormal directions T (rank, m) among the samples that hold most of what is fitted. They are
// searched by one step of subspace iteration on F Y Y^T F, since weaker directions differ little in
// what they carry: the outputs lie where R, what the dropped neurons added to them, does, and R
// itself is dear. With T = U^-T X F, what is fitted is nearly T^T T F R, a product of T F R, (rank,
// n_embd), and U^-T X (G + mu I)^-1 H, (rank, k). Leaves T F and then U^-T X (G + mu I)^-1 in
// `coefficients`; returns how many directions there are.
int64_t PatchFitter::Work::find_directions(int64_t rank) {
  const int64_t m = inverse.rows;
  measure_energies();
  x.shape(std::min(rank, m), m);
  std::mt19937 random(1);
  for (float& v : x.values) v = (random() & 1u) != 0 ? 1.0f : -1.0f;
  shrink(x, fitted);
  multiply(fitted, energies, energy);
  shrink(energy, x);
  orthonormalise(x.values.data(), x.rows, x.cols);
  shrink(x, fitted);
  products.times(fitted, fitted, small);
  float strongest = 0.0f;
  for (int64_t i = 0; i < small.rows; ++i) strongest = std::max(strongest, small.row(i)[i]);
  cholesky(small.values.data(), small.rows, kLeastEnergy * strongest);
  solve_transposed(small.values.data(), small.rows, fitted.values.data(), m);
  solve_transposed(small.values.data(), small.rows, x.values.data(), m);
  int64_t found = 0;
  for (int64_t i = 0; i < small.rows; ++i) {
    if (small.row(i)[i] == 0.0f) continue;
    std::copy_n(fitted.row(i), m, fitted.row(found));
    std::copy_n(x.row(i), m, x.row(found++));
  }
  fitted.shape(found, m);
  x.shape(found, m);
  coefficients.shape(2 * found, m);
  shrink(fitted, energy);
  std::copy(energy.values.begin(), energy.values.end(), coefficients.values.begin());
  multiply(x, inverse, energy);
  std::copy(energy.values.begin(), energy.values.end(), coefficients.values.begin() + found * m);
  return found;
}

// in = U^-T X (G + mu I)^-1 H, (rank, k), and out = (T F R)^T, (n_embd, rank), with R = Y - H W^T.
void PatchFitter::Work::find_factors(const FfnWeights& ffn) {
  const int64_t rank = fitted.rows;
  multiply(coefficients, kept, sides);
  products.times(sides, rank, *ffn.down, false, answered);
  coefficients.shape(rank, coefficients.cols);
  multiply(coefficients, outputs, turned);
  for (size_t i = 0; i < turned.values.size(); ++i) turned.values[i] -= answered.values[i];
  transpose(turned, out);
  in.shape(rank, sides.cols);
  std::copy_n(sides.row(rank), in.values.size(), in.values.begin());
}

PatchFitter::PatchFitter(Backend& backend, const FfnSamples& samples, const PatchSpec& spec,
                         const PatchPrior* prior)
    : samples_(samples),
      spec_(spec),
      prior_(prior != nullptr && prior->rows > 0 && spec.prior > 0.0 ? prior : nullptr),
      work_(std::make_unique<Work>(backend)) {
  check(spec);
  if (prior != nullptr && (prior->n_ff != samples.n_ff() || prior->n_embd != samples.n_embd() ||
                           static_cast<int64_t>(prior->layers.size()) != samples.n_layer())) {
    throw_error(
        ErrorKind::kValue,
        "the patch's prior is of %zu layers, n_ff %lld and n_embd %lld; the model has %lld, "
        "%lld and %lld",
        prior->layers.size(), static_cast<long long>(prior->n_ff),
        static_cast<long long>(prior->n_embd), static_cast<long long>(samples.n_layer()),
        static_cast<long long>(samples.n_ff()), static_cast<long long>(samples.n_embd()));
  }
}

PatchFitter::~PatchFitter() = default;

LayerPatch PatchFitter::fit(int64_t layer, std::span<const int32_t> neurons,
                            const FfnWeights& ffn) {
  Work& w = *work_;
  w.set_up(samples_, layer, neurons, ffn, spec_, prior_);
  const int64_t m = samples_.size();
  w.products.times(w.kept, w.kept, w.gram);
  double trace = 0.0;
  for (int64_t i = 0; i < m; ++i) trace += w.gram.row(i)[i];
  if (trace == 0.0) return {};
  w.invert(spec_.ridge * trace / static_cast<double>(m), layer);
  const int64_t rank = w.find_directions(spec_.rank);
  if (rank == 0) return {};
  w.find_factors(ffn);

  // Each direction's scale goes to `out`, so that `in` uses the range of float16 well.
  std::vector<float> largest(static_cast<size_t>(rank));
  for (int64_t r = 0; r < rank; ++r) {
    float& most = largest[static_cast<size_t>(r)];
    float* const row = w.in.row(r);
    most = largest_magnitude(row, w.in.cols);
    if (most == 0.0f) most = 1.0f;
    for (int64_t i = 0; i < w.in.cols; ++i) row[i] /= most;
  }
  for (int64_t i = 0; i < w.out.rows; ++i) {
    for (int64_t r = 0; r < rank; ++r) w.out.row(i)[r] *= largest[static_cast<size_t>(r)];
  }
  LayerPatch patch;
  patch.rank = rank;
  patch.in = halves(w.in);
  patch.out = halves(w.out);
  if (!all_finite(patch.in) || !all_finite(patch.out)) {
    throw_error(ErrorKind::kNumeric,
                "the patch of layer %lld holds NaN, Inf or values past float16; decode without one",
                static_cast<long long>(layer));
  }
  return patch;
}

void attach(Backend& backend, const LayerPatch& patch, FfnWeights& ffn) {
  ffn.patch_in = nullptr;
  ffn.patch_out = nullptr;
  if (patch.rank == 0) return;
  const int64_t k = ffn.down->cols(), n_embd = ffn.down->rows();
  if (static_cast<int64_t>(patch.in.size()) != patch.rank * k ||
      static_cast<int64_t>(patch.out.size()) != n_embd * patch.rank) {
    throw_error(ErrorKind::kValue,
                "a patch of rank %lld with %zu and %zu values, expected (rank, %lld) and (%lld, "
                "rank) for this model",
                static_cast<long long>(patch.rank), patch.in.size(), patch.out.size(),
                static_cast<long long>(k), static_cast<long long>(n_embd));
  }
  ffn.patch_in = load_halves(backend, patch.in, patch.rank, k);
  ffn.patch_out = load_bytes(backend, patch.out, n_embd, patch.rank);
}

}  // namespace coreinfer
