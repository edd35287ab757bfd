// A panel during one step of a masked autoregressive flow, and the products that its stages ask for.
#pragma once

#include "autoregressive_plan.h"
#include "panel.h"

namespace glf::GLF_ISA {

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

// An affine transform has u and t of a feature next to each other.
inline constexpr RawUnits side_by_side{0, 1, 2};

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
  Coupling<T> transform() const { return {flow.kind, flow.log_scale, flow.constant, false, flow.inverse, flow.spline}; }

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

}  // namespace glf::GLF_ISA
