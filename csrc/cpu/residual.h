// A step's residual network, forward and backward: glf_fast.reference.residual.
#pragma once

#include "dropout.h"

namespace glf::GLF_ISA {

// The linear layers of block j.
struct BlockLayers {
  int first, second, gate;

  template <class T>
  static BlockLayers of(const Flow<T>& flow, int j) {
    const int start = 1 + j * flow.layers_of_block();
    return {start, start + 1, start + 2};
  }
};

// Linear layer i of step k, from one field of the record to another; `finish` as in multiply.
template <class T, class Finish = Nothing>
void linear(const Tile<T>& tile, idx k, int i, idx from, idx to, const Finish& finish = {}) {
  const Flow<T>& flow = tile.flow;
  const idx ld = tile.at.width;
  multiply(tile, flow.outputs(i), flow.inputs(i), tile.record + from, ld, flow.weight[i] + flow.weights_before(i, k, 0), false,
           tile.record + to, ld, flow.bias[i] + flow.biases_before(i, k, 0), finish);
}

// [u, t], or t, of the network's input, a field of the record whose last columns are the context.
template <class T>
void run_residual(const Tile<T>& tile, idx k, idx input) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const idx ld = at.width;
  const int blocks = flow.blocks();
  const bool gated = flow.context_dim > 0;
  // `finish` is given a part of a field; the same part of another field:
  const auto same = [&](idx field, idx row, idx col) { return tile.field(field)[row] + col; };
  const auto activated = [&](int j, idx row, idx col, idx rows, idx cols) {
    const ResidualBlock& b = at.block[j];
    if (j < blocks)
      activate(flow.activation, flow.activation_constant, rows, cols, same(b.h, row, col), same(b.h_value, row, col), ld);
  };

  linear(tile, k, 0, input, at.block[0].h,
         [&](T*, idx row, idx col, idx rows, idx cols) { activated(0, row, col, rows, cols); });
  for (int j = 0; j < blocks; ++j) {
    const ResidualBlock &b = at.block[j], &next = at.block[j + 1];
    const BlockLayers layer = BlockLayers::of(flow, j);
    if (gated)
      linear(tile, k, layer.gate, input + flow.passive(), b.gate, [&](T* s, idx, idx, idx rows, idx cols) {
        for (idx m = 0; m < rows; ++m)
          for (idx c = 0; c < cols; c += lanes<T>) store(s + m * ld + c, sigmoid<T>(load(s + m * ld + c)));
      });
    const Dropout<T> dropout(tile, k, j);
    linear(tile, k, layer.first, b.h_value, b.argument, [&](T* q, idx row, idx col, idx rows, idx cols) {
      activate(flow.activation, flow.activation_constant, rows, cols, q, same(b.value, row, col), ld);
      dropout.apply(row, col, rows, cols, same(b.value, row, col), ld);
    });
    linear(tile, k, layer.second, b.value, b.branch, [&](T* branch, idx row, idx col, idx rows, idx cols) {
      const T *h = same(b.h, row, col), *gate = gated ? same(b.gate, row, col) : nullptr;
      T* sum = same(next.h, row, col);
      for (idx m = 0; m < rows; ++m)
        for (idx e = m * ld; e < m * ld + cols; e += lanes<T>)
          store(sum + e, load(h + e) + (gated ? load(branch + e) * load(gate + e) : load(branch + e)));
      activated(j + 1, row, col, rows, cols);
    });
  }
  linear(tile, k, flow.layers - 1, at.block[blocks].h, at.raw);
}

// Gradients of linear layer i's weight and bias, from its input in the record and ∂ of what it makes.
template <class T>
void linear_parameters(const BackwardTile<T>& tile, idx k, int i, idx from, idx g) {
  const Flow<T>& flow = tile.flow;
  if (!tile.parameters) return;
  outer_sum(tile, flow.inputs(i), flow.outputs(i), from, g, tile.parameters->weight[i] + flow.weights_before(i, k, 0));
  column_sum(tile.rows, flow.outputs(i), T(1), tile.gradient + g, tile.grad.width,
             tile.parameters->bias[i] + flow.biases_before(i, k, 0), tile.accumulate);
}

// ∂ of linear layer i's input, = or += with `accumulate`, from ∂ of what it makes.
template <class T, class Finish = Nothing>
void linear_input(const BackwardTile<T>& tile, idx k, int i, idx g, idx to, const Finish& finish = {},
                  bool accumulate = false) {
  const Flow<T>& flow = tile.flow;
  multiply<T>(tile, flow.inputs(i), flow.outputs(i), tile.gradient + g, tile.grad.width,
              flow.weight[i] + flow.weights_before(i, k, 0), true, tile.gradient + to, tile.grad.width, nullptr, finish,
              accumulate);
}

// From ∂[u, t] to ∂[p, context], and the gradients of step k's network.
template <class T>
void residual_backward(const BackwardTile<T>& tile, idx k) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const GradientRecord& grad = tile.grad;
  const idx ld = at.width, grad_ld = grad.width, H = flow.outputs(0);
  const int last = flow.layers - 1;
  const bool gated = flow.context_dim > 0;
  // ∂h; ∂ of what the gate's layer makes, then ∂ of what the block's first one makes; ∂branch, then ∂a(h).
  const idx stream = grad.hidden[0], middle = grad.hidden[1], end = grad.hidden[2];

  // The context's gradient gathers over the gates before the first layer adds to it.
  for (idx m = 0; gated && m < tile.rows; ++m) std::fill_n(tile.gradient_of(grad.input)[m], flow.width[0], T(0));
  linear_parameters(tile, k, last, at.block[flow.blocks()].h, grad.raw);
  linear_input(tile, k, last, grad.raw, stream);
  for (int j = flow.blocks() - 1; j >= 0; --j) {
    const ResidualBlock& b = at.block[j];
    const BlockLayers layer = BlockLayers::of(flow, j);
    const idx branch = gated ? end : stream;
    if (gated) {
      for (idx m = 0; m < tile.rows; ++m)
        for (idx c = 0; c < H; c += lanes<T>) {
          const vec<T> g = load(tile.gradient_of(stream)[m] + c), s = load(tile.read(b.gate)[m] + c);
          store(tile.gradient_of(branch)[m] + c, g * s);
          store(tile.gradient_of(middle)[m] + c, g * load(tile.read(b.branch)[m] + c) * s * (T(1) - s));
        }
      linear_parameters(tile, k, layer.gate, at.input + flow.passive(), middle);
      linear_input(tile, k, layer.gate, middle, grad.input + flow.passive(), Nothing{}, true);
    }
    linear_parameters(tile, k, layer.second, b.value, branch);
    const Dropout<T> dropout(tile, k, j);
    linear_input(tile, k, layer.second, branch, middle, [&](T* g, idx row, idx col, idx rows, idx cols) {
      dropout.backward(row, col, rows, cols, tile.read(b.argument)[row] + col, ld, g, grad_ld);
    });
    linear_parameters(tile, k, layer.first, b.h_value, middle);
    // Where h itself is in one place for all blocks, a'(h) comes from a(h).
    const idx kept = keeps_argument(flow.activation) ? b.h : b.h_value;
    linear_input(tile, k, layer.first, middle, end, [&](T* g, idx row, idx col, idx rows, idx cols) {
      activate_backward(flow.activation, flow.activation_constant, rows, cols, tile.read(kept)[row] + col, ld, g, grad_ld);
      T* sum = tile.gradient_of(stream)[row] + col;
      for (idx m = 0; m < rows; ++m)
        for (idx e = m * grad_ld; e < m * grad_ld + cols; e += lanes<T>) store(sum + e, load(sum + e) + load(g + e));
    });
  }
  linear_parameters(tile, k, 0, at.input, stream);
  linear_input(tile, k, 0, stream, grad.input, Nothing{}, gated);
}

}  // namespace glf::GLF_ISA
