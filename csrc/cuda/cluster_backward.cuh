// The way back through a medium flow, by the cluster that went forward or by another one: ∂x, and the workspace of the weights'
// gradients. Nothing is computed again, as in flow_backward.cuh.
//
// Each block makes its slices of the hidden layers' gradients. The slices of all layers but the first are exchanged, and then the
// parts of ∂p, and of ∂context, that each block's slice of ∂h₀ makes: as many exchanges as there are hidden layers.
#pragma once

#include "cluster_forward.cuh"
#include "flow_backward.cuh"

namespace glf::device {

// ∂z to `state`, where a forward has left z if `there`: given, or that of a density. Ends with a barrier.
template <class Team>
GLF_DEVICE void begin_back(Team& team, Lane<float> (&grad_logdet)[2], bool there) {
  const FlowCall& f = team.f;
  on_lanes([&](int lane) {
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      of_lane(grad_logdet[half], lane) = row < team.range.live ? (f.grad_logdet ? f.grad_logdet[team.range.first + row] : 1.0f) : 0.0f;
    }
  });
#pragma unroll 1
  for (int i = team.warp; i < 2 * f.shape.half_tiles; i += cluster_warps) {
    Rows<1> tile;
    if (there && !f.grad_out)
      load_record(tile, team.state + i * 32);
    else
      team.load_rows(tile, f.grad_out ? f.grad_out : f.out, i);
    if (!f.grad_out)  // log N(z; 0, I)'s own gradient
#pragma unroll
      for (int e = 0; e < 4; ++e) tile.c[0][e] = Lane<float>(0.0f) - tile.c[0][e] * grad_logdet[e / 2];
    store_record(tile, team.state + i * 32);
  }
  synchronize_block();
}

// All steps, the last one first: the gradient in `state` becomes that of their input.
template <class Team>
GLF_DEVICE void all_steps_back(Team& team, Lane<float> (&grad_logdet)[2]) {
  constexpr Precision mlp = Team::mlp;
  const FlowCall& f = team.f;
  const FlowShape& s = f.shape;
  const RowRange& range = team.range;
  const int halves = s.half_tiles, width = slice_tiles(s), rank = team.rank, warp = team.warp, raw = workspace_column(s, s.layers);
  const int context = context_tiles(s), sums = halves + context;
  const Sections sections{s, true};
  const void* kept_in = needs_argument(f.activation) ? f.derivatives : f.hidden;
  Quad* const of_raw = team.spare;  // ∂u, then ∂t
  Rows<1> v, u, t;
  const auto load = [&](int k) {
    if (warp >= halves) return;
    const Quad* record = record_of(f, halves, k, range) + warp * 32;
    load_record(v, record);
    load_record(u, record + halves * 32);
    load_record(t, record + 2 * halves * 32);
  };
  load(s.steps - 1);
#pragma unroll 1
  for (int n = 0; n < s.steps; ++n) {
    const int k = s.steps - 1 - n;
    if (warp < halves) {
      Rows<1> of_w;
      load_record(of_w, team.state + (halves + warp) * 32);
      Rows<2> gradient = beside(of_w, of_w), ut = beside(u, t);
      with_log_scale(f.log_scale, [&](auto kind) { couple_back(gradient, ut, v, grad_logdet, kind, f, 8 * warp); });
      store_record(half_of(gradient, 1), team.state + (halves + warp) * 32);
      Rows<1> of_u = half_of(ut, 0), of_t = half_of(ut, 1);
      store_record(of_u, of_raw + warp * 32);
      store_record(of_t, of_raw + (halves + warp) * 32);
      if (team.stores(warp)) {
        const long long row = workspace_at(f, k, range, raw + 8 * warp);
        const int left = s.transformed() - 8 * warp;
        store_numbers<mlp>(of_u, f.slopes, row, f.stride, range.live, left);
        store_numbers<mlp>(of_t, f.slopes, row + s.transformed(), f.stride, range.live, left);
      }
    }
    synchronize_block();
    int column = raw;
#pragma unroll 1
    for (int l = s.layers - 1; l >= 0; --l) {
      const int padded = (s.hidden[l] + 15) / 16 * 16, left = padded - 8 * (rank * width + warp);
      column -= padded;
      const int live = warp < width && left > 0 ? range.live : 0;
      const long long at = workspace_at(f, k, range, column + 8 * (rank * width + warp));
      Rows<1> kept, gradient;
      load_layer<mlp>(kept, kept_in, at, f.stride, live, left);  // arrives while the product is made
      const bool outer = l == s.layers - 1;
      const Section section = sections.section(outer ? sections.last() : l + 2);
      team.by_rows(section, outer ? of_raw : team.exchange, outer ? 2 * halves : s.hidden_tiles);
      if (!outer) team.taken();
      if (warp < width) {
        team.sum_of_warps(gradient, section, warp);
        with_activation(f.activation, [&](auto kind) { times_slopes(gradient, kept, kind); });
        store_layer<mlp>(gradient, f.slopes, at, f.stride, live, left);
        if (l == 0) store_record(gradient, team.slice + warp * 32);
      }
      if (l > 0) {
        team.begin_sending();
        if (warp < width) team.send(gradient, rank * width + warp);
        team.sent();
      } else {
        synchronize_block();
      }
    }
    if (n + 1 < s.steps) load(k - 1);
    team.begin_sending();
    team.template by_columns<mlp, 1>(
        sections.section(1), [](Rows<1>& sum, const float*, int) { clear(sum); },
        [&](auto& rows, int block, const float*) { team.load_tiles(rows, team.slice, block * (depth_of(mlp) / 8), width); },
        [&](Rows<1>& sum, const float*, int tile) { team.send(sum, rank * sums + tile); });
    team.sent();
    if (warp < halves) {
      Rows<1> of_p;
      load_record(of_p, team.state + warp * 32);
      team.add_parts(of_p, warp, sums);
      store_record(of_p, team.state + warp * 32);
    }
    if (f.grad_context && warp < context && team.stores(warp)) {
      Rows<1> sum;
      clear(sum);
      team.add_parts(sum, halves + warp, sums);
      float* to = f.grad_context + range.first * s.context + 8 * warp;
      each_number(sum, [&](float& x, int row, int at) {
        if (row >= range.live || 8 * warp + at >= s.context) return;
        float& total = to[row * s.context + at];
        total = n ? total + x : x;
      });
    }
    team.taken();
    synchronize_block();
    team.store_all(team.state, f.map_grad, k * f.rows + range.first);
    team.template map_rows<Offset::none>(sections.section(0), team.state, team.other);
    Quad* const made = team.other;
    team.other = team.state;
    team.state = made;
  }
}

}  // namespace glf::device
