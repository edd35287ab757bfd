// The device code of csrc/cuda on the host, where its blocks and warps are loops: under sanitizers, each buffer exactly as
// long as its tensor. Oracles: X A = I, determinants by elimination in double, finite differences.
#include "cuda/kernels.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <utility>
#include <vector>

namespace {

using namespace glf::device;
template <class T>
using Buffer = std::vector<T>;

std::mt19937 rng(1);

template <class T>
Buffer<T> random(std::size_t n, double scale) {
  std::normal_distribution<double> normal;
  Buffer<T> b(n);
  for (T& x : b) x = static_cast<T>(scale * normal(rng));
  return b;
}

void require(bool good, const char* what, int D, double value) {
  if (good) return;
  std::printf("%s at D = %d: %g, threads %s\n", what, D, value, backwards ? "backwards" : "forwards");
  std::exit(1);
}

template <class T>
double norm(const T* a, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(a[i]) * double(a[i]);
  return std::sqrt(sum);
}

// ‖A X − I‖ / (D ‖A‖ ‖X‖ ε).
template <class T>
double inverse_residual(int D, const T* A, const T* X) {
  double sum = 0;
  for (int i = 0; i < D; ++i)
    for (int j = 0; j < D; ++j) {
      double e = i == j ? -1 : 0;
      for (int k = 0; k < D; ++k) e += double(A[i * D + k]) * double(X[k * D + j]);
      sum += e * e;
    }
  return std::sqrt(sum) / (D * norm(A, D * D) * norm(X, D * D) * std::numeric_limits<T>::epsilon());
}

template <class T>
struct Dense {
  Buffer<T> sign, logabsdet, inverse;
  Buffer<int> info;
  Dense(int count, int D) : sign(count, NAN), logabsdet(count, NAN), inverse(count * D * D, NAN), info(count, -1) {}
};

// Sign and log|det A| by elimination with partial pivoting, in double.
template <class T>
void determinant(int D, const T* A, double& sign, double& logabsdet) {
  std::vector<double> a(A, A + D * D);
  sign = 1;
  logabsdet = 0;
  for (int k = 0; k < D; ++k) {
    int p = k;
    for (int i = k + 1; i < D; ++i)
      if (std::fabs(a[i * D + k]) > std::fabs(a[p * D + k])) p = i;
    for (int j = 0; p != k && j < D; ++j) std::swap(a[k * D + j], a[p * D + j]);
    const double pivot = a[k * D + k];
    sign *= (p == k ? 1 : -1) * (pivot > 0 ? 1 : -1);
    logabsdet += std::log(std::fabs(pivot));
    for (int i = k + 1; i < D; ++i) {
      const double f = a[i * D + k] / pivot;
      for (int j = k; j < D; ++j) a[i * D + j] -= f * a[k * D + j];
    }
  }
}

template <int N, class T>
void by_warps(int count, int D, const T* A, Dense<T>& out) {
  for (long long n = 0; n < count; n += 32 / lanes_of<N>)
    slogdet_inverse_warp<N>(n, count, D, A, out.sign.data(), out.logabsdet.data(), out.inverse.data(), out.info.data());
}

template <int M, class T>
void by_tiles(int first, int count, int D, const T* A, Dense<T>& out) {
  for (int n = first; n < count; ++n) {
    Buffer<std::uint64_t> shared(tile_bytes<M, T> / 8);
    slogdet_inverse_tile<M>(Block{}, D, A + n * D * D, &out.sign[n], &out.logabsdet[n], &out.inverse[n * D * D],
                            &out.info[n], reinterpret_cast<unsigned char*>(shared.data()));
  }
}

template <class T>
void by_block(int D, bool room, int n, const T* A, Dense<T>& out) {
  const std::size_t bytes = (D * (D | 1) + D) * sizeof(T) + (2 * D + 2) * sizeof(int);
  T *a, *result = out.inverse.data() + n * D * D;
  int ld;
  Buffer<std::uint64_t> memory(bytes / 8 + 1);
  const auto w = carve(reinterpret_cast<unsigned char*>(memory.data()), D, room, result, a, ld);
  slogdet_inverse_block(Block{}, D, A + n * D * D, a, ld, w, &out.sign[n], &out.logabsdet[n], result, &out.info[n]);
}

template <class T>
void dense(int D) {
  const int count = 9;
  Buffer<T> A = random<T>(count * D * D, 1);
  // 0 random … 5: equal sizes, to be exchanged in LAPACK's order; 6 the identity; 7 singular; 8 with a NaN.
  for (int e = 0; e < D * D; ++e) {
    A[5 * D * D + e] = T(rng() % 2 ? 1 : -1) + (e % (D + 1) == 0 ? T(D + 1) : T(0));
    A[6 * D * D + e] = A[7 * D * D + e] = A[8 * D * D + e] = e % (D + 1) == 0;
  }
  A[7 * D * D + D * D - 1] = 0;
  A[8 * D * D + D / 2 * D] = NAN;
  // Beyond D = 64 a block has one matrix, whose neighbours it cannot see: one random one is enough.
  const int first = D > 64 ? 4 : 0;
  std::vector<double> signs(count), logdets(count);
  for (int n = first; n < 7; ++n) determinant(D, &A[n * D * D], signs[n], logdets[n]);
  // Ways: a block in shared memory, in the result itself, lanes, tiles.
  for (const int way : {0, 1, 2, 3}) {
    if ((way == 2 && D > 64) || (way == 3 && D > 192)) continue;
    Dense<T> out(count, D);
    if (way < 2)
      for (int n = first; n < count; ++n) by_block(D, way, n, A.data(), out);
    else if (way == 2)
      (D <= 4    ? by_warps<4, T>
       : D <= 8  ? by_warps<8, T>
       : D <= 16 ? by_warps<16, T>
       : D <= 24 ? by_warps<24, T>
       : D <= 32 ? by_warps<32, T>
       : D <= 48 ? by_warps<48, T>
                 : by_warps<64, T>)(count, D, A.data(), out);
    else
      (D <= 64    ? by_tiles<4, T>
       : D <= 96  ? by_tiles<6, T>
       : D <= 128 ? by_tiles<8, T>
                  : by_tiles<12, T>)(first, count, D, A.data(), out);
    for (int n = first; n < 7; ++n) {
      const T* a = &A[n * D * D];
      const double residual = inverse_residual(D, a, &out.inverse[n * D * D]);
      require(residual < 30, "residual of the inverse", D, residual);
      require(out.info[n] == 0, "info", D, out.info[n]);
      require(signs[n] == out.sign[n], "sign", D, signs[n]);
      require(std::fabs(logdets[n] - double(out.logabsdet[n])) <= 1e-5 * (D + std::fabs(logdets[n])), "log|det|", D,
              logdets[n]);
    }
    require(out.sign[7] == 0 && out.logabsdet[7] == -INFINITY && out.info[7] == D, "singular", D, out.logabsdet[7]);
    require(std::isnan(out.logabsdet[8]), "NaN", D, out.logabsdet[8]);
  }
}

// One layer of the PLU parametrisation: A A⁻¹ = I, and the backward against differences of a random linear form.
void plu(int D, bool actnorm) {
  std::vector<long long> permutation(D);
  for (int i = 0; i < D; ++i) permutation[i] = (i + 1) % D;
  if (D % 3 == 0)
    for (int i = 0; i < D; ++i) permutation[i] = D - 1 - i;
  const int sizes[] = {D * D, D * D, D, D, D};
  Buffer<double> p[5], g[5], sign(D, -1), work(D * D);
  for (int i = 0; i < 5; ++i) {
    p[i] = random<double>(sizes[i], i < 2 ? 0.5 / std::sqrt(D) : 0.3);
    g[i].assign(sizes[i], NAN);
  }
  const Layer<double> layer{D, permutation.data(), p[0].data(), p[1].data(), p[2].data(), sign.data(),
                            actnorm ? p[3].data() : nullptr, actnorm ? p[4].data() : nullptr};
  const auto w_A = random<double>(D * D, 1), w_inv = random<double>(D * D, 1), w_c = random<double>(D, 1);
  const double w_log = 0.7;
  Buffer<double> A(D * D, NAN), A_inv(D * D, NAN), c(D, NAN);
  double logabsdet;
  const auto form = [&] {
    for (int first = 0; first < D; first += slice_columns) {
      Buffer<std::uint64_t> shared((plu_assemble_bytes<double>(D) + 7) / 8, ~0ull);
      plu_assemble_slice(Block{}, layer, first, A.data(), A_inv.data(), c.data(), &logabsdet,
                         reinterpret_cast<unsigned char*>(shared.data()));
    }
    double sum = w_log * logabsdet;
    for (int i = 0; i < D * D; ++i) sum += w_A[i] * A[i] + w_inv[i] * A_inv[i];
    for (int i = 0; i < D; ++i) sum += w_c[i] * c[i];
    return sum;
  };
  form();
  const double residual = inverse_residual(D, A.data(), A_inv.data());
  require(residual < 30, "A⁻¹ of plu_assemble", D, residual);
  for (int first = 0; first < D; first += strip_rows) {
    Buffer<std::uint64_t> shared(product_bytes<double>() / 8, ~0ull);
    plu_inverse_gradient_strip(Block{}, D, first, A_inv.data(), w_A.data(), w_inv.data(), g[0].data(), work.data(),
                               reinterpret_cast<unsigned char*>(shared.data()));
  }
  for (int job = 0; job < backward_jobs(D, actnorm); ++job) {
    Buffer<std::uint64_t> shared((plu_backward_bytes<double>(D) + 7) / 8, ~0ull);
    plu_assemble_backward_job(Block{}, layer, job, A.data(), work.data(), w_c.data(), &w_log,
                              {g[0].data(), g[1].data(), g[2].data(), actnorm ? g[3].data() : nullptr,
                               actnorm ? g[4].data() : nullptr},
                              reinterpret_cast<unsigned char*>(shared.data()));
  }
  // Along random signs, in which an entry that is wrong alone is as wrong as by itself.
  for (int i = 0; i < (actnorm ? 5 : 3); ++i)
    for (int draw = 0; draw < 4; ++draw) {
      const Buffer<double> before = p[i];
      Buffer<double> direction(sizes[i]);
      for (double& sign : direction) sign = rng() % 2 ? 1 : -1;
      const double h = 1e-6;
      double slope = 0, ends[2];
      for (const int end : {0, 1}) {
        for (int e = 0; e < sizes[i]; ++e) p[i][e] = before[e] + (end ? -h : h) * direction[e];
        ends[end] = form();
      }
      for (int e = 0; e < sizes[i]; ++e) slope += direction[e] * g[i][e];
      const double difference = (ends[0] - ends[1]) / (2 * h);
      std::copy(before.begin(), before.end(), p[i].begin());
      require(std::fabs(difference - slope) <= 1e-5 * (1 + std::fabs(difference)) * D, "gradient of plu_assemble", D,
              slope - difference);
    }
}

}  // namespace

int main() {
  for (const bool order : {false, true}) {
    backwards = order;
    for (const int D : {1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 97}) {
      dense<float>(D);
      dense<double>(D);
    }
    (order ? dense<float> : dense<double>)(192);  // half of all the time: either type in one order
    for (const int D : {1, 2, 3, 8, 16, 17, 32, 33, 40, 67})
      for (const bool actnorm : {false, true}) plu(D, actnorm);
  }
  std::puts("all agree");
}
