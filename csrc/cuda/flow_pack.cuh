// A flow's parameters as its warps read them: padded, rounded or split, in the order of fragments, step after step.
#pragma once

#include "flow_call.cuh"

namespace glf::device {

// An index that is padded, in one or two groups: `first` numbers padded to `padded`, then `second` of them.
struct Axis {
  int first, padded, second;
  // The unpadded index, or −1.
  GLF_DEVICE int operator()(int i) const {
    if (i < padded) return i < first ? i : -1;
    return i - padded < second ? first + i - padded : -1;
  }
};

// A matrix in memory, rows `stride` numbers apart.
struct Source {
  const float* data;
  int stride;
  Axis rows, columns;
  bool transposed;

  GLF_DEVICE float at(int i, int j) const {
    const int r = rows(transposed ? j : i), c = columns(transposed ? i : j);
    return r >= 0 && c >= 0 ? data[static_cast<long long>(r) * stride + c] : 0.0f;
  }
};

// 16 bytes of a packed matrix whose columns are so many tiles of 8; see row_tiles.cuh.
GLF_DEVICE Quad packed_quad(Precision p, const Source& w, int column_tiles, int quad) {
  const int lane = quad % 32, block = quad / 32, row = block / column_tiles * depth_of(p) + lane % 4 * 2;
  const int column = block % column_tiles * 8 + lane / 4;
  Quad q;
  if (p == Precision::tf32x3) {
    split_tf32(w.at(row, column), q.x, q.z);
    split_tf32(w.at(row + 1, column), q.y, q.w);
  } else if (p == Precision::tf32) {
    q.x = round_tf32(w.at(row, column));
    q.y = round_tf32(w.at(row + 1, column));
    q.z = round_tf32(w.at(row + 8, column));
    q.w = round_tf32(w.at(row + 9, column));
  } else {
    q.x = bf16_pair(w.at(row, column), w.at(row + 1, column));
    q.y = bf16_pair(w.at(row + 8, column), w.at(row + 9, column));
    q.z = bf16_pair(w.at(row + 16, column), w.at(row + 17, column));
    q.w = bf16_pair(w.at(row + 24, column), w.at(row + 25, column));
  }
  return q;
}

// Four numbers of a padded vector.
GLF_DEVICE Quad vector_quad(const float* data, Axis axis, int quad) {
  Word found[4];
  for (int e = 0; e < 4; ++e) {
    const int i = axis(4 * quad + e);
    found[e] = bits_of(i >= 0 ? data[i] : 0.0f);
  }
  return {found[0], found[1], found[2], found[3]};
}

// What a step's parameters are: one piece of 16 bytes of the forward's or the backward's.
struct Packer {
  const FlowShape& s;
  const FlowParameters& given;
  long long k;  // the step

  GLF_DEVICE Axis halves(int first, int second) const { return {first, 8 * s.half_tiles, second}; }
  GLF_DEVICE Axis all(int n) const { return {n, 1 << 30, 0}; }
  GLF_DEVICE int width(int layer) const { return layer < s.layers ? s.hidden[layer] : 2 * s.transformed(); }

  GLF_DEVICE Source map(bool transposed) const {
    const Axis columns = halves(s.passive(), s.transformed());
    return {given.matrix + k * s.dim * s.dim, s.dim, columns, columns, transposed};
  }
  // Layer 0 without its rows of the context.
  GLF_DEVICE Source layer(int l, bool transposed) const {
    const int rows = l ? s.hidden[l - 1] : s.passive(), columns = width(l);
    const Axis outer = l < s.layers ? all(columns) : halves(s.transformed(), s.transformed());
    return {given.weights[l] + k * (rows + (l ? 0 : s.context)) * columns, columns, all(rows), outer, transposed};
  }
  GLF_DEVICE Source of_context(bool transposed) const {
    Source w = layer(0, transposed);
    w.data += static_cast<long long>(s.passive()) * w.stride;
    w.rows = all(s.context);
    return w;
  }

  GLF_DEVICE Quad forward(int quad) const {
    const Layout at = layout_of(s);
    if (quad < at.at_out_bias()) return vector_quad(given.offset + k * s.dim, halves(s.passive(), s.transformed()), quad);
    if (quad < at.at_log()) {
      const float* bias = given.biases[s.layers] + k * 2 * s.transformed();
      return vector_quad(bias, halves(s.transformed(), s.transformed()), quad - at.at_out_bias());
    }
    if (quad < at.at_map()) return {bits_of(k < given.logs ? given.logabsdet[k] : 0.0f), 0, 0, 0};
    if (quad < at.at_first()) return packed_quad(s.map, map(false), at.halves, quad - at.at_map());
    if (quad < at.at_out()) return packed_quad(s.mlp, layer(0, false), at.hidden, quad - at.at_first());
    if (quad < at.at_bias(0)) return packed_quad(s.mlp, layer(s.layers, false), at.halves, quad - at.at_out());
    if (quad < at.at_bias(s.layers)) {
      const int l = (quad - at.at_bias(0)) / (2 * at.hidden);
      return vector_quad(given.biases[l] + k * s.hidden[l], all(s.hidden[l]), quad - at.at_bias(l));
    }
    if (quad < at.at_context(s.layers)) {
      const int l = 1 + (quad - at.at_inner(s.layers, 1)) / at.square;
      return packed_quad(s.mlp, layer(l, false), at.hidden, quad - at.at_inner(s.layers, l));
    }
    return packed_quad(s.mlp, of_context(false), at.hidden, quad - at.at_context(s.layers));
  }

  GLF_DEVICE Quad backward(int quad) const {
    const Layout at = layout_of(s);
    if (quad < at.at_out_back()) return packed_quad(s.map, map(true), at.halves, quad);
    if (quad < at.at_first_back()) return packed_quad(s.mlp, layer(s.layers, true), at.hidden, quad - at.at_out_back());
    if (quad < at.at_inner_back(1)) return packed_quad(s.mlp, layer(0, true), s.half_tiles, quad - at.at_first_back());
    if (quad < at.at_context_back(s.layers)) {
      const int l = 1 + (quad - at.at_inner_back(1)) / at.square;
      return packed_quad(s.mlp, layer(l, true), at.hidden, quad - at.at_inner_back(l));
    }
    return packed_quad(s.mlp, of_context(true), (s.context + 7) / 8, quad - at.at_context_back(s.layers));
  }
};

}  // namespace glf::device
