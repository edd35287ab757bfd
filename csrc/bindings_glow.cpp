// The network of Glow's couplings as torch operations.
#include "bindings.h"

#include <utility>

namespace {

using namespace glf::bindings;

// x (B, H, W, C); parameters in the order and with the shapes of glf::GlowNetwork.
template <class T>
glf::GlowNetwork<T> network(const Tensor& x, const Tensors& parameters, double gain_factor) {
  STD_TORCH_CHECK(x.dim() == 4 && parameters.size() == 10, "glf_fast: a Glow network needs images and ten parameters");
  const int64_t channels = x.size(3), hidden = parameters[3].size(0), outputs = parameters[6].size(0);
  const int64_t sizes[] = {hidden * (channels + 1) * 9, hidden, hidden, hidden * hidden, hidden, hidden,
                           outputs * hidden * 9,        outputs * 9,    outputs, outputs};
  for (int i = 0; i < 10; ++i)
    STD_TORCH_CHECK(parameters[i].numel() == sizes[i], "glf_fast: parameters of a Glow network do not fit");
  const auto at = [&](int i) { return read<T>(parameters[i]); };
  return {x.size(1), x.size(2), channels, hidden, outputs, static_cast<T>(gain_factor), at(0), at(1), at(2), at(3),
          at(4),     at(5),     at(6),    at(7),  at(8),   at(9)};
}

Tensor glow_network(Tensor x, Tensors parameters, double gain_factor) {
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2), parameters[6].size(0)});
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().glow_network(network<T>(x, parameters, gain_factor), x.size(0), read<T>(x), write<T>(out),
                                   parallel());
  });
  return out;
}

// ∂x, then the gradients of the parameters.
Tensors glow_network_backward(Tensor grad_out, Tensor x, Tensors parameters, double gain_factor) {
  Tensors found{alike(x)};
  for (const Tensor& parameter : parameters) found.push_back(alike(parameter));
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const glf::GlowNetwork<T> net = network<T>(x, parameters, gain_factor);
    STD_TORCH_CHECK(grad_out.numel() == x.size(0) * x.size(1) * x.size(2) * net.outputs,
                    "glf_fast: the gradient of a Glow network does not fit");
    const auto to = [&](int i) { return write<T>(found[i + 1]); };
    glf::kernels<T>().glow_network_backward(
        net, x.size(0), read<T>(x), read<T>(grad_out), write<T>(found[0]),
        {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8), to(9)}, parallel());
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def("cpu_glow_network(Tensor x, Tensor[] parameters, float gain_factor) -> Tensor");
  m.def("cpu_glow_network_backward(Tensor grad_out, Tensor x, Tensor[] parameters, float gain_factor) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_glow_network", TORCH_BOX(&glow_network));
  m.impl("cpu_glow_network_backward", TORCH_BOX(&glow_network_backward));
}
