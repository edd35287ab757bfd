// The network of Glow's couplings, convolutions 3 × 3, 1 × 1 and 3 × 3 with ReLU between them, image by image: an image's hidden
// layers stay in the cache, forward and backward, which computes them again.
#pragma once

#include "tile.h"

namespace glf::GLF_ISA {

// A thread's memory for one image. Rows are pixels; leading dimensions are whole vectors.
template <class T>
struct ConvolutionTile {
  const GlowNetwork<T>& net;
  idx pixels, taps_in, taps_out;  // taps_in = 9 C, taps_out = 9 O
  idx ld_in, ld_hidden, ld_out;
  T *unfolded, *first, *second, *products, *panel;

  ConvolutionTile(const GlowNetwork<T>& n) : net(n) {
    constexpr idx L = lanes<T>;
    pixels = n.height * n.width;
    taps_in = 9 * n.channels, taps_out = 9 * n.outputs;
    ld_in = round_up(taps_in, L), ld_hidden = round_up(n.hidden, L), ld_out = round_up(taps_out, L);
  }
  // Elements; a whole vector behind each field may be read.
  idx size() const {
    constexpr idx L = lanes<T>;
    const idx widest = std::max(taps_in, std::max(idx(net.hidden), taps_out));
    return pixels * (ld_in + 2 * ld_hidden + ld_out) + (round_up(widest, L) + 1) * NR * L + 5 * L;
  }
  void place(T* memory) {
    constexpr idx L = lanes<T>;
    unfolded = memory;
    first = unfolded + pixels * ld_in + L;
    second = first + pixels * ld_hidden + L;
    products = second + pixels * ld_hidden + L;
    panel = products + pixels * ld_out + L;
  }

  // Calls f(tap, pixel, pixel at the tap's offset, pixels) for all stretches of pixels whose neighbour is in the image.
  template <class F>
  void each_tap(F f) const {
    for (idx tap = 0; tap < 9; ++tap) {
      const idx dy = tap / 3 - 1, dx = tap % 3 - 1;
      const idx from = std::max<idx>(0, -dx), to = std::min<idx>(net.width, net.width - dx);
      for (idx y = std::max<idx>(0, -dy); y < std::min<idx>(net.height, net.height - dy); ++y)
        if (to > from) f(tap, y * net.width + from, (y + dy) * net.width + from + dx, to - from);
    }
  }

  // Row p of `into` has the 9 neighbours of pixel p, or with `sign` −1 those on the opposite sides; zeros outside of the image.
  void unfold(const T* image, idx channels, T* into, idx ld, bool opposite) const {
    std::fill_n(into, pixels * ld, T(0));
    each_tap([&](idx tap, idx at, idx neighbour, idx count) {
      if (opposite) std::swap(at, neighbour);
      for (idx i = 0; i < count; ++i)
        std::copy_n(image + (neighbour + i) * channels, channels, into + (at + i) * ld + tap * channels);
    });
  }

  // The adjoint of `unfold`: adds to each pixel of the image what its neighbours hold for it.
  void fold(const T* from, idx channels, idx ld, T* image, bool opposite) const {
    each_tap([&](idx tap, idx at, idx neighbour, idx count) {
      if (opposite) std::swap(at, neighbour);
      for (idx i = 0; i < count; ++i) {
        const T* row = from + (at + i) * ld + tap * channels;
        T* pixel = image + (neighbour + i) * channels;
        for (idx c = 0; c < channels; ++c) pixel[c] += row[c];
      }
    });
  }

  // Both hidden layers of an image.
  void hidden(const T* x) {
    const auto relu = [ld = ld_hidden](T* block, idx, idx, idx rows, idx cols) {
      for (idx m = 0; m < rows; ++m)
        for (idx j = 0; j < cols; ++j) block[m * ld + j] = block[m * ld + j] > T(0) ? block[m * ld + j] : T(0);
    };
    unfold(x, net.channels, unfolded, ld_in, false);
    multiply(pixels, idx(net.hidden), taps_in, unfolded, ld_in, net.first, false, first, ld_hidden, net.first_bias, panel, relu);
    multiply(pixels, idx(net.hidden), idx(net.hidden), first, ld_hidden, net.second, false, second, ld_hidden, net.second_bias, panel,
             relu);
  }

  void forward(const T* x, T* out) {
    hidden(x);
    multiply<T>(pixels, taps_out, idx(net.hidden), second, ld_hidden, net.last, false, products, ld_out, nullptr, panel);
    std::copy_n(net.offset, pixels * net.outputs, out);
    // out[p] = Σ over taps of h₂[p + tap]·W₃[tap]: what pixel q = p + tap has for it.
    fold(products, net.outputs, ld_out, out, true);
  }

  void backward(const T* x, const T* grad_out, T* grad_x, const GlowGradients<T>& to, bool accumulate) {
    const idx N = net.hidden;
    hidden(x);
    unfold(grad_out, net.outputs, products, ld_out, true);
    outer_sum(pixels, N, taps_out, second, ld_hidden, products, ld_out, to.last, accumulate);
    through_relu(products, ld_out, taps_out, net.last, second);
    outer_sum(pixels, N, N, first, ld_hidden, second, ld_hidden, to.second, accumulate);
    column_sum(pixels, N, T(1), second, ld_hidden, to.second_bias, accumulate);
    through_relu(second, ld_hidden, N, net.second, first);
    outer_sum(pixels, taps_in, N, unfolded, ld_in, first, ld_hidden, to.first, accumulate);
    column_sum(pixels, N, T(1), first, ld_hidden, to.first_bias, accumulate);
    multiply<T>(pixels, taps_in, N, first, ld_hidden, net.first, true, unfolded, ld_in, nullptr, panel);
    std::fill_n(grad_x, pixels * net.channels, T(0));
    fold(unfolded, net.channels, ld_in, grad_x, false);
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
  const idx work = net.height * net.width * net.hidden * (9 * net.channels + net.hidden + 9 * net.outputs) * batch;
  return static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, batch), 1, parallel.threads));
}

template <class T>
void glow_network(const GlowNetwork<T>& net, Int batch, const T* x, T* out, const Parallel& parallel) {
  ConvolutionTile<T> shape(net);
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads;
  const PerThread<T> memory(threads, {shape.size()});
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile(net);
    tile.place(memory.get(thread, 0));
    for (idx b = thread * part; b < std::min<idx>(batch, (thread + 1) * part); ++b)
      tile.forward(x + b * tile.pixels * net.channels, out + b * tile.pixels * net.outputs);
  });
}

template <class T>
void glow_network_backward(const GlowNetwork<T>& net, Int batch, const T* x, const T* grad_out, T* grad_x,
                           const GlowGradients<T>& gradients, const Parallel& parallel) {
  ConvolutionTile<T> shape(net);
  const idx N = net.hidden;
  const idx sizes[] = {shape.taps_in * N, N, N * N, N, N * shape.taps_out};
  T* const to[] = {gradients.first, gradients.first_bias, gradients.second, gradients.second_bias, gradients.last};
  idx all = 0;
  for (const idx size : sizes) all += size;
  const int threads = glow_threads(net, batch, parallel);
  const idx part = (batch + threads - 1) / threads;
  const PerThread<T> memory(threads, {shape.size(), all});
  if (!batch)
    for (int i = 0; i < 5; ++i) std::fill_n(to[i], sizes[i], T(0));
  in_parallel(parallel, threads, [&](int thread) {
    ConvolutionTile<T> tile(net);
    tile.place(memory.get(thread, 0));
    GlowGradients<T> own = gradients;
    if (thread) {  // the first thread's are the results, to which the others are added
      T* at = memory.get(thread, 1);
      T** fields[] = {&own.first, &own.first_bias, &own.second, &own.second_bias, &own.last};
      for (int i = 0; i < 5; ++i) *fields[i] = at, at += sizes[i];
    }
    const idx begin = thread * part, end = std::min<idx>(batch, begin + part);
    if (begin >= end && thread) std::fill_n(memory.get(thread, 1), all, T(0));
    for (idx b = begin; b < end; ++b)
      tile.backward(x + b * tile.pixels * net.channels, grad_out + b * tile.pixels * net.outputs,
                    grad_x + b * tile.pixels * net.channels, own, b > begin);
  });
  for (int thread = 1; thread < threads; ++thread) {
    const T* from = memory.get(thread, 1);
    for (int i = 0; i < 5; ++i)
      for (idx j = 0; j < sizes[i]; ++j) to[i][j] += *from++;
  }
}

}  // namespace glf::GLF_ISA
