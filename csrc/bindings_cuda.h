// What the bindings of CUDA kernels share: the stream of a launch, and its outcome.
#pragma once

#include "bindings.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace glf::bindings {

// The current stream of a tensor's GPU, which is made the current one as long as this lives.
class [[gnu::visibility("hidden")]] Launch {  // as torch's guard is
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  operator void*() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check(const char* error) { STD_TORCH_CHECK(!error, "glf_fast: a CUDA kernel was not launched: ", error); }

}  // namespace glf::bindings
