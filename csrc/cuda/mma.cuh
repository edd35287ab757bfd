// Matrix units: the product of a warp's fragments, mma.sync, and the rounding of its operands.
//
// Lane l is g = l / 4, t = l % 4. What it holds of the sum c (16 × 8) and of the factors a (16 × depth) and b (depth × 8):
//
//            c[0], c[1]      c[2], c[3]          a[0]         a[1]             a[2]             a[3]         b0           b1
//   tf32   (g, 2t), +1   (g + 8, 2t), +1      (g, t)      (g + 8, t)       (g, t + 4)      (g + 8, t + 4)  (t, g)     (t + 4, g)
//   bf16   the same         the same         (g, 2t..)   (g + 8, 2t..)    (g, 2t + 8..)   (g + 8, 2t + 8..) (2t.., g) (2t + 8.., g)
//
// A word holds a tf32 number, or a pair of bf16 numbers (`..`), the one of the lower index in its lower half. The inner index
// may be permuted, if it is in both factors alike.
//
// On the host an instruction is a gather over the 32 lanes by the same table: a fragment that lies wrongly gives a wrong
// result there, too. GPUs before sm_80 have neither number format. Code for them traps; launchers refuse these GPUs, which keep
// plain PyTorch's products.
#pragma once

#include "lanes.cuh"

#ifndef __CUDACC__
#include <cstring>
#endif

namespace glf::device {

using Word = unsigned int;

#ifdef __CUDACC__

// A tf32 number as float32.
GLF_DEVICE float as_float(Word x) { return __uint_as_float(x); }

// Rounded to tf32's 10 bits, ties away from zero. Matrix units ignore the other 13: unrounded operands would be truncated.
GLF_DEVICE Word round_tf32(float x) {
  Word r = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
#else
  __trap();
#endif
  return r;
}

// Rounded to nearest, ties to even; `first` in the lower half.
GLF_DEVICE Word bf16_pair(float first, float second) {
  Word r = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
#else
  __trap();
#endif
  return r;
}

// c += a b of tf32 numbers, 8 deep.
GLF_DEVICE void mma_tf32(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// c += a b of bf16 numbers, 16 deep.
GLF_DEVICE void mma_bf16(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Four 8 × 8 matrices of 16-bit numbers from shared memory as their transposes: lane (g, t) gets of matrix i, in r[i], entries
// (2t, g) and (2t + 1, g). Line e of matrix i, 8 numbers, begins at line(8 i + e), a multiple of 16 bytes.
template <class F>
GLF_DEVICE void load_transposed(Word (&r)[4], F line) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(line(int(threadIdx.x % 32))));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// x = high + low, of which matrix units take all but 2⁻²³ of x: what is left of the low one's bits is not worth the three
// instructions of its rounding. Of an infinity the low one is NaN.
GLF_DEVICE void split_tf32(float x, Word& high, Word& low) {
  high = round_tf32(x);
  low = __float_as_uint(x - as_float(high));
}

#else

// Matrix units do not round their sums: they truncate them toward zero (Ootomo and Yokota, arXiv:2203.03341, of V100 to A100).
// Tests of errors set this, tests of layouts do not.
inline bool truncating = false;

inline Word bits_of(float x) {
  Word r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline float as_float(Word x) {
  float r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline Word round_tf32(float x) { return x != x ? 0x7fffffffu : std::isinf(x) ? bits_of(x) : (bits_of(x) + 0x1000u) & 0xffffe000u; }
inline Word round_bf16(float x) {
  return x != x ? 0x7fffu : (bits_of(x) + 0x7fffu + (bits_of(x) >> 16 & 1u)) >> 16;
}
inline Word bf16_pair(float first, float second) { return round_bf16(first) | round_bf16(second) << 16; }
inline void split_tf32(float x, Word& high, Word& low) {
  high = round_tf32(x);
  low = bits_of(x - as_float(high));
}

template <class F>
void load_transposed(Lane<Word> (&r)[4], F line) {
  for (int i = 0; i < 4; ++i)
    r[i] = by_lane([&](int l) {
      const int e = l % 4 * 2, column = l / 4;
      return Word(line(8 * i + e)[column]) | Word(line(8 * i + e + 1)[column]) << 16;
    });
}

inline Lane<float> as_float(const Lane<Word>& x) {
  return by_lane([&](int l) { return as_float(x.v[l]); });
}
inline Lane<Word> round_tf32(const Lane<float>& x) {
  return by_lane([&](int l) { return round_tf32(x.v[l]); });
}
inline Lane<Word> bf16_pair(const Lane<float>& first, const Lane<float>& second) {
  return by_lane([&](int l) { return bf16_pair(first.v[l], second.v[l]); });
}
inline void split_tf32(const Lane<float>& x, Lane<Word>& high, Lane<Word>& low) {
  for (int l = 0; l < 32; ++l) split_tf32(x.v[l], high.v[l], low.v[l]);
}

// c += Σ a(row, k) b(k, column) over k < depth, added up in double and brought to float32 once.
template <int depth, class A, class B>
void multiply_add(Lane<float> (&c)[4], A a, B b) {
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      double sum = c[e].v[l];
      for (int k = 0; k < depth; ++k) sum += double(a(row, k)) * double(b(k, column));
      const float rounded = static_cast<float>(sum);
      const bool beyond = truncating && std::fabs(double(rounded)) > std::fabs(sum);
      c[e].v[l] = beyond ? std::nextafter(rounded, 0.0f) : rounded;
    }
}

inline void mma_tf32(Lane<float> (&c)[4], const Lane<Word> (&a)[4], const Lane<Word>& b0, const Lane<Word>& b1) {
  const auto number = [](const Lane<Word>& x, int lane) { return as_float(x.v[lane] & 0xffffe000u); };
  multiply_add<8>(
      c, [&](int row, int k) { return number(a[row / 8 + k / 4 * 2], row % 8 * 4 + k % 4); },
      [&](int k, int column) { return number(k / 4 ? b1 : b0, column * 4 + k % 4); });
}

inline void mma_bf16(Lane<float> (&c)[4], const Lane<Word> (&a)[4], const Lane<Word>& b0, const Lane<Word>& b1) {
  const auto number = [](const Lane<Word>& x, int lane, int k) { return as_float(x.v[lane] >> k % 2 * 16 << 16); };
  multiply_add<16>(
      c, [&](int row, int k) { return number(a[row / 8 + k / 8 * 2], row % 8 * 4 + k % 8 / 2, k); },
      [&](int k, int column) { return number(k / 8 ? b1 : b0, column * 4 + k % 8 / 2, k); });
}

#endif

// c += a b of float32 numbers that `split_tf32` has divided: three tf32 products, the small ones first.
GLF_DEVICE void mma_tf32x3(Lane<float> (&c)[4], const Lane<Word> (&a_high)[4], const Lane<Word> (&a_low)[4],
                           const Lane<Word>& b0_high, const Lane<Word>& b1_high, const Lane<Word>& b0_low,
                           const Lane<Word>& b1_low) {
  mma_tf32(c, a_low, b0_high, b1_high);
  mma_tf32(c, a_high, b0_low, b1_low);
  mma_tf32(c, a_high, b0_high, b1_high);
}

}  // namespace glf::device
