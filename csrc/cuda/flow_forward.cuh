// A small coupling flow, one warp for 16 rows through all steps: data → noise, or with `inverse` noise → data.
//
// For each step, (p, v) = x A + c; (u, t) = MLP([p, context]); x ← [p, v·e^f(u) + t], or the inverse of all that. Activations never
// leave registers (row_tiles.cuh), weights come through shared memory a step or two ahead (stream.cuh), and no warp waits for
// another one.
#pragma once

#include "flow_call.cuh"
#include "stream.cuh"

namespace glf::device {

// What a kernel knows of a flow when it is compiled.
template <int half_tiles_, int hidden_tiles_, Precision map_, Precision mlp_>
struct FlowKind {
  static constexpr int half_tiles = half_tiles_, hidden_tiles = hidden_tiles_;
  static constexpr Precision map = map_, mlp = mlp_;
  static constexpr Layout layout{half_tiles, hidden_tiles, map, mlp};
  using State = Rows<2 * half_tiles>;  // p, then v; or u, then t
  using Half = Rows<half_tiles>;
  using Hidden = Rows<hidden_tiles>;
};

template <int N>
GLF_DEVICE Rows<N / 2> half_of(const Rows<N>& rows, int half) {
  Rows<N / 2> found;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) found.c[i][e] = rows.c[half * (N / 2) + i][e];
  return found;
}

// -- the workspace, in the type of the MLP's operands ------------------------------------------------------------------

// Where a layer of a step lies: the row `first` of the warp, and the column at which the layer begins.
GLF_DEVICE long long workspace_at(const FlowCall& f, int k, const RowRange& range, int column) {
  return (static_cast<long long>(k) * f.rows + range.first) * f.stride + column;
}

// Columns < `columns` of tiles, two numbers side by side at once: `at`, the stride and `columns` are multiples of 16.
template <Precision p, int N>
GLF_DEVICE void store_layer(Rows<N>& rows, void* workspace, long long at, int stride, int live, int columns) {
  each_row([&](int lane, int half, int row, int column) {
    if (row >= live) return;
    const long long first = (at + row * stride + column) / 2;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (8 * i >= columns) continue;
      const float x = of_lane(rows.c[i][2 * half], lane), y = of_lane(rows.c[i][2 * half + 1], lane);
      if constexpr (p == Precision::bf16)
        (static_cast<Word*>(workspace) + first)[4 * i] = bf16_pair(x, y);
      else
        (static_cast<Pair*>(workspace) + first)[4 * i] = {x, y};
    }
  });
}

// And back; zero where nothing was stored.
template <Precision p, int N>
GLF_DEVICE void load_layer(Rows<N>& rows, const void* workspace, long long at, int stride, int live, int columns) {
  each_row([&](int lane, int half, int row, int column) {
    const long long first = (at + row * stride + column) / 2;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Pair found{0, 0};
      if (row < live && 8 * i < columns) {
        if constexpr (p == Precision::bf16) {
          const Word both = (static_cast<const Word*>(workspace) + first)[4 * i];
          found = {as_float(both << 16), as_float(both & 0xffff0000u)};
        } else {
          found = (static_cast<const Pair*>(workspace) + first)[4 * i];
        }
      }
      of_lane(rows.c[i][2 * half], lane) = found.first;
      of_lane(rows.c[i][2 * half + 1], lane) = found.second;
    }
  });
}

// Columns < `columns` of tiles, at any place.
template <Precision p, int N>
GLF_DEVICE void store_numbers(Rows<N>& rows, void* workspace, long long at, int stride, int live, int columns) {
  each_row([&](int lane, int half, int row, int column) {
    if (row >= live) return;
    const long long first = at + row * stride + column;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * i + column + e >= columns) continue;
        const float x = of_lane(rows.c[i][2 * half + e], lane);
        if constexpr (p == Precision::bf16)
          (static_cast<unsigned short*>(workspace) + first)[8 * i + e] = static_cast<unsigned short>(bf16_pair(x, 0.0f));
        else
          (static_cast<float*>(workspace) + first)[8 * i + e] = x;
      }
  });
}

// The context behind p: from there on the gradient of W₀ is one product.
template <Precision p>
GLF_DEVICE void copy_context(const FlowCall& f, const RowRange& range, long long at) {
  const int columns = f.shape.context;
#pragma unroll 1
  for (int start = 0; start < columns; start += 8) {
    Rows<1> given;
    load_columns(given, f.context + range.first * columns, range.live, columns, start, columns);
    store_numbers<p>(given, f.hidden, at + start, f.stride, range.live, columns - start);
  }
}

// -- what the backward needs besides, each lane's own numbers in the order of its registers -----------------------------

template <int N>
GLF_DEVICE void store_record(const Rows<N>& rows, Quad* record) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      auto& c = const_cast<Rows<N>&>(rows).c[i];
      record[i * 32 + lane] = {bits_of(of_lane(c[0], lane)), bits_of(of_lane(c[1], lane)), bits_of(of_lane(c[2], lane)),
                               bits_of(of_lane(c[3], lane))};
    }
  });
}

template <int N>
GLF_DEVICE void load_record(Rows<N>& rows, const Quad* record) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Quad q = record[i * 32 + lane];
      of_lane(rows.c[i][0], lane) = as_float(q.x);
      of_lane(rows.c[i][1], lane) = as_float(q.y);
      of_lane(rows.c[i][2], lane) = as_float(q.z);
      of_lane(rows.c[i][3], lane) = as_float(q.w);
    }
  });
}

// The record of sixteen rows at a step: v, u, t.
GLF_DEVICE Quad* record_of(const FlowCall& f, int half_tiles, int k, const RowRange& range) {
  const long long warps = (f.rows + rows_of_warp - 1) / rows_of_warp, warp = range.first / rows_of_warp;
  return f.record + (k * warps + warp) * (3 * half_tiles * 32);
}

// -- a step ------------------------------------------------------------------------------------------------------------

// sum += context · W₀'s rows of it, a block's depth of columns at a time: rows that never change, read again at each step.
template <Precision p, int N>
GLF_DEVICE void context_product(Rows<N>& sum, const FlowCall& f, const RowRange& range, const Quad* weight) {
  constexpr int tiles = depth_of(p) / 8;
  const int columns = f.shape.context;
#pragma unroll 1
  for (int start = 0; start < columns; start += 8 * tiles, weight += N * block_quads) {
    Rows<tiles> given;
    load_columns(given, f.context + range.first * columns, range.live, columns, start, columns);
    product<p>(sum, given, weight);
  }
}

// h = a(x). With `keep`, a'(x) goes where it is no function of a(x), as of silu, to the workspace.
template <bool keep, Precision p, int N, Activation kind>
GLF_DEVICE void activate(Rows<N>& h, Rows<N>& x, Constant<kind>, const FlowCall& f, long long to, int live, int padded) {
  if constexpr (keep && needs_argument(kind)) {
    each_pair(h, x, [](float& slope, float& from) { slope = slope_at<kind>(from); });
    store_layer<p>(h, f.derivatives, to, f.stride, live, padded);
  }
  each_pair(h, x, [](float& y, float& from) { y = activated<kind>(from); });
}

// [u, t] of p. With `keep`, hidden layers go to the workspace, and a' beside them where it cannot be had from them.
template <class Kind, bool keep>
GLF_DEVICE void network(typename Kind::State& ut, typename Kind::Half& p, const FlowCall& f, const RowRange& range, int k,
                        const unsigned char* unit) {
  constexpr Layout at = Kind::layout;
  const Quad* quads = reinterpret_cast<const Quad*>(unit);
  const FlowShape& s = f.shape;
  typename Kind::Hidden h;
  int kept_at = 0;
#pragma unroll 1
  for (int l = 0; l < s.layers; ++l) {
    typename Kind::Hidden next;
    fill(next, reinterpret_cast<const float*>(quads + at.at_bias(l)));
    if (l == 0) {
      product<Kind::mlp>(next, p, quads + at.at_first());
      if (s.context) context_product<Kind::mlp>(next, f, range, quads + at.at_context(s.layers));
    } else {
      product<Kind::mlp>(next, h, quads + at.at_inner(s.layers, l));
    }
    const int padded = (s.hidden[l] + 15) / 16 * 16;
    const long long to = keep ? workspace_at(f, k, range, kept_at) : 0;
    with_activation(f.activation, [&](auto kind) { activate<keep, Kind::mlp>(h, next, kind, f, to, range.live, padded); });
    if (keep) store_layer<Kind::mlp>(h, f.hidden, to, f.stride, range.live, padded);
    kept_at += padded;
  }
  fill(ut, reinterpret_cast<const float*>(quads + at.at_out_bias()));
  product<Kind::mlp>(ut, h, quads + at.at_out());
}

// ℓ and the coupling: v becomes w, or with `inverse` w becomes v. Adds this lane's ℓ of its two rows to `total`. The tiles of v, u
// and t are those from column `first` on.
template <bool inverse, int N, LogScale kind>
GLF_DEVICE void couple(Rows<N>& state, Rows<N>& ut, Lane<float> (&total)[2], Constant<kind>, const FlowCall& f,
                       int first = 0) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float u = of_lane(ut.c[i][e], lane), t = of_lane(ut.c[N / 2 + i][e], lane);
        float& v = of_lane(state.c[N / 2 + i][e], lane);
        // A factor, not a condition: a condition becomes a branch for each number, and they wait for one another.
        const float there = first + 8 * i + lane % 4 * 2 + e % 2 < f.shape.transformed() ? 1.0f : 0.0f;
        const float ell = (inverse ? -there : there) * log_scale<kind>(u, f.constant);
        const float scale = exponential(ell);
        v = inverse ? (f.add_first ? v * scale - t : (v - t) * scale) : (f.add_first ? (v + t) * scale : v * scale + t);
        of_lane(total[e / 2], lane) += ell;
      }
  });
}

// Where the units of the forward lie: steps in their order, or the other way round.
struct ForwardOrder {
  const unsigned char* first;
  int step_bytes, steps;
  bool backwards;

  GLF_DEVICE const unsigned char* from(int n) const {
    return first + static_cast<long long>(backwards ? steps - 1 - n : n) * step_bytes;
  }
  GLF_DEVICE int bytes(int) const { return step_bytes; }
};

// All steps on `state`. Adds Σ ℓ to `total`, in which four lanes share a row, and returns Σ log|det A|.
template <class Kind, bool inverse, bool keep, class Order>
GLF_DEVICE float all_steps(typename Kind::State& state, Lane<float> (&total)[2], const FlowCall& f, const RowRange& range,
                           Stream<Order>& stream) {
  constexpr Layout at = Kind::layout;
  const int steps = f.shape.steps, dim = f.shape.dim;
  float logs = 0;
#pragma unroll 1
  for (int n = 0; n < steps; ++n) {
    const int k = inverse ? steps - 1 - n : n;
    if (keep) store_halves(state, f.map_in + (k * f.rows + range.first) * dim, range.live, dim);
    const unsigned char* unit = stream.next();
    const Quad* quads = reinterpret_cast<const Quad*>(unit);
    const float* offset = reinterpret_cast<const float*>(unit);
    if (!inverse) {
      typename Kind::State y;
      fill(y, offset);
      product<Kind::map>(y, state, quads + at.at_map());
      keep_halves(y, dim);
      state = y;
    }
    typename Kind::Half p = half_of(state, 0);
    typename Kind::State ut;
    network<Kind, keep>(ut, p, f, range, k, unit);
    if (keep) {
      const int raw = workspace_column(f.shape, f.shape.layers), passive = f.shape.passive();
      store_numbers<Kind::mlp>(p, f.hidden, workspace_at(f, k, range, raw), f.stride, range.live, passive);
      copy_context<Kind::mlp>(f, range, workspace_at(f, k, range, raw + passive));
      store_record(half_of(state, 1), record_of(f, Kind::half_tiles, k, range));
      store_record(ut, record_of(f, Kind::half_tiles, k, range) + Kind::half_tiles * 32);
    }
    with_log_scale(f.log_scale, [&](auto kind) { couple<inverse>(state, ut, total, kind, f); });
    logs += reinterpret_cast<const float*>(quads + at.at_log())[0];
    if (inverse) {
      typename Kind::State x;
      typename Kind::State negative;
      fill(negative, offset);
      each_pair(state, negative, [](float& y, float& c) { y -= c; });
      clear(x);
      product<Kind::map>(x, state, quads + at.at_map());
      keep_halves(x, dim);
      state = x;
    }
    stream.release();
  }
  return logs;
}

// log N(state; 0, I), but for its constant.
template <int N>
GLF_DEVICE void add_normal(Rows<N>& state, Lane<float> (&total)[2]) {
  on_lanes([&](int lane) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float z = of_lane(state.c[i][e], lane);
        of_lane(total[e / 2], lane) -= 0.5f * z * z;
      }
  });
}

// logdet of the warp's rows; with f.density `total` has log N(z; 0, I) in it, but for its constant.
GLF_DEVICE void store_logdet(Lane<float> (&total)[2], float logs, const FlowCall& f, const RowRange& range) {
  if (f.density) logs -= f.shape.dim * 0.91893853f;  // D/2 log 2π
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Lane<float> sum = total[half];
    sum = sum + shuffle_xor(sum, 1);
    sum = sum + shuffle_xor(sum, 2);
    on_lanes([&](int lane) {
      const int row = lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < range.live) f.logdet[range.first + row] = of_lane(sum, lane) + logs;
    });
  }
}

}  // namespace glf::device
