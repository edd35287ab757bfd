// Sums over rows on CUDA tensors. The schema is in glf_fast/ops/row_products/__init__.py.
#include "bindings_cuda.h"

#include "cuda/row_products.h"

namespace {

using namespace glf::bindings;
namespace device = glf::device;

constexpr int64_t most_columns = 32768, most_blocks = (int64_t{1} << 31) - 1;

// One factor's rows (steps, rows, columns): where they begin, and how many numbers lie between two steps, and two rows.
struct Rows {
  const void* first;
  int64_t step, row;
  int bytes;  // that can be copied at once: all rows begin at multiples of them
};

Rows rows_of(const Tensor& t, bool in_bf16, int64_t steps, int64_t rows) {
  check_place(t);
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == steps && t.size(1) == rows && t.size(2) <= most_columns,
                  "glf_fast: row_products takes factors (steps, rows, columns) of up to 32768 columns");
  STD_TORCH_CHECK(t.scalar_type() == (in_bf16 ? ScalarType::BFloat16 : ScalarType::Float),
                  "glf_fast: row_products takes rows of float32, or bf16 for operands 2");
  if (!t.numel()) return {nullptr, 0, 0, 16};
  STD_TORCH_CHECK(t.size(2) == 1 || t.stride(2) == 1, "glf_fast: row_products takes rows whose numbers are neighbours");
  check_not_freed(t);
  const int size = in_bf16 ? 2 : 4;
  Rows found{t.const_data_ptr(), steps > 1 ? t.stride(0) : 0, rows > 1 ? t.stride(1) : 0, 16};
  STD_TORCH_CHECK(found.row < (int64_t{1} << 31), "glf_fast: row_products takes rows less than 2^31 numbers apart");
  const auto places = reinterpret_cast<std::uintptr_t>(found.first) |
                      static_cast<std::uintptr_t>(found.step * size) | static_cast<std::uintptr_t>(found.row * size);
  while (places % found.bytes) found.bytes /= 2;
  STD_TORCH_CHECK(found.bytes >= 4, "glf_fast: row_products takes bf16 rows that begin at multiples of four bytes");
  return found;
}

float* result(const Tensor& t, std::initializer_list<int64_t> shape) {
  check_place(t);
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous() && t.scalar_type() == ScalarType::Float;
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "glf_fast: results of row_products are contiguous float32, (steps, n_in, n_out) and (steps, n_out)");
  check_storage(t);
  return write<float>(t);
}

void row_products(Tensors x, Tensors g, std::vector<int64_t> operands, Tensors products, Tensors sums, bool accumulate,
                  int64_t parts) {
  const size_t count = x.size();
  STD_TORCH_CHECK(count && count <= device::most_products && g.size() == count && operands.size() == count &&
                      products.size() == count && sums.size() == count,
                  "glf_fast: row_products takes lists of 1 to 8 and of one length");
  STD_TORCH_CHECK(g[0].dim() == 3 && g[0].size(1) < (int64_t{1} << 31) - device::stage_rows,
                  "glf_fast: row_products takes fewer than 2^31 rows");
  const int64_t steps = g[0].size(0), rows = g[0].size(1);
  device::RowProducts all{};
  all.count = static_cast<int>(count);
  all.steps = static_cast<int>(steps);
  all.rows = static_cast<int>(rows);
  all.accumulate = accumulate;
  for (size_t i = 0; i < count; ++i) {
    for (const Tensor* t : {&x[i], &g[i], &products[i], &sums[i]})
      STD_TORCH_CHECK(t->get_device_index() == g[0].get_device_index(), "glf_fast: a kernel got tensors of several devices");
    STD_TORCH_CHECK(operands[i] >= 0 && operands[i] <= device::bf16, "glf_fast: operands of row_products are 0, 1 or 2");
    const bool in_bf16 = operands[i] == device::bf16;
    const Rows of_x = rows_of(x[i], in_bf16, steps, rows), of_g = rows_of(g[i], in_bf16, steps, rows);
    const int64_t n_in = x[i].size(2), n_out = g[i].size(2);
    float* product = result(products[i], {steps, n_in, n_out});
    float* sum = sums[i].dim() == 2 ? result(sums[i], {steps, n_out}) : nullptr;
    all.of[i] = {of_x.first, of_g.first, product, sum, of_x.step, of_g.step, static_cast<int>(of_x.row),
                 static_cast<int>(of_g.row), static_cast<int>(n_in), static_cast<int>(n_out),
                 static_cast<int>(operands[i]), of_x.bytes, of_g.bytes};
  }
  STD_TORCH_CHECK(parts >= 1, "glf_fast: row_products takes one part or more");
  device::divide(all, parts);
  STD_TORCH_CHECK(steps * all.parts * device::blocks_of(all) <= most_blocks && steps <= most_blocks,
                  "glf_fast: row_products takes fewer than 2^31 tiles of results");
  Tensor partial = empty(g[0], {all.parts > 1 ? all.parts * steps * device::numbers_of(all) : 0}, aoti_torch_dtype_float32());
  if (all.parts > 1) all.partial = write<float>(partial);
  check(device::row_products(Launch(g[0]), all));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glf_fast, CUDA, m) {
  m.impl("row_products", TORCH_BOX(&row_products));
}
