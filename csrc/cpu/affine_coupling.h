// The elementwise operation `affine_coupling` on rows (B, n), for couplings with any conditioner.
#pragma once

#include "coupling.h"
#include "tile.h"

namespace glf::GLF_ISA {

// Runs f(first row, rows) over the batch in equal parts.
template <class F>
void over_rows(idx batch, idx n, const Parallel& parallel, F f) {
  // A thread is woken for at least 8,192 elements.
  const int threads = static_cast<int>(std::clamp<idx>(std::min<idx>(batch, batch * n >> 13), 1, parallel.threads));
  const idx part = (batch + threads - 1) / threads;
  in_parallel(parallel, threads, [&](int i) {
    const idx first = std::min(batch, i * part);
    f(first, std::min(batch, first + part) - first);
  });
}

template <class T>
void coupling(const Coupling<T>& op, Int batch, Int n, const T* v, Int v_m, const T* u, Int u_m, const T* t, Int t_m,
              T* w, T* logdet, const Parallel& parallel) {
  over_rows(batch, n, parallel, [&](idx i, idx rows) {
    couple_rows<T>(op, rows, n, {v + i * v_m, v_m}, {u + i * u_m, u_m}, {t + i * t_m, t_m}, {w + i * n, n}, logdet + i,
                   false);
  });
}

template <class T>
void coupling_backward(const Coupling<T>& op, Int batch, Int n, const T* v, Int v_m, const T* u, Int u_m, const T* t,
                       Int t_m, const T* grad_w, const T* grad_logdet, T* grad_v, T* grad_u, T* grad_t,
                       const Parallel& parallel) {
  over_rows(batch, n, parallel, [&](idx i, idx rows) {
    couple_rows_backward<T>(op, rows, n, {v + i * v_m, v_m}, {u + i * u_m, u_m}, {t + i * t_m, t_m}, {grad_w + i * n, n},
                            grad_logdet + i, {grad_v + i * n, n}, {grad_u + i * n, n}, {grad_t + i * n, n});
  });
}

}  // namespace glf::GLF_ISA
