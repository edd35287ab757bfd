// What tests of the kernels of coupling flows share: flows in double, row by row, and a call of every kernel whose results are compared
// with them. Each buffer is exactly as long as its tensor, for the sanitizers.
#pragma once

#include "cuda/flow_kernels.cuh"

#include <cmath>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using namespace glf::device;

std::mt19937 rng(1);

std::vector<float> random(std::size_t n, double scale = 1) {
  std::normal_distribution<double> normal;
  std::vector<float> made(n);
  for (float& x : made) x = static_cast<float>(scale * normal(rng));
  return made;
}

void require(bool good, const char* what, double value, const FlowShape& s, long long rows) {
  if (good) return;
  std::printf("%s: %g at D = %d, C = %d, %d layers, %lld rows, lanes %s\n", what, value, s.dim, s.context, s.layers, rows,
              backwards ? "backwards" : "forwards");
  std::exit(1);
}

struct Flow {
  FlowShape s;
  std::vector<float> matrix, inverse, offset, logs, weights[most_layers + 1], biases[most_layers + 1];

  int width(int layer) const { return layer < s.layers ? s.hidden[layer] : 2 * (s.dim / 2); }
  int inner(int layer) const { return layer ? s.hidden[layer - 1] : s.dim - s.dim / 2 + s.context; }

  // Maps that are near the identity, and their inverses by elimination in double.
  explicit Flow(const FlowShape& shape) : s(shape) {
    const int D = s.dim;
    matrix = random(s.steps * D * D, 0.3 / std::sqrt(D));
    inverse.resize(matrix.size());
    for (int k = 0; k < s.steps; ++k) {
      std::vector<double> a(2 * D * D);
      for (int i = 0; i < D; ++i) {
        matrix[(k * D + i) * D + (i + k) % D] += 1;
        for (int j = 0; j < D; ++j) a[2 * D * i + j] = matrix[(k * D + i) * D + j];
        a[2 * D * i + D + i] = 1;
      }
      for (int c = 0; c < D; ++c) {
        int p = c;
        for (int i = c; i < D; ++i)
          if (std::fabs(a[2 * D * i + c]) > std::fabs(a[2 * D * p + c])) p = i;
        for (int j = 0; j < 2 * D; ++j) std::swap(a[2 * D * c + j], a[2 * D * p + j]);
        const double pivot = a[2 * D * c + c];
        for (int j = 0; j < 2 * D; ++j) a[2 * D * c + j] /= pivot;
        for (int i = 0; i < D; ++i) {
          const double factor = i == c ? 0 : a[2 * D * i + c];
          for (int j = 0; j < 2 * D; ++j) a[2 * D * i + j] -= factor * a[2 * D * c + j];
        }
      }
      for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j) inverse[(k * D + i) * D + j] = static_cast<float>(a[2 * D * i + D + j]);
    }
    offset = random(s.steps * D);
    logs = random(s.steps);
    for (int l = 0; l <= s.layers; ++l) {
      weights[l] = random(s.steps * inner(l) * width(l), 1 / std::sqrt(double(inner(l))));
      biases[l] = random(s.steps * width(l), 0.3);
    }
  }

  // log p of a row, tanh networks and log-scales; its output to z.
  double density(const std::vector<double>& x, const float* context, std::vector<double>& z) const {
    const int D = s.dim, P = D - D / 2, T = D / 2;
    double total = 0;
    z = x;
    for (int k = 0; k < s.steps; ++k) {
      std::vector<double> y(D);
      for (int j = 0; j < D; ++j) {
        y[j] = offset[k * D + j];
        for (int i = 0; i < D; ++i) y[j] += z[i] * matrix[(k * D + i) * D + j];
      }
      std::vector<double> h(y.begin(), y.begin() + P);
      for (int c = 0; c < s.context; ++c) h.push_back(context[c]);
      for (int l = 0; l <= s.layers; ++l) {
        std::vector<double> next(width(l));
        for (int j = 0; j < width(l); ++j) {
          next[j] = biases[l][k * width(l) + j];
          for (int i = 0; i < inner(l); ++i) next[j] += h[i] * weights[l][(k * inner(l) + i) * width(l) + j];
          if (l < s.layers) next[j] = std::tanh(next[j]);
        }
        h = next;
      }
      for (int j = 0; j < T; ++j) {
        const double ell = 2 * std::tanh(h[j] / 2);
        y[P + j] = y[P + j] * std::exp(ell) + h[T + j];
        total += ell;
      }
      z = y;
      total += logs[k];
    }
    for (const double value : z) total -= 0.5 * value * value + 0.91893853320467274178;
    return total;
  }
};

template <class Run>
void launch(int blocks, int bytes, Run run) {
  for (int block = 0; block < blocks; ++block) {
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
    std::memset(memory, 0xff, bytes);
    host_block = {block, memory};
    run();
    std::free(memory);
  }
}

// A density and its gradients, in one launch and in two, its output, and the inverse's. `Kernels` launches them for the shape that it has.
template <class Kernels>
void try_flow(const Kernels& kernels, long long rows, double tolerance) {
  const FlowShape& s = kernels.shape;
  const Flow flow(s);
  const int D = s.dim;
  const auto x = random(rows * D), context = random(rows * s.context), grad_logdet = random(rows);
  const auto nan = [](std::size_t n) { return std::vector<float>(n, NAN); };
  std::vector<Quad> packed(s.steps * kernels.step_quads(false)), back_packed(s.steps * kernels.step_quads(true));
  FlowParameters given{flow.matrix.data(), flow.offset.data(), flow.logs.data(), s.steps, {}, {}};
  for (int l = 0; l <= s.layers; ++l) {
    given.weights[l] = flow.weights[l].data();
    given.biases[l] = flow.biases[l].data();
  }
  kernels.pack(given, packed.data(), back_packed.data());
  const int stride = workspace_column(s, s.layers) + (D + s.context + 15) / 16 * 16;
  auto out = nan(rows * D), logdet = nan(rows), grad_x = nan(rows * D), grad_context = nan(rows * s.context);
  auto map_in = nan(s.steps * rows * D), map_grad = map_in;
  std::vector<float> hidden = nan(s.steps * rows * stride), slopes = hidden;  // twice as long as bf16 needs
  std::vector<Quad> record(s.steps * ((rows + 15) / 16) * 3 * s.half_tiles * 32);
  FlowCall f{s, Activation::tanh, LogScale::tanh, 2, 0, 1, kernels.slots, kernels.warps, rows,
             reinterpret_cast<unsigned char*>(packed.data()), reinterpret_cast<unsigned char*>(back_packed.data()), x.data(),
             context.data(), out.data(), logdet.data(), stride, map_in.data(), map_grad.data(), hidden.data(), nullptr, slopes.data(),
             record.data(), nullptr, grad_logdet.data(), grad_x.data(), s.context ? grad_context.data() : nullptr};
  kernels.gradient(f, forth | back);
  for (long long row = 0; row < rows; ++row) {
    std::vector<double> start(x.begin() + row * D, x.begin() + (row + 1) * D), z, ends(2);
    const float* given_context = context.data() + row * s.context;
    const double log_p = flow.density(start, given_context, z);
    require(std::fabs(log_p - logdet[row]) <= tolerance * (D + std::fabs(log_p)), "density", logdet[row] - log_p, s, rows);
    for (int j = 0; j < D; ++j)
      require(std::fabs(z[j] - out[row * D + j]) <= tolerance * (4 + std::fabs(z[j])), "output", out[row * D + j] - z[j], s, rows);
    double slope = 0, length = 0;
    std::vector<double> direction(D);
    for (double& sign : direction) sign = rng() % 2 ? 1 : -1;
    for (const int end : {0, 1}) {
      std::vector<double> moved = start;
      for (int j = 0; j < D; ++j) moved[j] += (end ? -1e-6 : 1e-6) * direction[j];
      ends[end] = flow.density(moved, given_context, z);
    }
    for (int j = 0; j < D; ++j) {
      slope += direction[j] * grad_x[row * D + j];
      length += std::fabs(grad_x[row * D + j]);
    }
    const double difference = (ends[0] - ends[1]) / 2e-6 * grad_logdet[row];
    require(std::fabs(difference - slope) <= 10 * tolerance * (1 + length), "gradient", slope - difference, s, rows);
  }
  // A forward without gradients gives the same, bit for bit; in two launches the gradient is the same, too.
  auto again = nan(rows * D), logdet_again = nan(rows);
  FlowCall alone = f;
  alone.out = again.data();
  alone.logdet = logdet_again.data();
  kernels.forward(alone, false);
  require(again == out && logdet_again == logdet, "a forward without gradients", 0, s, rows);
  const auto whole = grad_x;
  std::fill(grad_x.begin(), grad_x.end(), NAN);
  kernels.gradient(f, forth);
  kernels.gradient(f, back);
  require(whole == grad_x, "a backward in a launch of its own", 0, s, rows);
  // And the inverse returns to where it came from.
  given.matrix = flow.inverse.data();
  kernels.pack(given, packed.data(), back_packed.data());
  alone.x = out.data();
  alone.density = 0;
  kernels.forward(alone, true);
  for (long long i = 0; i < rows * D; ++i)
    require(std::fabs(again[i] - x[i]) <= 30 * tolerance * (1 + std::fabs(x[i])), "inverse of forward", again[i] - x[i], s, rows);
}

}  // namespace
