// A square of vectors turned around in registers.
#pragma once

#include "vec.h"

#include <utility>

namespace glf::GLF_ISA {

template <int S, class V, std::size_t... I>
inline void exchange(V& a, V& b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, ((I & S) ? n + int(I) - S : int(I))...);
  b = __builtin_shufflevector(a, b, ((I & S) ? n + int(I) : int(I) + S)...);
  a = low;
}

// Transpose of a square of vectors: off-diagonal blocks of side S = 1, 2, 4 … are exchanged.
template <class T, int S = 1>
inline __attribute__((always_inline)) void transpose(vec<T> (&rows)[lanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<lanes<T>>{});
  if constexpr (2 * S < lanes<T>) transpose<T, 2 * S>(rows);
}

}  // namespace glf::GLF_ISA
