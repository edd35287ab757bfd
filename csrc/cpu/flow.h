// The interface of the processor kernels: plain pointers, no torch, no instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glf {

using Int = std::ptrdiff_t;

// What there is of each, by the names in glf_fast.reference. Python asks for a name's number (code_of).
#define GLF_ACTIVATIONS(X) X(relu) X(leaky_relu) X(silu) X(gelu) X(tanh) X(elu) X(selu) \
  X(hardswish) X(softplus) X(mish)
#define GLF_LOG_SCALES(X) X(tanh) X(exp) X(glow) X(nflows) X(atan) X(softclip) X(jet) X(softplus) X(clamp) X(bayesflow)
#define GLF_COUPLINGS(X) X(affine) X(separate) X(additive) X(spline)
#define GLF_NETWORKS(X) X(mlp) X(residual) X(skip)
#define GLF_ENUMERATOR(name) name,
enum class Activation : int { GLF_ACTIVATIONS(GLF_ENUMERATOR) };
enum class LogScale : int { GLF_LOG_SCALES(GLF_ENUMERATOR) };
enum class Kind : int { GLF_COUPLINGS(GLF_ENUMERATOR) };  // of coupling
enum class Network : int { GLF_NETWORKS(GLF_ENUMERATOR) };
#undef GLF_ENUMERATOR

// The number of a name in a table ("activation", "log_scale", "coupling", "network"), or −1.
int code_of(const char* table, const char* name);
// Names in each table.
#define GLF_ONE(name) +1
inline constexpr int activations = GLF_ACTIVATIONS(GLF_ONE), log_scales = GLF_LOG_SCALES(GLF_ONE),
                     kinds = GLF_COUPLINGS(GLF_ONE), network_kinds = GLF_NETWORKS(GLF_ONE);
#undef GLF_ONE

// Networks of a step: one that makes all parameters of the coupling, or one for u and one for t.
constexpr int networks_of(Kind kind) { return kind == Kind::separate ? 2 : 1; }

// Slopes of a spline's knots that are given, less the number of its bins: glf_fast.reference.TAILS.
enum class Tails : int { linear = -1, circular = 0, none = 1 };

// A rational-quadratic spline with the constants of glf_fast.reference.PreparedSpline.
template <class T>
struct Spline {
  int bins;
  Tails tails;
  bool soft_clip;
  T low, high, min_width, min_height, min_derivative, factor, clip, scale;

  Int columns() const { return 3 * bins + static_cast<int>(tails); }  // parameters
};
inline constexpr int most_bins = 32;

// What a pass over the flow keeps for its backward.
enum class Save : int {
  nothing,  // only the output: the backward rebuilds every step's input by undoing the step
  inputs,   // each step's input, (K, B, D): the backward recomputes the networks
  records,  // all intermediate values, (K, B, record): the backward recomputes nothing
};

inline constexpr int max_layers = 17;  // of a residual network of five blocks with gates
inline constexpr int max_blocks = (max_layers - 2) / 2;

// K steps with stacked, contiguous parameters, see glf_fast.reference.coupling_flow. The direction in which the op runs
// is `inverse`; `matrix` is A (forward) or A⁻¹ (inverse), `unmatrix` the other one, needed only to rebuild inputs.
template <class T>
struct Flow {
  Int steps, dim, context_dim;
  Kind kind;
  Network network;
  int networks;                // networks_of(kind)
  int layers;                  // linear layers of a network
  Int width[max_layers + 1];   // P + C, hidden widths, columns()·(D//2)
  const T* matrix;             // (K, D, D)
  const T* unmatrix;           // (K, D, D)
  const T* offset;             // c (K, D)
  const T* weight[max_layers]; // (K, networks, inputs(i), outputs(i))
  const T* bias[max_layers];   // (K, networks, outputs(i))
  Activation activation;
  T activation_constant;      // the slope of leaky_relu, α of elu
  LogScale log_scale;
  T constant;                  // the log-scale's; ln m for softclip
  Spline<T> spline;            // of that kind alone
  bool add_first, inverse;
  bool density;                // log N(out; 0, I) is added to the log-determinants
  bool row_scales;             // of A only the scales of its rows are trained: see map_gradient_of_sums in flow_tile.h
  double dropout;              // p, of hidden units
  std::uint64_t seed;          // of what is dropped: see dropout.h

  Int passive() const { return dim - dim / 2; }
  Int transformed() const { return dim / 2; }
  // The linear layers of a residual network are the first, for each block its two and, with a context, its gate's, and the
  // last: see glf_fast.reference.residual. All widths but those of its ends are equal.
  int layers_of_block() const { return context_dim ? 3 : 2; }
  int blocks() const { return network == Network::residual ? (layers - 2) / layers_of_block() : 0; }
  bool is_gate(int i) const { return network == Network::residual && context_dim && i && i % 3 == 0; }
  // Columns of linear layer i. A gate's are given the context, all others what the layer before them makes.
  Int inputs(int i) const { return is_gate(i) ? context_dim : width[i]; }
  Int outputs(int i) const { return width[i + 1]; }
  // Numbers that a network makes for each transformed column.
  Int columns() const { return kind == Kind::spline ? spline.columns() : kind == Kind::affine ? 2 : 1; }
  // Elements of weight[i] and of bias[i] up to those of network n in step k.
  Int weights_before(int i, Int k, int n) const { return (k * networks + n) * inputs(i) * outputs(i); }
  Int biases_before(int i, Int k, int n) const { return (k * networks + n) * outputs(i); }
};

// Gradients of the parameters, shaped like them. All are written, none is read. `matrix` is null where it is not wanted.
template <class T>
struct Gradients {
  T *matrix, *offset, *weight[max_layers], *bias[max_layers];
};

// How work is spread over threads: run(tasks, task, context) calls task(context, i) once for every i < tasks.
struct Parallel {
  int threads;
  void (*run)(int tasks, void (*task)(void*, int), void* context);
};

template <class T>
struct Coupling {
  Kind kind;
  LogScale log_scale;  // of an affine one
  T constant;  // as in Flow
  bool add_first, inverse;
  Spline<T> spline;
};

// (B, pixels, n) in memory: channels side by side, pixels and samples as far apart as these say.
template <class T>
struct Channels {
  const T* data;
  Int sample, pixel;
};

// Invertible linear layers, see glf_fast.reference.plu_assemble: vectors (K, D), matrices (K, D, D).
template <class T>
struct Plu {
  Int count, dim;
  const std::int64_t* permutation;
  const T *lower, *upper, *log_diag, *sign;
  const T *log_scale, *bias;  // of the ActNorm; null without one
};

// Shaped like the parameters; those of the ActNorm are null without one. All are written.
template <class T>
struct PluGradients {
  T *lower, *upper, *log_diag, *log_scale, *bias;
};

template <class T>
struct Autoregressive;
template <class T>
struct AutoregressiveGradients;  // see autoregressive.h

// Glow's network of images (height, width, channels): relu(actnorm(conv 3 × 3 of [x, 1])), relu(actnorm(conv 1 × 1)), and
// e^(gain_factor·log_gain)·(conv 3 × 3 of [h, 1] + bias), padded with zeros. Weights are in torch's order.
template <class T>
struct GlowNetwork {
  Int height, width, channels, hidden, outputs;
  T gain_factor;
  const T *first, *first_log_scale, *first_bias;     // (hidden, channels + 1, 3, 3), (hidden,), (hidden,)
  const T *second, *second_log_scale, *second_bias;  // (hidden, hidden), (hidden,), (hidden,)
  const T *last, *edge, *bias, *log_gain;            // (outputs, hidden, 3, 3), (outputs, 3, 3), (outputs,), (outputs,)
};

// Shaped like the parameters; all are written.
template <class T>
struct GlowGradients {
  T *first, *first_log_scale, *first_bias, *second, *second_log_scale, *second_bias, *last, *edge, *bias, *log_gain;
};

// One instruction set's kernels. Matrices are contiguous, (rows, columns).
template <class T>
struct Kernels {
  // x (B, D), context (B, C) → out (B, D), logdet (B,), saved as `save` says with `record` elements a row.
  void (*forward)(const Flow<T>&, Int batch, const T* x, const T* context, T* out, T* logdet, Save save, T* saved,
                  Int record, const Parallel&);
  // From the output, what was saved, ∂out (null with `density`, whose own it is: −out·∂logdet) and ∂logdet to ∂x, ∂context
  // and, unless null, the parameters' gradients.
  void (*backward)(const Flow<T>&, Int batch, const T* out, const T* context, Save save, const T* saved, Int record,
                   const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context, const Gradients<T>*,
                   const Parallel&);
  // The same of masked autoregressive flows, whose records are those of panels of rows; ∂context is wanted unless null.
  void (*autoregressive)(const Autoregressive<T>&, Int batch, const T* x, const T* context, T* out, T* logdet, Save save,
                         T* saved, const Parallel&);
  void (*autoregressive_backward)(const Autoregressive<T>&, Int batch, const T* out, const T* context, Save save,
                                  const T* saved, const T* grad_out, const T* grad_logdet, T* grad_x, T* grad_context,
                                  const AutoregressiveGradients<T>*, const Parallel&);
  // w (B, pixels, n) and logdet (B,) from v, u, t; then from their gradients to those of v, u, t.
  void (*coupling)(const Coupling<T>&, Int batch, Int pixels, Int n, Channels<T> v, Channels<T> u, Channels<T> t, T* w,
                   T* logdet, const Parallel&);
  void (*coupling_backward)(const Coupling<T>&, Int batch, Int pixels, Int n, Channels<T> v, Channels<T> u, Channels<T> t,
                            const T* grad_w, const T* grad_logdet, T* grad_v, T* grad_u, T* grad_t, const Parallel&);
  // y (rows, n) and logdet (rows,) from x and parameters (rows, n, columns()); then from their gradients to those of x and of
  // the parameters.
  void (*spline)(const Spline<T>&, bool inverse, Int rows, Int n, const T* x, const T* parameters, T* y, T* logdet,
                 const Parallel&);
  void (*spline_backward)(const Spline<T>&, bool inverse, Int rows, Int n, const T* x, const T* parameters,
                          const T* grad_y, const T* grad_logdet, T* grad_x, T* grad_parameters, const Parallel&);
  // A, A⁻¹ (unless null), c and log|det A| (K,); and from their gradients (null where zero) to the parameters'.
  void (*plu_assemble)(const Plu<T>&, T* A, T* A_inv, T* c, T* logabsdet, const Parallel&);
  void (*plu_assemble_backward)(const Plu<T>&, const T* A, const T* A_inv, const T* grad_A, const T* grad_A_inv,
                                const T* grad_c, const T* grad_logabsdet, const PluGradients<T>&, const Parallel&);
  // Dense matrices (count, D, D): sign and log|det A| (count,), A⁻¹, LAPACK's info. A zero pivot gives info > 0, (0, −∞) and an
  // inverse without meaning.
  void (*slogdet_inverse)(Int count, Int dim, const T* A, T* sign, T* logabsdet, T* inverse, std::int32_t* info,
                          const Parallel&);
  // x (B, height, width, channels) → out (B, height, width, outputs); then ∂out to ∂x and the parameters' gradients.
  void (*glow_network)(const GlowNetwork<T>&, Int batch, const T* x, T* out, const Parallel&);
  void (*glow_network_backward)(const GlowNetwork<T>&, Int batch, const T* x, const T* grad_out, T* grad_x,
                                const GlowGradients<T>&, const Parallel&);
  // The coupling of images x (B, height, width, channels + outputs / 2) with that network, in two parts, of which v, that it
  // transforms, is the first or the last: y, logdet (B,) and what the network made (B, height, width, outputs); then from ∂y and
  // ∂logdet to ∂x and the parameters' gradients.
  void (*glow_coupling)(const GlowNetwork<T>&, const Coupling<T>&, bool v_first, Int batch, const T* x, T* y, T* logdet, T* raw,
                        const Parallel&);
  void (*glow_coupling_backward)(const GlowNetwork<T>&, const Coupling<T>&, bool v_first, Int batch, const T* x, const T* raw,
                                 const T* grad_y, const T* grad_logdet, T* grad_x, const GlowGradients<T>&, const Parallel&);
  // y = x A + c, or (x − c) A with `inverse`, of x (rows, channels); then from ∂y to ∂x, ∂A, ∂c.
  void (*channel_map)(Int rows, Int channels, const T* x, const T* A, const T* c, bool inverse, T* y, const Parallel&);
  void (*channel_map_backward)(Int rows, Int channels, const T* grad_y, const T* x, const T* A, const T* c, bool inverse, T* grad_x,
                               T* grad_A, T* grad_c, const Parallel&);
};

// The kernels for this processor; $GLF_FAST_ISA (avx512, avx2, generic) may ask for lesser ones.
template <class T>
const Kernels<T>& kernels();
// Bytes in a vector of theirs: 64 (AVX-512), 32 (AVX2) or 16 (SSE2, NEON).
int vector_bytes();

// Elements that Save::records keeps a row; the same for every instruction set.
template <class T>
Int record_width(const Flow<T>&);

}  // namespace glf
