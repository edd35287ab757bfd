// Activations and log-scale functions, with their derivatives: the formulas of glf_fast.reference.
#pragma once

#include "flow.h"
#include "math.h"

#include <limits>
#include <type_traits>

namespace glf::GLF_ISA {

// Calls f with the enumerator as a compile-time constant, so that a loop over elements has no branch in it.
template <class F>
inline void with_activation(Activation a, F f) {
  using E = Activation;
  switch (a) {
#define GLF_CASE(name) \
  case E::name: return f(std::integral_constant<E, E::name>{});
    GLF_ACTIVATIONS(GLF_CASE)
  }
}

template <class F>
inline void with_log_scale(LogScale s, F f) {
  using E = LogScale;
  switch (s) {
    GLF_LOG_SCALES(GLF_CASE)
#undef GLF_CASE
  }
}

// SELU (Klambauer et al., arXiv:1706.02515): λ x, or λα (e^x − 1) below 0.
inline constexpr double selu_scale = 1.0507009873554804934, selu_below = selu_scale * 1.6732632423543772848;

// Of mish in terms of t = e^−|x|, where nothing overflows or cancels: tanh(softplus(x)) = n/q, and n' = σ(x)·(1 − (n/q)²).
template <class T>
struct Mish {
  vec<T> value, slope;  // n/q, n'

  explicit Mish(vec<T> x) {
    const vec<T> t = exp(-abs(x)), one = broadcast(T(1)), square = t * t;
    const vec<T> n = T(2) * t + (x > T(0) ? one : square), q = n + T(2) * (x > T(0) ? square : one);
    value = n / q;
    slope = T(4) * t * (T(1) + t) * (x > T(0) ? t : one) / (q * q);
  }
};

// a(x); `s` is its constant.
template <Activation a, class T>
inline vec<T> activation(vec<T> x, T s) {
  using A = Activation;
  if constexpr (a == A::relu) return x < T(0) ? vec<T>{} : x;  // NaN passes
  if constexpr (a == A::leaky_relu) return x < T(0) ? x * s : x;
  if constexpr (a == A::silu) return x / (T(1) + exp(-x));
  if constexpr (a == A::gelu) return x * normal_cdf(x);
  if constexpr (a == A::tanh) return tanh(x);
  if constexpr (a == A::elu || a == A::selu) {
    // e^x − 1 = tanh(x/2)·(e^x + 1) keeps its digits near 0.
    const vec<T> y = x > T(0) ? vec<T>{} : x, less = tanh(y * T(0.5)) * (exp(y) + T(1));
    if constexpr (a == A::elu) return x > T(0) ? x : less * s;
    return x > T(0) ? x * T(selu_scale) : less * T(selu_below);
  }
  if constexpr (a == A::hardswish) {
    const vec<T> y = x < T(-3) ? vec<T>{} : x + T(3);
    return x * ((y > T(6) ? broadcast(T(6)) : y) / T(6));
  }
  if constexpr (a == A::softplus) return x > T(20) ? x : softplus<T>(x);
  if constexpr (a == A::mish) return x * Mish<T>(x).value;
}

// a'(x), from the value h = a(x), or from x itself where keeps_argument says so.
template <Activation a, class T>
inline vec<T> activation_slope(vec<T> h, T s) {
  using A = Activation;
  const vec<T> one = broadcast(T(1));
  if constexpr (a == A::relu) return h > T(0) ? one : vec<T>{};
  if constexpr (a == A::leaky_relu) return h > T(0) ? one : broadcast(s);
  if constexpr (a == A::silu) {
    const vec<T> y = sigmoid<T>(h);
    return y * (one + h * (one - y));
  }
  if constexpr (a == A::gelu) return normal_cdf(h) + h * exp(h * h * T(-0.5)) * T(0.3989422804014327);
  if constexpr (a == A::tanh) return one - h * h;
  if constexpr (a == A::elu) return h > T(0) ? one : h + s;
  if constexpr (a == A::selu) return h > T(0) ? broadcast(T(selu_scale)) : h + T(selu_below);
  if constexpr (a == A::hardswish) {
    const vec<T> y = h <= T(-3) ? vec<T>{} : h / T(3) + T(0.5);
    return h >= T(3) ? one : y;
  }
  // 1 − e^−h, which for small h would have no digits left.
  if constexpr (a == A::softplus) return h > T(20) ? one : tanh(h * T(0.5)) * (one + exp(-h));
  if constexpr (a == A::mish) {
    const Mish<T> m(h);
    return m.value + h * m.slope;
  }
}

// √(1 + a²) for a ≥ 0, where a² may overflow.
template <class T>
inline vec<T> hypotenuse(vec<T> a) {
  return a > T(1e9) ? a : sqrt(T(1) + a * a);
}

// (e − 1)·e^arsinh u = (e − 1)(u + √(1 + u²)), without cancellation.
template <class T>
inline vec<T> bayesflow_term(vec<T> u) {
  constexpr T end = std::numeric_limits<T>::max(), most = end / 16;  // of which neither the term nor its reciprocal overflows
  const vec<T> size = abs(u), a = (size > most) & (size <= end) ? broadcast(most) : size, r = a + hypotenuse<T>(a);
  return T(1.7182818284590452) * (u < T(0) ? T(1) / r : r);
}

// The scale softplus(arsinh u + ln(e − 1)) of that term.
template <class T>
inline vec<T> bayesflow_scale(vec<T> term) {
  return term < T(1) ? log1p(term) : term > std::numeric_limits<T>::max() ? term : log(T(1) + term);
}

// ℓ = f(u) and, for a backward, f'(u).
template <LogScale f, class T>
inline vec<T> log_scale(vec<T> u, T s) {
  using S = LogScale;
  if constexpr (f == S::tanh) return s * tanh(u / s);
  if constexpr (f == S::exp) return u;
  if constexpr (f == S::glow) return log_sigmoid<T>(u + s);
  if constexpr (f == S::nflows) return log(sigmoid<T>(u + T(2)) + s);
  if constexpr (f == S::atan) return (s * T(0.636)) * atan(u);
  if constexpr (f == S::softclip) return u / (T(1) + abs(u / s));
  if constexpr (f == S::jet) return T(0.69314718055994531) + log_sigmoid<T>(u);
  if constexpr (f == S::softplus) return log(softplus<T>(u) + s);
  if constexpr (f == S::clamp) {
    const vec<T> y = u < T(-5) ? broadcast(T(-5)) : u;
    return (y > T(3) ? broadcast(T(3)) : y) + (u - u);  // NaN where u is infinite, as in pyro
  }
  if constexpr (f == S::bayesflow) return u - u == T(0) ? log(bayesflow_scale<T>(bayesflow_term<T>(u))) : u;
}

// e^ℓ, or with `inverse` e^−ℓ: some functions give it without an exponential.
template <LogScale f, class T>
inline vec<T> scale_of(vec<T> u, vec<T> ell, T s, bool inverse) {
  if constexpr (f == LogScale::softplus) return inverse ? T(1) / (softplus<T>(u) + s) : softplus<T>(u) + s;
  if constexpr (f == LogScale::nflows) return inverse ? T(1) / (sigmoid<T>(u + T(2)) + s) : sigmoid<T>(u + T(2)) + s;
  if constexpr (f == LogScale::bayesflow) {
    const vec<T> scale = bayesflow_scale<T>(bayesflow_term<T>(u));
    return inverse ? T(1) / scale : scale;
  }
  return exp(inverse ? -ell : ell);
}

template <LogScale f, class T>
inline vec<T> log_scale_slope(vec<T> u, vec<T> ell, T s) {
  using S = LogScale;
  if constexpr (f == S::tanh) {
    const vec<T> y = ell / s;
    return T(1) - y * y;
  }
  if constexpr (f == S::exp || f == S::clamp) return broadcast(T(1));  // of clamp the gradient passes the bounds
  if constexpr (f == S::glow) return sigmoid<T>(-u - s);
  if constexpr (f == S::nflows) {
    const vec<T> y = sigmoid<T>(u + T(2));
    return y * sigmoid<T>(-u - T(2)) / (y + s);
  }
  if constexpr (f == S::atan) return (s * T(0.636)) / (T(1) + u * u);
  if constexpr (f == S::softclip) {
    const vec<T> y = T(1) + abs(u / s);
    return T(1) / (y * y);
  }
  if constexpr (f == S::jet) return sigmoid<T>(-u);
  if constexpr (f == S::softplus) {  // in terms that the scale itself has, too
    const vec<T> t = exp(-abs(u));
    return (u > T(0) ? broadcast(T(1)) : t) / ((T(1) + t) * (softplus<T>(u) + s));
  }
  if constexpr (f == S::bayesflow) {
    const vec<T> q = bayesflow_term<T>(u);
    return T(1) / ((T(1) + T(1) / q) * hypotenuse<T>(abs(u)) * bayesflow_scale<T>(q));
  }
}

// h = a(x) over a block; `from` and `to` may be the same. Rows are padded to whole vectors.
template <class T>
inline void activate(Activation kind, T constant, idx rows, idx cols, const T* from, T* to, idx ld) {
  with_activation(kind, [=](auto a) {
    for (idx m = 0; m < rows; ++m)
      for (idx j = 0; j < cols; j += lanes<T>)
        store(to + m * ld + j, activation<decltype(a)::value, T>(load(from + m * ld + j), constant));
  });
}

// g ← g·a'(x) over a block.
template <class T>
inline void activate_backward(Activation kind, T constant, idx rows, idx cols, const T* kept, idx kept_m, T* g, idx g_m) {
  with_activation(kind, [=](auto a) {
    for (idx m = 0; m < rows; ++m)
      for (idx j = 0; j < cols; j += lanes<T>)
        store(g + m * g_m + j,
              load(g + m * g_m + j) * activation_slope<decltype(a)::value, T>(load(kept + m * kept_m + j), constant));
  });
}

}  // namespace glf::GLF_ISA
