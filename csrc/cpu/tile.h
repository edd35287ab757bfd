// Rows are split into equal ranges over the threads, and a thread's rows into tiles whose records stay in its L2 cache.
#pragma once

#include "gemm.h"
#include "record.h"

#include <algorithm>
#include <limits>
#include <new>

namespace glf::GLF_ISA {

// The last block of memory that was given back on this thread: the next call will want one of the same size, and fresh
// pages cost more than they seem: 800 page faults and 2 ms of a training pass at D = 64, H = 256.
class Kept {
 public:
  ~Kept() { ::operator delete(block_, alignment); }
  // A block of `size` bytes or more, which `size` then says.
  void* take(std::size_t& size) {
    if (size > size_) return ::operator new(size, alignment);
    size = std::exchange(size_, 0);
    return std::exchange(block_, nullptr);
  }
  void give(void* block, std::size_t size) {
    if (size > size_ && size <= limit) {
      std::swap(block, block_);
      size_ = size;
    }
    ::operator delete(block, alignment);
  }
  static Kept& here() {
    static thread_local Kept kept;
    return kept;
  }

 private:
  static constexpr std::align_val_t alignment{64};
  static constexpr std::size_t limit = 32 << 20;
  void* block_ = nullptr;
  std::size_t size_ = 0;
};

// Uninitialised memory on a cache line. With GLF_POISON it is full of NaN, so that a value used unwritten shows.
template <class T>
class Scratch {
 public:
  explicit Scratch(idx n) : size_(std::max<idx>(n, 1) * sizeof(T)), data_(static_cast<T*>(Kept::here().take(size_))) {
#ifdef GLF_POISON
    std::fill_n(data_, n, std::numeric_limits<T>::quiet_NaN());
#endif
  }
  ~Scratch() { Kept::here().give(data_, size_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  std::size_t size_;
  T* data_;
};

// The memory of all threads of a call, several fields for each.
template <class T>
class PerThread {
 public:
  PerThread(int threads, std::initializer_list<idx> sizes) : memory_(threads * total(sizes)), total_(total(sizes)) {
    idx end = 0;
    int field = 0;
    for (const idx size : sizes) start_[field++] = std::exchange(end, end + padded(size));
  }
  // The i-th of the given sizes.
  T* get(int thread, int i) const { return memory_.get() + thread * total_ + start_[i]; }

 private:
  // To two cache lines, which processors fetch in pairs.
  static idx padded(idx size) { return round_up(size, 128 / sizeof(T)); }
  static idx total(std::initializer_list<idx> sizes) {
    idx sum = 0;
    for (const idx size : sizes) sum += padded(size);
    return sum;
  }
  Scratch<T> memory_;
  idx total_, start_[4];
};

// Whether a layer's weights are too many for the L2 cache of a thread: from 2 MB, 724 × 724 in float32. See wide.h.
template <class T>
bool is_wide(const Flow<T>& flow) {
  for (int i = 0; i < flow.layers; ++i)
    if (flow.inputs(i) * flow.outputs(i) * idx(sizeof(T)) >= idx{2} << 20) return true;
  return false;
}

struct Tiling {
  bool wide;
  int threads;  // with tiles of their own
  idx thread_rows, tile_rows;
  Parallel team;  // which computes a wide tile's products together

  template <class T>
  Tiling(const Flow<T>& flow, const Record& record, idx batch, const Parallel& parallel)
      : wide(is_wide(flow)), team{1, parallel.run} {
    idx work = flow.dim * flow.dim;  // multiply-adds of a row
    for (int i = 0; i < flow.layers; ++i) work += flow.networks * flow.inputs(i) * flow.outputs(i);
    work *= flow.steps * batch;
    // A thread is woken for at least half a million multiply-adds: some 5 µs.
    threads = static_cast<int>(std::clamp<idx>(std::min<idx>(work >> 19, (batch + MR - 1) / MR), 1, parallel.threads));
    // With few rows for each thread, copies of all gradients and their sum take as long as the products: 17 % of a pass at 64.
    if (wide && batch < 512 * idx(threads)) team.threads = std::exchange(threads, 1);
    thread_rows = round_up((batch + threads - 1) / threads, MR);
    threads = static_cast<int>((batch + thread_rows - 1) / thread_rows);
    // Long tiles use each packed panel often; half a megabyte of records still leaves room for the weights in L2. Those of wide
    // flows come from memory, once for each tile.
    const idx most = wide ? 198 : std::clamp<idx>((idx{1} << 19) / (record.width * idx(sizeof(T))) / MR * MR, MR, 128);
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
