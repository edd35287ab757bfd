// Launches of the kernels of a small flow's training step that are neither passes nor sums over rows.
#include "flow_update.cuh"
#include "flow_update.h"
#include "outcome.h"

namespace glf::device {

const char* flow_batch(void* stream, const FlowBatch& b) {
  const long long entries = static_cast<long long>(b.batch) * (b.dim + b.columns + 1);
  const auto blocks = static_cast<unsigned>((entries + update_threads - 1) / update_threads);
  flow_batch_kernel<<<blocks, update_threads, 0, static_cast<cudaStream_t>(stream)>>>(b);
  return outcome();
}

const char* flow_update(void* stream, const FlowUpdate& u) {
  const auto s = static_cast<cudaStream_t>(stream);
  flow_gradients_kernel<<<gradient_blocks(u), update_threads, gradient_bytes(u), s>>>(u);
  if (const char* error = outcome()) return error;
  flow_update_kernel<<<update_blocks(u), update_threads, update_bytes(u), s>>>(u);
  return outcome();
}

}  // namespace glf::device
