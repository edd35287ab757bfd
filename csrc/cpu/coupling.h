// The coupling of rows, and its backward: affine ones here, RealNVP (arXiv:1605.08803), eq. 4, in both orders and directions.
#pragma once

#include "elementwise.h"
#include "rows.h"
#include "spline.h"

namespace glf::GLF_ISA {

template <class T>
struct Coupled {
  vec<T> out, ell;
};

template <class T>
struct CouplingGradients {
  vec<T> v, u, t;
};

// What couplings do to a vector of `v`. With `inverse`, v is the transformed value that is undone. In the backward g is ∂out.
template <LogScale f>
struct Affine {
  template <class T>
  static Coupled<T> forward(const Coupling<T>& op, vec<T> v, vec<T> u, vec<T> t) {
    const vec<T> ell = log_scale<f, T>(u, op.constant);
    const vec<T> e = scale_of<f, T>(u, ell, op.constant, op.inverse);
    if (op.inverse) return {op.add_first ? v * e - t : (v - t) * e, -ell};
    return {op.add_first ? (v + t) * e : v * e + t, ell};
  }

  template <class T>
  static CouplingGradients<T> backward(const Coupling<T>& op, vec<T> v, vec<T> u, vec<T> t, vec<T> g, vec<T> g_logdet) {
    const vec<T> ell = log_scale<f, T>(u, op.constant);
    const vec<T> slope = log_scale_slope<f, T>(u, ell, op.constant);
    const vec<T> ge = g * scale_of<f, T>(u, ell, op.constant, op.inverse);  // ∂v
    vec<T> gt, gl;
    if (!op.inverse) {
      gt = op.add_first ? ge : g;
      gl = ge * (op.add_first ? v + t : v) + g_logdet;
    } else {
      gt = op.add_first ? -g : -ge;
      gl = -ge * (op.add_first ? v : v - t) - g_logdet;
    }
    return {ge, gl * slope, gt};
  }
};

// There is no u: what is given for it means nothing, and where its gradient goes, t's follows.
struct Additive {
  template <class T>
  static Coupled<T> forward(const Coupling<T>& op, vec<T> v, vec<T>, vec<T> t) {
    return {op.inverse ? v - t : v + t, vec<T>{}};
  }

  template <class T>
  static CouplingGradients<T> backward(const Coupling<T>& op, vec<T>, vec<T>, vec<T>, vec<T> g, vec<T>) {
    return {g, vec<T>{}, op.inverse ? -g : g};
  }
};

// Calls f with what the coupling does to single numbers v, given u and t, as a compile-time constant.
template <class T, class F>
void with_transform(const Coupling<T>& op, F f) {
  if (op.kind == Kind::additive) return f(Additive{});
  with_log_scale(op.log_scale, [&](auto s) { f(Affine<decltype(s)::value>{}); });
}

// out ← coupling of v, and logdet += ±Σ ℓ (or =, unless `accumulate`). Of splines, u is where all parameters are.
template <class T>
void couple_rows(const Coupling<T>& op, idx rows, idx n, Rows<const T> v, Rows<const T> u, Rows<const T> t, Rows<T> out,
                 T* logdet, bool accumulate) {
  if (op.kind == Kind::spline) return spline_rows<T>(op.spline, op.inverse, rows, n, v, u, out, logdet, accumulate);
  with_transform(op, [&](auto transform) {
    for (idx m = 0; m < rows; ++m) {
      vec<T> total{};
      for (idx j = 0; j < n; j += lanes<T>) {
        const idx left = n - j;
        const auto r = decltype(transform)::template forward<T>(op, load_part(v[m] + j, left), load_part(u[m] + j, left),
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
  if (op.kind == Kind::spline)
    return spline_rows_backward<T>(op.spline, op.inverse, rows, n, v, u, grad_out, grad_logdet, grad_v, grad_u);
  with_transform(op, [&](auto transform) {
    for (idx m = 0; m < rows; ++m)
      for (idx j = 0; j < n; j += lanes<T>) {
        const idx left = n - j;
        const auto r = decltype(transform)::template backward<T>(op, load_part(v[m] + j, left), load_part(u[m] + j, left),
                                                                 load_part(t[m] + j, left),
                                                                 load_part(grad_out[m] + j, left), broadcast(grad_logdet[m]));
        store_part(grad_v[m] + j, r.v, left);
        store_part(grad_u[m] + j, r.u, left);
        store_part(grad_t[m] + j, r.t, left);
      }
  });
}

}  // namespace glf::GLF_ISA
