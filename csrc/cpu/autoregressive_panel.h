// A panel during one step of a masked autoregressive flow, and the products that its stages ask for.
#pragma once

#include "autoregressive_plan.h"
#include "panel.h"

namespace glf::GLF_ISA {

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
      pick_cell<T>(b->rows, vectors)(C, context, b->depth, in + b->from * W, b->packed, 1, b->rows,
                                     bias ? bias + b->first : nullptr, addend ? addend + b->first * W : nullptr, out + b->first * W);
    }
  }

  void activate_units(Span units, const T* from, T* to) const {
    constexpr idx W = panel_rows<T>;
    activate(flow.activation, flow.activation_constant, units.end - units.begin, vectors * lanes<T>, from + units.begin * W,
             to + units.begin * W, W);
  }
};

}  // namespace glf::GLF_ISA
