// What row_products is given: also to those who launch it.
#pragma once

#include "lanes.cuh"

namespace glf::device {

inline constexpr int most_products = 8;  // of a launch: an affine map, up to five layers, and log|det|
inline constexpr int result_side = 64;   // entries of a block's tile of a product, each way
inline constexpr int stage_rows = 32, stages = 4;
// Numbers from a row of a stage to the next, 8 more than it has: four rows of float32, or eight of bf16, meet all banks.
inline constexpr int stage_line = result_side + 8;
inline constexpr int row_products_bytes = stages * 2 * stage_rows * stage_line * 4;
inline constexpr int row_products_threads = 256;
inline constexpr int added_numbers = 1024;  // that a block of the second launch adds up

// What rows are, and how they are multiplied: float32 by three tf32 products, float32 rounded to tf32, or bf16.
enum Operands : int { three_tf32, one_tf32, bf16 };

// Xᵀ G of one layer, in all steps. Number i of row r is x[k x_step + r x_row + i] at step k; columns are n_in and n_out.
struct RowProduct {
  const void *x, *g;
  float *product, *sum;  // (steps, n_in, n_out), (steps, n_out); where n_in is 0, and where null, not wanted
  long long x_step, g_step;
  int x_row, g_row, n_in, n_out;
  int operands, x_bytes, g_bytes;  // bytes that can be copied at once: 4, 8 or 16, to which all rows are aligned
};

struct RowProducts {
  int count, steps, rows, parts, part_rows;  // all rows are in `parts` of part_rows, a multiple of stage_rows but for one part
  int accumulate;                            // whether results are added to what stands there
  int first_block[most_products + 1];        // of each product among those of a step; from `count` on how many there are
  float* partial;                            // (parts, steps, numbers_of(all)); null for one part
  RowProduct of[most_products];
};

GLF_DEVICE_AND_HOST int across(int n) { return (n + result_side - 1) / result_side; }
// Blocks of a product in one step and part. What has no product has a block for its sums.
GLF_DEVICE_AND_HOST int blocks_of(const RowProduct& p) { return (p.n_in ? across(p.n_in) : 1) * across(p.n_out); }
GLF_DEVICE_AND_HOST long long numbers_of(const RowProduct& p) {
  return static_cast<long long>(p.n_in + (p.sum ? 1 : 0)) * p.n_out;
}
GLF_DEVICE_AND_HOST int blocks_of(const RowProducts& all) { return all.first_block[most_products]; }

// Divides the work: rows into at most so many parts, results into blocks.
GLF_DEVICE_AND_HOST void divide(RowProducts& all, long long parts) {
  const long long wanted = (all.rows + parts - 1) / parts;
  all.part_rows = static_cast<int>((wanted + stage_rows - 1) / stage_rows) * stage_rows;
  all.parts = all.part_rows ? static_cast<int>((static_cast<long long>(all.rows) + all.part_rows - 1) / all.part_rows) : 1;
  for (int i = 0; i < most_products; ++i)
    all.first_block[i + 1] = all.first_block[i] + (i < all.count ? blocks_of(all.of[i]) : 0);
}
// Results of a step.
GLF_DEVICE_AND_HOST long long numbers_of(const RowProducts& all) {
  long long numbers = 0;
  for (int i = 0; i < all.count; ++i) numbers += numbers_of(all.of[i]);
  return numbers;
}

}  // namespace glf::device
