// Small dense algebra on host memory, for systems of a few hundred unknowns: a Cholesky factor, the
// inverse of a triangle, a triangular solve, orthonormal rows. Matrices are square, by rows,
// float32. Large products are the backend's matter.
#pragma once

#include <cstdint>

namespace coreinfer {

// A = U^T U of a symmetric positive definite matrix (n, n), of which the upper triangle is read and
// becomes U. A pivot that is not above `least` makes its row zero, as if the unknown were not
// there; returns how many were. A NaN is such a pivot, too.
int64_t cholesky(float* a, int64_t n, float least);

// The inverse of U, all pivots positive: upper again; below the diagonal zeros are written.
void invert_upper(const float* u, int64_t n, float* inverse);

// Makes rows of `width` orthonormal, in place; those that depend on earlier ones become zero.
void orthonormalise(float* x, int64_t rows, int64_t width);

// X = U^-T X for rows x of `width`, in place; rows of zero pivots become zero.
void solve_transposed(const float* u, int64_t n, float* x, int64_t width);

}  // namespace coreinfer
