// Glow's couplings and their networks as torch operations.
#include "bindings.h"

#include <tuple>
#include <utility>

namespace {

using namespace glf::bindings;

// For images x (B, H, W, …), of which it is given so many channels; parameters in the order and with the shapes of glf::GlowNetwork.
template <class T>
glf::GlowNetwork<T> network(const Tensor& x, int64_t channels, const Tensors& parameters, double gain_factor) {
  STD_TORCH_CHECK(x.dim() == 4 && parameters.size() == 10, "glf_fast: a Glow network needs images and ten parameters");
  const int64_t hidden = parameters[3].size(0), outputs = parameters[6].size(0);
  const int64_t sizes[] = {hidden * (channels + 1) * 9, hidden, hidden, hidden * hidden, hidden, hidden,
                           outputs * hidden * 9,        outputs * 9,    outputs, outputs};
  for (int i = 0; i < 10; ++i)
    STD_TORCH_CHECK(parameters[i].numel() == sizes[i], "glf_fast: parameters of a Glow network do not fit");
  const auto at = [&](int i) { return read<T>(parameters[i]); };
  return {x.size(1), x.size(2), channels, hidden, outputs, static_cast<T>(gain_factor), at(0), at(1), at(2), at(3),
          at(4),     at(5),     at(6),    at(7),  at(8),   at(9)};
}

// Where the gradients of the parameters go, behind that of x.
template <class T>
glf::GlowGradients<T> gradients(const Tensors& found) {
  const auto to = [&](int i) { return write<T>(found[i + 1]); };
  return {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8), to(9)};
}

Tensor glow_network(Tensor x, Tensors parameters, double gain_factor) {
  STD_TORCH_CHECK(x.dim() == 4 && parameters.size() == 10, "glf_fast: a Glow network needs images and ten parameters");
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2), parameters[6].size(0)});
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().glow_network(network<T>(x, x.size(3), parameters, gain_factor), x.size(0), read<T>(x), write<T>(out),
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
    const glf::GlowNetwork<T> net = network<T>(x, x.size(3), parameters, gain_factor);
    STD_TORCH_CHECK(grad_out.numel() == x.size(0) * x.size(1) * x.size(2) * net.outputs,
                    "glf_fast: the gradient of a Glow network does not fit");
    glf::kernels<T>().glow_network_backward(net, x.size(0), read<T>(x), read<T>(grad_out), write<T>(found[0]),
                                            gradients<T>(found), parallel());
  });
  return found;
}

// The coupling's sizes fit those of its network.
template <class T>
glf::GlowNetwork<T> network_of_coupling(const Tensor& x, const Tensors& parameters, double gain_factor, int64_t log_scale) {
  STD_TORCH_CHECK(x.dim() == 4 && parameters.size() == 10, "glf_fast: a Glow coupling needs images and ten parameters");
  STD_TORCH_CHECK(log_scale >= 0 && log_scale < glf::log_scales, "glf_fast: unknown functions");
  const int64_t outputs = parameters[6].size(0), given = x.size(3) - outputs / 2;
  STD_TORCH_CHECK(outputs % 2 == 0 && given > 0, "glf_fast: the network's outputs do not fit the images");
  return network<T>(x, given, parameters, gain_factor);
}

template <class T>
glf::Coupling<T> affine(int64_t log_scale, double constant, bool add_first, bool inverse) {
  return {glf::Kind::affine, static_cast<glf::LogScale>(log_scale), static_cast<T>(constant), add_first, inverse, {}};
}

// y, logdet, and what the network made.
std::tuple<Tensor, Tensor, Tensor> glow_coupling(Tensor x, Tensors parameters, double gain_factor, bool v_first, int64_t log_scale,
                                                 double constant, bool add_first, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4 && parameters.size() == 10, "glf_fast: a Glow coupling needs images and ten parameters");
  Tensor y = alike(x), logdet = empty(x, {x.size(0)});
  Tensor raw = empty(x, {x.size(0), x.size(1), x.size(2), parameters[6].size(0)});
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().glow_coupling(network_of_coupling<T>(x, parameters, gain_factor, log_scale),
                                    affine<T>(log_scale, constant, add_first, inverse), v_first, x.size(0), read<T>(x), write<T>(y),
                                    write<T>(logdet), write<T>(raw), parallel());
  });
  return {y, logdet, raw};
}

// ∂x, then the gradients of the parameters.
Tensors glow_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw, Tensors parameters, double gain_factor,
                               bool v_first, int64_t log_scale, double constant, bool add_first, bool inverse) {
  Tensors found{alike(x)};
  for (const Tensor& parameter : parameters) found.push_back(alike(parameter));
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const glf::GlowNetwork<T> net = network_of_coupling<T>(x, parameters, gain_factor, log_scale);
    STD_TORCH_CHECK(grad_y.sizes().equals(x.sizes()) && grad_logdet.numel() == x.size(0) &&
                        raw.numel() == x.size(0) * x.size(1) * x.size(2) * net.outputs,
                    "glf_fast: the gradients of a Glow coupling do not fit");
    glf::kernels<T>().glow_coupling_backward(net, affine<T>(log_scale, constant, add_first, inverse), v_first, x.size(0), read<T>(x),
                                             read<T>(raw), read<T>(grad_y), read<T>(grad_logdet), write<T>(found[0]),
                                             gradients<T>(found), parallel());
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def("cpu_glow_network(Tensor x, Tensor[] parameters, float gain_factor) -> Tensor");
  m.def("cpu_glow_network_backward(Tensor grad_out, Tensor x, Tensor[] parameters, float gain_factor) -> Tensor[]");
  m.def(
      "cpu_glow_coupling(Tensor x, Tensor[] parameters, float gain_factor, bool v_first, int log_scale, float constant, "
      "bool add_first, bool inverse) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_glow_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw, Tensor[] parameters, "
      "float gain_factor, bool v_first, int log_scale, float constant, bool add_first, bool inverse) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_glow_network", TORCH_BOX(&glow_network));
  m.impl("cpu_glow_network_backward", TORCH_BOX(&glow_network_backward));
  m.impl("cpu_glow_coupling", TORCH_BOX(&glow_coupling));
  m.impl("cpu_glow_coupling_backward", TORCH_BOX(&glow_coupling_backward));
}
