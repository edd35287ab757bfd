// The kernels of small coupling flows on the host, their warps as threads: under sanitizers. Oracle: the flow in double, and its
// derivatives along random directions (flows.h).
#include "flows.h"

namespace {

template <int half, int map, int mlp>
struct Small {
  FlowShape shape;
  int warps, slots;

  int step_quads(bool back) const { return (back ? transposed_bytes(shape) : forward_bytes(shape)) / 16; }
  int blocks(const FlowCall& f) const { return static_cast<int>((f.rows + 16 * warps - 1) / (16 * warps)); }
  void pack(const FlowParameters& given, Quad* packed, Quad* transposed) const {
    launch(shape.steps * ((step_quads(false) + step_quads(true) + pack_threads - 1) / pack_threads), 0,
           [&] { flow_pack_kernel(shape, given, packed, transposed); });
  }
  void forward(const FlowCall& f, bool inverse) const {
    launch(blocks(f), stream_bytes(slots, 16 * step_quads(false)), [&] {
      inverse ? flow_forward_kernel<half, 8, map, mlp, true>(f) : flow_forward_kernel<half, 8, map, mlp, false>(f);
    });
  }
  void gradient(const FlowCall& f, int ways) const {
    const int forward = ways & forth ? step_quads(false) : 0, transposed = ways & back ? step_quads(true) : 0;
    launch(blocks(f), stream_bytes(slots, 16 * (forward > transposed ? forward : transposed)),
           [&] { flow_gradient_kernel<half, 8, map, mlp>(f, ways); });
  }
};

template <int half, int map, int mlp>
void try_small(FlowShape s, long long rows, int warps, int slots, double tolerance) {
  s.half_tiles = half;
  s.hidden_tiles = 8;
  s.map = Precision(map);
  s.mlp = Precision(mlp);
  try_flow(Small<half, map, mlp>{s, warps, slots}, rows, tolerance);
}

}  // namespace

int main() {
  for (const bool order : {false, true}) {
    backwards = order;
    try_small<2, 0, 0>({3, 20, 5, 2, {64, 33}, 0, 0, {}, {}}, 37, 3, 2, 2e-5);
    try_small<2, 0, 0>({2, 31, 9, 3, {17, 64, 40}, 0, 0, {}, {}}, 16, 1, 3, 2e-5);
    try_small<1, 1, 1>({5, 7, 0, 1, {50}, 0, 0, {}, {}}, 70, 4, 3, 1e-2);
    try_small<1, 1, 1>({2, 2, 33, 1, {5}, 0, 0, {}, {}}, 1, 1, 2, 1e-2);
    try_small<2, 0, 2>({3, 32, 2, 2, {64, 64}, 0, 0, {}, {}}, 129, 8, 2, 5e-2);
  }
  std::puts("all agree");
}
