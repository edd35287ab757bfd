// Walks the kernels of every instruction set that this processor has over a table of flows, to be run under
// AddressSanitizer and UndefinedBehaviorSanitizer with GLF_POISON (scratch memory full of NaN). Each buffer is exactly as
// long as its tensor. What must agree: the round trip, the three memory modes, thread counts, instruction sets.
#include "cpu/flow.h"
#include "cpu/pool.h"
#include "cpu/record.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace glf {
#define GLF_DECLARE(isa)                    \
  namespace isa {                           \
  extern const Kernels<float> kernels_f32;  \
  extern const Kernels<double> kernels_f64; \
  }
GLF_DECLARE(generic)
GLF_DECLARE(avx2)
GLF_DECLARE(avx512)
}  // namespace glf

namespace {

template <class T>
using Buffer = std::vector<T>;

glf::Parallel threads(int n) {
  return {n, [](int tasks, void (*task)(void*, int), void* context) { glf::run_together(tasks, task, context); }};
}

struct Shape {
  int steps, dim, context_dim;
  std::vector<int> hidden;
  int batch;
  bool residual = false;
};

// glf_fast.Spline() as glf_fast.reference.PreparedSpline has it.
template <class T>
glf::Spline<T> spline_of() {
  return {8, glf::Tails::linear, false, T(-5), T(5), T(1e-3), T(1e-3), T(1e-3), T(1.4406166703628092), T(0), T(1)};
}

template <class T>
Buffer<T> random(std::size_t n, double scale, std::mt19937& rng) {
  std::normal_distribution<double> normal;
  Buffer<T> b(n);
  for (T& x : b) x = static_cast<T>(scale * normal(rng));
  return b;
}

template <class T>
void check(const char* what, const Buffer<T>& a, const Buffer<T>& b, double tolerance) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(double(a[i]) - double(b[i]), 2);
    size += std::pow(double(b[i]), 2);
  }
  if (!(std::sqrt(error) <= tolerance * std::sqrt(size) + 1e-30)) {
    std::printf("%s: relative error %g, allowed %g\n", what, std::sqrt(error / size), tolerance);
    std::exit(1);
  }
}

// One flow's tensors, and what the kernels make of them.
template <class T>
struct Case {
  const Shape shape;
  glf::Flow<T> flow{};
  Buffer<T> matrix, inverse, offset, x, context;
  std::vector<Buffer<T>> weights, biases;

  Case(const Shape& s, int option) : shape(s) {
    std::mt19937 rng(option);
    const int K = s.steps, D = s.dim;
    flow.steps = K;
    flow.dim = D;
    flow.context_dim = s.context_dim;
    flow.layers = static_cast<int>(s.hidden.size()) + 1;  // of a residual network `hidden` has the width of each linear layer
    flow.activation = static_cast<glf::Activation>(option % glf::activations);
    flow.activation_constant = T(0.3);
    flow.log_scale = static_cast<glf::LogScale>(option % glf::log_scales);
    // Every log-scale has its turn with the first kind, then every other kind.
    flow.kind = static_cast<glf::Kind>(std::max(option - glf::log_scales + 1, 0) % glf::kinds);
    if (s.residual && flow.kind == glf::Kind::separate) flow.kind = glf::Kind::affine;
    if (flow.kind == glf::Kind::spline) flow.spline = spline_of<T>();
    flow.network = s.residual ? glf::Network::residual : glf::Network::mlp;
    flow.networks = glf::networks_of(flow.kind);
    flow.constant = flow.log_scale == glf::LogScale::softclip ? T(-6.9) : flow.log_scale == glf::LogScale::nflows ? T(1e-3) : T(2);
    flow.add_first = option % 2;
    flow.row_scales = option % 3 == 0;
    // A cyclic shift with scales: its inverse is known.
    matrix.assign(K * D * D, 0);
    inverse.assign(K * D * D, 0);
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < D; ++i) {
        const int j = (i + 1 + k) % D;
        const T scale = T(1) + T(i % 3) / 2;
        matrix[(k * D + i) * D + j] = scale;
        inverse[(k * D + j) * D + i] = 1 / scale;
      }
    offset = random<T>(K * D, 0.5, rng);
    x = random<T>(s.batch * D, 1, rng);
    context = random<T>(s.batch * s.context_dim, 1, rng);
    flow.width[0] = flow.passive() + flow.context_dim;
    for (int i = 0; i < flow.layers; ++i) {
      flow.width[i + 1] = i + 1 < flow.layers ? s.hidden[i] : flow.columns() * flow.transformed();
      weights.push_back(random<T>(flow.weights_before(i, K, 0), 0.5 / std::sqrt(double(flow.inputs(i))), rng));
      biases.push_back(random<T>(flow.biases_before(i, K, 0), 0.1, rng));
    }
    for (int i = 0; i < flow.layers; ++i) {
      flow.weight[i] = weights[i].data();
      flow.bias[i] = biases[i].data();
    }
    flow.offset = offset.data();
  }

  void direction(bool inverse_op) {
    flow.inverse = inverse_op;
    flow.matrix = inverse_op ? inverse.data() : matrix.data();
    flow.unmatrix = inverse_op ? matrix.data() : inverse.data();
  }

  // Output, logdet and all gradients, one after the other.
  Buffer<T> run(const glf::Kernels<T>& kernels, const Buffer<T>& input, glf::Save save, int n) {
    const glf::Int B = shape.batch, D = shape.dim, K = shape.steps;
    const glf::Int record = save == glf::Save::records ? glf::record_width(flow) : save == glf::Save::inputs ? D : 0;
    Buffer<T> out(B * D, NAN), logdet(B, NAN), saved(K * B * record, NAN);
    kernels.forward(flow, B, input.data(), context.data(), out.data(), logdet.data(), save, saved.data(), record,
                    threads(n));
    Buffer<T> grad_x(B * D, NAN), grad_context(context.size(), NAN);
    Buffer<T> grad_matrix(K * D * D, NAN), grad_offset(K * D, NAN);
    std::vector<Buffer<T>> rest;
    glf::Gradients<T> target{grad_matrix.data(), grad_offset.data(), {}, {}};
    for (int i = 0; i < flow.layers; ++i) {
      rest.emplace_back(weights[i].size(), NAN);
      target.weight[i] = rest.back().data();
      rest.emplace_back(biases[i].size(), NAN);
      target.bias[i] = rest.back().data();
    }
    const Buffer<T> ones(B, T(1));
    kernels.backward(flow, B, out.data(), context.data(), save, saved.data(), record,
                     flow.density ? nullptr : out.data(), ones.data(),
                     grad_x.data(), grad_context.data(), &target, threads(n));
    Buffer<T> all = out;
    for (const auto* b : {&logdet, &grad_x, &grad_context, &grad_matrix, &grad_offset}) all.insert(all.end(), b->begin(), b->end());
    for (const auto& b : rest) all.insert(all.end(), b.begin(), b.end());
    return all;
  }
};

}  // namespace

#include "autoregressive.h"
#include "linear.h"
#include "training.h"

namespace {

// The elementwise coupling: values, log-determinants and gradients of samples whose pixels lie `gap` elements too far apart.
template <class T>
Buffer<T> couple(const glf::Kernels<T>& kernels, const glf::Coupling<T>& op, int B, int pixels, int n, int gap, int threads_) {
  std::mt19937 rng(7);
  const std::size_t size = std::size_t(B) * pixels * n;
  std::vector<Buffer<T>> apart;
  for (int i = 0; i < 3; ++i) {
    const Buffer<T> dense = random<T>(size, 1, rng);
    Buffer<T>& to = apart.emplace_back(size ? (B * pixels - 1) * (n + gap) + n : 0, T(NAN));
    for (std::size_t e = 0; e < size; ++e) to[e / n * (n + gap) + e % n] = dense[e];
  }
  const auto channels = [&](int i) { return glf::Channels<T>{apart[i].data(), pixels * (n + gap), n + gap}; };
  Buffer<T> w(size), logdet(B), g[3] = {w, w, w};
  kernels.coupling(op, B, pixels, n, channels(0), channels(1), channels(2), w.data(), logdet.data(), threads(threads_));
  kernels.coupling_backward(op, B, pixels, n, channels(0), channels(1), channels(2), w.data(), logdet.data(), g[0].data(),
                            g[1].data(), g[2].data(), threads(threads_));
  for (const auto& b : {logdet, g[0], g[1], g[2]}) w.insert(w.end(), b.begin(), b.end());
  return w;
}

template <class T>
void walk_couplings(const glf::Kernels<T>& kernels, const glf::Kernels<T>& generic, double tolerance) {
  const int shapes[][3] = {{1, 1, 1}, {3, 1, 40}, {2, 200, 6}, {5, 7, 17}, {2, 3, 1100}, {4, 1025, 1}, {0, 4, 3}, {2, 0, 3}};
  for (const auto& [B, pixels, n] : shapes)
    for (int option = 0; option < glf::log_scales; ++option) {
      const auto log_scale = static_cast<glf::LogScale>(option);
      const T constant = log_scale == glf::LogScale::nflows ? T(0.001) : T(2);
      const glf::Coupling<T> op{glf::Kind::affine, log_scale, constant, option % 2 == 0, option % 3 == 0, {}};
      const Buffer<T> expected = couple(generic, op, B, pixels, n, 0, 1);
      for (const int gap : {0, 1, n, 19})
        for (const int count : {1, 3}) check("coupling", couple(kernels, op, B, pixels, n, gap, count), expected, tolerance);
    }
}

// Maps of channels, forward and backward, in buffers of the exact length.
template <class T>
Buffer<T> map_channels(const glf::Kernels<T>& kernels, int rows, int C, bool inverse, int threads_) {
  std::mt19937 rng(3);
  const std::size_t size = std::size_t(rows) * C;
  const Buffer<T> x = random<T>(size, 1, rng), A = random<T>(C * C, 0.5, rng), c = random<T>(C, 1, rng), g = random<T>(size, 1, rng);
  Buffer<T> y(size), grad_x(size), grad_A(C * C), grad_c(C);
  kernels.channel_map(rows, C, x.data(), A.data(), c.data(), inverse, y.data(), threads(threads_));
  kernels.channel_map_backward(rows, C, g.data(), x.data(), A.data(), c.data(), inverse, grad_x.data(), grad_A.data(), grad_c.data(),
                               threads(threads_));
  for (const Buffer<T>* more : {&grad_x, &grad_A, &grad_c}) y.insert(y.end(), more->begin(), more->end());
  return y;
}

// A coupling of images with Glow's network, forward and backward.
template <class T>
Buffer<T> couple_images(const glf::Kernels<T>& kernels, int B, int H, int W, int P, int transformed, int N, bool v_first, int threads_) {
  std::mt19937 rng(5);
  const int O = 2 * transformed;
  const std::size_t image = std::size_t(H) * W * (P + transformed), size = B * image;
  const int sizes[] = {N * (P + 1) * 9, N, N, N * N, N, N, O * N * 9, O * 9, O, O};
  std::vector<Buffer<T>> given, grads;
  for (const int n : sizes) given.push_back(random<T>(n, 0.3, rng)), grads.emplace_back(n);
  const auto at = [&](int i) { return given[i].data(); };
  const auto to = [&](int i) { return grads[i].data(); };
  const glf::GlowNetwork<T> net{H, W, P, N, O, T(3), at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  const glf::Coupling<T> op{glf::Kind::affine, static_cast<glf::LogScale>(0), T(2), false, false, {}};
  const Buffer<T> x = random<T>(size, 1, rng), grad_y = random<T>(size, 1, rng), grad_logdet = random<T>(B, 1, rng);
  Buffer<T> y(size), logdet(B), raw(std::size_t(B) * H * W * O), grad_x(size);
  kernels.glow_coupling(net, op, v_first, B, x.data(), y.data(), logdet.data(), raw.data(), threads(threads_));
  kernels.glow_coupling_backward(net, op, v_first, B, x.data(), raw.data(), grad_y.data(), grad_logdet.data(), grad_x.data(),
                                 {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8), to(9)}, threads(threads_));
  for (const Buffer<T>* more : {&logdet, &grad_x}) y.insert(y.end(), more->begin(), more->end());
  for (const Buffer<T>& more : grads) y.insert(y.end(), more.begin(), more.end());
  return y;
}

template <class T>
void walk_images(const glf::Kernels<T>& kernels, const glf::Kernels<T>& generic, double tolerance) {
  for (const int C : {1, 3, 4, 7, 12, 16, 33})
    for (const int rows : {0, 1, 5, 97, 3000})
      for (const bool inverse : {false, true})
        check("channel_map", map_channels(kernels, rows, C, inverse, 3), map_channels(generic, rows, C, inverse, 1), tolerance);
  const int shapes[][6] = {{3, 4, 5, 2, 2, 16}, {1, 1, 1, 1, 1, 1}, {5, 1, 7, 2, 1, 9}, {2, 3, 2, 3, 4, 17}, {0, 2, 2, 1, 1, 8}, {2, 0, 3, 2, 2, 16}};
  for (const auto& [B, H, W, P, transformed, N] : shapes)
    for (const bool v_first : {false, true})
      check("glow_coupling", couple_images(kernels, B, H, W, P, transformed, N, v_first, 3),
            couple_images(generic, B, H, W, P, transformed, N, v_first, 1), tolerance);
}

// Flows whose products all threads compute together, with few rows or with their own; wide in double alone.
template <class T>
void walk_wide(const glf::Kernels<T>& kernels, const glf::Kernels<T>& generic, double tolerance) {
  const Shape shapes[] = {{1, 5, 2, {600, 450}, 3}, {1, 20, 0, {600, 450}, 40}, {1, 4, 1, {512, 512, 512, 512}, 20, true}};
  for (const Shape& shape : shapes)
    for (const int option : {0, glf::log_scales + 1}) {
      Case<T> c(shape, option);
      c.direction(option > 0);
      const Buffer<T> expected = c.run(generic, c.x, glf::Save::inputs, 1);
      for (const int n : {1, 3}) check("wide", c.run(kernels, c.x, glf::Save::records, n), expected, tolerance);
    }
}

template <class T>
void walk(const glf::Kernels<T>& kernels, int bytes, const glf::Kernels<T>& generic, double tolerance) {
  const Shape shapes[] = {{2, 2, 0, {5}, 1},     {3, 3, 1, {4}, 2},      {2, 5, 2, {}, 7},       {2, 7, 3, {16, 9}, 13},
                          {2, 20, 0, {64, 64}, 37}, {2, 33, 0, {17, 31, 8, 40}, 50}, {1, 64, 5, {70, 33}, 140}, {2, 6, 0, {8}, 0},
                          {2, 5, 0, {9, 9, 9}, 3, true}, {2, 7, 3, {20, 20, 20, 20, 20, 20, 20}, 41, true}};
  for (int option = 0; option < glf::log_scales + glf::kinds - 1; ++option)
    for (const Shape& shape : shapes) {
      Case<T> c(shape, option);
      c.flow.density = option % 2;
      for (const bool inverse : {false, true}) {
        c.direction(inverse);
        c.flow.row_scales = option % 3 == 0 && !inverse;  // an inverse's matrices have scaled columns, and no such gradient
        const Buffer<T> expected = c.run(generic, c.x, glf::Save::inputs, 1);
        for (const glf::Save save : {glf::Save::nothing, glf::Save::inputs, glf::Save::records})
          for (const int n : {1, 3}) check("memory mode, threads or instruction set", c.run(kernels, c.x, save, n), expected, tolerance);
        check("repeated", c.run(kernels, c.x, glf::Save::inputs, 3), c.run(kernels, c.x, glf::Save::inputs, 3), 0);
      }
      c.direction(false);
      Buffer<T> z = c.run(kernels, c.x, glf::Save::nothing, 1);
      z.resize(c.x.size());
      c.direction(true);
      Buffer<T> x = c.run(kernels, z, glf::Save::nothing, 1);
      x.resize(c.x.size());
      check("round trip", x, c.x, tolerance);
    }
  walk_wide(kernels, generic, tolerance);
  walk_couplings(kernels, generic, tolerance);
  walk_images(kernels, generic, tolerance);
  walk_autoregressive(kernels, bytes, generic, tolerance);
  walk_linear(kernels, generic, 10 * tolerance);  // inverses amplify rounding by their condition
}

}  // namespace

int main() {
  walk(glf::generic::kernels_f32, 16, glf::generic::kernels_f32, 2e-4);
  walk(glf::generic::kernels_f64, 16, glf::generic::kernels_f64, 1e-12);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    walk(glf::avx2::kernels_f32, 32, glf::generic::kernels_f32, 2e-4);
    walk(glf::avx2::kernels_f64, 32, glf::generic::kernels_f64, 1e-12);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    walk(glf::avx512::kernels_f32, 64, glf::generic::kernels_f32, 2e-4);
    walk(glf::avx512::kernels_f64, 64, glf::generic::kernels_f64, 1e-12);
  }
#endif
  walk_training<float>(1e-4);
  walk_training<double>(1e-10);
  std::puts("all agree");
}
