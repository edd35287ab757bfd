// The network of Glow's couplings as torch operations.
#include "bindings.h"

#include <tuple>

namespace {

using namespace glf::bindings;

// x (B, H, W, C); weights as in glf::GlowNetwork; offset (H, W, O).
template <class T>
glf::GlowNetwork<T> network(const Tensor& x, const Tensor& first, const Tensor& first_bias, const Tensor& second,
                            const Tensor& second_bias, const Tensor& last, const Tensor& offset) {
  STD_TORCH_CHECK(x.dim() == 4 && offset.dim() == 3 && first.dim() == 2 && second.dim() == 2 && last.dim() == 2,
                  "glf_fast: a Glow network needs images");
  const int64_t hidden = second.size(0), outputs = offset.size(2);
  STD_TORCH_CHECK(offset.size(0) == x.size(1) && offset.size(1) == x.size(2) && first.size(0) == 9 * x.size(3) &&
                      first.size(1) == hidden && second.size(1) == hidden && first_bias.numel() == hidden &&
                      second_bias.numel() == hidden && last.size(0) == hidden && last.size(1) == 9 * outputs,
                  "glf_fast: weights of a Glow network do not fit");
  return {x.size(1),     x.size(2),           x.size(3),       hidden,        outputs,        read<T>(first),
          read<T>(first_bias), read<T>(second), read<T>(second_bias), read<T>(last), read<T>(offset)};
}

Tensor glow_network(Tensor x, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, Tensor last,
                    Tensor offset) {
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2), offset.size(2)});
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().glow_network(network<T>(x, first, first_bias, second, second_bias, last, offset), x.size(0),
                                   read<T>(x), write<T>(out), parallel());
  });
  return out;
}

// ∂x, and the gradients of first, first_bias, second, second_bias, last.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_network_backward(Tensor grad_out, Tensor x, Tensor first,
                                                                                 Tensor first_bias, Tensor second,
                                                                                 Tensor second_bias, Tensor last,
                                                                                 Tensor offset) {
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.numel() == x.size(0) * offset.numel(),
                  "glf_fast: the gradient of a Glow network does not fit");
  Tensor grad_x = alike(x), to_first = alike(first), to_first_bias = alike(first_bias), to_second = alike(second);
  Tensor to_second_bias = alike(second_bias), to_last = alike(last);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().glow_network_backward(
        network<T>(x, first, first_bias, second, second_bias, last, offset), x.size(0), read<T>(x), read<T>(grad_out),
        write<T>(grad_x),
        {write<T>(to_first), write<T>(to_first_bias), write<T>(to_second), write<T>(to_second_bias), write<T>(to_last)},
        parallel());
  });
  return {grad_x, to_first, to_first_bias, to_second, to_second_bias, to_last};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def(
      "cpu_glow_network(Tensor x, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, Tensor last, "
      "Tensor offset) -> Tensor");
  m.def(
      "cpu_glow_network_backward(Tensor grad_out, Tensor x, Tensor first, Tensor first_bias, Tensor second, "
      "Tensor second_bias, Tensor last, Tensor offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_glow_network", TORCH_BOX(&glow_network));
  m.impl("cpu_glow_network_backward", TORCH_BOX(&glow_network_backward));
}
