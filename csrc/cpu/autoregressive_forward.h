// Panels through the steps of a masked autoregressive flow, in either direction, at the cost of one pass of the networks.
#pragma once

#include "autoregressive_panel.h"
#include "flow_forward.h"

namespace glf::GLF_ISA {

// Hidden layer i, as far as the stage's units go.
template <class T>
void run_layer(const Panel<T>& panel, idx k, const Stage& stage, int i) {
  const Autoregressive<T>& flow = panel.flow;
  const PanelRecord& at = panel.at;
  const bool last = i == flow.hidden();
  const T* in = panel.field(i ? at.value[i - 1] : at.y);
  const T* addend = nullptr;
  if (i == 0 && flow.context_layer) addend = panel.field(at.context_value);
  if (i >= 2 && flow.in_stream(i)) addend = panel.field(at.argument[i - 2]);
  T* out = panel.field(last ? at.raw : at.argument[i]);
  panel.product(stage.blocks[i], flow.context_rows(i), in, out, flow.bias[i] + flow.biases_before(i, k), addend);
  if (!last && flow.activated(i)) panel.activate_units(stage.units[i], out, panel.field(at.value[i]));
}

// What comes before the stages: the affine map (forward), and the context's own layer.
template <class T>
void begin_step(const Panel<T>& panel, idx k) {
  const Autoregressive<T>& flow = panel.flow;
  const PanelRecord& at = panel.at;
  const StepPlan<T>& step = panel.plan.steps[k];
  if (!flow.inverse)
    panel.product(step.map, 0, panel.field(at.x), panel.field(at.y), flow.offset + k * flow.dim, nullptr);
  if (!flow.context_layer) return;
  const int own = flow.layers;
  panel.product(step.context_layer, 0, panel.context, panel.field(at.context_argument),
                flow.bias[own] + flow.biases_before(own, k), nullptr);
  panel.activate_units({0, flow.width[1]}, panel.field(at.context_argument), panel.field(at.context_value));
}

template <class T>
void run_stage(const Panel<T>& panel, idx k, const Stage& stage, T* out, T* logdet) {
  const Autoregressive<T>& flow = panel.flow;
  const PanelRecord& at = panel.at;
  for (int i = 0; i < flow.layers; ++i) run_layer(panel, k, stage, i);
  transform_units(panel.transform(), panel.vectors, stage.units[flow.hidden()], side_by_side,
                  panel.field(flow.inverse ? at.x : at.y), panel.field(at.raw), flow.inverse ? panel.field(at.y) : out, logdet);
}

// The affine map of the inverse.
template <class T>
void end_step(const Panel<T>& panel, idx k, T* out) {
  constexpr idx W = panel_rows<T>;
  const Autoregressive<T>& flow = panel.flow;
  const T *offset = flow.offset + k * flow.dim, *y = panel.field(panel.at.y);
  T* shifted = panel.field(panel.at.shifted);
  for (idx d = 0; d < flow.dim; ++d)
    for (idx m = d * W; m < (d + 1) * W; m += lanes<T>) store(shifted + m, load(y + m) - offset[d]);
  panel.product(panel.plan.steps[k].map, 0, shifted, out, nullptr, nullptr);
}

// Panels from the step's input x to the rest of their records and to its output. Those of an inverse take turns: each of its
// stages is a chain in which the next operation waits for the last one (11 % at D 10, H 50, AVX2).
template <class T>
void run_autoregressive_step(const Panel<T>* panels, idx count, idx k, T* const* out, T* const* logdet) {
  for (idx p = 0; p < count; ++p) begin_step(panels[p], k);
  for (const Stage& stage : panels[0].plan.steps[k].stages)
    for (idx p = 0; p < count; ++p) run_stage(panels[p], k, stage, out[p], logdet[p]);
  for (idx p = 0; p < count && panels[0].flow.inverse; ++p) end_step(panels[p], k, out[p]);
}

template <class T>
void autoregressive(const Autoregressive<T>& flow, Int batch, const T* x, const T* context, T* out, T* logdet, Save save,
                    T* saved, const Parallel& parallel) {
  if (batch == 0) return;
  constexpr idx W = panel_rows<T>;
  const Plan<T> plan(flow, {true, false, false});
  const PanelRecord at = PanelRecord::of(flow);
  const idx D = flow.dim, C = flow.context_dim, K = flow.steps, record = at.size * W;
  const PanelTiling tiling(plan.work, batch, record + (D + C) * W, parallel, T{});
  const idx P = tiling.tile_panels;
  const PerThread<T> memory(tiling.threads, {P * record, P * D * W, P * C * W, P * W});
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *scratch = memory.get(thread, 0), *ends = memory.get(thread, 1), *contexts = memory.get(thread, 2),
      *logdets = memory.get(thread, 3);
    tiling.each_tile(thread, [&](idx first, idx panels, bool) {
      const auto rows = [&](idx p) { return std::min(W, batch - (first + p) * W); };
      for (idx p = 0; p < panels; ++p) {
        load_panel(rows(p), D, x + (first + p) * W * D, ends + p * D * W);
        load_panel(rows(p), C, context + (first + p) * W * C, contexts + p * C * W);
      }
      std::fill_n(logdets, panels * W, T(0));
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? K - 1 - i : i;
        const auto panel_of = [&](idx p) {
          T* here = save == Save::records ? saved + (k * tiling.panels + first + p) * record : scratch + p * record;
          return Panel<T>{flow, plan, at, static_cast<int>((rows(p) + lanes<T> - 1) / lanes<T>), contexts + p * C * W, here};
        };
        for (idx p = 0; p < panels; p += 2) {
          const idx other = std::min(p + 1, panels - 1), count = other - p + 1;
          const Panel<T> pair[] = {panel_of(p), panel_of(other)};
          T *const end[] = {ends + p * D * W, ends + other * D * W}, *const sums[] = {logdets + p * W, logdets + other * W};
          for (idx q = 0; q < count; ++q) {
            std::copy_n(end[q], D * W, pair[q].field(at.x));
            if (save == Save::inputs) std::copy_n(end[q], D * W, saved + (k * tiling.panels + first + p + q) * D * W);
          }
          run_autoregressive_step(pair, count, k, end, sums);
        }
      }
      for (idx p = 0; p < panels; ++p) {
        const idx row = (first + p) * W;
        store_panel(rows(p), D, ends + p * D * W, out + row * D);
        std::copy_n(logdets + p * W, rows(p), logdet + row);
        if (flow.density) add_density<T>(rows(p), D, out + row * D, logdet + row);
      }
    });
  });
}

}  // namespace glf::GLF_ISA
