// A tile of rows during one step of a flow: where both passes find its values and gradients.
#pragma once

#include "coupling.h"
#include "permutations.h"
#include "wide.h"

namespace glf::GLF_ISA {

// What is known of a flow's affine maps before a pass over so many rows.
template <class T>
struct AffineMaps {
  Permutations<T> matrix, unmatrix;

  AffineMaps(const Flow<T>& flow, idx rows)
      : matrix(flow, flow.matrix, rows), unmatrix(flow, flow.unmatrix, rows) {}
};

// A tile's place in memory during one step.
template <class T>
struct Tile {
  const Flow<T>& flow;
  const AffineMaps<T>& maps;
  const Record& at;
  idx rows;
  const T* context;  // (rows, C), contiguous
  T* record;         // (rows, at.width)
  T* panel;
  const Parallel* team;  // which computes a wide flow's products together; else null
  idx first;             // of its rows, in the batch

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

// y = x A_k + c, or x A_kᵀ + c; a null c is 0. With `back` the other matrix is meant, A_k⁻¹.
template <class T>
void multiply_by_map(const Tile<T>& tile, idx k, bool back, bool transposed, const T* x, idx x_m, T* y, idx y_m,
                     const T* c = nullptr) {
  const idx D = tile.flow.dim;
  const Permutations<T>& gathers = back ? tile.maps.unmatrix : tile.maps.matrix;
  if (gathers.apply(k, transposed, tile.rows, x, x_m, y, y_m, c)) return;
  const T* matrices = back ? tile.flow.unmatrix : tile.flow.matrix;
  multiply(tile, D, D, x, x_m, matrices + k * D * D, transposed, y, y_m, c);
}

template <class T>
void outer_sum(const BackwardTile<T>& tile, idx N1, idx N2, idx x, idx y, T* g) {
  const T *from = tile.record + x, *slopes = tile.gradient + y;
  if (tile.team)
    outer_sum_together(*tile.team, tile.rows, N1, N2, from, tile.at.width, slopes, tile.grad.width, g, tile.accumulate);
  else
    outer_sum(tile.rows, N1, N2, from, tile.at.width, slopes, tile.grad.width, g, tile.accumulate);
}

// ∂A_k, from the fields x of the record and y of the gradients; `back` is that of ∂x = ∂y A_kᵀ.
//
// Where A = diag(s) W and W is fixed, ∂A is wanted for ∂sᵢ = Σⱼ Wᵢⱼ ∂Aᵢⱼ alone, which is Σ xᵢ ∂xᵢ / sᵢ over the rows: no product is
// needed. Of all ∂A with these sums this is the shortest: row i is Σ xᵢ ∂xᵢ · Aᵢ / |Aᵢ|².
template <class T>
void map_gradient(const BackwardTile<T>& tile, idx k, idx x, idx y, idx back) {
  const idx D = tile.flow.dim;
  T* grad = tile.parameters->matrix + k * D * D;
  if (!tile.flow.row_scales) return outer_sum(tile, D, D, x, y, grad);
  const Scratch<T> sums(D);
  std::fill_n(sums.get(), D, T(0));
  for (idx m = 0; m < tile.rows; ++m)
    for (idx i = 0; i < D; ++i) sums.get()[i] += tile.read(x)[m][i] * tile.gradient_of(back)[m][i];
  for (idx i = 0; i < D; ++i) {
    const T* row = tile.flow.matrix + (k * D + i) * D;
    T most = 0, square = 0;  // of a row over its largest number, since squares of 1e-20 are 0
    for (idx j = 0; j < D; ++j) most = std::max(most, std::abs(row[j]));
    if (most > 0)
      for (idx j = 0; j < D; ++j) square += (row[j] / most) * (row[j] / most);
    for (idx j = 0; j < D; ++j) {
      const T part = most > 0 ? row[j] / most * (sums.get()[i] / most / square) : T(0);
      grad[i * D + j] = tile.accumulate ? grad[i * D + j] + part : part;
    }
  }
}

}  // namespace glf::GLF_ISA
