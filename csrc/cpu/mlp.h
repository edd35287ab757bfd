// A step's multi-layer perceptrons, forward and backward.
#pragma once

#include "dropout.h"

namespace glf::GLF_ISA {

// [u, t], or t, = MLP_k(input), a field of the record.
template <class T>
void run_mlp(const Tile<T>& tile, idx k, idx input) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  for (int n = 0; n < flow.networks; ++n)
    for (int i = 0; i < flow.layers; ++i) {
      const bool last = i + 1 == flow.layers;
      const idx n_in = flow.inputs(i), n_out = flow.outputs(i);
      const idx from = i ? at.value[i - 1] + n * at.hidden[i - 1] : input;
      const idx out = last ? at.raw + n * n_out : at.argument[i] + n * at.hidden[i];
      const Dropout<T> dropout(tile, k, i, n);
      const auto finish = [&](T* block, idx row, idx col, idx rows, idx cols) {
        if (last) return;
        T* value = tile.field(at.value[i] + n * at.hidden[i])[row] + col;
        activate(flow.activation, flow.activation_constant, rows, cols, block, value, at.width);
        dropout.apply(row, col, rows, cols, value, at.width);
      };
      multiply(tile, n_out, n_in, tile.record + from, at.width, flow.weight[i] + flow.weights_before(i, k, n), false,
               tile.record + out, at.width, flow.bias[i] + flow.biases_before(i, k, n), finish);
    }
}

// From ∂[u, t] to ∂[p, context], which both networks share, and the gradients of step k's MLPs.
template <class T>
void mlp_backward(const BackwardTile<T>& tile, idx k) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const GradientRecord& grad = tile.grad;
  for (int n = 0; n < flow.networks; ++n) {
    idx g = grad.raw + n * flow.outputs(flow.layers - 1);
    for (int i = flow.layers - 1; i >= 0; --i) {
      const idx n_in = flow.inputs(i), n_out = flow.outputs(i);
      const idx before = i ? n * at.hidden[i - 1] : 0;  // of this network, in a hidden layer's field
      if (tile.parameters) {
        const idx input = i ? at.value[i - 1] + before : at.input;
        outer_sum(tile, n_in, n_out, input, g, tile.parameters->weight[i] + flow.weights_before(i, k, n));
        column_sum(tile.rows, n_out, T(1), tile.gradient + g, grad.width,
                   tile.parameters->bias[i] + flow.biases_before(i, k, n), tile.accumulate);
      }
      const idx next = i ? grad.hidden[i % 2] : grad.input;
      const Dropout<T> dropout(tile, k, i - 1, n);
      const auto finish = [&](T* block, idx row, idx col, idx rows, idx cols) {
        if (i)
          dropout.backward(row, col, rows, cols, tile.read(at.argument[i - 1] + before)[row] + col, at.width, block, grad.width);
      };
      multiply<T>(tile, n_in, n_out, tile.gradient + g, grad.width, flow.weight[i] + flow.weights_before(i, k, n), true,
                  tile.gradient + next, grad.width, nullptr, finish, i == 0 && n > 0);
      g = next;
    }
  }
}

}  // namespace glf::GLF_ISA
