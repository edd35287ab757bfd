// A medium coupling flow, a cluster of blocks for sixteen rows: each block holds a slice of the hidden layers (cluster_sections.cuh).
//
// In each step the blocks compute the map and the first of several hidden layers for themselves, then each its slice of the last
// hidden layer, and from it a part of (u, t). Every block sends its part to all others and adds all parts in their order: all blocks
// have the same rows, bit for bit. That is one exchange a step for one or two hidden layers. Of more layers, the slices of those
// between are exchanged, too.
//
// Rows lie in shared memory, as tiles in the order of the registers of a warp: 512 bytes are 16 rows of 8 columns.
#pragma once

#include "cluster.cuh"
#include "cluster_sections.cuh"
#include "flow_forward.cuh"

namespace glf::device {

// Where the units of a forward, an inverse, a backward, or of a forward and then a backward lie: asked for one after the other, so
// that nothing is divided.
struct ClusterOrder {
  const UnitPlace *places, *back_places;  // the units of a step, in shared memory
  const Quad *step, *back_step;           // the steps that come next
  long long step_quads, back_quads;       // from a step to the one after it
  int units, back_units, left;            // of a step; `left` units of the forward are to come
  int unit = 0, bytes_of_unit = 0;

  GLF_DEVICE const unsigned char* from(int) {
    if (left == 0 && back_places) {  // turns back
      places = back_places;
      step = back_step;
      step_quads = back_quads;
      units = back_units;
      unit = 0;
      back_places = nullptr;
    }
    --left;
    const UnitPlace place = places[unit];
    const unsigned char* found = reinterpret_cast<const unsigned char*>(step + place.quad);
    bytes_of_unit = static_cast<int>(place.bytes);
    if (++unit == units) {
      unit = 0;
      step += step_quads;
    }
    return found;
  }
  GLF_DEVICE int bytes(int) const { return bytes_of_unit; }
};

// Calls f with a number of lines that a warp multiplies at a time as a constant.
template <class F>
GLF_DEVICE void with_turns(int turns, F f) {
  if (turns == 4) return f(Constant<4>{});
  if (turns == 2) return f(Constant<2>{});
  return f(Constant<1>{});
}

// Calls f with the tiles of a slice as a constant.
template <class F>
GLF_DEVICE void with_slice(int tiles, F f) {
  if (tiles == 2) return f(Constant<2>{});
  if (tiles == 4) return f(Constant<4>{});
  return f(Constant<8>{});
}

// Two tiles side by side.
GLF_DEVICE Rows<2> beside(const Rows<1>& first, const Rows<1>& second) {
  Rows<2> both;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    both.c[0][e] = first.c[0][e];
    both.c[1][e] = second.c[0][e];
  }
  return both;
}

// What a map does with c.
enum class Offset { none, added, subtracted };

// A warp's view of what its cluster does.
template <Precision map_, Precision mlp_>
struct ClusterTeam {
  static constexpr Precision map = map_, mlp = mlp_;
  const FlowCall& f;
  RowRange range;
  int blocks, rank, warp;
  Quad *state, *other, *spare, *hidden, *slice, *partial, *exchange;  // ClusterMemory
  Stream<ClusterOrder>& weights;
  ClusterBarrier barrier;

  GLF_DEVICE ClusterTeam(const FlowCall& f, const RowRange& range, int warp, const ClusterMemory& at, unsigned char* shared,
                         Stream<ClusterOrder>& weights)
      : f(f), range(range), blocks(f.shape.blocks), rank(cluster_rank()), warp(warp), weights(weights) {
    Quad* tiles = reinterpret_cast<Quad*>(shared + at.tiles);
    state = tiles + 32 * at.state;
    other = tiles + 32 * at.other;
    spare = tiles + 32 * at.spare;
    hidden = tiles + 32 * at.hidden;
    slice = tiles + 32 * at.slice;
    partial = tiles + 32 * at.partial;
    exchange = tiles + 32 * at.exchange;
    barrier.arrive();  // nothing is to be read yet
  }

  // -- an exchange: what others wrote into `exchange` is there between `sent` and `taken` --------------------------------
  // All blocks have taken what was sent before.
  GLF_DEVICE void begin_sending() { barrier.wait(); }
  GLF_DEVICE void send(const Rows<1>& tile, int to) {
    on_lanes([&](int lane) {
      auto& c = const_cast<Rows<1>&>(tile).c[0];
      const Quad quad{bits_of(of_lane(c[0], lane)), bits_of(of_lane(c[1], lane)), bits_of(of_lane(c[2], lane)),
                      bits_of(of_lane(c[3], lane))};
#pragma unroll 1
      for (int first = 0; first < blocks; first += cluster_group)
#pragma unroll
        for (int r = 0; r < cluster_group; ++r) write_to(first + r, exchange + to * 32 + lane, quad);
    });
  }
  GLF_DEVICE void sent() {
    barrier.arrive();
    barrier.wait();
  }
  GLF_DEVICE void taken() { barrier.arrive(); }
  // sum += the parts that all blocks sent, in their order; `stride` tiles are one block's.
  GLF_DEVICE void add_parts(Rows<1>& sum, int tile, int stride) const {
#pragma unroll 1
    for (int first = 0; first < blocks; first += cluster_group)
#pragma unroll
      for (int r = 0; r < cluster_group; ++r) {
        Rows<1> part;
        load_record(part, exchange + ((first + r) * stride + tile) * 32);
        each_pair(sum, part, [](float& x, float& y) { x += y; });
      }
  }

  // -- products ------------------------------------------------------------------------------------------------------------
  // Of what each block could store, a tile is stored by one warp of the cluster.
  GLF_DEVICE bool stores(int tile) const { return (tile & (blocks - 1)) == rank && tile % cluster_warps == warp; }

  // Tiles from `first` on, zero from `count` on.
  template <int N>
  GLF_DEVICE static void load_tiles(Rows<N>& rows, const Quad* tiles, int first, int count) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Rows<1> one;
      if (first + i < count)
        load_record(one, tiles + (first + i) * 32);
      else
        clear(one);
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.c[i][e] = one.c[0][e];
    }
  }

  // One tile of columns a line, of which a warp takes `turns` at a time: `begin(sum, vector, line)` for each, then for each block of
  // the lines a product with the rows that `operand(rows, block, vector)` loads, then `end(sum, vector, line)`.
  template <Precision p, int turns, class Begin, class Operand, class End>
  GLF_DEVICE void by_columns(const Section& section, Begin begin, Operand operand, End end) {
    const int parts = section.parts(), most = section.lines_of_unit();
#pragma unroll 1
    for (int first = 0; first < section.lines; first += most) {
      const int lines = section.lines - first < most ? section.lines - first : most;
      Rows<1> even[turns], odd[turns];  // two chains of products each
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        const Quad* unit = reinterpret_cast<const Quad*>(weights.next());
        const float* vector = reinterpret_cast<const float*>(unit);
        const int from = part * part_blocks, left = section.length - from;
        const int count = parts > 1 && left > part_blocks ? part_blocks : left;
#pragma unroll 1
        for (int line = warp; line < lines; line += turns * cluster_warps) {  // once, if there are several parts
          // A turn for which there is no line repeats the first one's.
          const auto line_of = [&](int i) { return line + i * cluster_warps < lines ? line + i * cluster_warps : line; };
          if (part == 0)
#pragma unroll
            for (int i = 0; i < turns; ++i) {
              begin(even[i], vector, first + line_of(i));
              clear(odd[i]);
            }
          const auto add = [&](Rows<1>(&sums)[turns], int j) {
            Rows<depth_of(p) / 8> rows;
            operand(rows, from + j, vector);
#pragma unroll
            for (int i = 0; i < turns; ++i)
              product<p>(sums[i], rows, unit + section.vector + (line_of(i) * count + j) * block_quads);
          };
#pragma unroll 1
          for (int j = 0; j + 1 < count; j += 2) {
            add(even, j);
            add(odd, j + 1);
          }
          if (count % 2) add(even, count - 1);
          if (part + 1 < parts) continue;
#pragma unroll
          for (int i = 0; i < turns; ++i) {
            if (line + i * cluster_warps >= lines) continue;
            each_pair(even[i], odd[i], [](float& x, float& y) { x += y; });
            end(even[i], vector, first + line_of(i));
          }
        }
        weights.release();
      }
    }
  }

  // The block's slice of a product with all of `tiles`: each warp takes some of the rows of the weight, and leaves its sums in
  // `partial`. Ends with a barrier.
  GLF_DEVICE void by_rows(const Section& section, const Quad* tiles, int count) {
    with_slice(section.length, [&](auto constant) {
      constexpr int N = decltype(constant)::value;
      const int most = section.lines_of_unit();
      Rows<N> sum;
      clear(sum);
#pragma unroll 1
      for (int first = 0; first < section.lines; first += most) {
        const int lines = section.lines - first < most ? section.lines - first : most;
        const Quad* vector = reinterpret_cast<const Quad*>(weights.next());
        if (first == 0 && warp == 0 && section.vector) fill(sum, reinterpret_cast<const float*>(vector));
#pragma unroll 1
        for (int line = warp; line < lines; line += cluster_warps) {
          constexpr int depth = depth_of(mlp) / 8;
          Rows<depth> rows;
          if (depth == 1 || !(count % depth))
            load_record(rows, tiles + (first + line) * depth * 32);
          else
            load_tiles(rows, tiles, (first + line) * depth, count);
          product<mlp>(sum, rows, vector + section.vector + line * N * block_quads);
        }
        weights.release();
      }
      store_record(sum, partial + warp * N * 32);
    });
    synchronize_block();
  }
  // The sum of the warps' sums of a tile, in their order.
  GLF_DEVICE void sum_of_warps(Rows<1>& sum, const Section& section, int tile) const {
    load_record(sum, partial + tile * 32);
    const int warps = section.lines < cluster_warps ? section.lines : cluster_warps;
#pragma unroll
    for (int w = 1; w < cluster_warps; ++w) {
      if (w >= warps) break;
      Rows<1> part;
      load_record(part, partial + (w * section.length + tile) * 32);
      each_pair(sum, part, [](float& x, float& y) { x += y; });
    }
  }

  // -- a step --------------------------------------------------------------------------------------------------------------
  // Column of a row in memory at which a tile of the padded halves begins, and the one at which its half ends.
  GLF_DEVICE int column_of(int tile) const {
    return tile < f.shape.half_tiles ? 8 * tile : f.shape.passive() + 8 * (tile - f.shape.half_tiles);
  }
  GLF_DEVICE int end_of(int tile) const { return tile < f.shape.half_tiles ? f.shape.passive() : f.shape.dim; }
  GLF_DEVICE void load_rows(Rows<1>& tile, const float* matrix, int number) const {
    load_columns(tile, matrix + range.first * f.shape.dim, range.live, f.shape.dim, column_of(number), end_of(number));
  }
  GLF_DEVICE void store_rows(Rows<1>& tile, float* matrix, long long row, int number) const {
    const int at = column_of(number);
    store_numbers<Precision::tf32>(tile, matrix, row * f.shape.dim + at, f.shape.dim, range.live, end_of(number) - at);
  }
  // All tiles of `from`, each by one block.
  GLF_DEVICE void store_all(const Quad* from, float* matrix, long long row) const {
#pragma unroll 1
    for (int i = warp; i < 2 * f.shape.half_tiles; i += cluster_warps) {
      if (!stores(i)) continue;
      Rows<1> tile;
      load_record(tile, from + i * 32);
      store_rows(tile, matrix, row, i);
    }
  }

  // to = from A + c, (from − c) A or from A. Returns log|det A|, which a backward does not have. Ends with a barrier.
  template <Offset offset_is>
  GLF_DEVICE float map_rows(const Section& section, const Quad* from, Quad* to) {
    const int tiles = 2 * f.shape.half_tiles;
    float logs = 0;
    by_columns<map, 1>(
        section,
        [&](Rows<1>& sum, const float* offset, int tile) {
          if (offset_is == Offset::added)
            fill(sum, offset + 8 * tile);
          else
            clear(sum);
        },
        [&](auto& rows, int block, const float* offset) {
          constexpr int depth = depth_of(map) / 8;
          load_record(rows, from + block * depth * 32);  // there are whole blocks of them
          if (offset_is == Offset::subtracted) each_number(rows, [&](float& x, int, int column) {
            const int at = 8 * block * depth + column;
            if (at < 8 * tiles) x -= offset[at];
          });
        },
        [&](Rows<1>& sum, const float* offset, int tile) {
          if (offset_is != Offset::none) logs = offset[8 * tiles];
          const int live = end_of(tile) - column_of(tile);
          each_number(sum, [&](float& x, int, int column) {
            if (column >= live) x = 0;
          });
          store_record(sum, to + tile * 32);
        });
    synchronize_block();
    return logs;
  }

  // The parts of (u, t) of p, the first tiles of `rows`: into all blocks' `exchange`. With `keep`, slices of hidden layers go to the
  // workspace, and a' beside them where it cannot be had from them.
  template <bool keep>
  GLF_DEVICE void network(const Quad* rows, int k, const Sections& sections) {
    const FlowShape& s = f.shape;
    const int halves = s.half_tiles, width = slice_tiles(s), context = context_tiles(s);
    constexpr int depth = depth_of(mlp) / 8;
    int column = 0;
    // A tile of a hidden layer, of which it is the number-th.
    const auto activated = [&](Rows<1>& h, Rows<1>& sum, int layer, int number, bool stored) {
      const int left = (s.hidden[layer] + 15) / 16 * 16 - 8 * number, live = keep && stored && left > 0 ? range.live : 0;
      const long long to = keep ? workspace_at(f, k, range, column + 8 * number) : 0;
      with_activation(f.activation, [&](auto kind) { activate<keep, mlp>(h, sum, kind, f, to, live, left); });
      if (keep) store_layer<mlp>(h, f.hidden, to, f.stride, live, left);
    };
    const Section first = sections.section(1);
    with_turns(first.turns(), [&](auto turns) {
      by_columns<mlp, decltype(turns)::value>(
          first, [&](Rows<1>& sum, const float* bias, int tile) { fill(sum, bias + 8 * tile); },
          [&](auto& given, int block, const float*) {
            const int of_p = divided_up(halves, depth);
            if (block < of_p)
              load_tiles(given, rows, block * depth, halves);
            else
              load_tiles(given, spare, (block - of_p) * depth, context);
          },
          [&](Rows<1>& sum, const float*, int line) {
            Rows<1> h;
            const int number = first.sliced ? rank * width + line : line;
            activated(h, sum, 0, number, number >= rank * width && number < (rank + 1) * width);
            store_record(h, (first.sliced ? slice : hidden) + line * 32);
          });
    });
    synchronize_block();
    const Quad* from = hidden;
#pragma unroll 1
    for (int l = 1; l < s.layers; ++l) {
      column += (s.hidden[l - 1] + 15) / 16 * 16;
      const Section section = sections.section(l + 1);
      by_rows(section, from, s.hidden_tiles);
      if (l > 1) taken();
      Rows<1> sum, h;
      if (warp < width) {
        sum_of_warps(sum, section, warp);
        activated(h, sum, l, rank * width + warp, true);
      }
      if (l + 1 < s.layers) {
        begin_sending();
        if (warp < width) send(h, rank * width + warp);
        sent();
        from = exchange;
      } else {
        if (warp < width) store_record(h, slice + warp * 32);
        synchronize_block();
      }
    }
    begin_sending();
    by_columns<mlp, 1>(
        sections.section(sections.last()), [&](Rows<1>& sum, const float* bias, int tile) { fill(sum, bias + 8 * tile); },
        [&](auto& given, int block, const float*) { load_tiles(given, slice, block * depth, width); },
        [&](Rows<1>& sum, const float*, int tile) { send(sum, rank * 2 * halves + tile); });
    sent();
  }

  // All steps on the tiles of `state`. Adds Σ ℓ of the warp's columns to `total`, and returns Σ log|det A|.
  template <bool inverse, bool keep>
  GLF_DEVICE float all_steps(Lane<float> (&total)[2]) {
    const FlowShape& s = f.shape;
    const int halves = s.half_tiles;
    const Sections sections{s, false};
    float logs = 0;
#pragma unroll 1
    for (int n = 0; n < s.steps; ++n) {
      const int k = inverse ? s.steps - 1 - n : n;
      if (keep) store_all(state, f.map_in, k * f.rows + range.first);
      if (!inverse) logs += map_rows<Offset::added>(sections.section(0), state, other);
      Quad *given = inverse ? state : other, *made = inverse ? other : state;
      network<keep>(given, k, sections);
      if (warp < halves) {
        Rows<1> p, v, u, t;
        load_record(p, given + warp * 32);
        load_record(v, given + (halves + warp) * 32);
        clear(u);
        clear(t);
        add_parts(u, warp, 2 * halves);
        add_parts(t, halves + warp, 2 * halves);
        if (keep && stores(warp)) {
          const int raw = workspace_column(s, s.layers);
          store_numbers<mlp>(p, f.hidden, workspace_at(f, k, range, raw + 8 * warp), f.stride, range.live, s.passive() - 8 * warp);
          Quad* record = record_of(f, halves, k, range) + warp * 32;
          store_record(v, record);
          store_record(u, record + halves * 32);
          store_record(t, record + 2 * halves * 32);
        }
        Rows<2> pair = beside(p, v), ut = beside(u, t);
        with_log_scale(f.log_scale, [&](auto kind) { couple<inverse>(pair, ut, total, kind, f, 8 * warp); });
        store_record(p, made + warp * 32);
        store_record(half_of(pair, 1), made + (halves + warp) * 32);
      }
      taken();
      if (keep && s.context && rank == blocks - 1 && warp == cluster_warps - 1)
        copy_context<mlp>(f, range, workspace_at(f, k, range, workspace_column(s, s.layers) + s.passive()));
      synchronize_block();
      if (inverse) logs += map_rows<Offset::subtracted>(sections.section(0), other, state);
    }
    return logs;
  }

  // The rows of `matrix` into `state`, and their context. Ends with a barrier.
  GLF_DEVICE void load_all(const float* matrix) {
#pragma unroll 1
    for (int i = warp; i < 2 * f.shape.half_tiles; i += cluster_warps) {
      Rows<1> tile;
      load_rows(tile, matrix, i);
      store_record(tile, state + i * 32);
    }
    const int columns = f.shape.context;
#pragma unroll 1
    for (int i = warp; i < context_tiles(f.shape); i += cluster_warps) {
      Rows<1> tile;
      load_columns(tile, f.context + range.first * columns, range.live, columns, 8 * i, columns);
      store_record(tile, spare + i * 32);
    }
    synchronize_block();
  }

  // The output, and logdet or the density, of what `all_steps` has left.
  GLF_DEVICE void store_output(Lane<float> (&total)[2], float logs) {
    const int halves = f.shape.half_tiles;
    store_all(state, f.out, range.first);
    if (rank) return;
    if (warp < halves) {
      Rows<1> p, v, sums;
      if (f.density) {
        load_record(p, state + warp * 32);
        load_record(v, state + (halves + warp) * 32);
        add_normal(p, total);
        add_normal(v, total);
      }
      clear(sums);
      sums.c[0][0] = total[0];
      sums.c[0][1] = total[1];
      store_record(sums, partial + warp * 32);
    }
    synchronize_block();
    if (warp) return;
    for (int w = 1; w < halves; ++w) {
      Rows<1> more;
      load_record(more, partial + w * 32);
      total[0] = total[0] + more.c[0][0];
      total[1] = total[1] + more.c[0][1];
    }
    store_logdet(total, logs, f, range);
  }
};

}  // namespace glf::device
