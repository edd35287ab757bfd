// The processor kernels as torch operations, through the LibTorch Stable ABI: one binary for every torch from 2.10 on.
// Checks that keep memory safe, and unwrapping; the Python side (glf_fast/ops) explains to users what does not fit.
#include "bindings_flow.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>

namespace {

using namespace glf::bindings;

// What all calls share, as it comes from Python.
struct Arguments : Networks {
  const Tensor &matrix, &offset;
  const Maybe &unmatrix, &context;
  bool inverse, density, row_scales;
  double dropout;
  const Maybe& seed;

  template <class T>
  glf::Flow<T> flow(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && matrix.dim() == 3 && matrix.size(0) > 0 && matrix.size(1) == x.size(1) &&
                        matrix.size(2) == x.size(1) && offset.dim() == 2 && offset.size(0) == matrix.size(0) &&
                        offset.size(1) == x.size(1) &&
                        (!unmatrix || unmatrix->numel() == matrix.numel()) &&
                        (!context || (context->dim() == 2 && context->size(0) == x.size(0))),
                    "glf_fast: shapes of the rows, the maps and the context do not fit");
    glf::Flow<T> f = Networks::flow<T>(matrix.size(0), matrix.size(1), context);
    f.matrix = read<T>(matrix);
    f.unmatrix = read<T>(unmatrix);
    f.offset = read<T>(offset);
    f.inverse = inverse;
    f.density = density;
    f.row_scales = row_scales;
    STD_TORCH_CHECK(dropout >= 0 && dropout < 1 && (dropout == 0 || (seed && seed->numel() == 1)),
                    "glf_fast: dropout is at least 0, below 1, and has one seed");
    f.dropout = dropout;
    if (dropout > 0) f.seed = static_cast<std::uint64_t>(*read_permutation(*seed));
    return f;
  }
};

// Flow `e` of an ensemble: its pointers moved to its first step, and a seed of its own.
template <class T>
glf::Flow<T> member(glf::Flow<T> flow, int64_t e) {
  const int64_t step = e * flow.steps;
  flow.seed += e;
  flow.matrix += step * flow.dim * flow.dim;
  if (flow.unmatrix) flow.unmatrix += step * flow.dim * flow.dim;
  flow.offset += step * flow.dim;
  for (int i = 0; i < flow.layers; ++i) {
    flow.weight[i] += flow.weights_before(i, step, 0);
    flow.bias[i] += flow.biases_before(i, step, 0);
  }
  return flow;
}

// The first flow of an ensemble. Steps and rows must divide among its members.
template <class T>
glf::Flow<T> first_of(glf::Flow<T> flow, int64_t members, int64_t batch) {
  STD_TORCH_CHECK(members > 0 && flow.steps % members == 0 && batch % members == 0, "glf_fast: ", flow.steps, " steps or ", batch,
                  " rows are not those of ", members, " flows");
  flow.steps /= members;
  return flow;
}

// Calls f(e, threads for it) for every flow e: one thread takes a whole flow where there are enough of them with work for it.
template <class T, class F>
void for_members(const glf::Flow<T>& flow, int64_t members, int64_t rows, F f) {
  const glf::Parallel all = parallel();
  int64_t work = flow.dim * flow.dim;  // multiply-adds of a row and step
  for (int i = 0; i < flow.layers; ++i) work += flow.networks * flow.inputs(i) * flow.outputs(i);
  if (members < all.threads || all.threads == 1 || (work * flow.steps * rows) >> 19 == 0) {
    for (int64_t e = 0; e < members; ++e) f(e, all);
    return;
  }
  std::atomic<int64_t> next{0};
  auto some = [&] {
    for (int64_t e; (e = next++) < members;) f(e, glf::Parallel{1, all.run});
  };
  all.run(all.threads, [](void* task, int) { (*static_cast<decltype(some)*>(task))(); }, &some);
}

// out, logdet and what is saved. The sum of `logabsdet`, of any shape, is added to every logdet.
std::tuple<Tensor, Tensor, Tensor> coupling_flow(Tensor x, Tensor matrix, Tensor offset, Tensors weights,
                                                 Tensors biases, std::optional<Tensor> context, int64_t coupling,
                                                 int64_t network, int64_t activation, double activation_constant,
                                                 int64_t log_scale, double constant, bool add_first,
                                                 std::vector<double> spline, bool inverse, bool density, int64_t save,
                                                 int64_t record, int64_t members, bool row_scales, double dropout,
                                                 std::optional<Tensor> seed, std::optional<Tensor> logabsdet) {
  const Maybe none;
  const Arguments arguments{{weights, biases, coupling, network, activation, activation_constant, log_scale, constant,
                             add_first, spline},
                            matrix, offset, none, context, inverse, density, row_scales, dropout, seed};
  const int64_t batch = x.size(0);
  const auto mode = static_cast<glf::Save>(save);
  Tensor out = alike(x), logdet = empty(x, {batch}), saved;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto flow = first_of(arguments.flow<T>(x), members, batch);
    const int64_t width = mode == glf::Save::records ? glf::record_width(flow) : flow.dim;
    STD_TORCH_CHECK(mode == glf::Save::nothing || record == width, "glf_fast: a record is ", width, " wide, not ",
                    record);
    saved = mode == glf::Save::nothing ? empty(x, {0}) : empty(x, {flow.steps, batch, record});
    const int64_t rows = batch / members, columns = flow.dim, kept = flow.steps * rows * record;
    const T *from = read<T>(x), *given = read<T>(context);
    for_members(flow, members, rows, [&](int64_t e, const glf::Parallel& threads) {
      glf::kernels<T>().forward(member(flow, e), rows, from + e * rows * columns, given ? given + e * rows * flow.context_dim : given,
                                write<T>(out) + e * rows * columns, write<T>(logdet) + e * rows, mode,
                                write<T>(saved) + e * kept, record, threads);
    });
    if (!logabsdet) return;
    const T* terms = read<T>(*logabsdet);
    const T sum = static_cast<T>(std::accumulate(terms, terms + logabsdet->numel(), 0.0));
    for (T *l = write<T>(logdet), *end = l + batch; l < end; ++l) *l += sum;
  });
  return {out, logdet, saved};
}

// ∂x, ∂context (empty without one) and, with `parameters`, ∂matrix (empty unless `of_matrix`), ∂offset, of a density
// ∂log|det| (K,), ∂weights …, ∂biases …
// Without ∂out it is that of the density: out is read.
Tensors coupling_flow_backward(std::optional<Tensor> grad_out, Tensor grad_logdet, Tensor out, Tensor saved, Tensor matrix,
                               std::optional<Tensor> unmatrix, Tensor offset, Tensors weights, Tensors biases,
                               std::optional<Tensor> context, int64_t coupling, int64_t network, int64_t activation,
                               double activation_constant, int64_t log_scale, double constant, bool add_first,
                               std::vector<double> spline, bool inverse,
                               int64_t save, bool parameters, int64_t members, bool of_matrix, bool row_scales,
                               double dropout, std::optional<Tensor> seed) {
  const Arguments arguments{{weights, biases, coupling, network, activation, activation_constant, log_scale, constant,
                             add_first, spline},
                            matrix, offset, unmatrix, context, inverse, !grad_out, row_scales, dropout, seed};
  const auto mode = static_cast<glf::Save>(save);
  STD_TORCH_CHECK(mode != glf::Save::nothing || unmatrix, "glf_fast: rebuilding inputs needs the inverse matrices");
  Tensors grads{alike(out), context ? alike(*context) : empty(out, {0})};
  if (parameters) {
    grads.push_back(of_matrix ? alike(matrix) : empty(out, {0}));
    grads.push_back(alike(offset));
    if (!grad_out) grads.push_back(empty(out, {matrix.size(0)}));
    for (const Tensor& w : weights) grads.push_back(alike(w));
    for (const Tensor& b : biases) grads.push_back(alike(b));
  }
  for_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const int64_t batch = out.size(0);
    const auto flow = first_of(arguments.flow<T>(out), members, batch);
    STD_TORCH_CHECK((!grad_out || grad_out->numel() == out.numel()) && grad_logdet.numel() == out.size(0) &&
                        (mode == glf::Save::nothing ||
                         (saved.dim() == 3 && saved.size(0) == flow.steps && saved.size(1) == out.size(0) &&
                          saved.size(2) == (mode == glf::Save::records ? glf::record_width(flow) : flow.dim))),
                    "glf_fast: gradients or saved values do not fit the output");
    const int64_t record = mode == glf::Save::nothing ? 0 : saved.size(2), rows = batch / members;
    const T *from = read<T>(out), *given = read<T>(context), *keeps = read<T>(saved), *g_logdet = read<T>(grad_logdet);
    const T* g_out = grad_out ? read<T>(*grad_out) : nullptr;
    const int first = grad_out ? 4 : 5;  // of the gradients of weights; g_out is null of no rows, too
    for_members(flow, members, rows, [&](int64_t e, const glf::Parallel& threads) {
      const int64_t step = e * flow.steps, row = e * rows, at = row * flow.dim;
      glf::Gradients<T> target{};
      if (parameters) {
        if (of_matrix) target.matrix = write<T>(grads[2]) + step * flow.dim * flow.dim;
        target.offset = write<T>(grads[3]) + step * flow.dim;
        if (!grad_out) {
          const double sum = std::accumulate(g_logdet + row, g_logdet + row + rows, 0.0);
          std::fill_n(write<T>(grads[4]) + step, flow.steps, static_cast<T>(sum));
        }
        for (int i = 0; i < flow.layers; ++i) {
          target.weight[i] = write<T>(grads[first + i]) + flow.weights_before(i, step, 0);
          target.bias[i] = write<T>(grads[first + flow.layers + i]) + flow.biases_before(i, step, 0);
        }
      }
      glf::kernels<T>().backward(member(flow, e), rows, from + at, given ? given + row * flow.context_dim : given, mode,
                                 keeps + step * rows * record, record, g_out ? g_out + at : g_out, g_logdet + row,
                                 write<T>(grads[0]) + at, write<T>(grads[1]) + row * flow.context_dim,
                                 parameters ? &target : nullptr, threads);
    });
  });
  return grads;
}

void check_operands(const Tensor& v, const Tensor& u, const Tensor& t, int64_t log_scale) {
  STD_TORCH_CHECK(log_scale >= 0 && log_scale < glf::log_scales, "glf_fast: unknown functions");
  STD_TORCH_CHECK((v.dim() == 2 || v.dim() == 3) && u.sizes().equals(v.sizes()) && t.sizes().equals(v.sizes()),
                  "glf_fast: operands must have one shape (B, n) or (B, pixels, n)");
}

// Samples, and their pixels, may lie apart, as halves of a split do.
template <class T>
glf::Channels<T> channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) == 1, "glf_fast: channels must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
                  "glf_fast: a kernel got tensors of several dtypes");
  check_not_freed(t);
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), last == 2 ? t.stride(1) : t.size(1)};
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor v, Tensor u, Tensor t, int64_t log_scale, double constant,
                                           bool add_first, bool inverse) {
  check_operands(v, u, t, log_scale);
  Tensor w = alike(v), logdet = empty(v, {v.size(0)});
  const int64_t last = v.dim() - 1, pixels = last == 2 ? v.size(1) : 1;
  for_dtype(v, [&](auto zero) {
    using T = decltype(zero);
    const glf::Coupling<T> op{glf::Kind::affine, static_cast<glf::LogScale>(log_scale), static_cast<T>(constant),
                              add_first, inverse, {}};
    glf::kernels<T>().coupling(op, v.size(0), pixels, v.size(last), channels<T>(v), channels<T>(u), channels<T>(t),
                               write<T>(w), write<T>(logdet), parallel());
  });
  return {w, logdet};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(Tensor grad_w, Tensor grad_logdet, Tensor v, Tensor u,
                                                            Tensor t, int64_t log_scale, double constant,
                                                            bool add_first, bool inverse) {
  check_operands(v, u, t, log_scale);
  STD_TORCH_CHECK(grad_w.sizes().equals(v.sizes()) && grad_logdet.numel() == v.size(0),
                  "glf_fast: gradients do not fit");
  Tensor grad_v = alike(v), grad_u = alike(v), grad_t = alike(v);
  const int64_t last = v.dim() - 1, pixels = last == 2 ? v.size(1) : 1;
  for_dtype(v, [&](auto zero) {
    using T = decltype(zero);
    const glf::Coupling<T> op{glf::Kind::affine, static_cast<glf::LogScale>(log_scale), static_cast<T>(constant),
                              add_first, inverse, {}};
    glf::kernels<T>().coupling_backward(op, v.size(0), pixels, v.size(last), channels<T>(v), channels<T>(u),
                                        channels<T>(t), read<T>(grad_w), read<T>(grad_logdet), write<T>(grad_v),
                                        write<T>(grad_u), write<T>(grad_t), parallel());
  });
  return {grad_v, grad_u, grad_t};
}

void check_splines(const Tensor& x, const Tensor& parameters, const std::vector<double>& options) {
  STD_TORCH_CHECK(x.dim() == 2 && parameters.dim() == 3 && parameters.size(0) == x.size(0) &&
                      parameters.size(1) == x.size(1) && parameters.size(2) == spline_of<double>(options).columns(),
                  "glf_fast: parameters of splines do not fit");
}

std::tuple<Tensor, Tensor> spline(Tensor x, Tensor parameters, std::vector<double> options, bool inverse) {
  check_splines(x, parameters, options);
  Tensor y = alike(x), logdet = empty(x, {x.size(0)});
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().spline(spline_of<T>(options), inverse, x.size(0), x.size(1), read<T>(x), read<T>(parameters),
                             write<T>(y), write<T>(logdet), parallel());
  });
  return {y, logdet};
}

std::tuple<Tensor, Tensor> spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters,
                                           std::vector<double> options, bool inverse) {
  check_splines(x, parameters, options);
  STD_TORCH_CHECK(grad_y.sizes().equals(x.sizes()) && grad_logdet.numel() == x.size(0), "glf_fast: gradients do not fit");
  Tensor grad_x = alike(x), grad_parameters = alike(parameters);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    glf::kernels<T>().spline_backward(spline_of<T>(options), inverse, x.size(0), x.size(1), read<T>(x),
                                      read<T>(parameters), read<T>(grad_y), read<T>(grad_logdet), write<T>(grad_x),
                                      write<T>(grad_parameters), parallel());
  });
  return {grad_x, grad_parameters};
}

// Whether two lists of tensors are contiguous and the same: shapes, dtypes, bytes.
bool identical(Tensors a, Tensors b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].is_contiguous() || !b[i].is_contiguous()) return false;
    if (a[i].scalar_type() != b[i].scalar_type() || !a[i].sizes().equals(b[i].sizes())) return false;
    check_storage(a[i]), check_storage(b[i]);
    if (std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(), a[i].numel() * a[i].element_size())) return false;
  }
  return true;
}

// The number by which the other operations know a name, or −1: see cpu/flow.h.
int64_t code(std::string table, std::string name) { return glf::code_of(table.c_str(), name.c_str()); }

int64_t vector_bytes() { return glf::vector_bytes(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glf_fast, m) {
  m.def(
      "cpu_coupling_flow(Tensor x, Tensor matrix, Tensor offset, Tensor[] weights, Tensor[] biases, Tensor? context, "
      "int coupling, int network, int activation, float activation_constant, int log_scale, float constant, bool add_first, "
      "float[] spline, "
      "bool inverse, bool density, int save, int record, int members=1, bool row_scales=False, "
      "float dropout=0, Tensor? seed=None, Tensor? logabsdet=None)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_coupling_flow_backward(Tensor? grad_out, Tensor grad_logdet, Tensor out, Tensor saved, Tensor matrix, "
      "Tensor? unmatrix, Tensor offset, Tensor[] weights, Tensor[] biases, Tensor? context, int coupling, int network, "
      "int activation, float activation_constant, int log_scale, float constant, bool add_first, float[] spline, "
      "bool inverse, int save, bool parameters, int members=1, bool of_matrix=True, bool row_scales=False, "
      "float dropout=0, Tensor? seed=None) -> Tensor[]");
  m.def(
      "cpu_affine_coupling(Tensor v, Tensor u, Tensor t, int log_scale, float constant, bool add_first, bool inverse)"
      " -> (Tensor, Tensor)");
  m.def(
      "cpu_affine_coupling_backward(Tensor grad_w, Tensor grad_logdet, Tensor v, Tensor u, Tensor t, int log_scale, "
      "float constant, bool add_first, bool inverse) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_spline(Tensor x, Tensor parameters, float[] options, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "cpu_spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, float[] options, bool inverse)"
      " -> (Tensor, Tensor)");
  m.def("cpu_identical(Tensor[] a, Tensor[] b) -> bool");
  m.def("cpu_code(str table, str name) -> int");
  m.def("cpu_vector_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CPU, m) {
  m.impl("cpu_coupling_flow", TORCH_BOX(&coupling_flow));
  m.impl("cpu_coupling_flow_backward", TORCH_BOX(&coupling_flow_backward));
  m.impl("cpu_affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("cpu_affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  m.impl("cpu_spline", TORCH_BOX(&spline));
  m.impl("cpu_spline_backward", TORCH_BOX(&spline_backward));
  m.impl("cpu_identical", TORCH_BOX(&identical));
}

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_code", TORCH_BOX(&code));
  m.impl("cpu_vector_bytes", TORCH_BOX(&vector_bytes));
}
