// The launch that is running, as the parts of the emulator see it. Kernels do not include this.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "cuda/emulator/execution.hpp"
#include "cuda/emulator/fiber.hpp"

namespace fastconv::emulator {

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, valid;
  unsigned group;
  bool written;
  Location where;
};

struct Thread {
  enum class State : std::uint8_t { ready, at_barrier, at_meeting, ended };
  Fiber fiber;
  uint3 index{};
  int number = 0, warp = 0, lane = 0;
  State state = State::ready;
  Location where;  // of the barrier or meeting it waits at
  // Accesses of one thread before and after a barrier (of the block, of the warp) differ in these.
  std::uint16_t barriers = 0, warp_barriers = 0;
  unsigned open_group = 0, first_pending_group = 0;
  std::vector<AsyncCopy> copies;
};

// The lanes of a warp that wait for others, with what each gave.
struct Meeting {
  unsigned waiting = 0;
  unsigned masks[32]{};
  void* operands[32]{};
};

enum class Order : std::uint8_t { forward, reverse, random };

// Shared memory of the running block: the dynamic part first, then the variables in the order in
// which the block reached them, each behind a gap that nobody may touch.
class SharedMemory {
 public:
  SharedMemory();
  void start_block(std::size_t dynamic_bytes);
  void* dynamic() const { return base_; }
  void* variable(const void* identity, std::size_t bytes, std::size_t alignment);
  bool in_arena(std::uintptr_t address) const { return address - begin() < kArena; }
  bool addressable(std::uintptr_t address, std::size_t bytes) const;
  std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(base_); }
  static constexpr std::size_t kArena = 512 << 10;

 private:
  struct Part {
    const void* identity;
    std::size_t offset, bytes;
  };
  void* take(const void* identity, std::size_t bytes, std::size_t alignment);
  char* base_ = nullptr;
  std::size_t used_ = 0;            // gaps included
  std::size_t variable_bytes_ = 0;  // gaps left out
  std::vector<Part> parts_;
};

struct Execution {
  const KernelCall* call = nullptr;
  LaunchShape shape;
  Order order = Order::forward;
  bool early_copies = false;
  std::mt19937 random;
  std::uint32_t block_serial = 0;        // counts all blocks of the process
  std::uint32_t first_block_serial = 1;  // of this launch
  uint3 block{};
  Thread* thread = nullptr;  // the running one; null in the scheduler
  bool in_kernel = false;    // the running thread is in its kernel's code, not in the emulator's
  std::vector<Thread> threads;
  std::vector<Meeting> meetings;  // by warp
  int live = 0, at_barrier = 0;
  bool abandoned = false;  // by report_fatal
  SharedMemory shared;
  Stacks stacks;
};

Execution& execution();

// The emulator's code from here to the end of the scope, on behalf of the running thread.
class InEmulator {
 public:
  InEmulator() { execution().in_kernel = false; }
  ~InEmulator() { execution().in_kernel = true; }
  InEmulator(const InEmulator&) = delete;
  InEmulator& operator=(const InEmulator&) = delete;
};

}  // namespace fastconv::emulator
