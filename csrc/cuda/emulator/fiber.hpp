// A flow of control with a stack of its own, entered and left by hand: one stands for each thread of
// a block. Switching costs a few nanoseconds; only one fiber of the process runs at a time.
#pragma once

#include <cstddef>

namespace fastconv::emulator {

// The memory of many stacks, each with a guard page below: an overflow is a fault, not a mystery.
class Stacks {
 public:
  ~Stacks();
  void reserve(std::size_t count);  // throws std::bad_alloc
  char* low_end(std::size_t index) const;
  bool contains(const void* address) const {
    return address >= memory_ && address < static_cast<const char*>(memory_) + bytes_;
  }
  static constexpr std::size_t kGuard = 4096;
  static const std::size_t kSize;  // of one stack, its guard page left out

 private:
  void release();
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t count_ = 0;
};

class Fiber {
 public:
  // The next enter() calls function(context) on the stack. What ran on it before is forgotten.
  void prepare(char* stack_low_end, void (*function)(void*), void* context);
  void enter();  // from the scheduler; returns at the fiber's next leave(), or when it has ended
  void leave();  // from the fiber

 private:
  static void start();
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  void (*function_)(void*) = nullptr;
  void* context_ = nullptr;
  bool ended_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace fastconv::emulator
