// Dropout in hidden layers. Masks come of a counter-based generator, so that a backward repeats them and nothing keeps them:
// glf_fast.reference.dropout says which number decides about which unit.
#pragma once

#include "flow_tile.h"
#include "panel.h"

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

// Philox4x32-10 (Salmon et al., SC 2011): four words of each counter, which x holds.
inline void philox(std::uint64_t key, words (&x)[4]) {
  const words zero{}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const words a = product(x[0], m0), b = product(x[2], m1);
    x[0] = (b >> 32) ^ x[1] ^ (zero + k0);
    x[2] = (a >> 32) ^ x[3] ^ (zero + k1);
    x[1] = b;
    x[3] = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The words of the counters (first + i, row, layer, step), four of each, in order.
inline void words_of_units(std::uint64_t key, std::uint32_t first, std::uint32_t row, std::uint32_t layer, std::uint32_t step,
                           std::uint32_t* to) {
  const words zero{};
  words units{};
  // Even lanes hold the first half of the counters, which is how `even` and `odd` want them.
  for (idx i = 0; i < counters; ++i) units[i] = first + static_cast<std::uint32_t>(i % 2 * (counters / 2) + i / 2);
  words x[4] = {units, zero + row, zero + layer, zero + step};
  philox(key, x);
  const words front = (x[0] & 0xffffffff) | (x[1] << 32), back = (x[2] & 0xffffffff) | (x[3] << 32);
  const words low = even(front, back), high = odd(front, back);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + drawn / 2, &high, sizeof high);
}

// Those of the counters (unit, row + i, layer, step), i < `rows`, in a row of `places`, which the number of counters divides: word w
// at w·apart. Behind the last row it is repeated, as load_panel does.
inline void words_of_rows(std::uint64_t key, std::uint32_t unit, std::uint32_t row, std::uint32_t layer, std::uint32_t step, idx rows,
                          idx places, idx apart, std::uint32_t* to) {
  const words zero{};
  for (idx m = 0; m < places; m += counters) {
    words lane{};
    for (idx i = 0; i < counters; ++i) lane[i] = row + static_cast<std::uint32_t>(std::min(m + i, rows - 1));
    words x[4] = {zero + unit, lane, zero + layer, zero + step};
    philox(key, x);
    for (int w = 0; w < 4; ++w)
      for (idx i = 0; i < counters; ++i) to[w * apart + m + i] = static_cast<std::uint32_t>(x[w][i]);
  }
}

// What is dropped of one hidden layer of one network in one step. Blocks begin at a row of the tile, and at a unit that 4 divides.
template <class T>
class Dropout {
 public:
  Dropout(const Tile<T>& tile, idx step, int layer, int network = 0) : Dropout(tile.flow, tile.first, tile.rows, step, layer, network) {}

  // Of so many rows from the batch's `first` on.
  Dropout(const Flow<T>& flow, idx first, idx rows, idx step, int layer, int network)
      : flow_(flow),
        rows_(rows),
        row_(static_cast<std::uint32_t>(first)),
        layer_(static_cast<std::uint32_t>(layer + (network << 16))),
        step_(static_cast<std::uint32_t>(step)) {
    if (flow_.dropout == 0) return;
    least_ = static_cast<std::uint32_t>(std::min(std::nearbyint(flow_.dropout * 4294967296.0), 4294967295.0));
    scale_ = static_cast<T>(1 / (1 - flow_.dropout));
  }

  bool drops() const { return flow_.dropout > 0; }

  // h ← h·m/(1 − p), behind the activation.
  void apply(idx row, idx unit, idx rows, idx cols, T* h, idx ld) const {
    if (drops())
      each_part(row, unit, rows, cols, [&](idx m, idx j, idx n, const T* factors) { multiply_by(factors, n, h + m * ld + j); });
  }

  // g ← g·m/(1 − p)·a'(x): `kept` is x where the activation keeps it, else a(x)·m/(1 − p).
  void backward(idx row, idx unit, idx rows, idx cols, const T* kept, idx kept_m, T* g, idx g_m) const {
    const Activation a = flow_.activation;
    if (!drops()) return activate_backward(a, flow_.activation_constant, rows, cols, kept, kept_m, g, g_m);
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

  // The same two of a panel's units, whose rows lie in the lanes of `vectors` vectors.
  void apply_to_units(idx units, int vectors, T* h) const {
    if (drops()) each_unit(units, vectors, [=](idx at, const T* factors) { multiply_by(factors, vectors * lanes<T>, h + at); });
  }

  void units_backward(idx units, int vectors, const T* kept, T* g) const {
    constexpr idx W = panel_rows<T>;
    const idx cols = vectors * lanes<T>;
    const auto slopes = [&](const T* from) {
      activate_backward(flow_.activation, flow_.activation_constant, units, cols, from, W, g, W);
    };
    const auto drop = [&] { each_unit(units, vectors, [=](idx at, const T* factors) { multiply_by(factors, cols, g + at); }); };
    if (!drops()) return slopes(kept);
    if (flow_.activation == Activation::relu) {  // what was dropped is 0, where the slope is 0, too
      slopes(kept);
      for (idx e = 0; e < units * W; e += W)
        for (idx m = e; m < e + cols; m += lanes<T>) store(g + m, load(g + m) * scale_);
      return;
    }
    if (keeps_argument(flow_.activation)) return drop(), slopes(kept);
    // Of a dropped unit a(x) is lost, but it has no gradient, either.
    const Scratch<T> values(units * W);
    const T undo = static_cast<T>(1 - flow_.dropout);
    for (idx e = 0; e < units * W; e += W)
      for (idx m = e; m < e + cols; m += lanes<T>) store(values.get() + m, load(kept + m) * undo);
    slopes(values.get());
    drop();
  }

 private:
  // Calls f(the unit's first element, m/(1 − p) of its rows) for all units.
  template <class F>
  void each_unit(idx units, int vectors, F f) const {
    constexpr idx W = panel_rows<T>;
    alignas(64) std::uint32_t numbers[4 * W];
    alignas(64) T factors[W];
    for (idx u = 0; u < units; ++u) {
      const idx cols = vectors * lanes<T>;
      if (u % 4 == 0)
        words_of_rows(flow_.seed, static_cast<std::uint32_t>(u / 4), row_, layer_, step_, rows_,
                      round_up(cols, counters), W, numbers);
      for (idx m = 0; m < cols; ++m) factors[m] = numbers[u % 4 * W + m] >= least_ ? scale_ : T(0);
      f(u * W, factors);
    }
  }

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
        words_of_units(flow_.seed, static_cast<std::uint32_t>((unit + j) / 4), row_ + static_cast<std::uint32_t>(row + m), layer_, step_,
                       numbers);
        for (idx c = 0; c < drawn; ++c) factors[c] = numbers[c] >= least_ ? scale_ : T(0);
        f(m, j, std::min(drawn, cols - j), factors);
      }
  }

  const Flow<T>& flow_;
  idx rows_;
  std::uint32_t row_, layer_, step_, least_ = 0;  // numbers from `least_` on keep a unit
  T scale_ = 1;
};

}  // namespace glf::GLF_ISA
