// Masked autoregressive flows: what the kernels are given, see glf_fast.reference.autoregressive_flow.
#pragma once

#include "flow.h"
#include "record.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace glf {

// K steps of an affine map and an autoregressive transform, with stacked, contiguous parameters. `matrix` is A (forward) or
// A⁻¹ (inverse). The hidden units of a network, and the features, are sorted by what they depend on: unit n of a layer sees
// the first fan_in(i, k, n) units of the layer before, and none of the weights beyond are read.
template <class T>
struct Autoregressive {
  Int steps, dim, context_dim;
  Kind kind;                       // affine or spline
  Network network;
  bool context_layer;              // the context has a hidden layer of its own, which is added to the first one
  int layers;                      // linear layers of a network, but for that one
  Int width[max_layers + 1];       // D, hidden widths, columns()·D
  const T* matrix;                 // (K, D, D)
  const T* offset;                 // c (K, D)
  const T* weight[max_layers + 1]; // (K, context_rows(i) + width[i], width[i + 1]); then the context layer's (K, C, width[1])
  const T* bias[max_layers + 1];   // (K, width[i + 1])
  const std::int64_t* seen;        // (K, hidden widths …, D)
  Activation activation;
  T activation_constant;           // as in Flow
  LogScale log_scale;
  T constant;
  Spline<T> spline;
  bool inverse, density;           // as in Flow

  // Numbers that a network makes for each feature, side by side: [u, t] of an affine transform.
  Int columns() const { return kind == Kind::spline ? spline.columns() : 2; }
  int hidden() const { return layers - 1; }
  // Layers 0, 2, 4 … of a residual network add to its stream, all others to nothing.
  bool residual() const { return network != Network::mlp; }
  bool in_stream(int i) const { return residual() && i % 2 == 0 && i < hidden(); }
  bool activated(int i) const {  // of hidden layers
    return !residual() || (network == Network::skip ? i % 2 == 1 : i + 1 < hidden());
  }
  // Rows of the context, before those of the layer's own input.
  Int context_rows(int i) const {
    return (i == 0 ? !context_layer : network == Network::residual && i % 2 == 1 && i < hidden()) ? context_dim : 0;
  }
  Int inputs(int i) const { return i == layers ? context_dim : context_rows(i) + width[i]; }
  Int outputs(int i) const { return i == layers ? width[1] : width[i + 1]; }
  int all_layers() const { return layers + (context_layer ? 1 : 0); }
  Int weights_before(int i, Int k) const { return k * inputs(i) * outputs(i); }
  Int biases_before(int i, Int k) const { return k * outputs(i); }

  // Units of hidden layers, and features.
  Int seen_of_step() const {
    Int sum = dim;
    for (int i = 1; i < layers; ++i) sum += width[i];
    return sum;
  }
  // What the outputs of layer i see, one number each; of the last layer, a feature each.
  const std::int64_t* seen_by(int i, Int k) const {
    const std::int64_t* s = seen + k * seen_of_step();
    for (int j = 0; j < i; ++j) s += width[j + 1];
    return s;
  }
  Int fan_in(int i, Int k, Int n) const { return seen_by(i, k)[i + 1 == layers ? n / columns() : n]; }

  // Whether `seen` is sorted, within bounds, and such that no feature depends on itself or on one behind it.
  bool is_autoregressive() const {
    for (Int k = 0; k < steps; ++k) {
      std::vector<Int> reach[max_layers];  // of each output of a layer: the features that it depends on
      for (int i = 0; i < layers; ++i) {
        const std::int64_t* s = seen_by(i, k);
        const Int n = i + 1 == layers ? dim : width[i + 1];
        reach[i].resize(n);
        for (Int j = 0; j < n; ++j) {
          if (s[j] < (j ? s[j - 1] : 0) || s[j] > width[i]) return false;
          reach[i][j] = i == 0 ? s[j] : s[j] ? reach[i - 1][s[j] - 1] : 0;
          if (i >= 2 && in_stream(i)) reach[i][j] = std::max(reach[i][j], reach[i - 2][j]);
        }
      }
      for (Int d = 0; d < dim; ++d)
        if (reach[hidden()][d] > d) return false;
    }
    return true;
  }
};

// Offsets into a panel's record of one step, in units. Every unit is one number of each row.
struct PanelRecord {
  Int x;        // the step's input
  Int y;        // the features: after the affine map (forward), or before it (inverse)
  Int shifted;  // of the inverse: y − c
  Int context_argument, context_value;  // of the context's own hidden layer
  Int argument[max_layers], value[max_layers];  // of hidden layers: before and after the activation
  Int raw;
  Int size;

  template <class T>
  static PanelRecord of(const Autoregressive<T>& flow) {
    Int end = 0;
    const auto field = [&end](Int n) { return std::exchange(end, end + n); };
    PanelRecord r{};
    r.x = field(flow.dim);
    r.y = field(flow.dim);
    r.shifted = flow.inverse ? field(flow.dim) : r.y;
    const bool argument = keeps_argument(flow.activation);
    if (flow.context_layer) {
      r.context_value = field(flow.width[1]);
      r.context_argument = argument ? field(flow.width[1]) : r.context_value;
    }
    for (int i = 0; i < flow.hidden(); ++i) {
      r.value[i] = field(flow.width[i + 1]);
      r.argument[i] = flow.activated(i) && (argument || flow.in_stream(i)) ? field(flow.width[i + 1]) : r.value[i];
    }
    r.raw = field(flow.width[flow.layers]);
    r.size = end;
    return r;
  }
};

// Shaped like the parameters. All are written, none is read.
template <class T>
struct AutoregressiveGradients {
  T *matrix, *offset, *weight[max_layers + 1], *bias[max_layers + 1];
};

// Rows that the kernels of this processor keep together: of a saved record, (K, panels, units · rows).
template <class T>
Int rows_of_panel() {
  return 2 * vector_bytes() / static_cast<Int>(sizeof(T));
}

// Units of a panel's record; the same for every instruction set.
template <class T>
Int record_units(const Autoregressive<T>&);

}  // namespace glf
