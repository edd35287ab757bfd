// Threads that help with a call, and for which nobody waits who has not come.
#pragma once

namespace glf {

// Most tasks of a call.
inline constexpr int most_tasks = 256;

// Calls task(context, i) once for every i < tasks: on the caller's thread, and on those helpers that come while tasks are left.
// Which thread does a task makes no difference to its result. What a task throws, is thrown here.
void run_together(int tasks, void (*task)(void*, int), void* context);

}  // namespace glf
