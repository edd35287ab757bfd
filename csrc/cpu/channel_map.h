// y = x A + c over rows of channels (a 1 × 1 convolution, channels last in memory), or (x − c) A for the inverse: a read of x and a
// write of y. A library's product with so few columns, and its backward in three passes, take four times as long: 482 µs of
// 6,272 rows of 4 (Zen 3, two threads).
#pragma once

#include "tile.h"

namespace glf::GLF_ISA {

// Rows are taken in tiles that stay in L1 for all that is done with them.
template <class T>
struct ChannelTiling {
  int threads;
  idx part, tile, width;

  ChannelTiling(idx rows, idx channels, const Parallel& parallel) {
    constexpr idx L = lanes<T>;
    // A thread is woken for at least half a million multiply-adds, or 16,384 elements.
    const idx work = std::max(rows * channels * channels >> 19, rows * channels >> 14);
    threads = static_cast<int>(std::clamp<idx>(std::min(work, rows), 1, parallel.threads));
    part = (rows + threads - 1) / threads;
    tile = std::clamp<idx>(4096 / channels, 48, 1024) / MR * MR;
    width = round_up(channels, L);
  }
  // Elements of a tile whose rows are whole vectors.
  idx room() const { return tile * width + lanes<T>; }
  static idx panel(idx channels) { return channels * NR * lanes<T>; }

  // Calls f(first row, rows, is the thread's first tile).
  template <class F>
  void each(int thread, idx rows, F f) const {
    const idx begin = std::min(rows, thread * part), end = std::min(rows, begin + part);
    for (idx row = begin; row < end; row += tile) f(row, std::min(tile, end - row), row == begin);
  }
};

// (rows, channels) → (rows, width), less c if given.
template <class T>
void widen(idx rows, idx channels, const T* x, const T* c, T* wide, idx width) {
  constexpr idx L = lanes<T>;
  for (idx m = 0; m < rows; ++m)
    for (idx j = 0; j < channels; j += L) {
      const idx left = channels - j;
      const vec<T> v = load_part(x + m * channels + j, left);
      store(wide + m * width + j, c ? v - load_part(c + j, left) : v);
    }
}

// Back: whole vectors, where they write too far the next row writes over it. A part of a vector takes 12 times as long to write (Zen 3).
template <class T>
void narrow(idx rows, idx channels, const T* wide, idx width, T* y) {
  constexpr idx L = lanes<T>;
  for (idx m = 0; m < rows; ++m)
    for (idx j = 0; j < channels; j += L) {
      const T* from = wide + m * width + j;
      T* to = y + m * channels + j;
      if (j + L <= (rows - m) * channels)
        store(to, load(from));
      else
        std::copy_n(from, channels - j, to);
    }
}

// A, or Aᵀ, with rows of whole vectors, and c behind it.
template <class T>
void widen_matrix(idx channels, const T* A, bool transposed, const T* c, T* wide, idx width) {
  std::fill_n(wide, (channels + 1) * width, T(0));
  for (idx k = 0; k < channels; ++k)
    for (idx j = 0; j < channels; ++j) wide[k * width + j] = transposed ? A[j * channels + k] : A[k * channels + j];
  if (c) std::copy_n(c, channels, wide + channels * width);
}

template <class T>
void channel_map(Int rows, Int channels, const T* x, const T* A, const T* c, bool inverse, T* y, const Parallel& parallel) {
  const ChannelTiling<T> tiling(rows, channels, parallel);
  const idx C = channels, width = tiling.width;
  const Scratch<T> matrix((C + 1) * width);
  widen_matrix(C, A, false, inverse ? nullptr : c, matrix.get(), width);
  const PerThread<T> memory(tiling.threads, {tiling.panel(C), tiling.room(), tiling.room()});
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *const panel = memory.get(thread, 0), *const less_c = memory.get(thread, 1), *const wide = memory.get(thread, 2);
    tiling.each(thread, rows, [&](idx row, idx count, bool) {
      const T* from = x + row * C;
      T* const to = width == C ? y + row * C : wide;
      if (inverse) widen(count, C, from, c, less_c, width);
      multiply<T>(count, width, C, inverse ? less_c : from, inverse ? width : C, matrix.get(), false, to, width, matrix.get() + C * width, panel);
      if (to == wide) narrow(count, C, wide, width, y + row * C);
    });
  });
}

// From ∂y to ∂x = ∂y Aᵀ, ∂A = xᵀ ∂y (of the inverse (x − c)ᵀ ∂y), ∂c = Σ ∂y (−Σ ∂x).
template <class T>
void channel_map_backward(Int rows, Int channels, const T* grad_y, const T* x, const T* A, const T* c, bool inverse, T* grad_x, T* grad_A,
                          T* grad_c, const Parallel& parallel) {
  const ChannelTiling<T> tiling(rows, channels, parallel);
  const idx C = channels, width = tiling.width;
  const Scratch<T> matrix((C + 1) * width);
  widen_matrix<T>(C, A, true, nullptr, matrix.get(), width);
  const PerThread<T> memory(tiling.threads, {tiling.panel(C), tiling.room(), tiling.room(), C * C + C});
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *const panel = memory.get(thread, 0), *const g = memory.get(thread, 1), *const wide = memory.get(thread, 2);
    T *const of_A = memory.get(thread, 3), *const of_c = of_A + C * C;
    if (thread * tiling.part >= rows) std::fill_n(of_A, C * C + C, T(0));
    tiling.each(thread, rows, [&](idx row, idx count, bool first) {
      const T* from = x + row * C;
      widen<T>(count, C, grad_y + row * C, nullptr, g, width);
      if (inverse) widen(count, C, from, c, wide, width);
      outer_sum(count, C, C, inverse ? wide : from, inverse ? width : C, g, width, of_A, !first);
      column_sum(count, C, T(1), g, width, of_c, !first);
      T* const to = width == C ? grad_x + row * C : wide;
      multiply<T>(count, width, C, g, width, matrix.get(), false, to, width, nullptr, panel);
      if (to == wide) narrow(count, C, wide, width, grad_x + row * C);
    });
  });
  T* const sum = memory.get(0, 3);
  for (int thread = 1; thread < tiling.threads; ++thread)
    for (idx i = 0; i < C * C + C; ++i) sum[i] += memory.get(thread, 3)[i];
  std::copy_n(sum, C * C, grad_A);
  for (idx i = 0; i < C; ++i) {
    T of_x = 0;
    for (idx j = 0; j < C; ++j) of_x += A[i * C + j] * sum[C * C + j];
    grad_c[i] = inverse ? -of_x : sum[C * C + i];
  }
}

}  // namespace glf::GLF_ISA
