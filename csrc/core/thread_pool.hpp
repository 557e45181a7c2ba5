// The process's one thread pool. Each thread, the caller among them, begins with a range of a call's tasks
// and then takes what others have left of theirs. What a task computes never depends on which thread runs it.
#pragma once

#include <cstdint>

#include "core/export.hpp"

namespace fastconv {

// Threads the next parallel_for may use, the caller included: FASTCONV_NUM_THREADS, else
// usable_cpus() of core/cpu_limits.hpp. set_num_threads throws InvalidArgument below 1 or
// above 1024; it may be called while other threads compute.
FASTCONV_API int num_threads();
FASTCONV_API void set_num_threads(int threads);
// Whether nobody has said how many: neither the variable nor a call of set_num_threads.
FASTCONV_API bool num_threads_is_default();

using TaskFunction = void (*)(void* context, std::int64_t task, int worker);

// Runs function(context, 0 .. tasks - 1, worker), each once, and returns when all are done. `worker`
// tells the threads of one call apart: 0 .. at most `most_workers` - 1, so that each can have scratch
// memory of its own. From inside a task, or while another thread's parallel_for has the workers, the
// tasks run on the caller alone: no deadlock, no more threads than num_threads(). Tasks run with
// denormals flushed to zero, on x86, and must not throw.
FASTCONV_API void parallel_for(std::int64_t tasks, int most_workers, TaskFunction function,
                               void* context);

template <class Body>
void parallel_for(std::int64_t tasks, const Body& body) {
  parallel_for(
      tasks, num_threads(),
      [](void* context, std::int64_t task, int) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

// Threads that a parallel_for of this many tasks may take: how much scratch memory to make ready.
inline int workers_for(std::int64_t tasks) {
  const int threads = num_threads();
  return tasks < threads ? static_cast<int>(tasks) : threads;
}

// As above with body(task, worker), on at most `most_workers` threads.
template <class Body>
void parallel_for(std::int64_t tasks, int most_workers, const Body& body) {
  parallel_for(
      tasks, most_workers,
      [](void* context, std::int64_t task, int worker) {
        (*static_cast<const Body*>(context))(task, worker);
      },
      const_cast<Body*>(&body));
}

}  // namespace fastconv
