// The backward of a masked autoregressive flow. That of the inverse goes through the stages in reverse order: it solves the
// triangular system of the implicit function at the cost of one pass, too.
#pragma once

#include "autoregressive_forward.h"
#include "flow_backward.h"

namespace glf::GLF_ISA {

// The gradients of a panel during one step: offsets in units, as in PanelRecord.
struct PanelGradients {
  Int ends[2];  // ∂ of the step's output and of its input, in turns
  Int y;        // ∂ of the features before (forward) or after (inverse) their transform
  Int shifted;  // of the inverse: the part of ∂y that comes from the affine map
  Int hidden[max_layers];  // ∂ before the activation
  Int raw, context_layer, context;
  Int logdet;
  Int size;

  template <class T>
  static PanelGradients of(const Autoregressive<T>& flow) {
    Int end = 0;
    const auto field = [&end](Int n) { return std::exchange(end, end + n); };
    PanelGradients g{};
    for (Int& e : g.ends) e = field(flow.dim);
    g.y = field(flow.dim);
    g.shifted = flow.inverse ? field(flow.dim) : g.y;
    for (int i = 0; i < flow.hidden(); ++i) g.hidden[i] = field(flow.width[i + 1]);
    g.raw = field(flow.width[flow.layers]);
    if (flow.context_layer) g.context_layer = field(flow.width[1]);
    g.context = field(flow.context_dim);
    g.logdet = field(1);
    g.size = end;
    return g;
  }
};

template <class T>
struct BackwardPanel : Panel<T> {
  const PanelGradients& grad;
  T* gradient;
  idx out;  // which of grad.ends is ∂ of the step's output

  T* gradient_of(Int unit) const { return gradient + unit * panel_rows<T>; }
  T* grad_out() const { return gradient_of(grad.ends[out]); }
  T* grad_x() const { return gradient_of(grad.ends[1 - out]); }
  T* grad_layer(int i) const { return gradient_of(i == this->flow.hidden() ? grad.raw : grad.hidden[i]); }
};

template <class T>
void multiply_by_slopes(const BackwardPanel<T>& panel, Span units, const T* kept, T* g) {
  constexpr idx W = panel_rows<T>;
  activate_backward(panel.flow.activation, panel.flow.activation_constant, units.end - units.begin, panel.vectors * lanes<T>,
                    kept + units.begin * W, W, g + units.begin * W, W);
}

// From ∂raw to ∂ of the hidden layers, as far as the stage's units go.
template <class T>
void stage_backward(const BackwardPanel<T>& panel, const Stage& stage) {
  const Autoregressive<T>& flow = panel.flow;
  const PanelRecord& at = panel.at;
  const bool argument = keeps_argument(flow.activation);
  for (int i = flow.hidden() - 1; i >= 0; --i) {
    T* g = panel.grad_layer(i);
    panel.product(stage.back[i + 1], 0, panel.grad_layer(i + 1), g, nullptr, nullptr);
    if (flow.activated(i))
      multiply_by_slopes(panel, stage.units[i], panel.field(argument ? at.argument[i] : at.value[i]), g);
    if (!flow.in_stream(i) || i + 1 == flow.hidden()) continue;
    const T* stream = panel.grad_layer(i + 2);
    const Span units = stage.units[i];
    for (idx e = units.begin * panel_rows<T>; e < units.end * panel_rows<T>; e += lanes<T>)
      store(g + e, load(g + e) + load(stream + e));
  }
}

// Step k: from ∂ of its output to ∂ of its input and ∂ of all units. The record is full.
template <class T>
void autoregressive_step_backward(const BackwardPanel<T>& panel, idx k, bool of_context, bool first_step) {
  const Autoregressive<T>& flow = panel.flow;
  const PanelRecord& at = panel.at;
  const StepPlan<T>& step = panel.plan.steps[k];
  T *y = panel.gradient_of(panel.grad.y), *shifted = panel.gradient_of(panel.grad.shifted);
  T* raw = panel.grad_layer(flow.hidden());
  const T* logdet = panel.gradient_of(panel.grad.logdet);
  if (flow.inverse) panel.product(step.map_back, 0, panel.grad_out(), shifted, nullptr, nullptr);
  for (auto stage = step.stages.rbegin(); stage != step.stages.rend(); ++stage) {
    const Span features = stage->units[flow.hidden()];
    if (flow.inverse) {
      panel.product(stage->back[0], 0, panel.grad_layer(0), y, nullptr, shifted);
      transform_features_backward(panel, features, panel.field(at.x), panel.field(at.raw), y, logdet, panel.grad_x(), raw);
      stage_backward(panel, *stage);
    } else {
      transform_features_backward(panel, features, panel.field(at.y), panel.field(at.raw), panel.grad_out(), logdet, y, raw);
      stage_backward(panel, *stage);
      panel.product(stage->back[0], 0, panel.grad_layer(0), y, nullptr, y);
    }
  }
  if (!flow.inverse) panel.product(step.map_back, 0, y, panel.grad_x(), nullptr, nullptr);

  T* context = panel.gradient_of(panel.grad.context);
  if (flow.context_layer) {
    T* g = panel.gradient_of(panel.grad.context_layer);
    std::copy_n(panel.grad_layer(0), flow.width[1] * panel_rows<T>, g);
    const bool argument = keeps_argument(flow.activation);
    multiply_by_slopes(panel, {0, flow.width[1]}, panel.field(argument ? at.context_argument : at.context_value), g);
    if (of_context) panel.product(step.context_back[flow.layers], 0, g, context, nullptr, first_step ? nullptr : context);
  }
  bool first = first_step && !flow.context_layer;
  for (int i = 0; of_context && i < flow.layers; ++i) {
    if (!flow.context_rows(i)) continue;
    panel.product(step.context_back[i], 0, panel.grad_layer(i), context, nullptr, first ? nullptr : context);
    first = false;
  }
}

// A field of every panel of a tile.
template <class T>
struct Fields {
  const T* data;
  idx apart;  // elements from one panel to the next
};

// C (M × cols) = or += the sum over panels and rows of A B: A (rows of units), and B (rows of the memory `turned`).
template <class T, int M, int V>
__attribute__((noinline)) void gradient_cell(idx panels, const idx* vectors, Fields<T> a, const T* b, idx b_k, T* c, idx c_m,
                                             idx cols, bool accumulate) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  vec<T> acc[M][V] = {};
  for (idx p = 0; p < panels; ++p)
    microkernel<T, M, V>(vectors[p] * L, a.data + p * a.apart, W, 1, b + p * W * b_k, b_k, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_m + v * L;
      store_part(to, accumulate ? acc[m][v] + load_part(to, cols - v * L) : acc[m][v], cols - v * L);
    }
}

template <class T>
using GradientCell = void (*)(idx, const idx*, Fields<T>, const T*, idx, T*, idx, idx, bool);

template <class T, int V, int... M>
inline GradientCell<T> pick_gradient_cell(idx rows, std::integer_sequence<int, M...>) {
  static constexpr GradientCell<T> table[] = {gradient_cell<T, M + 1, V>...};
  return table[rows - 1];
}

// Gradients of a product: G (inputs, N) = or += the sum over rows of input · g, and with `bias` the sums of sign · g. Input i
// matters to the outputs from `from(i)` on. `turned` is memory for the rows of g.
template <class T, class F>
void weight_gradient(idx panels, const idx* vectors, Fields<T> input, idx inputs, Fields<T> g, idx N, F from, T* G, T* bias,
                     T sign, T* turned, bool accumulate) {
  constexpr idx W = panel_rows<T>, L = lanes<T>, J = 2 * L;
  const idx ld = round_up(N, J);
  for (idx p = 0; p < panels; ++p)
    for (idx m = 0; m < vectors[p] * L; m += L)
      for (idx n = 0; n < ld; n += L) {
        vec<T> square[L];
        for (idx i = 0; i < L; ++i) square[i] = n + i < N ? load(g.data + p * g.apart + (n + i) * W + m) : vec<T>{};
        transpose<T>(square);
        for (idx i = 0; i < L; ++i) store(turned + (p * W + m + i) * ld + n, square[i]);
      }
  if (bias)
    for (idx n = 0; n < N; n += L) {
      vec<T> sum{};
      for (idx p = 0; p < panels; ++p)
        for (idx m = 0; m < vectors[p] * L; ++m) sum += load(turned + (p * W + m) * ld + n);
      sum *= sign;
      store_part(bias + n, accumulate ? sum + load_part(bias + n, N - n) : sum, N - n);
    }
  for (idx i = 0, rows; i < inputs; i += rows) {
    rows = even_rows(inputs - i);
    for (idx j = from(i) / J * J; j < N; j += J) {
      const GradientCell<T> run = N - j > L ? pick_gradient_cell<T, 2>(rows, std::make_integer_sequence<int, MR>{})
                                            : pick_gradient_cell<T, 1>(rows, std::make_integer_sequence<int, MR>{});
      run(panels, vectors, {input.data + i * W, input.apart}, turned + j, ld, G + i * N + j, N, N - j, accumulate);
    }
  }
}

// A gradient's elements that belong to weights which are not read are zero.
template <class T>
void clear_unseen(const Autoregressive<T>& flow, const AutoregressiveGradients<T>& grads) {
  for (idx k = 0; k < flow.steps; ++k)
    for (int i = 0; i < flow.layers; ++i) {
      const idx N = flow.outputs(i), columns = i == flow.hidden() ? flow.columns() : 1, C = flow.context_rows(i);
      const std::int64_t* seen = flow.seen_by(i, k);
      idx n = 0;
      for (idx j = 0; j < flow.width[i]; ++j) {
        while (n < N && seen[n / columns] <= j) ++n;
        std::fill_n(grads.weight[i] + flow.weights_before(i, k) + (C + j) * N, n, T(0));
      }
    }
}

template <class T, class F>
void each_gradient(const Autoregressive<T>& flow, F f) {
  f([](const AutoregressiveGradients<T>& g) { return g.matrix; }, flow.steps * flow.dim * flow.dim);
  f([](const AutoregressiveGradients<T>& g) { return g.offset; }, flow.steps * flow.dim);
  for (int i = 0; i < flow.all_layers(); ++i) {
    f([i](const AutoregressiveGradients<T>& g) { return g.weight[i]; }, flow.weights_before(i, flow.steps));
    f([i](const AutoregressiveGradients<T>& g) { return g.bias[i]; }, flow.biases_before(i, flow.steps));
  }
}

// The gradients of step k's parameters from a tile of panels.
template <class T>
void parameter_gradients(const Autoregressive<T>& flow, idx k, const PanelRecord& at,
                         const PanelGradients& grad, idx panels, const idx* vectors, Fields<T> record, Fields<T> gradient,
                         idx out, Fields<T> context, const AutoregressiveGradients<T>& target, T* turned, bool accumulate) {
  constexpr idx W = panel_rows<T>;
  const idx D = flow.dim;
  const auto value = [&](Int unit) { return Fields<T>{record.data + unit * W, record.apart}; };
  const auto g = [&](Int unit) { return Fields<T>{gradient.data + unit * W, gradient.apart}; };
  const auto zero = [](idx) { return idx{0}; };
  T *matrix = target.matrix + k * D * D, *offset = target.offset + k * D;
  if (flow.inverse) {
    weight_gradient<T>(panels, vectors, value(at.shifted), D, g(grad.ends[out]), D, zero, matrix, nullptr, T(1), turned, accumulate);
    weight_gradient<T>(panels, vectors, {}, 0, g(grad.shifted), D, zero, nullptr, offset, T(-1), turned, accumulate);
  } else {
    weight_gradient<T>(panels, vectors, value(at.x), D, g(grad.y), D, zero, matrix, offset, T(1), turned, accumulate);
  }
  for (int i = 0; i < flow.layers; ++i) {
    const bool last = i == flow.hidden();
    const idx N = flow.outputs(i), C = flow.context_rows(i), columns = last ? flow.columns() : 1;
    const Fields<T> made = g(last ? grad.raw : grad.hidden[i]);
    T *weight = target.weight[i] + flow.weights_before(i, k), *bias = target.bias[i] + flow.biases_before(i, k);
    const std::int64_t* seen = flow.seen_by(i, k);
    const auto from = [=](idx j) { return Plan<T>::first_to_see(j, N, [=](idx n) { return static_cast<idx>(seen[n / columns]); }); };
    weight_gradient<T>(panels, vectors, value(i ? at.value[i - 1] : at.y), flow.width[i], made, N, from, weight + C * N, bias,
                       T(1), turned, accumulate);
    if (C) weight_gradient<T>(panels, vectors, context, C, made, N, zero, weight, nullptr, T(1), turned, accumulate);
  }
  if (flow.context_layer) {
    const int own = flow.layers;
    weight_gradient<T>(panels, vectors, context, flow.context_dim, g(grad.context_layer), flow.width[1], zero,
                       target.weight[own] + flow.weights_before(own, k), target.bias[own] + flow.biases_before(own, k), T(1),
                       turned, accumulate);
  }
}

template <class T>
void autoregressive_backward(const Autoregressive<T>& flow, Int batch, const T* out, const T* context, Save save, const T* saved,
                             const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context,
                             const AutoregressiveGradients<T>* parameters, const Parallel& parallel) {
  if (batch == 0) {
    if (parameters) each_gradient(flow, [&](auto tensor, idx size) { std::fill_n(tensor(*parameters), size, T(0)); });
    return;
  }
  constexpr idx W = panel_rows<T>;
  const Plan<T> plan(flow, {save == Save::inputs, true, grad_context != nullptr});
  const PanelRecord at = PanelRecord::of(flow);
  const PanelGradients grad = PanelGradients::of(flow);
  const idx D = flow.dim, C = flow.context_dim, K = flow.steps, record = at.size * W, size = grad.size * W;
  const PanelTiling tiling(plan.work, batch, size, parallel, T{});
  const idx P = tiling.tile_panels;
  idx widest = D;
  for (int i = 0; i < flow.all_layers(); ++i) widest = std::max(widest, flow.outputs(i));

  // The first thread adds into the result itself, the others into their own copies.
  idx parameter_size = 0;
  each_gradient(flow, [&](auto, idx n) { parameter_size += n; });
  const int copies = parameters ? tiling.threads - 1 : 0;
  const PerThread<T> memory(tiling.threads, {save == Save::records ? 0 : P * record, P * size + P * C * W,
                                             P * W * round_up(widest, NR * lanes<T>), copies ? parameter_size : 0});
  const std::unique_ptr<AutoregressiveGradients<T>[]> own(new AutoregressiveGradients<T>[copies + 1]{});
  for (int i = 0; i < copies; ++i) {
    T* end = memory.get(i + 1, 3);
    const auto take = [&end](Int n) { return std::exchange(end, end + n); };
    own[i].matrix = take(K * D * D);
    own[i].offset = take(K * D);
    for (int j = 0; j < flow.all_layers(); ++j) {
      own[i].weight[j] = take(flow.weights_before(j, K));
      own[i].bias[j] = take(flow.biases_before(j, K));
    }
  }

  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *scratch = memory.get(thread, 0), *gradients = memory.get(thread, 1), *turned = memory.get(thread, 2);
    T* contexts = gradients + P * size;
    const AutoregressiveGradients<T>* target = !parameters ? nullptr : thread == 0 ? parameters : &own[thread - 1];
    tiling.each_tile(thread, [&](idx first, idx panels, bool first_tile) {
      const auto rows = [&](idx p) { return std::min(W, batch - (first + p) * W); };
      idx vectors[most_panels];
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W, n = rows(p);
        vectors[p] = (n + lanes<T> - 1) / lanes<T>;
        load_panel(n, C, context + row * C, contexts + p * C * W);
        T *g = gradients + p * size + grad.ends[0] * W, *g_logdet = gradients + p * size + grad.logdet * W;
        std::fill_n(g, D * W, T(0)), std::fill_n(g_logdet, W, T(0));  // lanes without a row have no gradient
        for (idx m = 0; m < n; ++m) {
          g_logdet[m] = grad_logdet[row + m];
          for (idx d = 0; d < D; ++d)
            g[d * W + m] = grad_out ? grad_out[(row + m) * D + d] : -grad_logdet[row + m] * out[(row + m) * D + d];
        }
      }
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? i : K - 1 - i, end = i % 2;
        const idx place = k * tiling.panels + first;
        // Saved records are full, so nothing below writes to them.
        T* records = save == Save::records ? const_cast<T*>(saved) + place * record : scratch;
        for (idx p = 0; p < panels; ++p) {
          const BackwardPanel<T> panel{{flow, plan, at, static_cast<int>(vectors[p]), contexts + p * C * W, records + p * record},
                                       grad,
                                       gradients + p * size,
                                       end};
          if (save == Save::inputs) {
            std::copy_n(saved + (place + p) * D * W, D * W, panel.field(at.x));
            // The output and its log-derivatives are not needed: they go where the gradients come next.
            T *const to = panel.grad_x(), *const sum = panel.gradient_of(grad.raw);
            run_autoregressive_step<T>(&panel, 1, k, &to, &sum);
          }
          autoregressive_step_backward(panel, k, grad_context != nullptr, i == 0);
        }
        if (target)
          parameter_gradients<T>(flow, k, at, grad, panels, vectors, {records, record}, {gradients, size}, end,
                                 {contexts, C * W}, *target, turned, !first_tile);
      }
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W;
        store_panel(rows(p), D, gradients + p * size + grad.ends[K % 2] * W, grad_x + row * D);
        if (grad_context) store_panel(rows(p), C, gradients + p * size + grad.context * W, grad_context + row * C);
      }
    });
  });
  if (!parameters) return;
  if (copies) reduce<T>(flow, *parameters, own.get(), copies, parallel);
  clear_unseen(flow, *parameters);
}

}  // namespace glf::GLF_ISA
