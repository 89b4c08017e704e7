#include "neurons/dense_algebra.h"

#include <algorithm>
#include <cmath>

namespace coreinfer {
namespace {

constexpr int64_t kBlock = 4;

// x -= a0 y0 + a1 y1 + a2 y2 + a3 y3; four at once, since each pass costs as much as a load of x.
void subtract(float* x, const float* const* y, const float* a, int64_t n) {
  const float *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  for (int64_t i = 0; i < n; ++i) {
    x[i] -= (a0 * y0[i] + a1 * y1[i]) + (a2 * y2[i] + a3 * y3[i]);
  }
}

void subtract(float* x, const float* y, float a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] -= a * y[i];
}

// x -= sum of coefficient(j) * row(j) over j in [begin, end), each row `width` long.
template <typename Coefficient, typename Row>
void subtract_all(float* x, int64_t begin, int64_t end, int64_t width,
                  const Coefficient& coefficient, const Row& row) {
  int64_t j = begin;
  for (; j + kBlock <= end; j += kBlock) {
    const float* rows[kBlock];
    float a[kBlock];
    for (int64_t b = 0; b < kBlock; ++b) {
      rows[b] = row(j + b);
      a[b] = coefficient(j + b);
    }
    subtract(x, rows, a, width);
  }
  for (; j < end; ++j) subtract(x, row(j), coefficient(j), width);
}

// Sum of a b in double, in eight interleaved parts.
double dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kParts = 8;
  double parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) parts[p] += static_cast<double>(a[i + p]) * b[i + p];
  }
  for (; i < n; ++i) parts[i % kParts] += static_cast<double>(a[i]) * b[i];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
         ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

}  // namespace

int64_t cholesky(float* a, int64_t n, float least) {
  int64_t dropped = 0;
  for (int64_t i = 0; i < n; ++i) {
    float* const x = a + i * n;
    subtract_all(
        x + i, 0, i, n - i, [&](int64_t j) { return a[j * n + i]; },
        [&](int64_t j) { return a + j * n + i; });
    const bool good = x[i] > least && std::isfinite(x[i]);
    if (!good) ++dropped;
    const float scale = good ? 1.0f / std::sqrt(x[i]) : 0.0f;
    for (int64_t c = i; c < n; ++c) x[c] = good ? x[c] * scale : 0.0f;
  }
  return dropped;
}

void invert_upper(const float* u, int64_t n, float* inverse) {
  for (int64_t i = n - 1; i >= 0; --i) {
    float* const x = inverse + i * n;
    std::fill_n(x, n, 0.0f);
    const float scale = 1.0f / u[i * n + i];
    // The rows below have zeros left of their diagonals.
    subtract_all(
        x + i + 1, i + 1, n, n - i - 1, [&](int64_t j) { return u[i * n + j] * scale; },
        [&](int64_t j) { return inverse + j * n + i + 1; });
    x[i] = scale;
  }
}

void orthonormalise(float* x, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = x + i * width;
    const double before = dot(row, row, width);
    for (int64_t j = 0; j < i; ++j) {
      const float* const other = x + j * width;
      subtract(row, other, static_cast<float>(dot(row, other, width)), width);
    }
    const double after = dot(row, row, width);
    const bool independent = after > 1e-10 * before;
    const float scale = independent ? static_cast<float>(1.0 / std::sqrt(after)) : 0.0f;
    for (int64_t c = 0; c < width; ++c) row[c] *= scale;
  }
}

void solve_transposed(const float* u, int64_t n, float* x, int64_t width) {
  for (int64_t i = 0; i < n; ++i) {
    float* const row = x + i * width;
    const float pivot = u[i * n + i];
    if (!(pivot > 0.0f)) {
      std::fill_n(row, width, 0.0f);
      continue;
    }
    subtract_all(
        row, 0, i, width, [&](int64_t j) { return u[j * n + i]; },
        [&](int64_t j) { return x + j * width; });
    for (int64_t c = 0; c < width; ++c) row[c] /= pivot;
  }
}

}  // namespace coreinfer
