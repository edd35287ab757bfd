// What plu_assemble is given, and its backward gives: also to those who launch it.
#pragma once

#include "lanes.cuh"

namespace glf::device {

// One layer's parameters: permutation (D), lower, upper (D, D), the others (D); those of the ActNorm null without one.
template <class T>
struct Layer {
  int D;
  const long long* permutation;
  const T *lower, *upper, *log_diag, *sign, *log_scale, *bias;

  // Row of L U that row i of A is. An index out of range costs the result, never memory that is not the layer's.
  GLF_DEVICE int row(int i) const { return permutation[i] >= 0 && permutation[i] < D ? static_cast<int>(permutation[i]) : 0; }
  GLF_DEVICE T diag(int k) const { return sign[k] * exponential(log_diag[k]); }
  GLF_DEVICE T scale(int i) const { return log_scale ? exponential(log_scale[i]) : T(1); }
};

// The k-th of layers one behind the other.
template <class T>
GLF_DEVICE Layer<T> layer(const Layer<T>& first, long long k) {
  const long long vector = k * first.D, matrix = vector * first.D;
  return {first.D,
          first.permutation + vector,
          first.lower + matrix,
          first.upper + matrix,
          first.log_diag + vector,
          first.sign + vector,
          first.log_scale ? first.log_scale + vector : nullptr,
          first.bias ? first.bias + vector : nullptr};
}

template <class T>
struct LayerGradients {
  T *lower, *upper, *log_diag, *log_scale, *bias;
};

}  // namespace glf::device
