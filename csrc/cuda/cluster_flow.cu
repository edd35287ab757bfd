// Launches of medium coupling flows by clusters of blocks. Precision and direction choose the kernel; sizes are known when it runs.
#include "cluster_kernels.cuh"
#include "flow.h"
#include "outcome.h"

namespace glf::device {

namespace {

// A cluster for sixteen rows, and as many slots for weights as there is room.
template <class... Parameters, class... More>
const char* launch_clusters(void (*kernel)(Parameters...), void* stream, FlowCall call, More... more) {
  const FlowShape& s = call.shape;
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int room = (most - ClusterMemory(s, 0).bytes()) / ClusterMemory::slot_of(s);
  call.slots = room < most_slots ? room : most_slots;
  call.warps = cluster_warps;
  if (call.slots < 2) return "two units of weights do not fit into shared memory";
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && s.blocks > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return words(error);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(s.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(static_cast<unsigned>((call.rows + rows_of_warp - 1) / rows_of_warp * s.blocks));
  how.blockDim = dim3(cluster_threads);
  how.dynamicSmemBytes = ClusterMemory(s, call.slots).bytes();
  how.stream = static_cast<cudaStream_t>(stream);
  how.attrs = &attribute;
  how.numAttrs = 1;
  return words(cudaLaunchKernelEx(&how, kernel, call, more...));
}

template <class F>
const char* with_precision(const FlowShape& s, F f) {
  using P = Precision;
  if (s.map == P::tf32x3 && s.mlp == P::tf32x3) return f(Constant<0>{}, Constant<0>{});
  if (s.map == P::tf32 && s.mlp == P::tf32) return f(Constant<1>{}, Constant<1>{});
  if (s.map == P::tf32x3 && s.mlp == P::bf16) return f(Constant<0>{}, Constant<2>{});
  return "precisions for which there is no kernel";
}

}  // namespace

const char* cluster_pack(void* stream, const FlowShape& shape, const FlowParameters& given, void* packed, void* transposed) {
  const int quads = Sections{shape, false}.step() + (transposed ? Sections{shape, true}.step() : 0);
  const unsigned blocks = shape.steps * divided_up(quads, pack_threads);
  cluster_pack_kernel<<<blocks, pack_threads, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, given, static_cast<Quad*>(packed), static_cast<Quad*>(transposed));
  return outcome();
}

const char* cluster_forward(void* stream, const FlowCall& call, bool inverse) {
  if (!call.rows) return nullptr;
  return with_precision(call.shape, [&](auto map, auto mlp) {
    constexpr int a = decltype(map)::value, b = decltype(mlp)::value;
    return launch_clusters(inverse ? cluster_forward_kernel<a, b, 0, true> : cluster_forward_kernel<a, b, 0, false>, stream, call);
  });
}

const char* cluster_gradient(void* stream, const FlowCall& call, int ways) {
  if (!call.rows) return nullptr;
  return with_precision(call.shape, [&](auto map, auto mlp) {
    return launch_clusters(cluster_gradient_kernel<decltype(map)::value, decltype(mlp)::value, 0>, stream, call, ways);
  });
}

}  // namespace glf::device
