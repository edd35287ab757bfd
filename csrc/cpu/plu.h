// Invertible linear layers in the PLU parametrisation, with the ActNorm before them, as affine maps: Glow
// (arXiv:1807.03039), eq. 10. W = P L U with U's diagonal d = sign·e^(log d); A = diag(e^s) W, c = b A.
#pragma once

#include "math.h"
#include "triangular.h"

namespace glf::GLF_ISA {

// One layer's factors as dense, padded matrices: rows `ld` apart, so that whole vectors can be read and written.
template <class T>
struct Factors {
  idx dim, ld;
  T *lower, *upper;  // L with its ones, U with its diagonal, zeros elsewhere
  T *diag, *scale;   // d and e^s (ones without ActNorm)
  T *a, *b, *c;      // room for three more matrices
  T* panel;
  static idx stride(idx dim) { return round_up(dim, NR * lanes<T>); }
  static idx size(idx dim) { return (5 * dim + 2) * stride(dim) + stride(dim) * NR * lanes<T>; }

  Factors(idx n, T* memory) : dim(n), ld(stride(n)) {
    const auto take = [&memory](idx elements) { return std::exchange(memory, memory + elements); };
    for (T** matrix : {&lower, &upper, &a, &b, &c}) *matrix = take(dim * ld);
    diag = take(ld);
    scale = take(ld);
    panel = take(ld * NR * lanes<T>);
  }

  void load_layer(const Plu<T>& plu, idx k) {
    constexpr idx L = lanes<T>;
    for (idx j = 0; j < dim; j += L) {
      const idx at = k * dim + j, left = dim - j;
      store(diag + j, load_part(plu.sign + at, left) * exp(load_part(plu.log_diag + at, left)));
      store(scale + j, plu.log_scale ? exp(load_part(plu.log_scale + at, left)) : broadcast(T(1)));
    }
    for (idx i = 0; i < dim; ++i) {
      T *l = lower + i * ld, *u = upper + i * ld;
      std::fill_n(l, ld, T(0));
      std::fill_n(u, ld, T(0));
      std::copy_n(plu.lower + (k * dim + i) * dim, i, l);
      std::copy_n(plu.upper + (k * dim + i) * dim + i + 1, dim - i - 1, u + i + 1);
      l[i] = 1;
      u[i] = diag[i];
    }
  }

  // to = L U. Rows up to m + MR of L end there, and columns up to j + W of U do.
  void product(T* to) const {
    constexpr idx W = NR * lanes<T>;
    for (idx j = 0; j < ld; j += W)
      for (idx m = 0; m < dim; m += MR) {
        const idx rows = std::min<idx>(MR, dim - m), inner = std::min(m + rows, std::min(j + W, dim));
        pick_block<T>(rows, NR)(inner, lower + m * ld, ld, 1, upper + j, ld, to + m * ld + j, ld, W, nullptr, false);
      }
  }

  // to = (L U)⁻¹. L and U are used up.
  void inverse(T* to) {
    for (idx i = 0; i < dim * ld; ++i) {
      lower[i] = -lower[i];
      upper[i] = -upper[i];
    }
    invert_factors(dim, lower, upper, diag, to, ld);
  }
};

// Runs f(layer, its factors) for all layers. A thread is woken for at least half a million multiply-adds.
template <class T, class F>
void over_layers(const Plu<T>& plu, const Parallel& parallel, F f) {
  const idx work = plu.count * plu.dim * plu.dim * plu.dim;
  const int threads = static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, plu.count), 1, parallel.threads));
  in_parallel(parallel, threads, [&](int thread) {
    const Scratch<T> memory(Factors<T>::size(plu.dim));
    Factors<T> factors(plu.dim, memory.get());
    for (idx k = thread; k < plu.count; k += threads) {
      factors.load_layer(plu, k);
      f(k, factors);
    }
  });
}

template <class T>
void plu_assemble(const Plu<T>& plu, T* A, T* A_inv, T* c, T* logabsdet, const Parallel& parallel) {
  constexpr idx L = lanes<T>;
  const idx D = plu.dim;
  over_layers(plu, parallel, [&](idx k, Factors<T>& f) {
    f.product(f.a);
    T total = 0;
    for (idx j = 0; j < D; ++j) total += plu.log_diag[k * D + j] + (plu.log_scale ? plu.log_scale[k * D + j] : T(0));
    logabsdet[k] = total;
    const std::int64_t* permutation = plu.permutation + k * D;
    for (idx j = 0; j < D; j += L) {
      vec<T> sum{};
      for (idx i = 0; i < D; ++i) {
        const vec<T> row = f.scale[i] * load(f.a + permutation[i] * f.ld + j);
        store_part(A + (k * D + i) * D + j, row, D - j);
        if (plu.bias) sum += plu.bias[k * D + i] * row;
      }
      store_part(c + k * D + j, sum, D - j);
    }
    if (!A_inv) return;
    f.inverse(f.b);
    for (idx i = 0; i < D; ++i)
      for (idx j = 0; j < D; ++j) A_inv[(k * D + i) * D + j] = f.b[i * f.ld + permutation[j]] / f.scale[j];
  });
}

// From ∂A, ∂A⁻¹, ∂c, ∂log|det A| (null where zero) to the parameters' gradients; those of the ActNorm may be null.
template <class T>
void plu_assemble_backward(const Plu<T>& plu, const T* A, const T* A_inv, const T* grad_A, const T* grad_A_inv,
                           const T* grad_c, const T* grad_logabsdet, const PluGradients<T>& grad,
                           const Parallel& parallel) {
  constexpr idx L = lanes<T>, W = NR * L;
  const idx D = plu.dim;
  over_layers(plu, parallel, [&](idx k, Factors<T>& f) {
    const idx ld = f.ld, matrix = k * D * D;
    const T g_logdet = grad_logabsdet ? grad_logabsdet[k] : T(0);
    T *g_A = f.a, *g_M = f.b, *product = f.c;
    // ∂A in all: −A⁻ᵀ ∂A⁻¹ A⁻ᵀ, and b ∂c of c = b A.
    if (grad_A_inv) {
      for (idx i = 0; i < D; ++i)
        for (idx j = 0; j < ld; j += L) store(product + i * ld + j, -load_part(grad_A_inv + matrix + i * D + j, D - j));
      outer_sum(D, D, ld, A_inv + matrix, D, product, ld, g_M, false);
      multiply<T>(D, D, D, g_M, ld, A_inv + matrix, true, g_A, ld, nullptr, f.panel);
    }
    for (idx i = 0; i < D; ++i) {
      vec<T> g_scale{}, g_bias{};
      T* row = g_M + plu.permutation[k * D + i] * ld;  // M = L U, of which A's row i is e^s times row permutation[i]
      for (idx j = 0; j < ld; j += L) {
        const idx left = D - j, at = matrix + i * D + j;
        vec<T> g = grad_A_inv && left > 0 ? first_lanes<T>(load(g_A + i * ld + j), std::min(left, L)) : vec<T>{};
        if (grad_A) g += load_part(grad_A + at, left);
        const vec<T> a = load_part(A + at, left);
        if (plu.bias && grad_c) {
          const vec<T> g_c = load_part(grad_c + k * D + j, left);
          g_bias += g_c * a;
          g += plu.bias[k * D + i] * g_c;
        }
        g_scale += g * a;
        store(row + j, f.scale[i] * g);
      }
      if (grad.log_scale) grad.log_scale[k * D + i] = sum<T>(g_scale) + g_logdet;
      if (grad.bias) grad.bias[k * D + i] = sum<T>(g_bias);
    }
    // ∂L = ∂M Uᵀ below the diagonal: only rows from column j on, and inner indices from there.
    for (idx j = 0; j < D; j += W) {
      pack_transposed(f.upper + j * ld + j, ld, D - j, std::min(W, D - j), f.panel);
      for (idx m = j; m < D; m += MR)
        pick_block<T>(std::min<idx>(MR, D - m), NR)(D - j, g_M + m * ld + j, ld, 1, f.panel, W, product + m * ld + j, ld,
                                                   W, nullptr, false);
    }
    for (idx i = 0; i < D; ++i) {
      T* to = grad.lower + matrix + i * D;
      std::copy_n(product + i * ld, i, to);
      std::fill_n(to + i, D - i, T(0));
    }
    // ∂U = Lᵀ ∂M on and above the diagonal, likewise.
    for (idx m = 0; m < D; m += MR)
      for (idx j = m / W * W; j < D; j += W)
        pick_block<T>(std::min<idx>(MR, D - m), NR)(D - m, f.lower + m * ld + m, 1, ld, g_M + m * ld + j, ld,
                                                   product + m * ld + j, ld, W, nullptr, false);
    for (idx i = 0; i < D; ++i) {
      T* to = grad.upper + matrix + i * D;
      std::fill_n(to, i + 1, T(0));
      std::copy_n(product + i * ld + i + 1, D - i - 1, to + i + 1);
      grad.log_diag[k * D + i] = product[i * ld + i] * f.diag[i] + g_logdet;
    }
  });
}

}  // namespace glf::GLF_ISA
