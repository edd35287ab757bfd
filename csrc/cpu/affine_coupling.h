// The elementwise operation `affine_coupling` on samples of n channels, or of pixels of them, for couplings with any
// conditioner.
#pragma once

#include "coupling.h"
#include "tile.h"

namespace glf::GLF_ISA {

// Elements that channels of several pixels are brought together in: four operands of 4 KB stay in L1.
inline constexpr idx packed = 1024;

// Channels of `pixels` pixels in one piece: where they are, or copied to `room`, since a vector of a few of n = 6 channels
// would be mostly empty. The last vector of a pixel writes too far; the next pixel writes over it.
template <class T>
const T* together(Channels<T> x, idx sample, idx pixel, idx pixels, idx n, T* room) {
  const T* from = x.data + sample * x.sample + pixel * x.pixel;
  if (pixels == 1 || x.pixel == n) return from;
  for (idx p = 0; p < pixels; ++p)
    for (idx j = 0; j < n; j += lanes<T>) store(room + p * n + j, load_part(from + p * x.pixel + j, n - j));
  return room;
}

// Runs f(first sample, first pixel, samples, n, v, u, t) over the batch, in equal parts for the threads: for many samples of
// one pixel, or for some pixels of one sample, whose n channels then are one row.
template <class T, class F>
void over_pieces(idx batch, idx pixels, idx n, Channels<T> v, Channels<T> u, Channels<T> t, const Parallel& parallel, F f) {
  if (pixels * n == 0 || (v.pixel == n && u.pixel == n && t.pixel == n)) n *= std::exchange(pixels, 1);
  // A thread is woken for at least 8,192 elements.
  const idx work = batch * pixels * n;
  const int threads = static_cast<int>(std::clamp<idx>(std::min<idx>(batch, work >> 13), 1, parallel.threads));
  const idx part = (batch + threads - 1) / threads;
  in_parallel(parallel, threads, [&](int thread) {
    const idx first = std::min(batch, thread * part), end = std::min(batch, first + part);
    const auto rows_of = [=](Channels<T> x) { return Rows<const T>{x.data + first * x.sample, x.sample}; };
    if (pixels == 1) return f(first, idx{0}, end - first, n, rows_of(v), rows_of(u), rows_of(t));
    alignas(64) T room[3][packed + lanes<T>];
    const idx most = std::max<idx>(packed / n, 1);
    for (idx i = first; i < end; ++i)
      for (idx p = 0; p < pixels; p += most) {
        const idx some = std::min(most, pixels - p);
        const auto row_of = [=](Channels<T> x, T* to) { return Rows<const T>{together(x, i, p, some, n, to), 0}; };
        f(i, p, idx{1}, some * n, row_of(v, room[0]), row_of(u, room[1]), row_of(t, room[2]));
      }
  });
}

template <class T>
void coupling(const Coupling<T>& op, Int batch, Int pixels, Int n, Channels<T> v, Channels<T> u, Channels<T> t, T* w,
              T* logdet, const Parallel& parallel) {
  const idx sample = pixels * n;
  over_pieces(batch, pixels, n, v, u, t, parallel,
              [&](idx i, idx pixel, idx samples, idx cols, Rows<const T> v, Rows<const T> u, Rows<const T> t) {
                couple_rows<T>(op, samples, cols, v, u, t, {w + i * sample + pixel * n, sample}, logdet + i, pixel > 0);
              });
}

template <class T>
void coupling_backward(const Coupling<T>& op, Int batch, Int pixels, Int n, Channels<T> v, Channels<T> u, Channels<T> t,
                       const T* grad_w, const T* grad_logdet, T* grad_v, T* grad_u, T* grad_t,
                       const Parallel& parallel) {
  const idx sample = pixels * n;
  over_pieces(batch, pixels, n, v, u, t, parallel,
              [&](idx i, idx pixel, idx samples, idx cols, Rows<const T> v, Rows<const T> u, Rows<const T> t) {
                const idx at = i * sample + pixel * n;
                couple_rows_backward<T>(op, samples, cols, v, u, t, {grad_w + at, sample}, grad_logdet + i,
                                        {grad_v + at, sample}, {grad_u + at, sample}, {grad_t + at, sample});
              });
}

}  // namespace glf::GLF_ISA
