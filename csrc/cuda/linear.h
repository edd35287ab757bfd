// The interface of the CUDA kernels: device pointers and a stream, no torch. Every launch returns at once; each function
// returns null, or CUDA's words for what went wrong.
#pragma once

#include "layer.cuh"

namespace glf::device {

using Stream = void*;

// Matrices (count, D, D), as csrc/cpu/flow.h has them. Layers of one flow start `D` or `D²` numbers apart.
template <class T>
const char* slogdet_inverse(Stream, long long count, int D, const T* A, T* sign, T* logabsdet, T* inverse, int* info);
// `first` is the first of `count` layers.
template <class T>
const char* plu_assemble(Stream, long long count, const Layer<T>& first, T* A, T* A_inv, T* c, T* logabsdet);
// One launch; with `grad_A_inv` two, and `work`, count D² numbers.
template <class T>
const char* plu_assemble_backward(Stream, long long count, const Layer<T>& first, const T* A, const T* A_inv,
                                  const T* grad_A, const T* grad_A_inv, const T* grad_c, const T* grad_logabsdet,
                                  const LayerGradients<T>& grad, T* work);

}  // namespace glf::device
