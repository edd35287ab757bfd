// Invertible linear layers in the PLU parametrisation with the ActNorm before them (csrc/cpu/plu.h has the mathematics).
// Matrices are read where they lie; a layer of D = 64 is 16 KB and stays in the first cache. Of what a warp reads in an inner
// loop, neighbouring lanes read neighbours, or all the same; a thread computes four rows of a product at once, for which it
// reads five numbers instead of eight. A column of A⁻¹ is D²/2 multiply-adds that each wait for another, were one thread to
// solve it row by row: here D/8 strips wait for each other, each of up to D/2 steps of four sums and a triangle of 16 rows.
#pragma once

#include "layer.cuh"

namespace glf::device {

inline constexpr int slice_columns = 32;  // of A, A⁻¹ and c that one block computes: a layer is ⌈D / 32⌉ blocks' work
inline constexpr int strip_rows = 16;     // that a substitution solves for at once, in one thread's registers a column
inline constexpr int patch_side = 32;     // of the piece of a matrix that is transposed at once

GLF_DEVICE_AND_HOST int slices_of(int D) { return (D + slice_columns - 1) / slice_columns; }

// Shared memory that a block needs.
template <class T>
GLF_DEVICE_AND_HOST int plu_assemble_bytes(int D) {
  return (strip_rows * (strip_rows + 2 * slice_columns) + 2 * D) * static_cast<int>(sizeof(T)) +
         D * static_cast<int>(sizeof(int));
}
template <class T>
GLF_DEVICE_AND_HOST int plu_backward_bytes(int D) {
  return (2 * D + patch_side * (patch_side + 1)) * static_cast<int>(sizeof(T));
}

// sum[r] += Σ x(i + r, k) y(k) over begin ≤ k < end, for four rows; x is asked for no row from D on.
template <class T, class X, class Y>
GLF_DEVICE void add_products(T (&sum)[4], int D, int i, int begin, int end, X x, Y y) {
  int row[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) row[r] = i + r < D ? i + r : D - 1;
  for (int k = begin; k < end; ++k) {
    const T factor = y(k);
#pragma unroll
    for (int r = 0; r < 4; ++r) sum[r] += x(row[r], k) * factor;
  }
}

// Columns `first` … of A and of A⁻¹ (unless null), and of c; log|det A| comes with the first. No column needs another's:
// that is what makes slices blocks of their own.
template <class T>
GLF_DEVICE void plu_assemble_slice(const Block& block, const Layer<T>& p, int first, T* A, T* A_inv, T* c, T* logabsdet,
                                   unsigned char* shared) {
  const int D = p.D, n = D - first < slice_columns ? D - first : slice_columns;
  T* triangle = reinterpret_cast<T*>(shared);     // [strip_rows, strip_rows]
  T* strip = triangle + strip_rows * strip_rows;  // [2, strip_rows, slice_columns]
  T *diag = strip + 2 * strip_rows * slice_columns, *scale = diag + D;
  int* place = reinterpret_cast<int*>(scale + D);  // row m of L U is row place[m] of A
  block.each(D, [&](int i) {
    diag[i] = p.diag(i);
    scale[i] = p.scale(i);
    place[i] = i;
  });
  block.each(D, [&](int i) { place[p.row(i)] = i; });

  block.each((D + 3) / 4, n, [&](int quad, int j) {  // A = diag(scale) P L U
    const int i = 4 * quad, column = first + j;
    const auto U = [&](int k) { return k < column ? p.upper[k * D + column] : k == column ? diag[k] : T(0); };
    const auto L = [&](int row, int k) { return p.lower[row * D + k]; };
    T sum[4] = {};
    add_products(sum, D, i, 0, i, L, U);
    for (int r = 0; r < 4 && i + r < D; ++r) {  // L's triangle beside its diagonal
      T total = sum[r] + U(i + r);
      for (int k = i; k < i + r; ++k) total += L(i + r, k) * U(k);
      A[place[i + r] * D + column] = scale[place[i + r]] * total;
    }
  });
  if (p.bias)
    block.each(8, n, [&](int w, int j) {  // an eighth of c each
      T sum = 0;
      for (int i = w; i < D; i += 8) sum += p.bias[i] * A[i * D + first + j];
      strip[w * slice_columns + j] = sum;
    });
  block.each(n, [&](int j) {
    T sum = 0;
    if (p.bias)
      for (int w = 0; w < 8; ++w) sum += strip[w * slice_columns + j];
    c[first + j] = sum;
  });
  if (first == 0)
    block.sums(1, D, [&](int, int i) { return p.log_diag[i] + (p.log_scale ? p.log_scale[i] : T(0)); },
               [&](int, T total) { *logabsdet = total; });
  if (!A_inv) return;

  // Column j of A⁻¹ is U⁻¹ L⁻¹ e_m / scale[j] where place[m] = j. Substitution by strips of rows: all threads subtract what
  // is solved already, then one a column solves the strip's triangle in its registers.
  block.each(D, [&](int i) {
    diag[i] = 1 / diag[i];
    scale[i] = 1 / scale[i];
  });
  T* X = A_inv + first;
  // strip[0] + strip[1] = the right side of rows top …, less what rows begin … end contribute, a half of them each. The
  // triangle has 1/d on its diagonal, and zeros beyond D.
  const auto subtract = [&](int begin, int end, const T* matrix, int top, auto right_side) {
    block.each_unguarded(strip_rows * strip_rows, [&](int e) {
      const int r = top + e / strip_rows, k = top + e % strip_rows;
      triangle[e] = r >= D || k >= D ? T(0) : r == k ? diag[r] : matrix[r * D + k];
    });
    block.each(2 * strip_rows / 4, n, [&](int task, int j) {
      const int middle = (begin + end) / 2, half = task / (strip_rows / 4), r0 = 4 * task - half * strip_rows;
      T sum[4] = {};
      add_products(sum, D, top + r0, half ? middle : begin, half ? end : middle,
                   [&](int row, int k) { return matrix[row * D + k]; }, [&](int k) { return X[k * D + j]; });
      for (int r = 0; r < 4; ++r) {
        const int row = top + r0 + r;
        strip[(half * strip_rows + r0 + r) * slice_columns + j] =
            row >= D ? T(0) : (half ? T(0) : right_side(row, j)) - sum[r];
      }
    });
  };
  const auto each_column = [&](int top, auto solve) {
    block.each(n, [&](int j) {
      T x[strip_rows];
#pragma unroll
      for (int r = 0; r < strip_rows; ++r)
        x[r] = strip[r * slice_columns + j] + strip[(strip_rows + r) * slice_columns + j];
      solve(x);
#pragma unroll
      for (int r = 0; r < strip_rows; ++r)
        if (top + r < D) X[(top + r) * D + j] = x[r];
    });
  };
  for (int top = 0; top < D; top += strip_rows) {
    subtract(0, top, p.lower, top, [&](int row, int j) { return place[row] == first + j ? scale[first + j] : T(0); });
    each_column(top, [&](T(&x)[strip_rows]) {
#pragma unroll
      for (int r = 1; r < strip_rows; ++r) {
        no_reads_ahead();
#pragma unroll
        for (int k = 0; k < r; ++k) x[r] -= triangle[r * strip_rows + k] * x[k];
      }
    });
  }
  for (int top = (D - 1) / strip_rows * strip_rows; top >= 0; top -= strip_rows) {
    subtract(top + strip_rows, D, p.upper, top, [&](int row, int j) { return X[row * D + j]; });
    each_column(top, [&](T(&x)[strip_rows]) {
#pragma unroll
      for (int r = strip_rows - 1; r >= 0; --r) {
        no_reads_ahead();
#pragma unroll
        for (int k = strip_rows - 1; k > r; --k) x[r] -= triangle[r * strip_rows + k] * x[k];
        x[r] *= triangle[r * strip_rows + r];
      }
    });
  }
}

// to = fromᵀ, patch by patch through shared memory.
template <class T>
GLF_DEVICE void transpose(const Block& block, int D, const T* from, T* to, T* patch) {
  for (int i = 0; i < D; i += patch_side)
    for (int j = 0; j < D; j += patch_side) {
      block.each(patch_side, patch_side, [&](int r, int c) {
        if (i + r < D && j + c < D) patch[r * (patch_side + 1) + c] = from[(i + r) * D + j + c];
      });
      block.each(patch_side, patch_side, [&](int r, int c) {
        if (j + r < D && i + c < D) to[(j + r) * D + i + c] = patch[c * (patch_side + 1) + r];
      });
    }
}

// From ∂A, ∂A⁻¹, ∂c, ∂log|det A| (null where zero); one block a layer. `work` (D, D) is work space, and so are, until they get
// their values, the gradients of lower (∂A in all) and of upper (what had to be transposed).
template <class T>
GLF_DEVICE void plu_assemble_backward_layer(const Block& block, const Layer<T>& p, const T* A, const T* A_inv,
                                            const T* grad_A, const T* grad_A_inv, const T* grad_c,
                                            const T* grad_logabsdet, const LayerGradients<T>& grad, T* work,
                                            unsigned char* shared) {
  const int D = p.D, quads = (D + 3) / 4;
  T *diag = reinterpret_cast<T*>(shared), *scale = diag + D, *patch = scale + D;
  T *g = grad.lower, *transposed = grad.upper;
  const T g_logdet = grad_logabsdet ? *grad_logabsdet : T(0);
  block.each(D, [&](int i) {
    diag[i] = p.diag(i);
    scale[i] = p.scale(i);
  });
  if (grad_A_inv) {
    block.each(quads, D, [&](int quad, int j) {  // A⁻ᵀ ∂A⁻¹
      T sum[4] = {};
      add_products(sum, D, 4 * quad, 0, D, [&](int row, int k) { return A_inv[k * D + row]; },
                   [&](int k) { return grad_A_inv[k * D + j]; });
      for (int r = 0; r < 4 && 4 * quad + r < D; ++r) work[(4 * quad + r) * D + j] = sum[r];
    });
    transpose(block, D, A_inv, transposed, patch);
  }
  block.each(quads, D, [&](int quad, int j) {  // ∂A in all
    T sum[4] = {};
    if (grad_A_inv)
      add_products(sum, D, 4 * quad, 0, D, [&](int row, int k) { return work[row * D + k]; },
                   [&](int k) { return transposed[k * D + j]; });
    for (int r = 0; r < 4 && 4 * quad + r < D; ++r) {
      const int i = 4 * quad + r;
      T total = grad_A ? grad_A[i * D + j] : T(0);
      if (grad_c && p.bias) total += p.bias[i] * grad_c[j];
      g[i * D + j] = total - sum[r];
    }
  });
  if (p.log_scale) {
    block.sums(D, D, [&](int i, int j) { return g[i * D + j] * A[i * D + j]; },
               [&](int i, T sum) { grad.log_scale[i] = g_logdet + sum; });
    block.sums(D, D, [&](int i, int j) { return grad_c ? grad_c[j] * A[i * D + j] : T(0); },
               [&](int i, T sum) { grad.bias[i] = sum; });
  }
  // M = L U has A's row i, but for its scale, as row permutation[i].
  block.each(D, D, [&](int i, int j) {
    work[p.row(i) * D + j] = scale[i] * g[i * D + j];
  });
  transpose(block, D, p.upper, transposed, patch);
  const auto M = [&](int row, int k) { return work[row * D + k]; };
  block.each(quads, D, [&](int quad, int j) {  // ∂L = ∂M Uᵀ; all lanes start where their first must
    T sum[4] = {};
    add_products(sum, D, 4 * quad, j - j % 32, D, M,
                 [&](int k) { return k > j ? transposed[k * D + j] : k == j ? diag[j] : T(0); });
    for (int r = 0; r < 4 && 4 * quad + r < D; ++r) {
      const int i = 4 * quad + r;
      grad.lower[i * D + j] = j < i ? sum[r] : T(0);
    }
  });
  block.each(quads, D, [&](int quad, int j) {  // ∂U = Lᵀ ∂M
    const int next = 4 * quad + 4;
    const auto L = [&](int row, int k) { return p.lower[k * D + row]; };
    T sum[4] = {};
    add_products(sum, D, 4 * quad, next, D, L, [&](int k) { return M(k, j); });
    for (int r = 0; r < 4 && 4 * quad + r < D; ++r) {
      const int i = 4 * quad + r;
      T total = sum[r] + M(i, j);
      for (int k = i + 1; k < next && k < D; ++k) total += L(i, k) * M(k, j);
      grad.upper[i * D + j] = i < j ? total : T(0);
      if (i == j) grad.log_diag[i] = total * diag[i] + g_logdet;
    }
  });
}

}  // namespace glf::device
