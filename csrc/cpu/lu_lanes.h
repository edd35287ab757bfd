// LU of very small matrices, one in each lane: entry (i, j) of `lanes` matrices is one vector, and rows are exchanged by
// selection, so that no lane takes a branch of its own. With AVX-512 and float32 5 times faster at D = 9 than a row in a
// vector, 3 times at D = 16.
#pragma once

#include "math.h"
#include "tile.h"
#include "transpose.h"

namespace glf::GLF_ISA {

inline constexpr idx max_lanes_dim = 16;

inline int lu_threads(idx count, idx dim, const Parallel& parallel) {
  // Small matrices are slower than their multiply-adds: 2 D² more of them is a fair account.
  const idx work = count * dim * dim * (dim + 32);
  return static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, count), 1, parallel.threads));
}

template <class T>
inline mask<T> all(idx n) {
  return mask<T>{} + static_cast<std::remove_reference_t<decltype(mask<T>{}[0])>>(n);
}

// Exchanges entry k of D, which stand `step` apart, with entry `best` > k or with itself.
template <class T>
inline void exchange_with(idx k, mask<T> best, idx D, idx step, vec<T>* entries) {
  const vec<T> was = entries[k * step];
  vec<T> found = was;
  for (idx i = k + 1; i < D; ++i) {
    const mask<T> chosen = best == all<T>(i);
    const vec<T> here = entries[i * step];
    found = chosen ? here : found;
    entries[i * step] = chosen ? was : here;
  }
  entries[k * step] = found;
}

// Entries of matrices [0, n), n ≤ lanes, to vectors of one entry each and back. Rows of `a` behind entry D² − 1, up to a
// whole square, are written and read, too. Lanes without a matrix repeat the first.
template <class T>
void to_lanes(idx n, idx entries, const T* A, vec<T>* a) {
  constexpr idx L = lanes<T>;
  for (idx e = 0; e < entries; e += L) {
    vec<T> square[L];
    for (idx lane = 0; lane < L; ++lane) square[lane] = load_part(A + (lane < n ? lane : 0) * entries + e, entries - e);
    transpose<T>(square);
    for (idx i = 0; i < L; ++i) a[e + i] = square[i];
  }
}

template <class T>
void from_lanes(idx n, idx entries, const vec<T>* a, T* A) {
  constexpr idx L = lanes<T>;
  for (idx e = 0; e < entries; e += L) {
    vec<T> square[L];
    for (idx i = 0; i < L; ++i) square[i] = a[e + i];
    transpose<T>(square);
    for (idx lane = 0; lane < n; ++lane) store_part(A + lane * entries + e, square[lane], entries - e);
  }
}

// Signs and logarithms of determinants from U's diagonal: mantissas multiply and exponents add, one logarithm in all.
template <class T>
void slogdet_lanes(idx D, const vec<T>* a, const mask<T>* pivots, vec<T>& sign, vec<T>& logabsdet) {
  using Limits = std::numeric_limits<T>;
  constexpr int mantissa_bits = Limits::digits - 1, bias = Limits::max_exponent - 1;
  const vec<T> one = broadcast(T(1)), infinite = broadcast(Limits::infinity());
  const mask<T> mantissa_of = (mask<T>)broadcast(Limits::min()) - 1;  // the bits below the exponent
  vec<T> product = one, special = one;  // of mantissas in [1, 2): below 2¹⁶; of zeros, infinities and NaN
  mask<T> exponent{}, odd{};
  for (idx k = 0; k < D; ++k) {
    const vec<T> u = a[k * D + k], size = abs(u);
    const mask<T> subnormal = size < Limits::min(), plain = (size > T(0)) & (size < infinite);
    const mask<T> bits = (mask<T>)(subnormal ? size * (T(2) / Limits::epsilon()) : size);
    const mask<T> shift = all<T>(bias) + (subnormal & all<T>(mantissa_bits + 1));
    product *= plain ? (vec<T>)((bits & mantissa_of) | (mask<T>)one) : one;
    exponent += plain & ((bits >> mantissa_bits) - shift);
    special *= plain ? one : size;
    odd ^= (u < T(0)) ^ (pivots[k] != all<T>(k));
  }
  const vec<T> turns = __builtin_convertvector(exponent, vec<T>);
  // ln 2 in two parts, the first exact times the exponents.
  const vec<T> total = turns * T(0.693359375) + (turns * T(-2.12194440054690583e-4) + log(product));
  const vec<T> extreme = special == T(0) ? -infinite : special;  // NaN stays
  logabsdet = special == one ? total : extreme;
  sign = special > T(0) ? (odd ? -one : one) : vec<T>{};
}

// Matrices [0, n) with n ≤ lanes. `a` and `x` have room for max_lanes_dim² vectors.
template <class T>
void slogdet_inverse_pack(idx n, idx D, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info, vec<T>* a,
                          vec<T>* x) {
  const vec<T> one = broadcast(T(1));
  mask<T> pivots[max_lanes_dim];  // row that row k was exchanged with
  to_lanes(n, D * D, A, a);

  // Factor: U on and above the diagonal, −L below, as in lu.h.
  mask<T> zero_at{};
  for (idx k = 0; k < D; ++k) {
    vec<T> size = abs(a[k * D + k]);
    mask<T> best = all<T>(k);
    for (idx i = k + 1; i < D; ++i) {
      const vec<T> here = abs(a[i * D + k]);
      const mask<T> larger = here > size;
      size = larger ? here : size;
      best = larger ? all<T>(i) : best;
    }
    pivots[k] = best;
    for (idx j = 0; j < D; ++j) exchange_with<T>(k, best, D, D, a + j);
    const vec<T> pivot = a[k * D + k];
    const mask<T> zero = pivot == vec<T>{};
    zero_at = (zero & (zero_at == mask<T>{})) ? all<T>(k + 1) : zero_at;
    const vec<T> divisor = zero ? one : pivot;
    for (idx i = k + 1; i < D; ++i) {
      const vec<T> f = -a[i * D + k] / divisor;
      a[i * D + k] = f;
      for (idx j = k + 1; j < D; ++j) a[i * D + j] += f * a[k * D + j];
    }
  }
  vec<T> signs, logarithms;
  slogdet_lanes<T>(D, a, pivots, signs, logarithms);
  store_part(sign, signs, n);
  store_part(logabsdet, logarithms, n);
  for (idx lane = 0; lane < n; ++lane) info[lane] = static_cast<std::int32_t>(zero_at[lane]);

  // x = L⁻¹, of which row i ends at column i, then U⁻¹ x, then its columns in A's order.
  for (idx i = 0; i < D; ++i) {
    for (idx j = 0; j < i; ++j) {
      vec<T> sum = a[i * D + j];
      for (idx k = j + 1; k < i; ++k) sum += a[i * D + k] * x[k * D + j];
      x[i * D + j] = sum;
    }
    x[i * D + i] = one;
  }
  for (idx i = D - 1; i >= 0; --i) {
    const vec<T> reciprocal = one / a[i * D + i];
    for (idx j = 0; j < D; ++j) {
      vec<T> sum = j <= i ? x[i * D + j] : vec<T>{};
      for (idx k = i + 1; k < D; ++k) sum -= a[i * D + k] * x[k * D + j];
      x[i * D + j] = sum * reciprocal;
    }
  }
  for (idx i = 0; i < D; ++i)
    for (idx k = D - 1; k >= 0; --k) exchange_with<T>(k, pivots[k], D, 1, x + i * D);
  from_lanes(n, D * D, x, inverse);
}

template <class T>
void slogdet_inverse_lanes(idx count, idx D, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info,
                           const Parallel& parallel) {
  constexpr idx L = lanes<T>;
  const idx packs = (count + L - 1) / L;
  const int threads = static_cast<int>(std::min<idx>(lu_threads(count, D, parallel), std::max<idx>(packs, 1)));
  in_parallel(parallel, threads, [&](int thread) {
    vec<T> a[max_lanes_dim * max_lanes_dim], x[max_lanes_dim * max_lanes_dim];
    for (idx pack = packs * thread / threads; pack < packs * (thread + 1) / threads; ++pack) {
      const idx at = pack * L;
      slogdet_inverse_pack(std::min(L, count - at), D, A + at * D * D, sign + at, logabsdet + at, inverse + at * D * D,
                           info + at, a, x);
    }
  });
}

}  // namespace glf::GLF_ISA
