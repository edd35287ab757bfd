// Clusters: blocks on neighbouring multiprocessors that write into each other's shared memory, and wait for each other (sm_90).
//
// All threads of a cluster arrive at its barrier and wait for it in turns. What a thread wrote before it arrived, to memory of any
// kind, is seen by every thread that has waited.
//
// On the host all warps of all blocks of a cluster are threads, which ThreadSanitizer watches. A kernel for clusters is compiled
// for older GPUs, too, where it traps; launchers refuse them.
#pragma once

#include "row_tiles.cuh"

#ifndef __CUDACC__
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>
#endif

namespace glf::device {

#ifdef __CUDACC__

// This block's number in its cluster, whose first block has index 0 modulo the cluster's size.
GLF_DEVICE int cluster_rank() {
  unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// `quad` to the place in the shared memory of block `rank` that `here` has in this block's.
GLF_DEVICE void write_to(int rank, Quad* here, const Quad& quad) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(here))), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(quad.x), "r"(quad.y), "r"(quad.z), "r"(quad.w)
               : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

GLF_DEVICE void synchronize_block() { __syncthreads(); }

// A thread's turns at the barrier of its cluster. The lanes of a warp take theirs together.
struct ClusterBarrier {
  GLF_DEVICE void arrive() {
    __syncwarp();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  GLF_DEVICE void wait() {
    __syncwarp();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
};

#else

// Threads arrive, go on, and wait later until all have arrived.
class HostBarrier {
 public:
  explicit HostBarrier(int count) : count_(count) {}
  void arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (++here_ < count_) return;
    here_ = 0;
    ++turn_;
    all_.notify_all();
  }
  // Until all have arrived for the turn after `passed` others.
  void wait(long passed) {
    std::unique_lock<std::mutex> lock(mutex_);
    all_.wait(lock, [&] { return turn_ > passed; });
  }
  void arrive_and_wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long turn = turn_;
    if (++here_ == count_) {
      here_ = 0;
      ++turn_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return turn_ > turn; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int count_, here_ = 0;
  long turn_ = 0;
};

struct HostCluster {
  HostBarrier all;
  std::vector<std::unique_ptr<HostBarrier>> blocks;
  std::vector<unsigned char*> shared;

  HostCluster(int count, int warps) : all(count * warps) {
    for (int i = 0; i < count; ++i) blocks.push_back(std::make_unique<HostBarrier>(warps));
  }
};

inline int cluster_rank() { return static_cast<int>(host_block.index % static_cast<long long>(host_block.cluster->shared.size())); }
inline void write_to(int rank, Quad* here, const Quad& quad) {
  unsigned char* there = host_block.cluster->shared[rank] + (reinterpret_cast<unsigned char*>(here) - host_block.shared);
  *reinterpret_cast<Quad*>(there) = quad;
}
inline void synchronize_block() { host_block.cluster->blocks[cluster_rank()]->arrive_and_wait(); }

struct ClusterBarrier {
  long passed = 0;
  void arrive() { host_block.cluster->all.arrive(); }
  void wait() { host_block.cluster->all.wait(passed++); }
};

#endif

}  // namespace glf::device
