// A medium flow's parameters as the blocks of a cluster read them: see cluster_sections.cuh.
#pragma once

#include "cluster_sections.cuh"
#include "flow_pack.cuh"

namespace glf::device {

// Sixteen bytes of a step, forward or transposed.
struct ClusterPacker {
  const FlowShape& s;
  const FlowParameters& given;
  long long k;  // the step

  // What a block owns of `width` units, from its first one on.
  GLF_DEVICE int first_unit(int rank) const { return 8 * slice_tiles(s) * rank; }
  GLF_DEVICE Axis owned(const Packer& whole, int width, int rank) const {
    const int left = width - first_unit(rank), most = 8 * slice_tiles(s);
    return whole.all(left < 0 ? 0 : left < most ? left : most);
  }
  GLF_DEVICE Source with_owned_columns(const Packer& whole, Source w, int width, int rank) const {
    w.data += first_unit(rank);
    w.columns = owned(whole, width, rank);
    return w;
  }
  GLF_DEVICE Source with_owned_rows(const Packer& whole, Source w, int width, int rank) const {
    w.data += static_cast<long long>(first_unit(rank)) * w.stride;
    w.rows = owned(whole, width, rank);
    return w;
  }

  GLF_DEVICE Quad vector(const Packer& whole, const Sections& all, int number, int rank, int quad) const {
    if (number == 0) {
      if (quad == 4 * s.half_tiles) return {bits_of(k < given.logs ? given.logabsdet[k] : 0.0f), 0, 0, 0};
      return vector_quad(given.offset + k * s.dim, whole.halves(s.passive(), s.transformed()), quad);
    }
    const int width = whole.width(number - 1);
    const float* bias = given.biases[number - 1] + k * width;
    if (number == all.last()) {  // the others' parts of the sum begin with zero
      const Axis axis = whole.halves(s.transformed(), s.transformed());
      return rank ? Quad{0, 0, 0, 0} : vector_quad(bias, axis, quad);
    }
    if (!all.section(number).sliced) return vector_quad(bias, whole.all(width), quad);
    return vector_quad(bias + first_unit(rank), owned(whole, width, rank), quad);
  }

  // The matrix of a section, of which a row and a column of blocks are asked for. Those of the first layer become those of its part:
  // [p, context] are its rows, or transposed its columns.
  GLF_DEVICE Source matrix(const Packer& whole, const Sections& all, int number, int rank, int& row, int& column) const {
    const bool back = all.transposed;
    if (number == 0) return whole.map(back);
    if (number > 1) {
      const Source w = whole.layer(number - 1, back);
      const bool rows = back || number == all.last();  // the block owns what goes in, or what comes out
      return rows ? with_owned_rows(whole, w, s.hidden[number - 2], rank) : with_owned_columns(whole, w, s.hidden[number - 1], rank);
    }
    const int of_p = back ? s.half_tiles : all.blocks_of(s.mlp, s.half_tiles);
    const bool context = (back ? column : row) >= of_p;
    if (context && back) column -= of_p;
    if (context && !back) row -= of_p;
    const Source w = context ? whole.of_context(back) : whole.layer(0, back);
    return all.section(number).sliced ? with_owned_columns(whole, w, s.hidden[0], rank) : w;
  }

  GLF_DEVICE Quad operator()(bool transposed, int quad) const {
    const Packer whole{s, given, k};
    const Sections all{s, transposed};
    int number = 0;
    while (quad >= all.in_memory(number)) quad -= all.in_memory(number++);
    const Section section = all.section(number);
    const int rank = quad / section.quads(), parts = section.parts(), most = section.lines_of_unit();
    quad %= section.quads();
    const int group = parts * section.vector + most * section.length * block_quads;  // all units of these lines
    const int lines = section.unit(quad / group * parts).lines, in_group = quad % group;
    const int part = parts > 1 ? in_group / (section.vector + lines * part_blocks * block_quads) : 0;
    const Unit unit = section.unit(quad / group * parts + part);
    const int in_unit = quad - unit.at;
    if (in_unit < section.vector) return vector(whole, all, number, rank, in_unit);
    const int block = (in_unit - section.vector) / block_quads, lane = (in_unit - section.vector) % block_quads;
    const int line = unit.first_line + block / unit.blocks, in_line = unit.first_block + block % unit.blocks;
    int row = section.by_rows ? line : in_line, column = section.by_rows ? in_line : line;
    const Source w = matrix(whole, all, number, rank, row, column);
    return packed_quad(number ? s.mlp : s.map, w, column + 1, (row * (column + 1) + column) * block_quads + lane);
  }
};

}  // namespace glf::device
