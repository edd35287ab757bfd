// What the device code is written in, so that the same templates run on a GPU and, for tests, on the host.
//
// Block: `each(n, f)` calls f(i) for all i < n on the block's threads and ends with a barrier; on the host it is a loop.
// Lane<T>: a value in each lane of a warp, without branches between lanes; on the host an array of 32.
// A kernel: on the host a function that does one block's work, called for each block (tests/csrc/host_kernels.cpp).
// No header is included on the device: NVRTC has none.
#pragma once

#ifdef __CUDACC__
#define GLF_DEVICE __device__ __forceinline__
#define GLF_DEVICE_AND_HOST __host__ __device__ inline
#define GLF_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GLF_ARGUMENT const __grid_constant__
#else
#include <cmath>
#include <utility>
#define GLF_DEVICE inline
#define GLF_DEVICE_AND_HOST inline
#define GLF_KERNEL(...) void
#define GLF_ARGUMENT const
#endif

namespace glf::device {

template <class T>
GLF_DEVICE T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <class T>
GLF_DEVICE T infinity() {
  return T(1) / T(0);
}

#ifdef __CUDACC__

GLF_DEVICE long long block_index() { return blockIdx.x; }
// What a block was given at its launch, of which it makes what it likes.
GLF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
// f(w) for the warps w of all blocks together, each of which has `threads` threads.
template <int threads, class F>
GLF_DEVICE void each_warp(F f) {
  f(block_index() * (threads / 32) + threadIdx.x / 32);
}

GLF_DEVICE float natural_log(float x) { return logf(x); }
GLF_DEVICE double natural_log(double x) { return log(x); }
GLF_DEVICE float exponential(float x) { return expf(x); }
GLF_DEVICE double exponential(double x) { return exp(x); }
GLF_DEVICE double power(double x, double y) { return pow(x, y); }

// What each thread of a block of 256 keeps for itself, in its registers.
template <class X>
struct PerThread {
  X own;
};
// What each warp of such a block keeps: numbers of its lanes.
template <class X>
struct PerWarp {
  X own;
};

struct Block {
  // f(i) for i < n, then a barrier.
  template <class F>
  __device__ void each(int n, F f) const {
    each_unguarded(n, f);
    __syncthreads();
  }
  template <class F>
  __device__ void each_unguarded(int n, F f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
  }
  // f(thread, what it keeps), then a barrier.
  template <class X, class F>
  __device__ __forceinline__ void threads(PerThread<X>& all, F f) const {
    f(int(threadIdx.x), all.own);
    __syncthreads();
  }
  template <class X, class F>
  __device__ __forceinline__ void threads_unguarded(PerThread<X>& all, F f) const {
    f(int(threadIdx.x), all.own);
  }
  // f(warp, what it keeps).
  template <class X, class F>
  __device__ __forceinline__ void warps_unguarded(PerWarp<X>& all, F f) const {
    f(int(threadIdx.x / 32), all.own);
  }
  template <class X, class F>
  __device__ __forceinline__ void warps(PerWarp<X>& all, F f) const {
    f(int(threadIdx.x / 32), all.own);
    __syncthreads();
  }
  // The i < n at which size(i) is largest, of equals that with the smallest rank(i). Every warp finds it for itself.
  template <class F, class G>
  __device__ int first_largest(int n, F size, G rank) const {
    int at = threadIdx.x % 32 < n ? threadIdx.x % 32 : 0, place = rank(at);
    auto best = size(at);
    for (int i = threadIdx.x % 32 + 32; i < n; i += 32) {
      const auto here = size(i);
      const int its = rank(i);
      if (here > best || (here == best && its < place)) {
        best = here;
        place = its;
        at = i;
      }
    }
    for (int step = 16; step; step /= 2) {
      const auto other = __shfl_xor_sync(~0u, best, step);
      const int other_place = __shfl_xor_sync(~0u, place, step), other_at = __shfl_xor_sync(~0u, at, step);
      if (other > best || (other == best && other_place < place)) {
        best = other;
        place = other_place;
        at = other_at;
      }
    }
    return at;
  }
  // f(i, j) for i < n, j < m, neighbouring lanes at neighbouring j, then a barrier. Blocks are whole warps.
  template <class F>
  __device__ void each(int n, int m, F f) const {
    for (int i = threadIdx.x / 32; i < n; i += blockDim.x / 32)
      for (int j = threadIdx.x % 32; j < m; j += 32) f(i, j);
    __syncthreads();
  }
  // done(i, Σ f(i, j) over j < m) for i < n, a warp a sum, then a barrier.
  template <class F, class G>
  __device__ void sums(int n, int m, F f, G done) const {
    for (int i = threadIdx.x / 32; i < n; i += blockDim.x / 32) {
      auto sum = decltype(f(0, 0))(0);
      for (int j = threadIdx.x % 32; j < m; j += 32) sum += f(i, j);
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (threadIdx.x % 32 == 0) done(i, sum);
    }
    __syncthreads();
  }
  // The first of [begin, end) at which size(i) is largest; NaN counts only at `begin`, where it wins. `answer` is shared.
  template <class F>
  __device__ int largest(int begin, int end, F size, int* answer) const {
    if (threadIdx.x < 32) {
      const auto first = size(begin);
      auto best = first;
      int at = begin;
      for (int i = begin + threadIdx.x; i < end; i += 32) {
        const auto here = size(i);
        if (here > best) {
          best = here;
          at = i;
        }
      }
      for (int step = 16; step; step /= 2) {
        const auto other = __shfl_xor_sync(~0u, best, step);
        const int other_at = __shfl_xor_sync(~0u, at, step);
        if (other > best || (other == best && other_at < at)) {
          best = other;
          at = other_at;
        }
      }
      if (threadIdx.x == 0) *answer = first == first ? at : begin;
    }
    __syncthreads();
    return *answer;
  }
};

template <class T>
using Lane = T;

// Reads that come after it in the code are not made before it: a compiler that unrolls would make them all at once.
GLF_DEVICE void no_reads_ahead() { asm volatile("" ::: "memory"); }

GLF_DEVICE Lane<int> lane_index() { return threadIdx.x % 32; }
template <class T>
GLF_DEVICE T select(bool c, T a, T b) {
  return c ? a : b;
}
template <class T>
GLF_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(~0u, x, lane);
}
template <class T>
GLF_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
// The lane at which `c` holds, among the N lanes that this one belongs to.
template <int N>
GLF_DEVICE int lane_where(bool c) {
  const int base = threadIdx.x % 32 / N * N;
  return base + __ffs(__ballot_sync(~0u, c) >> base) - 1;
}
// Whether `c` holds at one of these N lanes.
template <int N>
GLF_DEVICE bool any(bool c) {
  const int base = threadIdx.x % 32 / N * N;
  return (__ballot_sync(~0u, c) >> base & (N == 32 ? ~0u : (1u << N % 32) - 1)) != 0;
}
template <class T>
GLF_DEVICE T lane_log(T x) {
  return natural_log(x);
}
// f(lane) on every lane, where lanes may do different things.
template <class F>
GLF_DEVICE void on_lanes(F f) {
  f(int(threadIdx.x % 32));
}
template <class T>
GLF_DEVICE T& of_lane(T& x, int) {
  return x;
}

#else

struct HostCluster;  // cluster.cuh

// The block that is at work, and the cluster to which it belongs, if any.
struct HostBlock {
  long long index;
  unsigned char* shared;
  HostCluster* cluster = nullptr;
};
inline thread_local HostBlock host_block;

inline long long block_index() { return host_block.index; }
inline unsigned char* shared_memory() { return host_block.shared; }
template <int threads, class F>
void each_warp(F f) {
  for (int w = 0; w < threads / 32; ++w) f(block_index() * (threads / 32) + w);
}

inline float natural_log(float x) { return std::log(x); }
inline double natural_log(double x) { return std::log(x); }
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline double power(double x, double y) { return std::pow(x, y); }

// f(i) for i < n, which on a GPU run at once: none may need what another does. Tests go through them backwards, too.
inline bool backwards = false;
template <class F>
void all_of(int n, F f) {
  for (int i = 0; i < n; ++i) f(backwards ? n - 1 - i : i);
}

template <class X>
struct PerThread {
  X all[256];
};
template <class X>
struct PerWarp {
  X all[8];
};

struct Block {
  template <class F>
  void each(int n, F f) const {
    all_of(n, f);
  }
  template <class F>
  void each_unguarded(int n, F f) const {
    each(n, f);
  }
  template <class X, class F>
  void threads(PerThread<X>& own, F f) const {
    all_of(256, [&](int t) { f(t, own.all[t]); });
  }
  template <class X, class F>
  void threads_unguarded(PerThread<X>& own, F f) const {
    threads(own, f);
  }
  template <class X, class F>
  void warps_unguarded(PerWarp<X>& own, F f) const {
    all_of(8, [&](int w) { f(w, own.all[w]); });
  }
  template <class X, class F>
  void warps(PerWarp<X>& own, F f) const {
    warps_unguarded(own, f);
  }
  template <class F, class G>
  int first_largest(int n, F size, G rank) const {
    int at = 0;
    for (int i = 1; i < n; ++i)
      if (size(i) > size(at) || (size(i) == size(at) && rank(i) < rank(at))) at = i;
    return at;
  }
  template <class F>
  void each(int n, int m, F f) const {
    all_of(n, [&](int i) { all_of(m, [&](int j) { f(i, j); }); });
  }
  template <class F, class G>
  void sums(int n, int m, F f, G done) const {
    for (int i = 0; i < n; ++i) {
      auto sum = decltype(f(0, 0))(0);
      for (int j = 0; j < m; ++j) sum += f(i, j);
      done(i, sum);
    }
  }
  template <class F>
  int largest(int begin, int end, F size, int* answer) const {
    *answer = begin;
    for (int i = begin; i < end; ++i)
      if (size(i) > size(*answer)) *answer = i;
    return *answer;
  }
};

template <class T>
struct Lane {
  T v[32];
  Lane() = default;
  Lane(T x) {
    for (T& e : v) e = x;
  }
};

template <class F>
auto by_lane(F f) -> Lane<decltype(f(0))> {
  Lane<decltype(f(0))> r;
  for (int i = 0; i < 32; ++i) r.v[i] = f(i);
  return r;
}
#define GLF_OPERATOR(op)                                                                 \
  template <class T>                                                                     \
  auto operator op(const Lane<T>& a, const Lane<T>& b) {                                 \
    return by_lane([&](int i) { return a.v[i] op b.v[i]; });                             \
  }                                                                                      \
  template <class T>                                                                     \
  auto operator op(const Lane<T>& a, T b) {                                              \
    return by_lane([&](int i) { return a.v[i] op b; });                                  \
  }
GLF_OPERATOR(+)
GLF_OPERATOR(-)
GLF_OPERATOR(*)
GLF_OPERATOR(/)
GLF_OPERATOR(%)
GLF_OPERATOR(<)
GLF_OPERATOR(>)
GLF_OPERATOR(>=)
GLF_OPERATOR(==)
GLF_OPERATOR(!=)
GLF_OPERATOR(&&)
GLF_OPERATOR(||)
#undef GLF_OPERATOR

inline void no_reads_ahead() {}
inline Lane<int> lane_index() {
  return by_lane([](int i) { return i; });
}
template <class T>
Lane<T> select(const Lane<bool>& c, const Lane<T>& a, const Lane<T>& b) {
  return by_lane([&](int i) { return c.v[i] ? a.v[i] : b.v[i]; });
}
template <class T>
Lane<T> magnitude(const Lane<T>& x) {
  return by_lane([&](int i) { return magnitude(x.v[i]); });
}
template <class T>
Lane<T> shuffle(const Lane<T>& x, const Lane<int>& lane) {
  return by_lane([&](int i) { return x.v[lane.v[i]]; });
}
template <class T>
Lane<T> shuffle_xor(const Lane<T>& x, int mask) {
  return by_lane([&](int i) { return x.v[i ^ mask]; });
}
template <int N>
Lane<bool> any(const Lane<bool>& c) {
  return by_lane([&](int i) {
    bool found = false;
    for (int l = i / N * N; l < i / N * N + N; ++l) found = found || c.v[l];
    return found;
  });
}
// As on the device, some lane where there is none.
template <int N>
Lane<int> lane_where(const Lane<bool>& c) {
  return by_lane([&](int i) {
    for (int l = i / N * N; l < i / N * N + N; ++l)
      if (c.v[l]) return l;
    return i / N * N - 1;
  });
}
template <class T>
Lane<T> lane_log(const Lane<T>& x) {
  return by_lane([&](int i) { return natural_log(x.v[i]); });
}
template <class F>
void on_lanes(F f) {
  all_of(32, f);
}
template <class T>
T& of_lane(Lane<T>& x, int lane) {
  return x.v[lane];
}

#endif

}  // namespace glf::device
