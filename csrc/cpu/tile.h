// Rows are split into equal ranges over the threads, and a thread's rows into tiles whose records stay in its L2 cache.
#pragma once

#include "gemm.h"
#include "record.h"

#include <algorithm>
#include <limits>
#include <new>

namespace glf::GLF_ISA {

// Uninitialised memory on a cache line. With GLF_POISON it is full of NaN, so that a value used unwritten shows.
template <class T>
class Scratch {
 public:
  explicit Scratch(idx n)
      : data_(static_cast<T*>(::operator new(std::max<idx>(n, 1) * sizeof(T), std::align_val_t{64}))) {
#ifdef GLF_POISON
    std::fill_n(data_, n, std::numeric_limits<T>::quiet_NaN());
#endif
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

struct Tiling {
  int threads;
  idx thread_rows, tile_rows;

  template <class T>
  Tiling(const Flow<T>& flow, const Record& record, idx batch, const Parallel& parallel) {
    idx work = flow.dim * flow.dim;  // multiply-adds of a row
    for (int i = 0; i < flow.layers; ++i) work += flow.width[i] * flow.width[i + 1];
    work *= flow.steps * batch;
    // A thread is woken for at least half a million multiply-adds: some 5 µs.
    threads = static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, (batch + MR - 1) / MR), 1, parallel.threads));
    thread_rows = round_up((batch + threads - 1) / threads, MR);
    threads = static_cast<int>((batch + thread_rows - 1) / thread_rows);
    // Long tiles use each packed panel often; half a megabyte of records still leaves room for the weights in L2.
    const idx most = std::clamp<idx>((idx{1} << 19) / (record.width * idx(sizeof(T))) / MR * MR, MR, 128);
    const idx tiles = (thread_rows + most - 1) / most;
    tile_rows = round_up((thread_rows + tiles - 1) / tiles, MR);
  }

  // Calls f(first row, rows, is the thread's first tile) for all tiles of one thread, in order.
  template <class F>
  void each_tile(int thread, idx batch, F f) const {
    const idx begin = thread * thread_rows, end = std::min(begin + thread_rows, batch);
    for (idx row = begin; row < end; row += tile_rows) f(row, std::min(tile_rows, end - row), row == begin);
  }
};

// Runs f(i) for i < tasks on the caller's threads.
template <class F>
void in_parallel(const Parallel& parallel, int tasks, F f) {
  if (tasks == 1) return f(0);
  parallel.run(tasks, [](void* context, int i) { (*static_cast<F*>(context))(i); }, &f);
}

// Elements of the widest packed panel.
template <class T>
idx panel_size(const Flow<T>& flow) {
  idx k = flow.dim;
  for (int i = 0; i <= flow.layers; ++i) k = std::max(k, flow.width[i]);
  return k * NR * lanes<T>;
}

template <class T>
void copy_rows(idx rows, idx cols, const T* from, idx from_m, T* to, idx to_m) {
  for (idx m = 0; m < rows; ++m) std::copy_n(from + m * from_m, cols, to + m * to_m);
}

}  // namespace glf::GLF_ISA
