// The backward of a coupling flow by panels: a tile of them through the steps in reverse order.
#pragma once

#include "flow_backward.h"
#include "flow_panel.h"

namespace glf::GLF_ISA {

// The gradients of a panel during one step, in units; those of all layers stay until the weights' are summed over a tile.
struct FlowPanelGradients {
  Int ends[2];            // ∂ of the step's output and of its input, in turns
  Int y, input;           // ∂y; ∂[p, context]
  Int layer[max_layers];  // ∂ of what a linear layer makes; the second network's follows
  Int stream[max_blocks + 1];  // of a residual network: ∂h
  Int context, state, logdet;
  Int width;

  template <class T>
  static FlowPanelGradients of(const Flow<T>& flow) {
    Int end = 0;
    const auto field = [&end](Int n) { return std::exchange(end, end + n); };
    FlowPanelGradients g{};
    for (Int& e : g.ends) e = field(flow.dim);
    g.y = field(flow.dim);
    g.input = field(flow.width[0]);
    for (int i = 0; i < flow.layers; ++i) g.layer[i] = field(flow.networks * flow.outputs(i));
    if (flow.network == Network::residual) {
      g.stream[0] = g.layer[0];
      for (int j = 1; j <= flow.blocks(); ++j) {
        const int second = BlockLayers::of(flow, j - 1).second;
        g.stream[j] = flow.context_dim ? field(flow.outputs(0)) : g.layer[second];  // without a gate they are the same
      }
    }
    g.context = field(flow.context_dim);
    g.state = field(flow.dim);
    g.logdet = field(1);
    g.width = end;
    return g;
  }
};

template <class T>
struct BackwardFlowPanel : FlowPanel<T> {
  const FlowPanelGradients& grad;
  T* gradient;
  idx out;  // which of grad.ends is ∂ of the step's output

  T* gradient_of(idx unit) const { return gradient + unit * panel_rows<T>; }
  T* grad_out() const { return gradient_of(grad.ends[out]); }
  T* grad_x() const { return gradient_of(grad.ends[1 - out]); }

  // ∂ of the input of linear layer i of network n, from ∂ of what it makes.
  void linear_input(idx k, int i, int n, const T* g, T* to, const T* addend = nullptr) const {
    const Flow<T>& flow = this->flow;
    multiply_units<T>(this->vectors, flow.inputs(i), flow.outputs(i), flow.weight[i] + flow.weights_before(i, k, n), flow.outputs(i),
                      1, g, nullptr, addend, to);
  }
};

// From ∂[u, t] to ∂[p, context], which both networks share, and ∂ of all layers.
template <class T>
void mlp_backward(const BackwardFlowPanel<T>& panel, idx k) {
  const Flow<T>& flow = panel.flow;
  const Record& at = panel.at;
  T* input = panel.gradient_of(panel.grad.input);
  for (int n = 0; n < flow.networks; ++n)
    for (int i = flow.layers - 1; i >= 0; --i) {
      const T* g = panel.gradient_of(panel.grad.layer[i] + n * flow.outputs(i));
      if (i == 0) {
        panel.linear_input(k, 0, n, g, input, n ? input : nullptr);
        continue;
      }
      const idx H = flow.inputs(i);
      T* before = panel.gradient_of(panel.grad.layer[i - 1] + n * H);
      panel.linear_input(k, i, n, g, before);
      panel.dropout(k, i - 1, n).units_backward(H, panel.vectors, panel.field(at.argument[i - 1] + n * at.hidden[i - 1]), before);
    }
}

template <class T>
void residual_backward(const BackwardFlowPanel<T>& panel, idx k) {
  const Flow<T>& flow = panel.flow;
  const Record& at = panel.at;
  const FlowPanelGradients& grad = panel.grad;
  const idx H = flow.outputs(0);
  const int last = flow.layers - 1;
  const bool gated = flow.context_dim > 0;
  const auto of_layer = [&](int i) { return panel.gradient_of(grad.layer[i]); };
  T* input = panel.gradient_of(grad.input);
  T* of_context = input + flow.passive() * panel_rows<T>;
  // The context's gradient gathers over the gates before the first layer adds to it.
  if (gated) std::fill_n(input, flow.width[0] * panel_rows<T>, T(0));
  panel.linear_input(k, last, 0, of_layer(last), panel.gradient_of(grad.stream[flow.blocks()]));
  for (int j = flow.blocks() - 1; j >= 0; --j) {
    const ResidualBlock& b = at.block[j];
    const BlockLayers layer = BlockLayers::of(flow, j);
    const T* stream = panel.gradient_of(grad.stream[j + 1]);
    T* next = panel.gradient_of(grad.stream[j]);
    if (gated) {
      const T *gate = panel.field(b.gate), *branch = panel.field(b.branch);
      T *g_branch = of_layer(layer.second), *g_gate = of_layer(layer.gate);
      each_vector<T>(panel.vectors, H, [=](idx e) {
        const vec<T> g = load(stream + e), s = load(gate + e);
        store(g_branch + e, g * s);
        store(g_gate + e, g * load(branch + e) * s * (T(1) - s));
      });
      panel.linear_input(k, layer.gate, 0, g_gate, of_context, of_context);
    }
    T* middle = of_layer(layer.first);
    panel.linear_input(k, layer.second, 0, of_layer(layer.second), middle);
    panel.dropout(k, j).units_backward(H, panel.vectors, panel.field(b.argument), middle);
    panel.linear_input(k, layer.first, 0, middle, next);
    // Where h itself is in one place for all blocks, a'(h) comes from a(h).
    activate_backward(flow.activation, flow.activation_constant, H, panel.elements(),
                      panel.field(keeps_argument(flow.activation) ? b.h : b.h_value), panel_rows<T>, next, panel_rows<T>);
    each_vector<T>(panel.vectors, H, [=](idx e) { store(next + e, load(next + e) + load(stream + e)); });
  }
  panel.linear_input(k, 0, 0, of_layer(0), input, gated ? input : nullptr);
}

// From ∂ of the transformed output, and the step's networks, to ∂ of their input: g ← to, whose passive features are the sum of
// from's and of what comes through the networks.
template <class T>
void coupling_backward(const BackwardFlowPanel<T>& panel, idx k, idx v, const T* from, T* to, bool first_step) {
  constexpr idx W = panel_rows<T>;
  const Flow<T>& flow = panel.flow;
  const FlowPanelGradients& grad = panel.grad;
  const idx P = flow.passive();
  transform_units_backward(panel.coupling(flow.inverse), panel.vectors, {0, flow.transformed()}, panel.raw(), panel.field(v + P),
                           panel.field(panel.at.raw), from + P * W, panel.gradient_of(grad.logdet), to + P * W,
                           panel.gradient_of(grad.layer[flow.layers - 1]));
  if (flow.network == Network::residual)
    residual_backward(panel, k);
  else
    mlp_backward(panel, k);
  const T* input = panel.gradient_of(grad.input);
  each_vector<T>(panel.vectors, P, [=](idx e) { store(to + e, load(from + e) + load(input + e)); });
  const T* mine = input + P * W;
  T* sum = panel.gradient_of(grad.context);
  each_vector<T>(panel.vectors, flow.context_dim,
                 [=](idx e) { store(sum + e, first_step ? load(mine + e) : load(sum + e) + load(mine + e)); });
}

// Step k: from ∂ of its output to ∂ of its input and of all layers. The record is full.
template <class T>
void step_backward(const BackwardFlowPanel<T>& panel, idx k, bool first_step) {
  T* y = panel.gradient_of(panel.grad.y);
  if (!panel.flow.inverse) {
    coupling_backward<T>(panel, k, panel.at.y, panel.grad_out(), y, first_step);
    multiply_by_map<T>(panel, k, false, true, y, panel.grad_x());
  } else {
    multiply_by_map<T>(panel, k, false, true, panel.grad_out(), y);
    coupling_backward<T>(panel, k, panel.at.x, y, panel.grad_x(), first_step);
  }
}

// Fills step k's record from the step's output, which `state` holds and which becomes the step's input.
template <class T>
void rebuild_record(const FlowPanel<T>& panel, idx k, T* state, T* unused) {
  const Flow<T>& flow = panel.flow;
  const Record& at = panel.at;
  const idx D = flow.dim, P = flow.passive(), transformed = P * panel_rows<T>;
  T *x = panel.field(at.x), *y = panel.field(at.y);
  if (!flow.inverse) {
    copy_units(P, state, y);
    run_network(panel, k, at.y);
    run_coupling(panel, true, state + transformed, y + transformed, unused);
    copy_units(D, y, state);
    add_offset(panel, k, T(-1), state);
    multiply_by_map(panel, k, true, false, state, x);
  } else {
    multiply_by_map(panel, k, true, false, state, y, flow.offset + k * D);
    copy_units(P, y, x);
    run_network(panel, k, at.x);
    run_coupling(panel, false, y + transformed, x + transformed, unused);
    add_offset(panel, k, T(-1), y);
  }
  copy_units(D, x, state);
}

// The record's field that linear layer i of network n is given.
template <class T>
idx input_of(const Flow<T>& flow, const Record& at, int i, int n) {
  if (i == 0) return at.input;
  if (flow.network != Network::residual) return at.value[i - 1] + n * at.hidden[i - 1];
  if (i + 1 == flow.layers) return at.block[flow.blocks()].h;
  const int j = (i - 1) / flow.layers_of_block();
  const BlockLayers layer = BlockLayers::of(flow, j);
  return i == layer.first ? at.block[j].h_value : i == layer.second ? at.block[j].value : at.input + flow.passive();
}

// ∂A_k where only the scales of its rows are trained, from x and ∂x: see map_gradient_of_sums.
template <class T>
void scale_gradients(const Flow<T>& flow, idx k, idx panels, const idx* vectors, Fields<T> x, Fields<T> g, T* grad, bool accumulate) {
  const Scratch<T> sums(flow.dim);
  for (idx i = 0; i < flow.dim; ++i) {
    vec<T> sum_of{};
    for (idx p = 0; p < panels; ++p)
      each_vector<T>(static_cast<int>(vectors[p]), 1, [&](idx e) {
        const idx at = i * panel_rows<T> + e;
        sum_of += load(x.data + p * x.apart + at) * load(g.data + p * g.apart + at);
      });
    sums.get()[i] = sum<T>(sum_of);
  }
  map_gradient_of_sums(flow, k, sums.get(), grad, accumulate);
}

// Gradients of step k's parameters, from the panels of a tile.
template <class T>
void parameter_gradients(const Flow<T>& flow, idx k, const Record& at, const FlowPanelGradients& grad, idx panels,
                         const idx* vectors, Fields<T> records, Fields<T> gradients, idx out, const Gradients<T>& target,
                         T* turned, bool accumulate) {
  constexpr idx W = panel_rows<T>;
  const idx D = flow.dim;
  const auto from_all = [](idx) { return idx{0}; };
  const auto sum = [&](idx input, idx inputs, idx g, idx N, T* weight, T* bias, T sign) {
    weight_gradient<T>(panels, vectors, {records.data + input * W, records.apart}, inputs,
                       {gradients.data + g * W, gradients.apart}, N, from_all, weight, bias, sign, turned, accumulate);
  };
  T *matrix = target.matrix ? target.matrix + k * D * D : nullptr, *offset = target.offset + k * D;
  if (matrix && flow.row_scales) {
    scale_gradients(flow, k, panels, vectors, {records.data + at.x * W, records.apart},
                    {gradients.data + grad.ends[1 - out] * W, gradients.apart}, matrix, accumulate);
    matrix = nullptr;
  }
  if (flow.inverse) {
    if (matrix) sum(at.y, D, grad.ends[out], D, matrix, nullptr, T(1));
    sum(0, 0, grad.y, D, nullptr, offset, T(-1));
  } else {
    sum(at.x, matrix ? D : 0, grad.y, D, matrix, offset, T(1));
  }
  for (int i = 0; i < flow.layers; ++i)
    for (int n = 0; n < flow.networks; ++n)
      sum(input_of(flow, at, i, n), flow.inputs(i), grad.layer[i] + n * flow.outputs(i), flow.outputs(i),
          target.weight[i] + flow.weights_before(i, k, n), target.bias[i] + flow.biases_before(i, k, n), T(1));
}

template <class T>
void backward_by_panels(const Flow<T>& flow, Int batch, const T* out, const T* context, Save save, const T* saved,
                        Int record_width, const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context,
                        const Gradients<T>* parameters, const Parallel& parallel) {
  constexpr idx W = panel_rows<T>;
  const Record at = Record::of_panel(flow);
  const FlowPanelGradients grad = FlowPanelGradients::of(flow);
  const AffineMaps<T> maps(flow, batch);
  const idx D = flow.dim, C = flow.context_dim, K = flow.steps, record = at.width * W, size = grad.width * W;
  const PanelTiling tiling(work_of(flow) * 2, batch, size, parallel, T{});
  const idx P = tiling.tile_panels;
  idx widest = D;
  for (int i = 0; i < flow.layers; ++i) widest = std::max(widest, flow.outputs(i));

  // The first thread adds into the result itself, the others into their own copies.
  idx parameter_size = 0;
  if (parameters) each_gradient(flow, [&](auto tensor, idx n) { parameter_size += tensor(*parameters) ? n : 0; });
  const int copies = parameters ? tiling.threads - 1 : 0;
  const PerThread<T> memory(tiling.threads, {save == Save::records ? 0 : P * record, P * size + P * C * W,
                                             P * W * round_up(widest, NR * lanes<T>), copies ? parameter_size : 0});
  const std::unique_ptr<Gradients<T>[]> own(new Gradients<T>[copies + 1]);
  for (int i = 0; i < copies; ++i) own[i] = carve(flow, parameters->matrix, memory.get(i + 1, 3));

  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *scratch = memory.get(thread, 0), *gradients = memory.get(thread, 1), *turned = memory.get(thread, 2);
    T* contexts = gradients + P * size;
    const Gradients<T>* target = !parameters ? nullptr : thread == 0 ? parameters : &own[thread - 1];
    tiling.each_tile(thread, [&](idx first, idx panels, bool first_tile) {
      const auto rows = [&](idx p) { return std::min(W, batch - (first + p) * W); };
      idx vectors[most_panels];
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W, n = rows(p);
        vectors[p] = (n + lanes<T> - 1) / lanes<T>;
        load_panel(n, C, context + row * C, contexts + p * C * W);
        T *g = gradients + (p * grad.width + grad.ends[0]) * W, *g_logdet = gradients + (p * grad.width + grad.logdet) * W;
        std::fill_n(g, D * W, T(0)), std::fill_n(g_logdet, W, T(0));  // lanes without a row have no gradient
        for (idx m = 0; m < n; ++m) {
          g_logdet[m] = grad_logdet[row + m];
          for (idx d = 0; d < D; ++d)
            g[d * W + m] = grad_out ? grad_out[(row + m) * D + d] : -grad_logdet[row + m] * out[(row + m) * D + d];
        }
        if (save == Save::nothing) load_panel(n, D, out + row * D, gradients + (p * grad.width + grad.state) * W);
      }
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? i : K - 1 - i, end = i % 2;
        // Saved records are full, so nothing below writes to them.
        T* records = save == Save::records ? const_cast<T*>(saved) + k * batch * record_width + first * record : scratch;
        for (idx p = 0; p < panels; ++p) {
          const BackwardFlowPanel<T> panel{
              {flow, maps, at, (first + p) * W, rows(p), contexts + p * C * W, records + p * record}, grad, gradients + p * size, end};
          // Log-determinants that nobody wants are summed where ∂ of the networks' input will be written.
          T* unused = panel.gradient_of(grad.input);
          std::fill_n(unused, W, T(0));
          if (save == Save::inputs) {
            load_panel(rows(p), D, saved + (k * batch + (first + p) * W) * D, panel.field(at.x));
            fill_record<T>(panel, k, unused);
          } else if (save == Save::nothing) {
            rebuild_record<T>(panel, k, panel.gradient_of(grad.state), unused);
          }
          step_backward(panel, k, i == 0);
        }
        if (target)
          parameter_gradients<T>(flow, k, at, grad, panels, vectors, {records, record}, {gradients, size}, end, *target, turned,
                                 !first_tile);
      }
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W;
        store_panel(rows(p), D, gradients + (p * grad.width + grad.ends[K % 2]) * W, grad_x + row * D);
        store_panel(rows(p), C, gradients + (p * grad.width + grad.context) * W, grad_context + row * C);
      }
    });
  });
  if (copies) reduce<T>(flow, *parameters, own.get(), copies, parallel);
}

}  // namespace glf::GLF_ISA
