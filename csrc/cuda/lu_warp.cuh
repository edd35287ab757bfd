// Determinant and inverse of matrices up to 32 × 32: a row in each lane's registers, 32/N matrices in a warp. Rows never
// move: each knows its position in P A, and exchanging two is exchanging two positions.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// Matrices [first, first + 32/N) of `count`, each (D, D) with D ≤ N; padded to N with rows of the identity.
template <int N, class T>
GLF_DEVICE void slogdet_inverse_warp(long long first, long long count, int D, const T* A, T* sign, T* logabsdet,
                                     T* inverse, int* info) {
  Lane<T> a[N], x[N];
  Lane<int> position, zero_at(0);
  Lane<T> s(T(1)), log_sum(T(0));
  const Lane<int> lane = lane_index();
  on_lanes([&](int l) {
    const int row = l % N;
    const long long n = first + l / N < count ? first + l / N : count - 1;
    of_lane(position, l) = row;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      of_lane(a[j], l) = row < D && j < D ? A[(n * D + row) * D + j] : T(row == j);
      of_lane(x[j], l) = T(row == j);
    }
  });

  // Elimination on [A | I]: afterwards a holds U, and x = L⁻¹ P.
#pragma unroll
  for (int k = 0; k < N; ++k) {
    // The largest entry at positions k …, the first of equals. NaN wins where it stands, and is never chosen elsewhere.
    const Lane<T> here = magnitude(a[k]);
    Lane<T> size = select(position >= k && here == here, here, Lane<T>(T(-1)));
    size = select(position == k && here != here, Lane<T>(T(1) / T(0)), size);
    Lane<int> who = lane, where = position;
#pragma unroll
    for (int step = N / 2; step; step /= 2) {
      const Lane<T> other_size = shuffle_xor(size, step);
      const Lane<int> other_where = shuffle_xor(where, step), other_who = shuffle_xor(who, step);
      const Lane<bool> better = other_size > size || (other_size == size && other_where < where);
      size = select(better, other_size, size);
      where = select(better, other_where, where);
      who = select(better, other_who, who);
    }
    position = select(lane == who, Lane<int>(k), select(position == k, where, position));
    const Lane<T> pivot = shuffle(a[k], who);
    const Lane<bool> zero = pivot == T(0);
    s = s * select(where == k, Lane<T>(T(1)), Lane<T>(T(-1)));
    s = s * select(pivot > T(0), Lane<T>(T(1)), select(pivot < T(0), Lane<T>(T(-1)), Lane<T>(T(0))));
    log_sum = log_sum + lane_log(magnitude(pivot));
    zero_at = select(zero && zero_at == 0, Lane<int>(k + 1), zero_at);
    const Lane<T> f = select(position > k, a[k] / select(zero, Lane<T>(T(1)), pivot), Lane<T>(T(0)));
#pragma unroll
    for (int j = k + 1; j < N; ++j) a[j] = a[j] - f * shuffle(a[j], who);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = x[j] - f * shuffle(x[j], who);
  }

  // x = U⁻¹ x, from the last position up.
#pragma unroll
  for (int k = N - 1; k >= 0; --k) {
    const Lane<int> who = lane_where<N>(position == k);
    const Lane<T> reciprocal = Lane<T>(T(1)) / shuffle(a[k], who);
    const Lane<T> f = select(position < k, a[k], Lane<T>(T(0)));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Lane<T> solved = shuffle(x[j], who) * reciprocal;
      x[j] = select(position == k, solved, x[j] - f * solved);
    }
  }

  on_lanes([&](int l) {
    const long long n = first + l / N;
    const int row = of_lane(position, l);
    if (n >= count) return;
    if (l % N == 0) {
      sign[n] = of_lane(s, l);
      logabsdet[n] = of_lane(log_sum, l);
      info[n] = of_lane(zero_at, l);
    }
    if (row >= D) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < D) inverse[(n * D + row) * D + j] = of_lane(x[j], l);
  });
}

}  // namespace glf::device
