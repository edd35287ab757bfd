// Determinant and inverse of a matrix beyond the registers by one block, in place: in shared memory where the matrix fits there,
// else in the result itself. By P A = L U with partial pivoting, LAPACK's conventions and its way to the inverse (getri).
#pragma once

#include "lanes.cuh"

namespace glf::device {

// What a block needs beside its matrix.
template <class T>
struct Workspace {
  T* column;    // D
  int* pivots;  // D: row that row k was exchanged with, from 0
  int* order;   // D
  int* info;    // 1: 0, or the first zero pivot, from 1
  int* answer;  // 1
};

template <class T>
GLF_DEVICE void factor(const Block& block, int D, T* a, int ld, const Workspace<T>& w) {
  block.each(1, [&](int) { *w.info = 0; });
  for (int k = 0; k < D; ++k) {
    const int p = block.largest(k, D, [&](int i) { return magnitude(a[i * ld + k]); }, w.answer);
    block.each(p == k ? 0 : D, [&](int j) {
      const T top = a[k * ld + j];
      a[k * ld + j] = a[p * ld + j];
      a[p * ld + j] = top;
    });
    const T pivot = a[k * ld + k];
    block.each(D - k, [&](int i) {
      if (i)
        a[(k + i) * ld + k] = pivot == 0 ? a[(k + i) * ld + k] : a[(k + i) * ld + k] / pivot;
      else {
        w.pivots[k] = p;
        if (pivot == 0 && !*w.info) *w.info = k + 1;
      }
    });
    block.each(D - k - 1, D - k - 1,
               [&](int i, int j) { a[(k + 1 + i) * ld + k + 1 + j] -= a[(k + 1 + i) * ld + k] * a[k * ld + k + 1 + j]; });
  }
}

template <class T>
GLF_DEVICE void slogdet(const Block& block, int D, const T* a, int ld, const Workspace<T>& w, T* sign, T* logabsdet) {
  block.each(1, [&](int) {
    T s = 1, total = 0;
    for (int k = 0; k < D; ++k) {
      const T d = a[k * ld + k];
      s *= d > 0 ? T(1) : d < 0 ? T(-1) : T(0);
      if (w.pivots[k] != k) s = -s;
      total += natural_log(magnitude(d));
    }
    *sign = s;
    *logabsdet = total;
  });
}

// a ← A⁻¹ P⁻¹ from the factors, and `order`: column j of a is column order[j] of A⁻¹.
template <class T>
GLF_DEVICE void invert(const Block& block, int D, T* a, int ld, const Workspace<T>& w) {
  for (int j = 0; j < D; ++j) {  // U⁻¹, column by column
    block.each(j + 1, [&](int i) { w.column[i] = a[i * ld + j]; });
    block.each(j + 1, [&](int i) {
      const T d = w.column[j];
      T sum = 0;
      for (int l = i; l < j; ++l) sum += a[i * ld + l] * w.column[l];
      a[i * ld + j] = i == j ? 1 / d : -sum / d;
    });
  }
  for (int j = D - 2; j >= 0; --j) {  // X L = U⁻¹, from the last column
    block.each(D - j - 1, [&](int i) { w.column[j + 1 + i] = a[(j + 1 + i) * ld + j]; });
    block.each(D, [&](int i) {
      T sum = i <= j ? a[i * ld + j] : T(0);
      for (int l = j + 1; l < D; ++l) sum -= a[i * ld + l] * w.column[l];
      a[i * ld + j] = sum;
    });
  }
  block.each(1, [&](int) {
    for (int i = 0; i < D; ++i) w.order[i] = i;
    for (int i = 0; i < D; ++i) {
      const int other = w.order[w.pivots[i]];
      w.order[w.pivots[i]] = w.order[i];
      w.order[i] = other;
    }
  });
}

// The matrix in `a` (ld apart), which may be `result` itself.
template <class T>
GLF_DEVICE void load(const Block& block, int D, const T* A, T* a, int ld) {
  block.each(D, D, [&](int i, int j) { a[i * ld + j] = A[i * D + j]; });
}

template <class T>
GLF_DEVICE void slogdet_inverse_block(const Block& block, int D, const T* A, T* a, int ld, const Workspace<T>& w,
                                      T* sign, T* logabsdet, T* inverse, int* info) {
  load(block, D, A, a, ld);
  factor(block, D, a, ld, w);
  slogdet(block, D, a, ld, w, sign, logabsdet);
  block.each(1, [&](int) { *info = *w.info; });
  invert(block, D, a, ld, w);
  if (a != inverse) {
    block.each(D, D, [&](int i, int j) { inverse[i * D + w.order[j]] = a[i * ld + j]; });
    return;
  }
  for (int i = 0; i < D; ++i) {  // in place, row by row
    block.each(D, [&](int j) { w.column[j] = a[i * ld + j]; });
    block.each(D, [&](int j) { a[i * ld + w.order[j]] = w.column[j]; });
  }
}

}  // namespace glf::device
