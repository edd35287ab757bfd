// The backward of a flow: a tile of rows through the steps in reverse order: step_backward
// is one step, couple_rows_backward its elementwise part.
#pragma once

#include "flow_forward.h"

namespace glf::GLF_ISA {

// From ∂[u, t] to ∂[p, context] and the gradients of step k's networks.
template <class T>
void network_backward(const BackwardTile<T>& tile, idx k) {
  if (tile.flow.network == Network::residual)
    residual_backward(tile, k);
  else
    mlp_backward(tile, k);
}

// From ∂ of the transformed output to ∂[u, t] and ∂ of the transformed input.
template <class T>
void coupling_backward(const BackwardTile<T>& tile, idx v, idx from, idx to, const T* grad_logdet) {
  const idx n = tile.flow.transformed(), P = tile.flow.passive();
  const Rows<T> g = tile.gradient_of(from + P);
  const idx shift = tile.shift() - tile.at.raw;
  couple_rows_backward<T>(tile.coupling(tile.flow.inverse), tile.rows, n, tile.read(v + P), tile.read(tile.at.raw),
                          tile.read(tile.shift()), {g.data, g.ld}, grad_logdet, tile.gradient_of(to + P),
                          tile.gradient_of(tile.grad.raw), tile.gradient_of(tile.grad.raw + shift));
}

// The passive columns pass through and enter the network: their gradient is the sum. The context's gathers over the steps.
template <class T>
void add_input_gradient(const BackwardTile<T>& tile, idx from, idx to, T* grad_context, bool first_step) {
  const idx P = tile.flow.passive(), C = tile.flow.context_dim;
  for (idx m = 0; m < tile.rows; ++m) {
    const T* input = tile.gradient_of(tile.grad.input)[m];
    const T* g = tile.gradient_of(from)[m];
    T* sum = tile.gradient_of(to)[m];
    for (idx j = 0; j < P; ++j) sum[j] = g[j] + input[j];
    T* context = grad_context + m * C;
    for (idx j = 0; j < C; ++j) context[j] = first_step ? input[P + j] : context[j] + input[P + j];
  }
}

// Step k: grad.out goes from ∂ of the step's output to ∂ of its input. The record is full.
template <class T>
void step_backward(const BackwardTile<T>& tile, idx k, const T* grad_logdet, T* grad_context, bool first_step) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const GradientRecord& grad = tile.grad;
  const idx D = flow.dim;
  const auto affine_parameters = [&](idx left, idx right, T sign) {  // when grad.out and grad.y are both there
    if (!tile.parameters) return;
    if (tile.parameters->matrix) map_gradient(tile, k, left, right, grad.out);
    column_sum(tile.rows, D, sign, tile.gradient + grad.y, grad.width, tile.parameters->offset + k * D,
               tile.accumulate);
  };
  if (!flow.inverse) {
    coupling_backward(tile, at.y, grad.out, grad.y, grad_logdet);
    network_backward(tile, k);
    add_input_gradient(tile, grad.out, grad.y, grad_context, first_step);
    multiply_by_map<T>(tile, k, false, true, tile.gradient + grad.y, grad.width, tile.gradient + grad.out, grad.width);
    affine_parameters(at.x, grad.y, T(1));
  } else {
    multiply_by_map<T>(tile, k, false, true, tile.gradient + grad.out, grad.width, tile.gradient + grad.y, grad.width);
    affine_parameters(at.y, grad.out, T(-1));
    coupling_backward(tile, at.x, grad.y, grad.out, grad_logdet);
    network_backward(tile, k);
    add_input_gradient(tile, grad.y, grad.out, grad_context, first_step);
  }
}

// Fills step k's record from the step's output, which grad.state holds and which becomes the step's input.
template <class T>
void rebuild_record(const BackwardTile<T>& tile, idx k) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const idx D = flow.dim, P = flow.passive(), ld = tile.grad.width;
  const Rows<T> state = tile.gradient_of(tile.grad.state);
  if (!flow.inverse) {
    copy_rows<T>(tile.rows, P, state.data, ld, tile.record + at.y, at.width);
    run_network(tile, k, at.y);
    run_coupling<T>(tile, true, {state.data + P, ld}, tile.field(at.y + P), nullptr, false);
    add_offset<T>(tile, k, T(-1), tile.read(at.y), state);
    multiply_by_map<T>(tile, k, true, false, state.data, ld, tile.record + at.x, at.width);
  } else {
    multiply_by_map<T>(tile, k, true, false, state.data, ld, tile.record + at.y, at.width, flow.offset + k * D);
    copy_rows<T>(tile.rows, P, tile.record + at.y, at.width, tile.record + at.x, at.width);
    run_network(tile, k, at.x);
    run_coupling<T>(tile, false, tile.read(at.y + P), tile.field(at.x + P), nullptr, false);
    add_offset<T>(tile, k, T(-1), tile.read(at.y), tile.field(at.y));
  }
  copy_rows<T>(tile.rows, D, tile.record + at.x, at.width, state.data, ld);
}

// Calls f(tensor, its elements) for all gradients: `tensor` picks the member out of any Gradients.
template <class T, class F>
void each_gradient(const Flow<T>& flow, F f) {
  f([](const Gradients<T>& g) { return g.matrix; }, flow.steps * flow.dim * flow.dim);
  f([](const Gradients<T>& g) { return g.offset; }, flow.steps * flow.dim);
  for (int i = 0; i < flow.layers; ++i) {
    f([i](const Gradients<T>& g) { return g.weight[i]; }, flow.weights_before(i, flow.steps, 0));
    f([i](const Gradients<T>& g) { return g.bias[i]; }, flow.biases_before(i, flow.steps, 0));
  }
}

// total += parts, in the order of the threads, so that the sum is the same every time.
template <class T, class F, class G>
void reduce(const F& flow, const G& total, const G* parts, int n, const Parallel& parallel) {
  in_parallel(parallel, n + 1, [&](int thread) {
    each_gradient(flow, [&](auto tensor, idx size) {
      const idx chunk = round_up((size + n) / (n + 1), 16);
      const idx begin = std::min(size, thread * chunk), end = std::min(size, begin + chunk);
      T* sum = tensor(total);
      for (int i = 0; sum && i < n; ++i) {
        const T* part = tensor(parts[i]);
        for (idx j = begin; j < end; ++j) sum[j] += part[j];
      }
    });
  });
}

template <class T>
Gradients<T> carve(const Flow<T>& flow, bool of_matrix, T* memory) {
  Gradients<T> g{};
  const auto take = [&memory](Int n) { return std::exchange(memory, memory + n); };
  g.matrix = of_matrix ? take(flow.steps * flow.dim * flow.dim) : nullptr;
  g.offset = take(flow.steps * flow.dim);
  for (int i = 0; i < flow.layers; ++i) {
    g.weight[i] = take(flow.weights_before(i, flow.steps, 0));
    g.bias[i] = take(flow.biases_before(i, flow.steps, 0));
  }
  return g;
}

template <class T>
void backward(const Flow<T>& flow, Int batch, const T* out, const T* context, Save save, const T* saved,
              Int record_width, const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context,
              const Gradients<T>* parameters, const Parallel& parallel) {
  if (batch == 0) {
    if (parameters)
      each_gradient(flow, [&](auto tensor, idx size) {
        if (T* of = tensor(*parameters)) std::fill_n(of, size, T(0));
      });
    return;
  }
  const Record at = Record::of(flow);
  const GradientRecord grad = GradientRecord::of(flow);
  const Tiling tiling(flow, at, batch, parallel);
  const idx D = flow.dim, K = flow.steps, C = flow.context_dim;

  // The first thread adds into the result itself, the others into their own copies.
  idx size = 0;
  if (parameters) each_gradient(flow, [&](auto tensor, idx n) { size += tensor(*parameters) ? n : 0; });
  const int copies = parameters ? tiling.threads - 1 : 0;
  const PerThread<T> scratch(tiling.threads, {panel_size(flow), save == Save::records ? 0 : tiling.tile_rows * at.width,
                                              tiling.tile_rows * grad.width, copies ? size : 0});
  const std::unique_ptr<Gradients<T>[]> own(new Gradients<T>[copies + 1]);
  for (int i = 0; i < copies; ++i) own[i] = carve(flow, parameters->matrix, scratch.get(i + 1, 3));

  const Parallel* team = tiling.wide ? &tiling.team : nullptr;
  const AffineMaps<T> maps(flow, batch);
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *panel = scratch.get(thread, 0), *room = scratch.get(thread, 1), *gradient = scratch.get(thread, 2);
    const Gradients<T>* target = !parameters ? nullptr : thread == 0 ? parameters : &own[thread - 1];
    tiling.each_tile(thread, batch, [&](idx first, idx rows, bool first_tile) {
      if (grad_out) {
        copy_rows(rows, D, grad_out + first * D, D, gradient + grad.out, grad.width);
      } else {
        for (idx m = 0; m < rows; ++m)
          for (idx j = 0; j < D; ++j)
            gradient[grad.out + m * grad.width + j] = -grad_logdet[first + m] * out[(first + m) * D + j];
      }
      if (save == Save::nothing) copy_rows(rows, D, out + first * D, D, gradient + grad.state, grad.width);
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? i : K - 1 - i;
        // Saved records are full, so nothing below writes to them.
        T* record = save == Save::records ? const_cast<T*>(saved) + (k * batch + first) * record_width : room;
        const BackwardTile<T> tile{{flow, maps, at, rows, context + first * C, record, panel, team, first},
                                   grad,
                                   gradient,
                                   target,
                                   !first_tile};
        if (save == Save::inputs) {
          copy_rows(rows, D, saved + (k * batch + first) * D, D, record + at.x, at.width);
          fill_record<T>(tile, k, nullptr, false);
        } else if (save == Save::nothing) {
          rebuild_record(tile, k);
        }
        step_backward(tile, k, grad_logdet + first, grad_context + first * C, i == 0);
      }
      copy_rows<T>(rows, D, gradient + grad.out, grad.width, grad_x + first * D, D);
    });
  });
  if (copies) reduce<T>(flow, *parameters, own.get(), copies, parallel);
}

}  // namespace glf::GLF_ISA
