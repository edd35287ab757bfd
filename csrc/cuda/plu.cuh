// Invertible linear layers in the PLU parametrisation with the ActNorm before them (csrc/cpu/plu.h has the mathematics):
// one block a layer. Matrices are read where they lie; a layer of D = 64 is 16 KB and stays in the first cache.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// One layer's parameters: permutation (D), lower, upper (D, D), the others (D); those of the ActNorm null without one.
template <class T>
struct Layer {
  int D;
  const long long* permutation;
  const T *lower, *upper, *log_diag, *sign, *log_scale, *bias;

  GLF_DEVICE T diag(int k) const { return sign[k] * exponential(log_diag[k]); }
  GLF_DEVICE T scale(int i) const { return log_scale ? exponential(log_scale[i]) : T(1); }
};

// A, A⁻¹ (unless null), c, log|det A|. `shared` holds 2 D numbers.
template <class T>
GLF_DEVICE void plu_assemble_layer(const Block& block, const Layer<T>& p, T* A, T* A_inv, T* c, T* logabsdet,
                                   T* shared) {
  const int D = p.D;
  T *diag = shared, *scale = shared + D;
  block.each(D, [&](int i) {
    diag[i] = p.diag(i);
    scale[i] = p.scale(i);
  });
  block.each(D, D, [&](int i, int j) {
    const int row = static_cast<int>(p.permutation[i]);
    T sum = row < j ? p.upper[row * D + j] : row == j ? diag[j] : p.lower[row * D + j] * diag[j];
    for (int k = 0; k < (row < j ? row : j); ++k) sum += p.lower[row * D + k] * p.upper[k * D + j];
    A[i * D + j] = scale[i] * sum;
  });
  block.each(D, [&](int j) {
    T sum = 0;
    if (p.bias)
      for (int i = 0; i < D; ++i) sum += p.bias[i] * A[i * D + j];
    c[j] = sum;
  });
  block.each(1, [&](int) {
    T total = 0;
    for (int i = 0; i < D; ++i) total += p.log_diag[i] + (p.log_scale ? p.log_scale[i] : T(0));
    *logabsdet = total;
  });
  if (!A_inv) return;
  // Column i of A⁻¹ is U⁻¹ L⁻¹ e_r/scale with r = permutation[i]: a thread solves it where it will lie.
  block.each(D, [&](int i) {
    const int r = static_cast<int>(p.permutation[i]);
    T* x = A_inv + i;
    for (int m = 0; m < D; ++m) {
      T sum = m == r ? T(1) : T(0);
      for (int k = r; k < m; ++k) sum -= p.lower[m * D + k] * x[k * D];
      x[m * D] = sum;
    }
    for (int m = D - 1; m >= 0; --m) {
      T sum = x[m * D];
      for (int k = m + 1; k < D; ++k) sum -= p.upper[m * D + k] * x[k * D];
      x[m * D] = sum / diag[m];
    }
    for (int m = 0; m < D; ++m) x[m * D] /= scale[i];
  });
}

template <class T>
struct LayerGradients {
  T *lower, *upper, *log_diag, *log_scale, *bias;
};

// From ∂A, ∂A⁻¹, ∂c, ∂log|det A| (null where zero). `g` and `product` (D, D) are work space, `shared` 2 D numbers.
template <class T>
GLF_DEVICE void plu_assemble_backward_layer(const Block& block, const Layer<T>& p, const T* A, const T* A_inv,
                                            const T* grad_A, const T* grad_A_inv, const T* grad_c,
                                            const T* grad_logabsdet, const LayerGradients<T>& grad, T* g, T* product,
                                            T* shared) {
  const int D = p.D;
  T *diag = shared, *scale = shared + D;
  const T g_logdet = grad_logabsdet ? *grad_logabsdet : T(0);
  block.each(D, [&](int i) {
    diag[i] = p.diag(i);
    scale[i] = p.scale(i);
  });
  if (grad_A_inv)
    block.each(D, D, [&](int i, int j) {  // A⁻ᵀ ∂A⁻¹
      T sum = 0;
      for (int k = 0; k < D; ++k) sum += A_inv[k * D + i] * grad_A_inv[k * D + j];
      product[i * D + j] = sum;
    });
  block.each(D, D, [&](int i, int j) {  // ∂A in all
    T sum = grad_A ? grad_A[i * D + j] : T(0);
    if (grad_c && p.bias) sum += p.bias[i] * grad_c[j];
    if (grad_A_inv)
      for (int k = 0; k < D; ++k) sum -= product[i * D + k] * A_inv[j * D + k];
    g[i * D + j] = sum;
  });
  if (p.log_scale)
    block.each(D, [&](int i) {
      T g_scale = g_logdet, g_bias = 0;
      for (int j = 0; j < D; ++j) {
        g_scale += g[i * D + j] * A[i * D + j];
        if (grad_c) g_bias += grad_c[j] * A[i * D + j];
      }
      grad.log_scale[i] = g_scale;
      grad.bias[i] = g_bias;
    });
  // M = L U has A's row i, but for its scale, as row permutation[i].
  block.each(D, D, [&](int i, int j) {
    product[static_cast<int>(p.permutation[i]) * D + j] = scale[i] * g[i * D + j];
  });
  block.each(D, D, [&](int i, int j) {
    T below = 0, above = 0;
    if (j < i) {  // ∂L = ∂M Uᵀ
      below = product[i * D + j] * diag[j];
      for (int k = j + 1; k < D; ++k) below += product[i * D + k] * p.upper[j * D + k];
    } else {  // ∂U = Lᵀ ∂M
      above = product[i * D + j];
      for (int k = i + 1; k < D; ++k) above += p.lower[k * D + i] * product[k * D + j];
    }
    grad.lower[i * D + j] = below;
    grad.upper[i * D + j] = i == j ? T(0) : above;
    if (i == j) grad.log_diag[i] = above * diag[i] + g_logdet;
  });
}

}  // namespace glf::device
