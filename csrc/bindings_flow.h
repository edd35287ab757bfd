// The networks of a flow and what it does with them, from Python: what the operations on flows share.
#pragma once

#include "bindings.h"
#include "cpu/autoregressive.h"

#include <cmath>

namespace glf::bindings {

// A spline from the numbers of glf_fast.reference.PreparedSpline.
template <class T>
glf::Spline<T> spline_of(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 11 && numbers[0] >= 2 && numbers[0] <= glf::most_bins && std::abs(numbers[1]) <= 1,
                  "glf_fast: unknown kind of spline");
  const auto number = [&](int i) { return static_cast<T>(numbers[i]); };
  return {static_cast<int>(numbers[0]), static_cast<glf::Tails>(static_cast<int>(numbers[1])), numbers[2] != 0,
          number(3), number(4), number(5), number(6), number(7), number(8), number(9), number(10)};
}

struct __attribute__((visibility("hidden"))) Networks {  // as torch::stable::Tensor is
  const Tensors &weights, &biases;
  int64_t coupling, network, activation;
  double activation_constant;
  int64_t log_scale;
  double constant;
  bool add_first;
  const std::vector<double>& spline;

  // A flow that is complete but for its affine maps and its direction.
  template <class T>
  glf::Flow<T> flow(int64_t steps, int64_t dim, const Maybe& context) const {
    STD_TORCH_CHECK(coupling >= 0 && coupling < glf::kinds && network >= 0 && network < glf::network_kinds &&
                        activation >= 0 && activation < glf::activations && log_scale >= 0 && log_scale < glf::log_scales,
                    "glf_fast: unknown functions");
    STD_TORCH_CHECK(!weights.empty() && weights.size() <= glf::max_layers && weights.size() == biases.size(),
                    "glf_fast: a network of 1 to ", glf::max_layers, " layers is needed; got ", weights.size());
    glf::Flow<T> f{};
    f.steps = steps;
    f.dim = dim;
    f.context_dim = context ? context->size(1) : 0;
    f.layers = static_cast<int>(weights.size());
    f.kind = static_cast<glf::Kind>(coupling);
    if (f.kind == glf::Kind::spline) f.spline = spline_of<T>(spline);
    f.network = static_cast<glf::Network>(network);
    STD_TORCH_CHECK(f.network != glf::Network::skip, "glf_fast: a coupling flow has no network of this kind");
    f.networks = networks_of(f.kind);
    const bool apart = f.networks > 1, residual = f.network == glf::Network::residual;
    STD_TORCH_CHECK(!residual || (!apart && f.layers >= 2 && (f.layers - 2) % f.layers_of_block() == 0),
                    "glf_fast: ", f.layers, " layers do not make a residual network");
    f.width[0] = f.passive() + f.context_dim;
    for (int i = 0; i < f.layers; ++i) {
      const int64_t dims = apart ? 4 : 3;  // (K, networks, …) or (K, …)
      STD_TORCH_CHECK(weights[i].dim() == dims && biases[i].dim() == dims - 1 && weights[i].size(0) == f.steps &&
                          biases[i].size(0) == f.steps && (!apart || (weights[i].size(1) == f.networks && biases[i].size(1) == f.networks)) &&
                          weights[i].size(dims - 2) == f.inputs(i) &&
                          (!residual || i == 0 || i + 1 == f.layers || weights[i].size(dims - 1) == f.width[1]) &&
                          biases[i].size(dims - 2) == weights[i].size(dims - 1),
                      "glf_fast: the widths of the network's layers do not chain");
      f.width[i + 1] = weights[i].size(dims - 1);
      f.weight[i] = read<T>(weights[i]);
      f.bias[i] = read<T>(biases[i]);
    }
    STD_TORCH_CHECK(f.width[f.layers] == f.columns() * f.transformed(), "glf_fast: the network must end in ", f.columns(),
                    "·(D//2) columns; got ", f.width[f.layers]);
    f.activation = static_cast<glf::Activation>(activation);
    f.activation_constant = static_cast<T>(activation_constant);
    f.log_scale = static_cast<glf::LogScale>(log_scale);
    f.constant = static_cast<T>(constant);
    f.add_first = add_first;
    return f;
  }
};

// The same of a masked autoregressive flow.
struct __attribute__((visibility("hidden"))) MaskedNetworks {
  const Tensors &weights, &biases;
  const Tensor& seen;
  int64_t transform, network, activation;
  double activation_constant;
  int64_t log_scale;
  double constant;
  bool context_layer;
  const std::vector<double>& spline;

  template <class T>
  glf::Autoregressive<T> flow(int64_t steps, int64_t dim, const Maybe& context) const {
    const auto kind = static_cast<glf::Kind>(transform);
    STD_TORCH_CHECK((kind == glf::Kind::affine || kind == glf::Kind::spline) && network >= 0 && network < glf::network_kinds &&
                        activation >= 0 && activation < glf::activations && log_scale >= 0 && log_scale < glf::log_scales,
                    "glf_fast: unknown functions");
    glf::Autoregressive<T> f{};
    f.steps = steps;
    f.dim = dim;
    f.context_dim = context ? context->size(1) : 0;
    f.kind = kind;
    f.network = static_cast<glf::Network>(network);
    STD_TORCH_CHECK(!context_layer || f.context_dim > 0, "glf_fast: a context layer needs a context");
    f.context_layer = context_layer;
    f.layers = static_cast<int>(weights.size()) - context_layer;
    STD_TORCH_CHECK(f.layers >= 1 && f.layers <= glf::max_layers && weights.size() == biases.size() &&
                        (!f.residual() || f.layers % 2 == 0),
                    "glf_fast: a network of 1 to ", glf::max_layers, " layers is needed; got ", f.layers);
    if (kind == glf::Kind::spline) f.spline = spline_of<T>(spline);
    f.width[0] = f.dim;
    for (int i = 0; i < f.layers; ++i) f.width[i + 1] = weights[i].dim() == 3 ? weights[i].size(2) : 0;
    for (int i = 0; i < f.all_layers(); ++i) {
      STD_TORCH_CHECK(weights[i].dim() == 3 && biases[i].dim() == 2 && weights[i].size(0) == f.steps &&
                          biases[i].size(0) == f.steps && weights[i].size(1) == f.inputs(i) &&
                          weights[i].size(2) == f.outputs(i) && biases[i].size(1) == f.outputs(i) &&
                          (!f.residual() || i + 1 >= f.layers || f.outputs(i) == f.width[1]),
                      "glf_fast: the widths of the network's layers do not chain");
      f.weight[i] = read<T>(weights[i]);
      f.bias[i] = read<T>(biases[i]);
    }
    STD_TORCH_CHECK(f.width[f.layers] == f.columns() * f.dim, "glf_fast: the network must end in ", f.columns(),
                    "·D columns; got ", f.width[f.layers]);
    STD_TORCH_CHECK(seen.dim() == 2 && seen.size(0) == f.steps && seen.size(1) == f.seen_of_step(),
                    "glf_fast: fan_in does not fit the network");
    f.seen = read_permutation(seen);
    f.activation = static_cast<glf::Activation>(activation);
    f.activation_constant = static_cast<T>(activation_constant);
    f.log_scale = static_cast<glf::LogScale>(log_scale);
    f.constant = static_cast<T>(constant);
    STD_TORCH_CHECK(f.is_autoregressive(), "glf_fast: fan_in must be sorted within each layer, at most the layer before is wide, "
                    "and let no feature depend on itself or on one behind it");
    return f;
  }
};

}  // namespace glf::bindings
