#include "cuda/emulator/execution.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <set>

#include "cuda/emulator/device_properties.hpp"
#include "cuda/emulator/memory_checker.hpp"
#include "cuda/emulator/state.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace fastconv::emulator {

Execution& execution() {
  static Execution* const instance = new Execution;  // never destroyed: fibers may be left in it
  return *instance;
}

// --- findings -------------------------------------------------------------------------------------

namespace {

constexpr std::size_t kMostFindings = 12;
std::vector<Finding> findings;
std::set<std::string> finding_texts;
long finding_count = 0;

std::string in_words(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

}  // namespace

void report(const char* kind, const std::string& text) {
  ++finding_count;
  if (findings.size() >= kMostFindings || !finding_texts.insert(kind + text).second) return;
  Finding finding{kind, text};
  const Execution& e = execution();
  if (e.call != nullptr) {
    finding.text += "; block " + in_words(e.block);
    if (e.thread != nullptr) finding.text += ", thread " + in_words(e.thread->index);
  }
  findings.push_back(finding);
}

void report_fatal(const char* kind, const std::string& text) {
  report(kind, text);
  Execution& e = execution();
  e.abandoned = true;
  if (e.thread != nullptr) e.thread->fiber.leave();  // never entered again
}

bool has_findings() { return finding_count > 0; }

std::string take_findings() {
  std::string text;
  for (const Finding& finding : findings) text += "\n  " + finding.kind + ": " + finding.text;
  if (finding_count > long(findings.size()))
    text += "\n  " + std::to_string(finding_count) + " findings in all";
  findings.clear();
  finding_texts.clear();
  finding_count = 0;
  return text;
}

std::string describe(Location where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return std::string(name != nullptr ? name + 1 : where.file_name()) + ":" +
         std::to_string(where.line());
}

// --- shared memory --------------------------------------------------------------------------------

namespace {
constexpr std::size_t kSharedGap = 128;  // keeps banks as they are: 32 of 4 bytes
}

SharedMemory::SharedMemory() {
  void* memory = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  ASAN_POISON_MEMORY_REGION(base_, kArena);
}

void* SharedMemory::take(const void* identity, std::size_t bytes, std::size_t alignment) {
  alignment = std::max<std::size_t>(alignment, 128);
  const std::size_t offset = (used_ + alignment - 1) / alignment * alignment;
  if (offset + bytes + kSharedGap > kArena) {
    report_fatal("launch", "a block asks for more than " + std::to_string(kArena) +
                               " bytes of shared memory");
    return base_;
  }
  used_ = offset + bytes + kSharedGap;
  parts_.push_back({identity, offset, bytes});
  ASAN_UNPOISON_MEMORY_REGION(base_ + offset, bytes);
  std::memset(base_ + offset, 0xff, bytes);
  return base_ + offset;
}

void SharedMemory::start_block(std::size_t dynamic_bytes) {
  ASAN_POISON_MEMORY_REGION(base_, kArena);
  used_ = variable_bytes_ = 0;
  parts_.clear();
  take(nullptr, dynamic_bytes, 1);
}

void* SharedMemory::variable(const void* identity, std::size_t bytes, std::size_t alignment) {
  for (const Part& part : parts_)
    if (part.identity == identity) return base_ + part.offset;
  variable_bytes_ += bytes;
  if (variable_bytes_ > kMostStaticShared)
    report_fatal("launch", std::to_string(variable_bytes_) + " bytes of static shared memory; " +
                               std::to_string(kMostStaticShared) + " is the most");
  if (variable_bytes_ + parts_[0].bytes > device_properties().shared_memory_opt_in)
    report_fatal("launch", std::to_string(variable_bytes_ + parts_[0].bytes) +
                               " bytes of shared memory; the device has " +
                               std::to_string(device_properties().shared_memory_opt_in));
  return take(identity, bytes, alignment);
}

bool SharedMemory::addressable(std::uintptr_t address, std::size_t bytes) const {
  const std::size_t offset = address - begin();
  for (const Part& part : parts_)
    if (offset >= part.offset && offset + bytes <= part.offset + part.bytes) return true;
  return false;
}

void* static_shared(const void* identity, std::size_t bytes, std::size_t alignment) {
  const InEmulator scope;
  return execution().shared.variable(identity, bytes, alignment);
}

void* dynamic_shared() { return execution().shared.dynamic(); }

// --- threads --------------------------------------------------------------------------------------

uint3 thread_index() { return execution().thread->index; }
uint3 block_index() { return execution().block; }
dim3 block_extent() { return execution().shape.block; }
dim3 grid_extent() { return execution().shape.grid; }
int lane() { return execution().thread->lane; }

namespace {

// The running thread waits; the scheduler gives its place to others.
void wait(Thread& thread, Thread::State state, Location where) {
  thread.state = state;
  thread.where = where;
  thread.fiber.leave();
}

bool same_place(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

void block_barrier(Location where) {
  const InEmulator scope;
  Execution& e = execution();
  ++e.at_barrier;
  wait(*e.thread, Thread::State::at_barrier, where);
}

void warp_meeting(unsigned mask, void* operand, void (*combine)(void* const*, void*), void* context,
                  bool orders_memory, Location where) {
  const InEmulator scope;
  Execution& e = execution();
  Thread& self = *e.thread;
  Meeting& meeting = e.meetings[std::size_t(self.warp)];
  const unsigned bit = 1u << self.lane;
  if ((mask & bit) == 0) {
    report_fatal("warp mask", "lane " + std::to_string(self.lane) + " is not in its own mask at " +
                                  describe(where));
  }
  meeting.waiting |= bit;
  meeting.masks[self.lane] = mask;
  meeting.operands[self.lane] = operand;
  self.where = where;
  if ((meeting.waiting & mask) != mask) {
    wait(self, Thread::State::at_meeting, where);
    return;
  }
  void* operands[32]{};
  Thread* const warp = &e.threads[std::size_t(self.warp) * 32];
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (meeting.masks[i] != mask || !same_place(warp[i].where, where))
      report_fatal("divergent warp", "lanes meet at " + describe(where) + " and at " +
                                         describe(warp[i].where) + ", or with other masks");
    operands[i] = meeting.operands[i];
  }
  if (combine != nullptr) combine(operands, context);
  meeting.waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    warp[i].state = Thread::State::ready;
    if (orders_memory) ++warp[i].warp_barriers;
  }
}

// --- asynchronous copies --------------------------------------------------------------------------

namespace {

void write_copy(AsyncCopy& copy) {
  if (copy.written) return;
  copy.written = true;
  char bytes[16]{};
  std::memcpy(bytes, copy.from, std::size_t(copy.valid));
  std::memcpy(copy.to, bytes, std::size_t(copy.bytes));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, int valid, Location where) {
  const InEmulator scope;
  Execution& e = execution();
  const auto misaligned = [bytes](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % std::uintptr_t(bytes) != 0;
  };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || valid < 0 || valid > bytes)
    report_fatal("asynchronous copy", std::to_string(valid) + " of " + std::to_string(bytes) +
                                          " bytes at " + describe(where));
  if (misaligned(shared) || (valid > 0 && misaligned(global)))
    report_fatal("misaligned access",
                 "asynchronous copy of " + std::to_string(bytes) + " bytes at " + describe(where));
  if (!e.shared.in_arena(reinterpret_cast<std::uintptr_t>(shared)) ||
      !e.shared.addressable(reinterpret_cast<std::uintptr_t>(shared), std::size_t(bytes)))
    report_fatal("out of bounds",
                 "asynchronous copy to what is not shared memory at " + describe(where));
  if (valid > 0) check_access(global, std::size_t(valid), false, where);
#if defined(__SANITIZE_ADDRESS__)
  // The copy itself is made later, far from the line that asks for it.
  if (valid > 0 && __asan_region_is_poisoned(const_cast<void*>(global), std::size_t(valid)))
    report_fatal("out of bounds", "asynchronous copy from beyond a tensor at " + describe(where));
#endif
  check_copy_started(shared, std::size_t(bytes), where);
  AsyncCopy copy{shared, global, bytes, valid, e.thread->open_group, false, where};
  std::memset(shared, 0xff, std::size_t(bytes));
  if (e.order == Order::random ? e.random() % 2 == 0 : e.early_copies) write_copy(copy);
  e.thread->copies.push_back(copy);
}

void copy_async_commit() { ++execution().thread->open_group; }

void copy_async_wait(int pending) {
  const InEmulator scope;
  Thread& self = *execution().thread;
  const unsigned open = self.open_group;
  const unsigned first = open > unsigned(pending) ? open - unsigned(pending) : 0;
  std::erase_if(self.copies, [first](AsyncCopy& copy) {
    if (copy.group >= first) return false;
    write_copy(copy);
    check_copy_finished(copy.to, std::size_t(copy.bytes), copy.where);
    return true;
  });
}

// --- blocks ---------------------------------------------------------------------------------------

namespace {

void thread_main(void* context) {
  Execution& e = execution();
  Thread& self = *static_cast<Thread*>(context);
  e.in_kernel = true;
  e.call->run();
  e.in_kernel = false;
  if (!self.copies.empty())
    report("asynchronous copy", "a thread ends without having waited for its copy of " +
                                    describe(self.copies.front().where));
  self.state = Thread::State::ended;
  --e.live;
}

void release_barrier(Execution& e) {
  const Thread* first = nullptr;
  for (Thread& thread : e.threads) {
    if (thread.state != Thread::State::at_barrier) continue;
    if (first == nullptr) first = &thread;
    if (!same_place(first->where, thread.where)) {
      report_fatal("divergent barrier", "threads of a block wait at " + describe(first->where) +
                                            " and at " + describe(thread.where));
      return;
    }
  }
  if (e.live < int(e.threads.size()))
    report("divergent barrier", std::to_string(e.live) + " of " + std::to_string(e.threads.size()) +
                                    " threads wait at " + describe(first->where) +
                                    ", the others have ended");
  check_barrier();
  e.at_barrier = 0;
  for (Thread& thread : e.threads) {
    if (thread.state != Thread::State::at_barrier) continue;
    thread.state = Thread::State::ready;
    ++thread.barriers;
  }
}

void report_deadlock(Execution& e) {
  std::string text;
  for (const Thread& thread : e.threads) {
    if (thread.state == Thread::State::ended) continue;
    const std::string place = describe(thread.where);
    if (text.find(place) == std::string::npos) text += (text.empty() ? "" : " and ") + place;
  }
  const bool at_meeting = std::any_of(e.threads.begin(), e.threads.end(), [](const Thread& t) {
    return t.state == Thread::State::at_meeting;
  });
  report_fatal(at_meeting ? "divergent warp" : "divergent barrier",
               "deadlock: threads wait at " + text + ", and " +
                   std::to_string(int(e.threads.size()) - e.live) + " have ended");
}

void run_block(Execution& e, std::vector<int>& order) {
  e.live = int(e.threads.size());
  e.at_barrier = 0;
  ++e.block_serial;
  e.shared.start_block(e.shape.dynamic_shared_bytes);
  std::fill(e.meetings.begin(), e.meetings.end(), Meeting{});
  for (Thread& thread : e.threads) {
    thread.state = Thread::State::ready;
    thread.barriers = thread.warp_barriers = 0;
    thread.open_group = 0;
    thread.copies.clear();
    thread.fiber.prepare(e.stacks.low_end(std::size_t(thread.number)), &thread_main, &thread);
  }
  while (e.live > 0 && !e.abandoned) {
    bool moved = false;
    if (e.order == Order::random) std::shuffle(order.begin(), order.end(), e.random);
    for (const int i : order) {
      Thread& thread = e.threads[std::size_t(i)];
      if (thread.state != Thread::State::ready) continue;
      moved = true;
      e.thread = &thread;
      thread.fiber.enter();
      e.thread = nullptr;
      if (e.abandoned) return;
    }
    if (e.at_barrier > 0 && e.at_barrier == e.live)
      release_barrier(e);
    else if (!moved)
      report_deadlock(e);
  }
  check_block_end();
}

void read_environment(Execution& e) {
  const char* order = std::getenv("FASTCONV_EMULATOR_ORDER");
  e.order = Order::forward;
  if (order != nullptr && std::strcmp(order, "reverse") == 0) e.order = Order::reverse;
  if (order != nullptr && std::strncmp(order, "random", 6) == 0) {
    e.order = Order::random;
    e.random.seed(order[6] == ':' ? unsigned(std::atoi(order + 7)) : 1u);
  }
  const char* copy = std::getenv("FASTCONV_EMULATOR_COPY");
  e.early_copies = copy != nullptr && std::strcmp(copy, "early") == 0;
}

}  // namespace

void execute(const LaunchShape& shape, const KernelCall& call) {
  Execution& e = execution();
  const std::size_t threads = std::size_t(shape.block.x) * shape.block.y * shape.block.z;
  const std::size_t blocks = std::size_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  read_environment(e);
  e.stacks.reserve(threads);
  e.threads.resize(threads);
  e.meetings.resize((threads + 31) / 32);
  e.shape = shape;
  e.abandoned = false;
  for (std::size_t i = 0; i < threads; ++i) {
    Thread& thread = e.threads[i];
    thread.number = int(i);
    thread.warp = int(i / 32);
    thread.lane = int(i % 32);
    thread.index = {unsigned(i % shape.block.x), unsigned(i / shape.block.x % shape.block.y),
                    unsigned(i / shape.block.x / shape.block.y)};
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<std::uint32_t> block_order(blocks);
  std::iota(block_order.begin(), block_order.end(), 0u);
  if (e.order == Order::reverse) {
    std::reverse(order.begin(), order.end());
    std::reverse(block_order.begin(), block_order.end());
  } else if (e.order == Order::random) {
    std::shuffle(block_order.begin(), block_order.end(), e.random);
  }
  e.call = &call;
  e.first_block_serial = e.block_serial + 1;
  check_launch_start();
  for (const std::uint32_t i : block_order) {
    e.block = {i % shape.grid.x, i / shape.grid.x % shape.grid.y, i / shape.grid.x / shape.grid.y};
    run_block(e, order);
    if (e.abandoned) break;
  }
  check_launch_end();
  e.call = nullptr;
}

}  // namespace fastconv::emulator
