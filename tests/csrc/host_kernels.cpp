// The CUDA kernels on the host, behind the interface by which a driver launches them: a name, a grid, shared memory and
// pointers to the arguments. A block after the other; its shared memory is new, filled with NaN, and of the size asked for.
#include "cuda/kernels.cuh"
#include "cuda/row_products.cuh"

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using namespace glf::device;

struct Kernel {
  void (*run)(void** arguments);
  std::vector<int> sizes;  // of the arguments, in bytes
};

template <auto kernel, class... A, std::size_t... I>
Kernel unpack(void (*)(A...), std::index_sequence<I...>) {
  return {[](void** arguments) { kernel(*static_cast<A*>(arguments[I])...); }, {int(sizeof(A))...}};
}
template <auto kernel, class... A>
Kernel make(void (*f)(A...)) {
  return unpack<kernel>(f, std::index_sequence_for<A...>{});
}
template <auto kernel>
Kernel make() {
  return make<kernel>(kernel);
}

template <class T, int... N, int... M>
void add_sizes(std::map<std::string, Kernel>& all, const std::string& space, const std::string& type,
               std::integer_sequence<int, N...>, std::integer_sequence<int, M...>) {
  ((all[space + "slogdet_inverse_warp_kernel<" + std::to_string(N) + ", " + type] =
        make<slogdet_inverse_warp_kernel<N, T>>()),
   ...);
  ((all[space + "slogdet_inverse_tile_kernel<" + std::to_string(M) + ", " + type] =
        make<slogdet_inverse_tile_kernel<M, T>>()),
   ...);
}

template <class T>
void add(std::map<std::string, Kernel>& all, const std::string& type) {
  const std::string space = "glf::device::";
  all[space + "slogdet_inverse_kernel<" + type] = make<slogdet_inverse_kernel<T>>();
  all[space + "plu_assemble_kernel<" + type] = make<plu_assemble_kernel<T>>();
  all[space + "plu_inverse_gradient_kernel<" + type] = make<plu_inverse_gradient_kernel<T>>();
  all[space + "plu_assemble_backward_kernel<" + type] = make<plu_assemble_backward_kernel<T>>();
  add_sizes<T>(all, space, type, std::integer_sequence<int, 4, 8, 16, 24, 32, 48, 64>{},
               std::integer_sequence<int, 4, 6, 8, 12>{});
}

const std::map<std::string, Kernel>& kernels() {
  static const auto all = [] {
    std::map<std::string, Kernel> made;
    add<float>(made, "float>");
    add<double>(made, "double>");
    made["glf::device::row_products_kernel"] = make<row_products_kernel>();
    made["glf::device::add_parts_kernel"] = make<add_parts_kernel>();
    return made;
  }();
  return all;
}

}  // namespace

// 0, or 1 for an unknown kernel, 2 for arguments of other sizes.
extern "C" int launch(const char* name, long long grid, int shared, int count, const int* sizes, void** arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return 1;
  if (std::vector<int>(sizes, sizes + count) != found->second.sizes) return 2;
  for (long long block = 0; block < grid; ++block) {
    auto* memory = static_cast<unsigned char*>(std::malloc(shared + 1));
    std::memset(memory, 0xff, shared);
    host_block = {block, memory};
    found->second.run(arguments);
    std::free(memory);
  }
  return 0;
}
