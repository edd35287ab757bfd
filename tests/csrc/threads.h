// A block whose warps are threads of the host, for ThreadSanitizer: where a barrier is missing, two of them race for memory. A
// warp's lanes still run one after the other.
#pragma once

#include "cuda/lanes.cuh"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace glf::device {

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long turn = turn_;
    if (++here_ == count_) {
      here_ = 0;
      ++turn_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return turn_ != turn; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int count_, here_ = 0;
  long turn_ = 0;
};

// What the functions of a block take for Block: one of its eight warps. Names as in lanes.cuh.
struct WarpOfThreads {
  static constexpr int warps_of_block = 8;
  int warp;
  Barrier* barrier;

  template <class F>
  void each_unguarded(int n, F f) const {
    for (int i = 32 * warp; i < n; i += 32 * warps_of_block)
      for (int l = 0; l < 32 && i + l < n; ++l) f(i + l);
  }
  template <class F>
  void each(int n, F f) const {
    each_unguarded(n, f);
    barrier->wait();
  }
  template <class F>
  void each(int n, int m, F f) const {
    for (int i = warp; i < n; i += warps_of_block)
      for (int j = 0; j < m; ++j) f(i, j);
    barrier->wait();
  }
  template <class X, class F>
  void threads_unguarded(PerThread<X>& own, F f) const {
    for (int t = 32 * warp; t < 32 * warp + 32; ++t) f(t, own.all[t]);
  }
  template <class X, class F>
  void threads(PerThread<X>& own, F f) const {
    threads_unguarded(own, f);
    barrier->wait();
  }
  template <class X, class F>
  void warps_unguarded(PerWarp<X>& own, F f) const {
    f(warp, own.all[warp]);
  }
  template <class X, class F>
  void warps(PerWarp<X>& own, F f) const {
    warps_unguarded(own, f);
    barrier->wait();
  }
};

// f(a warp) on eight threads.
template <class F>
void run_warps(F f) {
  Barrier barrier(WarpOfThreads::warps_of_block);
  std::vector<std::thread> team;
  for (int w = 0; w < WarpOfThreads::warps_of_block; ++w) team.emplace_back([&, w] { f(WarpOfThreads{w, &barrier}); });
  for (std::thread& one : team) one.join();
}

}  // namespace glf::device
