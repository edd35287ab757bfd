// The largest kernels of small flows with one activation and one log-scale, relu and tanh: their instructions are counted.
#define GLF_ONE_PATH
#include "cuda/flow_kernels.cuh"

namespace glf::device {

#define GLF_PATH(map, mlp)                                                                    \
  template GLF_KERNEL(flow_threads, 1) flow_forward_kernel<2, 8, map, mlp, false>(GLF_ARGUMENT FlowCall); \
  template GLF_KERNEL(flow_threads, 1) flow_gradient_kernel<2, 8, map, mlp>(GLF_ARGUMENT FlowCall, int);
GLF_PATH(0, 0)
GLF_PATH(1, 1)
GLF_PATH(0, 2)

}  // namespace glf::device
