// Activations, log-scales and their derivatives, one number at a time: the formulas of glf_fast.reference.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// In the order of csrc/cpu/flow.h, by whose numbers Python knows them.
enum class Activation : int { relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus, mish };
enum class LogScale : int { tanh, exp, glow, nflows, atan, softclip, jet, softplus, clamp, bayesflow };

template <auto value_>
struct Constant {
  static constexpr auto value = value_;
};

// Calls f with the kind as a compile-time constant: a loop over a warp's numbers, which lie in registers, has no branch in it.
template <class F>
GLF_DEVICE void with_activation(Activation kind, F f) {
  using A = Activation;
#ifdef GLF_ONE_PATH  // tests count the instructions of this one
  return f(Constant<A::relu>{});
#endif
  switch (kind) {
    case A::relu: return f(Constant<A::relu>{});
    case A::leaky_relu: return f(Constant<A::leaky_relu>{});
    case A::silu: return f(Constant<A::silu>{});
    case A::gelu: return f(Constant<A::gelu>{});
    case A::tanh: return f(Constant<A::tanh>{});
    case A::elu: return f(Constant<A::elu>{});
    case A::selu: return f(Constant<A::selu>{});
    case A::hardswish: return f(Constant<A::hardswish>{});
    case A::softplus: return f(Constant<A::softplus>{});
    case A::mish: return f(Constant<A::mish>{});
  }
}

template <class F>
GLF_DEVICE void with_log_scale(LogScale kind, F f) {
  using S = LogScale;
#ifdef GLF_ONE_PATH
  return f(Constant<S::tanh>{});
#endif
  switch (kind) {
    case S::tanh: return f(Constant<S::tanh>{});
    case S::exp: return f(Constant<S::exp>{});
    case S::glow: return f(Constant<S::glow>{});
    case S::nflows: return f(Constant<S::nflows>{});
    case S::atan: return f(Constant<S::atan>{});
    case S::softclip: return f(Constant<S::softclip>{});
    case S::jet: return f(Constant<S::jet>{});
    case S::softplus: return f(Constant<S::softplus>{});
    case S::clamp: return f(Constant<S::clamp>{});
    case S::bayesflow: return f(Constant<S::bayesflow>{});
  }
}

#ifdef __CUDACC__
GLF_DEVICE float arc_tangent(float x) { return atanf(x); }
GLF_DEVICE float square_root(float x) { return sqrtf(x); }
GLF_DEVICE double square_root(double x) { return sqrt(x); }
// To two units in the last place; 0 where y is 2¹²⁶ or more, in which every quotient here ends.
GLF_DEVICE float quotient(float x, float y) { return __fdividef(x, y); }
// The larger one, NaN if either is.
GLF_DEVICE float larger(float x, float y) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
#else
  return x > y || x != x ? x : y;
#endif
}
#else
inline float arc_tangent(float x) { return std::atan(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float quotient(float x, float y) { return x / y; }
inline float larger(float x, float y) { return x > y || x != x ? x : y; }
#endif

GLF_DEVICE float sigmoid(float x) { return quotient(1.0f, 1.0f + exponential(-x)); }
// (1 − e^−2|x|) / (1 + e^−2|x|), with the sign of x: exponents never overflow.
GLF_DEVICE float hyperbolic_tangent(float x) {
  const float e = exponential(-2.0f * magnitude(x)), y = quotient(1.0f - e, 1.0f + e);
  return x < 0 ? -y : y;
}
// erf to 1.5·10⁻⁷ (Abramowitz and Stegun, 7.1.26), without the branches of the library's, of which a warp's rows have hundreds.
GLF_DEVICE float error_function(float x) {
  const float a = magnitude(x), t = quotient(1.0f, 1.0f + 0.3275911f * a);
  const float series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float y = 1.0f - series * exponential(-a * a);
  return x < 0 ? -y : y;
}
// min(x, 0) − log(1 + e^−|x|), by Kahan's log1p: what 1 + e rounds away is put back by e / ((1 + e) − 1).
GLF_DEVICE float log_sigmoid(float x) {
  const float e = exponential(-magnitude(x)), w = 1.0f + e;
  const float rest = w == 1.0f ? e : 0.0f;  // not a choice between this and the logarithm, which would be a branch
  return (x < 0 ? x : x - x) - (natural_log(w) * quotient(e, w == 1.0f ? 1.0f : w - 1.0f) + rest);
}

// √(1 + a²) for a ≥ 0, where a² may overflow.
GLF_DEVICE float hypotenuse(float a) { return a > 1e9f ? a : square_root(1.0f + a * a); }
// (e − 1)·e^arsinh u = (e − 1)(u + √(1 + u²)), without cancellation.
GLF_DEVICE float bayesflow_term(float u) {
  const float a = magnitude(u), r = a + hypotenuse(a);
  return 1.71828183f * (u < 0 ? 1.0f / r : r);
}
// The scale softplus(arsinh u + ln(e − 1)) = log(1 + q) of that term, by Kahan's log1p as above.
GLF_DEVICE float bayesflow_scale(float q) {
  const float w = 1.0f + q, known = w - 1.0f;
  return known > 0 && q < 1e8f ? natural_log(w) * quotient(q, known) : q < 1.0f ? q : natural_log(w);
}

// SELU (Klambauer et al., arXiv:1706.02515): λ x, or λα (e^x − 1) below 0.
inline constexpr float selu_scale = 1.05070099f, selu_below = 1.75809934f;

// 1 − e^−x of x ≥ 0. Its digits near 0 come from the series.
GLF_DEVICE float one_minus_exponential(float x) {
  const float series = 1.0f - x * (0.5f - x * (0.16666667f - x * (0.041666667f - x * (0.0083333333f - x * 0.0013888889f))));
  return x < 0.25f ? x * series : 1.0f - exponential(-x);
}
// Of mish in terms of t = e^−|x|, where nothing overflows or cancels: tanh(softplus(x)) = n/q.
struct Mish {
  float t, n, q;
};
GLF_DEVICE Mish mish_parts(float x) {
  const float t = exponential(-magnitude(x)), n = 2.0f * t + (x > 0 ? 1.0f : t * t);
  return {t, n, n + 2.0f * (x > 0 ? t * t : 1.0f)};
}

// a(x), of leaky_relu and elu with their default constants.
template <Activation kind>
GLF_DEVICE float activated(float x) {
  using A = Activation;
  if constexpr (kind == A::relu) return larger(x, 0.0f);
  if constexpr (kind == A::leaky_relu) return larger(x, 0.01f * x);
  if constexpr (kind == A::silu) return quotient(x, 1.0f + exponential(-x));
  if constexpr (kind == A::gelu) return 0.5f * x * (1.0f + error_function(0.70710678f * x));
  if constexpr (kind == A::tanh) return hyperbolic_tangent(x);
  if constexpr (kind == A::elu) return x > 0 ? x : exponential(x) - 1.0f;
  if constexpr (kind == A::selu) return x > 0 ? selu_scale * x : selu_below * (exponential(x) - 1.0f);
  if constexpr (kind == A::hardswish) {
    const float y = x < -3.0f ? 0.0f : x + 3.0f;
    return x * ((y > 6.0f ? 6.0f : y) * 0.16666667f);
  }
  if constexpr (kind == A::softplus) return -log_sigmoid(-x);  // above 20 it is x, to the last digit
  if constexpr (kind == A::mish) {
    const Mish m = mish_parts(x);
    return x * quotient(m.n, m.q);
  }
}

// Whether a'(x) is no function of a(x): the backward then needs it beside a(x).
GLF_DEVICE constexpr bool needs_argument(Activation kind) {
  using A = Activation;
  return kind == A::silu || kind == A::gelu || kind == A::hardswish || kind == A::mish;
}

// a'(x) of those, from x.
template <Activation kind>
GLF_DEVICE float slope_at(float x) {
  using A = Activation;
  if constexpr (kind == A::silu) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  } else if constexpr (kind == A::gelu) {
    return 0.5f * (1.0f + error_function(0.70710678f * x)) + x * (0.39894228f * exponential(-0.5f * x * x));
  } else if constexpr (kind == A::hardswish) {
    return x <= -3.0f ? 0.0f : x >= 3.0f ? 1.0f : x * 0.33333333f + 0.5f;
  } else if constexpr (kind == A::mish) {
    const Mish m = mish_parts(x);
    return quotient(m.n, m.q) + x * quotient(4.0f * m.t * (1.0f + m.t) * (x > 0 ? m.t : 1.0f), m.q * m.q);
  } else {
    return 0.0f;
  }
}

// gradient · a'(x), from a(x), or where needs_argument says so from a'(x) itself.
template <Activation kind>
GLF_DEVICE float times_slope(float gradient, float kept) {
  using A = Activation;
  if constexpr (kind == A::relu) return kept <= 0 ? 0.0f : gradient;
  if constexpr (kind == A::leaky_relu) return kept > 0 ? gradient : 0.01f * gradient;
  if constexpr (needs_argument(kind)) return gradient * kept;
  if constexpr (kind == A::tanh) return gradient * (1.0f - kept * kept);
  if constexpr (kind == A::elu) return kept > 0 ? gradient : gradient * (kept + 1.0f);
  if constexpr (kind == A::selu) return gradient * (kept > 0 ? selu_scale : kept + selu_below);
  if constexpr (kind == A::softplus) return gradient * one_minus_exponential(kept);
}

// ℓ = f(u).
template <LogScale kind>
GLF_DEVICE float log_scale(float u, float s) {
  using S = LogScale;
  if constexpr (kind == S::tanh) return s * hyperbolic_tangent(quotient(u, s));
  if constexpr (kind == S::exp) return u;
  if constexpr (kind == S::glow) return log_sigmoid(u + s);
  if constexpr (kind == S::nflows) return natural_log(sigmoid(u + 2.0f) + s);
  if constexpr (kind == S::atan) return s * 0.636f * arc_tangent(u);
  if constexpr (kind == S::softclip) return quotient(u, 1.0f + magnitude(quotient(u, s)));
  if constexpr (kind == S::jet) return 0.69314718f + log_sigmoid(u);
  if constexpr (kind == S::softplus) return natural_log(s - log_sigmoid(-u));
  if constexpr (kind == S::bayesflow) return natural_log(bayesflow_scale(bayesflow_term(u)));
  if constexpr (kind == S::clamp) return (u < -5.0f ? -5.0f : u > 3.0f ? 3.0f : u) + (u - u);  // NaN where u is infinite
}

// f'(u); of clamp the gradient passes the bounds.
template <LogScale kind>
GLF_DEVICE float log_scale_slope(float u, float s) {
  using S = LogScale;
  if constexpr (kind == S::tanh) {
    const float y = hyperbolic_tangent(quotient(u, s));
    return 1.0f - y * y;
  }
  if constexpr (kind == S::exp || kind == S::clamp) return 1.0f;
  if constexpr (kind == S::glow) return sigmoid(-u - s);
  if constexpr (kind == S::nflows) {
    const float y = sigmoid(u + 2.0f);
    return quotient(y * sigmoid(-u - 2.0f), y + s);
  }
  if constexpr (kind == S::atan) return quotient(s * 0.636f, 1.0f + u * u);
  if constexpr (kind == S::softclip) {
    const float y = 1.0f + magnitude(quotient(u, s));
    return quotient(1.0f, y * y);
  }
  if constexpr (kind == S::jet) return sigmoid(-u);
  if constexpr (kind == S::softplus) return quotient(sigmoid(u), s - log_sigmoid(-u));
  if constexpr (kind == S::bayesflow) {
    const float q = bayesflow_term(u);
    return quotient(quotient(q, 1.0f + q), hypotenuse(magnitude(u)) * bayesflow_scale(q));
  }
}

}  // namespace glf::device
