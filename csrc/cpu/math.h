// Elementwise functions on vectors. float: range reduction and polynomials of our own (minimax fits, relative error of
// the fit below 1e-7; a few ulp in all). double: the standard library, lane by lane.
#pragma once

#include "vec.h"

#include <cmath>

namespace glf::GLF_ISA {

using f32 = vec<float>;
using f64 = vec<double>;
using i32 = mask<float>;

template <class F>
inline f64 by_lane(f64 x, F f) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

inline f32 abs(f32 x) { return (f32)((i32)x & 0x7fffffff); }
inline f64 abs(f64 x) { return (f64)((mask<double>)x & 0x7fffffffffffffff); }

// a·b + c with one rounding.
#if GLF_VECTOR_BYTES == 64
inline f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline f64 fma(f64 a, f64 b, f64 c) { return (f64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// Of all lanes; without a mask GCC 12 warns of its own header.
inline f32 sqrt(f32 x) { return (f32)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
inline f64 sqrt(f64 x) { return (f64)_mm512_maskz_sqrt_pd(0xff, (__m512d)x); }
#elif GLF_VECTOR_BYTES == 32
inline f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline f64 fma(f64 a, f64 b, f64 c) { return (f64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline f32 sqrt(f32 x) { return (f32)_mm256_sqrt_ps((__m256)x); }
inline f64 sqrt(f64 x) { return (f64)_mm256_sqrt_pd((__m256d)x); }
#else
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;  // in one rounding where the processor has it: NEON, but not SSE2
}
inline f32 sqrt(f32 x) {
  for (int i = 0; i < lanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
inline f64 sqrt(f64 x) {
  return by_lane(x, [](double s) { return std::sqrt(s); });
}
#endif

// The smaller, and the larger, of a bound and x; NaN in x passes. A comparison and a blend take twice as long.
#if GLF_VECTOR_BYTES == 64
inline f32 at_most(f32 x, float bound) { return (f32)_mm512_maskz_min_ps(0xffff, (__m512)broadcast(bound), (__m512)x); }
inline f32 at_least(f32 x, float bound) { return (f32)_mm512_maskz_max_ps(0xffff, (__m512)broadcast(bound), (__m512)x); }
#elif GLF_VECTOR_BYTES == 32
inline f32 at_most(f32 x, float bound) { return (f32)_mm256_min_ps((__m256)broadcast(bound), (__m256)x); }
inline f32 at_least(f32 x, float bound) { return (f32)_mm256_max_ps((__m256)broadcast(bound), (__m256)x); }
#else
inline f32 at_most(f32 x, float bound) { return x > bound ? broadcast(bound) : x; }
inline f32 at_least(f32 x, float bound) { return x < bound ? broadcast(bound) : x; }
#endif

inline f64 at_least(f64 x, double bound) { return x < bound ? broadcast(bound) : x; }

// The larger of two; NaN in the second passes.
#if GLF_VECTOR_BYTES == 64
inline f32 larger(f32 x, f32 y) { return (f32)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y); }
#elif GLF_VECTOR_BYTES == 32
inline f32 larger(f32 x, f32 y) { return (f32)_mm256_max_ps((__m256)x, (__m256)y); }
#else
inline f32 larger(f32 x, f32 y) { return x > y ? x : y; }
#endif
inline f64 larger(f64 x, f64 y) { return x > y ? x : y; }

// Takes the sign of `sign`.
inline f32 copysign(f32 x, f32 sign) { return (f32)(((i32)x & 0x7fffffff) | ((i32)sign & (i32{} + INT32_MIN))); }

// c₀ + c₁ x + …
template <class... C>
inline f32 polynomial(f32 x, float first, C... rest) {
  if constexpr (sizeof...(rest) == 0)
    return broadcast(first);
  else
    return first + x * polynomial(x, rest...);
}

// 2ⁿ for whole n in [−126, 127].
inline f32 power_of_two(i32 n) { return (f32)((n + 127) << 23); }

inline f32 exp(f32 x) {
  // Outside, the result is 0 or ∞ anyway.
  const f32 y = at_least(at_most(x, 89.0f), -104.0f);
  const float shift = 12582912.0f;  // 1.5·2²³: adding it rounds to a whole number, held in the low bits
  const f32 shifted = y * 1.44269504f + shift;
  const f32 n = shifted - shift;
  const f32 r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  const f32 p = r * r * polynomial(r, 0.5f, 0.16666573f, 0.041666862f, 0.0083637405f, 0.0013901471f) + r + 1.0f;
  // In two factors: 2ⁿ alone overflows at n = 128 and underflows below −126.
  const i32 whole = (i32)shifted - (i32)broadcast(shift), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}
inline f64 exp(f64 x) {
  return by_lane(x, [](double s) { return std::exp(s); });
}

// 2ⁿ·exp for −87 ≤ x ≤ 0, where it is a normal number, as a softmax has it, and 0 ≤ n < 32. NaN becomes anything.
inline f32 exp_of_normal(f32 x, int n) {
  const float shift = 12582912.0f + n;
  const f32 shifted = x * 1.44269504f + shift;
  const f32 whole = shifted - shift;
  const f32 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  const f32 p = r * r * polynomial(r, 0.5f, 0.16666573f, 0.041666862f, 0.0083637405f, 0.0013901471f) + r + 1.0f;
  return (f32)((i32)p + ((i32)shifted << 23));  // p lies between √½ and √2: its exponent has room
}

// For x ≥ 2⁻¹²⁶; NaN passes.
inline f32 log(f32 x) {
  // x = 2ᵉ·(1 + f), with 1 + f in [√½, √2).
  const i32 bits = (i32)x - 0x3f3504f3;
  const i32 e = bits >> 23;
  const f32 f = (f32)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const f32 k = __builtin_convertvector(e, f32);
  const f32 p = polynomial(f, 0.33333331f, -0.24999994f, 0.20000716f, -0.16668053f, 0.14249313f, -0.12420253f,
                           0.11677209f, -0.11513928f, 0.070362717f);
  const f32 y = f + (f * f * (f * p - 0.5f) - k * 2.12194440e-4f) + k * 0.693359375f;
  return x == x ? y : x;
}
inline f64 log(f64 x) {
  return by_lane(x, [](double s) { return std::log(s); });
}

// For x in [0, 1]: with s = x/(2 + x) it is 2 artanh s = x − s(x − s² P(s²)), where the rounding of s hardly matters.
inline f32 log1p(f32 x) {
  const f32 s = x / (2.0f + x), z = s * s;
  return x - s * (x - z * polynomial(z, 0.66666420f, 0.40021527f, 0.28001806f, 0.28011984f));
}
inline f64 log1p(f64 x) {
  return by_lane(x, [](double s) { return std::log1p(s); });
}

inline f32 tanh(f32 x) {
  // x P(x²)/Q(x²) up to 9, where 1 − tanh x is less than half an ulp: an exponential, and a polynomial near 0, were half of a
  // masked autoregressive flow's log_prob (H 50, D 10).
  const f32 y = at_least(at_most(x, 9.0f), -9.0f);
  const f32 z = y * y;
  const f32 p = polynomial(z, 1.0f, 0.13381024f, 0.0034955866f, 2.0609058e-05f, 1.3354629e-08f);
  const f32 q = polynomial(z, 1.0f, 0.46714340f, 0.025876976f, 0.00032856323f, 7.7765446e-07f);
  return y * p / q;
}
inline f64 tanh(f64 x) {
  return by_lane(x, [](double s) { return std::tanh(s); });
}

inline f32 atan(f32 x) {
  const f32 a = abs(x);
  const f32 y = a > 1.0f ? 1.0f / a : a, z = y * y;
  const f32 p = y + y * z * polynomial(z, -0.33333325f, 0.19998761f, -0.14258254f, 0.10872763f, -0.080291622f,
                                       0.049193949f, -0.020226544f, 0.0039229835f);
  return copysign(a > 1.0f ? 1.57079633f - p : p, x);
}
inline f64 atan(f64 x) {
  return by_lane(x, [](double s) { return std::atan(s); });
}

// The normal distribution function Φ(x) = erfc(−x/√2)/2, accurate in the lower tail too.
inline f32 normal_cdf(f32 x) {
  const f32 a = abs(x) * 0.70710678f;
  const f32 b = a > 1e4f ? broadcast(1e4f) : a;  // ∞/∞ below would be NaN
  const f32 q = (b - 2.0f) / (b + 2.0f);
  const f32 p = polynomial(q, 1.2769784f, -0.092764065f, -0.16603230f, 0.16405676f, -0.054194815f, -0.0080636116f,
                           0.0085981358f, 0.0013056757f, -0.0011922395f, -0.00037755739f);
  const f32 tail = 0.5f * exp(-0.5f * x * x) * p / (1.0f + 2.0f * b);
  return x > 0.0f ? 1.0f - tail : tail;
}
inline f64 normal_cdf(f64 x) {
  return by_lane(x, [](double s) { return 0.5 * std::erfc(-s * 0.70710678118654752440); });
}

template <class T>
inline vec<T> sigmoid(vec<T> x) {
  return T(1) / (T(1) + exp(-x));
}

// log σ(x), without cancellation.
template <class T>
inline vec<T> log_sigmoid(vec<T> x) {
  return (x < T(0) ? x : vec<T>{}) - log1p(exp(-abs(x)));
}

// log(1 + e^x), without cancellation.
template <class T>
inline vec<T> softplus(vec<T> x) {
  return (x > T(0) ? x : vec<T>{}) + log1p(exp(-abs(x)));
}

template <class T>
inline T sum(vec<T> x) {
  T total = 0;
  for (int i = 0; i < lanes<T>; ++i) total += x[i];
  return total;
}

// x in the first n lanes, 0 in the others.
template <class T>
inline vec<T> first_lanes(vec<T> x, idx n) {
  mask<T> lane{};
  for (int i = 0; i < lanes<T>; ++i) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + 0)>(n) ? x : vec<T>{};
}

}  // namespace glf::GLF_ISA
