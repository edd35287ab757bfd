// The outcome of a launch on the current GPU.
#pragma once

#include <cuda_runtime.h>

namespace glf::device {

// Null, or what went wrong.
inline const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }
inline const char* outcome() { return words(cudaGetLastError()); }

}  // namespace glf::device
