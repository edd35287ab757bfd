// A panel: as many rows as lie in the lanes of two vectors, and what each step makes of them, one unit after the other.
#pragma once

#include "autoregressive_plan.h"
#include "coupling.h"
#include "flow_forward.h"

namespace glf::GLF_ISA {

inline constexpr int NV = 2;  // vectors of a panel
template <class T>
inline constexpr idx panel_rows = NV * lanes<T>;

// out (rows, W) = bias + addend + packedᵀ [context, in], of `rows` units.
template <class T, int M, int V>
__attribute__((noinline)) void cell(idx C, const T* context, idx depth, const T* in, const T* packed, const T* bias,
                                    const T* addend, T* out) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const vec<T> start = bias ? broadcast(bias[m]) : vec<T>{};
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = addend ? start + load(addend + m * W + v * L) : start;
  }
  // One loop for both: with two of them the accumulators went to memory and back between.
  for (int part = C ? 0 : 1; part < 2; ++part)
    microkernel<T, M, V>(part ? depth : C, packed + part * C * M, 1, M, part ? in : context, W, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + m * W + v * L, acc[m][v]);
}

template <class T>
using Cell = void (*)(idx, const T*, idx, const T*, const T*, const T*, const T*, T*);

template <class T, int V, int... M>
inline Cell<T> pick_cell(idx rows, std::integer_sequence<int, M...>) {
  static constexpr Cell<T> table[] = {cell<T, M + 1, V>...};
  return table[rows - 1];
}

// A panel's place in memory during one step.
template <class T>
struct Panel {
  const Autoregressive<T>& flow;
  const Plan<T>& plan;
  const PanelRecord& at;
  int vectors;       // with rows in them
  const T* context;  // (C, W)
  T* record;

  T* field(Int unit) const { return record + unit * panel_rows<T>; }

  // The units of `blocks`: C context rows and `in` to `out`, plus `addend` if not null.
  void product(Span blocks, idx C, const T* in, T* out, const T* bias, const T* addend) const {
    constexpr idx W = panel_rows<T>;
    for (const UnitBlock<T>* b = plan.begin(blocks); b != plan.end(blocks); ++b) {
      const Cell<T> run = vectors == 1 ? pick_cell<T, 1>(b->rows, std::make_integer_sequence<int, MR>{})
                                       : pick_cell<T, NV>(b->rows, std::make_integer_sequence<int, MR>{});
      run(C, context, b->depth, in + b->from * W, b->packed, bias ? bias + b->first : nullptr,
          addend ? addend + b->first * W : nullptr, out + b->first * W);
    }
  }

  void activate_units(Span units, const T* from, T* to) const {
    constexpr idx W = panel_rows<T>;
    activate(flow.activation, flow.activation_constant, units.end - units.begin, vectors * lanes<T>, from + units.begin * W,
             to + units.begin * W, W);
  }
};

// x (rows, n) ↔ units (n, W). Lanes without a row repeat the last one, so that what they compute is as finite as a row.
template <class T>
void load_panel(idx rows, idx n, const T* x, T* units) {
  constexpr idx W = panel_rows<T>;
  const idx used = round_up(rows, lanes<T>);
  for (idx m = 0; m < used; ++m) {
    const T* row = x + std::min(m, rows - 1) * n;
    for (idx j = 0; j < n; ++j) units[j * W + m] = row[j];
  }
}

template <class T>
void store_panel(idx rows, idx n, const T* units, T* x) {
  for (idx m = 0; m < rows; ++m)
    for (idx j = 0; j < n; ++j) x[m * n + j] = units[j * panel_rows<T> + m];
}

// out ← the transform of features v, and logdet (W) += its log-derivatives.
template <class T>
void transform_features(const Panel<T>& panel, Span features, const T* v, const T* raw, T* out, T* logdet) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  const Autoregressive<T>& flow = panel.flow;
  const idx n = flow.columns(), used = panel.vectors * L;
  if (flow.kind == Kind::spline) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        Parameters<T> parameters;
        for (idx j = 0; j < n; ++j) parameters[j] = load(raw + (d * n + j) * W + m);
        const Splined<T> found = spline_lanes<T>(flow.spline, parameters, load(v + d * W + m), flow.inverse);
        store(out + d * W + m, found.out);
        store(logdet + m, load(logdet + m) + found.ell);
      }
    return;
  }
  const Coupling<T> op{Kind::affine, flow.log_scale, flow.constant, false, flow.inverse, {}};
  with_log_scale(flow.log_scale, [&](auto scale) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        const T* u = raw + d * n * W + m;
        const Coupled<T> found = Affine<decltype(scale)::value>::forward(op, load(v + d * W + m), load(u), load(u + W));
        store(out + d * W + m, found.out);
        store(logdet + m, load(logdet + m) + found.ell);
      }
  });
}

// From ∂out and ∂logdet to ∂v and ∂raw; v as in transform_features.
template <class T>
void transform_features_backward(const Panel<T>& panel, Span features, const T* v, const T* raw, const T* g_out,
                                 const T* g_logdet, T* g_v, T* g_raw) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  const Autoregressive<T>& flow = panel.flow;
  const idx n = flow.columns(), used = panel.vectors * L;
  if (flow.kind == Kind::spline) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        Parameters<T> parameters, grad;
        for (idx j = 0; j < n; ++j) parameters[j] = load(raw + (d * n + j) * W + m);
        store(g_v + d * W + m, spline_lanes_backward<T>(flow.spline, parameters, load(v + d * W + m), flow.inverse,
                                                        load(g_out + d * W + m), load(g_logdet + m), grad));
        for (idx j = 0; j < n; ++j) store(g_raw + (d * n + j) * W + m, grad[j]);
      }
    return;
  }
  const Coupling<T> op{Kind::affine, flow.log_scale, flow.constant, false, flow.inverse, {}};
  with_log_scale(flow.log_scale, [&](auto scale) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        const idx u = d * n * W + m, at = d * W + m;
        const CouplingGradients<T> found = Affine<decltype(scale)::value>::template backward<T>(
            op, load(v + at), load(raw + u), load(raw + u + W), load(g_out + at), load(g_logdet + m));
        store(g_v + at, found.v);
        store(g_raw + u, found.u);
        store(g_raw + u + W, found.t);
      }
  });
}

}  // namespace glf::GLF_ISA
