// The network of Glow's couplings, convolutions 3 × 3, 1 × 1 and 3 × 3 with ReLU between them, image by image: an image's hidden
// layers stay in the cache, forward and backward, which computes them again. ActNorms and gains are folded into the matrices.
#pragma once

#include "coupling.h"
#include "tile.h"

namespace glf::GLF_ISA {

// Matrices of a network, or their gradients, in one piece of memory.
template <class T>
struct GlowSums {
  idx taps_in, taps_out, hidden, pixels;  // taps_in = 9 (channels + 1), taps_out = 9·outputs
  T *first, *first_bias, *second, *second_bias, *last, *offset;  // offset (pixels, outputs) is added to every image

  GlowSums(const GlowNetwork<T>& net)
      : taps_in(9 * (net.channels + 1)), taps_out(9 * net.outputs), hidden(net.hidden), pixels(net.height * net.width) {}
  GlowSums(const GlowSums& like, T* at) : GlowSums(like) { place(at); }
  void place(T* at) {
    first = at, first_bias = first + taps_in * hidden, second = first_bias + hidden, second_bias = second + hidden * hidden;
    last = second_bias + hidden, offset = last + hidden * taps_out;
  }
};

// The parameters as matrices. Rows of `first` are (tap, channel), taps row by row, and then the taps of the channel of ones; columns
// of `last` are (tap, output), taps from the last to the first: what a pixel has for its neighbours lies in their order.
template <class T>
struct GlowMatrices : GlowSums<T> {
  using GlowSums<T>::taps_in, GlowSums<T>::taps_out, GlowSums<T>::hidden, GlowSums<T>::pixels;
  using GlowSums<T>::first, GlowSums<T>::first_bias, GlowSums<T>::second, GlowSums<T>::second_bias;
  using GlowSums<T>::last, GlowSums<T>::offset;
  Scratch<T> memory, inside_memory;
  T* inside;  // (pixels, 9): 1 where a tap of a pixel is inside of the image, else 0

  static idx size(const GlowNetwork<T>& net) {
    const idx N = net.hidden;
    return 9 * (net.channels + 1) * N + N + N * N + N + N * 9 * net.outputs + net.height * net.width * net.outputs;
  }
  GlowMatrices(const GlowNetwork<T>& net) : GlowSums<T>(net), memory(size(net)), inside_memory(9 * pixels) {
    inside = inside_memory.get();
    std::fill_n(inside, 9 * pixels, T(0));
    each_inside(net, [&](idx tap, idx p) { inside[p * 9 + tap] = T(1); });
    this->place(memory.get());
    const idx N = hidden, C = net.channels + 1, O = net.outputs;
    for (idx n = 0; n < N; ++n) {
      const T one = std::exp(net.first_log_scale[n]), two = std::exp(net.second_log_scale[n]);
      for (idx c = 0; c < C; ++c)
        for (idx tap = 0; tap < 9; ++tap) first[row(tap, c, C) * N + n] = net.first[(n * C + c) * 9 + tap] * one;
      for (idx m = 0; m < N; ++m) second[m * N + n] = net.second[n * N + m] * two;
      first_bias[n] = net.first_bias[n] * one;
      second_bias[n] = net.second_bias[n] * two;
    }
    for (idx o = 0; o < O; ++o) {
      const T gain = std::exp(net.gain_factor * net.log_gain[o]);
      for (idx n = 0; n < N; ++n)
        for (idx tap = 0; tap < 9; ++tap) last[n * taps_out + (8 - tap) * O + o] = net.last[(o * N + n) * 9 + tap] * gain;
      for (idx p = 0; p < pixels; ++p) offset[p * O + o] = net.bias[o] * gain;
      each_inside(net, [&](idx tap, idx p) { offset[p * O + o] += net.edge[o * 9 + tap] * gain; });
    }
  }

  // Row of `first` of a tap and a channel; the last of C channels is that of ones.
  static idx row(idx tap, idx c, idx C) { return c + 1 == C ? 9 * (C - 1) + tap : tap * (C - 1) + c; }

  // Calls f(tap, pixel) for every tap of a pixel that is inside of the image.
  template <class F>
  static void each_inside(const GlowNetwork<T>& net, F f) {
    for (idx y = 0; y < net.height; ++y)
      for (idx x = 0; x < net.width; ++x)
        for (idx tap = 0; tap < 9; ++tap) {
          const idx v = y + tap / 3 - 1, u = x + tap % 3 - 1;
          if (v >= 0 && v < net.height && u >= 0 && u < net.width) f(tap, y * net.width + x);
        }
  }

  // From gradients of the matrices, in their places in `of`, to those of the parameters.
  void backward(const GlowNetwork<T>& net, const GlowSums<T>& of, const GlowGradients<T>& to) const {
    const idx N = hidden, C = net.channels + 1, O = net.outputs;
    for (idx n = 0; n < N; ++n) {
      const T one = std::exp(net.first_log_scale[n]), two = std::exp(net.second_log_scale[n]);
      T scale_one = of.first_bias[n] * first_bias[n], scale_two = of.second_bias[n] * second_bias[n];
      for (idx c = 0; c < C; ++c)
        for (idx tap = 0; tap < 9; ++tap) {
          const idx at = row(tap, c, C) * N + n;
          to.first[(n * C + c) * 9 + tap] = of.first[at] * one;
          scale_one += of.first[at] * first[at];
        }
      for (idx m = 0; m < N; ++m) {
        to.second[n * N + m] = of.second[m * N + n] * two;
        scale_two += of.second[m * N + n] * second[m * N + n];
      }
      to.first_bias[n] = of.first_bias[n] * one, to.second_bias[n] = of.second_bias[n] * two;
      to.first_log_scale[n] = scale_one, to.second_log_scale[n] = scale_two;
    }
    for (idx o = 0; o < O; ++o) {
      const T gain = std::exp(net.gain_factor * net.log_gain[o]);
      T scale = 0, sum = 0;
      for (idx n = 0; n < N; ++n)
        for (idx tap = 0; tap < 9; ++tap) {
          const idx at = n * taps_out + (8 - tap) * O + o;
          to.last[(o * N + n) * 9 + tap] = of.last[at] * gain;
          scale += of.last[at] * last[at];
        }
      for (idx p = 0; p < pixels; ++p) {
        sum += of.offset[p * O + o];
        scale += of.offset[p * O + o] * offset[p * O + o];
      }
      std::fill_n(to.edge + o * 9, 9, T(0));
      each_inside(net, [&](idx tap, idx p) { to.edge[o * 9 + tap] += of.offset[p * O + o] * gain; });
      to.bias[o] = sum * gain;
      to.log_gain[o] = net.gain_factor * scale;
    }
  }
};

// A thread's memory for one image. Rows are pixels; leading dimensions are whole vectors.
template <class T>
struct ConvolutionTile {
  const GlowNetwork<T>& net;
  const GlowMatrices<T>& matrices;
  idx pixels, taps_in, taps_out;
  idx ld_in, ld_hidden, ld_out;
  T *unfolded, *first, *second, *products, *panel, *padded;

  ConvolutionTile(const GlowNetwork<T>& n, const GlowMatrices<T>& m) : net(n), matrices(m) {
    constexpr idx L = lanes<T>;
    pixels = m.pixels, taps_in = m.taps_in, taps_out = m.taps_out;
    ld_in = round_up(taps_in, L), ld_hidden = round_up(n.hidden, L), ld_out = round_up(taps_out, L);
  }
  // Elements; a whole vector behind each field may be read.
  idx size() const {
    constexpr idx L = lanes<T>;
    const idx widest = std::max(taps_in, std::max(idx(net.hidden), taps_out));
    return pixels * (ld_in + 2 * ld_hidden + ld_out) + (round_up(widest, L) + 1) * NR * L + 7 * L + padding();
  }
  void place(T* memory) {
    constexpr idx L = lanes<T>;
    unfolded = memory;
    first = unfolded + pixels * ld_in + L;
    second = first + pixels * ld_hidden + L;
    products = second + pixels * ld_hidden + L;
    padded = products + pixels * ld_out + L;
    panel = padded + padding() + L;
  }
  // Elements of an image, with a border of one pixel and a vector behind.
  idx padding() const {
    return (net.height + 2) * (net.width + 2) * std::max(net.channels, net.outputs) + lanes<T>;
  }

  // Row p of `into` has the 9 neighbours of pixel p, zeros where there are none, and with `ones` those of a channel of ones. Whole
  // vectors are copied: what they write too much is overwritten by the next.
  void unfold(const T* image, idx channels, T* into, idx ld, bool ones) const {
    constexpr idx L = lanes<T>;
    const idx row = (net.width + 2) * channels, three = 3 * channels;
    std::fill_n(padded, (net.height + 2) * row + L, T(0));
    for (idx y = 0; y < net.height; ++y)
      std::copy_n(image + y * net.width * channels, net.width * channels, padded + (y + 1) * row + channels);
    const T* inside = matrices.inside;
    for (idx y = 0; y < net.height; ++y)
      for (idx x = 0; x < net.width; ++x, into += ld, inside += 9) {
        for (idx dy = 0; dy < 3; ++dy)
          for (idx i = 0; i < three; i += L)
            store(into + dy * three + i, load(padded + (y + dy) * row + x * channels + i));
        if (ones) std::copy_n(inside, 9, into + 3 * three);
      }
  }

  // The adjoint of `unfold`: adds to each pixel of the image what its neighbours hold for it.
  void fold(const T* from, idx channels, idx ld, T* image) const {
    constexpr idx L = lanes<T>;
    const idx row = (net.width + 2) * channels, three = 3 * channels, whole = three / L * L;
    T keep[L];  // of the last vector: zeros are added to what lies behind
    for (idx i = 0; i < L; ++i) keep[i] = whole + i < three ? T(1) : T(0);
    const mask<T> kept = load(keep) != vec<T>{};
    std::fill_n(padded, (net.height + 2) * row + L, T(0));
    for (idx y = 0; y < net.height; ++y)
      for (idx x = 0; x < net.width; ++x, from += ld)
        for (idx dy = 0; dy < 3; ++dy) {
          const T* source = from + dy * three;
          T* to = padded + (y + dy) * row + x * channels;
          for (idx i = 0; i < whole; i += L) store(to + i, load(to + i) + load(source + i));
          if (whole < three) store(to + whole, load(to + whole) + (kept ? load(source + whole) : vec<T>{}));
        }
    for (idx y = 0; y < net.height; ++y)
      for (idx i = 0; i < net.width * channels; ++i) image[y * net.width * channels + i] += padded[(y + 1) * row + channels + i];
  }

  // Both hidden layers of an image.
  void hidden(const T* x) {
    const auto relu = [ld = ld_hidden](T* block, idx, idx, idx rows, idx cols) {
      for (idx m = 0; m < rows; ++m)
        for (idx j = 0; j < cols; ++j) block[m * ld + j] = block[m * ld + j] > T(0) ? block[m * ld + j] : T(0);
    };
    unfold(x, net.channels, unfolded, ld_in, true);
    multiply(pixels, idx(net.hidden), taps_in, unfolded, ld_in, matrices.first, false, first, ld_hidden, matrices.first_bias, panel, relu);
    multiply(pixels, idx(net.hidden), idx(net.hidden), first, ld_hidden, matrices.second, false, second, ld_hidden, matrices.second_bias, panel,
             relu);
  }

  void forward(const T* x, T* out) {
    hidden(x);
    multiply<T>(pixels, taps_out, idx(net.hidden), second, ld_hidden, matrices.last, false, products, ld_out, nullptr, panel);
    std::copy_n(matrices.offset, pixels * net.outputs, out);
    fold(products, net.outputs, ld_out, out);
  }

  void backward(const T* x, const T* grad_out, T* grad_x, const GlowSums<T>& to, bool accumulate) {
    const idx N = net.hidden;
    hidden(x);
    unfold(grad_out, net.outputs, products, ld_out, false);
    outer_sum(pixels, N, taps_out, second, ld_hidden, products, ld_out, to.last, accumulate);
    through_relu(products, ld_out, taps_out, matrices.last, second);
    outer_sum(pixels, N, N, first, ld_hidden, second, ld_hidden, to.second, accumulate);
    column_sum(pixels, N, T(1), second, ld_hidden, to.second_bias, accumulate);
    through_relu(second, ld_hidden, N, matrices.second, first);
    outer_sum(pixels, taps_in, N, unfolded, ld_in, first, ld_hidden, to.first, accumulate);
    column_sum(pixels, N, T(1), first, ld_hidden, to.first_bias, accumulate);
    multiply<T>(pixels, taps_in, N, first, ld_hidden, matrices.first, true, unfolded, ld_in, nullptr, panel);
    std::fill_n(grad_x, pixels * net.channels, T(0));
    fold(unfolded, net.channels, ld_in, grad_x);
    for (idx i = 0; i < pixels * net.outputs; ++i) to.offset[i] = grad_out[i] + (accumulate ? to.offset[i] : T(0));
  }

 private:
  // h, rectified, becomes the gradient of what it was before: (g Wᵀ) where h > 0. W is (hidden, K).
  void through_relu(const T* g, idx ld, idx K, const T* w, T* h) {
    constexpr idx L = lanes<T>, W = NR * L;
    T block[MR * W];
    for (idx j = 0; j < net.hidden; j += W) {
      const idx cols = std::min<idx>(W, net.hidden - j);
      pack_transposed(w + j * K, K, K, cols, panel);
      for (idx m = 0; m < pixels; m += MR) {
        const idx rows = std::min<idx>(MR, pixels - m);
        pick_block<T>(rows, cols > L ? NR : 1)(K, g + m * ld, ld, 1, panel, W, block, W, cols, nullptr, false);
        for (idx r = 0; r < rows; ++r) {
          T* row = h + (m + r) * ld_hidden + j;
          for (idx c = 0; c < cols; ++c) row[c] = row[c] > T(0) ? block[r * W + c] : T(0);
        }
      }
    }
  }
};

template <class T>
int glow_threads(const GlowNetwork<T>& net, Int batch, const Parallel& parallel) {
  const idx work = net.height * net.width * net.hidden * (9 * (net.channels + 1) + net.hidden + 9 * net.outputs) * batch;
  return static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, batch), 1, parallel.threads));
}

template <class T>
void glow_network(const GlowNetwork<T>& net, Int batch, const T* x, T* out, const Parallel& parallel) {
  const GlowMatrices<T> matrices(net);
  const ConvolutionTile<T> shape(net, matrices);
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads;
  const PerThread<T> memory(threads, {shape.size()});
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile = shape;
    tile.place(memory.get(thread, 0));
    for (idx b = thread * part; b < std::min<idx>(batch, (thread + 1) * part); ++b)
      tile.forward(x + b * tile.pixels * net.channels, out + b * tile.pixels * net.outputs);
  });
}

template <class T>
void glow_network_backward(const GlowNetwork<T>& net, Int batch, const T* x, const T* grad_out, T* grad_x,
                           const GlowGradients<T>& gradients, const Parallel& parallel) {
  const GlowMatrices<T> matrices(net);
  const ConvolutionTile<T> shape(net, matrices);
  const idx all = GlowMatrices<T>::size(net);
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads;
  const PerThread<T> memory(threads, {shape.size(), all});
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile = shape;
    tile.place(memory.get(thread, 0));
    GlowSums<T> own(matrices, memory.get(thread, 1));
    const idx begin = thread * part, end = std::min<idx>(batch, begin + part);
    if (begin >= end) std::fill_n(memory.get(thread, 1), all, T(0));
    for (idx b = begin; b < end; ++b)
      tile.backward(x + b * tile.pixels * net.channels, grad_out + b * tile.pixels * net.outputs,
                    grad_x + b * tile.pixels * net.channels, own, b > begin);
  });
  T* const sum = memory.get(0, 1);
  for (int thread = 1; thread < threads; ++thread)
    for (idx i = 0; i < all; ++i) sum[i] += memory.get(thread, 1)[i];
  matrices.backward(net, GlowSums<T>(matrices, sum), gradients);
}

// The two parts of a coupling's images, whose channels lie together: p, that its network is given, and v, that it transforms. A
// thread's memory for one image of each, in one piece: the elementwise functions then fill whole vectors.
template <class T>
struct GlowParts {
  idx pixels, given, transformed, channels, at_p, at_v;
  T *p, *v, *u, *t, *w, *raw;  // p and raw of given and 2·transformed channels, the others of `transformed`

  GlowParts(const GlowNetwork<T>& net, bool v_first)
      : pixels(net.height * net.width), given(net.channels), transformed(net.outputs / 2), channels(given + transformed),
        at_p(v_first ? transformed : 0), at_v(v_first ? 0 : given) {}
  idx size() const { return pixels * (given + 6 * transformed) + 6 * lanes<T>; }
  void place(T* memory) {
    constexpr idx L = lanes<T>;
    p = memory, v = p + pixels * given + L, u = v + numbers() + L, t = u + numbers() + L, w = t + numbers() + L;
    raw = w + numbers() + L;
  }
  idx numbers() const { return pixels * transformed; }

  // n channels of every pixel, from or to their places among `of`.
  void take(const T* image, idx of, idx at, idx n, T* to) const {
    for (idx i = 0; i < pixels; ++i)
      for (idx j = 0; j < n; ++j) to[i * n + j] = image[i * of + at + j];
  }
  void put(const T* from, idx n, T* image, idx of, idx at) const {
    for (idx i = 0; i < pixels; ++i)
      for (idx j = 0; j < n; ++j) image[i * of + at + j] = from[i * n + j];
  }
  // v, u and t of an image and of what the network made of its p.
  void take_operands(const T* x, const T* made) const {
    take(x, channels, at_v, transformed, v);
    take(made, 2 * transformed, 0, transformed, u);
    take(made, 2 * transformed, transformed, transformed, t);
  }
  Rows<const T> row(const T* data) const { return {data, 0}; }
};

// The whole coupling: y and logdet (B,), and `raw`, what the network made of p (B, pixels, 2·transformed), for the backward.
template <class T>
void glow_coupling(const GlowNetwork<T>& net, const Coupling<T>& op, bool v_first, Int batch, const T* x, T* y, T* logdet, T* raw,
                   const Parallel& parallel) {
  const GlowMatrices<T> matrices(net);
  const ConvolutionTile<T> shape(net, matrices);
  const GlowParts<T> places(net, v_first);
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads, image = places.pixels * places.channels, made = 2 * places.numbers();
  const PerThread<T> memory(threads, {shape.size(), places.size()});
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile = shape;
    GlowParts<T> parts = places;
    tile.place(memory.get(thread, 0)), parts.place(memory.get(thread, 1));
    for (idx b = thread * part; b < std::min<idx>(batch, (thread + 1) * part); ++b) {
      parts.take(x + b * image, parts.channels, parts.at_p, parts.given, parts.p);
      tile.forward(parts.p, raw + b * made);
      parts.take_operands(x + b * image, raw + b * made);
      couple_rows<T>(op, 1, parts.numbers(), parts.row(parts.v), parts.row(parts.u), parts.row(parts.t), {parts.w, 0}, logdet + b, false);
      parts.put(parts.p, parts.given, y + b * image, parts.channels, parts.at_p);
      parts.put(parts.w, parts.transformed, y + b * image, parts.channels, parts.at_v);
    }
  });
}

template <class T>
void glow_coupling_backward(const GlowNetwork<T>& net, const Coupling<T>& op, bool v_first, Int batch, const T* x, const T* raw,
                            const T* grad_y, const T* grad_logdet, T* grad_x, const GlowGradients<T>& gradients,
                            const Parallel& parallel) {
  const GlowMatrices<T> matrices(net);
  const ConvolutionTile<T> shape(net, matrices);
  const GlowParts<T> places(net, v_first);
  const idx all = GlowMatrices<T>::size(net);
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads, image = places.pixels * places.channels, made = 2 * places.numbers();
  const PerThread<T> memory(threads, {shape.size(), all, places.size(), places.pixels * places.given});
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile = shape;
    GlowParts<T> parts = places;
    tile.place(memory.get(thread, 0)), parts.place(memory.get(thread, 2));
    GlowSums<T> own(matrices, memory.get(thread, 1));
    T* const of_p = memory.get(thread, 3);
    const idx begin = thread * part, end = std::min<idx>(batch, begin + part);
    if (begin >= end) std::fill_n(memory.get(thread, 1), all, T(0));
    for (idx b = begin; b < end; ++b) {
      const auto row = [](T* data) { return Rows<T>{data, 0}; };
      parts.take(x + b * image, parts.channels, parts.at_p, parts.given, parts.p);
      parts.take_operands(x + b * image, raw + b * made);
      parts.take(grad_y + b * image, parts.channels, parts.at_v, parts.transformed, parts.w);
      couple_rows_backward<T>(op, 1, parts.numbers(), parts.row(parts.v), parts.row(parts.u), parts.row(parts.t), parts.row(parts.w),
                              grad_logdet + b, row(parts.v), row(parts.u), row(parts.t));
      parts.put(parts.u, parts.transformed, parts.raw, 2 * parts.transformed, 0);
      parts.put(parts.t, parts.transformed, parts.raw, 2 * parts.transformed, parts.transformed);
      tile.backward(parts.p, parts.raw, of_p, own, b > begin);
      T* const to = grad_x + b * image;
      for (idx i = 0; i < parts.pixels; ++i)
        for (idx j = 0; j < parts.given; ++j) {
          const idx at = i * parts.channels + parts.at_p + j;
          to[at] = grad_y[b * image + at] + of_p[i * parts.given + j];
        }
      parts.put(parts.v, parts.transformed, to, parts.channels, parts.at_v);
    }
  });
  T* const sum = memory.get(0, 1);
  for (int thread = 1; thread < threads; ++thread)
    for (idx i = 0; i < all; ++i) sum[i] += memory.get(thread, 1)[i];
  matrices.backward(net, GlowSums<T>(matrices, sum), gradients);
}

}  // namespace glf::GLF_ISA
