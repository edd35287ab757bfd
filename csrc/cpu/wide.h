// Matrix products of wide layers: all threads compute one product together, each a part of its columns.
//
// A thread with rows of its own would read all weights for each of its tiles, of few rows, because records of wide layers are
// long; and it would write gradients of all weights, to be added to the other threads'. Here weights are read once for some 200
// rows, and their gradients are written once. A training pass of 4 steps of 32 columns with 2 × 1,024 units takes 11 instead of
// 26 ms with 16 rows, 39 instead of 53 with 128, 250 instead of 264 with 1,024 (Zen 3, two threads).
#pragma once

#include "tile.h"

namespace glf::GLF_ISA {

// Rows of B in a panel: it stays in L1 (16 KB of AVX2's float32) beside the blocks of A, and the same columns of A in L2.
inline constexpr idx wide_depth = 256;

// Calls part(first row, end, first column, end) for parts of a matrix of `rows` and `cols`: whole units of columns if there
// are enough of them for all threads, else of rows; the last part has what is left over. A part is half a million multiply-adds
// or more: `depth` for each element, and an activation takes as long as some 32.
template <class F>
void in_parts(const Parallel& team, idx rows, idx row_unit, idx cols, idx col_unit, idx depth, F part) {
  const bool by_columns = cols >= col_unit * 2 * team.threads || cols / col_unit >= rows / row_unit;
  const idx n = by_columns ? cols : rows, unit = by_columns ? col_unit : row_unit, units = std::max<idx>(n / unit, 1);
  // More parts than threads: a thread that comes late leaves its parts to the others.
  const idx most = team.threads == 1 ? 1 : idx{4} * team.threads;
  const idx parts = std::clamp<idx>(std::min(units, rows * cols * (depth + 32) >> 19), 1, most);
  in_parallel(team, static_cast<int>(parts), [&](int i) {
    const idx begin = i * units / parts * unit, end = i + 1 == parts ? n : (i + 1) * units / parts * unit;
    if (by_columns)
      part(0, rows, begin, end);
    else
      part(begin, end, 0, cols);
  });
}

// As multiply: C (M, N) = bias + A B, or with `accumulate` C += A B, of row-major B (K, N) or `transposed` (N, K).
template <class T, class After = Nothing>
void multiply_together(const Parallel& team, idx M, idx N, idx K, const T* a, idx a_m, const T* b, bool transposed, T* c,
                       idx c_m, const T* bias, const After& after = {}, bool accumulate = false) {
  constexpr idx L = lanes<T>, W = NR * L;
  if (M <= MR && !transposed && !accumulate && N >= L)
    return in_parts(team, M, M, N, 8 * L, K, [&](idx, idx, idx begin, idx end) {
      multiply_few(M, begin, end, N, K, a, a_m, b, c, c_m, bias);
      after(c + begin, 0, begin, M, end - begin);
    });
  in_parts(team, M, MR, N, W, K, [&](idx first, idx last, idx begin, idx end) {
    const Scratch<T> panel(std::min(K, wide_depth) * W);
    for (idx k = 0; k < K; k += wide_depth) {
      const idx depth = std::min(K - k, wide_depth);
      for (idx j = begin; j < end; j += W) {
        const idx cols = std::min(end - j, W);
        if (transposed)
          pack_transposed(b + j * K + k, K, depth, cols, panel.get());
        else
          pack(b + k * N + j, N, depth, cols, panel.get());
        for (idx m = first; m < last; m += MR) {
          const idx rows = std::min<idx>(last - m, MR);
          pick_block<T>(rows, cols > L ? NR : 1)(depth, a + m * a_m + k, a_m, 1, panel.get(), W, c + m * c_m + j, c_m, cols,
                                                 bias && k == 0 ? bias + j : nullptr, accumulate || k > 0);
          if (k + depth == K) after(c + m * c_m + j, m, j, rows, cols);
        }
      }
    }
  });
}

// As outer_sum: G (N₁, N₂) = or += Xᵀ Y over M rows. Both are packed, because rows of wide records are pages apart.
template <class T>
void outer_sum_together(const Parallel& team, idx M, idx N1, idx N2, const T* x, idx x_m, const T* y, idx y_m, T* g,
                        bool accumulate) {
  constexpr idx L = lanes<T>, W = NR * L;
  in_parts(team, N2, W, N1, MR, M, [&](idx begin, idx end, idx first, idx last) {
    const Scratch<T> panel(M * W), strips(M * round_up(last - first, MR));
    for (idx i = first; i < last; i += MR) {
      T* strip = strips.get() + (i - first) * M;
      const idx rows = std::min<idx>(last - i, MR);
      for (idx m = 0; m < M; ++m)
        for (idx r = 0; r < rows; ++r) strip[m * MR + r] = x[m * x_m + i + r];
    }
    for (idx j = begin; j < end; j += W) {
      const idx cols = std::min(end - j, W);
      pack(y + j, y_m, M, cols, panel.get());
      for (idx i = first; i < last; i += MR)
        pick_block<T>(std::min<idx>(last - i, MR), cols > L ? NR : 1)(M, strips.get() + (i - first) * M, 1, MR, panel.get(), W,
                                                                      g + i * N2 + j, N2, cols, nullptr, accumulate);
    }
  });
}

}  // namespace glf::GLF_ISA
