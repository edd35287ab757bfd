// A call's plan: in which order units and features are computed, and the weights that each of them needs, packed.
#pragma once

#include "autoregressive.h"
#include "panel.h"

namespace glf::GLF_ISA {

// Up to MR units: their weights are packed input by input, those of the context first. The inputs are `depth` units of a
// field from unit `from` on.
template <class T>
struct UnitBlock {
  idx first, rows, from, depth;
  const T* packed;
};

// Units and features that become known at once: all of them where x is known (forward), and where x is found one after
// the other (inverse) those that the features before determine.
struct Stage {
  Span units[max_layers];   // of each hidden layer; the last one's entry is that of the features
  Span blocks[max_layers];  // of each layer
  Span back[max_layers];    // of the units and features that enter each layer
};

template <class T>
struct StepPlan {
  std::vector<Stage> stages;
  Span map, map_back;
  Span context_layer;              // of the context's own layer
  Span context_back[max_layers + 1];  // ∂context from each layer that it enters
};

// What a pass multiplies by: the weights, as the forward does, their transposes, and of these those of the context's rows.
struct Needs {
  bool forward, backward, context;
};

template <class T>
class Plan {
 public:
  std::vector<StepPlan<T>> steps;
  idx work = 0;  // multiply-adds of a row

  Plan(const Autoregressive<T>& flow, Needs needs) : flow_(flow), memory_(room(flow, needs)), end_(memory_.get()) {
    steps.resize(flow.steps);
    for (idx k = 0; k < flow.steps; ++k) {
      StepPlan<T>& step = steps[k];
      const idx D = flow.dim;
      const auto all = [D](idx) { return D; };
      const T* matrix = flow.matrix + k * D * D;
      if (needs.forward) step.map = pack(matrix, D, 0, {0, D}, all);
      if (needs.backward) step.map_back = pack_back(matrix, D, 0, D, {0, D}, all);
      if (flow.context_layer) {
        const T* weight = flow.weight[flow.layers] + flow.weights_before(flow.layers, k);
        const idx C = flow.context_dim, H = flow.width[1];
        if (needs.forward) step.context_layer = pack(weight, H, 0, {0, H}, [C](idx) { return C; });
        if (needs.context) step.context_back[flow.layers] = pack_back(weight, H, 0, H, {0, C}, [C](idx) { return C; });
      }
      for (int i = 0; i < flow.layers; ++i) {  // of each output of a layer: how many inputs it sees
        const idx columns = i == flow.hidden() ? flow.columns() : 1;
        sees_[i].resize(flow.outputs(i));
        for (idx n = 0; n < flow.outputs(i); ++n) sees_[i][n] = flow.seen_by(i, k)[n / columns];
      }
      step.stages = schedule(k);
      for (Stage& stage : step.stages) pack_stage(stage, k, needs);
      for (int i = 0; needs.context && i < flow.layers; ++i) {
        const idx C = flow.context_rows(i);
        step.context_back[i] = pack_back(weight(i, k), flow.outputs(i), 0, flow.outputs(i), {0, C}, [C](idx) { return C; });
      }
    }
    for (const UnitBlock<T>& b : blocks_) work += b.rows * b.depth;
    if (needs.backward && !needs.forward) work *= 2;  // the weights' gradients
  }

  const UnitBlock<T>* begin(Span s) const { return blocks_.data() + s.begin; }
  const UnitBlock<T>* end(Span s) const { return blocks_.data() + s.end; }

  // The first of a layer's outputs that sees input i.
  template <class F>
  static idx first_to_see(idx i, idx outputs, F fan_in) {
    idx low = 0;
    for (idx n = outputs; n > 0;) {
      const idx half = n / 2;
      if (fan_in(low + half) <= i) {
        low += half + 1;
        n -= half + 1;
      } else {
        n = half;
      }
    }
    return low;
  }

 private:
  static idx room(const Autoregressive<T>& flow, Needs needs) {
    idx size = flow.steps * flow.dim * flow.dim;
    for (int i = 0; i < flow.all_layers(); ++i) size += flow.weights_before(i, flow.steps);
    return (needs.forward + needs.backward) * size;
  }

  const T* weight(int i, idx k) const { return flow_.weight[i] + flow_.weights_before(i, k); }

  std::vector<Stage> schedule(idx k) const {
    const int hidden = flow_.hidden();
    std::vector<Stage> stages;
    idx done[max_layers + 1] = {};  // features, then units of the hidden layers
    if (!flow_.inverse) done[0] = flow_.dim;
    idx features = 0;
    while (true) {
      Stage stage{};
      bool more = false;
      for (int i = 0; i < flow_.layers; ++i) {
        const std::int64_t* seen = flow_.seen_by(i, k);
        const idx all = i == hidden ? flow_.dim : flow_.width[i + 1], begin = i == hidden ? features : done[i + 1];
        idx end = begin;
        while (end < all && seen[end] <= done[i]) ++end;
        if (i >= 2 && flow_.in_stream(i)) end = std::max(begin, std::min(end, done[i - 1]));
        stage.units[i] = {begin, end};
        (i == hidden ? features : done[i + 1]) = end;
        more |= end > begin;
      }
      if (!more) return stages;
      if (flow_.inverse) done[0] = features;
      stages.push_back(stage);
    }
  }

  void pack_stage(Stage& stage, idx k, Needs needs) {
    const idx columns = flow_.columns();
    for (int i = 0; i < flow_.layers; ++i) {
      const bool last = i == flow_.hidden();
      const idx* seen = sees_[i].data();
      const auto fan_in = [seen](idx n) { return seen[n]; };
      const Span units = stage.units[i], made = last ? Span{units.begin * columns, units.end * columns} : units;
      const idx N = flow_.outputs(i), C = flow_.context_rows(i);
      if (needs.forward) stage.blocks[i] = pack(weight(i, k), N, C, made, fan_in);
      if (needs.backward) stage.back[i] = pack_back(weight(i, k), N, C, N, stage.units[i == 0 ? flow_.hidden() : i - 1], fan_in);
    }
  }

  // Blocks of outputs `units` of a layer with weights w (C + …, N).
  template <class F>
  Span pack(const T* w, idx N, idx C, Span units, F fan_in) {
    const idx begin = blocks_.size();
    for (idx n = units.begin, rows; n < units.end; n += rows) {
      rows = even_rows(units.end - n);
      const idx least = fan_in(n), depth = fan_in(n + rows - 1);
      blocks_.push_back({n, rows, 0, depth, end_});
      const T* from = w + n;
      with_rows(rows, [&](auto M) {
        for (idx j = 0; j < C + least; ++j, from += N, end_ += M)
          for (int m = 0; m < M; ++m) end_[m] = from[m];
        for (idx j = least; j < depth; ++j, from += N, end_ += M)
          for (int m = 0; m < M; ++m) end_[m] = j < fan_in(n + m) ? from[m] : T(0);
      }, std::make_integer_sequence<int, MR>{});
    }
    return {begin, static_cast<idx>(blocks_.size())};
  }

  // Blocks of inputs `units`, whose gradients come from those outputs of the layer that see them.
  template <class F>
  Span pack_back(const T* w, idx N, idx C, idx outputs, Span units, F fan_in) {
    const idx begin = blocks_.size();
    for (idx i = units.begin, rows; i < units.end; i += rows) {
      rows = even_rows(units.end - i);
      const idx from = first_to_see(i, outputs, fan_in);
      blocks_.push_back({i, rows, from, outputs - from, end_});
      const idx by_all = first_to_see(i + rows - 1, outputs, fan_in);
      const T* row = w + (C + i) * N;
      with_rows(rows, [&](auto M) {
        for (idx n = from; n < by_all; ++n, end_ += M)
          for (int m = 0; m < M; ++m) end_[m] = i + m < fan_in(n) ? row[m * N + n] : T(0);
        for (idx n = by_all; n < outputs; ++n, end_ += M)
          for (int m = 0; m < M; ++m) end_[m] = row[m * N + n];
      }, std::make_integer_sequence<int, MR>{});
    }
    return {begin, static_cast<idx>(blocks_.size())};
  }

  // Calls f(rows) with a compile-time constant.
  template <class F, int... M>
  static void with_rows(idx rows, F f, std::integer_sequence<int, M...>) {
    ((rows == M + 1 ? f(std::integral_constant<int, M + 1>{}) : void()), ...);
  }

  const Autoregressive<T>& flow_;
  std::vector<idx> sees_[max_layers];
  std::vector<UnitBlock<T>> blocks_;
  Scratch<T> memory_;
  T* end_;
};

}  // namespace glf::GLF_ISA
