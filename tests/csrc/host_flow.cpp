// The kernels of small and medium coupling flows on the host, launched by name as in host_kernels.cpp; the warps of a block, and of a
// cluster, are threads.
#include "clusters.h"
#include "cuda/flow_kernels.cuh"
#include "cuda/flow_update.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using namespace glf::device;

template <class Run>
int blocks(long long grid, int shared, Run run) {
  for (long long block = 0; block < grid; ++block) {
    // Exactly as long as asked for: the address sanitizer sees what lies beyond.
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(16, (shared + 16) / 16 * 16));
    std::memset(memory, 0xff, shared);
    host_block = {block, memory};
    run();
    std::free(memory);
  }
  return 0;
}

template <int half, int map, int mlp>
int launch_flow(const std::string& kernel, long long grid, int shared, void** arguments) {
  const FlowCall& f = *static_cast<FlowCall*>(arguments[0]);
  if (kernel == "forward") return blocks(grid, shared, [&] { flow_forward_kernel<half, 8, map, mlp, false>(f); });
  if (kernel == "inverse") return blocks(grid, shared, [&] { flow_forward_kernel<half, 8, map, mlp, true>(f); });
  return blocks(grid, shared, [&] { flow_gradient_kernel<half, 8, map, mlp>(f, *static_cast<int*>(arguments[1])); });
}

template <int half>
int launch_half(int map, int mlp, const std::string& kernel, long long grid, int shared, void** arguments) {
  if (map == 0 && mlp == 0) return launch_flow<half, 0, 0>(kernel, grid, shared, arguments);
  if (map == 1 && mlp == 1) return launch_flow<half, 1, 1>(kernel, grid, shared, arguments);
  if (map == 0 && mlp == 2) return launch_flow<half, 0, 2>(kernel, grid, shared, arguments);
  return 1;
}

template <int map, int mlp>
int launch_cluster(const std::string& kernel, long long grid, int size, int shared, void** arguments) {
  const FlowCall& f = *static_cast<FlowCall*>(arguments[0]);
  if (f.shape.blocks != size || ClusterMemory(f.shape, f.slots).bytes() != shared) return 1;
  launch_clusters(grid, size, shared, [&] {
    if (kernel == "forward")
      cluster_forward_kernel<map, mlp, 0, false>(f);
    else if (kernel == "inverse")
      cluster_forward_kernel<map, mlp, 0, true>(f);
    else
      cluster_gradient_kernel<map, mlp, 0>(f, *static_cast<int*>(arguments[1]));
  });
  return 0;
}

std::vector<int> sizes_of(const std::string& kernel) {
  if (kernel == "pack") return {sizeof(FlowShape), sizeof(FlowParameters), sizeof(void*), sizeof(void*)};
  if (kernel == "gradient") return {sizeof(FlowCall), sizeof(int)};
  if (kernel == "batch") return {sizeof(FlowBatch)};
  if (kernel == "gradients" || kernel == "update") return {sizeof(FlowUpdate)};
  return {sizeof(FlowCall)};
}

}  // namespace

// 0, or 1 for an unknown kernel, 2 for arguments of other sizes. Names: glf::device::flow_…_kernel<numbers>, and cluster_….
extern "C" int launch(const char* name, long long grid, int shared, int count, const int* sizes, void** arguments) {
  const std::string whole = name;
  const bool clusters = whole.find("::cluster_") != std::string::npos;
  std::string kernel = whole.find("true") != std::string::npos ? "inverse" : "forward";
  for (const std::string one : {"pack", "gradient", "batch", "gradients", "update"})
    if (whole.find("_" + one + "_kernel") != std::string::npos) kernel = one;
  if (std::vector<int>(sizes, sizes + count) != sizes_of(kernel)) return 2;
  if (kernel == "pack")
    return blocks(grid, shared, [&] {
      (clusters ? cluster_pack_kernel : flow_pack_kernel)(
          *static_cast<FlowShape*>(arguments[0]), *static_cast<FlowParameters*>(arguments[1]), *static_cast<Quad**>(arguments[2]),
          *static_cast<Quad**>(arguments[3]));
    });
  if (kernel == "batch") return blocks(grid, shared, [&] { flow_batch_kernel(*static_cast<FlowBatch*>(arguments[0])); });
  if (kernel == "gradients" || kernel == "update") {
    const FlowUpdate& u = *static_cast<FlowUpdate*>(arguments[0]);
    if (kernel == "update") return blocks(grid, shared, [&] { flow_update_kernel(u); });
    return grid == gradient_blocks(u) ? blocks(grid, shared, [&] { flow_gradients_kernel(u); }) : 1;
  }
  if (clusters) {
    int map, mlp, size;
    if (std::sscanf(whole.c_str() + whole.find('<'), "<%d, %d, %d", &map, &mlp, &size) != 3) return 1;
    if (map == 0 && mlp == 0) return launch_cluster<0, 0>(kernel, grid, size, shared, arguments);
    if (map == 1 && mlp == 1) return launch_cluster<1, 1>(kernel, grid, size, shared, arguments);
    if (map == 0 && mlp == 2) return launch_cluster<0, 2>(kernel, grid, size, shared, arguments);
    return 1;
  }
  int half, hidden, map, mlp;
  if (std::sscanf(whole.c_str() + whole.find('<'), "<%d, %d, %d, %d", &half, &hidden, &map, &mlp) != 4 || hidden != 8) return 1;
  return half == 1 ? launch_half<1>(map, mlp, kernel, grid, shared, arguments)
                   : launch_half<2>(map, mlp, kernel, grid, shared, arguments);
}

extern "C" void unit_bytes(const FlowShape* shape, int* forward, int* transposed) {
  const bool clusters = shape->blocks > 1;
  *forward = clusters ? static_cast<int>(cluster_bytes(*shape, false)) : forward_bytes(*shape);
  *transposed = clusters ? static_cast<int>(cluster_bytes(*shape, true)) : transposed_bytes(*shape);
}
extern "C" void set_truncating(bool how) { truncating = how; }
extern "C" void set_backwards(bool how) { backwards = how; }
