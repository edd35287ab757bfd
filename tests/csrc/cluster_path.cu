// The kernels of medium flows with one activation and one log-scale, relu and tanh, in the precisions MAP and MLP:
// tools/medium_flow_costs.py counts their instructions.
#define GLF_ONE_PATH
#include "cuda/cluster_kernels.cuh"

namespace glf::device {

template GLF_KERNEL(cluster_threads, 1) cluster_forward_kernel<MAP, MLP, 0, false>(GLF_ARGUMENT FlowCall);
template GLF_KERNEL(cluster_threads, 1) cluster_gradient_kernel<MAP, MLP, 0>(GLF_ARGUMENT FlowCall, int);

}  // namespace glf::device
