// The matrix units' emulation on the host against plain products of matrices: fragments are filled by the formulas of the PTX
// ISA (mma.m16n8k8 with .tf32, m16n8k16 with .bf16), as registers i of lane l, not by the table that csrc/cuda/mma.cuh reads.
#include "cuda/mma.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

namespace {

using namespace glf::device;

std::mt19937 rng(1);

void require(bool good, const char* what, double value) {
  if (good) return;
  std::printf("%s: %g\n", what, value);
  std::exit(1);
}

float normal() { return std::normal_distribution<float>()(rng); }
float small_integer() { return static_cast<float>(static_cast<int>(rng() % 17) - 8); }

template <int depth>
struct Matrices {
  float a[16][depth], b[depth][8], c[16][8];
  template <class F>
  explicit Matrices(F entry) {
    for (auto& row : a)
      for (float& x : row) x = entry();
    for (auto& row : b)
      for (float& x : row) x = entry();
    for (auto& row : c)
      for (float& x : row) x = entry();
  }
  double exact(int i, int j) const {
    double sum = c[i][j];
    for (int k = 0; k < depth; ++k) sum += double(a[i][k]) * double(b[k][j]);
    return sum;
  }
};

// Row and column of element i of lane l in a sum, both formats.
int sum_row(int l, int i) { return i < 2 ? l >> 2 : (l >> 2) + 8; }
int sum_column(int l, int i) { return (l & 3) * 2 + (i & 1); }

template <int depth>
void fill_sum(const Matrices<depth>& m, Lane<float> (&c)[4]) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) c[i].v[l] = m.c[sum_row(l, i)][sum_column(l, i)];
}

struct Tf32 {
  static constexpr int depth = 8;
  Lane<Word> a[4], b[2], a_low[4], b_low[2];
  explicit Tf32(const Matrices<8>& m) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i)
        split_tf32(m.a[i == 0 || i == 2 ? l >> 2 : (l >> 2) + 8][i < 2 ? l & 3 : (l & 3) + 4], a[i].v[l], a_low[i].v[l]);
      for (int i = 0; i < 2; ++i) split_tf32(m.b[(l & 3) + 4 * i][l >> 2], b[i].v[l], b_low[i].v[l]);
    }
  }
  void multiply(Lane<float> (&c)[4]) const { mma_tf32(c, a, b[0], b[1]); }
  void multiply_exactly(Lane<float> (&c)[4]) const { mma_tf32x3(c, a, a_low, b[0], b[1], b_low[0], b_low[1]); }
};

struct Bf16 {
  static constexpr int depth = 16;
  Lane<Word> a[4], b[2];
  explicit Bf16(const Matrices<16>& m) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 8; i += 2) {  // elements i and i + 1 share a register
        const int row = i < 2 || (i >= 4 && i < 6) ? l >> 2 : (l >> 2) + 8, column = (l & 3) * 2 + (i >= 4 ? 8 : 0);
        a[i / 2].v[l] = bf16_pair(m.a[row][column], m.a[row][column + 1]);
      }
      for (int i = 0; i < 4; i += 2) {
        const int row = (l & 3) * 2 + (i >= 2 ? 8 : 0);
        b[i / 2].v[l] = bf16_pair(m.b[row][l >> 2], m.b[row + 1][l >> 2]);
      }
    }
  }
  void multiply(Lane<float> (&c)[4]) const { mma_bf16(c, a, b[0], b[1]); }
};

// The largest difference from the exact sum, in units of ε Σ |a| |b|.
template <int depth>
double error(const Matrices<depth>& m, const Lane<float> (&c)[4], double epsilon) {
  double worst = 0;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = sum_row(l, i), column = sum_column(l, i);
      double size = std::fabs(m.c[row][column]);
      for (int k = 0; k < depth; ++k) size += std::fabs(double(m.a[row][k]) * double(m.b[k][column]));
      worst = std::fmax(worst, std::fabs(c[i].v[l] - m.exact(row, column)) / (epsilon * size));
    }
  return worst;
}

template <class Fragments>
void products(const char* name, double epsilon) {
  for (int draw = 0; draw < 50; ++draw) {
    const Matrices<Fragments::depth> integers(small_integer), numbers(normal);
    Lane<float> c[4];
    fill_sum(integers, c);
    Fragments(integers).multiply(c);
    require(error(integers, c, 1) == 0, name, error(integers, c, 1));  // integers are exact in every format
    fill_sum(numbers, c);
    Fragments(numbers).multiply(c);
    const double off = error(numbers, c, epsilon);  // both factors rounded to a relative ε / 2
    require(off < 1.01, name, off);
  }
}

void three_products() {
  for (int draw = 0; draw < 50; ++draw) {
    const Matrices<8> m(normal);
    Lane<float> c[4];
    fill_sum(m, c);
    Tf32(m).multiply_exactly(c);
    const double off = error(m, c, std::numeric_limits<float>::epsilon());
    require(off < 4, "three tf32 products", off);
  }
}

void truncated() {
  truncating = true;
  int shorter = 0;
  for (int draw = 0; draw < 50; ++draw) {
    Matrices<8> m(normal);
    const auto round_all = [](auto& matrix) {
      for (auto& row : matrix)
        for (float& x : row) x = as_float(round_tf32(x));
    };
    round_all(m.a);
    round_all(m.b);
    Lane<float> c[4];
    fill_sum(m, c);
    Tf32(m).multiply(c);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const double exact = m.exact(sum_row(l, i), sum_column(l, i)), found = c[i].v[l];
        require(std::fabs(found) <= std::fabs(exact), "truncated sum", found - exact);
        require(std::fabs(std::nextafter(c[i].v[l], INFINITY * c[i].v[l])) > std::fabs(exact), "truncated twice", exact);
        shorter += std::fabs(found) < std::fabs(exact);
      }
  }
  require(shorter > 50 * 128 / 2, "sums that truncation shortens", shorter);
  truncating = false;
}

void roundings() {
  for (int draw = 0; draw < 10000; ++draw) {
    const float x = std::ldexp(normal(), static_cast<int>(rng() % 40) - 20);
    int exponent;
    std::frexp(x, &exponent);
    const auto nearest = [&](int bits, auto tie) {
      const double step = std::ldexp(1.0, exponent - bits);
      return tie(double(x) / step) * step;
    };
    const float tf32 = as_float(round_tf32(x)), bf16 = as_float(bf16_pair(x, -x) << 16);
    require(tf32 == nearest(11, [](double y) { return std::round(y); }), "tf32", x);
    require(bf16 == nearest(8, [](double y) { return std::nearbyint(y); }), "bf16", x);
    require(as_float(bf16_pair(x, -x) & 0xffff0000u) == -bf16, "a pair's second", x);
    Word high, low;
    split_tf32(x, high, low);
    const double taken = double(as_float(high)) + double(as_float(low & 0xffffe000u));  // by matrix units
    require(std::fabs(taken - double(x)) <= std::ldexp(std::fabs(double(x)), -23), "two tf32 numbers", x);
  }
  const float tie = 1 + std::ldexp(1.0f, -11), even = 1 + std::ldexp(1.0f, -8);
  require(as_float(round_tf32(tie)) == 1 + std::ldexp(1.0f, -10), "a tie goes away from zero", tie);
  require(as_float(round_tf32(-tie)) == -1 - std::ldexp(1.0f, -10), "a tie goes away from zero", -tie);
  require(as_float(bf16_pair(even, 0) << 16) == 1, "a tie goes to the even number", even);
  for (const float x : {INFINITY, -INFINITY, 0.0f})
    require(as_float(round_tf32(x)) == x && as_float(bf16_pair(x, 1) << 16) == x, "not rounded", x);
  require(std::isnan(as_float(round_tf32(NAN))) && std::isnan(as_float(bf16_pair(NAN, 1) << 16)), "NaN", 0);
}

}  // namespace

int main() {
  roundings();
  products<Tf32>("tf32", std::ldexp(1.0, -10));
  products<Bf16>("bf16", std::ldexp(1.0, -7));
  three_products();
  truncated();
  std::puts("all agree");
}
