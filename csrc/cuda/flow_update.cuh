// A training step of a small flow but for its passes and the sums over rows: three kernels.
//
// The batch: rows are gathered by index, and each one's share of ∂loss is written. The passes (flow_kernels.cuh) and the sums over rows
// (row_products.cuh) follow. The gradients: backward of all PLU layers, sums of squares of every gradient, and the loss, a block
// for each piece. The update: each block adds up the squares in the same order, so that all know the same norm without a
// barrier between blocks, then makes AdamW's step (arXiv:1711.05101) on the parameters that it owns, and of these the next map and the packed
// parameters of the next passes. A step whose loss or gradient is not finite changes nothing.
#pragma once

#include "flow_pack.cuh"
#include "flow_trained.cuh"

namespace glf::device {

GLF_DEVICE bool is_finite(float x) { return x - x == 0; }

// f(0) + f(1) + … + f(n − 1) in a fixed order, for all threads. `eighths` is shared.
template <class F>
GLF_DEVICE float block_sum(const Block& block, int n, F f, float* eighths) {
  const int each = (n + 7) / 8;
  block.sums(
      8, each, [&](int w, int j) { return w * each + j < n ? f(w * each + j) : 0.0f; },
      [&](int w, float sum) { eighths[w] = sum; });
  return ((eighths[0] + eighths[1]) + (eighths[2] + eighths[3])) + ((eighths[4] + eighths[5]) + (eighths[6] + eighths[7]));
}

GLF_DEVICE Layer<float> first_layer(const FlowUpdate& u) {
  return {u.shape.dim, u.permutation, u.of[of_lower].value, u.of[of_upper].value, u.of[of_log_diag].value, u.sign,
          u.of[of_log_scale].value, u.of[of_actnorm_bias].value};
}

// Entry `e` of the batch: of a row's numbers, its context, or its share of ∂loss. A row that does not exist is NaN, and so is
// the loss.
GLF_DEVICE void flow_batch_block(const Block& block, const FlowBatch& b, long long index) {
  const int width = b.dim + b.columns + 1;
  const long long entries = static_cast<long long>(b.batch) * width;
  const long long* order = b.order + (b.made ? *b.made * b.batch : 0);
  block.each_unguarded(update_threads, [&](int thread) {
    const long long e = index * update_threads + thread;
    if (e >= entries) return;
    const long long to = e / width, from = order[to];
    const int column = static_cast<int>(e - to * width);
    const bool exists = from >= 0 && from < b.rows;
    const float nothing = as_float(0x7fc00000u);
    if (column < b.dim)
      b.to_x[to * b.dim + column] = exists ? b.x[from * b.dim + column] : nothing;
    else if (column < width - 1)
      b.to_context[to * b.columns + column - b.dim] = exists ? b.context[from * b.columns + column - b.dim] : nothing;
    else
      b.slopes[to] = (b.weights && exists ? -b.weights[from] : -1.0f) / b.batch;
  });
}

// The sum of squares of the gradients that a job of a PLU layer's backward has made.
GLF_DEVICE float squares_of_job(const Block& block, int D, int job, const LayerGradients<float>& grad, float* eighths) {
  const int tiles = tiles_of(D);
  if (job >= 2 * tiles) {
    const int first = sum_rows * (job - 2 * tiles), n = D - first < sum_rows ? D - first : sum_rows;
    return block_sum(
        block, 2 * n,
        [&](int i) {
          const float g = i < n ? grad.log_scale[first + i] : grad.bias[first + i - n];
          return g * g;
        },
        eighths);
  }
  const int wide = (D + tile_columns - 1) / tile_columns, tile = job % tiles;
  const int top = tile / wide * strip_rows, left = tile % wide * tile_columns;
  const float* matrix = job < tiles ? grad.lower : grad.upper;
  return block_sum(
      block, strip_rows * tile_columns,
      [&](int e) {
        const int i = top + e / tile_columns, j = left + e % tile_columns;
        if (i >= D || j >= D) return 0.0f;
        const float g = matrix[i * D + j], d = job >= tiles && i == j ? grad.log_diag[i] : 0.0f;
        return g * g + d * d;
      },
      eighths);
}

// Block `index` of gradient_blocks.
GLF_DEVICE void flow_gradients_block(const Block& block, const FlowUpdate& u, int index, unsigned char* shared) {
  float* eighths = reinterpret_cast<float*>(shared);
  const int D = u.shape.dim, layers = layer_jobs(u), chunks = chunks_of(u);
  float total = 0;
  if (index < layers) {
    const int jobs = layers / u.shape.steps, k = index / jobs, job = index % jobs;
    const long long vector = static_cast<long long>(k) * D, matrix = vector * D;
    const bool actnorm = u.of[of_log_scale].value;
    const LayerGradients<float> grad{u.of[of_lower].grad + matrix, u.of[of_upper].grad + matrix, u.of[of_log_diag].grad + vector,
                                     actnorm ? u.of[of_log_scale].grad + vector : nullptr,
                                     actnorm ? u.of[of_actnorm_bias].grad + vector : nullptr};
    plu_assemble_backward_job(block, layer(first_layer(u), k), job, u.matrix + matrix, u.grad_matrix + matrix,
                              u.grad_offset + vector, u.grad_logabsdet + k, grad, shared + eighths_bytes);
    total = squares_of_job(block, D, job, grad, eighths);
  } else if (index < layers + chunks) {
    const long long first = static_cast<long long>(index - layers) * squares_chunk, left = u.numbers - first;
    const float* grad = u.networks + first;
    total = block_sum(block, left < squares_chunk ? static_cast<int>(left) : squares_chunk,
                      [&](int i) { return grad[i] * grad[i]; }, eighths);
  } else {
    total = block_sum(block, u.batch, [&](int i) { return u.slopes[i] * u.log_prob[i]; }, eighths);
  }
  block.each(1, [&](int) {
    if (index < layers + chunks) {
      u.squares[index] = total;
      return;
    }
    // As torch.optim.AdamW has them, in double precision.
    const double rate = u.rates[u.made ? *u.made : 0], step = *u.of[of_lower].count + 1.0;
    *u.factors = {total, static_cast<float>(1 - rate * u.weight_decay),
                  static_cast<float>(rate / (1 - power(u.beta1, step))),
                  static_cast<float>(1 / square_root(1 - power(u.beta2, step)))};
  });
}

// Block `index` of update_blocks.
GLF_DEVICE void flow_update_block(const Block& block, const FlowUpdate& u, int index, unsigned char* shared) {
  float* eighths = reinterpret_cast<float*>(shared);
  const FlowShape& s = u.shape;
  const float squares = block_sum(block, gradient_blocks(u) - 1, [&](int i) { return u.squares[i]; }, eighths);
  const StepFactors f = *u.factors;
  const bool whole = is_finite(f.loss) && is_finite(squares);
  if (index == 0)
    block.each(1, [&](int) {
      u.losses[u.made ? *u.made : 0] = f.loss;
      if (whole && u.made) *u.made += 1;
      for (int i = 0; whole && i < places; ++i)
        if (u.of[i].count) *u.of[i].count += 1;
    });
  if (!whole) return;

  const float longest = u.clip / (square_root(squares) + 1e-6f);  // as torch.nn.utils.clip_grad_norm_
  const float shrink = longest < 1 ? longest : 1;
  const float fresh1 = static_cast<float>(1 - u.beta1), fresh2 = static_cast<float>(1 - u.beta2);
  const float beta2 = static_cast<float>(u.beta2);
  const int jobs = s.layers + 2, k = index / jobs, l = index % jobs - 1;  // layer −1 is the map
  const auto adamw = [&](const Trained& p, int n) {  // the step's n numbers, four at once: their reads do not wait for each other
    const long long first = static_cast<long long>(k) * n;
    const int quarter = (n + 3) / 4;
    block.each_unguarded(quarter, [&](int i) {
      float g[4], m[4], v[4], x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const long long at = first + (i + r * quarter < n ? i + r * quarter : i);
        g[r] = p.grad[at];
        m[r] = p.mean[at];
        v[r] = p.square[at];
        x[r] = p.value[at];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (i + r * quarter >= n) break;
        const long long at = first + i + r * quarter;
        const float gradient = shrink * g[r];
        m[r] += fresh1 * (gradient - m[r]);
        v[r] = beta2 * v[r] + fresh2 * gradient * gradient;
        p.mean[at] = m[r];
        p.square[at] = v[r];
        p.value[at] = f.keep * x[r] - f.size * m[r] / (square_root(v[r]) * f.root + u.epsilon);
      }
    });
  };
  const int D = s.dim;
  if (l < 0) {
    adamw(u.of[of_lower], D * D);
    adamw(u.of[of_upper], D * D);
    adamw(u.of[of_log_diag], D);
    if (u.of[of_log_scale].value) {
      adamw(u.of[of_log_scale], D);
      adamw(u.of[of_actnorm_bias], D);
    }
  } else {
    const int rows = l ? s.hidden[l - 1] : s.passive() + s.context, columns = l < s.layers ? s.hidden[l] : 2 * s.transformed();
    adamw(u.of[of_weights + l], rows * columns);
    adamw(u.of[of_biases + l], columns);
  }
  if (!u.packed) return;
  block.each(0, [](int) {});  // all numbers are there

  if (l < 0)
    for (int slice = 0; slice < slices_of(D); ++slice)
      plu_assemble_slice(block, layer(first_layer(u), k), slice * slice_columns, u.matrix + static_cast<long long>(k) * D * D,
                         static_cast<float*>(nullptr), u.offset + k * D, u.logabsdet + k, shared + eighths_bytes);
  const Packer packer{s, u.given, k};
  const Layout at = layout_of(s);
  const int forward = forward_bytes(s) / 16, back = transposed_bytes(s) / 16;
  Quad *packed = u.packed + static_cast<long long>(k) * forward, *transposed = u.transposed + static_cast<long long>(k) * back;
  // A layer's pieces: up to three ranges of the forward's, two of the backward's.
  struct Range {
    int begin, end;
  };
  const auto of_forward = [&](int r) -> Range {
    if (l < 0) return r == 0 ? Range{0, at.at_out_bias()} : r == 1 ? Range{at.at_log(), at.at_first()} : Range{0, 0};
    if (l == s.layers)
      return r == 0 ? Range{at.at_out_bias(), at.at_log()} : r == 1 ? Range{at.at_out(), at.at_bias(0)} : Range{0, 0};
    if (r == 0) return {at.at_bias(l), at.at_bias(l + 1)};
    if (l) return r == 1 ? Range{at.at_inner(s.layers, l), at.at_inner(s.layers, l + 1)} : Range{0, 0};
    return r == 1 ? Range{at.at_first(), at.at_out()} : Range{at.at_context(s.layers), forward};
  };
  const auto of_back = [&](int r) -> Range {
    if (r) return l ? Range{0, 0} : Range{at.at_context_back(s.layers), back};
    if (l < 0) return {0, at.at_out_back()};
    if (l == s.layers) return {at.at_out_back(), at.at_first_back()};
    return l ? Range{at.at_inner_back(l), at.at_inner_back(l + 1)} : Range{at.at_first_back(), at.at_inner_back(1)};
  };
#pragma unroll 1  // or else the packing would be there five times
  for (int r = 0; r < 3; ++r) {
    const Range range = of_forward(r);
    block.each_unguarded(range.end - range.begin,
                         [&](int q) { packed[range.begin + q] = packer.forward(range.begin + q); });
  }
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const Range range = of_back(r);
    block.each_unguarded(range.end - range.begin,
                         [&](int q) { transposed[range.begin + q] = packer.backward(range.begin + q); });
  }
}

GLF_KERNEL(update_threads) flow_batch_kernel(GLF_ARGUMENT FlowBatch b) { flow_batch_block(Block{}, b, block_index()); }

GLF_KERNEL(update_threads) flow_gradients_kernel(GLF_ARGUMENT FlowUpdate u) {
  flow_gradients_block(Block{}, u, static_cast<int>(block_index()), shared_memory());
}

GLF_KERNEL(update_threads) flow_update_kernel(GLF_ARGUMENT FlowUpdate u) {
  flow_update_block(Block{}, u, static_cast<int>(block_index()), shared_memory());
}

}  // namespace glf::device
