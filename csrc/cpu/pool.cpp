// OpenMP's barrier waits for every thread of a team, also for one that has no core: two processes of two threads on two cores
// needed 24 ms for a training pass that takes 0.33 ms alone (Zen 5; D = 8, H = 50, B = 200), because each spun away the time
// slice that its own thread waited for. Here each helper has a mailbox; the caller puts a task into each, works itself, takes
// back what nobody has begun, and waits only for what somebody is doing.
//
// Between torch's own operations it is the other way round: for a millisecond after each, the threads of torch's team spin on
// the other cores, and helpers wait for a core. Then the team is asked: a training step of Glow on two cores 83 ms, against 125 (Zen 3).
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
#ifdef __linux__
#include <time.h>
#endif

namespace glf {
namespace {

using Clock = std::chrono::steady_clock;

// A helper looks for its next task for so long before it sleeps: a training step comes back within it. To wake
// it is a call of the system, and takes longer still where its core has gone to sleep.
constexpr std::chrono::microseconds patience{1000};
// The caller, for helpers that are at work, before it sleeps and leaves its core to them.
constexpr std::chrono::microseconds grace{20};
// A long task. A helper that comes late still saves something of it, and the team is worth a try at once. GCC's OpenMP spins for
// 5 ms on two cores: passes of 20 ms, one thread's, took 16 to 20 ms with late helpers, and 9 to 11 with the team (Zen 3).
constexpr std::chrono::milliseconds long_task{2};
// Calls go without helpers that were late: four calls of a wide flow.
constexpr std::chrono::milliseconds longest_rest{250};

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

#ifdef __linux__
Clock::duration processor_time(clockid_t of) {
  timespec t{};
  clock_gettime(of, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}
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
  bool asleep() const { return asleep_; }
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
#ifdef __linux__
  clockid_t clock = CLOCK_THREAD_CPUTIME_ID;
#endif
};

// When helpers come. If nobody came, or waiting for them was costly, the cores have other users, and calls go without them for a
// while: as long as this call, three times as long when it happens again, up to 63 times, and at most `longest_rest`. That is
// forgotten slowly: a second process on two cores is in the way of every other call.
struct Punctuality {
  int lateness = 0;
  Clock::time_point rests_until{};

  void judge(bool late, Clock::time_point now, Clock::duration call_took) {
    lateness = late ? std::min(2 * lateness + 1, 63) : std::max(lateness - 1, 0);
    if (late) rests_until = now + std::min<Clock::duration>(lateness * call_took, longest_rest);
  }
};

class Pool {
 public:
  explicit Pool(bool team_allowed) : team_allowed_(team_allowed) {}

  void run(int tasks, void (*task)(void*, int), void* context, Team team) {
    const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (!mine.owns_lock()) {  // the helpers have another caller
      for (int i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    task_ = task;
    context_ = context;
    tasks_ = tasks;
    read(rounding_);
    if (tasks == 1)
      perform(0);
    else if (with_team_ && team)
      run_with_team(team);
    else if (const auto now = Clock::now(); now < own_.rests_until)
      run_alone(team && team_allowed_ && now >= team_.rests_until);
    else
      run_with_helpers(team && team_allowed_ && now >= team_.rests_until);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  void run_with_helpers(bool may_ask_team) {
    const int offers = hire(std::min(tasks_, most_tasks) - 1);
    const auto begun = Clock::now();
    bool slept = false;
    for (int i = 0; i < offers; ++i) {
      slept = slept || helpers_[i].bed.asleep();
      helpers_[i].mail = Mail::offered;
      helpers_[i].bed.wake();
    }
    perform(0);
    const auto task_took = Clock::now() - begun;
    for (int i = offers; i < tasks_ - 1; ++i) perform(i + 1);
    const int taken_back = take_all(offers);
    const auto done = Clock::now();
    // For helpers that are at work.
    const auto finished = [&] {
      return std::all_of(helpers_.get(), helpers_.get() + offers, [](const Helper& h) { return h.mail == Mail::none; });
    };
    if (!look(grace, finished)) bed_.sleep_until(finished);
    const auto now = Clock::now();
    // Who had to be woken comes too late for a short call, whoever has the cores.
    const bool nobody = taken_back == offers && !slept;
    const bool late = offers && (nobody || costly(now - done, offers, task_took)), is_long = task_took >= long_task;
    own_.judge(late && (!is_long || now - done > offers * task_took), now, now - begun);
    with_team_ = late && is_long && may_ask_team;
    if (late) watched_ = false;
  }

  // While helpers rest; once each rest it looks whether threads of this process have the cores: torch's team, spinning.
  void run_alone(bool may_ask_team) {
    const bool watches = may_ask_team && !watched_;
    watched_ = watched_ || watches;
    const auto begun = Clock::now();
    const auto had = watches ? strangers() : Clock::duration{};
    for (int i = 0; i < tasks_; ++i) perform(i);
    if (watches) with_team_ = strangers() - had > (tasks_ - 1) * (Clock::now() - begun) / 2;
  }

  // The time that threads of this process other than the caller and the helpers have had; nothing where that is not known.
  Clock::duration strangers() const {
    Clock::duration time{};
#ifdef __linux__
    time = processor_time(CLOCK_PROCESS_CPUTIME_ID) - processor_time(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < hired_; ++i) time -= processor_time(helpers_[i].clock);
#endif
    return time;
  }

  void run_with_team(Team team) {
    const auto begun = Clock::now();
    const int members = std::min(tasks_, most_tasks);
    next_ = 0;
    team(members, [](void* pool, int i) { static_cast<Pool*>(pool)->join(i == 0); }, this);
    const auto now = Clock::now();
    // Within another team of OpenMP, or where it may have one thread only, the caller does everything.
    with_team_ = done_by_caller_ < tasks_ && !costly(now - done_, members - 1, task_took_);
    team_.judge(!with_team_, now, now - begun);
  }

  // A member's part of a call.
  void join(bool caller) {
    Rounding own;
    read(own);
    set(rounding_);
    const auto begun = Clock::now();
    int done = 0;
    for (int i; (i = next_++) < tasks_; ++done) perform(i);
    if (caller) {
      done_ = Clock::now();
      done_by_caller_ = done;
      task_took_ = (done_ - begun) / std::max(done, 1);
    }
    set(own);
  }

  // Whether waiting for so many others cost half of what they save.
  static bool costly(Clock::duration waited, int others, Clock::duration task_took) {
    return waited > others * task_took / 2 + grace;
  }

  // As many helpers as are wanted, or as the system allows.
  int hire(int wanted) {
    try {
      for (int i = hired_; i < wanted; ++i) {
        std::thread thread([this, i] { help(i); });
#ifdef __linux__
        pthread_getcpuclockid(thread.native_handle(), &helpers_[i].clock);
#endif
        thread.detach();
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

  // Takes back what nobody has begun, and counts it.
  int take_all(int offers) {
    int taken = 0;
    for (int i = 0; i < offers; ++i) taken += take(i);
    return taken;
  }

  // A helper's task, unless somebody has begun it.
  bool take(int i) {
    Mail expected = Mail::offered;
    if (helpers_[i].mail != expected || !helpers_[i].mail.compare_exchange_strong(expected, Mail::taken)) return false;
    set(rounding_);
    perform(i + 1);
    helpers_[i].mail = Mail::none;
    return true;
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
  int tasks_ = 0;
  std::exception_ptr failure_;
  std::atomic<int> hired_{0};
  const bool team_allowed_;
  Punctuality own_, team_;
  bool with_team_ = false;
  bool watched_ = false;  // it was asked whether torch's team has the cores, since helpers were late
  std::atomic<int> next_{0};  // of the team's tasks
  int done_by_caller_ = 0;
  Clock::duration task_took_{};
  Clock::time_point done_{};
  Bed bed_;  // the caller's
  const std::unique_ptr<Helper[]> helpers_{new Helper[most_tasks - 1]};
};

// Never destroyed: its threads end with the process. After a fork the child has none of them, and makes a pool of its own. Torch's
// team is lost with them: GCC's OpenMP waits for it without end.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};
#ifndef _WIN32
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  pool = nullptr;
  forked = true;
});
#endif

Pool& here() {
  Pool* found = pool;
  if (!found) {
    auto made = std::make_unique<Pool>(!forked);
    if (pool.compare_exchange_strong(found, made.get())) found = made.release();
  }
  return *found;
}

}  // namespace

void run_together(int tasks, void (*task)(void*, int), void* context, Team team) {
  if (tasks > 0) here().run(tasks, task, context, team);
}

}  // namespace glf
