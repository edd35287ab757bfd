// Invertible linear layers in the PLU parametrisation with the ActNorm before them (csrc/cpu/plu.h has the mathematics).
// Matrices are read where they lie; a layer of D = 64 is 16 KB and stays in the first cache. Of what a warp reads in an inner
// loop, neighbouring lanes read neighbours, or all the same; a thread computes four rows of a product at once, for which it
// reads five numbers instead of eight. A column of A⁻¹ is D²/2 multiply-adds that each wait for another, were one thread to
// solve it row by row: here D/8 strips wait for each other, each of up to D/2 steps of four sums and a triangle of 16 rows.
// The backward is products alone: 16 × 32 entries of a result are a block's work, whatever else the layer has.
#pragma once

#include "layer.cuh"

namespace glf::device {

inline constexpr int slice_columns = 32;  // of A, A⁻¹ and c that one block computes: a layer is ⌈D / 32⌉ blocks' work
inline constexpr int strip_rows = 16;     // that a substitution solves for at once, in one thread's registers a column
inline constexpr int tile_columns = 32;   // of the pieces of ∂L and ∂U, strip_rows high, that one block computes
inline constexpr int sum_rows = 4;        // of ∂log_scale and ∂bias that one block computes
// Of a product's inner dimension, what passes through shared memory at once: all of it at D = 64 in float32.
template <class T>
inline constexpr int inner_chunk = sizeof(T) == 4 ? 64 : 32;
// Lines of shared memory by inner index, so padded that columns meet different banks and a thread's two rows are one read.
inline constexpr int left_line = strip_rows + 2, right_line = tile_columns + 1;

GLF_DEVICE_AND_HOST int slices_of(int D) { return (D + slice_columns - 1) / slice_columns; }
GLF_DEVICE_AND_HOST int strips_of(int D) { return (D + strip_rows - 1) / strip_rows; }
GLF_DEVICE_AND_HOST int tiles_of(int D) { return strips_of(D) * ((D + tile_columns - 1) / tile_columns); }
// Blocks of one layer's backward: the tiles of ∂L, those of ∂U, and rows of the ActNorm's gradients.
GLF_DEVICE_AND_HOST int backward_jobs(int D, bool actnorm) {
  return 2 * tiles_of(D) + (actnorm ? (D + sum_rows - 1) / sum_rows : 0);
}

// Shared memory that a block needs.
template <class T>
GLF_DEVICE_AND_HOST int plu_assemble_bytes(int D) {
  return (strip_rows * (strip_rows + 2 * slice_columns) + 2 * D) * static_cast<int>(sizeof(T)) +
         D * static_cast<int>(sizeof(int));
}
template <class T>
GLF_DEVICE_AND_HOST int product_bytes() {
  return inner_chunk<T> * (left_line + right_line) * static_cast<int>(sizeof(T));
}
template <class T>
GLF_DEVICE_AND_HOST int plu_backward_bytes(int D) {
  return product_bytes<T>() + tile_columns * static_cast<int>(sizeof(T)) +
         D * static_cast<int>(sizeof(T) + sizeof(int));
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

// Two entries of a tile of strip_rows × tile_columns: rows 2 (thread / 32) and the next, column thread % 32.
template <class T>
struct TilePair {
  T sum[2];
};

// A tile of a product: Σ left(row, k) right(k, column) over begin ≤ k < end. Neighbouring threads ask for neighbouring rows of
// `left`, or else inner indices; of `right` for neighbouring inner indices, or else columns: as the matrices lie in memory.
// Both are asked for k < end alone, but for any row and column of the tile. They must not branch: a load in a branch is waited
// for there, one after the other, each 600 clocks and more.
template <bool left_by_rows, bool right_by_inner, class T, class L, class R>
GLF_DEVICE void tile_product(const Block& block, int begin, int end, L left, R right, PerThread<TilePair<T>>& pairs,
                             T* shared) {
  constexpr int inner = inner_chunk<T>, S = strip_rows, C = tile_columns, threads = S / 2 * C;
  T *lines_left = shared, *lines_right = shared + inner * left_line;
  block.threads_unguarded(pairs, [](int, TilePair<T>& own) { own.sum[0] = own.sum[1] = 0; });
  for (int first = begin; first < end; first += inner) {
    block.threads(pairs, [&](int t, TilePair<T>&) {
      T x[inner * S / threads], y[inner * C / threads];
#pragma unroll
      for (int i = 0; i < inner * S / threads; ++i) {
        const int e = t + threads * i, row = left_by_rows ? e % S : e / inner, k = left_by_rows ? e / S : e % inner;
        const T value = left(row, first + k < end ? first + k : end - 1);
        x[i] = first + k < end ? value : T(0);
      }
#pragma unroll
      for (int i = 0; i < inner * C / threads; ++i) {
        const int e = t + threads * i, column = right_by_inner ? e / inner : e % C, k = right_by_inner ? e % inner : e / C;
        const T value = right(first + k < end ? first + k : end - 1, column);
        y[i] = first + k < end ? value : T(0);
      }
#pragma unroll
      for (int i = 0; i < inner * S / threads; ++i) {
        const int e = t + threads * i, row = left_by_rows ? e % S : e / inner, k = left_by_rows ? e / S : e % inner;
        lines_left[k * left_line + row] = x[i];
      }
#pragma unroll
      for (int i = 0; i < inner * C / threads; ++i) {
        const int e = t + threads * i, column = right_by_inner ? e / inner : e % C, k = right_by_inner ? e % inner : e / C;
        lines_right[k * right_line + column] = y[i];
      }
    });
    block.threads(pairs, [&](int t, TilePair<T>& own) {
#pragma unroll 16
      for (int k = 0; k < inner; ++k) {
        const T y = lines_right[k * right_line + t % C];
        own.sum[0] += lines_left[k * left_line + t / C * 2] * y;
        own.sum[1] += lines_left[k * left_line + t / C * 2 + 1] * y;
      }
    });
  }
}

// Rows `first` … of ∂A − A⁻ᵀ ∂A⁻¹ A⁻ᵀ, ∂A null where zero. The first product's rows pass through `half` (D, D), where no other
// block needs them.
template <class T>
GLF_DEVICE void plu_inverse_gradient_strip(const Block& block, int D, int first, const T* A_inv, const T* grad_A,
                                           const T* grad_A_inv, T* half, T* result, unsigned char* shared) {
  T* lines = reinterpret_cast<T*>(shared);
  PerThread<TilePair<T>> pairs;
  const auto within = [&](int i) { return i < D ? i : D - 1; };  // beyond it nobody looks at the sums
  const auto each_entry = [&](int column, auto f) {
    block.threads(pairs, [&](int t, TilePair<T>& own) {
      for (int r = 0; r < 2; ++r) {
        const int i = first + t / tile_columns * 2 + r, j = column + t % tile_columns;
        if (i < D && j < D) f(i * D + j, own.sum[r]);
      }
    });
  };
  for (int column = 0; column < D; column += tile_columns) {
    tile_product<true, false>(
        block, 0, D, [&](int row, int k) { return A_inv[k * D + within(first + row)]; },
        [&](int k, int j) { return grad_A_inv[k * D + within(column + j)]; }, pairs, lines);
    each_entry(column, [&](int at, T sum) { half[at] = sum; });
  }
  for (int column = 0; column < D; column += tile_columns) {
    tile_product<false, true>(
        block, 0, D, [&](int row, int k) { return half[within(first + row) * D + k]; },
        [&](int k, int j) { return A_inv[within(column + j) * D + k]; }, pairs, lines);
    each_entry(column, [&](int at, T sum) { result[at] = (grad_A ? grad_A[at] : T(0)) - sum; });
  }
}

// One of a layer's `backward_jobs`, from ∂A, that of A⁻¹ included, ∂c and ∂log|det A| (null where zero). No job needs another's
// result.
template <class T>
GLF_DEVICE void plu_assemble_backward_job(const Block& block, const Layer<T>& p, int job, const T* A, const T* grad_A,
                                          const T* grad_c, const T* grad_logabsdet, const LayerGradients<T>& grad,
                                          unsigned char* shared) {
  const int D = p.D, tiles = tiles_of(D);
  const T g_logdet = grad_logabsdet ? *grad_logabsdet : T(0);
  // What is not there is not used, but read from elsewhere: a branch would wait.
  const bool outer = grad_c && p.bias;
  const T *dA = grad_A ? grad_A : A, *b = outer ? p.bias : p.sign, *dc = outer ? grad_c : p.sign;
  const auto G = [&](int i, int j) {  // ∂A in all
    const T entry = dA[i * D + j], product = b[i] * dc[j];
    return (grad_A ? entry : T(0)) + (outer ? product : T(0));
  };
  if (job >= 2 * tiles) {
    const int first = sum_rows * (job - 2 * tiles), n = D - first < sum_rows ? D - first : sum_rows;
    const auto summand = [&](int task, int j) {  // of ∂log_scale, then of ∂bias
      const int i = first + task % n;
      return (task < n ? G(i, j) : grad_c ? grad_c[j] : T(0)) * A[i * D + j];
    };
    block.sums(2 * n, D, summand, [&](int task, T sum) {
      if (task < n)
        grad.log_scale[first + task] = g_logdet + sum;
      else
        grad.bias[first + task - n] = sum;
    });
    return;
  }
  const int wide = (D + tile_columns - 1) / tile_columns, tile = job % tiles;
  const int top = tile / wide * strip_rows, left = tile % wide * tile_columns;
  T *lines = reinterpret_cast<T*>(shared), *diag = lines + inner_chunk<T> * (left_line + right_line);
  T* scale = diag + tile_columns;
  int* place = reinterpret_cast<int*>(scale + D);
  const auto within = [&](int i) { return i < D ? i : D - 1; };
  block.each_unguarded(tile_columns, [&](int c) { diag[c] = p.diag(within(left + c)); });
  block.each(D, [&](int i) {
    scale[i] = p.scale(i);
    place[p.row(i)] = i;
  });
  // M = L U has A's row i, but for its scale, as row permutation[i]. One that is missing there has no place.
  const auto M = [&](int row, int j) {
    const int i = place[row] < 0 || place[row] >= D ? 0 : place[row];
    return scale[i] * G(i, j);
  };
  PerThread<TilePair<T>> pairs;
  const auto each_entry = [&](auto f) {  // f(row, column, sum)
    block.threads(pairs, [&](int t, TilePair<T>& own) {
      for (int r = 0; r < 2; ++r) {
        const int i = top + t / tile_columns * 2 + r, j = left + t % tile_columns;
        if (i < D && j < D) f(i, j, own.sum[r]);
      }
    });
  };
  if (job < tiles) {  // ∂L = ∂M Uᵀ, of which a tile above the diagonal is nothing
    tile_product<false, true>(
        block, left, left < top + strip_rows - 1 ? D : left, [&](int r, int k) { return M(within(top + r), k); },
        [&](int k, int c) {
          const int j = left + c;
          const T entry = p.upper[within(j) * D + k], other = k == j ? diag[c] : T(0);
          return k > j ? entry : other;
        },
        pairs, lines);
    each_entry([&](int i, int j, T sum) { grad.lower[i * D + j] = j < i ? sum : T(0); });
  } else {  // ∂U = Lᵀ ∂M, of which a tile below the diagonal is nothing
    tile_product<true, false>(
        block, top, left + tile_columns > top ? D : top,
        [&](int r, int k) {
          const int i = top + r;
          const T entry = p.lower[k * D + within(i)], other = k == i ? T(1) : T(0);
          return k > i ? entry : other;
        },
        [&](int k, int c) { return M(k, within(left + c)); }, pairs, lines);
    each_entry([&](int i, int j, T sum) {
      grad.upper[i * D + j] = i < j ? sum : T(0);
      if (i == j) grad.log_diag[i] = sum * diag[j - left] + g_logdet;
    });
  }
}

}  // namespace glf::device
