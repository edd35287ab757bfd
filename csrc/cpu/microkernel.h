// The one matrix microkernel: C (MR rows × NV vectors) = start + A B, with every accumulator in a register.
#pragma once

#include "vec.h"

namespace glf::GLF_ISA {

// A is read one element at a time through two strides, so the same code serves Y = X W (a_k = 1), dX = dY Wᵀ (B packed
// transposed) and dW = Xᵀ dY (a_m = 1). B is read in rows of NV vectors, b_k elements apart.
template <class T, int MR, int NV>
inline __attribute__((always_inline)) void microkernel(
    idx K, const T* a, idx a_m, idx a_k, const T* b, idx b_k, vec<T> (&acc)[MR][NV]) {
  for (idx k = 0; k < K; ++k) {
    vec<T> row[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) row[v] = load(b + v * lanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vec<T> s = broadcast(a[m * a_m]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m][v] += s * row[v];
    }
    a += a_k;
    b += b_k;
  }
}

}  // namespace glf::GLF_ISA
