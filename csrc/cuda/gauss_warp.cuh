// Determinant and inverse of matrices up to 64 × 64 by Gauss-Jordan elimination in place: a row, or two, in each lane's
// registers, up to eight matrices in a warp (csrc/cuda/warp_rows.cuh has the scheme).
//
// The transpose is inverted: a lane's row is a column in memory, so that neighbouring lanes read and write neighbours. After
// step k, entry j is column k + 1 + j of A, and of the inverse from where A's columns end. 2 D³ operations, those of the
// inverse alone.
//
// The error stays within cond(A) ε, but where LAPACK's is far below that (triangular matrices, graded ones), this one's is
// not: float32, upper triangles of condition 2.4e6, D = 64: 2.7e-3 against 5.3e-7. A step of refinement, X + X (I − A X),
// would be another 4 D³ operations and a second matrix in the registers: three times the cost.
#pragma once

#include "warp_rows.cuh"

namespace glf::device {

// Matrices [first, first + 32 / lanes_of<N>) of `count`, each (D, D) with D ≤ N; padded with zeros.
template <int N, class T>
GLF_DEVICE void slogdet_inverse_warp(long long first, long long count, int D, const T* A, T* sign, T* logabsdet,
                                     T* inverse, int* info) {
  using Rows = WarpRows<N, T>;
  constexpr int L = Rows::L, R = Rows::R;
  Rows rows;
  Lane<T> s(T(1)), log_sum(T(0));
  on_lanes([&](int l) {
    const long long n = first + l / L < count ? first + l / L : count - 1;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = l % L + 32 * r;
      of_lane(rows.position[r], l) = row;
#pragma unroll
      for (int j = 0; j < N; ++j) of_lane(rows.a[r][j], l) = row < D && j < D ? A[(n * D + j) * D + row] : T(0);
    }
  });

#pragma unroll 1
  for (int k = 0; k < D; ++k) {
    rows.exchange(k);
    const Lane<T> pivot = rows.pivot;
    s = s * select(rows.where == k, Lane<T>(T(1)), Lane<T>(T(-1)));
    s = s * select(pivot > T(0), Lane<T>(T(1)), select(pivot < T(0), Lane<T>(T(-1)), Lane<T>(T(0))));
    log_sum = log_sum + lane_log(magnitude(pivot));

    // Other rows lose f times the pivot's, which becomes itself over the pivot: nothing plus −f times it.
    Lane<T> f[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      f[r] = select(rows.chosen[r], Lane<T>(T(-1)) / pivot, rows.a[r][0] / select(rows.zero, Lane<T>(T(1)), pivot));
#pragma unroll
    for (int j = 1; j < N; ++j) {
      const Lane<T> p = rows.from_pivot(j);
#pragma unroll
      for (int r = 0; r < R; ++r) rows.a[r][j - 1] = select(rows.chosen[r], Lane<T>(T(0)), rows.a[r][j]) - f[r] * p;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) rows.a[r][N - 1] = Lane<T>(T(0)) - f[r];
  }

  on_lanes([&](int l) {
    const long long n = first + l / L;
    if (n >= count || l % L) return;
    sign[n] = of_lane(s, l);
    logabsdet[n] = of_lane(log_sum, l);
    info[n] = of_lane(rows.zero_at, l);
  });
  // Column j of the result belongs to the row that came to position j.
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int column = j - (N - D);
    Lane<int> row = lane_where<L>(rows.position[0] == column) % L;
#pragma unroll
    for (int r = 1; r < R; ++r) {
      const Lane<bool> here = rows.position[r] == column;
      row = select(any<L>(here), lane_where<L>(here) + 32 * r, row);
    }
    on_lanes([&](int l) {
      const long long n = first + l / L;
      if (n >= count || column < 0) return;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int at = of_lane(rows.position[r], l);
        if (at < D) inverse[(n * D + of_lane(row, l)) * D + at] = of_lane(rows.a[r][j], l);
      }
    });
  }
}

}  // namespace glf::device
