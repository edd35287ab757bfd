// Rational-quadratic splines (arXiv:1906.04032) and their backward, a spline in each lane: glf_fast.reference.spline has the formulas.
#pragma once

#include "flow.h"
#include "math.h"
#include "rows.h"
#include "transpose.h"

namespace glf::GLF_ISA {

// One number of each of lanes<T> splines, or one parameter.
template <class T>
using Parameters = vec<T>[(3 * most_bins + 1) / lanes<T> * lanes<T> + lanes<T>];

// Turns n consecutive numbers at each lane's place into n vectors with a lane for each place.
template <class T>
void gather(const T* const (&place)[lanes<T>], idx n, Parameters<T>& out) {
  constexpr idx L = lanes<T>;
  idx j = 0;
  for (; j + 1 < n; j += L) {
    vec<T> square[L];
    for (idx i = 0; i < L; ++i) square[i] = load_part(place[i] + j, n - j);
    transpose<T>(square);
    for (idx i = 0; i < L; ++i) out[j + i] = square[i];
  }
  if (j < n)  // one is left: of splines with 2ⁿ bins, and no tails
    for (idx i = 0; i < L; ++i) out[j][i] = place[i][j];
}

// And back, for the first `count` lanes.
template <class T>
void scatter(const Parameters<T>& in, idx n, T* const (&place)[lanes<T>], idx count) {
  constexpr idx L = lanes<T>;
  for (idx j = 0; j < n; j += L) {
    vec<T> square[L];
    for (idx i = 0; i < L; ++i) square[i] = in[j + i];
    transpose<T>(square);
    for (idx i = 0; i < count; ++i) store_part(place[i] + j, square[i], n - j);
  }
}

// The rounding error of s = a + b.
template <class T>
inline vec<T> lost(vec<T> a, vec<T> b, vec<T> s) {
  const vec<T> added = s - a;
  return (a - (s - added)) + (b - added);
}

// A number with what rounding took from it.
template <class T>
struct Exact {
  vec<T> value, rest;
};

// Sums of a box's parts. Those of float32 are off by 2⁻²⁴ of the box for each bin, and it shows: of 32 bins, y was on average
// twice as far off as nflows', whose knots end where the box does. Whole numbers are summed without errors: parts are counted
// in units, of which all of them together have fewer than 2³¹. What rounding a part takes, half a unit, is less than what rounding
// takes from the largest parts, and matters where least widths are 0 and bins are narrow alone. To sum it, too, takes a tenth
// of the time.
template <class T>
struct Sum;
template <>
struct Sum<float> {
  using Part = i32;
  i32 units;

  static int doublings(int bins) { return __builtin_clz(bins) - 1; }  // a part of 1 has 2ⁿ units: 2ⁿ · bins < 2³¹
  static f32 exp(f32 x, int doublings) { return exp_of_normal(x, doublings); }
  static Part part(f32 x) { return __builtin_convertvector(x + 0.5f, i32); }
  void add(Part part) { units += part; }
  f32 value() const { return __builtin_convertvector(units, f32); }
  Exact<float> exact() const {
    const f32 most = value();
    return {most, __builtin_convertvector(units - __builtin_convertvector(most, i32), f32)};
  }
};
template <>
struct Sum<double> {
  using Part = f64;
  f64 units;

  static int doublings(int) { return 0; }
  static f64 exp(f64 x, int) { return glf::GLF_ISA::exp(x); }
  static Part part(f64 x) { return x; }
  void add(Part part) { units += part; }
  f64 value() const { return units; }
  Exact<double> exact() const { return {units, f64{}}; }
};

// Widths, or heights, of the bins, relative to the box: least + free · part/total, a softmax of their parameters.
template <class T>
struct Sides {
  vec<T> part[most_bins];
  typename Sum<T>::Part summed[most_bins];
  Exact<T> total;
  T least, free;

  Sides(const Spline<T>& op, const vec<T>* raw, T least) : least(least), free(1 - op.bins * least) {
    const vec<T>* given = raw;
    if (op.soft_clip) {
      for (idx j = 0; j < op.bins; ++j) part[j] = raw[j] / (T(1) + abs(raw[j] * (2 * op.scale / op.clip)));
      given = part;
    }
    vec<T> most = given[0];
#pragma GCC unroll 4
    for (idx j = 1; j < op.bins; ++j) most = larger(given[j], most);
    const int doublings = Sum<T>::doublings(op.bins);
    Sum<T> sum{};
    vec<T> exponents{};
#pragma GCC unroll 4
    for (idx j = 0; j < op.bins; ++j) {
      const vec<T> exponent = at_least(op.scale * (given[j] - most), T(-87));
      part[j] = Sum<T>::exp(exponent, doublings);
      sum.add(summed[j] = Sum<T>::part(part[j]));
      exponents += exponent;
    }
    total = sum.exact();
    total.value += exponents - exponents;  // NaN, which whole numbers do not have
  }

  // Where bin k begins, given the parts before it.
  Exact<T> begin(vec<T> k, const Exact<T>& before) const {
    const vec<T> share = before.value / total.value;
    const vec<T> share_rest = (fma(-share, total.value, before.value) + (before.rest - share * total.rest)) / total.value;
    const vec<T> sure = k * least, open = share * free;
    const vec<T> value = sure + open;
    return {value, lost<T>(sure, open, value) + (fma(share, broadcast(free), -open) + share_rest * free)};
  }

  // ∂ of the parameters, from those of the place where bin k begins, and of its side; `before` are the parts before it, and
  // `own` is its own part. Of a softmax's ∂ less their mean: differences are of parts, whose sums are exact, and not of gradients.
  void backward(const Spline<T>& op, const vec<T>* raw, vec<T> k, const Exact<T>& before, vec<T> own, vec<T> g_place,
                vec<T> g_side, vec<T>* grad) const {
    const vec<T> after = (total.value - before.value) + (total.rest - before.rest) - own;
    const vec<T> factor = (op.high - op.low) * free * op.scale / (total.value * total.value);
    const vec<T> lower = factor * (g_place * after + (g_place - g_side) * own);
    const vec<T> here = factor * (g_side * after + (g_side - g_place) * before.value);
    const vec<T> higher = -factor * (before.value * g_place + own * g_side);
    for (idx j = 0; j < op.bins; ++j) {
      grad[j] = part[j] * (T(j) < k ? lower : T(j) == k ? here : higher);
      if (op.soft_clip) {
        const vec<T> bend = T(1) + abs(raw[j] * (2 * op.scale / op.clip));
        grad[j] /= bend * bend;
      }
    }
  }
};

template <class T>
inline vec<T> slope_of(const Spline<T>& op, vec<T> c) {
  if (op.soft_clip) return exp(c / (T(1) + abs(c * (1 / op.clip))));
  return op.factor * (op.min_derivative + softplus<T>(c));
}

// d(slope)/dc
template <class T>
inline vec<T> slope_derivative(const Spline<T>& op, vec<T> c, vec<T> slope) {
  if (!op.soft_clip) return op.factor * sigmoid<T>(c);
  const vec<T> bend = T(1) + abs(c * (1 / op.clip));
  return slope / (bend * bend);
}

// `at` less the knot, exact but for the knot's own error.
template <class T>
inline vec<T> beyond(const Spline<T>& op, const Exact<T>& knot, vec<T> at) {
  const vec<T> low = broadcast(-op.low), from_low = at + low, size = broadcast(op.high - op.low);
  return fma(-size, knot.value, from_low) + (lost<T>(at, low, from_low) - size * knot.rest);
}

// The knot plus `more`.
template <class T>
inline vec<T> plus(const Spline<T>& op, const Exact<T>& knot, vec<T> more) {
  const vec<T> low = broadcast(op.low), size = broadcast(op.high - op.low), place = fma(size, knot.value, low);
  return place + (fma(size, knot.value, low - place) + size * knot.rest + more);
}

// The bin in which a number lies, and where in it.
template <class T>
struct Bin {
  vec<T> k;                     // its number
  vec<T> width, height;         // parts of its sides
  Exact<T> wide, tall;          // and those before it
  Exact<T> across, up;          // its first knot, relative to the box
  vec<T> w, h;                  // its sides
  vec<T> c0, c1, d0, d1;        // parameters of the slopes at its ends, and these
  vec<T> s, xi, q, bend, D, E;  // h/w, (x − X)/w, ξ(1 − ξ), d0 + d1 − 2s, and y' = s² E/D²

  Bin(const Spline<T>& op, const Parameters<T>& raw, const Sides<T>& widths, const Sides<T>& heights, vec<T> at, bool inverse) {
    const idx K = op.bins;
    const vec<T>* c = raw + 2 * K;
    const bool inner = op.tails == Tails::linear;  // the outer knots have slope 1
    const T size = op.high - op.low;
    // Bin j begins at least · j + free · before/total.
    const Sides<T>& searched = inverse ? heights : widths;
    const vec<T> relative = (at - op.low) * searched.total.value / (size * searched.free);
    const vec<T> step = searched.total.value * (searched.least / searched.free);
    Sum<T> x{}, y{}, X{}, Y{};  // parts of widths and heights before a bin
    width = widths.part[0], height = heights.part[0];
    k = c0 = vec<T>{};
    if (!inner) c0 = c[0];
    c1 = c[inner ? 0 : 1];
    for (idx j = 1; j < K; ++j) {
      x.add(widths.summed[j - 1]), y.add(heights.summed[j - 1]);
      const mask<T> behind = relative >= T(j) * step + (inverse ? y : x).value();
      k = behind ? broadcast(T(j)) : k;
      X.units = behind ? x.units : X.units, Y.units = behind ? y.units : Y.units;
      width = behind ? widths.part[j] : width, height = behind ? heights.part[j] : height;
      const idx first = inner ? j - 1 : j, second = op.tails == Tails::circular && j + 1 == K ? 0 : first + 1;
      c0 = behind ? c[first] : c0;
      c1 = behind ? (inner && j + 1 == K ? vec<T>{} : c[second]) : c1;
    }
    wide = X.exact(), tall = Y.exact();
    across = widths.begin(k, wide), up = heights.begin(k, tall);
    w = size * (widths.least + widths.free * (width / widths.total.value));
    h = size * (heights.least + heights.free * (height / heights.total.value));
    d0 = slope_of(op, c0), d1 = slope_of(op, c1);
    if (inner) {
      const vec<T> one = broadcast(T(1));
      d0 = k == T(0) ? one : d0;
      d1 = k == T(K - 1) ? one : d1;
    }
    s = h / w;
    bend = d0 + d1 - T(2) * s;
    if (inverse) {
      const vec<T> above = beyond<T>(op, up, at);
      const vec<T> a = h * (s - d0) + above * bend, b = h * d0 - above * bend, e = s * above;
      const vec<T> square = b * b + T(4) * a * e;
      xi = T(2) * e / (b + sqrt(square > T(0) ? square : vec<T>{}));
    } else {
      xi = beyond<T>(op, across, at) / w;
    }
    const vec<T> left = T(1) - xi;
    q = xi * left;
    D = s + bend * q;
    E = d1 * xi * xi + T(2) * s * q + d0 * left * left;
  }

  vec<T> x(const Spline<T>& op) const { return plus<T>(op, across, w * xi); }
  vec<T> y(const Spline<T>& op) const { return plus<T>(op, up, h * (s * xi * xi + d0 * q) / D); }
  vec<T> slope() const {
    const vec<T> r = s / D;
    return r * r * E;
  }
};

template <class T>
struct Splined {
  vec<T> out, ell;
};

template <class T>
inline mask<T> inside(const Spline<T>& op, vec<T> v) {
  return (v >= op.low) & (v <= op.high);
}

// Out of v and its log-derivative, of one spline a lane.
template <class T>
Splined<T> spline_lanes(const Spline<T>& op, const Parameters<T>& raw, vec<T> v, bool inverse) {
  const mask<T> in = inside(op, v);
  const Sides<T> widths(op, raw, op.min_width), heights(op, raw + op.bins, op.min_height);
  const Bin<T> bin(op, raw, widths, heights, in ? v : broadcast(op.low), inverse);
  const vec<T> ell = log(bin.slope());
  return {in ? (inverse ? bin.x(op) : bin.y(op)) : v, in ? (inverse ? -ell : ell) : vec<T>{}};
}

// From ∂out and ∂logdet to ∂v, returned, and those of the parameters.
template <class T>
vec<T> spline_lanes_backward(const Spline<T>& op, const Parameters<T>& raw, vec<T> v, bool inverse, vec<T> g_out,
                             vec<T> g_ell, Parameters<T>& grad) {
  const idx K = op.bins;
  const mask<T> in = inside(op, v);
  const Sides<T> widths(op, raw, op.min_width), heights(op, raw + K, op.min_height);
  const Bin<T> b(op, raw, widths, heights, in ? v : broadcast(op.low), inverse);
  const vec<T> left = T(1) - b.xi, turn = left - b.xi;
  const vec<T> R = (b.s * b.xi * b.xi + b.d0 * b.q) / b.D;  // (y − Y)/h
  const vec<T> N_xi = T(2) * b.s * b.xi + b.d0 * turn, D_xi = b.bend * turn;
  const vec<T> E_xi = T(2) * (b.d1 * b.xi + b.s * turn - b.d0 * left);
  vec<T> gy = g_out, gl = g_ell, g_v;
  if (inverse) {
    // x(y) by the implicit function: dx = (dy − ∂y/∂θ dθ)/y'.
    gl = -g_ell;
    g_v = (g_out + gl * (E_xi / b.E - T(2) * D_xi / b.D) / b.w) / b.slope();
    gy = -g_v;
  }
  gy = in ? gy : vec<T>{}, gl = in ? gl : vec<T>{};
  const vec<T> gR = gy * b.h;
  const vec<T> gN = gR / b.D, gD = -(gR * R + T(2) * gl) / b.D, gE = gl / b.E;
  const vec<T> g_xi = gN * N_xi + gD * D_xi + gE * E_xi;
  const vec<T> g_s = gN * b.xi * b.xi + gD * (T(1) - T(2) * b.q) + T(2) * (gE * b.q + gl / b.s);
  const vec<T> g_X = -g_xi / b.w, g_w = -(g_s * b.s + g_xi * b.xi) / b.w, g_h = gy * R + g_s / b.w;
  vec<T> g0 = (gN + gD) * b.q + gE * left * left, g1 = gD * b.q + gE * b.xi * b.xi;
  g0 *= slope_derivative(op, b.c0, b.d0), g1 *= slope_derivative(op, b.c1, b.d1);

  widths.backward(op, raw, b.k, b.wide, b.width, g_X, g_w, grad);
  heights.backward(op, raw + K, b.k, b.tall, b.height, gy, g_h, grad + K);
  const idx shift = op.tails == Tails::linear ? 1 : 0, slopes = op.columns() - 2 * K;
  const vec<T> next = op.tails == Tails::circular ? (b.k == T(K - 1) ? vec<T>{} : b.k + T(1)) : b.k + T(1);
  for (idx j = 0; j < slopes; ++j) {
    const T knot = T(j + shift);
    grad[2 * K + j] = (b.k == knot ? g0 : vec<T>{}) + (next == knot ? g1 : vec<T>{});
  }
  return in ? (inverse ? g_v : -g_X) : g_out;
}

// Elements of (rows, n), row by row: those from column j of row m on, one in each lane. Lanes not in use repeat the last.
struct Elements {
  idx n, m, j, count;

  // Calls f(lane, row, column).
  template <idx L, class F>
  void each(F f) const {
    if (j + L <= n) {  // most often, and as a loop without branches
      for (idx i = 0; i < L; ++i) f(i, m, j + i);
      return;
    }
    idx row = m, column = j;
    for (idx i = 0; i < L; ++i) {
      f(i, row, column);
      if (i + 1 < count && ++column == n) column = 0, ++row;
    }
  }
};

// Calls f(elements) for all of rows × n.
template <class T, class F>
void over_elements(idx rows, idx n, F f) {
  constexpr idx L = lanes<T>;
  Elements some{n, 0, 0, L};
  for (idx left = rows * n; left > 0; left -= L) {
    some.count = std::min(L, left);
    f(some);
    for (some.j += L; some.j >= n; some.j -= n) ++some.m;
  }
}

// out ← spline of v (rows, n), with the parameters (rows, n · columns), and logdet += the sums of log-derivatives (or =, unless
// `accumulate`; may be null).
template <class T>
__attribute__((noinline)) void spline_rows(const Spline<T>& op, bool inverse, idx rows, idx n, Rows<const T> v, Rows<const T> parameters, Rows<T> out,
                 T* logdet, bool accumulate) {
  constexpr idx L = lanes<T>;
  const idx columns = op.columns();
  if (logdet && !accumulate) std::fill_n(logdet, rows, T(0));
  over_elements<T>(rows, n, [&](const Elements& some) {
    const T* place[L];
    T at[L], ell[L];
    some.each<L>([&](idx i, idx m, idx j) { place[i] = parameters[m] + j * columns, at[i] = v[m][j]; });
    Parameters<T> raw;
    gather<T>(place, columns, raw);
    const Splined<T> found = spline_lanes<T>(op, raw, load(at), inverse);
    store(at, found.out), store(ell, found.ell);
    some.each<L>([&](idx i, idx m, idx j) { out[m][j] = at[i]; });
    if (logdet) some.each<L>([&](idx i, idx m, idx) { logdet[m] += i < some.count ? ell[i] : T(0); });
  });
}

// From g = ∂out and ∂logdet to ∂v and ∂parameters; v as in the forward. ∂v may lie where ∂out does.
template <class T>
__attribute__((noinline)) void spline_rows_backward(const Spline<T>& op, bool inverse, idx rows, idx n, Rows<const T> v, Rows<const T> parameters,
                          Rows<const T> grad_out, const T* grad_logdet, Rows<T> grad_v, Rows<T> grad_parameters) {
  constexpr idx L = lanes<T>;
  const idx columns = op.columns();
  over_elements<T>(rows, n, [&](const Elements& some) {
    const T* place[L];
    T* target[L];
    T at[L], g[L], ell[L];
    some.each<L>([&](idx i, idx m, idx j) {
      place[i] = parameters[m] + j * columns, target[i] = grad_parameters[m] + j * columns;
      at[i] = v[m][j], g[i] = grad_out[m][j], ell[i] = grad_logdet[m];
    });
    Parameters<T> raw, grad;
    gather<T>(place, columns, raw);
    store(g, spline_lanes_backward<T>(op, raw, load(at), inverse, load(g), load(ell), grad));
    some.each<L>([&](idx i, idx m, idx j) { grad_v[m][j] = g[i]; });
    scatter<T>(grad, columns, target, some.count);
  });
}

}  // namespace glf::GLF_ISA
