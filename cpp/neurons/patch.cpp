#include "neurons/patch.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <random>

#include "base/error.h"
#include "base/half.h"
#include "neurons/dense_algebra.h"
#include "tensor/blocks.h"

namespace coreinfer {
namespace {

// Passes of subspace iteration. The strongest directions stand out after two; weaker ones differ
// little in what they carry.
constexpr int kPasses = 2;
// Directions that carry less than this share of the strongest one's energy are rounding noise.
constexpr float kLeastEnergy = 1e-6f;

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

void transpose(const Matrix& a, Matrix& t) {
  constexpr int64_t kTile = 16;
  t.shape(a.cols, a.rows);
  for (int64_t c = 0; c < a.cols; c += kTile) {
    const int64_t c_end = std::min(c + kTile, a.cols);
    for (int64_t r = 0; r < a.rows; r += kTile) {
      const int64_t r_end = std::min(r + kTile, a.rows);
      for (int64_t i = c; i < c_end; ++i) {
        for (int64_t j = r; j < r_end; ++j) t.row(i)[j] = a.row(j)[i];
      }
    }
  }
}

// Products of host matrices on the backend.
class Products {
 public:
  explicit Products(Backend& backend) : backend_(backend) {}

  WeightPtr load(const Matrix& a) {
    return backend_.load(
        {DType::kF32, a.rows, a.cols, reinterpret_cast<const std::byte*>(a.values.data())});
  }

  // y = x w^T + bias.
  void times(const Matrix& x, const Weight& w, const Buffer* bias, bool f32, Matrix& y) {
    const Rows in = room(in_, x.rows, x.cols);
    const Rows out = room(out_, x.rows, w.rows());
    backend_.write(x.values.data(), in.data, x.rows * x.cols);
    const Linear linear{&w, bias, out, false, f32};
    backend_.linear(in, Norm{}, {&linear, 1});
    y.shape(x.rows, w.rows());
    backend_.read(out.data, y.values.data(), y.rows * y.cols);
  }
  void times(const Matrix& x, const Weight& w, Matrix& y) { times(x, w, nullptr, true, y); }
  // y = a b^T
  void times(const Matrix& a, const Matrix& b, Matrix& y) { times(a, *load(b), y); }

 private:
  Rows room(BufferPtr& buffer, int64_t n, int64_t width) {
    if (!buffer || buffer->size() < n * width) buffer = backend_.allocate(n * width);
    return buffer->rows(n, width);
  }

  Backend& backend_;
  BufferPtr in_, out_;
};

// Makes the rows orthonormal; those that depend on earlier ones become zero.
void orthonormalise(Matrix& x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    float* const row = x.row(i);
    const double before = dot(row, row, x.cols);
    for (int64_t j = 0; j < i; ++j) {
      const float* const other = x.row(j);
      const auto share = static_cast<float>(dot(row, other, x.cols));
      for (int64_t c = 0; c < x.cols; ++c) row[c] -= share * other[c];
    }
    const double after = dot(row, row, x.cols);
    const bool independent = after > 1e-10 * before;
    const float scale = independent ? static_cast<float>(1.0 / std::sqrt(after)) : 0.0f;
    for (int64_t c = 0; c < x.cols; ++c) row[c] *= scale;
  }
}

std::vector<uint16_t> halves(const Matrix& a) {
  std::vector<uint16_t> h(a.values.size());
  std::transform(a.values.begin(), a.values.end(), h.begin(), f32_to_f16);
  return h;
}

WeightPtr load_halves(Backend& backend, const std::vector<uint16_t>& values, int64_t rows,
                      int64_t cols) {
  return backend.load({DType::kF16, rows, cols, reinterpret_cast<const std::byte*>(values.data())});
}

// In 8 bits where whole blocks fill the rows.
WeightPtr load_bytes(Backend& backend, const std::vector<uint16_t>& values, int64_t rows,
                     int64_t cols) {
  constexpr int64_t kBlock = std::size(BlockQ8_0{}.qs);
  if (cols % kBlock != 0) return load_halves(backend, values, rows, cols);
  std::vector<BlockQ8_0> blocks(values.size() / kBlock);
  for (size_t b = 0; b < blocks.size(); ++b) {
    std::array<float, kBlock> x;
    std::transform(values.begin() + static_cast<int64_t>(b) * kBlock,
                   values.begin() + static_cast<int64_t>(b + 1) * kBlock, x.begin(), f16_to_f32);
    float largest = 0.0f;
    for (const float v : x) largest = std::max(largest, std::abs(v));
    blocks[b].d = f32_to_f16(largest / 127.0f);
    const float d = f16_to_f32(blocks[b].d);
    for (size_t i = 0; i < x.size(); ++i) {
      const float code = d > 0.0f ? std::nearbyint(x[i] / d) : 0.0f;
      blocks[b].qs[i] = static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
    }
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
  if (!(spec.ridge > 0.0 && std::isfinite(spec.ridge))) {
    throw_error(ErrorKind::kValue, "the patch's ridge is %g, expected more than 0", spec.ridge);
  }
  if (!(spec.prior >= 0.0 && std::isfinite(spec.prior))) {
    throw_error(ErrorKind::kValue, "the patch's prior counts %g, expected at least 0", spec.prior);
  }
}

struct PatchFitter::Work {
  explicit Work(Backend& b) : backend(b), products(b) {}

  Backend& backend;
  Products products;
  std::vector<float> scale;  // of each row
  std::vector<float> bias;   // of the down projection, where a prior's outputs lack it
  Matrix kept, lost;         // H (m, k) and R (m, n_embd), the regression's two sides
  Matrix turned;             // one of them, transposed
  Matrix gram, upper, inverse, fit, energies;  // (m, m)
  Matrix x, fitted, energy, small, inner;      // of `rank` rows
  Matrix in, out;

  void set_up(const FfnSamples& samples, int64_t layer, std::span<const int32_t> neurons,
              const FfnWeights& ffn, const PatchSpec& spec, const PatchPrior* prior);
  void pick_prior(const PatchPrior& prior, int64_t layer, std::span<const int32_t> neurons,
                  double tokens, int64_t first);
  void subtract_from_prior(const PatchPrior& prior, int64_t layer, const Buffer* down_bias,
                           int64_t first);
  void invert(double mu, int64_t layer);
  int64_t find_directions(int64_t rank);
};

// The regression's two sides.
void PatchFitter::Work::set_up(const FfnSamples& samples, int64_t layer,
                               std::span<const int32_t> neurons, const FfnWeights& ffn,
                               const PatchSpec& spec, const PatchPrior* prior) {
  const int64_t m = samples.size(), k = static_cast<int64_t>(neurons.size());
  const int64_t rows = m + (prior != nullptr ? prior->rows : 0);
  kept.shape(rows, k);
  scale.resize(static_cast<size_t>(rows));
  samples.visit_h(layer, [&](int64_t t, const float* h) {
    const double squares = dot(h, h, samples.n_ff());
    const double weight = std::pow(spec.decay, static_cast<double>(m - 1 - t));
    scale[static_cast<size_t>(t)] =
        squares > 0.0 ? static_cast<float>(weight / std::sqrt(squares)) : 0.0f;
    float* const row = kept.row(t);
    for (int64_t i = 0; i < k; ++i) row[i] = h[neurons[static_cast<size_t>(i)]];
  });
  if (prior != nullptr) {
    pick_prior(*prior, layer, neurons, spec.prior * static_cast<double>(m), m);
  }
  // The bias is in both outputs, and so in neither's difference.
  products.times(kept, *ffn.down, ffn.down_bias.get(), false, lost);
  samples.visit_y(layer, [&](int64_t t, const float* y) {
    float* const row = lost.row(t);
    const float s = scale[static_cast<size_t>(t)];
    for (int64_t i = 0; i < lost.cols; ++i) row[i] = (y[i] - row[i]) * s;
  });
  if (prior != nullptr) subtract_from_prior(*prior, layer, ffn.down_bias.get(), m);
  for (int64_t t = 0; t < rows; ++t) {
    const float s = scale[static_cast<size_t>(t)];
    for (int64_t i = 0; i < k; ++i) kept.row(t)[i] *= s;
  }
}

// Rows from `first` on: the prior's inputs, unscaled, and the scales at which all of them count as
// much as `tokens` samples.
void PatchFitter::Work::pick_prior(const PatchPrior& prior, int64_t layer,
                                   std::span<const int32_t> neurons, double tokens, int64_t first) {
  const PatchPrior::Layer& from = prior.layers[static_cast<size_t>(layer)];
  for (int64_t r = 0; r < prior.rows; ++r) {
    scale[static_cast<size_t>(first + r)] =
        static_cast<float>(std::sqrt(static_cast<double>(from.weights[r]) * tokens));
    const uint16_t* const h = from.h + r * prior.n_ff;
    float* const row = kept.row(first + r);
    for (size_t i = 0; i < neurons.size(); ++i) row[i] = f16_to_f32(h[neurons[i]]);
  }
}

// What the dropped neurons added to the prior's outputs, scaled.
void PatchFitter::Work::subtract_from_prior(const PatchPrior& prior, int64_t layer,
                                            const Buffer* down_bias, int64_t first) {
  bias.assign(static_cast<size_t>(lost.cols), 0.0f);
  if (down_bias != nullptr) backend.read(down_bias->data(), bias.data(), lost.cols);
  const PatchPrior::Layer& from = prior.layers[static_cast<size_t>(layer)];
  for (int64_t r = 0; r < prior.rows; ++r) {
    const uint16_t* const y = from.y + r * prior.n_embd;
    const float s = scale[static_cast<size_t>(first + r)];
    float* const row = lost.row(first + r);
    for (int64_t i = 0; i < lost.cols; ++i) {
      row[i] = (f16_to_f32(y[i]) + bias[static_cast<size_t>(i)] - row[i]) * s;
    }
  }
}

// inverse = (G + mu I)^-1, and fit = G (G + mu I)^-1 = I - mu (G + mu I)^-1, symmetric: the fitted
// outputs are fit R.
void PatchFitter::Work::invert(double mu, int64_t layer) {
  const auto ridge = static_cast<float>(mu);
  const int64_t m = gram.rows;
  for (int64_t i = 0; i < m; ++i) gram.row(i)[i] += ridge;
  if (cholesky(gram.values.data(), m, 0.0f) > 0) {
    throw_error(ErrorKind::kNumeric,
                "the patch of layer %lld has no solution: its regression is singular or holds NaN; "
                "decode without a patch, or with a larger ridge",
                static_cast<long long>(layer));
  }
  upper.shape(m, m);
  invert_upper(gram.values.data(), m, upper.values.data());
  products.times(upper, upper, inverse);
  fit.shape(m, m);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      fit.row(i)[j] = (i == j ? 1.0f : 0.0f) - ridge * inverse.row(i)[j];
    }
  }
}

// The strongest left directions X (rank, m) of fit R, by subspace iteration on fit R R^T fit. Then
// V^T = U^-T X fit R with U^T U = (X fit R)(X fit R)^T is orthonormal, and with it
// V^T A^T H = U^-T X fit R R^T (G + mu I)^-1 H. Leaves U^-T X fit in `fitted`, the factor of
// (G + mu I)^-1 H in `energy`; returns how many rows they have.
int64_t PatchFitter::Work::find_directions(int64_t rank) {
  const int64_t m = fit.rows;
  const WeightPtr by_fit = products.load(fit);
  products.times(lost, lost, energies);  // R R^T
  const WeightPtr by_lost = products.load(energies);
  x.shape(std::min(rank, m), m);
  std::mt19937 random(1);
  for (float& v : x.values) v = (random() & 1u) != 0 ? 1.0f : -1.0f;
  for (int pass = 0; pass <= kPasses; ++pass) {
    orthonormalise(x);
    products.times(x, *by_fit, fitted);        // X fit
    products.times(fitted, *by_lost, energy);  // X fit R R^T
    if (pass < kPasses) products.times(energy, *by_fit, x);
  }
  products.times(energy, fitted, small);
  float strongest = 0.0f;
  for (int64_t i = 0; i < small.rows; ++i) strongest = std::max(strongest, small.row(i)[i]);
  const int64_t dropped = cholesky(small.values.data(), small.rows, kLeastEnergy * strongest);
  solve_transposed(small.values.data(), small.rows, fitted.values.data(), m);
  solve_transposed(small.values.data(), small.rows, energy.values.data(), m);
  int64_t found = 0;
  for (int64_t i = 0; i < small.rows; ++i) {
    if (small.row(i)[i] == 0.0f) continue;
    std::copy_n(fitted.row(i), m, fitted.row(found));
    std::copy_n(energy.row(i), m, energy.row(found++));
  }
  fitted.shape(small.rows - dropped, m);
  energy.shape(small.rows - dropped, m);
  return fitted.rows;
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
  w.products.times(w.energy, w.inverse, w.inner);
  transpose(w.kept, w.turned);
  w.products.times(w.turned, w.inner, w.in);  // (k, rank)
  transpose(w.lost, w.turned);
  w.products.times(w.turned, w.fitted, w.out);  // (n_embd, rank)
  transpose(w.in, w.turned);

  // Each direction's scale goes to `out`, so that `in` uses the range of float16 well.
  std::vector<float> largest(static_cast<size_t>(rank));
  for (int64_t r = 0; r < rank; ++r) {
    float& most = largest[static_cast<size_t>(r)];
    float* const row = w.turned.row(r);
    for (int64_t i = 0; i < w.turned.cols; ++i) most = std::max(most, std::abs(row[i]));
    if (most == 0.0f) most = 1.0f;
    for (int64_t i = 0; i < w.turned.cols; ++i) row[i] /= most;
  }
  for (int64_t i = 0; i < w.out.rows; ++i) {
    for (int64_t r = 0; r < rank; ++r) w.out.row(i)[r] *= largest[static_cast<size_t>(r)];
  }
  LayerPatch patch;
  patch.rank = rank;
  patch.in = halves(w.turned);
  patch.out = halves(w.out);
  const auto finite = [](uint16_t half) { return (half & 0x7c00u) != 0x7c00u; };
  if (!std::all_of(patch.in.begin(), patch.in.end(), finite) ||
      !std::all_of(patch.out.begin(), patch.out.end(), finite)) {
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
