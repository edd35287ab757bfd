// Weights on their way into shared memory while a block's warps multiply those that came before.
//
// Units of bytes, such as one for each step of a flow, pass through a ring of slots. Warp 0 asks for them; every warp waits for the one
// that it needs, and says when it has read it. Two barriers a slot, in shared memory, know how often it was filled and how often
// it was read by all: nowhere do the warps of a block wait for each other as a whole.
//
// From sm_90 on the copy is one instruction of one lane (cp.async.bulk), which counts its bytes at the barrier; on sm_80 the lanes
// of warp 0 copy 16 bytes at a time (cp.async) and arrive when their bytes have. On the host the warps of a block are threads,
// barriers are atomic counters, and a copy is a copy: the thread sanitizer sees a slot that is filled before it was read.
#pragma once

#include "lanes.cuh"

#ifndef __CUDACC__
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>
#endif

namespace glf::device {

#ifdef __CUDACC__

using Barrier = unsigned long long;

GLF_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Arrivals that fill a slot: one lane's, or with cp.async those of a warp.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int fillers = 32;
#else
inline constexpr int fillers = 1;
#endif

GLF_DEVICE void initialize(Barrier* barrier, int arrivals) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// What one thread has initialised is seen by copies, and by the other warps.
GLF_DEVICE void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one lane of a warp that has synchronised.
GLF_DEVICE void arrive(Barrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Until the phase of this parity is complete.
GLF_DEVICE void await(Barrier* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned done;
  do {
    asm volatile(
#if __CUDA_ARCH__ >= 900
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#else
        "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#endif
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// By all lanes of a warp: bytes, a multiple of 16, from global to shared memory, then an arrival at the barrier.
GLF_DEVICE void copy(unsigned char* to, const unsigned char* from, int bytes, Barrier* full) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(shared_address(full)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(full))
                 : "memory");
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + at)), "l"(from + at) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
#endif
}

template <class F>
GLF_DEVICE void on_one_lane(F f) {
  if (threadIdx.x % 32 == 0) f();
}
GLF_DEVICE void synchronize_warp() { __syncwarp(); }

// `prepare()` once, and when it is done f(w) on each warp of the block.
template <class P, class F>
GLF_DEVICE void prepared_warps(int, P prepare, F f) {
  if (threadIdx.x == 0) prepare();
  __syncthreads();
  f(int(threadIdx.x / 32));
}

#else

struct Barrier {
  std::atomic<unsigned> arrived;
  unsigned expected;
};
static_assert(sizeof(Barrier) == 8);
inline constexpr int fillers = 1;

inline void initialize(Barrier* barrier, int arrivals) {
  new (barrier) Barrier{};
  barrier->expected = arrivals;
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) { barrier->arrived.fetch_add(1, std::memory_order_acq_rel); }
inline void await(Barrier* barrier, unsigned parity) {
  while ((barrier->arrived.load(std::memory_order_acquire) / barrier->expected & 1) == parity) std::this_thread::yield();
}
inline void copy(unsigned char* to, const unsigned char* from, int bytes, Barrier* full) {
  std::memcpy(to, from, bytes);
  arrive(full);
}
template <class F>
void on_one_lane(F f) {
  f();
}
inline void synchronize_warp() {}
template <class P, class F>
void prepared_warps(int warps, P prepare, F f) {
  prepare();
  const HostBlock block = host_block;
  std::vector<std::thread> others;
  for (int w = 1; w < warps; ++w)
    others.emplace_back([=] {
      host_block = block;
      f(w);
    });
  f(0);
  for (std::thread& other : others) other.join();
}

#endif

inline constexpr int most_slots = 4;
inline constexpr int barrier_bytes = 16 * most_slots;  // in front of the slots, which are aligned to 16 bytes

// What a block needs of shared memory.
GLF_DEVICE_AND_HOST constexpr int stream_bytes(int slots, int slot_bytes) { return barrier_bytes + slots * slot_bytes; }

// A warp's view of the ring. `Order` says where unit n lies in global memory and how long it is: from(n), then bytes(n), both asked
// once for each n, in their order.
template <class Order>
struct Stream {
  Order order;
  int units, slots, slot_bytes, warp;
  Barrier *full, *empty;
  unsigned char* memory;
  int n = 0, slot = 0;     // the unit at hand, and where it is
  unsigned parity = 0;     // how often its slot was filled before, modulo 2

  // For `prepared_warps`.
  GLF_DEVICE static void prepare(unsigned char* shared, int slots, int warps) {
    Barrier* barriers = reinterpret_cast<Barrier*>(shared);
    for (int s = 0; s < slots; ++s) {
      initialize(barriers + s, fillers);
      initialize(barriers + most_slots + s, warps);
    }
    publish_barriers();
  }

  GLF_DEVICE Stream(Order order, int units, int slots, int slot_bytes, int warp, unsigned char* shared)
      : order(order),
        units(units),
        slots(slots),
        slot_bytes(slot_bytes),
        warp(warp),
        full(reinterpret_cast<Barrier*>(shared)),
        empty(full + most_slots),
        memory(shared + barrier_bytes) {
    if (warp == 0)
      for (int i = 0; i < slots && i < units; ++i) fetch(i, i);
  }

  GLF_DEVICE void fetch(int unit, int into) {
    const unsigned char* from = order.from(unit);
    copy(memory + into * slot_bytes, from, order.bytes(unit), full + into);
  }

  // The next unit, when it has come. Warp 0 first asks for the one that follows those on their way, in the slot that was read
  // last: a step later than it could, and the other warps have read it by then.
  GLF_DEVICE const unsigned char* next() {
    if (warp == 0 && n > 0 && n - 1 + slots < units) {
      const bool around = slot == 0;
      const int before = around ? slots - 1 : slot - 1;
      await(empty + before, around ? parity ^ 1 : parity);
      fetch(n - 1 + slots, before);
    }
    await(full + slot, parity);
    return memory + slot * slot_bytes;
  }

  // The unit has been read.
  GLF_DEVICE void release() {
    synchronize_warp();
    on_one_lane([&] { arrive(empty + slot); });
    ++n;
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace glf::device
