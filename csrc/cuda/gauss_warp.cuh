// Determinant and inverse of matrices up to 64 × 64 by Gauss-Jordan elimination in place: a row, or two, in each lane's
// registers, up to eight matrices in a warp. Rows never move: each knows its position in P A, and exchanging two is
// exchanging two positions.
//
// The transpose is inverted: a lane's row is a column in memory, so that neighbouring lanes read and write neighbours. Each
// step does the same to all columns and turns them one further, so that one loop body serves all steps: after step k, a[j]
// is column k + 1 + j of A, and of the inverse from where A's columns end. 2 D³ operations, those of the inverse alone.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// Lanes that share a matrix of up to N columns, and rows that each of them holds.
template <int N>
inline constexpr int lanes_of = N <= 4 ? 4 : N <= 8 ? 8 : N <= 16 ? 16 : 32;
template <int N>
inline constexpr int rows_of = (N + 31) / 32;

// Matrices [first, first + 32 / lanes_of<N>) of `count`, each (D, D) with D ≤ N; padded with zeros.
template <int N, class T>
GLF_DEVICE void slogdet_inverse_warp(long long first, long long count, int D, const T* A, T* sign, T* logabsdet,
                                     T* inverse, int* info) {
  constexpr int L = lanes_of<N>, R = rows_of<N>;
  Lane<T> a[R][N];
  Lane<int> position[R];
  Lane<int> zero_at(0);
  Lane<T> s(T(1)), log_sum(T(0));
  const Lane<int> lane = lane_index();
  on_lanes([&](int l) {
    const long long n = first + l / L < count ? first + l / L : count - 1;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = l % L + 32 * r;
      of_lane(position[r], l) = row;
#pragma unroll
      for (int j = 0; j < N; ++j) of_lane(a[r][j], l) = row < D && j < D ? A[(n * D + j) * D + row] : T(0);
    }
  });

#pragma unroll 1
  for (int k = 0; k < D; ++k) {
    // The largest entry at positions k …, the first of equals. NaN wins where it stands, and is never chosen elsewhere.
    Lane<T> size(T(-2));
    Lane<int> who(0), where(0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Lane<T> value = magnitude(a[r][0]);
      Lane<T> here = select(position[r] >= k && value == value, value, Lane<T>(T(-1)));
      here = select(position[r] == k && value != value, Lane<T>(infinity<T>()), here);
      const Lane<bool> better = here > size || (here == size && position[r] < where);
      size = select(better, here, size);
      where = select(better, position[r], where);
      who = select(better, lane + 32 * r, who);
    }
#pragma unroll
    for (int step = L / 2; step; step /= 2) {
      const Lane<T> other_size = shuffle_xor(size, step);
      const Lane<int> other_where = shuffle_xor(where, step), other_who = shuffle_xor(who, step);
      const Lane<bool> better = other_size > size || (other_size == size && other_where < where);
      size = select(better, other_size, size);
      where = select(better, other_where, where);
      who = select(better, other_who, who);
    }
    const Lane<int> owner = who % 32;
    // Entry j of the pivot's row, to all lanes of its matrix.
    const auto from_pivot = [&](int j) {
      Lane<T> x = a[0][j];
#pragma unroll
      for (int r = 1; r < R; ++r) x = select(who >= 32 * r, a[r][j], x);
      return shuffle(x, owner);
    };
    const Lane<T> pivot = from_pivot(0);
    const Lane<bool> zero = pivot == T(0);
    s = s * select(where == k, Lane<T>(T(1)), Lane<T>(T(-1)));
    s = s * select(pivot > T(0), Lane<T>(T(1)), select(pivot < T(0), Lane<T>(T(-1)), Lane<T>(T(0))));
    log_sum = log_sum + lane_log(magnitude(pivot));
    zero_at = select(zero && zero_at == 0, Lane<int>(k + 1), zero_at);

    // Other rows lose f times the pivot's, which becomes itself over the pivot: nothing plus −f times it.
    Lane<T> f[R];
    Lane<bool> chosen[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      chosen[r] = lane + 32 * r == who;
      position[r] = select(chosen[r], Lane<int>(k), select(position[r] == k, where, position[r]));
      f[r] = select(chosen[r], Lane<T>(T(-1)) / pivot, a[r][0] / select(zero, Lane<T>(T(1)), pivot));
    }
#pragma unroll
    for (int j = 1; j < N; ++j) {
      const Lane<T> p = from_pivot(j);
#pragma unroll
      for (int r = 0; r < R; ++r) a[r][j - 1] = select(chosen[r], Lane<T>(T(0)), a[r][j]) - f[r] * p;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) a[r][N - 1] = Lane<T>(T(0)) - f[r];
  }

  on_lanes([&](int l) {
    const long long n = first + l / L;
    if (n >= count || l % L) return;
    sign[n] = of_lane(s, l);
    logabsdet[n] = of_lane(log_sum, l);
    info[n] = of_lane(zero_at, l);
  });
  // Column j of the result belongs to the row that came to position j.
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int column = j - (N - D);
    Lane<int> row = lane_where<L>(position[0] == column) % L;
#pragma unroll
    for (int r = 1; r < R; ++r) row = select(any<L>(position[r] == column), lane_where<L>(position[r] == column) + 32 * r, row);
    on_lanes([&](int l) {
      const long long n = first + l / L;
      if (n >= count || column < 0) return;
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (of_lane(position[r], l) < D) inverse[(n * D + of_lane(row, l)) * D + of_lane(position[r], l)] = of_lane(a[r][j], l);
    });
  }
}

}  // namespace glf::device
