// Dropout in hidden layers. Masks come of a counter-based generator, so that a backward repeats them and nothing keeps them:
// glf_fast.reference.dropout says which number decides about which unit.
#pragma once

#include "flow_tile.h"

namespace glf::GLF_ISA {

// 32-bit words, each in a lane of 64 bits whose upper half means nothing.
typedef std::uint64_t words __attribute__((vector_size(GLF_VECTOR_BYTES)));
inline constexpr idx counters = GLF_VECTOR_BYTES / 8;  // of the generator, side by side
inline constexpr idx drawn = 4 * counters;             // words that come of them

// 64-bit products of the words of all lanes. And the lanes 0, 2, 4, … or 1, 3, 5, … of a and b, taken by turns.
#if GLF_VECTOR_BYTES == 64
inline words product(words a, words b) { return (words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b); }
inline words even(words a, words b) { return (words)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b); }
inline words odd(words a, words b) { return (words)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b); }
#elif GLF_VECTOR_BYTES == 32
inline words product(words a, words b) { return (words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline words even(words a, words b) { return (words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline words odd(words a, words b) { return (words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
inline words product(words a, words b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline words even(words a, words b) { return words{a[0], b[0]}; }
inline words odd(words a, words b) { return words{a[1], b[1]}; }
#endif

// Philox4x32-10 (Salmon et al., SC 2011) of the counters (first + i, row, layer, step), four words of each, in order.
inline void philox(std::uint64_t key, std::uint32_t first, std::uint32_t row, std::uint32_t layer, std::uint32_t step,
                   std::uint32_t* to) {
  const words zero{}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  words x0 = zero, x1 = zero + row, x2 = zero + layer, x3 = zero + step;
  // Even lanes hold the first half of the counters, which is how `even` and `odd` want them.
  for (idx i = 0; i < counters; ++i) x0[i] = first + static_cast<std::uint32_t>(i % 2 * (counters / 2) + i / 2);
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const words a = product(x0, m0), b = product(x2, m1);
    x0 = (b >> 32) ^ x1 ^ (zero + k0);
    x2 = (a >> 32) ^ x3 ^ (zero + k1);
    x1 = b;
    x3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const words front = (x0 & 0xffffffff) | (x1 << 32), back = (x2 & 0xffffffff) | (x3 << 32);
  const words low = even(front, back), high = odd(front, back);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + drawn / 2, &high, sizeof high);
}

// What is dropped of one hidden layer of one network in one step. Blocks begin at a row of the tile, and at a unit that 4 divides.
template <class T>
class Dropout {
 public:
  Dropout(const Tile<T>& tile, idx step, int layer, int network = 0)
      : flow_(tile.flow),
        row_(static_cast<std::uint32_t>(tile.first)),
        layer_(static_cast<std::uint32_t>(layer + (network << 16))),
        step_(static_cast<std::uint32_t>(step)) {
    if (flow_.dropout == 0) return;
    least_ = static_cast<std::uint32_t>(std::min(std::nearbyint(flow_.dropout * 4294967296.0), 4294967295.0));
    scale_ = static_cast<T>(1 / (1 - flow_.dropout));
  }

  // h ← h·m/(1 − p), behind the activation.
  void apply(idx row, idx unit, idx rows, idx cols, T* h, idx ld) const {
    if (flow_.dropout > 0)
      each_part(row, unit, rows, cols, [&](idx m, idx j, idx n, const T* factors) { multiply_by(factors, n, h + m * ld + j); });
  }

  // g ← g·m/(1 − p)·a'(x): `kept` is x where the activation keeps it, else a(x)·m/(1 − p).
  void backward(idx row, idx unit, idx rows, idx cols, const T* kept, idx kept_m, T* g, idx g_m) const {
    const Activation a = flow_.activation;
    if (flow_.dropout == 0) return activate_backward(a, flow_.activation_constant, rows, cols, kept, kept_m, g, g_m);
    if (a == Activation::relu) {  // what was dropped is 0, where the slope is 0, too
      activate_backward(a, flow_.activation_constant, rows, cols, kept, kept_m, g, g_m);
      for (idx m = 0; m < rows; ++m)
        for (idx j = 0; j < cols; j += lanes<T>) store(g + m * g_m + j, load(g + m * g_m + j) * scale_);
      return;
    }
    if (keeps_argument(a)) {
      each_part(row, unit, rows, cols, [&](idx m, idx j, idx n, const T* factors) { multiply_by(factors, n, g + m * g_m + j); });
      return activate_backward(a, flow_.activation_constant, rows, cols, kept, kept_m, g, g_m);
    }
    const T undo = static_cast<T>(1 - flow_.dropout);
    each_part(row, unit, rows, cols, [&](idx m, idx j, idx n, const T* factors) {
      // Of a dropped unit a(x) is lost, but it has no gradient, either.
      alignas(64) T values[drawn];
      const T* from = kept + m * kept_m + j;
      for (idx c = 0; c < n; c += lanes<T>) store(values + c, load(from + c) * undo);
      T* to = g + m * g_m + j;
      activate_backward(a, flow_.activation_constant, 1, n, values, drawn, to, g_m);
      multiply_by(factors, n, to);
    });
  }

 private:
  static void multiply_by(const T* factors, idx n, T* to) {
    for (idx c = 0; c < n; c += lanes<T>) store(to + c, load(to + c) * load(factors + c));
  }

  // Calls f(row, column, columns, their m/(1 − p)) for parts of a block.
  template <class F>
  void each_part(idx row, idx unit, idx rows, idx cols, F f) const {
    alignas(64) std::uint32_t numbers[drawn];
    alignas(64) T factors[drawn];
    for (idx m = 0; m < rows; ++m)
      for (idx j = 0; j < cols; j += drawn) {
        philox(flow_.seed, static_cast<std::uint32_t>((unit + j) / 4), row_ + static_cast<std::uint32_t>(row + m), layer_, step_,
               numbers);
        for (idx c = 0; c < drawn; ++c) factors[c] = numbers[c] >= least_ ? scale_ : T(0);
        f(m, j, std::min(drawn, cols - j), factors);
      }
  }

  const Flow<T>& flow_;
  std::uint32_t row_, layer_, step_, least_ = 0;  // numbers from `least_` on keep a unit
  T scale_ = 1;
};

}  // namespace glf::GLF_ISA
