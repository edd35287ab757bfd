// Masked autoregressive flows, as `Case` has coupling flows: their memory modes, threads, instruction sets and round trips.
#pragma once

#include "cpu/autoregressive.h"

namespace {

template <class T>
struct AutoregressiveCase {
  glf::Autoregressive<T> flow{};
  glf::Int batch;
  Buffer<T> matrix, inverse, offset, x, context;
  std::vector<Buffer<T>> weights, biases;
  std::vector<std::int64_t> seen;

  AutoregressiveCase(int K, int D, int C, const std::vector<int>& hidden, int batch, int option, glf::Network network)
      : batch(batch) {
    std::mt19937 rng(option);
    flow.steps = K;
    flow.dim = D;
    flow.context_dim = C;
    flow.context_layer = C > 0 && option % 2;
    flow.kind = option % 3 == 2 ? glf::Kind::spline : glf::Kind::affine;
    if (flow.kind == glf::Kind::spline) flow.spline = spline_of<T>();
    flow.network = network;
    flow.layers = static_cast<int>(hidden.size()) + 1;
    flow.activation = static_cast<glf::Activation>(option % glf::activations);
    flow.activation_constant = T(0.3);
    flow.log_scale = option % 2 ? glf::LogScale::softplus : glf::LogScale::tanh;
    flow.constant = 2;
    flow.density = option % 2;
    matrix.assign(K * D * D, 0);
    inverse.assign(K * D * D, 0);
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < D; ++i) {  // a cyclic shift with scales
        const int j = (i + 1 + k) % D;
        const T scale = T(1) + T(i % 3) / 2;
        matrix[(k * D + i) * D + j] = scale;
        inverse[(k * D + j) * D + i] = 1 / scale;
      }
    offset = random<T>(K * D, 0.5, rng);
    x = random<T>(batch * D, 1, rng);
    context = random<T>(batch * C, 1, rng);
    flow.width[0] = D;
    for (int i = 0; i < flow.layers; ++i) flow.width[i + 1] = i + 1 < flow.layers ? hidden[i] : flow.columns() * D;
    for (int i = 0; i < flow.all_layers(); ++i) {
      weights.push_back(random<T>(flow.weights_before(i, K), 0.5 / std::sqrt(double(flow.inputs(i) + 1)), rng));
      biases.push_back(random<T>(flow.biases_before(i, K), 0.1, rng));
    }
    for (int i = 0; i < flow.all_layers(); ++i) {
      flow.weight[i] = weights[i].data();
      flow.bias[i] = biases[i].data();
    }
    // Unit j of a layer has a degree of about j·D/units, and sees what has no greater one.
    const auto degree = [D](int j, int units) { return j * D / units; };
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < flow.layers; ++i) {
        const int units = i + 1 < flow.layers ? hidden[i] : D, before = i ? hidden[i - 1] : D;
        for (int j = 0; j < units; ++j) {
          int n = 0;
          if (i == 0) n = degree(j, units);
          else while (n < before && degree(n, before) <= (i + 1 < flow.layers ? degree(j, units) : j)) ++n;
          seen.push_back(n);
        }
      }
    flow.seen = seen.data();
    flow.offset = offset.data();
  }

  // Output, logdet and all gradients, one after the other.
  Buffer<T> run(const glf::Kernels<T>& kernels, bool inverse_op, const Buffer<T>& input, glf::Save save, int n, glf::Int lanes) {
    flow.inverse = inverse_op;
    flow.matrix = inverse_op ? inverse.data() : matrix.data();
    if (!flow.is_autoregressive()) std::puts("not autoregressive"), std::exit(1);
    const glf::Int B = batch, D = flow.dim, K = flow.steps, W = 2 * lanes;
    const glf::Int units = save == glf::Save::records ? glf::record_units(flow) : D;
    Buffer<T> out(B * D, NAN), logdet(B, NAN), saved(K * ((B + W - 1) / W) * W * units, NAN);
    kernels.autoregressive(flow, B, input.data(), context.data(), out.data(), logdet.data(), save, saved.data(), threads(n));
    Buffer<T> grad_x(B * D, NAN), grad_context(context.size(), NAN), grad_matrix(K * D * D, NAN), grad_offset(K * D, NAN);
    std::vector<Buffer<T>> rest;
    glf::AutoregressiveGradients<T> target{grad_matrix.data(), grad_offset.data(), {}, {}};
    for (int i = 0; i < flow.all_layers(); ++i) {
      rest.emplace_back(weights[i].size(), NAN);
      target.weight[i] = rest.back().data();
      rest.emplace_back(biases[i].size(), NAN);
      target.bias[i] = rest.back().data();
    }
    const Buffer<T> ones(B, T(1));
    kernels.autoregressive_backward(flow, B, out.data(), context.data(), save, saved.data(), flow.density ? nullptr : out.data(),
                                    ones.data(), grad_x.data(), grad_context.data(), &target, threads(n));
    Buffer<T> all = out;
    for (const auto* b : {&logdet, &grad_x, &grad_context, &grad_matrix, &grad_offset}) all.insert(all.end(), b->begin(), b->end());
    for (const auto& b : rest) all.insert(all.end(), b.begin(), b.end());
    return all;
  }
};

template <class T>
void walk_autoregressive(const glf::Kernels<T>& kernels, int bytes, const glf::Kernels<T>& generic, double tolerance) {
  using glf::Network;
  struct {
    int steps, dim, context_dim;
    std::vector<int> hidden;
    int batch;
    Network network = Network::mlp;
  } const shapes[] = {{2, 1, 0, {5}, 1},
                      {2, 2, 3, {4, 7}, 9},
                      {3, 5, 0, {9, 9, 9, 9}, 40},
                      {2, 10, 16, {50, 50}, 300},
                      {1, 40, 2, {17, 30}, 33},
                      {2, 6, 2, {8}, 0},
                      {2, 5, 0, {9, 9, 9}, 3, Network::residual},
                      {2, 7, 3, {12, 12, 12, 12, 12}, 41, Network::residual},
                      {2, 7, 3, {12, 12, 12, 12, 12}, 41, Network::skip}};
  const glf::Int own = bytes / sizeof(T), plain = 16 / sizeof(T);
  for (int option = 0; option < glf::activations; ++option)
    for (const auto& s : shapes) {
      AutoregressiveCase<T> c(s.steps, s.dim, s.context_dim, s.hidden, s.batch, option, s.network);
      for (const bool inverse : {false, true}) {
        const Buffer<T> expected = c.run(generic, inverse, c.x, glf::Save::inputs, 1, plain);
        for (const glf::Save save : {glf::Save::inputs, glf::Save::records})
          for (const int n : {1, 3})
            check("autoregressive flow", c.run(kernels, inverse, c.x, save, n, own), expected, tolerance);
      }
      Buffer<T> z = c.run(kernels, false, c.x, glf::Save::inputs, 1, own);
      z.resize(c.x.size());
      Buffer<T> x = c.run(kernels, true, z, glf::Save::inputs, 1, own);
      x.resize(c.x.size());
      check("autoregressive round trip", x, c.x, tolerance);
    }
}

}  // namespace
