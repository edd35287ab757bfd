// Sums over rows: gradients of all weights and biases of a flow, Xᵀ G and the column sums of G, of X, what went into a
// layer, and G, the gradient of what came out. Many layers and steps in one launch.
//
// A block has 64 × 64 entries of one product of one step, and the column sums where they are the product's first ones. It
// streams the rows, 32 at a time, through four stages of shared memory: while a stage is multiplied, the next three are on their
// way. Its eight warps are two teams of 2 × 2, of which each multiplies half of a stage's rows into 32 × 32 entries a warp. Matrix
// units truncate their sums, so that a sum leaves them after one stage in full precision, after eight else, and is added with
// rounding. At the end the teams' sums meet in shared memory, where whoever goes on finds the gradient whole.
//
// Results are the same bit for bit every time: each has one block, and all orders are fixed. Where results are few and rows
// many, rows are divided into parts, whose sums a second launch adds in order.
#pragma once

#include "async_copy.cuh"
#include "mma.cuh"
#include "row_product.cuh"

namespace glf::device {

// Four numbers, or two, that lie at a multiple of their bytes.
GLF_DEVICE void load4(const float* at, float& a, float& b, float& c, float& d) {
#ifdef __CUDACC__
  const float4 v = *reinterpret_cast<const float4*>(at);
  a = v.x, b = v.y, c = v.z, d = v.w;
#else
  a = at[0], b = at[1], c = at[2], d = at[3];
#endif
}
template <bool add>
GLF_DEVICE void put4(float* at, float a, float b, float c, float d) {
  float before[4] = {};
  if constexpr (add) load4(at, before[0], before[1], before[2], before[3]);
#ifdef __CUDACC__
  *reinterpret_cast<float4*>(at) = make_float4(before[0] + a, before[1] + b, before[2] + c, before[3] + d);
#else
  at[0] = before[0] + a, at[1] = before[1] + b, at[2] = before[2] + c, at[3] = before[3] + d;
#endif
}
template <bool add>
GLF_DEVICE void put2(float* at, float a, float b) {
#ifdef __CUDACC__
  float2& to = *reinterpret_cast<float2*>(at);
  to = add ? make_float2(to.x + a, to.y + b) : make_float2(a, b);
#else
  at[0] = (add ? at[0] : 0) + a, at[1] = (add ? at[1] : 0) + b;
#endif
}

// 32 × 32 entries of a product in a warp: fragments of two tiles of 16 rows (columns of X) by four tiles of 8.
using WarpTile = Lane<float>[2][4][4];

// float32 rows. A lane reads four neighbouring columns at once. They belong to tiles as they come, not in the order of the
// columns: lane (g, t) has in row g + 8 h of tile i of X the column 4 g + 2 i + h, in column g of tile j of G the column
// 4 g + j.
template <Operands operands>
struct RowsOf {
  using Number = float;
  static constexpr int team_rows = stage_rows / 2, stages_in_units = operands == three_tf32 ? 1 : 8;

  static GLF_DEVICE float value(float x) { return x; }

  // c += Xᵀ G of a team's rows of a stage, from column x[0] and g[0] of their first row on.
  static GLF_DEVICE void multiply(WarpTile& c, const float* x, const float* g) {
#pragma unroll 1  // two at once would be a few registers too many
    for (int k = 0; k < team_rows; k += 8) {
      Lane<float> a[2][4], b[2][4];  // of rows k + t and k + 4 + t
      on_lanes([&](int l) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = (k + 4 * h + l % 4) * stage_line + l / 4 * 4;
          load4(x + at, of_lane(a[h][0], l), of_lane(a[h][1], l), of_lane(a[h][2], l), of_lane(a[h][3], l));
          load4(g + at, of_lane(b[h][0], l), of_lane(b[h][1], l), of_lane(b[h][2], l), of_lane(b[h][3], l));
        }
      });
      if constexpr (operands == one_tf32) {
        Lane<Word> factor[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) factor[e / 4][e % 4] = round_tf32(a[e % 4 / 2][e / 4 * 2 + e % 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Lane<Word> b0 = round_tf32(b[0][j]), b1 = round_tf32(b[1][j]);
#pragma unroll
          for (int i = 0; i < 2; ++i) mma_tf32(c[i][j], factor[i], b0, b1);
        }
      } else {
        Lane<Word> high[2][4], low[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) split_tf32(a[e % 4 / 2][e / 4 * 2 + e % 2], high[e / 4][e % 4], low[e / 4][e % 4]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Lane<Word> b_high[2], b_low[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) split_tf32(b[h][j], b_high[h], b_low[h]);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            mma_tf32x3(c[i][j], high[i], low[i], b_high[0], b_high[1], b_low[0], b_low[1]);
        }
      }
    }
  }

  // To or onto entries `at` of a tile with lines of stage_line numbers.
  template <bool add>
  static GLF_DEVICE void put(WarpTile& c, float* at) {
    on_lanes([&](int l) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int i = e / 4, h = e / 2 % 2, right = e % 2, from = 2 * h + right;
        put4<add>(at + (l / 4 * 4 + 2 * i + h) * stage_line + l % 4 * 8 + 4 * right, of_lane(c[i][0][from], l),
                  of_lane(c[i][1][from], l), of_lane(c[i][2][from], l), of_lane(c[i][3][from], l));
      }
    });
  }
};

// bf16 rows: pairs of rows are what a register holds, and the units' transposing load makes them. Columns are in order.
template <>
struct RowsOf<bf16> {
  using Number = unsigned short;
  static constexpr int team_rows = stage_rows / 2, stages_in_units = 8;

  static GLF_DEVICE float value(Number x) { return as_float(Word(x) << 16); }

  static GLF_DEVICE void multiply(WarpTile& c, const Number* x, const Number* g) {
    Lane<Word> a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)  // lines of 8 rows and columns: left above, right above, left below, right below
      load_transposed(a[i], [&](int e) { return x + (e % 8 + e / 16 * 8) * stage_line + 16 * i + e / 8 % 2 * 8; });
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      Lane<Word> b[4];  // left above, left below, right above, right below
      load_transposed(b, [&](int e) { return g + e % 16 * stage_line + 8 * j + e / 16 * 8; });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_bf16(c[i][j], a[i], b[0], b[1]);
        mma_bf16(c[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }

  template <bool add>
  static GLF_DEVICE void put(WarpTile& c, float* at) {
    on_lanes([&](int l) {
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int i = e / 8, h = e / 4 % 2, j = e % 4;
        put2<add>(at + (16 * i + l / 4 + 8 * h) * stage_line + 8 * j + l % 4 * 2, of_lane(c[i][j][2 * h], l),
                  of_lane(c[i][j][2 * h + 1], l));
      }
    });
  }
};

// A block's rows of one factor, from its first column on, and how its threads copy them to a stage: all copies of a thread are
// in one column, so that it carries little more than a pointer from copy to copy, and from stage to stage.
template <class T>
struct Columns {
  const T* first;
  long long line;
  int wide;   // columns that exist; 0: nothing is copied
  int bytes;  // of a copy

  // A thread's first copy of the next stage: whence, to which row and column, and how many bytes of it exist.
  struct Cursor {
    const T* source;
    int row, column, valid;
  };

  // Copies that a row takes are a power of two; of a row of which half is nothing, that half is left out.
  GLF_DEVICE int log_copies() const {
    return (wide > result_side / 2 ? 6 : 5) + (sizeof(T) == 4 ? 2 : 1) - (bytes == 16 ? 4 : bytes == 8 ? 3 : 2);
  }
  GLF_DEVICE int rows_at_once() const { return row_products_threads >> log_copies(); }

  GLF_DEVICE Cursor cursor(int thread) const {
    constexpr int size = sizeof(T);
    const int row = thread >> log_copies(), column = (thread - (row << log_copies())) * (bytes / size);
    const int left = (wide - column) * size;
    return {first + row * line + column, row, column, left < 0 ? 0 : left < bytes ? left : bytes};
  }
  // One thread's copies of the next stage, of which `rows` exist. Columns and rows that do not exist become zeros, as far as a
  // warp reads.
  GLF_DEVICE void copy(AsyncCopies& copies, Cursor& from, T* stage, int rows) const {
    if (!wide) return;
    if (bytes == 16)
      copy_by<16>(copies, from, stage, rows);
    else if (bytes == 8)
      copy_by<8>(copies, from, stage, rows);
    else
      copy_by<4>(copies, from, stage, rows);
    from.source += stage_rows * line;
  }
  template <int size>
  GLF_DEVICE void copy_by(AsyncCopies& copies, const Cursor& from, T* stage, int rows) const {
    const int step = rows_at_once();
    const T* source = from.source;
#pragma unroll 1
    for (int row = from.row; row < stage_rows; row += step) {
      copies.template copy<size>(stage + row * stage_line + from.column, source, row < rows ? from.valid : 0);
      source += step * line;
    }
  }
};

// Where a product (n_in, n_out) goes, and the sums of G's columns, unless null; with `accumulate` onto what is there.
struct Results {
  float *product, *sum;
  bool accumulate;
};

// Entries [top …, left …] of Xᵀ G over `rows` rows from `first` on, of step k; in the blocks with top = 0 also the sums of G's
// columns. `results` is asked at the end where they go: pointers known before would take registers from the products.
template <Operands operands, class B, class F>
GLF_DEVICE void row_product_tile(const B& block, const RowProduct& p, long long k, int top, int left, int first, int rows,
                                 F results, unsigned char* shared) {
  using Factors = RowsOf<operands>;
  using T = typename Factors::Number;
  struct OfThread {
    AsyncCopies copies;
    typename Columns<T>::Cursor x, g;
    float sum;
  };
  struct OfWarp {
    WarpTile sum, total;  // in matrix units, and with what has left them
  };
  constexpr int side = result_side, half = side / 2, stage = stage_rows * stage_line;
  const int high = p.n_in - top < side ? p.n_in - top : side, wide = p.n_out - left < side ? p.n_out - left : side;
  const T* x = static_cast<const T*>(p.x) + k * p.x_step + first * static_cast<long long>(p.x_row) + top;
  const T* g = static_cast<const T*>(p.g) + k * p.g_step + first * static_cast<long long>(p.g_row) + left;
  const Columns<T> X{x, p.x_row, high, p.x_bytes}, G{g, p.g_row, wide, p.g_bytes};
  const bool summed = p.sum && top == 0;
  T* ring = reinterpret_cast<T*>(shared);  // stages of X's rows and G's rows
  const int count = (rows + stage_rows - 1) / stage_rows;
  const auto stage_of = [&](int n) { return ring + n % stages * 2 * stage; };
  PerThread<OfThread> threads;
  PerWarp<OfWarp> warps;

  const auto start = [&](int n, OfThread& own) {
    if (n < count) {
      X.copy(own.copies, own.x, stage_of(n), rows - n * stage_rows);
      G.copy(own.copies, own.g, stage_of(n) + stage, rows - n * stage_rows);
    }
    own.copies.commit();  // groups are counted, empty ones as well
  };
  const auto leave_units = [](OfWarp& own) {
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      Lane<float>& sum = own.sum[e / 16][e / 4 % 4][e % 4];
      own.total[e / 16][e / 4 % 4][e % 4] = own.total[e / 16][e / 4 % 4][e % 4] + sum;
      sum = Lane<float>(0.f);
    }
  };
  block.threads_unguarded(threads, [&](int t, OfThread& own) {
    own.x = X.cursor(t);
    own.g = G.cursor(t);
    own.sum = 0;
    for (int n = 0; n < stages - 1; ++n) start(n, own);
  });
  block.warps_unguarded(warps, [&](int, OfWarp& own) {
#pragma unroll
    for (int e = 0; e < 32; ++e)
      own.sum[e / 16][e / 4 % 4][e % 4] = own.total[e / 16][e / 4 % 4][e % 4] = Lane<float>(0.f);
  });

  for (int n = 0; n < count; ++n) {
    // Stage n is there for all, and all have read stage n − 1, whose place the next copies take.
    block.threads(threads, [&](int, OfThread& own) { own.copies.template wait<stages - 2>(); });
    block.threads_unguarded(threads, [&](int t, OfThread& own) {
      start(n + stages - 1, own);
      if (summed) {
        const T* at = stage_of(n) + stage + t / side * (stage_rows * side / row_products_threads) * stage_line + t % side;
#pragma unroll
        for (int r = 0; r < stage_rows * side / row_products_threads; ++r)
          own.sum += Factors::value(at[r * stage_line]);
      }
    });
    block.warps_unguarded(warps, [&](int w, OfWarp& own) {
      const int row = w / 4 * Factors::team_rows, x_column = w % 4 / 2 * half, g_column = w % 2 * half;
      if (x_column >= high || g_column >= wide) return;
      Factors::multiply(own.sum, stage_of(n) + row * stage_line + x_column,
                        stage_of(n) + stage + row * stage_line + g_column);
      if ((n + 1) % Factors::stages_in_units == 0) leave_units(own);
    });
  }

  // The stages' memory is free once all are here: the tile, then a line of sums for each of four threads.
  block.each(0, [](int) {});
  block.warps_unguarded(warps, [&](int, OfWarp& own) { leave_units(own); });
  float *tile = reinterpret_cast<float*>(shared), *sums = tile + side * stage_line;
  const auto place = [&](int w) { return tile + w % 4 / 2 * half * stage_line + w % 2 * half; };
  block.threads_unguarded(threads, [&](int t, OfThread& own) { sums[t] = own.sum; });
  block.warps(warps, [&](int w, OfWarp& own) {
    if (w >= 4) Factors::template put<false>(own.total, place(w));
  });
  block.warps(warps, [&](int w, OfWarp& own) {
    if (w < 4) Factors::template put<true>(own.total, place(w));
  });
  const Results to = results();
  if (summed)
    block.each_unguarded(wide, [&](int j) {
      const float total = (sums[j] + sums[side + j]) + (sums[2 * side + j] + sums[3 * side + j]);
      to.sum[left + j] = (to.accumulate ? to.sum[left + j] : 0) + total;
    });
  block.each(high, wide, [&](int i, int j) {
    float& entry = to.product[static_cast<long long>(top + i) * p.n_out + left + j];
    entry = (to.accumulate ? entry : 0) + tile[i * stage_line + j];
  });
}

// Block `index` of steps · parts · blocks_of(all).
template <class B>
GLF_DEVICE void row_products_block(const B& block, const RowProducts& all, int index, unsigned char* shared) {
  const int blocks = blocks_of(all), part = index / blocks % all.parts, at = index % blocks;
  const long long k = index / blocks / all.parts;
  int i = 0, tile = at;
#pragma unroll
  for (int next = 1; next < most_products; ++next)
    if (at >= all.first_block[next]) {
      i = next;
      tile = at - all.first_block[next];
    }
  const RowProduct& p = all.of[i];
  const auto results = [&]() -> Results {
    const long long entries = static_cast<long long>(p.n_in) * p.n_out;
    if (!all.partial) return {p.product + k * entries, p.sum ? p.sum + k * p.n_out : nullptr, all.accumulate != 0};
    float* product = all.partial + (part * static_cast<long long>(all.steps) + k) * numbers_of(all);
    for (int before = 0; before < i; ++before) product += numbers_of(all.of[before]);
    return {product, product + entries, false};
  };
  const int top = tile / across(p.n_out) * result_side, left = tile % across(p.n_out) * result_side;
  const int first = part * all.part_rows, rows = all.rows - first < all.part_rows ? all.rows - first : all.part_rows;
  if (p.operands == bf16)
    row_product_tile<bf16>(block, p, k, top, left, first, rows, results, shared);
  else if (p.operands == one_tf32)
    row_product_tile<one_tf32>(block, p, k, top, left, first, rows, results, shared);
  else
    row_product_tile<three_tf32>(block, p, k, top, left, first, rows, results, shared);
}

// The parts' sums, in order: `added_numbers` of a step's results, block `index` of steps · ⌈numbers_of(all) / added_numbers⌉.
template <class B>
GLF_DEVICE void add_parts_block(const B& block, const RowProducts& all, int index) {
  const long long numbers = numbers_of(all), blocks = (numbers + added_numbers - 1) / added_numbers;
  const long long k = index / blocks, begin = index % blocks * added_numbers;
  const int here = static_cast<int>(numbers - begin < added_numbers ? numbers - begin : added_numbers);
  block.each(here, [&](int e) {
    long long at = begin + e;
    const float* partial = all.partial + k * numbers + at;
    float total = 0;
    for (int part = 0; part < all.parts; ++part) total += partial[part * all.steps * numbers];
    int i = 0;
    for (; at >= numbers_of(all.of[i]); ++i) at -= numbers_of(all.of[i]);
    const RowProduct& p = all.of[i];
    const long long entries = static_cast<long long>(p.n_in) * p.n_out;
    float& to = at < entries ? p.product[k * entries + at] : p.sum[k * p.n_out + at - entries];
    to = (all.accumulate ? to : 0) + total;
  });
}

GLF_KERNEL(row_products_threads, 2) row_products_kernel(GLF_ARGUMENT RowProducts all) {
  row_products_block(Block{}, all, static_cast<int>(block_index()), shared_memory());
}

GLF_KERNEL(row_products_threads) add_parts_kernel(GLF_ARGUMENT RowProducts all) {
  add_parts_block(Block{}, all, static_cast<int>(block_index()));
}

}  // namespace glf::device
