// The pool of threads under load: more helpers than cores, several callers, tasks that throw, a team, and a fork.
#include "cpu/pool.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace {

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// As OpenMP would: new threads each time, that spin until all have come.
std::atomic<int> teams{0};
void team(int members, void (*member)(void*, int), void* context) {
  ++teams;
  std::vector<std::thread> threads;
  for (int i = 1; i < members; ++i) threads.emplace_back(member, context, i);
  member(context, 0);
  for (auto& thread : threads) thread.join();
}

template <class F>
void run(int tasks, F f) {
  glf::run_together(tasks, [](void* context, int i) { (*static_cast<F*>(context))(i); }, &f, team);
}

// Every task is done once, and what it wrote is seen.
void many(int jobs) {
  for (int job = 0; job < jobs; ++job) {
    const int tasks = 1 + job % 9;
    std::vector<int> done(tasks);
    run(tasks, [&](int i) { done[i] += i + job; });
    for (int i = 0; i < tasks; ++i) expect(done[i] == i + job, "a task was left out, or done twice");
  }
}

void odd_numbers() {
  run(0, [](int) { expect(false, "a task of none"); });
  std::vector<int> done(600);
  run(600, [&](int i) { ++done[i]; });
  expect(done == std::vector<int>(600, 1), "more tasks than threads");
}

void callers_at_once() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(many, 2000);
  for (auto& caller : callers) caller.join();
}

void failures() {
  for (int job = 0; job < 300; ++job) {
    std::atomic<int> done{0};
    try {
      run(6, [&](int i) {
        ++done;
        if (i % 2 == job % 2) throw std::runtime_error("failed");
      });
      expect(false, "a failure is lost");
    } catch (const std::runtime_error&) {
    }
    expect(done == 6, "a failure stops other tasks");
  }
}

// Pauses in which helpers fall asleep.
void pauses() {
  for (int job = 0; job < 30; ++job) {
    usleep(job * 200);
    many(20);
  }
}

void rounding() {
#ifdef __SSE2__
  const unsigned before = _mm_getcsr(), wanted = before ^ 0x8040;  // flush to zero, denormals are zero
  _mm_setcsr(wanted);
  run(8, [&](int) { expect((_mm_getcsr() & 0x8040) == (wanted & 0x8040), "a helper rounds as it likes"); });
  _mm_setcsr(before);
  run(8, [&](int) { expect((_mm_getcsr() & 0x8040) == (before & 0x8040), "a helper rounds as the caller before"); });
#endif
}

// Threads of this process on all cores: helpers are late, and the team is asked.
void strangers() {
  std::atomic<bool> over{false};
  std::vector<std::thread> busy;
  for (unsigned i = 0; i < 2 * std::thread::hardware_concurrency(); ++i)
    busy.emplace_back([&] {
      while (!over) {
      }
    });
  const int before = teams;
  for (int job = 0; job < 2000 && teams == before; ++job) {
    std::atomic<long> sum{0};
    run(3, [&](int i) {
      for (volatile int work = 0; work < 100000; work = work + 1) {
      }
      sum += 1L << (8 * i);
    });
    expect(sum == 0x10101, "a task was left out, or done twice, beside strangers");
  }
  over = true;
  for (auto& thread : busy) thread.join();
#ifdef __linux__
  expect(teams > before, "the team is never asked");
#endif
  many(2000);
  failures();
  rounding();
}

// While another thread calls, too.
void forks() {
  std::thread other(many, 3000);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (!child) {
      many(200);
      std::_Exit(0);
    }
    many(50);
    int status = 1;
    expect(waitpid(child, &status, 0) == child && status == 0, "a child has no helpers");
  }
  other.join();
}

}  // namespace

int main(int count, char**) {
  many(20000);
  odd_numbers();
  callers_at_once();
  failures();
  pauses();
  rounding();
  strangers();
  if (count > 1) forks();  // ThreadSanitizer does not follow
  std::puts("all right");
}
