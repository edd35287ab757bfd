// The elementwise operation `spline`, for couplings and autoregressive flows with any conditioner.
#pragma once

#include "spline.h"
#include "tile.h"

namespace glf::GLF_ISA {

// Calls f(first row, rows) for parts of the rows, equal ones for the threads.
template <class F>
void over_rows(idx rows, idx n, const Parallel& parallel, F f) {
  // A thread is woken for at least 512 splines: some 10 µs.
  const int threads = static_cast<int>(std::clamp<idx>(std::min(rows, (rows * n) >> 9), 1, parallel.threads));
  const idx part = (rows + threads - 1) / threads;
  in_parallel(parallel, threads, [&](int thread) {
    const idx first = std::min(rows, thread * part), end = std::min(rows, first + part);
    f(first, end - first);
  });
}

template <class T>
void spline(const Spline<T>& op, bool inverse, Int rows, Int n, const T* x, const T* parameters, T* y, T* logdet,
            const Parallel& parallel) {
  const idx width = n * op.columns();
  over_rows(rows, n, parallel, [&](idx first, idx some) {
    const idx at = first * n;
    spline_rows<T>(op, inverse, some, n, {x + at, n}, {parameters + first * width, width}, {y + at, n}, logdet + first, false);
  });
}

template <class T>
void spline_backward(const Spline<T>& op, bool inverse, Int rows, Int n, const T* x, const T* parameters, const T* grad_y,
                     const T* grad_logdet, T* grad_x, T* grad_parameters, const Parallel& parallel) {
  const idx width = n * op.columns();
  over_rows(rows, n, parallel, [&](idx first, idx some) {
    const idx at = first * n;
    spline_rows_backward<T>(op, inverse, some, n, {x + at, n}, {parameters + first * width, width}, {grad_y + at, n},
                            grad_logdet + first, {grad_x + at, n}, {grad_parameters + first * width, width});
  });
}

}  // namespace glf::GLF_ISA
