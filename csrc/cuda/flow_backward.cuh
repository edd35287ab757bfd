// The way back through a small flow, by the warp that went forward or by another one: ∂x, and the workspace of the weights' gradients.
//
// The forward has kept the hidden layers and, in a record, v, u and t of every step; nothing is computed again. Each lane reads
// what the same lane of the forward wrote, so that both ways may be one launch without a barrier.
#pragma once

#include "flow_forward.cuh"

namespace glf::device {

// ∂u and ∂t, in the place of u and t; ∂v, in the place of ∂w in `gradient`: of the tiles from column `first` on.
template <int N, LogScale kind>
GLF_DEVICE void couple_back(Rows<N>& gradient, Rows<N>& ut, Rows<N / 2>& v, Lane<float> (&grad_logdet)[2], Constant<kind>,
                            const FlowCall& f, int first = 0) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float &u = of_lane(ut.c[i][e], lane), &t = of_lane(ut.c[N / 2 + i][e], lane);
        float& g = of_lane(gradient.c[N / 2 + i][e], lane);
        const float given = of_lane(v.c[i][e], lane), of_logdet = of_lane(grad_logdet[e / 2], lane);
        const float there = first + 8 * i + lane % 4 * 2 + e % 2 < f.shape.transformed() ? 1.0f : 0.0f;
        const float scaled = g * exponential(there * log_scale<kind>(u, f.constant));
        const float of_ell = scaled * (f.add_first ? given + t : given) + of_logdet;
        u = there * (of_ell * log_scale_slope<kind>(u, f.constant));
        t = f.add_first ? scaled : g;  // zero where g is
        g = scaled;
      }
  });
}

template <int N, Activation kind>
GLF_DEVICE void times_slopes(Rows<N>& gradient, Rows<N>& kept, Constant<kind>) {
  each_pair(gradient, kept, [](float& g, float& from) { g = times_slope<kind>(g, from); });
}

// ∂context (+)= ∂h₁ · W₀'s rows of itᵀ, a tile of columns at a time.
template <class Kind>
GLF_DEVICE void context_gradient(const typename Kind::Hidden& gradient, const FlowCall& f, const RowRange& range, const Quad* weight,
                                 bool first) {
  const int columns = f.shape.context, tiles = (columns + 7) / 8;
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    Rows<1> sum;
    clear(sum);
    product<Kind::mlp>(sum, gradient, weight + i * block_quads, tiles);
    float* to = f.grad_context + range.first * columns + 8 * i;
    each_number(sum, [&](float& x, int row, int column) {
      if (row >= range.live || 8 * i + column >= columns) return;
      float& total = to[row * columns + column];
      total = first ? x : total + x;
    });
  }
}

// All steps, the last one first: `gradient` becomes that of their output, then that of their input.
template <class Kind, class Order>
GLF_DEVICE void all_steps_back(typename Kind::State& gradient, Lane<float> (&grad_logdet)[2], const FlowCall& f,
                               const RowRange& range, Stream<Order>& stream) {
  constexpr Layout at = Kind::layout;
  constexpr int half_tiles = Kind::half_tiles;
  const FlowShape& s = f.shape;
  const int raw = workspace_column(s, s.layers);
  const void* kept_in = needs_argument(f.activation) ? f.derivatives : f.hidden;
  typename Kind::Half v;
  typename Kind::State ut;
  load_record(v, record_of(f, half_tiles, s.steps - 1, range));
  load_record(ut, record_of(f, half_tiles, s.steps - 1, range) + half_tiles * 32);
#pragma unroll 1
  for (int n = 0; n < s.steps; ++n) {
    const int k = s.steps - 1 - n;
    with_log_scale(f.log_scale, [&](auto kind) { couple_back(gradient, ut, v, grad_logdet, kind, f); });
    typename Kind::Half of_u = half_of(ut, 0), of_t = half_of(ut, 1);
    const long long row = workspace_at(f, k, range, raw);
    store_numbers<Kind::mlp>(of_u, f.slopes, row, f.stride, range.live, s.transformed());
    store_numbers<Kind::mlp>(of_t, f.slopes, row + s.transformed(), f.stride, range.live, s.transformed());
    const Quad* quads = reinterpret_cast<const Quad*>(stream.next());
    typename Kind::Hidden of_hidden;
    int column = raw;
#pragma unroll 1
    for (int l = s.layers - 1; l >= 0; --l) {
      const int padded = (s.hidden[l] + 15) / 16 * 16;
      column -= padded;
      const long long layer = workspace_at(f, k, range, column);
      typename Kind::Hidden kept, next;
      // Arrives while the product is made; of split products, whose small terms have registers of their own, behind it.
      constexpr bool early = Kind::mlp != Precision::tf32x3;
      if (early) load_layer<Kind::mlp>(kept, kept_in, layer, f.stride, range.live, padded);
      clear(next);
      if (l == s.layers - 1)
        product<Kind::mlp>(next, ut, quads + at.at_out_back());
      else
        product<Kind::mlp>(next, of_hidden, quads + at.at_inner_back(l + 1));
      if (!early) load_layer<Kind::mlp>(kept, kept_in, layer, f.stride, range.live, padded);
      with_activation(f.activation, [&](auto kind) { times_slopes(next, kept, kind); });
      of_hidden = next;
      store_layer<Kind::mlp>(of_hidden, f.slopes, layer, f.stride, range.live, padded);
    }
    if (n + 1 < s.steps) {  // what the next step begins with
      load_record(v, record_of(f, half_tiles, k - 1, range));
      load_record(ut, record_of(f, half_tiles, k - 1, range) + half_tiles * 32);
    }
    typename Kind::Half of_p = half_of(gradient, 0);
    product<Kind::mlp>(of_p, of_hidden, quads + at.at_first_back());
#pragma unroll
    for (int i = 0; i < half_tiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) gradient.c[i][e] = of_p.c[i][e];
    if (f.grad_context) context_gradient<Kind>(of_hidden, f, range, quads + at.at_context_back(s.layers), n == 0);
    store_halves(gradient, f.map_grad + (k * f.rows + range.first) * s.dim, range.live, s.dim);
    typename Kind::State before;
    clear(before);
    product<Kind::map>(before, gradient, quads);
    gradient = before;
    stream.release();
  }
}

}  // namespace glf::device
