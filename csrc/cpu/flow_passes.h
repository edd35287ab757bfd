// A pass over a coupling flow: by panels where its networks are small and rows are enough, else by rows.
#pragma once

#include "flow_panel_backward.h"

namespace glf::GLF_ISA {

template <class T>
void forward(const Flow<T>& flow, Int batch, const T* x, const T* context, T* out, T* logdet, Save save, T* saved,
             Int record_width, const Parallel& parallel) {
  if (batch == 0) return;
  const auto pass = by_panels(flow, batch) ? forward_by_panels<T> : forward_by_rows<T>;
  pass(flow, batch, x, context, out, logdet, save, saved, record_width, parallel);
}

template <class T>
void backward(const Flow<T>& flow, Int batch, const T* out, const T* context, Save save, const T* saved, Int record_width,
              const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context, const Gradients<T>* parameters,
              const Parallel& parallel) {
  if (batch == 0) {
    if (parameters)
      each_gradient(flow, [&](auto tensor, idx size) {
        if (T* of = tensor(*parameters)) std::fill_n(of, size, T(0));
      });
    return;
  }
  const auto pass = by_panels(flow, batch) ? backward_by_panels<T> : backward_by_rows<T>;
  pass(flow, batch, out, context, save, saved, record_width, grad_out, grad_logdet, grad_x, grad_context, parameters, parallel);
}

}  // namespace glf::GLF_ISA
