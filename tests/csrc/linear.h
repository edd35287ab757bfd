// The linear kernels' part of the driver: plu_assemble with its backward, slogdet_inverse. Included by
// driver.cpp after its tools.
#pragma once

namespace {

// All results of all linear kernels on `count` random layers, one after the other.
template <class T>
Buffer<T> run_linear(const glf::Kernels<T>& kernels, glf::Int count, glf::Int D, bool actnorm, int n) {
  std::mt19937 rng(7);
  const auto vector = [&] { return random<T>(count * D, 0.3, rng); };
  const auto matrix = [&] { return random<T>(count * D * D, 0.5 / std::sqrt(double(D)), rng); };
  std::vector<std::int64_t> permutation(count * D);
  for (glf::Int i = 0; i < count * D; ++i) permutation[i] = (i % D + 1) % D;
  const Buffer<T> lower = matrix(), upper = matrix(), log_diag = vector(), log_scale = vector(), bias = vector();
  const Buffer<T> sign(count * D, T(-1));
  const glf::Plu<T> plu{count, D, permutation.data(), lower.data(), upper.data(), log_diag.data(), sign.data(),
                        actnorm ? log_scale.data() : nullptr, actnorm ? bias.data() : nullptr};
  Buffer<T> A(count * D * D, NAN), A_inv = A, c(count * D, NAN), logabsdet(count, NAN);
  kernels.plu_assemble(plu, A.data(), A_inv.data(), c.data(), logabsdet.data(), threads(n));
  Buffer<T> g_lower = matrix(), g_upper = g_lower, g_diag(count * D, NAN), g_scale = g_diag, g_bias = g_diag;
  const glf::PluGradients<T> grads{g_lower.data(), g_upper.data(), g_diag.data(), actnorm ? g_scale.data() : nullptr,
                                   actnorm ? g_bias.data() : nullptr};
  kernels.plu_assemble_backward(plu, A.data(), A_inv.data(), A.data(), A_inv.data(), c.data(), logabsdet.data(), grads,
                                threads(n));
  Buffer<T> inverse(A.size(), NAN), signs(count, NAN), logs(count, NAN);
  std::vector<std::int32_t> info(count, -1);
  kernels.slogdet_inverse(count, D, A.data(), signs.data(), logs.data(), inverse.data(), info.data(), threads(n));
  // Two ways to the same inverse and determinant.
  const double tolerance = sizeof(T) == 4 ? 1e-3 : 1e-11;
  check("two inverses", inverse, A_inv, tolerance);
  check("two determinants", logs, logabsdet, tolerance);
  Buffer<T> all;
  for (const auto* b : {&A, &A_inv, &c, &logabsdet, &g_lower, &g_upper, &g_diag, &inverse, &signs, &logs})
    all.insert(all.end(), b->begin(), b->end());
  if (actnorm)
    for (const auto* b : {&g_scale, &g_bias}) all.insert(all.end(), b->begin(), b->end());
  for (const std::int32_t i : info) all.push_back(T(i));
  return all;
}

template <class T>
void walk_linear(const glf::Kernels<T>& kernels, const glf::Kernels<T>& generic, double tolerance) {
  for (const glf::Int D : {1, 3, 16, 17, 33, 70})
    for (const glf::Int count : {0, 1, 18}) {
      const bool actnorm = D % 2;
      const Buffer<T> expected = run_linear(generic, count, D, actnorm, 1), one = run_linear(kernels, count, D, actnorm, 1);
      check("linear layers", one, expected, tolerance);
      check("linear layers, threads", run_linear(kernels, count, D, actnorm, 3), one, 0);
    }
}

}  // namespace
