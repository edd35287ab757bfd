// The kernels of medium coupling flows: parameters are packed, then a cluster of blocks takes 16 rows through all steps, and back.
#pragma once

#include "cluster_backward.cuh"
#include "cluster_pack.cuh"

namespace glf::device {

inline constexpr int cluster_threads = 32 * cluster_warps;

// A kernel's clusters. CuPy's launches cannot say how large they are; those of cluster_flow.cu do.
#if defined(__CUDACC_RTC__)
#define GLF_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define GLF_CLUSTER(blocks)
#endif

// A thread packs 16 bytes of one step: of the forward's parameters, then of the backward's where `transposed` is not null.
GLF_KERNEL(pack_threads)
cluster_pack_kernel(GLF_ARGUMENT FlowShape shape, GLF_ARGUMENT FlowParameters given, Quad* packed, Quad* transposed) {
  const int forward = Sections{shape, false}.step(), back = transposed ? Sections{shape, true}.step() : 0;
  const int blocks = divided_up(forward + back, pack_threads);
  const ClusterPacker packer{shape, given, block_index() / blocks};
  Block{}.each_unguarded(pack_threads, [&](int thread) {
    const int quad = static_cast<int>(block_index() % blocks) * pack_threads + thread;
    if (quad >= forward + back) return;
    const bool first = quad < forward;
    (first ? packed + packer.k * forward : transposed + packer.k * back - forward)[quad] = packer(!first, first ? quad : quad - forward);
  });
}

// What each warp of a block does: `run(team)`, as a member. The compiler inlines large functions only if they are told to be inlined,
// and lambdas are not.
template <class Team, class Run>
struct ClusterWarp {
  const FlowCall& f;
  ClusterOrder order;
  int units;
  ClusterMemory at;
  unsigned char* shared;
  Run run;

  GLF_DEVICE void operator()(int warp) const {
    const long long first = block_index() / f.shape.blocks * rows_of_warp, left = f.rows - first;
    const RowRange range{first, static_cast<int>(left < rows_of_warp ? left : rows_of_warp)};
    Stream<ClusterOrder> weights(order, units, at.slots, at.slot_bytes, warp, shared);
    Team team(f, range, warp, at, shared, weights);
    run(team);
    team.begin_sending();  // a block that others may still write to must not end
  }
};

// `ways` as in flow_call.cuh, or 0 for a forward that keeps nothing, or an inverse.
template <int map, int mlp, class Run>
GLF_DEVICE void on_cluster(const FlowCall& f, int ways, bool inverse, Run run) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __trap();
#else
  using Team = ClusterTeam<Precision(map), Precision(mlp)>;
  const FlowShape& s = f.shape;
  const ClusterMemory at(s, f.slots);
  unsigned char* shared = shared_memory();
  const Sections forward{s, false}, transposed{s, true};
  const int forward_units = forward.units(), back_units = transposed.units(), rank = cluster_rank();
  UnitPlace* places = reinterpret_cast<UnitPlace*>(shared + barrier_bytes + at.slots * at.slot_bytes);
  Block{}.each_unguarded(forward_units + back_units, [&](int i) {
    const bool first = i < forward_units;
    places[first ? i : most_cluster_units + i - forward_units] =
        place_of(Sections{s, !first}, inverse, rank, first ? i : i - forward_units);
  });
  const int passed = ways == back ? 0 : s.steps * forward_units, units = passed + (ways & back ? s.steps * back_units : 0);
  const UnitPlace* back_places = places + most_cluster_units;
  const long long step = forward.step(), back_step = transposed.step(), others = s.steps - 1;
  const ClusterOrder order{places, back_places, reinterpret_cast<const Quad*>(f.packed) + (inverse ? others * step : 0),
                           reinterpret_cast<const Quad*>(f.transposed) + (ways & back ? others * back_step : 0),
                           inverse ? -step : step, -back_step,
                           forward_units, back_units, passed};
  prepared_warps(
      cluster_warps, [&] { Stream<ClusterOrder>::prepare(shared, at.slots, cluster_warps); },
      ClusterWarp<Team, Run>{f, order, units, at, shared, run});
#endif
}

template <bool inverse>
struct ClusterForward {
  template <class Team>
  GLF_DEVICE void operator()(Team& team) const {
    Lane<float> total[2] = {Lane<float>(0.0f), Lane<float>(0.0f)};
    team.load_all(team.f.x);
    const float logs = team.template all_steps<inverse, false>(total);
    team.store_output(total, logs);
  }
};

struct ClusterGradient {
  int ways;

  template <class Team>
  GLF_DEVICE void operator()(Team& team) const {
    if (ways & forth) {
      Lane<float> total[2] = {Lane<float>(0.0f), Lane<float>(0.0f)};
      team.load_all(team.f.x);
      const float logs = team.template all_steps<false, true>(total);
      team.store_output(total, logs);
    }
    if (!(ways & back)) return;
    if (ways & forth) {  // the records that other blocks have stored
      team.begin_sending();
      team.sent();
      team.taken();
    }
    Lane<float> grad_logdet[2];
    begin_back(team, grad_logdet, (ways & forth) != 0);
    all_steps_back(team, grad_logdet);
    team.store_all(team.state, team.f.grad_x, team.range.first);
  }
};

template <int map, int mlp, int blocks, bool inverse>
GLF_KERNEL(cluster_threads, 1)
GLF_CLUSTER(blocks) cluster_forward_kernel(GLF_ARGUMENT FlowCall f) {
  on_cluster<map, mlp>(f, 0, inverse, ClusterForward<inverse>{});
}

template <int map, int mlp, int blocks>
GLF_KERNEL(cluster_threads, 1)
GLF_CLUSTER(blocks) cluster_gradient_kernel(GLF_ARGUMENT FlowCall f, int ways) {
  on_cluster<map, mlp>(f, ways, false, ClusterGradient{ways});
}

}  // namespace glf::device
