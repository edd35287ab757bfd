// What all bindings share: from tensors to the kernels' pointers, with the checks that keep memory safe.
#pragma once

#include "cpu/flow.h"
#include "cpu/pool.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace glf::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void with_torchs_team(int members, void (*member)(void*, int), void* context) {
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) member(context, static_cast<int>(i));
  });
}

// As many threads as torch.set_num_threads says; when they are torch's own, see cpu/pool.cpp.
inline glf::Parallel parallel() {
  return {static_cast<int>(std::min<int64_t>(torch::stable::get_num_threads(), glf::most_tasks)),
          [](int tasks, void (*task)(void*, int), void* context) { glf::run_together(tasks, task, context, with_torchs_team); }};
}

// A pointer into another device's memory would be read all the same: as garbage, or as the end of the GPU's context.
inline void check_place(const Tensor& t) {
#ifdef USE_CUDA
  STD_TORCH_CHECK(t.is_cuda(), "glf_fast: a GPU's kernel got a tensor that is not on a GPU");
#else
  STD_TORCH_CHECK(t.is_cpu(), "glf_fast: a processor's kernel got a tensor that is not on the processor");
#endif
}

// What lies behind a tensor whose storage was freed (FSDP does it) is no longer its own.
inline void check_storage(const Tensor& t) {
  int64_t bytes, offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  STD_TORCH_CHECK(t.numel() == 0 || (offset + t.numel()) * static_cast<int64_t>(t.element_size()) <= bytes,
                  "glf_fast: a kernel got a tensor whose storage was freed or is too small");
}

// The same for a tensor of any strides, as far as its storage is not there at all.
inline void check_not_freed(const Tensor& t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(t.numel() == 0 || bytes > 0, "glf_fast: a kernel got a tensor whose storage was freed");
}

template <class T>
const T* read(const Tensor& t) {
  check_place(t);
  STD_TORCH_CHECK(t.is_contiguous(), "glf_fast: a kernel got a tensor that is not contiguous");
  STD_TORCH_CHECK(t.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
                  "glf_fast: a kernel got tensors of several dtypes");
  check_storage(t);
  return static_cast<const T*>(t.const_data_ptr());
}

using Maybe = std::optional<Tensor>;

// Null where there is no tensor.
template <class T>
const T* read(const Maybe& t) {
  return t ? read<T>(*t) : nullptr;
}

template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialised and contiguous, on the device of `like`. torch::stable::new_empty would look the operation up by its name, and
// take half a microsecond longer: 1.5 of the 70 that a flow of a single row needs, 10 of a training step. torch's own fill
// of uninitialised memory is lost on a processor; with $GLF_FAST_POISON it is NaN, so that tests see what is left unwritten.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t device, index;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype, device, index, &made));
  Tensor t(made);
#ifndef USE_CUDA
  static const bool poison = std::getenv("GLF_FAST_POISON") != nullptr;
  if (poison) std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
#endif
  return t;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(like, shape, dtype);
}

inline Tensor alike(const Tensor& t) {
  const auto sizes = t.sizes();
  return empty(t, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

inline Tensor integers(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, aoti_torch_dtype_int32());
}

inline const int64_t* read_permutation(const Tensor& t) {
  check_place(t);
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Long,
                  "glf_fast: permutation or seed must be contiguous int64");
  check_storage(t);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline std::int32_t* indices(const Tensor& t) { return static_cast<std::int32_t*>(t.mutable_data_ptr()); }

inline void check_square(const Tensor& A) {
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2), "glf_fast: matrices (N, D, D) are needed");
}

// Calls f(float{}) or f(double{}).
template <class F>
void for_dtype(const Tensor& t, F f) {
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "glf_fast: the kernels take float32 and float64");
  f(double{});
}

}  // namespace glf::bindings
