// Work split over threads: on the OpenMP runtime that the process has loaded, so that two pools never compete for the
// cores (torch's and ours would), else on threads started for the call.
#pragma once

#include <cstdint>

namespace fastalign {

// Calls task(context, i) once for every i in 0 ... count - 1, on at most `threads` threads, the caller's among them;
// returns when all are done. Which thread runs an i is left open, so a task must not let its result depend on it.
void parallel_for(int64_t count, int threads, void (*task)(void *context, int64_t i), void *context) noexcept;

template <class Task>
void parallel_for(int64_t count, int threads, const Task &task) noexcept {
    void *context = const_cast<Task *>(&task);
    parallel_for(count, threads, [](void *given, int64_t i) { (*static_cast<const Task *>(given))(i); }, context);
}

// "openmp" or "threads".
const char *threading() noexcept;

}  // namespace fastalign
