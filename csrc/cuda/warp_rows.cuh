// Matrices up to 64 × 64 in the registers of a warp: a row, or two, in each lane, up to eight matrices side by side. Rows never
// move: each knows its position in P A, and exchanging two is exchanging two positions. Registers have no index, so each
// step of an elimination turns all columns one further: column k is entry 0 at step k, and one loop body serves all steps.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// Lanes that share a matrix of up to N columns, and rows that each of them holds.
template <int N>
inline constexpr int lanes_of = N <= 4 ? 4 : N <= 8 ? 8 : N <= 16 ? 16 : 32;
template <int N>
inline constexpr int rows_of = (N + 31) / 32;

template <int N, class T>
struct WarpRows {
  static constexpr int L = lanes_of<N>, R = rows_of<N>;
  Lane<T> a[R][N];
  Lane<int> position[R];
  // The pivot of step k: its row, as lane + 32 r, where it was, and what it is.
  Lane<int> who, where;
  Lane<T> pivot;
  Lane<bool> zero, chosen[R];
  Lane<int> zero_at{0};  // the first zero pivot, from 1: LAPACK's info

  // Finds the largest entry at positions k …, the first of equals, and exchanges the positions. NaN wins where it stands, and
  // is never chosen elsewhere.
  GLF_DEVICE void exchange(int k) {
    const Lane<int> lane = lane_index();
    Lane<T> size(T(-2));
    who = where = Lane<int>(0);
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
    pivot = from_pivot(0);
    zero = pivot == T(0);
    zero_at = select(zero && zero_at == 0, Lane<int>(k + 1), zero_at);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      chosen[r] = lane + 32 * r == who;
      position[r] = select(chosen[r], Lane<int>(k), select(position[r] == k, where, position[r]));
    }
  }

  // Entry j of the pivot's row, to all lanes of its matrix.
  GLF_DEVICE Lane<T> from_pivot(int j) const {
    Lane<T> x = a[0][j];
#pragma unroll
    for (int r = 1; r < R; ++r) x = select(who >= 32 * r, a[r][j], x);
    return shuffle(x, who % 32);
  }
};

}  // namespace glf::device
