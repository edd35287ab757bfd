// The largest kernels of small flows (D ≤ 32, H ≤ 64) with one activation and one log-scale, relu and tanh, in the precisions MAP and
// MLP: tools/small_flow_costs.py counts their instructions.
#define GLF_ONE_PATH
#include "cuda/flow_kernels.cuh"

namespace glf::device {

template GLF_KERNEL(flow_threads, 1) flow_forward_kernel<2, 8, MAP, MLP, false>(GLF_ARGUMENT FlowCall);
template GLF_KERNEL(flow_threads, 1) flow_gradient_kernel<2, 8, MAP, MLP>(GLF_ARGUMENT FlowCall, int);

}  // namespace glf::device
