// Determinant and inverse of matrices up to 192 × 192 by Gauss-Jordan elimination in place, one block a matrix: 16 × 16
// threads hold M × M entries each in registers, rows and columns 16 apart. Each step passes a column and a row through shared
// memory, with two barriers. The rest is that of gauss_warp.cuh: the transpose is inverted, rows keep their place.
#pragma once

#include "lanes.cuh"

namespace glf::device {

inline constexpr int tile_side = 16;

template <int M, class T>
struct TileEntries {
  T a[M][M];  // rows thread % 16 + 16 r, columns thread / 16 + 16 c
};

template <int M, class T>
inline constexpr int tile_bytes = tile_side * M * static_cast<int>(3 * sizeof(T) + 2 * sizeof(int));

template <int M, class T>
GLF_DEVICE void slogdet_inverse_tile(const Block& block, int D, const T* A, T* sign, T* logabsdet, T* inverse, int* info,
                                     unsigned char* shared) {
  constexpr int N = tile_side * M;
  T *column = reinterpret_cast<T*>(shared), *factor = column + N, *row = factor + N;
  int *position = reinterpret_cast<int*>(row + N), *order = position + N;
  PerThread<TileEntries<M, T>> tile;
  block.each(N, [&](int i) { position[i] = i; });
  block.threads(tile, [&](int t, TileEntries<M, T>& own) {
#pragma unroll
    for (int c = 0; c < M; ++c)
#pragma unroll
      for (int r = 0; r < M; ++r) {
        const int i = t % tile_side + tile_side * r, j = t / tile_side + tile_side * c;
        own.a[r][c] = i < D && j < D ? A[j * D + i] : T(0);
      }
  });
  T s = 1, log_sum = 0;
  int zero_at = 0;
  // Each row i loses f times the pivot's row, p. The pivot's row and column k were set to zero and p's entry k to one, so that
  // the same makes them the pivot's row over the pivot (its f is −1 over it), and −f.
  for (int k = 0; k < D; ++k) {
    const int owner = k % tile_side;
    // Registers have no index: entries are selected by a bit. By a comparison, c == k / 16, the compiler would put k / 16 in
    // the place of c, and with it the tile into memory (nvcc 13.0).
    const unsigned at = 1u << k / tile_side;
    block.threads(tile, [&](int t, TileEntries<M, T>& own) {
      if (t / tile_side == owner)
#pragma unroll
        for (int r = 0; r < M; ++r) {
          T x = own.a[r][0];
#pragma unroll
          for (int c = 0; c < M; ++c) {
            x = at >> c & 1 ? own.a[r][c] : x;
            own.a[r][c] = at >> c & 1 ? T(0) : own.a[r][c];
          }
          column[t % tile_side + tile_side * r] = x;
        }
    });
    // The largest entry at positions k …, the first of equals. NaN wins where it stands, and is never chosen elsewhere.
    const auto size = [&](int i) {
      const T here = magnitude(column[i]);
      if (here == here) return position[i] >= k ? here : T(-1);
      return position[i] == k ? infinity<T>() : T(-1);
    };
    const int who = block.first_largest(D, size, [&](int i) { return position[i]; });
    const int where = position[who];
    const unsigned chosen = 1u << who / tile_side;
    const T pivot = column[who];
    if (where != k) s = -s;
    s *= pivot > 0 ? T(1) : pivot < 0 ? T(-1) : T(0);
    log_sum += natural_log(magnitude(pivot));
    if (pivot == 0 && !zero_at) zero_at = k + 1;
    block.threads(tile, [&](int t, TileEntries<M, T>& own) {
      if (t < N) factor[t] = t == who ? T(-1) / pivot : column[t] / (pivot == 0 ? T(1) : pivot);
      if (t % tile_side == who % tile_side)
#pragma unroll
        for (int c = 0; c < M; ++c) {
          T x = own.a[0][c];
#pragma unroll
          for (int r = 0; r < M; ++r) {
            x = chosen >> r & 1 ? own.a[r][c] : x;
            own.a[r][c] = chosen >> r & 1 ? T(0) : own.a[r][c];
          }
          const int j = t / tile_side + tile_side * c;
          row[j] = j == k ? T(1) : x;
        }
    });
    // No barriers: positions are read again after the next one, and a tile is its thread's alone.
    block.each_unguarded(D, [&](int i) { position[i] = i == who ? k : position[i] == k ? where : position[i]; });
    block.threads_unguarded(tile, [&](int t, TileEntries<M, T>& own) {
      T p[M];
#pragma unroll
      for (int c = 0; c < M; ++c) p[c] = row[t / tile_side + tile_side * c];
#pragma unroll
      for (int r = 0; r < M; ++r) {
        const T f = factor[t % tile_side + tile_side * r];
#pragma unroll
        for (int c = 0; c < M; ++c) own.a[r][c] -= f * p[c];
      }
    });
  }
  block.each(0, [](int) {});
  block.each(1, [&](int) {
    *sign = s;
    *logabsdet = log_sum;
    *info = zero_at;
  });
  block.each(D, [&](int i) { order[position[i]] = i; });
  block.threads(tile, [&](int t, TileEntries<M, T>& own) {
#pragma unroll
    for (int c = 0; c < M; ++c)
#pragma unroll
      for (int r = 0; r < M; ++r) {
        const int i = t % tile_side + tile_side * r, j = t / tile_side + tile_side * c;
        if (i < D && j < D) inverse[order[j] * D + position[i]] = own.a[r][c];
      }
  });
}

}  // namespace glf::device
