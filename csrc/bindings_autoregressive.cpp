// Masked autoregressive flows as torch operations: see bindings.cpp.
#include "bindings_flow.h"

#include <tuple>

namespace {

using namespace glf::bindings;

struct __attribute__((visibility("hidden"))) Arguments {
  const Tensor &matrix, &offset;
  const MaskedNetworks networks;
  const Maybe& context;
  bool inverse, density;

  template <class T>
  glf::Autoregressive<T> flow(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && matrix.dim() == 3 && matrix.size(0) > 0 && x.size(1) > 0 && matrix.size(1) == x.size(1) &&
                        matrix.size(2) == x.size(1) && offset.dim() == 2 && offset.size(0) == matrix.size(0) &&
                        offset.size(1) == x.size(1) && (!context || (context->dim() == 2 && context->size(0) == x.size(0))),
                    "glf_fast: shapes of the rows, the maps and the context do not fit");
    auto f = networks.flow<T>(matrix.size(0), x.size(1), context);
    f.matrix = read<T>(matrix);
    f.offset = read<T>(offset);
    f.inverse = inverse;
    f.density = density;
    return f;
  }
};

// Panels of rows, as saved values are kept.
template <class T>
int64_t panels_of(int64_t batch) {
  const int64_t rows = glf::rows_of_panel<T>();
  return (batch + rows - 1) / rows;
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_flow(Tensor x, Tensor matrix, Tensor offset, Tensors weights, Tensors biases,
                                                       Tensor fan_in, std::optional<Tensor> context, int64_t transform,
                                                       int64_t network, int64_t activation, double activation_constant,
                                                       int64_t log_scale, double constant, std::vector<double> spline,
                                                       bool context_layer, bool inverse,
                                                       bool density, int64_t save, int64_t units) {
  const Arguments arguments{matrix, offset, {weights, biases, fan_in, transform, network, activation, activation_constant,
                            log_scale, constant, context_layer, spline}, context, inverse, density};
  const int64_t batch = x.size(0);
  const auto mode = static_cast<glf::Save>(save);
  Tensor out = alike(x), logdet = empty(x, {batch}), saved;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto flow = arguments.flow<T>(x);
    const int64_t size = mode == glf::Save::records ? glf::record_units(flow) : flow.dim;
    STD_TORCH_CHECK(mode == glf::Save::nothing || units == size, "glf_fast: a record has ", size, " units, not ", units);
    saved = mode == glf::Save::nothing ? empty(x, {0})
                                       : empty(x, {flow.steps, panels_of<T>(batch), units, glf::rows_of_panel<T>()});
    glf::kernels<T>().autoregressive(flow, batch, read<T>(x), read<T>(context), write<T>(out), write<T>(logdet), mode,
                                     write<T>(saved), parallel());
  });
  return {out, logdet, saved};
}

// ∂x, ∂context (empty without one, or where it is not wanted) and, with `parameters`, ∂matrix, ∂offset, ∂weights …, ∂biases …
// Without ∂out it is that of the density: out is read.
Tensors autoregressive_flow_backward(std::optional<Tensor> grad_out, Tensor grad_logdet, Tensor out, Tensor saved, Tensor matrix,
                                     Tensor offset, Tensors weights, Tensors biases, Tensor fan_in,
                                     std::optional<Tensor> context, int64_t transform, int64_t network, int64_t activation,
                                     double activation_constant, int64_t log_scale, double constant,
                                     std::vector<double> spline, bool context_layer,
                                     bool inverse, int64_t save, bool parameters, bool of_context) {
  const Arguments arguments{matrix, offset, {weights, biases, fan_in, transform, network, activation, activation_constant,
                            log_scale, constant, context_layer, spline}, context, inverse, !grad_out};
  const auto mode = static_cast<glf::Save>(save);
  of_context = of_context && context;
  Tensors grads{alike(out), of_context ? alike(*context) : empty(out, {0})};
  if (parameters) {
    grads.push_back(alike(matrix));
    grads.push_back(alike(offset));
    for (const Tensor& w : weights) grads.push_back(alike(w));
    for (const Tensor& b : biases) grads.push_back(alike(b));
  }
  for_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const auto flow = arguments.flow<T>(out);
    const int64_t size = mode == glf::Save::records ? glf::record_units(flow) : flow.dim;
    STD_TORCH_CHECK((!grad_out || grad_out->numel() == out.numel()) && grad_logdet.numel() == out.size(0) &&
                        mode != glf::Save::nothing &&
                        saved.numel() == flow.steps * panels_of<T>(out.size(0)) * size * glf::rows_of_panel<T>(),
                    "glf_fast: gradients or saved values do not fit the output");
    glf::AutoregressiveGradients<T> target{};
    if (parameters) {
      target.matrix = write<T>(grads[2]);
      target.offset = write<T>(grads[3]);
      for (int i = 0; i < flow.all_layers(); ++i) {
        target.weight[i] = write<T>(grads[4 + i]);
        target.bias[i] = write<T>(grads[4 + weights.size() + i]);
      }
    }
    glf::kernels<T>().autoregressive_backward(flow, out.size(0), read<T>(out), read<T>(context), mode, read<T>(saved),
                                              grad_out ? read<T>(*grad_out) : nullptr, read<T>(grad_logdet),
                                              write<T>(grads[0]), of_context ? write<T>(grads[1]) : nullptr,
                                              parameters ? &target : nullptr, parallel());
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def(
      "cpu_autoregressive_flow(Tensor x, Tensor matrix, Tensor offset, Tensor[] weights, Tensor[] biases, Tensor fan_in, "
      "Tensor? context, int transform, int network, int activation, float activation_constant, int log_scale, float constant, "
      "float[] spline, bool context_layer, bool inverse, bool density, int save, int units) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_autoregressive_flow_backward(Tensor? grad_out, Tensor grad_logdet, Tensor out, Tensor saved, Tensor matrix, "
      "Tensor offset, Tensor[] weights, Tensor[] biases, Tensor fan_in, Tensor? context, int transform, int network, "
      "int activation, float activation_constant, int log_scale, float constant, float[] spline, bool context_layer, "
      "bool inverse, int save, bool parameters, bool of_context) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_autoregressive_flow", TORCH_BOX(&autoregressive_flow));
  m.impl("cpu_autoregressive_flow_backward", TORCH_BOX(&autoregressive_flow_backward));
}
