// What the kernels of a small coupling flow are given: sizes, options and pointers, by value, and where packed parameters lie.
#pragma once

#include "flow_math.cuh"
#include "row_tiles.cuh"

namespace glf::device {

inline constexpr int most_layers = 4;   // hidden ones
inline constexpr int most_warps = 8;    // of a block: 16 rows each
inline constexpr int rows_of_warp = 16;
inline constexpr int pack_threads = 256;
inline constexpr int step_slots = 3;  // of a ring of whole steps, at most

// The sizes of a flow, and the classes of tiles of 8 columns to which they are padded: `half_tiles` for p, and for v,
// `hidden_tiles` for each hidden layer.
struct FlowShape {
  int steps, dim, context, layers;
  int hidden[most_layers];
  int half_tiles, hidden_tiles;
  Precision map, mlp;
  int blocks = 1;  // of a cluster that shares rows (cluster_sections.cuh); 1: warps have rows of their own

  GLF_DEVICE_AND_HOST int passive() const { return dim - dim / 2; }
  GLF_DEVICE_AND_HOST int transformed() const { return dim / 2; }
};

// Where the parts of a step lie, in pieces of 16 bytes. Forward: the vectors c, b_out (each p | v, or u | t) and log|det A| in
// front of three zeros, then A, W₀'s rows of p, W_out, all at distances that a kernel knows when it is compiled; then the hidden
// layers' biases, the inner layers, and W₀'s rows of the context. Transposed, for the backward: Aᵀ, W_outᵀ, W₀'s rows of pᵀ, the
// inner layersᵀ, W₀'s rows of the contextᵀ.
struct Layout {
  int halves, hidden;       // tiles
  int map, square, first, out;  // quads of A, an inner layer, W₀'s rows of p, W_out
  int first_back, out_back;     // of the last two transposed

  GLF_DEVICE_AND_HOST constexpr Layout(int half_tiles, int hidden_tiles, Precision map_precision, Precision mlp)
      : halves(2 * half_tiles),
        hidden(hidden_tiles),
        map(packed_quads(map_precision, 16 * half_tiles, 2 * half_tiles)),
        square(packed_quads(mlp, 8 * hidden_tiles, hidden_tiles)),
        first(packed_quads(mlp, 8 * half_tiles, hidden_tiles)),
        out(packed_quads(mlp, 8 * hidden_tiles, 2 * half_tiles)),
        first_back(packed_quads(mlp, 8 * hidden_tiles, half_tiles)),
        out_back(packed_quads(mlp, 16 * half_tiles, hidden_tiles)) {}

  // Forward.
  GLF_DEVICE_AND_HOST constexpr int at_out_bias() const { return 2 * halves; }  // c is in front
  GLF_DEVICE_AND_HOST constexpr int at_log() const { return 4 * halves; }
  GLF_DEVICE_AND_HOST constexpr int at_map() const { return at_log() + 1; }
  GLF_DEVICE_AND_HOST constexpr int at_first() const { return at_map() + map; }
  GLF_DEVICE_AND_HOST constexpr int at_out() const { return at_first() + first; }
  GLF_DEVICE_AND_HOST constexpr int at_bias(int layer) const { return at_out() + out + 2 * hidden * layer; }
  GLF_DEVICE_AND_HOST constexpr int at_inner(int layers, int layer) const { return at_bias(layers) + square * (layer - 1); }
  GLF_DEVICE_AND_HOST constexpr int at_context(int layers) const { return at_inner(layers, layers); }
  // Transposed.
  GLF_DEVICE_AND_HOST constexpr int at_out_back() const { return map; }
  GLF_DEVICE_AND_HOST constexpr int at_first_back() const { return at_out_back() + out_back; }
  GLF_DEVICE_AND_HOST constexpr int at_inner_back(int layer) const { return at_first_back() + first_back + square * (layer - 1); }
  GLF_DEVICE_AND_HOST constexpr int at_context_back(int layers) const { return at_inner_back(layers); }
};

GLF_DEVICE_AND_HOST Layout layout_of(const FlowShape& s) { return Layout(s.half_tiles, s.hidden_tiles, s.map, s.mlp); }

// Bytes of a packed step.
GLF_DEVICE_AND_HOST int forward_bytes(const FlowShape& s) {
  const Layout at = layout_of(s);
  return 16 * (at.at_context(s.layers) + packed_quads(s.mlp, s.context, s.hidden_tiles));
}
GLF_DEVICE_AND_HOST int transposed_bytes(const FlowShape& s) {
  const Layout at = layout_of(s);
  return 16 * (at.at_context_back(s.layers) + packed_quads(s.mlp, 8 * s.hidden_tiles, (s.context + 7) / 8));
}

// A forward that keeps what the backward needs, a backward, or both.
enum Ways : int { forth = 1, back = 2 };

// The parameters, each of all steps one behind the other.
struct FlowParameters {
  const float *matrix, *offset, *logabsdet;  // A (K, D, D), or A⁻¹; c (K, D); log|det A| (K,), their sum (1,), or null
  int logs;                                  // how many there are of those
  const float *weights[most_layers + 1], *biases[most_layers + 1];
};

// One call. Pointers to what is not asked for are null.
struct FlowCall {
  FlowShape shape;
  Activation activation;
  LogScale log_scale;
  float constant;
  int add_first, density;
  int slots, warps;  // of the ring of weights; of a block
  long long rows;
  const unsigned char *packed, *transposed;
  const float *x, *context;
  float *out, *logdet;
  // What the backward needs of the forward, and the workspace from which the gradients of weights are made, laid out as
  // kernels/coupling_flow_backward.py has it: hidden and slopes (K, rows, stride) in the type of the MLP's operands, map_in
  // and map_grad (K, rows, D); derivatives: a' where it is no function of a, as hidden, and where both ways are one launch in
  // the place of slopes; record: v, u and t of each step in the order of the warps' registers.
  int stride;
  float *map_in, *map_grad;
  void *hidden, *derivatives, *slopes;
  Quad* record;
  const float *grad_out, *grad_logdet;  // grad_out null: the gradient of a density, −z·∂logdet; grad_logdet null: 1 for every row
  float *grad_x, *grad_context;
};

// The first column of a hidden layer in a row of the workspace, which [p, context] or [∂u, ∂t] follow at `layers`.
GLF_DEVICE int workspace_column(const FlowShape& s, int layer) {
  int at = 0;
  for (int l = 0; l < layer; ++l) at += (s.hidden[l] + 15) / 16 * 16;
  return at;
}

}  // namespace glf::device
