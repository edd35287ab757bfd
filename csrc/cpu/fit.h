// Training on a processor: steps of AdamW (arXiv:1711.05101) on the mean of −log p over batches, one after the other in one
// call. All work on rows is done by the kernels; what is here is O(parameters) a step, and belongs to no instruction set.
#pragma once

#include "autoregressive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace glf {

// The affine maps of K steps as functions of what the linear layers and the ActNorms before them store, see
// glf_fast.flow.linear.assemble.
template <class T>
struct Maps {
  enum class Kind { plu, dense, permutation } kind;
  Plu<T> layers;  // of "dense" and "permutation": size, permutation and ActNorms alone
  PluGradients<T> grad;
  const T* weight;  // of "dense", W (K, D, D)
  T* grad_weight;
  T *matrix, *offset, *logabsdet;                // A (K, D, D), c (K, D), log|det A| (K,)
  T *grad_matrix, *grad_offset, *grad_logabsdet;
  T *inverse, *sign;                             // of "dense": W⁻¹, the determinants' signs
  std::int32_t* info;

  Int size() const { return layers.count * layers.dim * layers.dim; }

  void assemble(const Parallel& parallel) {
    if (kind == Kind::plu) return kernels<T>().plu_assemble(layers, matrix, nullptr, offset, logabsdet, parallel);
    if (kind == Kind::dense)
      kernels<T>().slogdet_inverse(layers.count, layers.dim, weight, sign, logabsdet, inverse, info, parallel);
    else
      std::fill_n(matrix, size(), T(0));
    for (Int k = 0; k < layers.count; ++k) kind == Kind::dense ? scale_rows(k) : permute(k);
  }

  // From ∂A, ∂c and ∂log|det A| to the gradients of what is stored.
  void backward(const Parallel& parallel) {
    if (kind == Kind::plu)
      return kernels<T>().plu_assemble_backward(layers, matrix, nullptr, grad_matrix, nullptr, grad_offset, grad_logabsdet,
                                                grad, parallel);
    for (Int k = 0; k < layers.count; ++k) kind == Kind::dense ? scale_rows_backward(k) : permute_backward(k);
  }

 private:
  T scale(Int i) const { return layers.log_scale ? std::exp(layers.log_scale[i]) : T(1); }

  // A = diag(e^s) W, c = b A.
  void scale_rows(Int k) {
    const Int D = layers.dim;
    T* c = offset + k * D;
    std::fill_n(c, D, T(0));
    for (Int i = k * D; i < (k + 1) * D; ++i) {
      const T s = scale(i), b = layers.bias ? layers.bias[i] : T(0);
      for (Int j = 0; j < D; ++j) {
        matrix[i * D + j] = s * weight[i * D + j];
        c[j] += b * matrix[i * D + j];
      }
      if (layers.log_scale) logabsdet[k] += layers.log_scale[i];
    }
  }

  void scale_rows_backward(Int k) {
    const Int D = layers.dim;
    const T* g_c = grad_offset + k * D;
    for (Int i = 0; i < D; ++i) {
      const Int row = k * D + i;
      const T s = scale(row), b = layers.bias ? layers.bias[row] : T(0);
      T g_scale = 0, g_bias = 0;
      for (Int j = 0; j < D; ++j) {
        const T a = matrix[row * D + j], g = grad_matrix[row * D + j] + b * g_c[j];
        g_scale += g * a;
        g_bias += g_c[j] * a;
        grad_weight[row * D + j] = s * g + grad_logabsdet[k] * inverse[(k * D + j) * D + i];
      }
      if (grad.log_scale) grad.log_scale[row] = g_scale + grad_logabsdet[k];
      if (grad.bias) grad.bias[row] = g_bias;
    }
  }

  // Column j of A has one entry, e^s, in row permutation[j].
  void permute(Int k) {
    const Int D = layers.dim;
    logabsdet[k] = 0;
    for (Int j = 0; j < D; ++j) {
      const Int row = k * D + layers.permutation[k * D + j];
      matrix[row * D + j] = scale(row);
      offset[k * D + j] = layers.bias ? layers.bias[row] * scale(row) : T(0);
      if (layers.log_scale) logabsdet[k] += layers.log_scale[row];
    }
  }

  void permute_backward(Int k) {
    const Int D = layers.dim;
    for (Int j = 0; j < D; ++j) {
      const Int row = k * D + layers.permutation[k * D + j];
      const T a = matrix[row * D + j], g_c = grad_offset[k * D + j];
      if (grad.log_scale) grad.log_scale[row] = grad_matrix[row * D + j] * a + g_c * offset[k * D + j] + grad_logabsdet[k];
      if (grad.bias) grad.bias[row] = g_c * a;
    }
  }
};

// A parameter, its gradient, and Adam's means of gradients and of their squares; these two are null where it is frozen.
template <class T>
struct Trained {
  Int size;
  T *value, *grad, *mean, *square;
};

struct AdamW {
  double beta1, beta2, epsilon, weight_decay;
  double clip;  // the longest gradient, over all parameters; ∞ for any
};

// Calls f(first, end) for ranges of n elements. A thread is woken for at least 2¹⁷ elements.
template <class F>
void over_elements(Int n, const Parallel& parallel, F f) {
  const Int threads = std::clamp<Int>(n >> 17, 1, parallel.threads);
  if (threads == 1) return f(Int{0}, n);
  const auto task = [&](Int i) { f(n * i / threads, n * (i + 1) / threads); };
  parallel.run(static_cast<int>(threads), [](void* context, int i) { (*static_cast<decltype(task)*>(context))(i); },
               const_cast<void*>(static_cast<const void*>(&task)));
}

// In blocks, so that it is exact enough in float32, and the same whatever the vectors.
template <class T>
double sum_of_squares(Int n, const T* x) {
  double total = 0;
  for (Int start = 0; start < n; start += 4096) {
    const Int end = std::min<Int>(n, start + 4096), whole = start + (end - start) / 16 * 16;
    T lane[16] = {};
    for (Int i = start; i < whole; i += 16)
      for (int j = 0; j < 16; ++j) lane[j] += x[i + j] * x[i + j];
    for (Int i = whole; i < end; ++i) lane[0] += x[i] * x[i];
    for (const T part : lane) total += part;
  }
  return total;
}

// What AdamW multiplies by in one step.
template <class T>
struct AdamWFactors {
  T shrink;          // of the gradient
  T fresh1, fresh2;  // 1 − β₁, 1 − β₂
  T beta2, keep, size, root, epsilon;

  AdamWFactors(const AdamW& by, double rate, Int step, double shrink_)
      : shrink(static_cast<T>(shrink_)), fresh1(static_cast<T>(1 - by.beta1)), fresh2(static_cast<T>(1 - by.beta2)),
        beta2(static_cast<T>(by.beta2)), keep(static_cast<T>(1 - rate * by.weight_decay)),
        size(static_cast<T>(rate / (1 - std::pow(by.beta1, static_cast<double>(step))))),
        root(static_cast<T>(1 / std::sqrt(1 - std::pow(by.beta2, static_cast<double>(step))))),
        epsilon(static_cast<T>(by.epsilon)) {}
};

// torch.optim.AdamW's step of n numbers. A function of its own: inlined into others it is not vectorised, and was 11 % of a
// step of D = 8, H = 50 (Zen 3) where it is 2 %.
template <class T>
__attribute__((noinline)) void adamw(Int n, T* __restrict value, T* __restrict mean, T* __restrict square,
                                     const T* __restrict grad, const AdamWFactors<T> f) {
  for (Int i = 0; i < n; ++i) {
    const T g = f.shrink * grad[i];
    const T m = mean[i] + f.fresh1 * (g - mean[i]), v = f.beta2 * square[i] + f.fresh2 * g * g;
    mean[i] = m;
    square[i] = v;
    value[i] = f.keep * value[i] - f.size * m / (std::sqrt(v) * f.root + f.epsilon);
  }
}

// The rows that are trained on: x (N, D), context (N, C), weights (N,); the last two may be null.
template <class T>
struct Dataset {
  const T *x, *context, *weights;
};

// The passes of a density of either kind of flow, from and to the memory of one Training.
template <class T>
struct Batch {
  Int rows;
  T *x, *context, *out, *log_prob, *grad_log_prob, *grad_x, *grad_context;  // the contexts are null without one
  Save save;
  Int record;  // numbers that are saved of a row and step
  T* saved;
};

template <class T>
void forward_pass(const Flow<T>& flow, const Batch<T>& b, const Parallel& parallel) {
  kernels<T>().forward(flow, b.rows, b.x, b.context, b.out, b.log_prob, b.save, b.saved, b.record, parallel);
}

template <class T>
void forward_pass(const Autoregressive<T>& flow, const Batch<T>& b, const Parallel& parallel) {
  kernels<T>().autoregressive(flow, b.rows, b.x, b.context, b.out, b.log_prob, b.save, b.saved, parallel);
}

template <class T>
void backward_pass(const Flow<T>& flow, const Batch<T>& b, const Gradients<T>& to, const Parallel& parallel) {
  kernels<T>().backward(flow, b.rows, b.out, b.context, b.save, b.saved, b.record, nullptr, b.grad_log_prob, b.grad_x,
                        b.grad_context, &to, parallel);
}

template <class T>
void backward_pass(const Autoregressive<T>& flow, const Batch<T>& b, const AutoregressiveGradients<T>& to,
                   const Parallel& parallel) {
  kernels<T>().autoregressive_backward(flow, b.rows, b.out, b.context, b.save, b.saved, nullptr, b.grad_log_prob, b.grad_x,
                                       nullptr, &to, parallel);
}

// Rows whose values are saved together, as those of a panel are; and how many numbers a row's records have.
template <class T>
Int saved_together(const Flow<T>&) {
  return 1;
}
template <class T>
Int saved_together(const Autoregressive<T>&) {
  return rows_of_panel<T>();
}
template <class T>
Int record_numbers(const Flow<T>& flow) {
  return record_width(flow);
}
template <class T>
Int record_numbers(const Autoregressive<T>& flow) {
  return record_units(flow);
}

template <class T>
Gradients<T> gradients_of(const Flow<T>&);
template <class T>
AutoregressiveGradients<T> gradients_of(const Autoregressive<T>&);
template <class F>
using GradientsOf = decltype(gradients_of(std::declval<F>()));

// Steps of one flow F at one batch size, with the memory for them.
template <class T, class F>
class Training {
 public:
  // Records are kept if all of them are at most `records_limit` bytes. take(n) gives memory for n numbers that lives as long
  // as this does.
  template <class Take>
  Training(const F& flow, const Maps<T>& maps, const GradientsOf<F>& networks, std::vector<Trained<T>> parameters, Int batch,
           Int records_limit, Take take)
      : flow_(flow), maps_(maps), grad_(networks), parameters_(std::move(parameters)) {
    const Int D = flow.dim, C = flow.context_dim, together = saved_together(flow), numbers = record_numbers(flow),
              rows = (batch + together - 1) / together * together;
    const bool records = flow.steps * batch * numbers * Int(sizeof(T)) <= records_limit;
    const Int record = records ? numbers : D;
    const auto context = [&] { return C ? take(batch * C) : nullptr; };
    batch_ = {batch, take(batch * D), context(), take(batch * D), take(batch), take(batch), take(batch * D), context(),
              records ? Save::records : Save::inputs, record, take(flow.steps * rows * record)};
    flow_.matrix = maps.matrix;
    flow_.offset = maps.offset;
    grad_.matrix = maps.grad_matrix;
    grad_.offset = maps.grad_offset;
  }

  // One step from a batch of rows, the `number`-th since the start; `loss` is from before it. Where the loss or its gradient
  // is not finite nothing is changed, and it returns false.
  bool step(const Dataset<T>& data, const std::int64_t* batch, double rate, Int number, const AdamW& by, double* loss,
            const Parallel& parallel) {
    gather(data, batch);
    maps_.assemble(parallel);
    forward_pass(flow_, batch_, parallel);
    double logabsdet = 0, total = 0, weight = 0;
    for (Int k = 0; k < flow_.steps; ++k) logabsdet += maps_.logabsdet[k];
    for (Int m = 0; m < batch_.rows; ++m) {
      total += double(batch_.grad_log_prob[m]) * (batch_.log_prob[m] + logabsdet);
      weight += batch_.grad_log_prob[m];
    }
    *loss = total;
    if (!std::isfinite(total)) return false;
    backward_pass(flow_, batch_, grad_, parallel);
    std::fill_n(maps_.grad_logabsdet, flow_.steps, static_cast<T>(weight));
    maps_.backward(parallel);

    double squares = 0;
    for (const Trained<T>& p : parameters_)
      if (p.mean) squares += sum_of_squares(p.size, p.grad);
    if (!std::isfinite(squares)) return false;
    const double shrink = std::min(1.0, by.clip / (std::sqrt(squares) + 1e-6));  // as torch.nn.utils.clip_grad_norm_
    const AdamWFactors<T> factors(by, rate, number, shrink);
    for (const Trained<T>& p : parameters_)
      if (p.mean)
        over_elements(p.size, parallel, [&](Int first, Int end) {
          adamw(end - first, p.value + first, p.mean + first, p.square + first, p.grad + first, factors);
        });
    return true;
  }

 private:
  // The batch's rows side by side, and ∂loss/∂log p of each: −weight/B.
  void gather(const Dataset<T>& data, const std::int64_t* batch) {
    const Int D = flow_.dim, C = flow_.context_dim;
    for (Int m = 0; m < batch_.rows; ++m) {
      std::copy_n(data.x + batch[m] * D, D, batch_.x + m * D);
      std::copy_n(data.context + batch[m] * C, C, batch_.context + m * C);
      batch_.grad_log_prob[m] = (data.weights ? -data.weights[batch[m]] : T(-1)) / static_cast<T>(batch_.rows);
    }
  }

  F flow_;
  Maps<T> maps_;
  GradientsOf<F> grad_;
  std::vector<Trained<T>> parameters_;
  Batch<T> batch_;
};

}  // namespace glf
