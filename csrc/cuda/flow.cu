// Launches of small coupling flows. Sizes, precision and direction choose the kernel.
#include "flow.h"
#include "flow_kernels.cuh"
#include "outcome.h"

namespace glf::device {

namespace {

// The current GPU: multiprocessors, and bytes of shared memory that a block may ask for.
struct Gpu {
  int processors = 1, most = 0;
  Gpu() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
};

// As many warps a block as spread the rows over the whole GPU, and as many slots for weights as there is room.
template <class Kernel, class... More>
const char* launch_rows(Kernel kernel, void* stream, FlowCall call, int slot_bytes, More... more) {
  const Gpu gpu;
  const long long warps = (call.rows + rows_of_warp - 1) / rows_of_warp;
  const long long spread = (warps + gpu.processors - 1) / gpu.processors;
  call.warps = static_cast<int>(spread < most_warps ? spread : most_warps);
  const int room = (gpu.most - barrier_bytes) / slot_bytes;
  call.slots = room < step_slots ? room : step_slots;
  if (call.slots < 2) return "the weights of two steps do not fit into shared memory";
  // As much as there is, whatever this call needs: another thread may be between its own attribute and its launch.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gpu.most);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<static_cast<unsigned>((warps + call.warps - 1) / call.warps), 32 * call.warps, stream_bytes(call.slots, slot_bytes),
           static_cast<cudaStream_t>(stream)>>>(call, more...);
  return outcome();
}

// Calls f with the constants of FlowKind: those that are compiled.
template <int half_tiles, class F>
const char* with_precision(const FlowShape& s, F f) {
  using P = Precision;
  if (s.hidden_tiles != 8) return "hidden layers of more than 64 numbers";
  if (s.map == P::tf32x3 && s.mlp == P::tf32x3) return f(FlowKind<half_tiles, 8, P::tf32x3, P::tf32x3>{});
  if (s.map == P::tf32 && s.mlp == P::tf32) return f(FlowKind<half_tiles, 8, P::tf32, P::tf32>{});
  if (s.map == P::tf32x3 && s.mlp == P::bf16) return f(FlowKind<half_tiles, 8, P::tf32x3, P::bf16>{});
  return "precisions for which there is no kernel";
}

template <class F>
const char* with_kind(const FlowShape& s, F f) {
  if (s.half_tiles == 1) return with_precision<1>(s, f);
  return s.half_tiles == 2 ? with_precision<2>(s, f) : "more than 32 columns";
}

}  // namespace

const char* flow_pack(void* stream, const FlowShape& shape, const FlowParameters& given, void* packed, void* transposed) {
  const int quads = (forward_bytes(shape) + (transposed ? transposed_bytes(shape) : 0)) / 16;
  const unsigned blocks = shape.steps * ((quads + pack_threads - 1) / pack_threads);
  flow_pack_kernel<<<blocks, pack_threads, 0, static_cast<cudaStream_t>(stream)>>>(shape, given, static_cast<Quad*>(packed),
                                                                                 static_cast<Quad*>(transposed));
  return outcome();
}

const char* flow_forward(void* stream, const FlowCall& call, bool inverse) {
  if (!call.rows) return nullptr;
  return with_kind(call.shape, [&](auto kind) {
    using K = decltype(kind);
    constexpr int half = K::half_tiles, hidden = K::hidden_tiles, map = int(K::map), mlp = int(K::mlp);
    return launch_rows(inverse ? flow_forward_kernel<half, hidden, map, mlp, true> : flow_forward_kernel<half, hidden, map, mlp, false>,
                       stream, call, forward_bytes(call.shape));
  });
}

const char* flow_gradient(void* stream, const FlowCall& call, int ways) {
  if (!call.rows) return nullptr;
  const int forward = forward_bytes(call.shape), transposed = transposed_bytes(call.shape);
  const int slot = ways == forth || (ways & forth && forward > transposed) ? forward : transposed;
  return with_kind(call.shape, [&](auto kind) {
    using K = decltype(kind);
    return launch_rows(flow_gradient_kernel<K::half_tiles, K::hidden_tiles, int(K::map), int(K::mlp)>, stream, call, slot, ways);
  });
}

}  // namespace glf::device
