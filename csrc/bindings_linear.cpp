// Invertible linear layers as torch operations.
#include "bindings.h"

#include <tuple>
#include <utility>

namespace {

using namespace glf::bindings;

template <class T>
glf::Plu<T> layers(const Tensor& permutation, const Tensor& lower, const Tensor& upper, const Tensor& log_diag,
                   const Tensor& sign, const Maybe& log_scale, const Maybe& bias) {
  STD_TORCH_CHECK(lower.dim() == 3 && lower.size(2) == lower.size(1) && upper.sizes().equals(lower.sizes()),
                  "glf_fast: lower and upper must be (K, D, D)");
  const int64_t count = lower.size(0), dim = lower.size(1);
  for (const Tensor* vector : {&permutation, &log_diag, &sign, log_scale ? &*log_scale : &sign, bias ? &*bias : &sign})
    STD_TORCH_CHECK(vector->dim() == 2 && vector->size(0) == count && vector->size(1) == dim,
                    "glf_fast: vectors must be (K, D)");
  STD_TORCH_CHECK(!log_scale == !bias, "glf_fast: log_scale and bias belong together");
  const int64_t* indices = read_permutation(permutation);
  std::vector<int64_t> layer_of(dim, -1);  // in which an index was seen last
  for (int64_t i = 0; i < count * dim; ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < dim, "permutation must hold indices from 0 to ", dim - 1, "; got ",
                    indices[i]);
    STD_TORCH_CHECK(std::exchange(layer_of[indices[i]], i / dim) < i / dim,
                    "permutation must hold each index once a layer; got ", indices[i], " twice");
  }
  return {count,         dim,           indices, read<T>(lower), read<T>(upper), read<T>(log_diag),
          read<T>(sign), read<T>(log_scale), read<T>(bias)};
}

// A, A⁻¹ (empty unless asked for), c, log|det A|.
std::tuple<Tensor, Tensor, Tensor, Tensor> plu_assemble(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag,
                                                        Tensor sign, Maybe log_scale, Maybe bias, bool need_inverse) {
  Tensor A = alike(lower), A_inv = need_inverse ? alike(lower) : empty(lower, {0});
  Tensor c = alike(log_diag), logabsdet = empty(lower, {lower.size(0)});
  for_dtype(lower, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().plu_assemble(layers<T>(permutation, lower, upper, log_diag, sign, log_scale, bias), write<T>(A),
                                   need_inverse ? write<T>(A_inv) : nullptr, write<T>(c), write<T>(logabsdet),
                                   parallel());
  });
  return {A, A_inv, c, logabsdet};
}

// ∂lower, ∂upper, ∂log_diag and, with ActNorm, ∂log_scale, ∂bias.
Tensors plu_assemble_backward(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag, Tensor sign,
                              Maybe log_scale, Maybe bias, Tensor A, Maybe A_inv, Maybe grad_A, Maybe grad_A_inv,
                              Maybe grad_c, Maybe grad_logabsdet) {
  STD_TORCH_CHECK(!grad_A_inv || A_inv, "glf_fast: the gradient of A⁻¹ needs A⁻¹");
  Tensors grads{alike(lower), alike(upper), alike(log_diag)};
  if (log_scale) grads.insert(grads.end(), {alike(log_diag), alike(log_diag)});
  for_dtype(lower, [&](auto zero) {
    using T = decltype(zero);
    const glf::PluGradients<T> target{write<T>(grads[0]), write<T>(grads[1]), write<T>(grads[2]),
                                      log_scale ? write<T>(grads[3]) : nullptr,
                                      log_scale ? write<T>(grads[4]) : nullptr};
    glf::kernels<T>().plu_assemble_backward(layers<T>(permutation, lower, upper, log_diag, sign, log_scale, bias),
                                            read<T>(A), read<T>(A_inv), read<T>(grad_A),
                                            read<T>(grad_A_inv), read<T>(grad_c), read<T>(grad_logabsdet), target,
                                            parallel());
  });
  return grads;
}

// Sign, log|det|, inverse, info.
std::tuple<Tensor, Tensor, Tensor, Tensor> slogdet_inverse(Tensor A) {
  check_square(A);
  const int64_t count = A.size(0), dim = A.size(1);
  Tensor sign = empty(A, {count}), logabsdet = empty(A, {count}), inverse = alike(A), info = integers(A, {count});
  for_dtype(A, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().slogdet_inverse(count, dim, read<T>(A), write<T>(sign), write<T>(logabsdet),
                                      write<T>(inverse), indices(info), parallel());
  });
  return {sign, logabsdet, inverse, info};
}

void check_map(const Tensor& x, const Tensor& A, const Tensor& c) {
  STD_TORCH_CHECK(x.dim() == 2 && A.dim() == 2 && A.size(0) == x.size(1) && A.size(1) == x.size(1) && c.numel() == x.size(1) && x.size(1) > 0,
                  "glf_fast: a channel map needs x (rows, C), A (C, C) and c (C,)");
}

Tensor channel_map(Tensor x, Tensor A, Tensor c, bool inverse) {
  check_map(x, A, c);
  Tensor y = alike(x);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().channel_map(x.size(0), x.size(1), read<T>(x), read<T>(A), read<T>(c), inverse, write<T>(y), parallel());
  });
  return y;
}

// ∂x, ∂A, ∂c.
std::tuple<Tensor, Tensor, Tensor> channel_map_backward(Tensor grad_y, Tensor x, Tensor A, Tensor c, bool inverse) {
  check_map(x, A, c);
  STD_TORCH_CHECK(grad_y.sizes().equals(x.sizes()), "glf_fast: the gradient of a channel map does not fit");
  Tensor grad_x = alike(x), grad_A = alike(A), grad_c = alike(c);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().channel_map_backward(x.size(0), x.size(1), read<T>(grad_y), read<T>(x), read<T>(A), read<T>(c), inverse,
                                           write<T>(grad_x), write<T>(grad_A), write<T>(grad_c), parallel());
  });
  return {grad_x, grad_A, grad_c};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def("cpu_channel_map(Tensor x, Tensor A, Tensor c, bool inverse) -> Tensor");
  m.def("cpu_channel_map_backward(Tensor grad_y, Tensor x, Tensor A, Tensor c, bool inverse) -> (Tensor, Tensor, Tensor)");
}

// Schemas of the others are in glf_fast/ops/linear/schemas.py: CUDA has these operations without this library, too.
STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("plu_assemble", TORCH_BOX(&plu_assemble));
  m.impl("plu_assemble_backward", TORCH_BOX(&plu_assemble_backward));
  m.impl("slogdet_inverse", TORCH_BOX(&slogdet_inverse));
  m.impl("cpu_channel_map", TORCH_BOX(&channel_map));
  m.impl("cpu_channel_map_backward", TORCH_BOX(&channel_map_backward));
}
