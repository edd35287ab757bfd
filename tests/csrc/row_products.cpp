// Sums over rows (csrc/cuda/row_products.cuh) on the host, against sums in double: any widths, distances and alignments, in
// every precision, with every number that must not be read a NaN, and buffers exactly as long as what may be.
// "shapes": those. "threads": with a thread for each warp, for ThreadSanitizer. "errors": how much full precision loses in
// matrix units.
#include "cuda/row_products.cuh"
#include "threads.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace glf::device;

std::mt19937 rng(1);
bool by_threads = false;

void require(bool good, const char* what, const RowProduct& p, double value) {
  if (good) return;
  std::printf("%s: %g, operands %d, %d by %d, rows of %d and %d, copies of %d and %d bytes, threads %s, copies %s\n", what,
              value, p.operands, p.n_in, p.n_out, p.x_row, p.g_row, p.x_bytes, p.g_bytes, backwards ? "backwards" : "forwards",
              copies_come_late ? "late" : "early");
  std::exit(1);
}

int below(int n) { return static_cast<int>(rng() % n); }

// Rows (steps, rows, columns) of float32 or bf16 numbers, some of them apart from each other, in memory that begins and ends
// with them. What lies between them is NaN.
class Factor {
 public:
  Factor(int steps, int rows, int columns, bool in_bf16, int unit, double mean)
      : columns_(columns), size_(in_bf16 ? 2 : 4), line_((columns + unit - 1) / unit * unit + unit * below(3)),
        step_(static_cast<long long>(line_) * rows + unit * below(2)) {
    const long long needed = steps && rows && columns ? (steps - 1) * step_ + (rows - 1LL) * line_ + columns : 0;
    // operator new aligns to 16 bytes; a start behind that is as aligned as a unit.
    skipped_ = unit * size_ % 16 ? unit * size_ : 0;
    memory_ = std::make_unique<unsigned char[]>(skipped_ + needed * size_);
    std::memset(memory_.get(), 0xff, skipped_ + needed * size_);
    std::normal_distribution<double> normal(mean);
    for (int k = 0; k < steps; ++k)
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < columns; ++i) {
          const float x = static_cast<float>(normal(rng));
          const Word word = in_bf16 ? round_bf16(x) : bits_of(x);
          std::memcpy(memory_.get() + skipped_ + (k * step_ + static_cast<long long>(r) * line_ + i) * size_, &word, size_);
        }
  }
  const void* pointer() const { return columns_ ? memory_.get() + skipped_ : nullptr; }
  long long step() const { return columns_ ? step_ : 0; }
  int line() const { return line_; }
  float operator()(int k, int r, int i) const {
    Word word = 0;
    std::memcpy(&word, memory_.get() + skipped_ + (k * step_ + static_cast<long long>(r) * line_ + i) * size_, size_);
    return as_float(size_ == 2 ? word << 16 : word);
  }

 private:
  int columns_, size_, line_;
  long long step_;
  int skipped_;
  std::unique_ptr<unsigned char[]> memory_;
};

struct Layer {
  Factor x, g;
  std::vector<float> product, sum;
  RowProduct p;
  Layer(int steps, int rows, int n_in, int n_out, int operands, bool summed, int x_unit, int g_unit, double mean = 0.5)
      : x(steps, rows, n_in, operands == bf16, x_unit, mean), g(steps, rows, n_out, operands == bf16, g_unit, mean),
        product(static_cast<std::size_t>(steps) * n_in * n_out, NAN), sum(summed ? steps * n_out : 0, NAN) {
    const int size = operands == bf16 ? 2 : 4;
    p = {x.pointer(), g.pointer(), product.data(), summed ? sum.data() : nullptr, x.step(), g.step(), x.line(), g.line(),
         n_in, n_out, operands, x_unit * size, g_unit * size};
  }
};

void run_block(const RowProducts& all, long long index, bool adding) {
  const int bytes = adding ? 0 : row_products_bytes;
  auto* shared = static_cast<unsigned char*>(std::aligned_alloc(16, bytes + 16));  // 16 more: never empty
  std::memset(shared, 0xff, bytes);
  const auto run = [&](const auto& block) {
    if (adding)
      add_parts_block(block, all, static_cast<int>(index));
    else
      row_products_block(block, all, static_cast<int>(index), shared);
  };
  if (by_threads)
    run_warps(run);
  else
    run(Block{});
  std::free(shared);
}

void run(RowProducts& all, int parts) {
  divide(all, parts);
  std::vector<float> partial(all.parts > 1 ? all.parts * all.steps * numbers_of(all) : 0, NAN);
  all.partial = partial.empty() ? nullptr : partial.data();
  for (long long i = 0; i < static_cast<long long>(all.steps) * all.parts * blocks_of(all); ++i) run_block(all, i, false);
  if (all.parts == 1) return;
  const long long blocks = all.steps * ((numbers_of(all) + added_numbers - 1) / added_numbers);
  for (long long i = 0; i < blocks; ++i) run_block(all, i, true);
}

// Errors are within ε Σ |x| |g|.
void compare(const Layer& layer, int steps, int rows) {
  // Two factors rounded to a relative ε / 2, or sums of float32 numbers.
  const double single = std::numeric_limits<float>::epsilon();
  const double epsilon = layer.p.operands == one_tf32 ? std::ldexp(1.0, -10) : single * 4;
  const auto close = [&](double found, double exact, double size, double eps, const char* what) {
    require(std::fabs(found - exact) <= eps * size, what, layer.p, (found - exact) / (eps * size));
  };
  for (int k = 0; k < steps; ++k)
    for (int j = 0; j < layer.p.n_out; ++j) {
      for (int i = 0; i < layer.p.n_in; ++i) {
        const std::size_t at = (static_cast<std::size_t>(k) * layer.p.n_in + i) * layer.p.n_out + j;
        double exact = 0, size = 0;
        for (int r = 0; r < rows; ++r) {
          exact += double(layer.x(k, r, i)) * double(layer.g(k, r, j));
          size += std::fabs(double(layer.x(k, r, i)) * double(layer.g(k, r, j)));
        }
        close(layer.product[at], exact, size, epsilon, "product");
      }
      if (layer.sum.empty()) continue;
      double exact = 0, size = 0;
      for (int r = 0; r < rows; ++r) {
        exact += layer.g(k, r, j);
        size += std::fabs(layer.g(k, r, j));
      }
      close(layer.sum[k * layer.p.n_out + j], exact, size, single * 4, "sum");
    }
}

// Layers of random widths and precisions, in one launch, then once more onto the results.
void layers(int steps, int rows, int parts, int widest) {
  static const int units[3][2] = {{1, 1}, {2, 4}, {4, 1}}, bf16_units[3][2] = {{2, 2}, {4, 8}, {8, 2}};
  std::vector<Layer> made;
  for (int operands : {three_tf32, one_tf32, bf16}) {
    const auto& unit = (operands == bf16 ? bf16_units : units)[below(3)];
    made.emplace_back(steps, rows, 1 + below(widest), 1 + below(widest), operands, below(3) != 0, unit[0], unit[1]);
  }
  made.emplace_back(steps, rows, 0, 1 + below(3), three_tf32, true, 1, 1);  // sums alone
  RowProducts all{};
  all.count = static_cast<int>(made.size());
  all.steps = steps;
  all.rows = rows;
  for (int i = 0; i < all.count; ++i) all.of[i] = made[i].p;
  run(all, parts);
  const RowProduct& widest_one = made[0].p;
  require(parts == 1 || rows <= stage_rows || all.parts > 1, "parts", widest_one, all.parts);
  for (const Layer& layer : made) compare(layer, steps, rows);
  std::vector<std::vector<float>> products, sums;
  for (const Layer& layer : made) {
    products.push_back(layer.product);
    sums.push_back(layer.sum);
  }
  run(all, parts);
  for (std::size_t i = 0; i < made.size(); ++i)
    require(made[i].product == products[i] && made[i].sum == sums[i], "not the same again", made[i].p, i);
  all.accumulate = 1;
  run(all, parts);
  for (std::size_t i = 0; i < made.size(); ++i) {
    const auto twice = [](const std::vector<float>& now, const std::vector<float>& once) {
      for (std::size_t e = 0; e < now.size(); ++e)
        if (now[e] != 2 * once[e]) return false;
      return true;
    };
    require(twice(made[i].product, products[i]) && twice(made[i].sum, sums[i]), "not twice as much", made[i].p, i);
  }
}

void all_shapes() {
  for (const bool order : {false, true})
    for (const bool late : {false, true}) {
      backwards = order;
      copies_come_late = late;
      layers(3, 0, 1, 70);
      layers(1, 1, 1, 130);
      layers(2, 31, 1, 33);
      layers(2, 33, 1, 65);
      layers(1, 200, 1, 20);
      layers(2, 150, 3, 70);
      layers(1, 300, 4, 20);
    }
}

// ‖error‖ of three tf32 products in units that truncate, over that of float32 multiply-adds in a row. Sums far from zero, where
// truncation adds up.
void errors() {
  truncating = true;
  for (const int rows : {256, 1024, 4096}) {
    Layer layer(1, rows, 32, 32, three_tf32, true, 4, 4);
    RowProducts all{};
    all.count = all.steps = 1;
    all.rows = rows;
    all.of[0] = layer.p;
    run(all, 1);
    double ours = 0, plain = 0;
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j) {
        double exact = 0;
        float sum = 0;
        for (int r = 0; r < rows; ++r) {
          exact += double(layer.x(0, r, i)) * double(layer.g(0, r, j));
          sum = std::fma(layer.x(0, r, i), layer.g(0, r, j), sum);
        }
        const double found = layer.product[32 * i + j];
        ours += (found - exact) * (found - exact);
        plain += (sum - exact) * (sum - exact);
      }
    const double ratio = std::sqrt(ours / plain);
    std::printf("%d rows: %.2f\n", rows, ratio);
    require(ratio < 1.5, "error over that of float32", layer.p, ratio);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "errors") {
    errors();
  } else if (what == "threads") {
    by_threads = true;
    for (const bool late : {false, true}) {
      copies_come_late = late;
      layers(1, 200, 1, 70);
      layers(1, 150, 2, 70);
    }
  } else if (what == "shapes") {
    all_shapes();
  } else {
    return 2;
  }
  std::puts("all agree");
}
