// OpenMP's barrier waits for every thread of a team, also for one that has no core: two processes of two threads on two cores
// needed 24 ms for a training pass that takes 0.33 ms alone (Zen 5; D = 8, H = 50, B = 200), because each spun away the time
// slice that its own thread waited for. Here each helper has a mailbox; the caller puts a task into each, works itself, takes
// back what nobody has begun, and waits only for what somebody is doing.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#ifdef __SSE2__
#include <xmmintrin.h>
#else
#include <cfenv>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace glf {
namespace {

using Clock = std::chrono::steady_clock;

// A helper looks for its next task for so long before it sleeps: a training step comes back within it. To wake
// it is a call of the system, and takes longer still where its core has gone to sleep.
constexpr std::chrono::microseconds patience{1000};
// The caller, for helpers that are at work, before it sleeps and leaves its core to them.
constexpr std::chrono::microseconds grace{20};

// How floats are rounded, and whether denormals are flushed (torch.set_flush_denormal): a thread's own, which a helper takes over
// from the caller.
#ifdef __SSE2__
using Rounding = unsigned;
void read(Rounding& r) { r = _mm_getcsr(); }
void set(const Rounding& r) { _mm_setcsr(r); }
#else
using Rounding = std::fenv_t;
void read(Rounding& r) { std::fegetenv(&r); }
void set(const Rounding& r) { std::fesetenv(&r); }
#endif

void relax() {
#ifdef __SSE2__
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Looks whether done() for so long; others who want the core get it.
template <class F>
bool look(std::chrono::microseconds time, F done) {
  const auto end = Clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
    std::this_thread::yield();
  } while (Clock::now() < end);
  return done();
}

// A thread sleeps here until another one sees that it does. Sequentially consistent throughout: either the sleeper sees what it
// waits for, or the other one sees the sleeper.
class Bed {
 public:
  template <class F>
  void sleep_until(F done) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_ = true;
    wake_.wait(lock, done);
    asleep_ = false;
  }
  void wake() {
    if (!asleep_) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> asleep_{false};
};

enum class Mail { none, offered, taken };

// On two cache lines, which processors fetch in pairs.
struct alignas(128) Helper {
  std::atomic<Mail> mail{Mail::none};
  Bed bed;
};

class Pool {
 public:
  void run(int tasks, void (*task)(void*, int), void* context) {
    const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (!mine.owns_lock()) {  // the helpers have another caller
      for (int i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    task_ = task;
    context_ = context;
    read(rounding_);
    const auto begun = Clock::now();
    const int offers = begun < alone_until_ ? 0 : hire(std::min(tasks, most_tasks) - 1);
    for (int i = 0; i < offers; ++i) {
      helpers_[i].mail = Mail::offered;
      helpers_[i].bed.wake();
    }
    perform(0);
    const auto task_took = Clock::now() - begun;
    for (int i = offers; i < tasks - 1; ++i) perform(i + 1);
    take_all(offers);
    if (offers) wait(offers, task_took);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // For helpers that are at work. If that costs half of what they save, the cores have other users, and calls go without helpers
  // for a while: as long as this call, three times as long when it happens again, up to 63 times. That is forgotten slowly: a second
  // process on two cores is in the way of every other call.
  void wait(int offers, Clock::duration task_took) {
    const auto begun = Clock::now();
    const auto finished = [&] {
      return std::all_of(helpers_.get(), helpers_.get() + offers, [](const Helper& h) { return h.mail == Mail::none; });
    };
    if (!look(grace, finished)) bed_.sleep_until(finished);
    const auto now = Clock::now();
    const bool late = now - begun > offers * task_took / 2 + grace;
    lateness_ = late ? std::min(2 * lateness_ + 1, 63) : std::max(lateness_ - 1, 0);
    if (late) alone_until_ = now + lateness_ * (task_took + (now - begun));
  }

  // As many helpers as are wanted, or as the system allows.
  int hire(int wanted) {
    try {
      for (int i = hired_; i < wanted; ++i) {
        std::thread([this, i] { help(i); }).detach();
        hired_ = i + 1;
      }
    } catch (const std::exception&) {  // no thread, or no memory for one
    }
    return std::min(wanted, hired_.load());
  }

  [[noreturn]] void help(int self) {
    Helper& own = helpers_[self];
    const auto called = [&] { return own.mail == Mail::offered; };
    for (;;) {
      if (!look(patience, called)) own.bed.sleep_until(called);
      take(self);
      take_all(hired_);
      bed_.wake();
    }
  }

  void take_all(int offers) {
    for (int i = 0; i < offers; ++i) take(i);
  }

  // A helper's task, unless somebody has begun it.
  void take(int i) {
    Mail expected = Mail::offered;
    if (helpers_[i].mail != expected || !helpers_[i].mail.compare_exchange_strong(expected, Mail::taken)) return;
    set(rounding_);
    perform(i + 1);
    helpers_[i].mail = Mail::none;
  }

  void perform(int i) {
    try {
      task_(context_, i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  std::mutex busy_, failing_;
  void (*task_)(void*, int) = nullptr;
  void* context_ = nullptr;
  Rounding rounding_{};
  std::exception_ptr failure_;
  std::atomic<int> hired_{0};
  int lateness_ = 0;
  Clock::time_point alone_until_{};
  Bed bed_;  // the caller's
  const std::unique_ptr<Helper[]> helpers_{new Helper[most_tasks - 1]};
};

// Never destroyed: its threads end with the process. After a fork the child has none of them, and makes a pool of its own.
std::atomic<Pool*> pool{nullptr};
#ifndef _WIN32
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
#endif

Pool& here() {
  Pool* found = pool;
  if (!found) {
    auto made = std::make_unique<Pool>();
    if (pool.compare_exchange_strong(found, made.get())) found = made.release();
  }
  return *found;
}

}  // namespace

void run_together(int tasks, void (*task)(void*, int), void* context) {
  if (tasks > 0) here().run(tasks, task, context);
}

}  // namespace glf
