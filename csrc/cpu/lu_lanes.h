// LU of very small matrices, one in each lane: entry (i, j) of `lanes` matrices is one vector, and rows are exchanged by
// selection, so that no lane takes a branch of its own. With AVX-512 and float32 5 times faster at D = 9 than a row in a
// vector, 3 times at D = 16.
#pragma once

#include "math.h"
#include "tile.h"

namespace glf::GLF_ISA {

inline constexpr idx max_lanes_dim = 16;

inline int lu_threads(idx count, idx dim, const Parallel& parallel) {
  // Small matrices are slower than their multiply-adds: 2 D² more of them is a fair account.
  const idx work = count * dim * dim * (dim + 32);
  return static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, count), 1, parallel.threads));
}

// The order in which exchanges of rows leave them: row i of P A is row order[i] of A.
inline void row_order(idx dim, const std::int32_t* pivots, idx step, std::int32_t* order) {
  for (idx i = 0; i < dim; ++i) order[i] = static_cast<std::int32_t>(i);
  for (idx i = 0; i < dim; ++i) std::swap(order[i], order[pivots[i * step]]);
}

// Sign and logarithm of a determinant from U's diagonal and the exchanges. A zero gives (0, −∞), NaN (0, NaN).
template <class T>
inline void slogdet(idx dim, const T* diag, idx step, const std::int32_t* pivots, idx pivot_step, T* sign, T* logabsdet) {
  // Six floats multiply within the range of a double: one logarithm for all of them.
  constexpr idx group = sizeof(T) == 4 ? 6 : 1;
  double total = 0;
  int s = 1;
  for (idx k = 0; k < dim; k += group) {
    double product = 1;
    for (idx i = k; i < std::min(k + group, dim); ++i) {
      const T d = diag[i * step];
      product *= std::fabs(d);
      s *= d > 0 ? 1 : d < 0 ? -1 : 0;
      if (pivots[i * pivot_step] != i) s = -s;
    }
    total += std::log(product);
  }
  *sign = T(s);
  *logabsdet = static_cast<T>(total);
}

template <class T>
inline mask<T> all(idx n) {
  return mask<T>{} + static_cast<std::remove_reference_t<decltype(mask<T>{}[0])>>(n);
}

// Matrices [first, first + n) with n ≤ lanes; a and x have room for D² vectors, `pivots` for D and `order` for D numbers.
template <class T>
void slogdet_inverse_pack(idx n, idx D, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info, vec<T>* a,
                          vec<T>* x, mask<T>* pivots, std::int32_t* order) {
  constexpr idx L = lanes<T>;
  const vec<T> one = broadcast(T(1));
  T* entries = reinterpret_cast<T*>(a);
  for (idx lane = 0; lane < L; ++lane)  // lanes without a matrix repeat the first
    for (idx e = 0; e < D * D; ++e) entries[e * L + lane] = A[(lane < n ? lane : 0) * D * D + e];

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
    for (idx i = k + 1; i < D; ++i) {
      const mask<T> chosen = best == all<T>(i);
      for (idx j = 0; j < D; ++j) {
        const vec<T> top = a[k * D + j], row = a[i * D + j];
        a[k * D + j] = chosen ? row : top;
        a[i * D + j] = chosen ? top : row;
      }
    }
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

  // x = L⁻¹, of which row i ends at column i, then U⁻¹ x.
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

  const T* inverses = reinterpret_cast<const T*>(x);
  for (idx lane = 0; lane < n; ++lane) {
    std::int32_t exchanges[max_lanes_dim];
    for (idx k = 0; k < D; ++k) exchanges[k] = static_cast<std::int32_t>(pivots[k][lane]);
    slogdet(D, entries + lane, (D + 1) * L, exchanges, 1, sign + lane, logabsdet + lane);
    info[lane] = static_cast<std::int32_t>(zero_at[lane]);
    row_order(D, exchanges, 1, order);
    T* to = inverse + lane * D * D;
    for (idx i = 0; i < D; ++i)
      for (idx j = 0; j < D; ++j) to[i * D + order[j]] = inverses[(i * D + j) * L + lane];
  }
}

template <class T>
void slogdet_inverse_lanes(idx count, idx D, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info,
                           const Parallel& parallel) {
  constexpr idx L = lanes<T>;
  const idx packs = (count + L - 1) / L;
  const int threads = static_cast<int>(std::min<idx>(lu_threads(count, D, parallel), std::max<idx>(packs, 1)));
  in_parallel(parallel, threads, [&](int thread) {
    alignas(64) vec<T> a[max_lanes_dim * max_lanes_dim], x[max_lanes_dim * max_lanes_dim];
    alignas(64) mask<T> pivots[max_lanes_dim];
    std::int32_t order[max_lanes_dim];
    for (idx pack = packs * thread / threads; pack < packs * (thread + 1) / threads; ++pack) {
      const idx at = pack * L;
      slogdet_inverse_pack(std::min(L, count - at), D, A + at * D * D, sign + at, logabsdet + at, inverse + at * D * D,
                           info + at, a, x, pivots, order);
    }
  });
}

}  // namespace glf::GLF_ISA
