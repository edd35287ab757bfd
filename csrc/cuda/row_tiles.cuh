// Sixteen rows of a warp in the results of matrix units, which are the next product's left factor as they lie.
//
// Lane (g, t) holds of a tile of 8 columns the numbers at columns 2t and 2t + 1 of rows g and g + 8. As the left factor of a
// tf32 product it would need columns t and t + 4; so the inner index is permuted, 2t for t and 2t + 1 for t + 4, in the packed
// weights too, and nothing moves between lanes. Of a bf16 product two tiles side by side are the left factor in their order.
//
// Weights lie in blocks of 512 bytes: 16 bytes a lane, which one load brings, are its part of 8 columns and `depth` rows.
#pragma once

#include "mma.cuh"

namespace glf::device {

// Of the operands of a product. tf32x3 is float32: three tf32 products of numbers that are split in two.
enum class Precision : int { tf32x3, tf32, bf16 };

#ifdef __CUDACC__
GLF_DEVICE Word bits_of(float x) { return __float_as_uint(x); }
#endif

struct alignas(16) Quad {
  Word x, y, z, w;
};

struct alignas(8) Pair {
  float first, second;
};

inline constexpr int block_quads = 32;

// Rows of a weight in a block.
GLF_DEVICE_AND_HOST constexpr int depth_of(Precision p) { return p == Precision::tf32x3 ? 8 : p == Precision::tf32 ? 16 : 32; }
// 16-byte pieces of a packed weight of so many rows, and columns in tiles of 8.
GLF_DEVICE_AND_HOST constexpr int packed_quads(Precision p, int rows, int column_tiles) {
  return (rows + depth_of(p) - 1) / depth_of(p) * column_tiles * block_quads;
}

template <int N>
struct Rows {
  static constexpr int tiles = N;
  Lane<float> c[N][4];
};

// f(number, row, column) for all numbers of tiles, each where it lies.
template <int N, class F>
GLF_DEVICE void each_number(Rows<N>& rows, F f) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(of_lane(rows.c[i][e], lane), lane / 4 + e / 2 * 8, 8 * i + lane % 4 * 2 + e % 2);
  });
}

// f(number of a, number of b) for all numbers that lie at the same place.
template <int N, class F>
GLF_DEVICE void each_pair(Rows<N>& a, Rows<N>& b, F f) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(of_lane(a.c[i][e], lane), of_lane(b.c[i][e], lane));
  });
}

template <int N>
GLF_DEVICE void clear(Rows<N>& rows) {
  each_number(rows, [](float& x, int, int) { x = 0; });
}

// The same vector in every row, read from shared memory.
template <int N>
GLF_DEVICE void fill(Rows<N>& rows, const float* vector) {
  each_number(rows, [&](float& x, int, int column) { x = vector[column]; });
}

// Each lane's 16 bytes of a block.
struct Block16 {
  Lane<Word> x, y, z, w;
};
GLF_DEVICE Block16 load_block(const Quad* block) {
  Block16 b;
  on_lanes([&](int lane) {
    const Quad q = block[lane];
    of_lane(b.x, lane) = q.x;
    of_lane(b.y, lane) = q.y;
    of_lane(b.z, lane) = q.z;
    of_lane(b.w, lane) = q.w;
  });
  return b;
}

// The left factor of one instruction: a tile of tf32 numbers, or two of bf16 numbers, of which the second may be missing.
template <Precision p, int M>
GLF_DEVICE void operand(Lane<Word> (&a)[4], const Rows<M>& rows, int step) {
  if constexpr (p == Precision::bf16) {
    a[0] = bf16_pair(rows.c[2 * step][0], rows.c[2 * step][1]);
    a[1] = bf16_pair(rows.c[2 * step][2], rows.c[2 * step][3]);
    if (2 * step + 1 < M) {
      a[2] = bf16_pair(rows.c[2 * step + 1][0], rows.c[2 * step + 1][1]);
      a[3] = bf16_pair(rows.c[2 * step + 1][2], rows.c[2 * step + 1][3]);
    } else {
      a[2] = a[3] = Lane<Word>(Word(0));
    }
  } else {
    a[0] = round_tf32(rows.c[step][0]);
    a[1] = round_tf32(rows.c[step][2]);
    a[2] = round_tf32(rows.c[step][1]);
    a[3] = round_tf32(rows.c[step][3]);
  }
}

template <Precision p>
GLF_DEVICE void multiply(Lane<float> (&c)[4], const Lane<Word> (&a)[4], const Lane<Word>& b0, const Lane<Word>& b1) {
  if constexpr (p == Precision::bf16)
    mma_bf16(c, a, b0, b1);
  else
    mma_tf32(c, a, b0, b1);
}

// sum [16, 8 N] += rows [16, 8 M] · weight, packed as above, in shared memory: N of its `across` tiles of columns.
template <Precision p, int M, int N>
GLF_DEVICE void product(Rows<N>& sum, const Rows<M>& rows, const Quad* weight, int across = N) {
  if constexpr (p == Precision::tf32x3) {
    // Matrix units truncate their sums. The small terms have a sum of their own, so that the large ones are truncated M times
    // and not 3 M times.
    Rows<N> small;
    clear(small);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      Lane<Word> high[4], low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) split_tf32(rows.c[j][e / 2 + e % 2 * 2], high[e], low[e]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Block16 b = load_block(weight + (j * across + i) * block_quads);
        mma_tf32(small.c[i], low, b.x, b.y);
        mma_tf32(small.c[i], high, b.z, b.w);
        mma_tf32(sum.c[i], high, b.x, b.y);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.c[i][e] = sum.c[i][e] + small.c[i][e];
  } else {
    constexpr int steps = p == Precision::bf16 ? (M + 1) / 2 : M;
#pragma unroll
    for (int j = 0; j < (steps + 1) / 2; ++j) {
      Lane<Word> first[4], second[4];
      operand<p>(first, rows, 2 * j);
      if (2 * j + 1 < steps) operand<p>(second, rows, 2 * j + 1);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Block16 b = load_block(weight + (j * across + i) * block_quads);
        multiply<p>(sum.c[i], first, b.x, b.y);
        if (2 * j + 1 < steps) multiply<p>(sum.c[i], second, b.z, b.w);
      }
    }
  }
}

// -- rows in memory ----------------------------------------------------------------------------------------------------

// Sixteen rows from `first` on, of which `live` exist.
struct RowRange {
  long long first;
  int live;
};

// f(lane, half, row, column): each lane's two rows, and its first column of a tile. What a lane then reads or writes lies at
// distances from one address that are known when the code is compiled.
template <class F>
GLF_DEVICE void each_row(F f) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(lane, half, lane / 4 + 8 * half, lane % 4 * 2);
  });
}

// Columns of a matrix in memory whose rows are `stride` numbers apart: those of a tile from `start` on, fewer than `end`.
template <int N>
GLF_DEVICE void load_columns(Rows<N>& rows, const float* first_row, int live, int stride, int start, int end) {
  each_row([&](int lane, int half, int row, int column) {
    const float* from = first_row + row * stride + start + column;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        of_lane(rows.c[i][2 * half + e], lane) = row < live && start + 8 * i + column + e < end ? from[8 * i + e] : 0.0f;
  });
}

// Halves p and v, N / 2 tiles each, which lie side by side without padding in rows of `dim` numbers.
template <int N>
GLF_DEVICE void load_halves(Rows<N>& rows, const float* first_row, int live, int dim) {
  const int passive = dim - dim / 2;
  each_row([&](int lane, int half, int row, int column) {
    const float* from = first_row + row * dim + column;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 8 * i + e;
        of_lane(rows.c[i][2 * half + e], lane) = row < live && at + column < passive ? from[at] : 0.0f;
        of_lane(rows.c[N / 2 + i][2 * half + e], lane) = row < live && at + column < dim / 2 ? from[passive + at] : 0.0f;
      }
  });
}

template <int N>
GLF_DEVICE void store_halves(Rows<N>& rows, float* first_row, int live, int dim) {
  const int passive = dim - dim / 2;
  each_row([&](int lane, int half, int row, int column) {
    float* to = first_row + row * dim + column;
    if (row >= live) return;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 8 * i + e;
        if (at + column < passive) to[at] = of_lane(rows.c[i][2 * half + e], lane);
        if (at + column < dim / 2) to[passive + at] = of_lane(rows.c[N / 2 + i][2 * half + e], lane);
      }
  });
}

// Zero in the columns that pad the halves: a row with an infinity has ∞·0 = NaN there, and would carry it into finite sums.
template <int N>
GLF_DEVICE void keep_halves(Rows<N>& rows, int dim) {
  each_number(rows, [&](float& x, int, int column) {
    if (column < 4 * N ? column >= dim - dim / 2 : column - 4 * N >= dim / 2) x = 0;
  });
}

}  // namespace glf::device
