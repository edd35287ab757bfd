// Panels: as many rows as lie in the lanes of two vectors, one unit after the other. What flows of small networks do with them.
#pragma once

#include "coupling.h"
#include "tile.h"

namespace glf::GLF_ISA {

inline constexpr int NV = 2;  // vectors of a panel
template <class T>
inline constexpr idx panel_rows = NV * lanes<T>;

// Units of a layer, or features.
struct Span {
  idx begin, end;
};

// Calls f(element) for the first of each vector's elements in `units` units.
template <class T, class F>
void each_vector(int vectors, idx units, F f) {
  for (idx u = 0; u < units * panel_rows<T>; u += panel_rows<T>)
    for (idx e = u; e < u + vectors * lanes<T>; e += lanes<T>) f(e);
}

// out (M units) = bias + addend + w [context, in], of C and `depth` units: element (m, k) of w is w[m·w_m + k·w_k]. bias and addend
// may be null, and addend may be out.
template <class T, int M, int V>
__attribute__((noinline)) void cell(idx C, const T* context, idx depth, const T* in, const T* w, idx w_m, idx w_k, const T* bias,
                                    const T* addend, T* out) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const vec<T> start = bias ? broadcast(bias[m]) : vec<T>{};
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = addend ? start + load(addend + m * W + v * L) : start;
  }
  // One loop for both: with two of them the accumulators went to memory and back between.
  for (int part = C ? 0 : 1; part < 2; ++part)
    microkernel<T, M, V>(part ? depth : C, w + part * C * w_k, w_m, w_k, part ? in : context, W, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + m * W + v * L, acc[m][v]);
}

template <class T>
using Cell = void (*)(idx, const T*, idx, const T*, const T*, idx, idx, const T*, const T*, T*);

template <class T, int V, int... M>
inline Cell<T> pick_cell(idx rows, std::integer_sequence<int, M...>) {
  static constexpr Cell<T> table[] = {cell<T, M + 1, V>...};
  return table[rows - 1];
}

// The cell of so many units, up to MR, in a panel with so many vectors of rows.
template <class T>
inline Cell<T> pick_cell(idx units, int vectors) {
  constexpr auto all = std::make_integer_sequence<int, MR>{};
  return vectors == 1 ? pick_cell<T, 1>(units, all) : pick_cell<T, NV>(units, all);
}

// x (rows, n) ↔ units (n, W). Lanes without a row repeat the last one, so that what they compute is as finite as a row.
template <class T>
void load_panel(idx rows, idx n, const T* x, T* units) {
  constexpr idx W = panel_rows<T>;
  const idx used = round_up(rows, lanes<T>);
  for (idx m = 0; m < used; ++m) {
    const T* row = x + std::min(m, rows - 1) * n;
    for (idx j = 0; j < n; ++j) units[j * W + m] = row[j];
  }
}

template <class T>
void store_panel(idx rows, idx n, const T* units, T* x) {
  for (idx m = 0; m < rows; ++m)
    for (idx j = 0; j < n; ++j) x[m * n + j] = units[j * panel_rows<T> + m];
}

// Where networks put what they make of a feature: u and t, in units. Of a spline, its parameters follow each other.
struct RawUnits {
  idx u, t, apart;  // of feature 0; and from one feature to the next
};

// out ← the transform of features v, and logdet (W) += its log-derivatives.
template <class T>
void transform_units(const Coupling<T>& op, int vectors, Span features, RawUnits at, const T* v, const T* raw, T* out, T* logdet) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  const idx used = vectors * L;
  if (op.kind == Kind::spline) {
    const idx n = op.spline.columns();
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        Parameters<T> parameters;
        for (idx j = 0; j < n; ++j) parameters[j] = load(raw + (d * n + j) * W + m);
        const Splined<T> found = spline_lanes<T>(op.spline, parameters, load(v + d * W + m), op.inverse);
        store(out + d * W + m, found.out);
        store(logdet + m, load(logdet + m) + found.ell);
      }
    return;
  }
  with_transform(op, [&](auto transform) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        const T *u = raw + (at.u + d * at.apart) * W + m, *t = raw + (at.t + d * at.apart) * W + m;
        const Coupled<T> found = decltype(transform)::template forward<T>(op, load(v + d * W + m), load(u), load(t));
        store(out + d * W + m, found.out);
        store(logdet + m, load(logdet + m) + found.ell);
      }
  });
}

// From ∂out and ∂logdet to ∂v and ∂raw; v as in transform_units.
template <class T>
void transform_units_backward(const Coupling<T>& op, int vectors, Span features, RawUnits at, const T* v, const T* raw,
                              const T* g_out, const T* g_logdet, T* g_v, T* g_raw) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  const idx used = vectors * L;
  if (op.kind == Kind::spline) {
    const idx n = op.spline.columns();
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        Parameters<T> parameters, grad;
        for (idx j = 0; j < n; ++j) parameters[j] = load(raw + (d * n + j) * W + m);
        store(g_v + d * W + m, spline_lanes_backward<T>(op.spline, parameters, load(v + d * W + m), op.inverse,
                                                        load(g_out + d * W + m), load(g_logdet + m), grad));
        for (idx j = 0; j < n; ++j) store(g_raw + (d * n + j) * W + m, grad[j]);
      }
    return;
  }
  with_transform(op, [&](auto transform) {
    for (idx d = features.begin; d < features.end; ++d)
      for (idx m = 0; m < used; m += L) {
        const idx u = (at.u + d * at.apart) * W + m, t = (at.t + d * at.apart) * W + m, here = d * W + m;
        const CouplingGradients<T> found = decltype(transform)::template backward<T>(
            op, load(v + here), load(raw + u), load(raw + t), load(g_out + here), load(g_logdet + m));
        store(g_v + here, found.v);
        store(g_raw + u, found.u);
        store(g_raw + t, found.t);
      }
  });
}

// A field of every panel of a tile.
template <class T>
struct Fields {
  const T* data;
  idx apart;  // elements from one panel to the next
};

// C (M × cols) = or += the sum over panels and rows of A B: A (rows of units), and B (rows of the memory `turned`).
template <class T, int M, int V>
__attribute__((noinline)) void gradient_cell(idx panels, const idx* vectors, Fields<T> a, const T* b, idx b_k, T* c, idx c_m,
                                             idx cols, bool accumulate) {
  constexpr idx W = panel_rows<T>, L = lanes<T>;
  vec<T> acc[M][V] = {};
  for (idx p = 0; p < panels; ++p)
    microkernel<T, M, V>(vectors[p] * L, a.data + p * a.apart, W, 1, b + p * W * b_k, b_k, acc);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_m + v * L;
      store_part(to, accumulate ? acc[m][v] + load_part(to, cols - v * L) : acc[m][v], cols - v * L);
    }
}

template <class T>
using GradientCell = void (*)(idx, const idx*, Fields<T>, const T*, idx, T*, idx, idx, bool);

template <class T, int V, int... M>
inline GradientCell<T> pick_gradient_cell(idx rows, std::integer_sequence<int, M...>) {
  static constexpr GradientCell<T> table[] = {gradient_cell<T, M + 1, V>...};
  return table[rows - 1];
}

// Gradients of a product: G (inputs, N) = or += the sum over rows of input · g, and with `bias` the sums of sign · g. Input i
// matters to the outputs from `from(i)` on. `turned` is memory for the rows of g.
template <class T, class F>
void weight_gradient(idx panels, const idx* vectors, Fields<T> input, idx inputs, Fields<T> g, idx N, F from, T* G, T* bias,
                     T sign, T* turned, bool accumulate) {
  constexpr idx W = panel_rows<T>, L = lanes<T>, J = 2 * L;
  const idx ld = round_up(N, J);
  for (idx p = 0; p < panels; ++p)
    for (idx m = 0; m < vectors[p] * L; m += L)
      for (idx n = 0; n < ld; n += L) {
        vec<T> square[L];
        for (idx i = 0; i < L; ++i) square[i] = n + i < N ? load(g.data + p * g.apart + (n + i) * W + m) : vec<T>{};
        transpose<T>(square);
        for (idx i = 0; i < L; ++i) store(turned + (p * W + m + i) * ld + n, square[i]);
      }
  if (bias)
    for (idx n = 0; n < N; n += L) {
      vec<T> sum{};
      for (idx p = 0; p < panels; ++p)
        for (idx m = 0; m < vectors[p] * L; ++m) sum += load(turned + (p * W + m) * ld + n);
      sum *= sign;
      store_part(bias + n, accumulate ? sum + load_part(bias + n, N - n) : sum, N - n);
    }
  for (idx i = 0, rows; i < inputs; i += rows) {
    rows = even_rows(inputs - i);
    for (idx j = from(i) / J * J; j < N; j += J) {
      const GradientCell<T> run = N - j > L ? pick_gradient_cell<T, 2>(rows, std::make_integer_sequence<int, MR>{})
                                            : pick_gradient_cell<T, 1>(rows, std::make_integer_sequence<int, MR>{});
      run(panels, vectors, {input.data + i * W, input.apart}, turned + j, ld, G + i * N + j, N, N - j, accumulate);
    }
  }
}

inline constexpr idx most_panels = 8;  // of a tile

// Panels are split over the threads, and a thread's into tiles whose records stay in its L2 cache.
struct PanelTiling {
  int threads;
  idx panels, thread_panels, tile_panels;

  template <class T>
  PanelTiling(idx work, idx batch, idx panel_size, const Parallel& parallel, T) {
    panels = (batch + panel_rows<T> - 1) / panel_rows<T>;
    threads = static_cast<int>(std::clamp<idx>(std::min((work * batch) >> 19, panels), 1, parallel.threads));
    thread_panels = (panels + threads - 1) / threads;
    threads = static_cast<int>((panels + thread_panels - 1) / thread_panels);
    const idx most = std::clamp<idx>((idx{1} << 18) / (panel_size * idx(sizeof(T))), 1, most_panels);
    const idx tiles = (thread_panels + most - 1) / most;
    tile_panels = (thread_panels + tiles - 1) / tiles;
  }

  // Calls f(first panel, panels, is the thread's first tile) for all tiles of one thread, in order.
  template <class F>
  void each_tile(int thread, F f) const {
    const idx begin = thread * thread_panels, end = std::min(panels, begin + thread_panels);
    for (idx p = begin; p < end; p += tile_panels) f(p, std::min(tile_panels, end - p), p == begin);
  }
};

}  // namespace glf::GLF_ISA
