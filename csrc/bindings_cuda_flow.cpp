// The kernels of small and medium coupling flows on CUDA tensors: packing and passes, for glf_fast/ops/coupling_flow/small.py, which
// makes the tensors and checks that they fit each other.
#include "bindings_cuda_flow.h"

namespace {

using namespace glf::bindings;

void pack(std::vector<int64_t> numbers, Tensor matrix, Tensor offset, Maybe logabsdet, Tensors weights, Tensors biases,
          Tensor packed, Maybe transposed) {
  const device::FlowShape s = shape_of(numbers);
  const int64_t steps = s.steps, dim = s.dim;
  STD_TORCH_CHECK(static_cast<int>(weights.size()) == s.layers + 1 && weights.size() == biases.size(),
                  "glf_fast: a weight and a bias for each layer");
  check_numbers(matrix, steps * dim * dim);
  check_numbers(offset, steps * dim);
  device::FlowParameters given{};
  given.matrix = read<float>(matrix);
  given.offset = read<float>(offset);
  given.logabsdet = read<float>(logabsdet);
  given.logs = logabsdet ? static_cast<int>(logabsdet->numel()) : 0;
  int64_t inner = dim - dim / 2 + s.context;
  for (int l = 0; l <= s.layers; ++l) {
    const int64_t columns = l < s.layers ? s.hidden[l] : dim / 2 * 2;
    check_numbers(weights[l], steps * inner * columns);
    check_numbers(biases[l], steps * columns);
    given.weights[l] = read<float>(weights[l]);
    given.biases[l] = read<float>(biases[l]);
    inner = columns;
  }
  const bool clusters = s.blocks > 1;
  check_numbers(packed, steps * (clusters ? device::cluster_bytes(s, false) : device::forward_bytes(s)) / 4);
  if (transposed) check_numbers(*transposed, steps * (clusters ? device::cluster_bytes(s, true) : device::transposed_bytes(s)) / 4);
  const auto launch = clusters ? device::cluster_pack : device::flow_pack;
  check(launch(Launch(matrix), s, given, write<float>(packed), transposed ? write<float>(*transposed) : nullptr));
}

// The tensors are those of small.TENSORS; `like` has the rows, and the device.
void run(std::vector<int64_t> numbers, int64_t activation, int64_t log_scale, double constant, bool add_first, bool inverse,
         bool density, int64_t ways, int64_t stride, Tensor like, std::vector<Maybe> tensors) {
  STD_TORCH_CHECK(tensors.size() == 16, "glf_fast: sixteen tensors");
  for (const Maybe& t : tensors) {
    if (!t) continue;
    check_place(*t);
    check_storage(*t);
    STD_TORCH_CHECK(t->is_contiguous() && t->get_device_index() == like.get_device_index(),
                    "glf_fast: a kernel got a tensor that is not contiguous, or of another device");
  }
  const auto floats = [&](int i) { return tensors[i] ? write<float>(*tensors[i]) : nullptr; };
  device::FlowCall f{};
  f.shape = shape_of(numbers);
  f.activation = static_cast<device::Activation>(activation);
  f.log_scale = static_cast<device::LogScale>(log_scale);
  f.constant = static_cast<float>(constant);
  f.add_first = add_first;
  f.density = density;
  f.rows = like.size(0);
  f.packed = reinterpret_cast<const unsigned char*>(floats(0));
  f.transposed = reinterpret_cast<const unsigned char*>(floats(1));
  f.x = floats(2);
  f.context = floats(3);
  f.out = floats(4);
  f.logdet = floats(5);
  f.stride = static_cast<int>(stride);
  f.map_in = floats(6);
  f.map_grad = floats(7);
  f.hidden = floats(8);
  f.derivatives = floats(9);
  f.slopes = floats(10);
  f.record = reinterpret_cast<device::Quad*>(floats(11));
  f.grad_out = floats(12);
  f.grad_logdet = floats(13);
  f.grad_x = floats(14);
  f.grad_context = floats(15);
  const Launch launch(like);
  const bool clusters = f.shape.blocks > 1;
  check(ways ? (clusters ? device::cluster_gradient : device::flow_gradient)(launch, f, static_cast<int>(ways))
             : (clusters ? device::cluster_forward : device::flow_forward)(launch, f, inverse));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def(
      "cuda_flow_pack(int[] shape, Tensor matrix, Tensor offset, Tensor? logabsdet, Tensor[] weights, Tensor[] biases, "
      "Tensor packed, Tensor? transposed) -> ()");
  m.def(
      "cuda_flow_run(int[] shape, int activation, int log_scale, float constant, bool add_first, bool inverse, bool density, "
      "int ways, int stride, Tensor like, Tensor?[] tensors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CUDA, m) {
  m.impl("cuda_flow_pack", TORCH_BOX(&pack));
  m.impl("cuda_flow_run", TORCH_BOX(&run));
}
