// Threads that help with a call, and for which nobody waits who has not come.
#pragma once

namespace glf {

// Most threads of a call.
inline constexpr int most_tasks = 256;

// Calls member(context, i) once for every i < members, each on its own thread where it can, the first on the caller's, and waits for
// all of them: a team of torch's threads.
using Team = void (*)(int members, void (*member)(void*, int), void* context);

// Calls task(context, i) once for every i < tasks: on the caller's thread, and on those helpers that come while tasks are left. Which
// thread does a task makes no difference to its result. The first exception of a task is thrown here; other tasks may then be
// left out. Of several threads that call at once, one has the helpers. Tasks must not call it themselves. `team` helps where
// the pool's own threads come too late; null: they are all there is.
void run_together(int tasks, void (*task)(void*, int), void* context, Team team = nullptr);

}  // namespace glf
