// A tile of rows through the steps of a flow.
#pragma once

#include "mlp.h"
#include "residual.h"

namespace glf::GLF_ISA {

// [u, t], or t, = network_k([p, context]), with p (rows, P) in a field of the record.
template <class T>
void run_network(const Tile<T>& tile, idx k, idx p) {
  const Flow<T>& flow = tile.flow;
  idx input = p;
  if (flow.context_dim) {
    input = tile.at.input;
    for (idx m = 0; m < tile.rows; ++m) {
      T* row = tile.field(input)[m];
      std::copy_n(tile.read(p)[m], flow.passive(), row);
      std::copy_n(tile.context + m * flow.context_dim, flow.context_dim, row + flow.passive());
    }
  }
  if (flow.network == Network::residual)
    run_residual(tile, k, input);
  else
    run_mlp(tile, k, input);
}

// Couple v (field) into out, leaving the passive columns: logdet may be null.
template <class T>
void run_coupling(const Tile<T>& tile, bool inverse, Rows<const T> v, Rows<T> out, T* logdet, bool accumulate) {
  const idx n = tile.flow.transformed();
  couple_rows(tile.coupling(inverse), tile.rows, n, v, tile.read(tile.at.raw), tile.read(tile.shift()), out, logdet,
              accumulate);
}

// to ← from ± c_k, columns of a whole row.
template <class T>
void add_offset(const Tile<T>& tile, idx k, T sign, Rows<const T> from, Rows<T> to) {
  const idx D = tile.flow.dim;
  const T* c = tile.flow.offset + k * D;
  for (idx m = 0; m < tile.rows; ++m)
    for (idx j = 0; j < D; ++j) to[m][j] = from[m][j] + sign * c[j];
}

// From the step's input x to all other fields of the record; the inverse's log-determinant falls out here.
template <class T>
void fill_record(const Tile<T>& tile, idx k, T* logdet, bool accumulate) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const idx D = flow.dim, P = flow.passive();
  if (!flow.inverse) {
    multiply_by_map(tile, k, false, false, tile.record + at.x, at.width, tile.record + at.y, at.width, flow.offset + k * D);
    run_network(tile, k, at.y);
  } else {
    run_network(tile, k, at.x);
    copy_rows<T>(tile.rows, P, tile.record + at.x, at.width, tile.record + at.y, at.width);
    run_coupling(tile, true, tile.read(at.x + P), tile.field(at.y + P), logdet, accumulate);
    add_offset<T>(tile, k, T(-1), tile.read(at.y), tile.field(at.y));
  }
}

// One step in the flow's direction: from x, given in the record, to the step's output.
template <class T>
void run_step(const Tile<T>& tile, idx k, Rows<T> out, T* logdet, bool accumulate) {
  const Flow<T>& flow = tile.flow;
  const Record& at = tile.at;
  const idx P = flow.passive();
  fill_record(tile, k, logdet, accumulate);
  if (!flow.inverse) {
    copy_rows<T>(tile.rows, P, tile.record + at.y, at.width, out.data, out.ld);
    run_coupling(tile, false, tile.read(at.y + P), {out.data + P, out.ld}, logdet, accumulate);
  } else {
    multiply_by_map<T>(tile, k, false, false, tile.record + at.y, at.width, out.data, out.ld);
  }
}

// logdet += log N(z; 0, I)
template <class T>
void add_density(idx rows, idx D, const T* z, T* logdet) {
  for (idx m = 0; m < rows; ++m) {
    T squares = 0;
    for (idx j = 0; j < D; ++j) squares += z[m * D + j] * z[m * D + j];
    logdet[m] -= T(0.5) * squares + T(D) * T(0.91893853320467274178);  // D/2 log 2π
  }
}

template <class T>
void forward(const Flow<T>& flow, Int batch, const T* x, const T* context, T* out, T* logdet, Save save, T* saved,
             Int record_width, const Parallel& parallel) {
  if (batch == 0) return;
  const Record at = Record::of(flow);
  const Tiling tiling(flow, at, batch, parallel);
  const idx D = flow.dim, K = flow.steps;
  const PerThread<T> memory(tiling.threads, {panel_size(flow), save == Save::records ? 0 : tiling.tile_rows * at.width});
  const Parallel* team = tiling.wide ? &tiling.team : nullptr;
  const AffineMaps<T> maps(flow, batch);
  in_parallel(parallel, tiling.threads, [&](int thread) {
    T *panel = memory.get(thread, 0), *scratch = memory.get(thread, 1);
    tiling.each_tile(thread, batch, [&](idx first, idx rows, bool) {
      for (idx i = 0; i < K; ++i) {
        const idx k = flow.inverse ? K - 1 - i : i;
        const auto record = [&](idx step) {
          return save == Save::records ? saved + (step * batch + first) * record_width : scratch;
        };
        const Tile<T> tile{flow, maps, at, rows, context + first * flow.context_dim, record(k), panel, team, first};
        if (i == 0) copy_rows(rows, D, x + first * D, D, tile.record + at.x, at.width);
        if (save == Save::inputs) copy_rows<T>(rows, D, tile.record + at.x, at.width, saved + (k * batch + first) * D, D);
        // A step's output is the next one's input.
        const Rows<T> next = i + 1 == K ? Rows<T>{out + first * D, D}
                                        : Rows<T>{record(flow.inverse ? k - 1 : k + 1) + at.x, at.width};
        run_step(tile, k, next, logdet + first, i > 0);
      }
      if (flow.density) add_density<T>(rows, D, out + first * D, logdet + first);
    });
  });
}

}  // namespace glf::GLF_ISA
