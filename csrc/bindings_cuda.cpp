// The linear layers' operations on CUDA tensors. Schemas are in glf_fast/ops/linear/schemas.py; torch chooses by device.
#include "bindings_cuda.h"

#include "cuda/linear.h"

#include <tuple>

namespace {

using namespace glf::bindings;
namespace device = glf::device;

int dim_of(const Tensor& A) {
  check_square(A);
  STD_TORCH_CHECK(A.size(1) <= 32768, "glf_fast: matrices of up to 32768 rows");
  STD_TORCH_CHECK(A.size(0) < (int64_t{1} << 31), "glf_fast: fewer than 2^31 matrices");
  return static_cast<int>(A.size(1));
}

// Indices out of range cannot be refused here, reading them would make the host wait: kernels keep them in range.
template <class T>
device::Layer<T> layers(const Tensor& permutation, const Tensor& lower, const Tensor& upper, const Tensor& log_diag,
                        const Tensor& sign, const Maybe& log_scale, const Maybe& bias) {
  for (const Tensor* t : {&permutation, &upper, &log_diag, &sign, log_scale ? &*log_scale : &lower, bias ? &*bias : &lower})
    STD_TORCH_CHECK(t->get_device_index() == lower.get_device_index(), "glf_fast: a kernel got tensors of several devices");
  return {dim_of(lower),  reinterpret_cast<const long long*>(read_permutation(permutation)),
          read<T>(lower), read<T>(upper), read<T>(log_diag), read<T>(sign), read<T>(log_scale), read<T>(bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plu_assemble(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag,
                                                        Tensor sign, Maybe log_scale, Maybe bias, bool need_inverse) {
  Tensor A = alike(lower), A_inv = need_inverse ? alike(lower) : empty(lower, {0});
  Tensor c = alike(log_diag), logabsdet = empty(lower, {lower.size(0)});
  for_dtype(lower, [&](auto zero) {
    using T = decltype(zero);
    check(device::plu_assemble<T>(Launch(lower), lower.size(0),
                                  layers<T>(permutation, lower, upper, log_diag, sign, log_scale, bias), write<T>(A),
                                  need_inverse ? write<T>(A_inv) : nullptr, write<T>(c), write<T>(logabsdet)));
  });
  return {A, A_inv, c, logabsdet};
}

Tensors plu_assemble_backward(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag, Tensor sign,
                              Maybe log_scale, Maybe bias, Tensor A, Maybe A_inv, Maybe grad_A, Maybe grad_A_inv,
                              Maybe grad_c, Maybe grad_logabsdet) {
  STD_TORCH_CHECK(!grad_A_inv || A_inv, "glf_fast: the gradient of A⁻¹ needs A⁻¹");
  Tensors grads{alike(lower), alike(upper), alike(log_diag)};
  if (log_scale) grads.insert(grads.end(), {alike(log_diag), alike(log_diag)});
  Tensor work = grad_A_inv ? alike(lower) : empty(lower, {0});
  for_dtype(lower, [&](auto zero) {
    using T = decltype(zero);
    const device::LayerGradients<T> target{write<T>(grads[0]), write<T>(grads[1]), write<T>(grads[2]),
                                           log_scale ? write<T>(grads[3]) : nullptr,
                                           log_scale ? write<T>(grads[4]) : nullptr};
    check(device::plu_assemble_backward<T>(
        Launch(lower), lower.size(0), layers<T>(permutation, lower, upper, log_diag, sign, log_scale, bias), read<T>(A),
        read<T>(A_inv), read<T>(grad_A), read<T>(grad_A_inv), read<T>(grad_c), read<T>(grad_logabsdet), target,
        grad_A_inv ? write<T>(work) : nullptr));
  });
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slogdet_inverse(Tensor A) {
  const int dim = dim_of(A);
  const int64_t count = A.size(0);
  Tensor sign = empty(A, {count}), logabsdet = empty(A, {count}), inverse = alike(A), info = integers(A, {count});
  for_dtype(A, [&](auto zero) {
    using T = decltype(zero);
    check(device::slogdet_inverse<T>(Launch(A), count, dim, read<T>(A), write<T>(sign), write<T>(logabsdet),
                                     write<T>(inverse), indices(info)));
  });
  return {sign, logabsdet, inverse, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CUDA, m) {
  m.impl("plu_assemble", TORCH_BOX(&plu_assemble));
  m.impl("plu_assemble_backward", TORCH_BOX(&plu_assemble_backward));
  m.impl("slogdet_inverse", TORCH_BOX(&slogdet_inverse));
}
