// The affine coupling of rows: RealNVP (arXiv:1605.08803), eq. 4, in both orders and directions, and its backward.
#pragma once

#include "elementwise.h"

namespace glf::GLF_ISA {

// A (rows, n) view of memory.
template <class T>
struct Rows {
  T* data;
  idx ld;
  T* operator[](idx m) const { return data + m * ld; }
};

template <class T>
struct Coupled {
  vec<T> out, ell;
};

// One vector of `v` through the coupling. With `inverse`, v is the transformed value that is undone. Additive couplings have
// no u: what is given for it means nothing.
template <LogScale f, class T>
inline Coupled<T> couple(const Coupling<T>& op, vec<T> v, vec<T> u, vec<T> t) {
  if constexpr (f == LogScale::none) return {op.inverse ? v - t : v + t, vec<T>{}};
  const vec<T> ell = log_scale<f, T>(u, op.constant);
  if (op.inverse) {
    const vec<T> e = exp(-ell);
    return {op.add_first ? v * e - t : (v - t) * e, -ell};
  }
  const vec<T> e = exp(ell);
  return {op.add_first ? (v + t) * e : v * e + t, ell};
}

// out ← coupling of v, and logdet += ±Σ ℓ (or =, unless `accumulate`).
template <class T>
void couple_rows(const Coupling<T>& op, idx rows, idx n, Rows<const T> v, Rows<const T> u, Rows<const T> t, Rows<T> out,
                 T* logdet, bool accumulate) {
  with_log_scale(op.log_scale, [&](auto f) {
    for (idx m = 0; m < rows; ++m) {
      vec<T> total{};
      for (idx j = 0; j < n; j += lanes<T>) {
        const idx left = n - j;
        const auto r = couple<decltype(f)::value>(op, load_part(v[m] + j, left), load_part(u[m] + j, left),
                                                  load_part(t[m] + j, left));
        store_part(out[m] + j, r.out, left);
        total += left < lanes<T> ? first_lanes<T>(r.ell, left) : r.ell;
      }
      if (logdet) logdet[m] = (accumulate ? logdet[m] : T(0)) + sum<T>(total);
    }
  });
}

// From g = ∂out and ∂logdet to ∂v, ∂u, ∂t; v as in the forward. Outputs may overlap g, element for element.
template <class T>
void couple_rows_backward(const Coupling<T>& op, idx rows, idx n, Rows<const T> v, Rows<const T> u, Rows<const T> t,
                          Rows<const T> grad_out, const T* grad_logdet, Rows<T> grad_v, Rows<T> grad_u,
                          Rows<T> grad_t) {
  with_log_scale(op.log_scale, [&](auto f) {
    for (idx m = 0; m < rows; ++m)
      for (idx j = 0; j < n; j += lanes<T>) {
        const idx left = n - j;
        const vec<T> vj = load_part(v[m] + j, left), uj = load_part(u[m] + j, left), tj = load_part(t[m] + j, left);
        const vec<T> g = load_part(grad_out[m] + j, left);
        if constexpr (decltype(f)::value == LogScale::none) {
          store_part(grad_v[m] + j, g, left);
          store_part(grad_t[m] + j, op.inverse ? -g : g, left);
          continue;
        }
        const vec<T> ell = log_scale<decltype(f)::value, T>(uj, op.constant);
        const vec<T> slope = log_scale_slope<decltype(f)::value, T>(uj, ell, op.constant);
        const vec<T> ge = g * exp(op.inverse ? -ell : ell);  // ∂v
        vec<T> gt, gl;
        if (!op.inverse) {
          gt = op.add_first ? ge : g;
          gl = ge * (op.add_first ? vj + tj : vj) + grad_logdet[m];
        } else {
          gt = op.add_first ? -g : -ge;
          gl = -ge * (op.add_first ? vj : vj - tj) - grad_logdet[m];
        }
        store_part(grad_v[m] + j, ge, left);
        store_part(grad_u[m] + j, gl * slope, left);
        store_part(grad_t[m] + j, gt, left);
      }
  });
}

}  // namespace glf::GLF_ISA
