// The kernels themselves: which matrix a block or warp takes, and where it works.
#pragma once

#include "gauss_tile.cuh"
#include "gauss_warp.cuh"
#include "lu_block.cuh"
#include "plu.cuh"

namespace glf::device {

inline constexpr int warp_threads = 128;   // of a block whose warps each take some matrices
inline constexpr int block_threads = 256;  // of a block that takes one matrix

// Rows an odd number of entries apart: a column then meets every bank of shared memory.
GLF_DEVICE int shared_stride(int D) { return D | 1; }

// Where a block's matrix and workspace lie in its dynamic shared memory; without `room` the matrix stays in `result`.
template <class T>
GLF_DEVICE Workspace<T> carve(unsigned char* memory, int D, bool room, T* result, T*& a, int& ld) {
  T* numbers = reinterpret_cast<T*>(memory);
  ld = room ? shared_stride(D) : D;
  a = room ? numbers : result;
  if (room) numbers += D * ld;
  int* integers = reinterpret_cast<int*>(numbers + D);
  return {numbers, integers, integers + D, integers + 2 * D, integers + 2 * D + 1};
}

template <class T>
GLF_KERNEL(block_threads)
    slogdet_inverse_kernel(int D, bool room, const T* A, T* sign, T* logabsdet, T* inverse, int* info) {
  const long long n = block_index();
  T* a;
  int ld;
  const Workspace<T> w = carve(shared_memory(), D, room, inverse + n * D * D, a, ld);
  slogdet_inverse_block(Block{}, D, A + n * D * D, a, ld, w, sign + n, logabsdet + n, inverse + n * D * D, info + n);
}

template <int N, class T>
GLF_KERNEL(warp_threads)
    slogdet_inverse_warp_kernel(long long count, int D, const T* A, T* sign, T* logabsdet, T* inverse, int* info) {
  each_warp<warp_threads>([&](long long warp) {
    constexpr int matrices = 32 / lanes_of<N>;
    if (warp * matrices < count) slogdet_inverse_warp<N>(warp * matrices, count, D, A, sign, logabsdet, inverse, info);
  });
}

template <int M, class T>
GLF_KERNEL(block_threads)
    slogdet_inverse_tile_kernel(int D, const T* A, T* sign, T* logabsdet, T* inverse, int* info) {
  const long long n = block_index();
  slogdet_inverse_tile<M>(Block{}, D, A + n * D * D, sign + n, logabsdet + n, inverse + n * D * D, info + n,
                          shared_memory());
}

template <class T>
GLF_KERNEL(block_threads)
    plu_assemble_kernel(Layer<T> first, T* A, T* A_inv, T* c, T* logabsdet) {
  const int slices = slices_of(first.D);
  const long long k = block_index() / slices, vector = k * first.D, matrix = vector * first.D;
  plu_assemble_slice(Block{}, layer(first, k), static_cast<int>(block_index() % slices) * slice_columns, A + matrix,
                     A_inv ? A_inv + matrix : nullptr, c + vector, logabsdet + k, shared_memory());
}

// ∂A of each layer less A⁻ᵀ ∂A⁻¹ A⁻ᵀ, a block for `strip_rows` of its rows.
template <class T>
GLF_KERNEL(block_threads)
    plu_inverse_gradient_kernel(int D, const T* A_inv, const T* grad_A, const T* grad_A_inv, T* half, T* result) {
  const int strips = strips_of(D);
  const long long matrix = block_index() / strips * D * D;
  plu_inverse_gradient_strip(Block{}, D, static_cast<int>(block_index() % strips) * strip_rows, A_inv + matrix,
                             grad_A ? grad_A + matrix : nullptr, grad_A_inv + matrix, half + matrix, result + matrix,
                             shared_memory());
}

template <class T>
GLF_KERNEL(block_threads)
    plu_assemble_backward_kernel(Layer<T> first, const T* A, const T* grad_A, const T* grad_c, const T* grad_logabsdet,
                                 LayerGradients<T> grad) {
  const int jobs = backward_jobs(first.D, first.log_scale);
  const long long k = block_index() / jobs, vector = k * first.D, matrix = vector * first.D;
  const LayerGradients<T> mine{grad.lower + matrix, grad.upper + matrix, grad.log_diag + vector,
                               grad.log_scale ? grad.log_scale + vector : nullptr,
                               grad.bias ? grad.bias + vector : nullptr};
  plu_assemble_backward_job(Block{}, layer(first, k), static_cast<int>(block_index() % jobs), A + matrix,
                            grad_A ? grad_A + matrix : nullptr, grad_c ? grad_c + vector : nullptr,
                            grad_logabsdet ? grad_logabsdet + k : nullptr, mine, shared_memory());
}

}  // namespace glf::device
