#include "core/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/cpu_limits.hpp"
#include "core/environment.hpp"
#include "core/error.hpp"

namespace fastconv {
namespace {

using std::int64_t;

constexpr int kMostThreads = 1024;

// Flushes denormals while alive, on x86: they are noise in a network and 100 times slower on some CPUs.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFtz | kDaz); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFtz = 0x8000, kDaz = 0x0040;
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for as long as the gap between two ops of a graph lasts, by the clock: how long a pause takes
// differs by a factor of five between processors. Returns whether it came true.
template <class Condition>
bool spin_until(const Condition& holds) {
  if (holds()) return true;
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kTime{100};
  constexpr int kPausesALook = 32;
  const Clock::time_point end = Clock::now() + kTime;
  do {
    for (int i = 0; i < kPausesALook; ++i) {
      relax();
      if (holds()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

// One parallel_for. Lives on the caller's stack; a worker holds it only between taking a ticket and
// being counted in `left_`.
//
// Each thread begins with a range of tasks of its own, and goes on with what others have left of theirs.
// So a thread mostly gets the same tasks when the same layer, or the next one of like shape, comes again,
// and finds their data in its core's caches.
struct Job {
  static constexpr int kMostRanges = 16;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  TaskFunction function;
  void* context;
  int count;  // of the ranges
  std::atomic<int> workers{0};
  std::array<Range, kMostRanges> ranges;

  Job(TaskFunction function, void* context, int64_t tasks, int64_t threads)
      : function(function), context(context),
        count(static_cast<int>(std::clamp<int64_t>(threads, 1, kMostRanges))) {
    for (int i = 0; i < count; ++i) {
      ranges[i].next.store(tasks / count * i + std::min<int64_t>(tasks % count, i),
                           std::memory_order_relaxed);
      if (i > 0) ranges[i - 1].end = ranges[i].next.load(std::memory_order_relaxed);
    }
    ranges[count - 1].end = tasks;
  }

  // Works until no task is left, or until go_on() says no after a task. `home` tells threads apart.
  template <class GoOn>
  void work(int home, const GoOn& go_on) {
    const FlushDenormals flush;
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (int i = 0; i < count; ++i) {
      Range& range = ranges[(home + i) % count];
      for (int64_t task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
        function(context, task, worker);
        if (!go_on()) return;
      }
    }
  }
  void work() {
    work(0, [] { return true; });
  }
};

// True on a worker, and on a caller while it works: a nested parallel_for runs inline.
thread_local bool t_inside_task = false;

class Pool {
 public:
  // Hands `job` to at most `helpers` workers, works on it too, and returns when all have left it.
  // One caller at a time: the one that holds `busy`.
  void run(Job& job, int helpers) {
    ensure_workers(helpers);
    const int wanted = std::min<int>(helpers, static_cast<int>(workers_));
    job_ = &job;
    tickets_.store(wanted, std::memory_order_release);  // publishes job_
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst) > 0) {
      keep_off_callers_cpu();
      epoch_.notify_all();
    }
    job.work();
    // Nobody may join from here on; those who did must leave before the job's stack frame goes.
    const int joined = wanted - tickets_.exchange(0, std::memory_order_acq_rel);
    const auto all_left = [&] { return left_.load(std::memory_order_acquire) >= joined; };
    if (!spin_until(all_left)) {
      while (!all_left()) std::this_thread::yield();
    }
    left_.store(0, std::memory_order_relaxed);
  }

  std::mutex busy;
  // Threads at work in any job, callers that got no workers included.
  alignas(64) std::atomic<int> active{0};

 private:
  void ensure_workers(int wanted) {
    while (static_cast<int>(workers_) < wanted) {
      // A thread that cannot be had is not missed: the caller does its share.
      try {
        handles_.reserve(workers_ + 1);  // nothing may throw while `worker` is not detached
        std::thread worker([this, epoch = epoch_.load(), home = static_cast<int>(workers_) + 1] {
          serve(epoch, home);
        });
        handles_.push_back(worker.native_handle());
        worker.detach();
        avoided_cpu_ = -1;  // not told to the new one yet
      } catch (const std::system_error&) {
        return;
      } catch (const std::bad_alloc&) {
        return;
      }
      ++workers_;
    }
  }

  // Linux likes to wake a thread on its waker's CPU, and there it would wait behind the caller
  // until the next tick: longer than most calls last. With many CPUs it finds an idle one itself.
  void keep_off_callers_cpu() {
#if defined(__linux__)
    constexpr std::size_t kFewWorkers = 8;
    const int cpu = sched_getcpu();
    if (handles_.size() > kFewWorkers || cpu < 0 || cpu == avoided_cpu_) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return;
    CPU_CLR(cpu, &set);
    // A caller that is bound to a few CPUs does not crowd the workers on the rest of these.
    if (CPU_COUNT(&set) < std::max(1, num_threads() - 1)) return;
    for (const auto handle : handles_) pthread_setaffinity_np(handle, sizeof set, &set);
    avoided_cpu_ = cpu;
#endif
  }

  void serve(std::uint32_t seen, int home) {
    t_inside_task = true;
    for (;;) {
      seen = wait_for_epoch_after(seen);
      // A ticket admits one worker to the job of the current epoch.
      int tickets = tickets_.load(std::memory_order_acquire);
      while (tickets > 0 &&
             !tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel)) {
      }
      if (tickets <= 0) continue;
      active.fetch_add(1, std::memory_order_relaxed);
      // When other callers come, a worker makes room: its job's caller goes on without it.
      job_->work(home, [this] { return active.load(std::memory_order_relaxed) <= num_threads(); });
      active.fetch_sub(1, std::memory_order_relaxed);
      left_.fetch_add(1, std::memory_order_release);
    }
  }

  std::uint32_t wait_for_epoch_after(std::uint32_t seen) {
    std::uint32_t now = seen;
    if (spin_until([&] { return (now = epoch_.load(std::memory_order_acquire)) != seen; })) {
      return now;
    }
    parked_.fetch_add(1, std::memory_order_seq_cst);
    while ((now = epoch_.load(std::memory_order_seq_cst)) == seen) epoch_.wait(seen);
    parked_.fetch_sub(1, std::memory_order_relaxed);
    return now;
  }

  Job* job_ = nullptr;
  std::size_t workers_ = 0;
  std::vector<std::thread::native_handle_type> handles_;
  int avoided_cpu_ = -1;
  // Each on its own cache line: workers poll epoch_ while others take tickets.
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> tickets_{0};
  alignas(64) std::atomic<int> left_{0};
  alignas(64) std::atomic<int> parked_{0};
};

// Leaked on purpose: detached workers use it until the process ends.
std::atomic<Pool*> g_pool{nullptr};

// Only the forking thread lives on in the child; its pool has no workers and perhaps a locked
// mutex. The child starts afresh (the parent's pool object is leaked there, a few cache lines).
void forget_pool_after_fork() { g_pool.store(nullptr, std::memory_order_release); }

// When the library is loaded: a fork during the first call would find a half-done registration.
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);

// Null where there is no memory for one.
Pool* pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current) return current;
  Pool* fresh = new (std::nothrow) Pool;
  if (g_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return current;
}

int checked_thread_count(long long threads, const char* name, const std::string& received) {
  if (threads < 1 || threads > kMostThreads) {
    throw InvalidArgument(std::string(name) + " must be an integer from 1 to " +
                          std::to_string(kMostThreads) + ". Received: " + name + "=" + received);
  }
  return static_cast<int>(threads);
}

int initial_num_threads() {
  const std::string text = from_environment("FASTCONV_NUM_THREADS");
  if (text.empty()) return std::min(usable_cpus(), kMostThreads);
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  return checked_thread_count(*end ? 0 : value, "FASTCONV_NUM_THREADS", text);
}

std::atomic<int> g_num_threads{0};  // 0: not read yet
std::atomic<bool> g_threads_set{false};

}  // namespace

int num_threads() {
  int threads = g_num_threads.load(std::memory_order_relaxed);
  if (threads == 0) {
    threads = initial_num_threads();
    int unread = 0;
    if (!g_num_threads.compare_exchange_strong(unread, threads)) threads = unread;
  }
  return threads;
}

void set_num_threads(int threads) {
  g_num_threads.store(checked_thread_count(threads, "num_threads", std::to_string(threads)),
                      std::memory_order_relaxed);
  g_threads_set.store(true, std::memory_order_relaxed);
}

bool num_threads_is_default() {
  return from_environment("FASTCONV_NUM_THREADS").empty() &&
         !g_threads_set.load(std::memory_order_relaxed);
}

void parallel_for(int64_t tasks, int most_workers, TaskFunction function, void* context) {
  const int threads = std::min(num_threads(), most_workers);
  Pool* const workers = t_inside_task || tasks <= 1 || threads <= 1 ? nullptr : pool();
  if (!workers) {
    Job(function, context, tasks, 1).work();
    return;
  }
  t_inside_task = true;
  const int others = workers->active.fetch_add(1, std::memory_order_relaxed);
  const int64_t helpers = std::min<int64_t>(threads - others, tasks) - 1;
  Job job(function, context, tasks, helpers + 1);
  if (helpers > 0 && workers->busy.try_lock()) {
    workers->run(job, static_cast<int>(helpers));
    workers->busy.unlock();
  } else {
    job.work();
  }
  workers->active.fetch_sub(1, std::memory_order_relaxed);
  t_inside_task = false;
}

}  // namespace fastconv
