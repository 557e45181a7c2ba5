// The process's one thread pool. A call's tasks are handed out in order from a shared counter; the
// caller works too. What a task computes never depends on which thread runs it.
#pragma once

#include <cstdint>

#include "core/export.hpp"

namespace fastconv {

// Threads the next parallel_for may use, the caller included: FASTCONV_NUM_THREADS, else the
// processors in this process's affinity mask. set_num_threads throws InvalidArgument below 1 or
// above 1024; it may be called while other threads compute.
FASTCONV_API int num_threads();
FASTCONV_API void set_num_threads(int threads);

using TaskFunction = void (*)(void* context, std::int64_t task);

// Runs function(context, 0 .. tasks - 1), each once, and returns when all are done. From inside a
// task, or while another thread's parallel_for has the workers, the tasks run on the caller alone:
// no deadlock, no more threads than num_threads(). Tasks run with denormals flushed to zero and
// must not throw.
FASTCONV_API void parallel_for(std::int64_t tasks, TaskFunction function, void* context);

template <class Body>
void parallel_for(std::int64_t tasks, const Body& body) {
  parallel_for(
      tasks,
      [](void* context, std::int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

}  // namespace fastconv
