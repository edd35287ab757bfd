// Training as a torch operation: many steps of a flow's optimizer in one call.
#include "bindings_flow.h"
#include "cpu/fit.h"

#include <chrono>
#include <limits>

namespace {

using namespace glf::bindings;

// A parameter's numbers, after the checks of `read`.
template <class T>
T* change(const Tensor& t) {
  read<T>(t);
  return write<T>(t);
}

// Memory that is uninitialised and lives as long as this.
struct Room {
  const Tensor& like;
  Tensors blocks;
  template <class T>
  T* take(int64_t n) {
    blocks.push_back(empty(like, {n}));
    return write<T>(blocks.back());
  }
};

// The tensors of a flow's maps and of its optimizer, as they come from Python.
struct Arguments {
  const Maybe &permutation, &sign;
  const Tensors &linear;   // lower, upper, log_diag of "plu", the weight of "dense", nothing of "permutation"
  const Tensors &actnorm;  // log_scale, bias, or nothing
  const Tensors &means, &squares;  // Adam's, of all parameters: of those above, weights, biases; empty where one is frozen

  // The next parameter of the optimizer, with memory for its gradient.
  template <class T>
  const glf::Trained<T>& add(const Tensor& parameter, int64_t size, std::vector<glf::Trained<T>>& to, Room& room) const {
    STD_TORCH_CHECK(parameter.numel() == size, "glf_fast: a parameter has ", parameter.numel(), " numbers, not ", size);
    STD_TORCH_CHECK(to.size() < means.size() && to.size() < squares.size(), "glf_fast: a parameter has no moments");
    const Tensor &mean = means[to.size()], &square = squares[to.size()];
    const bool frozen = mean.numel() == 0;
    STD_TORCH_CHECK(frozen || (mean.numel() == size && square.numel() == size), "glf_fast: moments do not fit");
    to.push_back({size, change<T>(parameter), room.take<T>(size), frozen ? nullptr : change<T>(mean),
                  frozen ? nullptr : change<T>(square)});
    return to.back();
  }

  template <class T, class Flow>
  glf::Maps<T> maps(const Flow& flow, std::vector<glf::Trained<T>>& to, Room& room) const {
    using Kind = typename glf::Maps<T>::Kind;
    glf::Maps<T> m{};
    const int64_t vectors = flow.steps * flow.dim, matrices = vectors * flow.dim;
    STD_TORCH_CHECK(linear.size() == 3 || linear.size() <= 1, "glf_fast: unknown linear layers");
    m.kind = linear.size() == 3 ? Kind::plu : linear.size() == 1 ? Kind::dense : Kind::permutation;
    m.layers.count = flow.steps;
    m.layers.dim = flow.dim;
    if (m.kind == Kind::dense) {
      const auto& weight = add(linear[0], matrices, to, room);
      m.weight = weight.value;
      m.grad_weight = weight.grad;
      m.inverse = room.take<T>(matrices);
      m.sign = room.take<T>(flow.steps);
      m.info = reinterpret_cast<std::int32_t*>(room.take<T>(flow.steps));
    } else {
      STD_TORCH_CHECK(permutation && permutation->numel() == vectors, "glf_fast: permutation must be (K, D)");
      m.layers.permutation = read_permutation(*permutation);
      for (int64_t i = 0; i < vectors; ++i)
        STD_TORCH_CHECK(m.layers.permutation[i] >= 0 && m.layers.permutation[i] < flow.dim,
                        "glf_fast: permutation must hold indices from 0 to ", flow.dim - 1);
    }
    if (m.kind == Kind::plu) {
      STD_TORCH_CHECK(sign && sign->numel() == vectors, "glf_fast: sign must be (K, D)");
      m.layers.sign = read<T>(*sign);
      const glf::Trained<T> lower = add(linear[0], matrices, to, room), upper = add(linear[1], matrices, to, room),
                            log_diag = add(linear[2], vectors, to, room);
      m.layers.lower = lower.value, m.layers.upper = upper.value, m.layers.log_diag = log_diag.value;
      m.grad.lower = lower.grad, m.grad.upper = upper.grad, m.grad.log_diag = log_diag.grad;
    }
    if (!actnorm.empty()) {
      STD_TORCH_CHECK(actnorm.size() == 2, "glf_fast: an ActNorm has a log-scale and a bias");
      const glf::Trained<T> log_scale = add(actnorm[0], vectors, to, room), bias = add(actnorm[1], vectors, to, room);
      m.layers.log_scale = log_scale.value, m.layers.bias = bias.value;
      m.grad.log_scale = log_scale.grad, m.grad.bias = bias.grad;
    }
    for (T** matrix : {&m.matrix, &m.grad_matrix}) *matrix = room.take<T>(matrices);
    for (T** vector : {&m.offset, &m.grad_offset}) *vector = room.take<T>(vectors);
    for (T** number : {&m.logabsdet, &m.grad_logabsdet}) *number = room.take<T>(flow.steps);
    return m;
  }
};

glf::AdamW adamw(double beta1, double beta2, double epsilon, double weight_decay, std::optional<double> clip) {
  return {beta1, beta2, epsilon, weight_decay, clip.value_or(std::numeric_limits<double>::infinity())};
}

// What is trained on, how, and for how long; see `fit`.
struct __attribute__((visibility("hidden"))) Run {
  const Tensor &order, &rates, &x;
  const Maybe &context, &row_weights;
  const Tensor& losses;
  int64_t number;
  glf::AdamW by;
  int64_t records_limit;
  double seconds;

  // Of the flow `networks` and those maps. Weights and biases are by layer.
  template <class N>
  int64_t operator()(const N& networks, const Arguments& arguments) const {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    STD_TORCH_CHECK(order.dim() == 2 && order.size(1) > 0 && rates.numel() == order.size(0) &&
                        losses.numel() == order.size(0) && x.dim() == 2 &&
                        (!context || (context->dim() == 2 && context->size(0) == x.size(0))) &&
                        (!row_weights || row_weights->numel() == x.size(0)),
                    "glf_fast: shapes of the rows and their order do not fit");
    const int64_t steps = order.size(0), batch = order.size(1);
    const int64_t* rows = read_permutation(order);
    for (int64_t i = 0; i < order.numel(); ++i)
      STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < x.size(0), "glf_fast: there is no row ", rows[i]);
    const double* rate = read<double>(rates);
    double* loss = change<double>(losses);
    const Tensors &weights = networks.weights, &biases = networks.biases;
    int64_t done = 0;
    bool finite = true;
    for_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      Room room{x, {}};
      auto flow = networks.template flow<T>(weights.empty() ? 0 : weights[0].size(0), x.size(1), context);
      flow.density = true;
      std::vector<glf::Trained<T>> parameters;
      const auto maps = arguments.maps<T>(flow, parameters, room);
      glf::GradientsOf<decltype(flow)> gradients{};
      for (size_t i = 0; i < weights.size(); ++i)
        gradients.weight[i] = arguments.add(weights[i], weights[i].numel(), parameters, room).grad;
      for (size_t i = 0; i < biases.size(); ++i)
        gradients.bias[i] = arguments.add(biases[i], biases[i].numel(), parameters, room).grad;
      glf::Training<T, decltype(flow)> training(flow, maps, gradients, parameters, batch, records_limit,
                                                [&](int64_t n) { return room.take<T>(n); });
      const glf::Dataset<T> data{read<T>(x), read<T>(context), read<T>(row_weights)};
      do {
        finite = training.step(data, rows + done * batch, rate[done], number + done, by, loss + done, parallel());
        done += finite;
      } while (finite && done < steps && Clock::now() < end);
    });
    return finite ? done : -1 - done;
  }
};

// Steps of AdamW, one for each row of `order` (steps, B), indices into x (N, D), context (N, C) and weights of the loss
// (N,), at the rates (steps,): as many as fit into so many seconds, at least one. `losses` (steps,) are from before each.
// Returns the number of steps, n, or −1 − n where the next one's loss or gradient is not finite, which is left out.
int64_t fit(Tensor order, Tensor rates, Tensor x, Maybe context, Maybe row_weights, Maybe permutation, Maybe sign,
            Tensors linear, Tensors actnorm, Tensors weights, Tensors biases, Tensors means, Tensors squares,
            Tensor losses, int64_t coupling, int64_t network, int64_t activation, double activation_constant, int64_t log_scale,
            double constant, bool add_first, std::vector<double> spline, int64_t number, double beta1, double beta2,
            double epsilon, double weight_decay, std::optional<double> clip, int64_t records_limit, double seconds) {
  const Run run{order, rates, x, context, row_weights, losses, number, adamw(beta1, beta2, epsilon, weight_decay, clip),
                records_limit, seconds};
  return run(Networks{weights, biases, coupling, network, activation, activation_constant, log_scale, constant, add_first,
                      spline},
             {permutation, sign, linear, actnorm, means, squares});
}

// The same of masked autoregressive flows.
int64_t autoregressive_fit(Tensor order, Tensor rates, Tensor x, Maybe context, Maybe row_weights, Maybe permutation,
                           Maybe sign, Tensors linear, Tensors actnorm, Tensors weights, Tensors biases, Tensors means,
                           Tensors squares, Tensor losses, Tensor fan_in, int64_t transform, int64_t network,
                           int64_t activation, double activation_constant, int64_t log_scale, double constant,
                           bool context_layer, std::vector<double> spline, int64_t number, double beta1,
                           double beta2, double epsilon, double weight_decay, std::optional<double> clip,
                           int64_t records_limit, double seconds) {
  const Run run{order, rates, x, context, row_weights, losses, number, adamw(beta1, beta2, epsilon, weight_decay, clip),
                records_limit, seconds};
  return run(MaskedNetworks{weights, biases, fan_in, transform, network, activation, activation_constant, log_scale, constant,
                            context_layer, spline},
             {permutation, sign, linear, actnorm, means, squares});
}

}  // namespace

// What both operations take, before and behind what describes their networks.
#define GLF_DATA \
  "Tensor order, Tensor rates, Tensor x, Tensor? context, Tensor? row_weights, Tensor? permutation, Tensor? sign, " \
  "Tensor(a!)[] linear, Tensor(b!)[] actnorm, Tensor(c!)[] weights, Tensor(d!)[] biases, Tensor(e!)[] means, " \
  "Tensor(f!)[] squares, Tensor(g!) losses, "
#define GLF_OPTIMIZER \
  ", int number, float beta1, float beta2, float epsilon, float weight_decay, float? clip, int records_limit, float seconds"

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def("cpu_fit(" GLF_DATA
        "int coupling, int network, int activation, float activation_constant, int log_scale, float constant, "
        "bool add_first, float[] spline" GLF_OPTIMIZER
        ") -> int");
  m.def("cpu_autoregressive_fit(" GLF_DATA
        "Tensor fan_in, int transform, int network, int activation, float activation_constant, int log_scale, "
        "float constant, bool context_layer, float[] spline" GLF_OPTIMIZER ") -> int");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_fit", TORCH_BOX(&fit));
  m.impl("cpu_autoregressive_fit", TORCH_BOX(&autoregressive_fit));
}
