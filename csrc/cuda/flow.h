// The interface of the kernels of small and medium coupling flows: device pointers and a stream, no torch. Every launch returns at once; each
// function returns null, or CUDA's words for what went wrong.
#pragma once

#include "flow_call.cuh"

namespace glf::device {

// Parameters in the order of fragments: steps × forward_bytes, and where `transposed` is not null steps × transposed_bytes.
const char* flow_pack(void* stream, const FlowShape& shape, const FlowParameters& given, void* packed, void* transposed);
// The whole flow, or its inverse: `call` without warps and slots, which are chosen for this GPU.
const char* flow_forward(void* stream, const FlowCall& call, bool inverse);
// A forward that keeps what the backward needs, a backward, or both in one launch: see Ways.
const char* flow_gradient(void* stream, const FlowCall& call, int ways);

// The same by clusters of shape.blocks blocks, for GPUs from sm_90 on. Steps are of cluster_bytes (cluster_sections.cuh).
const char* cluster_pack(void* stream, const FlowShape& shape, const FlowParameters& given, void* packed, void* transposed);
const char* cluster_forward(void* stream, const FlowCall& call, bool inverse);
const char* cluster_gradient(void* stream, const FlowCall& call, int ways);

}  // namespace glf::device
