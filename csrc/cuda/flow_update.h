// The interface of the kernels of a small flow's training step beside those of its passes: as flow.h has it.
#pragma once

#include "flow_trained.cuh"

namespace glf::device {

// Gathers a batch.
const char* flow_batch(void* stream, const FlowBatch& b);
// Two launches, behind the passes and the sums over rows: the rest of the gradients, and the step of AdamW.
const char* flow_update(void* stream, const FlowUpdate& u);

}  // namespace glf::device
