// The kernels of small coupling flows: parameters are packed, then a warp takes 16 rows through all steps, and back.
#pragma once

#include "flow_backward.cuh"
#include "flow_pack.cuh"

namespace glf::device {

// A kernel's argument that is read where it lies, at an index that is known at run time, too.
#ifdef __CUDACC__
#define GLF_ARGUMENT const __grid_constant__
#else
#define GLF_ARGUMENT const
#endif

inline constexpr int flow_threads = 32 * most_warps;  // at most: a block has as many warps as the call says, and one may fill a multiprocessor

// A thread packs 16 bytes of one step: of the forward's parameters, then of the backward's where `transposed` is not null.
GLF_KERNEL(pack_threads)
flow_pack_kernel(GLF_ARGUMENT FlowShape shape, GLF_ARGUMENT FlowParameters given, Quad* packed, Quad* transposed) {
  const int forward = forward_bytes(shape) / 16, back = transposed ? transposed_bytes(shape) / 16 : 0;
  const int blocks = (forward + back + pack_threads - 1) / pack_threads;
  const Packer packer{shape, given, block_index() / blocks};
  Block{}.each_unguarded(pack_threads, [&](int thread) {
    const int quad = static_cast<int>(block_index() % blocks) * pack_threads + thread;
    if (quad < forward)
      packed[packer.k * forward + quad] = packer.forward(quad);
    else if (quad < forward + back)
      transposed[packer.k * back + quad - forward] = packer.backward(quad - forward);
  });
}

// The rows of a warp of this block.
GLF_DEVICE RowRange rows_of(const FlowCall& f, int warp) {
  const long long first = (block_index() * f.warps + warp) * rows_of_warp, left = f.rows - first;
  return {first, static_cast<int>(left < rows_of_warp ? left : rows_of_warp)};
}
// Warps of this block that have rows.
GLF_DEVICE int busy_warps(const FlowCall& f) {
  const long long left = (f.rows + rows_of_warp - 1) / rows_of_warp - block_index() * f.warps;
  return static_cast<int>(left < f.warps ? left : f.warps);
}

template <int half_tiles, int hidden_tiles, int map, int mlp, bool inverse>
GLF_DEVICE void flow_forward(const FlowCall& f) {
  using Kind = FlowKind<half_tiles, hidden_tiles, Precision(map), Precision(mlp)>;
  using Weights = Stream<ForwardOrder>;
  unsigned char* shared = shared_memory();
  const int busy = busy_warps(f), bytes = forward_bytes(f.shape);
  prepared_warps(
      busy, [&] { Weights::prepare(shared, f.slots, busy); },
      [&](int warp) {
        if (warp >= busy) return;
        const RowRange range = rows_of(f, warp);
        const ForwardOrder order{f.packed, bytes, f.shape.steps, inverse};
        Weights weights(order, f.shape.steps, f.slots, bytes, warp, shared);
        typename Kind::State state;
        load_halves(state, f.x + range.first * f.shape.dim, range.live, f.shape.dim);
        Lane<float> total[2] = {Lane<float>(0.0f), Lane<float>(0.0f)};
        const float logs = all_steps<Kind, inverse, false>(state, total, f, range, weights);
        store_halves(state, f.out + range.first * f.shape.dim, range.live, f.shape.dim);
        if (f.density) add_normal(state, total);
        store_logdet(total, logs, f, range);
      });
}

template <int half_tiles, int hidden_tiles, int map, int mlp, bool inverse>
GLF_KERNEL(flow_threads, 1)
flow_forward_kernel(GLF_ARGUMENT FlowCall f) {
  flow_forward<half_tiles, hidden_tiles, map, mlp, inverse>(f);
}

// Where the units of a forward, of a backward, or of both lie.
struct GradientOrder {
  const unsigned char *packed, *transposed;
  int forward, back, steps, passed;  // `passed`: units of the forward, 0 or steps

  GLF_DEVICE const unsigned char* from(int n) const {
    return n < passed ? packed + static_cast<long long>(n) * forward
                      : transposed + static_cast<long long>(passed + steps - 1 - n) * back;
  }
  GLF_DEVICE int bytes(int n) const { return n < passed ? forward : back; }
};

template <int half_tiles, int hidden_tiles, int map, int mlp>
GLF_DEVICE void flow_gradient(const FlowCall& f, int ways) {
  using Kind = FlowKind<half_tiles, hidden_tiles, Precision(map), Precision(mlp)>;
  using Weights = Stream<GradientOrder>;
  unsigned char* shared = shared_memory();
  const int busy = busy_warps(f), dim = f.shape.dim, steps = f.shape.steps;
  const GradientOrder order{f.packed, f.transposed, forward_bytes(f.shape), transposed_bytes(f.shape), steps, ways & forth ? steps : 0};
  const int slot = ways == forth || (ways & forth && order.forward > order.back) ? order.forward : order.back;
  prepared_warps(
      busy, [&] { Weights::prepare(shared, f.slots, busy); },
      [&](int warp) {
        if (warp >= busy) return;
        const RowRange range = rows_of(f, warp);
        Weights weights(order, order.passed + (ways & back ? steps : 0), f.slots, slot, warp, shared);
        typename Kind::State state;
        if (ways & forth) {
          load_halves(state, f.x + range.first * dim, range.live, dim);
          Lane<float> total[2] = {Lane<float>(0.0f), Lane<float>(0.0f)};
          const float logs = all_steps<Kind, false, true>(state, total, f, range, weights);
          store_halves(state, f.out + range.first * dim, range.live, dim);
          if (f.density) add_normal(state, total);
          store_logdet(total, logs, f, range);
        } else {
          load_halves(state, (f.grad_out ? f.grad_out : f.out) + range.first * dim, range.live, dim);
        }
        if (!(ways & back)) return;
        Lane<float> grad_logdet[2];
        on_lanes([&](int lane) {
          for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            of_lane(grad_logdet[half], lane) = row < range.live ? (f.grad_logdet ? f.grad_logdet[range.first + row] : 1.0f) : 0.0f;
          }
        });
        if (!f.grad_out)  // log N(z; 0, I)'s own gradient
#pragma unroll
          for (int i = 0; i < 2 * half_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) state.c[i][e] = Lane<float>(0.0f) - state.c[i][e] * grad_logdet[e / 2];
        all_steps_back<Kind>(state, grad_logdet, f, range, weights);
        store_halves(state, f.grad_x + range.first * dim, range.live, dim);
      });
}

template <int half_tiles, int hidden_tiles, int map, int mlp>
GLF_KERNEL(flow_threads, 1)
flow_gradient_kernel(GLF_ARGUMENT FlowCall f, int ways) {
  flow_gradient<half_tiles, hidden_tiles, map, mlp>(f, ways);
}

}  // namespace glf::device
