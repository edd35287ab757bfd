// The kernels of medium coupling flows on the host, all warps of a cluster as threads: under sanitizers. Oracle: flows.h.
#include "clusters.h"
#include "flows.h"

namespace {

template <int map, int mlp, int size>
struct Medium {
  FlowShape shape;
  int slots;
  static constexpr int warps = cluster_warps;

  int step_quads(bool back) const { return Sections{shape, back}.step(); }
  void pack(const FlowParameters& given, Quad* packed, Quad* transposed) const {
    launch(shape.steps * divided_up(step_quads(false) + step_quads(true), pack_threads), 0,
           [&] { cluster_pack_kernel(shape, given, packed, transposed); });
  }
  template <class Run>
  void run(const FlowCall& f, Run kernel) const {
    launch_clusters((f.rows + 15) / 16 * size, size, ClusterMemory(shape, slots).bytes(), kernel);
  }
  void forward(const FlowCall& f, bool inverse) const {
    run(f, [&] { inverse ? cluster_forward_kernel<map, mlp, 0, true>(f) : cluster_forward_kernel<map, mlp, 0, false>(f); });
  }
  void gradient(const FlowCall& f, int ways) const {
    run(f, [&] { cluster_gradient_kernel<map, mlp, 0>(f, ways); });
  }
};

template <int map, int mlp, int size>
void try_medium(FlowShape s, long long rows, int slice, int slots, double tolerance) {
  s.half_tiles = (s.dim - s.dim / 2 + 7) / 8;
  s.hidden_tiles = slice * size;
  s.map = Precision(map);
  s.mlp = Precision(mlp);
  s.blocks = size;
  try_flow(Medium<map, mlp, size>{s, slots}, rows, tolerance);
}

}  // namespace

int main() {
  for (const bool order : {false, true}) {
    backwards = order;
    try_medium<0, 0, 4>({2, 40, 5, 2, {64, 33}, 0, 0, {}, {}}, 21, 2, 3, 2e-5);
    try_medium<0, 0, 4>({2, 71, 9, 3, {17, 64, 30}, 0, 0, {}, {}}, 16, 2, 2, 2e-5);
    try_medium<1, 1, 4>({3, 36, 0, 1, {70}, 0, 0, {}, {}}, 17, 4, 4, 1e-2);
    try_medium<0, 2, 4>({2, 128, 33, 2, {200, 129}, 0, 0, {}, {}}, 1, 8, 3, 5e-2);
    try_medium<1, 1, 4>({2, 34, 0, 4, {20, 100, 30, 7}, 0, 0, {}, {}}, 5, 4, 2, 2e-2);
  }
  std::puts("all agree");
}
