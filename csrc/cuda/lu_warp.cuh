// LU of matrices up to 64 × 64 by a warp, up to eight at once: P A = L U, LAPACK's conventions (csrc/cuda/warp_rows.cuh has the
// scheme). A lane's row lies D entries from its neighbour's, so matrices come and go through shared memory, 32 lines of up to
// 32 columns at a time: all of global memory is read and written side by side. ⅔ D³ operations.
#pragma once

#include "warp_rows.cuh"

namespace glf::device {

// Numbers of shared memory a warp: 32 lines an odd number apart, so that a column meets every bank.
template <int N>
inline constexpr int warp_lines = 32 * (lanes_of<N> + 1);

// f(lane, its line, column, whether there is one, and where in the batch) for lines of rows 32 strip …, columns L chunk ….
template <int N, class F>
GLF_DEVICE void each_line(long long first, long long count, int D, int strip, int chunk, F f) {
  constexpr int L = lanes_of<N>;
  on_lanes([&](int l) {
#pragma unroll 8
    for (int i = 0; i < L; ++i) {
      const int line = i * (32 / L) + l / L, row = line % L + 32 * strip, column = l % L + L * chunk;
      const long long n = first + line / L;
      f(line * (L + 1) + l % L, n < count && row < D && column < D, (n * D + row) * D + column);
    }
  });
  warp_barrier();
}

// Matrices [first, first + 32 / lanes_of<N>) of `count`, each (D, D) with D ≤ N; padded with zeros. `lines` is shared memory.
template <int N, class T>
GLF_DEVICE void lu_factor_warp(long long first, long long count, int D, const T* A, T* factors, int* pivots, int* info,
                               T* lines) {
  using Rows = WarpRows<N, T>;
  constexpr int L = Rows::L, R = Rows::R, chunks = (N + L - 1) / L;
  Rows rows;
  Lane<int> exchanged[R];
  const Lane<int> lane = lane_index();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows.position[r] = lane % L + 32 * r;
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      each_line<N>(first, count, D, r, c, [&](int at, bool there, long long e) { lines[at] = there ? A[e] : T(0); });
      on_lanes([&](int l) {
#pragma unroll
        for (int j = c * L; j < c * L + L && j < N; ++j) of_lane(rows.a[r][j], l) = lines[l * (L + 1) + j - c * L];
      });
      warp_barrier();
    }
  }

#pragma unroll 1
  for (int k = 0; k < D; ++k) {
    rows.exchange(k);
    Lane<T> f[R], kept[R];
    Lane<bool> below[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      exchanged[r] = select(lane % L + 32 * r == k, rows.where + 1, exchanged[r]);
      below[r] = rows.position[r] > k;
      f[r] = rows.a[r][0] / select(rows.zero, Lane<T>(T(1)), rows.pivot);
      kept[r] = select(below[r], f[r], rows.a[r][0]);
    }
    // Entry j is column k + j, as long as that is below D; then come columns of L.
#pragma unroll
    for (int j = 1; j < N; ++j) {
      if (j < D - k) {
        const Lane<T> p = rows.from_pivot(j);
#pragma unroll
        for (int r = 0; r < R; ++r)
          rows.a[r][j - 1] = select(below[r], rows.a[r][j] - f[r] * p, rows.a[r][j]);
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) rows.a[r][j - 1] = rows.a[r][j];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) rows.a[r][N - 1] = kept[r];
  }

  on_lanes([&](int l) {
    const long long n = first + l / L;
    if (n >= count) return;
    if (l % L == 0) info[n] = of_lane(rows.zero_at, l);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (l % L + 32 * r < D) pivots[n * D + l % L + 32 * r] = of_lane(exchanged[r], l);
  });
  // Row r of a lane goes to the line of its position; after D steps, entry j is column j − (N − D).
#pragma unroll
  for (int strip = 0; strip < R; ++strip)
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      on_lanes([&](int l) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int row = of_lane(rows.position[r], l) - 32 * strip;
          if (row < 0 || row >= L) continue;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int column = j - (N - D) - c * L;
            if (column >= 0 && column < L) lines[(l / L * L + row) * (L + 1) + column] = of_lane(rows.a[r][j], l);
          }
        }
      });
      warp_barrier();
      each_line<N>(first, count, D, strip, c, [&](int at, bool there, long long e) {
        if (there) factors[e] = lines[at];
      });
    }
}

}  // namespace glf::device
