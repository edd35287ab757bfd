// Training steps of small coupling flows on CUDA tensors, for glf_fast/ops/coupling_flow/training_step.py, which makes the tensors and
// checks that they fit each other.
#include "bindings_cuda_flow.h"

#include "cuda/flow_update.h"

namespace {

using namespace glf::bindings;

long long* whole_numbers(const Maybe& t) {
  if (!t) return nullptr;
  read_permutation(*t);  // for its checks
  check_numbers(*t, 1);
  return static_cast<long long*>(t->mutable_data_ptr());
}

// A tensor that is written to, of so many numbers.
float* change(const Tensor& t, int64_t numbers) {
  read<float>(t);
  check_numbers(t, numbers);
  return write<float>(t);
}

void batch(Tensor order, Maybe made, Tensor x, Maybe context, Maybe weights, Tensor to_x, Maybe to_context, Tensor slopes) {
  device::FlowBatch b{};
  STD_TORCH_CHECK(x.dim() == 2 && to_x.dim() == 2 && to_x.size(1) == x.size(1) && bool(context) == bool(to_context),
                  "glf_fast: a batch that does not fit its rows");
  b.rows = x.size(0);
  b.batch = static_cast<int>(to_x.size(0));
  b.dim = static_cast<int>(x.size(1));
  b.order = reinterpret_cast<const long long*>(read_permutation(order));
  STD_TORCH_CHECK(order.dim() == 2 && order.size(0) > 0 && order.size(1) == b.batch, "glf_fast: an order that does not fit its batch");
  b.made = whole_numbers(made);
  b.x = read<float>(x);
  b.weights = read<float>(weights);
  if (weights) check_numbers(*weights, b.rows);
  b.to_x = change(to_x, int64_t{b.batch} * b.dim);
  b.slopes = change(slopes, b.batch);
  if (context) {
    STD_TORCH_CHECK(context->dim() == 2 && context->size(0) == b.rows, "glf_fast: contexts that do not fit the rows");
    b.columns = static_cast<int>(context->size(1));
    b.context = read<float>(*context);
    b.to_context = change(*to_context, int64_t{b.batch} * b.columns);
  }
  if (b.batch) check(device::flow_batch(Launch(x), b));
}

// Parameters, moments and counts are by their places (Place), an ActNorm's left out where there is none; `gradients` are those of
// all, one behind the other; `maps` are A, c, log|det A|, and `map_gradients` theirs.
void update(std::vector<int64_t> numbers, Tensor permutation, Tensor sign, Tensors values, Tensors means, Tensors squares,
            Tensors counts, Tensor gradients, Tensors maps, Tensors map_gradients, Tensor log_prob, Tensor slopes,
            Tensor scratch, Tensor rates, Tensor losses, Maybe made, double beta1, double beta2, double epsilon,
            double weight_decay, double clip, Maybe packed, Maybe transposed) {
  device::FlowUpdate u{};
  u.shape = shape_of(numbers);
  const int64_t steps = u.shape.steps, D = u.shape.dim, vectors = steps * D, layers = u.shape.layers + 1;
  const int64_t without = 3 + 2 * layers, count = static_cast<int64_t>(values.size());
  STD_TORCH_CHECK((count == without || count == without + 2) && means.size() == values.size() && squares.size() == values.size() &&
                      counts.size() == values.size() && maps.size() == 3 && map_gradients.size() == 3 && bool(packed) == bool(transposed),
                  "glf_fast: parameters that are no small flow's");
  for (const Tensors* list : {&values, &means, &squares, &counts, &maps, &map_gradients})
    for (const Tensor& t : *list)
      STD_TORCH_CHECK(t.get_device_index() == gradients.get_device_index(), "glf_fast: a kernel got tensors of several devices");
  std::vector<int64_t> sizes{vectors * D, vectors * D, vectors};
  std::vector<int> where{device::of_lower, device::of_upper, device::of_log_diag};
  if (count > without) {
    sizes.insert(sizes.end(), {vectors, vectors});
    where.insert(where.end(), {device::of_log_scale, device::of_actnorm_bias});
  }
  const size_t of_layers = sizes.size();
  for (int vector = 0; vector < 2; ++vector) {
    int64_t inner = D - D / 2 + u.shape.context;
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t columns = l < u.shape.layers ? u.shape.hidden[l] : D / 2 * 2;
      sizes.push_back(steps * (vector ? columns : inner * columns));
      where.push_back((vector ? device::of_biases : device::of_weights) + static_cast<int>(l));
      inner = columns;
    }
  }
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  float* gradient = change(gradients, total);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i == of_layers) u.networks = gradient;
    u.of[where[i]] = {change(values[i], sizes[i]), gradient, change(means[i], sizes[i]), change(squares[i], sizes[i]),
                      change(counts[i], 1)};
    gradient += sizes[i];
    if (i >= of_layers) u.numbers += sizes[i];
  }
  for (int64_t l = 0; l < layers; ++l) {
    u.given.weights[l] = u.of[device::of_weights + l].value;
    u.given.biases[l] = u.of[device::of_biases + l].value;
  }
  STD_TORCH_CHECK(permutation.numel() == vectors, "glf_fast: permutation must be (K, D)");
  u.permutation = reinterpret_cast<const long long*>(read_permutation(permutation));
  u.sign = read<float>(sign);
  check_numbers(sign, vectors);
  u.given.matrix = u.matrix = change(maps[0], vectors * D);
  u.given.offset = u.offset = change(maps[1], vectors);
  u.given.logabsdet = u.logabsdet = change(maps[2], steps);
  u.given.logs = u.shape.steps;
  u.grad_matrix = change(map_gradients[0], vectors * D);
  u.grad_offset = change(map_gradients[1], vectors);
  u.grad_logabsdet = change(map_gradients[2], steps);
  u.batch = static_cast<int>(slopes.numel());
  u.slopes = read<float>(slopes);
  u.log_prob = read<float>(log_prob);
  check_numbers(log_prob, u.batch);
  u.factors = reinterpret_cast<device::StepFactors*>(change(scratch, 4 + device::gradient_blocks(u)));
  u.squares = write<float>(scratch) + 4;
  u.beta1 = beta1;
  u.beta2 = beta2;
  u.epsilon = static_cast<float>(epsilon);
  u.weight_decay = static_cast<float>(weight_decay);
  u.clip = static_cast<float>(clip);
  u.rates = read<float>(rates);
  check_numbers(rates, 1);
  u.losses = change(losses, rates.numel());
  u.made = whole_numbers(made);
  if (packed) {
    u.packed = reinterpret_cast<device::Quad*>(change(*packed, steps * device::forward_bytes(u.shape) / 4));
    u.transposed = reinterpret_cast<device::Quad*>(change(*transposed, steps * device::transposed_bytes(u.shape) / 4));
  }
  check(device::flow_update(Launch(gradients), u));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def(
      "cuda_flow_batch(Tensor order, Tensor? made, Tensor x, Tensor? context, Tensor? weights, Tensor(a!) to_x, "
      "Tensor(b!)? to_context, Tensor(c!) slopes) -> ()");
  m.def(
      "cuda_flow_update(int[] shape, Tensor permutation, Tensor sign, Tensor(a!)[] values, Tensor(b!)[] means, "
      "Tensor(c!)[] squares, Tensor(d!)[] counts, Tensor(e!) gradients, Tensor(f!)[] maps, Tensor[] map_gradients, "
      "Tensor log_prob, Tensor slopes, Tensor(g!) scratch, Tensor rates, Tensor(h!) losses, Tensor(i!)? made, float beta1, "
      "float beta2, float epsilon, float weight_decay, float clip, Tensor(j!)? packed, Tensor(k!)? transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CUDA, m) {
  m.impl("cuda_flow_batch", TORCH_BOX(&batch));
  m.impl("cuda_flow_update", TORCH_BOX(&update));
}
