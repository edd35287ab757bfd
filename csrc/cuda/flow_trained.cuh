// What the kernels of a small flow's training step are given beside those of its passes: also to those who launch them.
#pragma once

#include "flow_call.cuh"
#include "plu.cuh"

namespace glf::device {

// A batch: where it comes from, and where its rows and the gradient of each row's density go.
struct FlowBatch {
  const long long *order, *made;  // rows of each step (steps, batch); which step is next, null: the first one
  const float *x, *context, *weights;  // all rows; the last two may be null
  long long rows;                      // how many they are
  int batch, dim, columns;             // columns of the context
  float *to_x, *to_context, *slopes;   // (batch, ·); slopes: ∂loss/∂log p = −weight / batch
};

// A parameter of all steps, its gradient, and the state of its optimizer; null where there is none.
struct Trained {
  float *value, *grad, *mean, *square, *count;  // count: steps that were made
};

// The parameters by their places in a list: of the PLU layers, of the ActNorms, then weights and biases by layer.
enum Place : int {
  of_lower,
  of_upper,
  of_log_diag,
  of_log_scale,
  of_actnorm_bias,
  of_weights,
  of_biases = of_weights + most_layers + 1,
  places = of_biases + most_layers + 1
};

// What the update multiplies by in a step, and the step's loss.
struct StepFactors {
  float loss, keep, size, root;
};

// The parameters' half of a training step by AdamW.
struct FlowUpdate {
  FlowShape shape;
  const long long* permutation;
  const float* sign;
  Trained of[places];
  FlowParameters given;  // the same parameters and maps, as they are packed
  float *matrix, *offset, *logabsdet;                          // A (K, D, D), c (K, D), log|det A| (K,)
  const float *grad_matrix, *grad_offset, *grad_logabsdet;
  const float* networks;  // the gradients of all weights and biases, one behind the other
  long long numbers;      // how many they are
  const float *log_prob, *slopes;  // of the batch
  int batch;
  float* squares;  // sums of squares of gradients, one for each block but the last of the first launch
  StepFactors* factors;
  double beta1, beta2;
  float epsilon, weight_decay, clip;  // clip: the longest gradient, over all parameters; ∞ for any
  const float* rates;                 // by step, as losses
  float* losses;
  long long* made;           // as FlowBatch has it
  Quad *packed, *transposed;  // null: they are not packed again
};

inline constexpr int update_threads = 256;
inline constexpr int squares_chunk = 4096;  // numbers that a block of the first launch sums up

// Blocks of the first launch: PLU layers' jobs, chunks of the networks' gradients, the loss.
GLF_DEVICE_AND_HOST int layer_jobs(const FlowUpdate& u) {
  return u.shape.steps * backward_jobs(u.shape.dim, u.of[of_log_scale].value != nullptr);
}
GLF_DEVICE_AND_HOST int chunks_of(const FlowUpdate& u) { return static_cast<int>((u.numbers + squares_chunk - 1) / squares_chunk); }
GLF_DEVICE_AND_HOST int gradient_blocks(const FlowUpdate& u) { return layer_jobs(u) + chunks_of(u) + 1; }
// Blocks of the second launch: in each step the map, and each layer of the network.
GLF_DEVICE_AND_HOST int update_blocks(const FlowUpdate& u) { return u.shape.steps * (u.shape.layers + 2); }

// Bytes of shared memory: sums of eight warps, then what a layer needs.
inline constexpr int eighths_bytes = 8 * sizeof(float);
GLF_DEVICE_AND_HOST int gradient_bytes(const FlowUpdate& u) { return eighths_bytes + plu_backward_bytes<float>(u.shape.dim); }
GLF_DEVICE_AND_HOST int update_bytes(const FlowUpdate& u) { return eighths_bytes + plu_assemble_bytes<float>(u.shape.dim); }

}  // namespace glf::device
