// Launches: a block for each tile of each product, in every step and part.
#include "outcome.h"
#include "row_products.cuh"
#include "row_products.h"

namespace glf::device {

const char* row_products(void* stream, const RowProducts& all) {
  const long long blocks = static_cast<long long>(all.steps) * all.parts * blocks_of(all);
  if (!blocks) return nullptr;
  int device = 0, generation = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (generation < 8) return "this GPU's matrix units have neither tf32 nor bf16 (compute capability below 8.0)";
  const auto s = static_cast<cudaStream_t>(stream);
  cudaFuncSetAttribute(row_products_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, row_products_bytes);
  row_products_kernel<<<static_cast<unsigned>(blocks), row_products_threads, row_products_bytes, s>>>(all);
  if (const char* error = outcome()) return error;
  if (all.parts == 1) return nullptr;
  const long long adding = all.steps * ((numbers_of(all) + added_numbers - 1) / added_numbers);
  add_parts_kernel<<<static_cast<unsigned>(adding), row_products_threads, 0, s>>>(all);
  return outcome();
}

}  // namespace glf::device
