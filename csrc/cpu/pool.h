// Threads that help with a call, and for which nobody waits who has not come.
#pragma once

namespace glf {

// Most threads of a call.
inline constexpr int most_tasks = 256;

// Calls task(context, i) once for every i < tasks: on the caller's thread, and on those helpers that come while
// tasks are left. Which thread does a task makes no difference to its result. The first exception of a task is thrown here; other
// tasks may then be left out. Of several threads that call at once, one has the helpers. Tasks must not call it themselves.
void run_together(int tasks, void (*task)(void*, int), void* context);

}  // namespace glf
