// Where the parameters of a medium flow lie for a cluster of blocks that shares sixteen rows, and what a block's shared memory holds.
//
// Each block owns a slice of every hidden layer, `slice_tiles` tiles of 8 units. A step is a list of sections, one for each product.
// Of a section that is `sliced` every block has a copy of its own; the others are the same for all of them:
//
//     map       x A: not sliced                                            and for the backward, transposed, Aᵀ: not sliced
//     first     h₀ from [p, context]: not sliced, unless h₀ is the last       ∂p and ∂context from the block's slice of ∂h₀
//     inner     a slice of h_l from all of h_(l−1)                            a slice of ∂h_(l−1) from all of ∂h_l
//     last      the part of (u, t) that the block's slice of h makes          a slice of ∂h from all of (∂u, ∂t)
//
// A section is a number of lines of blocks of 512 bytes (row_tiles.cuh); the warps take its lines in turns. Where a section has
// many columns, a line is a tile of columns, with all its rows; where it has few columns but many rows, a line is a block's depth
// of rows with all columns, and warps add up what they have. It comes through the ring (stream.cuh) in units of up to 64 blocks: some
// lines, or of longer ones the first and then the second part. In front of a unit is the section's vector: biases.
#pragma once

#include "flow_call.cuh"
#include "stream.cuh"

namespace glf::device {

inline constexpr int cluster_warps = 8;  // of a block
inline constexpr int cluster_group = 4;  // a cluster has 4, 8 or 16 blocks
inline constexpr int most_cluster_units = 64;  // of a step, in either direction
inline constexpr int unit_blocks = 64, part_blocks = 8;  // of a unit; of a line in a unit of parts

GLF_DEVICE_AND_HOST constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

// Tiles of 8 columns of the parts of a medium flow. Sizes are known when a kernel runs, where a division takes as long as a product
// of matrices: shifts and comparisons take the place of those that a step would need.
GLF_DEVICE_AND_HOST int slice_tiles(const FlowShape& s) { return s.hidden_tiles >> (s.blocks == 16 ? 4 : s.blocks == 8 ? 3 : 2); }
GLF_DEVICE_AND_HOST int context_tiles(const FlowShape& s) { return divided_up(s.context, 8); }

// A unit of a section: where it begins in it, how long it is, and which part of the section it has. In quads, lines and blocks.
struct Unit {
  int at, quads, first_line, lines, first_block, blocks;
};

struct Section {
  int vector, lines, length;
  bool by_rows, sliced;  // a line is a block's depth of rows

  GLF_DEVICE_AND_HOST constexpr int parts() const { return divided_up(length, part_blocks); }
  // Lines that each warp has of a unit: as many as keep it within `unit_blocks`, but at most four.
  GLF_DEVICE_AND_HOST constexpr int turns() const { return length <= 2 ? 4 : length <= 4 ? 2 : 1; }
  GLF_DEVICE_AND_HOST constexpr int lines_of_unit() const { return cluster_warps * turns(); }
  GLF_DEVICE_AND_HOST constexpr int units() const { return divided_up(lines, lines_of_unit()) * parts(); }
  GLF_DEVICE_AND_HOST constexpr int quads() const {
    return units() * vector + lines * length * block_quads;
  }
  GLF_DEVICE_AND_HOST constexpr Unit unit(int u) const {
    const int group = u / parts(), part = u % parts(), most = lines_of_unit(), first = group * most;
    const int in_group = lines - first < most ? lines - first : most, block = part * part_blocks;
    const int blocks = parts() > 1 && length - block > part_blocks ? part_blocks : length - block;
    return {group * (parts() * vector + most * length * block_quads) + part * vector + in_group * block * block_quads,
            vector + in_group * blocks * block_quads, first, in_group, block, blocks};
  }
};

// The sections are numbered from the map, 0, through the hidden layers, 1 …, to the last layer.
struct Sections {
  const FlowShape& s;
  bool transposed;

  GLF_DEVICE_AND_HOST int last() const { return s.layers + 1; }
  GLF_DEVICE_AND_HOST int blocks_of(Precision p, int tiles) const {
    return p == Precision::bf16 ? (tiles + 3) / 4 : p == Precision::tf32 ? (tiles + 1) / 2 : tiles;
  }

  GLF_DEVICE_AND_HOST Section section(int number) const {
    const int state = 2 * s.half_tiles, slice = slice_tiles(s), all = s.hidden_tiles;
    const bool whole = number == 1 && s.layers > 1;  // the first hidden layer of several
    if (number == 0) return {transposed ? 0 : 2 * state + 1, state, blocks_of(s.map, state), false, false};
    if (transposed) {
      if (number == 1) return {0, s.half_tiles + context_tiles(s), blocks_of(s.mlp, slice), false, true};
      return {0, blocks_of(s.mlp, number == last() ? state : all), slice, true, true};
    }
    if (number == last()) return {2 * state, state, blocks_of(s.mlp, slice), false, true};
    if (number > 1) return {2 * slice, blocks_of(s.mlp, all), slice, true, true};
    const int length = blocks_of(s.mlp, s.half_tiles) + blocks_of(s.mlp, context_tiles(s)), lines = whole ? all : slice;
    return {2 * lines, lines, length, false, !whole};
  }
  // In quads.
  GLF_DEVICE_AND_HOST int in_memory(int number) const {
    const Section one = section(number);
    return one.quads() * (one.sliced ? s.blocks : 1);
  }
  GLF_DEVICE_AND_HOST int begin(int number) const {
    int at = 0;
    for (int i = 0; i < number; ++i) at += in_memory(i);
    return at;
  }
  GLF_DEVICE_AND_HOST int step() const { return begin(last() + 1); }
  GLF_DEVICE_AND_HOST int units() const {
    int all = 0;
    for (int i = 0; i <= last(); ++i) all += section(i).units();
    return all;
  }
  // The number of the section that comes i-th: a forward begins with the map, an inverse and a backward end with it.
  GLF_DEVICE_AND_HOST int in_turn(int i, bool inverse) const {
    if (transposed) return last() - i;
    return inverse ? (i == last() ? 0 : i + 1) : i;
  }
};

// Bytes of a step in memory.
GLF_DEVICE_AND_HOST long long cluster_bytes(const FlowShape& s, bool transposed) { return 16ll * Sections{s, transposed}.step(); }

// Where a unit lies in its step.
struct UnitPlace {
  unsigned quad, bytes;
};

GLF_DEVICE UnitPlace place_of(const Sections& all, bool inverse, int rank, int unit) {
  for (int i = 0; i <= all.last(); ++i) {
    const int number = all.in_turn(i, inverse);
    const Section section = all.section(number);
    const int units = section.units();
    if (unit < units) {
      const Unit found = section.unit(unit);
      const int first = all.begin(number) + (section.sliced ? rank * section.quads() : 0);
      return {static_cast<unsigned>(first + found.at), static_cast<unsigned>(16 * found.quads)};
    }
    unit -= units;
  }
  return {0, 0};
}

// A block's shared memory, in bytes: barriers and slots of the ring, where units lie, then tiles of 512 bytes.
struct ClusterMemory {
  int slots, slot_bytes, tiles;      // where tiles begin
  int state, other, spare;           // tiles: rows, what becomes of them; (∂u, ∂t), or in a forward the context
  int hidden, slice, partial, exchange, end;  // all of h₀; the block's slice of h; sums of warps; what other blocks wrote

  GLF_DEVICE_AND_HOST static int slot_of(const FlowShape& s) {
    const int widest = s.hidden_tiles > 2 * s.half_tiles + 1 ? s.hidden_tiles : 2 * s.half_tiles + 1;
    return 16 * (unit_blocks * block_quads + 2 * widest);
  }
  GLF_DEVICE_AND_HOST ClusterMemory(const FlowShape& s, int slots_) : slots(slots_), slot_bytes(slot_of(s)) {
    const int rows = 2 * s.half_tiles, context = context_tiles(s), of_slice = slice_tiles(s);
    tiles = barrier_bytes + slots * slot_bytes + 2 * most_cluster_units * int(sizeof(UnitPlace));
    state = 0;
    other = rows;
    spare = 2 * rows;
    hidden = spare + (context > rows ? context : rows);
    slice = hidden + s.hidden_tiles;
    partial = slice + of_slice;
    exchange = partial + cluster_warps * of_slice;
    const int back = s.half_tiles + context, sums = s.blocks * (rows > back ? rows : back);
    end = exchange + (sums > s.hidden_tiles ? sums : s.hidden_tiles);
  }
  GLF_DEVICE_AND_HOST int bytes() const { return tiles + 512 * end; }
};

}  // namespace glf::device
