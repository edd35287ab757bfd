// Copies from global into shared memory that a thread starts and waits for later (cp.async, from sm_80 on; before, the code
// traps, and launchers refuse the GPU).
//
// On the host a copy happens either when it is started or when it is waited for, as `copies_come_late` says. Tests do both: a
// missing wait leaves poison behind, a buffer that is filled too early is overwritten while it is read.
#pragma once

#include "lanes.cuh"

#ifndef __CUDACC__
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#endif

namespace glf::device {

#ifdef __CUDACC__

// One thread's copies.
struct AsyncCopies {
  // `bytes` (4, 8 or 16) to a multiple of that in shared memory, from one in global memory; zeros from `valid` bytes on, which
  // are not read.
  template <int bytes>
  GLF_DEVICE void copy(void* shared, const void* global, int valid) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (bytes == 16)  // past the first cache, which rows of other blocks would not find again
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(valid) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(global), "n"(bytes), "r"(valid)
                   : "memory");
#else
    __trap();
#endif
  }
  // Ends a group of copies.
  GLF_DEVICE void commit() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Waits for all groups but the last `pending`. Other threads see what came behind the next barrier.
  template <int pending>
  GLF_DEVICE void wait() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
  }
};

#else

inline bool copies_come_late = false;

class AsyncCopies {
 public:
  template <int bytes>
  void copy(void* shared, const void* global, int valid) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    if (reinterpret_cast<std::uintptr_t>(shared) % bytes || (valid && reinterpret_cast<std::uintptr_t>(global) % bytes) ||
        valid < 0 || valid > bytes) {
      std::printf("a copy of %d bytes, %d of them valid, from %p to %p\n", bytes, valid, global, shared);
      std::abort();
    }
    const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid};
    if (copies_come_late)
      groups_.back().push_back(copy);
    else
      happen(copy);
  }
  void commit() { groups_.emplace_back(); }
  template <int pending>
  void wait() {
    while (groups_.size() > pending + 1) {  // the last one is not committed yet
      for (const Copy& copy : groups_.front()) happen(copy);
      groups_.erase(groups_.begin());
    }
  }

 private:
  struct Copy {
    unsigned char* target;
    const unsigned char* source;
    int bytes, valid;
  };
  static void happen(const Copy& copy) {
    if (copy.valid) std::memcpy(copy.target, copy.source, copy.valid);
    std::memset(copy.target + copy.valid, 0, copy.bytes - copy.valid);
  }
  std::vector<std::vector<Copy>> groups_{1};
};

#endif

}  // namespace glf::device
