// Steps of training (csrc/cpu/fit.h): whatever the threads and what is kept for the backward, they end in the same parameters.
#include "cpu/fit.h"

#include <deque>

namespace {

// The losses of some steps from batches of three rows, then all parameters.
template <class T>
Buffer<T> train(const Shape& shape, typename glf::Maps<T>::Kind kind, bool actnorm, glf::Save save, int threads_) {
  Case<T> c(shape, glf::log_scales);
  c.flow.density = true;
  const int K = shape.steps, D = shape.dim, batch = 3, steps = 4;
  std::mt19937 rng(3);
  std::deque<Buffer<T>> room;
  const auto take = [&](glf::Int n) { return room.emplace_back(n, T(NAN)).data(); };
  std::vector<glf::Trained<T>> parameters;
  const auto add = [&](Buffer<T> start) {
    Buffer<T>& value = room.emplace_back(std::move(start));
    const glf::Int n = value.size();
    parameters.push_back({n, value.data(), take(n), room.emplace_back(n, T(0)).data(), room.emplace_back(n, T(0)).data()});
    return parameters.back();
  };
  glf::Maps<T> maps{};
  maps.kind = kind;
  maps.layers.count = K;
  maps.layers.dim = D;
  std::vector<std::int64_t> permutation(K * D);
  for (int i = 0; i < K * D; ++i) permutation[i] = (i + i / D) % D;
  maps.layers.permutation = permutation.data();
  const Buffer<T> sign(K * D, T(-1));
  maps.layers.sign = sign.data();
  using Kind = typename glf::Maps<T>::Kind;
  if (kind == Kind::plu) {
    const auto lower = add(random<T>(K * D * D, 0.1, rng)), upper = add(random<T>(K * D * D, 0.1, rng)),
               log_diag = add(random<T>(K * D, 0.1, rng));
    maps.layers.lower = lower.value, maps.layers.upper = upper.value, maps.layers.log_diag = log_diag.value;
    maps.grad.lower = lower.grad, maps.grad.upper = upper.grad, maps.grad.log_diag = log_diag.grad;
  } else if (kind == Kind::dense) {
    const auto weight = add(c.matrix);
    maps.weight = weight.value, maps.grad_weight = weight.grad;
  }
  if (actnorm) {
    const auto log_scale = add(random<T>(K * D, 0.1, rng)), bias = add(random<T>(K * D, 0.1, rng));
    maps.layers.log_scale = log_scale.value, maps.layers.bias = bias.value;
    maps.grad.log_scale = log_scale.grad, maps.grad.bias = bias.grad;
  }
  std::vector<std::int32_t> info(K);
  maps.info = info.data();
  for (T** to : {&maps.matrix, &maps.grad_matrix, &maps.inverse}) *to = take(K * D * D);
  for (T** to : {&maps.offset, &maps.grad_offset}) *to = take(K * D);
  for (T** to : {&maps.logabsdet, &maps.grad_logabsdet, &maps.sign}) *to = take(K);
  glf::Gradients<T> networks{};
  for (int i = 0; i < c.flow.layers; ++i) {
    const auto weight = add(c.weights[i]), bias = add(c.biases[i]);
    c.flow.weight[i] = weight.value, c.flow.bias[i] = bias.value;
    networks.weight[i] = weight.grad, networks.bias[i] = bias.grad;
  }
  const glf::Int limit = save == glf::Save::records ? 1 << 30 : 0;
  glf::Training<T, glf::Flow<T>> training(c.flow, maps, networks, parameters, batch, limit, take);
  const Buffer<T> weights = random<T>(shape.batch, 1, rng);
  const glf::Dataset<T> data{c.x.data(), shape.context_dim ? c.context.data() : nullptr, actnorm ? weights.data() : nullptr};
  Buffer<T> found;
  for (int step = 0; step < steps; ++step) {
    std::int64_t rows[batch];
    for (std::int64_t& row : rows) row = rng() % shape.batch;
    double loss = NAN;
    if (!training.step(data, rows, 1e-3, step + 1, {0.9, 0.999, 1e-8, 0.1, 1.0}, &loss, threads(threads_))) std::exit(1);
    found.push_back(static_cast<T>(loss));
  }
  for (const auto& p : parameters) found.insert(found.end(), p.value, p.value + p.size);
  return found;
}

template <class T>
void walk_training(double tolerance) {
  using Kind = typename glf::Maps<T>::Kind;
  for (const Shape& shape : {Shape{2, 5, 2, {7}, 9}, Shape{3, 2, 0, {4, 3}, 1}, Shape{1, 20, 3, {800, 400}, 6}})
    for (const Kind kind : {Kind::plu, Kind::dense, Kind::permutation})
      for (const bool actnorm : {false, true}) {
        const Buffer<T> expected = train<T>(shape, kind, actnorm, glf::Save::records, 1);
        for (const glf::Save save : {glf::Save::inputs, glf::Save::records})
          for (const int n : {1, 3}) check("training", train<T>(shape, kind, actnorm, save, n), expected, tolerance);
      }
}

}  // namespace
