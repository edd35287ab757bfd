// Substitution with triangular factors, blockwise, so that nearly all of it is the matrix microkernel. Factors hold the
// negatives of their entries off the diagonal: then every elimination is an addition, which is what the microkernel does.
// Rows lie `ld` apart, a multiple of W columns, and can be read and written to that width.
#pragma once

#include "tile.h"

namespace glf::GLF_ISA {

// row += f·other over `width` columns.
template <class T>
inline void add_row(idx width, T f, const T* other, T* row) {
  for (idx j = 0; j < width; j += lanes<T>) store(row + j, load(row + j) + f * load(other + j));
}

// X (n, columns) ← L⁻¹ X with a unit lower L. `identity`: X is I, so that row i ends at column i.
template <class T>
void substitute_forward(idx n, const T* lower, T* x, idx ld, idx columns, bool identity) {
  constexpr idx W = NR * lanes<T>;
  for (idx m = 0; m < n; m += MR) {
    const idx rows = std::min<idx>(MR, n - m), width = identity ? round_up(m + rows, W) : columns;
    for (idx j = 0; m && j < width; j += W)
      pick_block<T>(rows, NR)(m, lower + m * ld, ld, 1, x + j, ld, x + m * ld + j, ld, W, nullptr, true);
    for (idx i = m; i < m + rows; ++i)
      for (idx k = m; k < i; ++k) add_row(width, lower[i * ld + k], x + k * ld, x + i * ld);
  }
}

// X (n, ld) ← U⁻¹ X, with U's diagonal, as it is, in `diag`.
template <class T>
void substitute_backward(idx n, const T* upper, const T* diag, T* x, idx ld) {
  constexpr idx W = NR * lanes<T>;
  for (idx m = (n - 1) / MR * MR; m >= 0; m -= MR) {
    const idx rows = std::min<idx>(MR, n - m), next = m + rows;
    for (idx j = 0; next < n && j < ld; j += W)
      pick_block<T>(rows, NR)(n - next, upper + m * ld + next, ld, 1, x + next * ld + j, ld, x + m * ld + j, ld, W,
                              nullptr, true);
    for (idx i = next - 1; i >= m; --i) {
      T* row = x + i * ld;
      for (idx k = i + 1; k < next; ++k) add_row(ld, upper[i * ld + k], x + k * ld, row);
      // A reciprocal: one division a row instead of one a vector. It overflows only where the inverse does.
      const T reciprocal = 1 / diag[i];
      for (idx j = 0; j < ld; j += lanes<T>) store(row + j, load(row + j) * reciprocal);
    }
  }
}

// X ← (L U)⁻¹, both factors (n, ld); they may be one matrix.
template <class T>
void invert_factors(idx n, const T* lower, const T* upper, const T* diag, T* x, idx ld) {
  std::fill_n(x, n * ld, T(0));
  for (idx i = 0; i < n; ++i) x[i * ld + i] = 1;
  substitute_forward(n, lower, x, ld, ld, true);
  substitute_backward(n, upper, diag, x, ld);
}

}  // namespace glf::GLF_ISA
