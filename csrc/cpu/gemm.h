// Matrix products of one row tile, all through the one microkernel.
#pragma once

#include "microkernel.h"
#include "transpose.h"

namespace glf::GLF_ISA {

// Rows of a register block. 2 × 8 accumulators reach 245 of Zen 5's 250 GFLOP/s with 32 registers (12 rows: 240);
// with 16 registers 8 rows spill (73 instead of 120 GFLOP/s).
#if GLF_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int MR = 8;
#else
inline constexpr int MR = 6;
#endif

// Vectors in a panel of B.
inline constexpr int NR = 2;

// One register block: C (MR_ × cols) = bias (or 0) + A B, or C += A B when `accumulate`.
template <class T, int MR_, int NV>
__attribute__((noinline)) void block(idx K, const T* a, idx a_m, idx a_k, const T* b, idx b_k, T* c, idx c_m, idx cols,
                                     const T* bias, bool accumulate) {
  constexpr idx L = lanes<T>;
  // Whole vectors apart from parts, and the branches outside the loop over K: 2 % where K is some 50.
  const bool whole = cols >= NV * L;
  // What C holds comes from far away; it is added last, when it has arrived: 8 % of a backward at D = 64, H = 256 (Zen 3).
  if (accumulate)
    for (int m = 0; m < MR_; ++m) __builtin_prefetch(c + m * c_m, 1);
  // Loops that are unrolled early, so that the accumulators are registers from the start and not an array on the stack.
  vec<T> acc[MR_][NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const vec<T> start = bias ? load_part(bias + v * L, cols - v * L) : vec<T>{};
#pragma GCC unroll 16
    for (int m = 0; m < MR_; ++m) acc[m][v] = start;
  }
  microkernel<T, MR_, NV>(K, a, a_m, a_k, b, b_k, acc);
  if (whole) {
#pragma GCC unroll 16
    for (int m = 0; m < MR_; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        T* to = c + m * c_m + v * L;
        store(to, accumulate ? acc[m][v] + load(to) : acc[m][v]);
      }
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < MR_; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        T* to = c + m * c_m + v * L;
        store_part(to, accumulate ? acc[m][v] + load_part(to, cols - v * L) : acc[m][v], cols - v * L);
      }
  }
}

template <class T>
using Block = void (*)(idx, const T*, idx, idx, const T*, idx, T*, idx, idx, const T*, bool);

template <class T, int NV, int... M>
inline Block<T> pick(idx rows, std::integer_sequence<int, M...>) {
  static constexpr Block<T> table[] = {block<T, M + 1, NV>...};
  return table[rows - 1];
}

// The block for `rows` ≤ MR rows and 1, 2, 4 or 8 vectors; the wide ones exist for few rows.
template <class T>
inline Block<T> pick_block(idx rows, idx vectors) {
  if (vectors == 1) return pick<T, 1>(rows, std::make_integer_sequence<int, MR>{});
  if (vectors == 2) return pick<T, 2>(rows, std::make_integer_sequence<int, MR>{});
  if (vectors == 4) return pick<T, 4>(rows, std::make_integer_sequence<int, MR == 8 ? 4 : 2>{});
  return pick<T, 8>(rows, std::make_integer_sequence<int, MR == 8 ? 2 : 1>{});
}

// Rows of the next block where `left` rows are split evenly into the fewest blocks: 50 as 8 · 6 + 2 would end with a block of 4
// accumulators, which waits for the latency of its sums.
inline idx even_rows(idx left) {
  const idx blocks = (left + MR - 1) / MR;
  return (left + blocks - 1) / blocks;
}

// Widest block whose accumulators fit the registers.
inline idx widest(idx rows) {
  if (rows <= (MR == 8 ? 2 : 1)) return 8;
  if (rows <= (MR == 8 ? 4 : 2)) return 4;
  return NR;
}

// Columns [j, j + NR vectors) of a row-major matrix (K, …), zero-padded, in consecutive rows.
template <class T>
inline void pack(const T* b, idx ld, idx K, idx cols, T* panel) {
  constexpr idx L = lanes<T>, W = NR * L;
  if (cols == W) {
    for (idx k = 0; k < K; ++k)
      for (int v = 0; v < NR; ++v) store(panel + k * W + v * L, load(b + k * ld + v * L));
  } else {
    for (idx k = 0; k < K; ++k)
      for (int v = 0; v < NR; ++v) store(panel + k * W + v * L, load_part(b + k * ld + v * L, cols - v * L));
  }
}

// The same panel of the transpose of a row-major matrix (…, K): rows j … of it become columns.
template <class T>
inline void pack_transposed(const T* b, idx ld, idx K, idx cols, T* panel) {
  constexpr idx L = lanes<T>, W = NR * L;
  for (int v = 0; v < NR; ++v)
    for (idx k = 0; k < K; k += L) {
      vec<T> square[L];
      for (idx j = 0; j < L; ++j)
        square[j] = v * L + j < cols ? load_part(b + (v * L + j) * ld + k, K - k) : vec<T>{};
      transpose<T>(square);
      for (idx i = 0; i < L && k + i < K; ++i) store(panel + (k + i) * W + v * L, square[i]);
    }
}

struct Nothing {
  template <class T>
  void operator()(T*, idx, idx, idx, idx) const {}
};

// Columns [begin, end) of C (M, N) = bias + A B for M ≤ MR and end − begin ≥ a vector. B (K, N) is read in place.
template <class T>
void multiply_few(idx M, idx begin, idx end, idx N, idx K, const T* a, idx a_m, const T* b, T* c, idx c_m, const T* bias) {
  constexpr idx L = lanes<T>;
  for (idx j = begin; j < end;) {
    idx vectors = widest(M);
    while (vectors > 1 && end - j < vectors * L) vectors /= 2;
    // The last vector overlaps the one before it instead of reading past the row: it computes the same numbers.
    const idx at = end - j < L ? end - L : j;
    pick_block<T>(M, vectors)(K, a, a_m, 1, b + at, N, c + at, c_m, vectors * L, bias ? bias + at : nullptr, false);
    j = at + vectors * L;
  }
}

// C (M, N) = bias + A B with row-major B (K, N), or B = wᵀ with w (N, K) when `transposed`.
// Panels of B are copied to L1 as they stream in, once per tile, which needs no shared packed copy; transposing
// them takes 5 % of a training pass at 128 rows and D = 64, H = 256. Up to MR rows nothing would be reused, and B is read in place.
// `after(c, row, column, rows, columns)` is called on finished blocks while they are in L1. With `accumulate`, C += A B.
template <class T, class After = Nothing>
void multiply(idx M, idx N, idx K, const T* a, idx a_m, const T* b, bool transposed, T* c, idx c_m, const T* bias,
              T* panel, const After& after = {}, bool accumulate = false) {
  constexpr idx L = lanes<T>, W = NR * L;
  if (M == 0) return;
  if (M <= MR && !transposed && !accumulate && N >= L) {
    multiply_few(M, 0, N, N, K, a, a_m, b, c, c_m, bias);
    after(c, 0, 0, M, N);
    return;
  }
  for (idx j = 0; j < N; j += W) {
    const idx cols = N - j < W ? N - j : W;
    if (transposed)
      pack_transposed(b + j * K, K, K, cols, panel);
    else
      pack(b + j, N, K, cols, panel);
    for (idx m = 0; m < M; m += MR) {
      const idx rows = M - m < MR ? M - m : MR;
      pick_block<T>(rows, cols > L ? NR : 1)(K, a + m * a_m, a_m, 1, panel, W, c + m * c_m + j, c_m, cols,
                                             bias ? bias + j : nullptr, accumulate);
      after(c + m * c_m + j, m, j, rows, cols);
    }
  }
}

// G (N₁, N₂) = or += Xᵀ Y over M rows: a weight's gradient. Rows of Y must be readable to a whole vector.
template <class T>
void outer_sum(idx M, idx N1, idx N2, const T* x, idx x_m, const T* y, idx y_m, T* g, bool accumulate) {
  constexpr idx L = lanes<T>, W = NR * L;
  for (idx j = 0; j < N2; j += W) {
    const idx cols = N2 - j < W ? N2 - j : W;
    for (idx i = 0; i < N1; i += MR) {
      const idx rows = N1 - i < MR ? N1 - i : MR;
      pick_block<T>(rows, cols > L ? NR : 1)(M, x + i, 1, x_m, y + j, y_m, g + i * N2 + j, N2, cols, nullptr, accumulate);
    }
  }
}

// g (N) = or += sign · Σ over M rows of y: a bias's gradient.
template <class T>
void column_sum(idx M, idx N, T sign, const T* y, idx y_m, T* g, bool accumulate) {
  for (idx j = 0; j < N; j += lanes<T>) {
    vec<T> sum{};
    for (idx m = 0; m < M; ++m) sum += load(y + m * y_m + j);
    sum *= sign;
    store_part(g + j, accumulate ? sum + load_part(g + j, N - j) : sum, N - j);
  }
}

}  // namespace glf::GLF_ISA
