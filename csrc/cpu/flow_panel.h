// Coupling flows with rows in the lanes of vectors: no lane is empty, however few columns a layer has. With columns in the lanes a
// coupling of 3 columns leaves 5 of 8 lanes empty.
#pragma once

#include "flow_forward.h"
#include "panel.h"

#include <thread>

namespace glf::GLF_ISA {

// to (M units) = bias + addend + w from (K units), with w as in `cell`.
template <class T>
void multiply_units(int vectors, idx M, idx K, const T* w, idx w_m, idx w_k, const T* from, const T* bias, const T* addend,
                    T* to) {
  constexpr idx W = panel_rows<T>;
  for (idx m = 0, rows; m < M; m += rows) {
    rows = even_rows(M - m);
    pick_cell<T>(rows, vectors)(0, nullptr, K, from, w + m * w_m, w_m, w_k, bias ? bias + m : nullptr,
                                addend ? addend + m * W : nullptr, to + m * W);
  }
}

// A panel's place in memory during one step.
template <class T>
struct FlowPanel {
  const Flow<T>& flow;
  const AffineMaps<T>& maps;
  const Record& at;  // of a panel
  idx first, rows;   // the first of its rows in the batch, and how many it has
  const T* context;  // (C, W)
  T* record;
  int vectors = static_cast<int>((rows + lanes<T> - 1) / lanes<T>);  // with rows in them

  T* field(idx unit) const { return record + unit * panel_rows<T>; }
  idx elements() const { return vectors * lanes<T>; }
  Coupling<T> coupling(bool inverse) const {
    return {flow.kind, flow.log_scale, flow.constant, flow.add_first, inverse, flow.spline};
  }
  // u of all transformed features comes before t of all; where there is no u, t stands for it.
  RawUnits raw() const {
    return {0, flow.kind == Kind::affine || flow.kind == Kind::separate ? flow.transformed() : 0, 1};
  }

  // Linear layer i of network n in step k.
  void linear(idx k, int i, int n, const T* from, T* to, const T* addend = nullptr) const {
    multiply_units(vectors, flow.outputs(i), flow.inputs(i), flow.weight[i] + flow.weights_before(i, k, n), 1, flow.outputs(i),
                   from, flow.bias[i] + flow.biases_before(i, k, n), addend, to);
  }
  void activate_units(idx units, const T* from, T* to) const {
    activate(flow.activation, flow.activation_constant, units, elements(), from, to, panel_rows<T>);
  }
  Dropout<T> dropout(idx k, int layer, int n = 0) const { return {flow, first, rows, k, layer, n}; }
};

template <class T>
void copy_units(idx units, const T* from, T* to) {
  std::copy_n(from, units * panel_rows<T>, to);
}

// units ← units + sign · c
template <class T>
void add_offset(const FlowPanel<T>& panel, idx k, T sign, T* units) {
  const idx D = panel.flow.dim;
  const T* c = panel.flow.offset + k * D;
  for (idx d = 0; d < D; ++d)
    each_vector<T>(panel.vectors, 1, [&](idx e) {
      T* at = units + d * panel_rows<T> + e;
      store(at, load(at) + sign * c[d]);
    });
}

// to ← from A_k + c, or from A_kᵀ + c; a null c is 0. With `back` the other matrix is meant, A_k⁻¹.
template <class T>
void multiply_by_map(const FlowPanel<T>& panel, idx k, bool back, bool transposed, const T* from, T* to, const T* c = nullptr) {
  const idx D = panel.flow.dim;
  const Permutations<T>& gathers = back ? panel.maps.unmatrix : panel.maps.matrix;
  if (gathers.apply_to_units(k, transposed, panel.vectors, panel_rows<T>, from, to, c)) return;
  const T* matrix = (back ? panel.flow.unmatrix : panel.flow.matrix) + k * D * D;
  multiply_units<T>(panel.vectors, D, D, matrix, transposed ? D : 1, transposed ? 1 : D, from, c, nullptr, to);
}

// [u, t], or t, = MLPs_k(input), a field of the record.
template <class T>
void run_mlp(const FlowPanel<T>& panel, idx k, idx input) {
  const Flow<T>& flow = panel.flow;
  const Record& at = panel.at;
  for (int n = 0; n < flow.networks; ++n)
    for (int i = 0; i < flow.layers; ++i) {
      const bool last = i + 1 == flow.layers;
      const idx mine = last ? n * flow.outputs(i) : n * at.hidden[i];
      T* out = panel.field((last ? at.raw : at.argument[i]) + mine);
      panel.linear(k, i, n, panel.field(i ? at.value[i - 1] + n * at.hidden[i - 1] : input), out);
      if (last) continue;
      panel.activate_units(flow.outputs(i), out, panel.field(at.value[i] + mine));
      panel.dropout(k, i, n).apply_to_units(flow.outputs(i), panel.vectors, panel.field(at.value[i] + mine));
    }
}

// The same of a residual network, whose input ends with the context.
template <class T>
void run_residual(const FlowPanel<T>& panel, idx k, idx input) {
  const Flow<T>& flow = panel.flow;
  const Record& at = panel.at;
  const idx H = flow.outputs(0);
  const int blocks = flow.blocks();
  panel.linear(k, 0, 0, panel.field(input), panel.field(at.block[0].h));
  for (int j = 0; j < blocks; ++j) {
    const ResidualBlock& b = at.block[j];
    const BlockLayers layer = BlockLayers::of(flow, j);
    const T* h = panel.field(b.h);
    T* next = panel.field(at.block[j + 1].h);
    panel.activate_units(H, h, panel.field(b.h_value));
    panel.linear(k, layer.first, 0, panel.field(b.h_value), panel.field(b.argument));
    panel.activate_units(H, panel.field(b.argument), panel.field(b.value));
    panel.dropout(k, j).apply_to_units(H, panel.vectors, panel.field(b.value));
    if (!flow.context_dim) {
      panel.linear(k, layer.second, 0, panel.field(b.value), next, h);
      continue;
    }
    T *gate = panel.field(b.gate), *branch = panel.field(b.branch);
    panel.linear(k, layer.gate, 0, panel.field(input + flow.passive()), gate);
    panel.linear(k, layer.second, 0, panel.field(b.value), branch);
    each_vector<T>(panel.vectors, H, [=](idx e) {
      const vec<T> s = sigmoid<T>(load(gate + e));
      store(gate + e, s);
      store(next + e, load(h + e) + load(branch + e) * s);
    });
  }
  panel.linear(k, flow.layers - 1, 0, panel.field(at.block[blocks].h), panel.field(at.raw));
}

// [u, t], or t, = network_k([p, context]), with p in a field of the record.
template <class T>
void run_network(const FlowPanel<T>& panel, idx k, idx p) {
  const Flow<T>& flow = panel.flow;
  idx input = p;
  if (flow.context_dim) {
    input = panel.at.input;
    copy_units(flow.passive(), panel.field(p), panel.field(input));
    copy_units(flow.context_dim, panel.context, panel.field(input + flow.passive()));
  }
  if (flow.network == Network::residual)
    run_residual(panel, k, input);
  else
    run_mlp(panel, k, input);
}

// Couple v into out, both of transformed features, and logdet (W) += its log-derivatives.
template <class T>
void run_coupling(const FlowPanel<T>& panel, bool inverse, const T* v, T* out, T* logdet) {
  transform_units(panel.coupling(inverse), panel.vectors, {0, panel.flow.transformed()}, panel.raw(), v,
                  panel.field(panel.at.raw), out, logdet);
}

// From the step's input x to all other fields of the record; the inverse's log-determinant falls out here.
template <class T>
void fill_record(const FlowPanel<T>& panel, idx k, T* logdet) {
  const Flow<T>& flow = panel.flow;
  const idx P = flow.passive();
  T *x = panel.field(panel.at.x), *y = panel.field(panel.at.y);
  if (!flow.inverse) {
    multiply_by_map(panel, k, false, false, x, y, flow.offset + k * flow.dim);
    run_network(panel, k, panel.at.y);
  } else {
    run_network(panel, k, panel.at.x);
    copy_units(P, x, y);
    run_coupling(panel, true, panel.field(panel.at.x + P), panel.field(panel.at.y + P), logdet);
    add_offset(panel, k, T(-1), y);
  }
}

// One step in the flow's direction: from x, given in the record, to the step's output (D units).
template <class T>
void run_step(const FlowPanel<T>& panel, idx k, T* out, T* logdet) {
  const idx P = panel.flow.passive();
  const T* y = panel.field(panel.at.y);
  fill_record(panel, k, logdet);
  if (!panel.flow.inverse) {
    copy_units(P, y, out);
    run_coupling(panel, false, panel.field(panel.at.y + P), out + P * panel_rows<T>, logdet);
  } else {
    multiply_by_map(panel, k, false, false, y, out);
  }
}

// logdet (W) += log N(z; 0, I)
template <class T>
void add_panel_density(int vectors, idx D, const T* z, T* logdet) {
  each_vector<T>(vectors, 1, [=](idx e) {
    vec<T> squares{};
    for (idx d = 0; d < D; ++d) {
      const vec<T> v = load(z + d * panel_rows<T> + e);
      squares += v * v;
    }
    store(logdet + e, load(logdet + e) - (T(0.5) * squares + T(D) * T(0.91893853320467274178)));  // D/2 log 2π
  });
}

// Multiply-adds of a row.
template <class T>
idx work_of(const Flow<T>& flow) {
  idx work = flow.dim * flow.dim;
  for (int i = 0; i < flow.layers; ++i) work += flow.networks * flow.inputs(i) * flow.outputs(i);
  return work * flow.steps;
}

// Whether a pass over so many rows goes by panels, which nothing but shapes and the processor decides: a backward reads what its
// forward has kept. On one thread panels train 1.1 to 2.4 times as fast as rows (H 16 to 384, D 2 to 64, 16 to 512 rows, Zen 3), but
// * each panel reads all weights, so the L2 cache must hold a layer's;
// * a tile must have several panels, over which gradients of weights are summed before they go to memory: with 373 columns and two
//   layers of 256 units a tile had one, and a training step took 1.7 times as long as by rows;
// * each panel has the context beside its record: at C = 2,000 a pass takes 1.5 times as long as by rows, from 512 on as long;
// * few rows are few panels: with 16 threads 32 rows take twice as long as by rows, and 128 rows less long;
// * a record has room for so many rows, and panels have lanes without one.
template <class T>
bool by_panels(const Flow<T>& flow, idx batch) {
  constexpr idx W = panel_rows<T>, most = (idx{640} << 10) / sizeof(T), most_units = 1280;
  static const idx processors = std::max(1u, std::thread::hardware_concurrency());
  if (flow.dim * flow.dim > most || flow.context_dim > 512) return false;
  for (int i = 0; i < flow.layers; ++i)
    if (flow.inputs(i) * flow.outputs(i) > most) return false;
  const idx units = Record::of_panel(flow).width;
  if (units > most_units) return false;
  const idx rows = round_up(batch, W), by_rows = std::min({processors, work_of(flow) * batch >> 19, (batch + MR - 1) / MR});
  return by_rows <= 2 * rows / W && rows * units <= batch * Record::of(flow).width;
}

template <class T>
void forward_by_panels(const Flow<T>& flow, Int batch, const T* x, const T* context, T* out, T* logdet, Save save, T* saved,
                       Int record_width, const Parallel& parallel) {
  constexpr idx W = panel_rows<T>;
  const Record at = Record::of_panel(flow);
  const AffineMaps<T> maps(flow, batch);
  const idx D = flow.dim, C = flow.context_dim, K = flow.steps, size = at.width * W;
  const PanelTiling tiling(work_of(flow), batch, size + (D + C) * W, parallel, T{});
  const idx P = tiling.tile_panels;
  const PerThread<T> memory(tiling.threads, {size, P * D * W, P * C * W, P * W});
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *scratch = memory.get(thread, 0), *states = memory.get(thread, 1), *contexts = memory.get(thread, 2),
      *logdets = memory.get(thread, 3);
    tiling.each_tile(thread, [&](idx first, idx panels, bool) {
      const auto rows = [&](idx p) { return std::min(W, batch - (first + p) * W); };
      std::fill_n(logdets, panels * W, T(0));
      for (idx p = 0; p < panels; ++p) {
        load_panel(rows(p), D, x + (first + p) * W * D, states + p * D * W);
        load_panel(rows(p), C, context + (first + p) * W * C, contexts + p * C * W);
      }
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? K - 1 - i : i;
        for (idx p = 0; p < panels; ++p) {
          const idx row = (first + p) * W;
          T *state = states + p * D * W, *sums = logdets + p * W;
          T* record = save == Save::records ? saved + k * batch * record_width + (first + p) * size : scratch;
          const FlowPanel<T> panel{flow, maps, at, row, rows(p), contexts + p * C * W, record};
          copy_units(D, state, panel.field(at.x));
          if (save == Save::inputs) store_panel(rows(p), D, state, saved + (k * batch + row) * D);
          run_step(panel, k, state, sums);
        }
      }
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W;
        if (flow.density) add_panel_density(NV, D, states + p * D * W, logdets + p * W);
        store_panel(rows(p), D, states + p * D * W, out + row * D);
        std::copy_n(logdets + p * W, rows(p), logdet + row);
      }
    });
  });
}

}  // namespace glf::GLF_ISA
