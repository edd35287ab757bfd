// Determinant and inverse of many small dense matrices by LU with partial pivoting: P A = L U, LAPACK's conventions.
#pragma once

#include "lu_lanes.h"
#include "triangular.h"

namespace glf::GLF_ISA {

// The order in which exchanges of rows leave them: row i of P A is row order[i] of A.
inline void row_order(idx dim, const std::int32_t* pivots, std::int32_t* order) {
  for (idx i = 0; i < dim; ++i) order[i] = static_cast<std::int32_t>(i);
  for (idx i = 0; i < dim; ++i) std::swap(order[i], order[pivots[i]]);
}

// Sign and logarithm of a determinant from U's diagonal and the exchanges. A zero gives (0, −∞), NaN (0, NaN).
template <class T>
inline void slogdet(idx dim, const T* diag, const std::int32_t* pivots, T* sign, T* logabsdet) {
  // Six floats multiply within the range of a double: one logarithm for all of them.
  constexpr idx group = sizeof(T) == 4 ? 6 : 1;
  double total = 0;
  int s = 1;
  for (idx k = 0; k < dim; k += group) {
    double product = 1;
    for (idx i = k; i < std::min(k + group, dim); ++i) {
      const T d = diag[i];
      product *= std::fabs(d);
      s *= d > 0 ? 1 : d < 0 ? -1 : 0;
      if (pivots[i] != i) s = -s;
    }
    total += std::log(product);
  }
  *sign = T(s);
  *logabsdet = static_cast<T>(total);
}

// One matrix's factorisation: right-looking, in panels of W columns. Padded: rows `ld` apart, W columns at a time.
template <class T>
struct LU {
  static constexpr idx W = NR * lanes<T>;
  idx dim, ld;
  T* a;  // U on and above the diagonal; below it −L, so that eliminating is adding
  T* x;  // room for the inverse
  T *diag, *pivot_row;
  std::int32_t* pivots;  // row that row k was exchanged with, from 0
  std::int32_t info;     // 0, or the first zero pivot, from 1

  static idx stride(idx dim) { return round_up(dim, W); }
  static idx size(idx dim) { return (2 * dim + 1) * stride(dim) + W; }

  LU(idx n, T* memory, std::int32_t* pivots_) : dim(n), ld(stride(n)), pivots(pivots_), info(0) {
    a = memory;
    x = a + n * ld;
    diag = x + n * ld;
    pivot_row = diag + ld;
  }

  void factor(const T* matrix) {
    for (idx i = 0; i < dim; ++i)
      for (idx j = 0; j < ld; j += lanes<T>) store(a + i * ld + j, load_part(matrix + i * dim + j, dim - j));
    info = 0;
    for (idx k = 0; k < dim; k += W) {
      const idx next = k + W;
      for (idx j = k; j < std::min(next, dim); ++j) eliminate_column(j, k);
      if (next >= dim) break;
      substitute_forward(W, a + k * ld + k, a + k * ld + next, ld, ld - next, false);
      for (idx j = next; j < ld; j += W)
        for (idx m = next; m < dim; m += MR)
          pick_block<T>(std::min<idx>(MR, dim - m), NR)(W, a + m * ld + k, ld, 1, a + k * ld + j, ld, a + m * ld + j,
                                                       ld, W, nullptr, true);
    }
    for (idx k = 0; k < dim; ++k) diag[k] = a[k * ld + k];
  }

  // Chooses column k's pivot, exchanges rows, and eliminates within the panel of W columns that starts at `panel`.
  void eliminate_column(idx k, idx panel) {
    idx best = k;
    T size = std::fabs(a[k * ld + k]);
    for (idx i = k + 1; i < dim; ++i) {  // NaN compares false: it is left to spread from where it is
      const T here = std::fabs(a[i * ld + k]);
      best = here > size ? i : best;
      size = here > size ? here : size;
    }
    pivots[k] = static_cast<std::int32_t>(best);
    if (best != k)
      for (idx j = 0; j < ld; j += lanes<T>) {
        const vec<T> row = load(a + k * ld + j);
        store(a + k * ld + j, load(a + best * ld + j));
        store(a + best * ld + j, row);
      }
    const T pivot = a[k * ld + k];
    if (pivot == 0 && !info) info = static_cast<std::int32_t>(k + 1);
    // Columns up to k are zero here, so that whole vectors can be added and keep their part of L.
    for (idx j = 0; j < W; ++j) pivot_row[j] = panel + j > k ? a[k * ld + panel + j] : T(0);
    for (idx i = k + 1; i < dim; ++i) {
      T* row = a + i * ld;
      const T f = pivot == 0 ? -row[k] : -row[k] / pivot;
      add_row(W, f, pivot_row, row + panel);
      row[k] = f;
    }
  }

  // A⁻¹ = (L U)⁻¹ P, written with rows `dim` apart. The factors are used up.
  void inverse(T* to, std::int32_t* order) {
    for (idx i = 0; i < dim; ++i)
      for (idx j = i + 1; j < dim; ++j) a[i * ld + j] = -a[i * ld + j];
    invert_factors(dim, a, a, diag, x, ld);
    row_order(dim, pivots, order);
    for (idx i = 0; i < dim; ++i)
      for (idx j = 0; j < dim; ++j) to[i * dim + order[j]] = x[i * ld + j];
  }
};

// Runs f(i, its factorisation) for i < count. A thread is woken for at least half a million multiply-adds.
template <class T, class F>
void over_matrices(idx count, idx dim, const Parallel& parallel, F f) {
  const int threads = lu_threads(count, dim, parallel);
  in_parallel(parallel, threads, [&](int thread) {
    const Scratch<T> memory(LU<T>::size(dim));
    const Scratch<std::int32_t> pivots(2 * dim);
    LU<T> lu(dim, memory.get(), pivots.get());
    for (idx i = count * thread / threads; i < count * (thread + 1) / threads; ++i) f(i, lu);
  });
}

template <class T>
void slogdet_inverse(idx count, idx dim, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info,
                     const Parallel& parallel) {
  if (dim <= max_lanes_dim) return slogdet_inverse_lanes(count, dim, A, sign, logabsdet, inverse, info, parallel);
  over_matrices<T>(count, dim, parallel, [=](idx n, LU<T>& lu) {
    lu.factor(A + n * dim * dim);
    info[n] = lu.info;
    slogdet(dim, lu.diag, lu.pivots, sign + n, logabsdet + n);
    lu.inverse(inverse + n * dim * dim, lu.pivots + dim);
  });
}

}  // namespace glf::GLF_ISA
