// Vectors of one instruction set, written with the compiler's vector extensions (GCC, Clang), so that AVX-512, AVX2 and
// NEON come from one source. Included only by kernels_*.cpp, which set GLF_ISA (a namespace: two instruction sets must
// never share a symbol) and GLF_VECTOR_BYTES.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace glf::GLF_ISA {

using idx = std::ptrdiff_t;

template <class T>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(GLF_VECTOR_BYTES)));
  typedef std::int32_t mask __attribute__((vector_size(GLF_VECTOR_BYTES)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(GLF_VECTOR_BYTES)));
  typedef std::int64_t mask __attribute__((vector_size(GLF_VECTOR_BYTES)));
};

template <class T>
using vec = typename vector_of<T>::type;
template <class T>
using mask = typename vector_of<T>::mask;

// Elements in a vector.
template <class T>
inline constexpr idx lanes = GLF_VECTOR_BYTES / sizeof(T);

constexpr idx round_up(idx n, idx multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
inline vec<T> load(const T* p) {
  vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n elements, 0 < n < lanes; the rest is zero. Nothing behind them is touched. The only intrinsics of the
// kernels but for square roots: small flows work on parts of vectors everywhere, and a loop over elements would be a call of memcpy.
#if GLF_VECTOR_BYTES == 64
inline vec<float> load_few(const float* p, idx n) { return (vec<float>)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline vec<double> load_few(const double* p, idx n) { return (vec<double>)_mm512_maskz_loadu_pd((1u << n) - 1, p); }
inline void store_few(float* p, vec<float> v, idx n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
inline void store_few(double* p, vec<double> v, idx n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v); }
#elif GLF_VECTOR_BYTES == 32
inline __m256i few(idx n, vec<float>) {
  return (__m256i)(mask<float>{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<std::int32_t>(n));
}
inline __m256i few(idx n, vec<double>) { return (__m256i)(mask<double>{0, 1, 2, 3} < static_cast<std::int64_t>(n)); }
inline vec<float> load_few(const float* p, idx n) { return (vec<float>)_mm256_maskload_ps(p, few(n, vec<float>{})); }
inline vec<double> load_few(const double* p, idx n) { return (vec<double>)_mm256_maskload_pd(p, few(n, vec<double>{})); }
inline void store_few(float* p, vec<float> v, idx n) { _mm256_maskstore_ps(p, few(n, v), (__m256)v); }
inline void store_few(double* p, vec<double> v, idx n) { _mm256_maskstore_pd(p, few(n, v), (__m256d)v); }
#else
template <class T>
inline vec<T> load_few(const T* p, idx n) {
  vec<T> v{};
  for (idx i = 0; i < lanes<T>; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
template <class T>
inline void store_few(T* p, vec<T> v, idx n) {
  for (idx i = 0; i < lanes<T>; ++i)
    if (i < n) p[i] = v[i];
}
#endif

// The first n elements, or the whole vector; nothing for n ≤ 0.
template <class T>
inline vec<T> load_part(const T* p, idx n) {
  return n >= lanes<T> ? load(p) : n > 0 ? load_few(p, n) : vec<T>{};
}

template <class T>
inline void store_part(T* p, vec<T> v, idx n) {
  if (n >= lanes<T>)
    store(p, v);
  else if (n > 0)
    store_few(p, v, n);
}

template <class T>
inline vec<T> broadcast(T s) {
  return s - vec<T>{};  // 0 + s is an addition, because of −0: two instructions more in the loop of every product
}

}  // namespace glf::GLF_ISA
