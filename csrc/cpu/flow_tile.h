// A tile of rows during one step of a flow: where both passes find its values and gradients.
#pragma once

#include "coupling.h"
#include "wide.h"

namespace glf::GLF_ISA {

// A tile's place in memory during one step.
template <class T>
struct Tile {
  const Flow<T>& flow;
  const Record& at;
  idx rows;
  const T* context;  // (rows, C), contiguous
  T* record;         // (rows, at.width)
  T* panel;
  const Parallel* team;  // which computes a wide flow's products together; else null

  Rows<T> field(idx offset) const { return {record + offset, at.width}; }
  Rows<const T> read(idx offset) const { return {record + offset, at.width}; }
  Coupling<T> coupling(bool inverse) const { return {flow.kind, flow.log_scale, flow.constant, flow.add_first, inverse, flow.spline}; }
  idx shift() const { return at.raw + (flow.kind == Kind::affine || flow.kind == Kind::separate ? flow.transformed() : 0); }  // t; u is at raw
};

// The gradients that one row carries: offsets as in Record.
struct GradientRecord {
  Int out;        // ∂ of the step's output, then of its input
  Int y;          // ∂y
  Int raw;        // ∂[u, t], or ∂t alone
  Int hidden[3];  // ∂ of a hidden layer and of the one before it; a residual network's three are said in residual.h
  Int input;      // ∂[p, context]
  Int state;      // the flow's state itself, where inputs are rebuilt
  Int width;

  template <class T>
  static GradientRecord of(const Flow<T>& flow) {
    constexpr Int line = 64 / sizeof(T);
    Int end = 0;
    const auto field = [&end](Int n) {
      const Int start = end;
      end += round_up(n, line) + line;
      return start;
    };
    GradientRecord r{};
    r.out = field(flow.dim);
    r.y = field(flow.dim);
    r.raw = field(flow.networks * flow.outputs(flow.layers - 1));
    Int widest = 0;
    for (int i = 1; i < flow.layers; ++i) widest = std::max(widest, flow.width[i]);
    r.hidden[0] = field(widest);
    r.hidden[1] = field(widest);
    if (flow.network == Network::residual) r.hidden[2] = field(widest);
    r.input = field(flow.width[0]);
    r.state = field(flow.dim);
    r.width = end / line % 2 ? end : end + line;
    return r;
  }
};

template <class T>
struct BackwardTile : Tile<T> {
  const GradientRecord& grad;
  T* gradient;                     // (rows, grad.width)
  const Gradients<T>* parameters;  // null where only the inputs' gradients are wanted
  bool accumulate;                 // onto what earlier tiles of this thread have left there

  Rows<T> gradient_of(idx offset) const { return {gradient + offset, grad.width}; }
};

// multiply and outer_sum of the rows of a tile, by whom the tile says.
template <class T, class After = Nothing>
void multiply(const Tile<T>& tile, idx N, idx K, const T* a, idx a_m, const T* b, bool transposed, T* c, idx c_m,
              const T* bias = nullptr, const After& after = {}, bool accumulate = false) {
  if (tile.team)
    multiply_together(*tile.team, tile.rows, N, K, a, a_m, b, transposed, c, c_m, bias, after, accumulate);
  else
    multiply(tile.rows, N, K, a, a_m, b, transposed, c, c_m, bias, tile.panel, after, accumulate);
}

template <class T>
void outer_sum(const BackwardTile<T>& tile, idx N1, idx N2, idx x, idx y, T* g) {
  const T *from = tile.record + x, *slopes = tile.gradient + y;
  if (tile.team)
    outer_sum_together(*tile.team, tile.rows, N1, N2, from, tile.at.width, slopes, tile.grad.width, g, tile.accumulate);
  else
    outer_sum(tile.rows, N1, N2, from, tile.at.width, slopes, tile.grad.width, g, tile.accumulate);
}

}  // namespace glf::GLF_ISA
