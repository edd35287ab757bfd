// The choice of an instruction set, once, at the first call.
#include "autoregressive.h"
#include "flow.h"
#include "record.h"

#include <cstdlib>
#include <cstring>

namespace glf {

#define GLF_DECLARE(isa)                    \
  namespace isa {                           \
  extern const Kernels<float> kernels_f32;  \
  extern const Kernels<double> kernels_f64; \
  }
GLF_DECLARE(generic)
#if defined(__x86_64__)
GLF_DECLARE(avx2)
GLF_DECLARE(avx512)
#endif

namespace {

struct Choice {
  int vector_bytes;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

Choice choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("GLF_FAST_ISA");
  const auto allowed = [wish](const char* name) { return !wish || !*wish || !std::strcmp(wish, name); };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed("avx512")) return {64, &avx512::kernels_f32, &avx512::kernels_f64};
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return {32, &avx2::kernels_f32, &avx2::kernels_f64};
#endif
  return {16, &generic::kernels_f32, &generic::kernels_f64};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *choice().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *choice().f64;
}

int code_of(const char* table, const char* name) {
#define GLF_NAME(name) #name,
  static constexpr const char* activation[] = {GLF_ACTIVATIONS(GLF_NAME)};
  static constexpr const char* log_scale[] = {GLF_LOG_SCALES(GLF_NAME)};
  static constexpr const char* coupling[] = {GLF_COUPLINGS(GLF_NAME)};
  static constexpr const char* network[] = {GLF_NETWORKS(GLF_NAME)};
#undef GLF_NAME
  const auto find = [name](const auto& names) {
    int code = 0;
    for (const char* known : names) {
      if (!std::strcmp(known, name)) return code;
      ++code;
    }
    return -1;
  };
  if (!std::strcmp(table, "activation")) return find(activation);
  if (!std::strcmp(table, "log_scale")) return find(log_scale);
  if (!std::strcmp(table, "coupling")) return find(coupling);
  return std::strcmp(table, "network") ? -1 : find(network);
}

int vector_bytes() { return choice().vector_bytes; }

template <class T>
Int record_width(const Flow<T>& flow) {
  return Record::of(flow).width;
}
template Int record_width(const Flow<float>&);
template Int record_width(const Flow<double>&);

template <class T>
Int record_units(const Autoregressive<T>& flow) {
  return PanelRecord::of(flow).size;
}
template Int record_units(const Autoregressive<float>&);
template Int record_units(const Autoregressive<double>&);

}  // namespace glf
