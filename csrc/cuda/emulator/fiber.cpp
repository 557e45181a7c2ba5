#include "cuda/emulator/fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// fastconv_switch(save, to): keeps the registers that a call preserves on the stack, its address in
// *save, and goes on where `to` was kept. Floating-point control is left as it is: no kernel sets it.
extern "C" void fastconv_emulator_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl fastconv_emulator_switch
.hidden fastconv_emulator_switch
.type fastconv_emulator_switch,@function
fastconv_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastconv_emulator_switch, .-fastconv_emulator_switch
)");
// Registers, the address to return to, and a slot that keeps the stack aligned as behind a call.
static constexpr int kSavedWords = 8;
static constexpr int kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl fastconv_emulator_switch
.hidden fastconv_emulator_switch
.type fastconv_emulator_switch,@function
fastconv_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastconv_emulator_switch, .-fastconv_emulator_switch
)");
static constexpr int kSavedWords = 20;
static constexpr int kReturnWord = 11;
#else
#error "The emulator switches stacks on x86-64 and AArch64."
#endif

namespace fastconv::emulator {

#if defined(__SANITIZE_ADDRESS__)
const std::size_t Stacks::kSize = 256 << 10;
#else
const std::size_t Stacks::kSize = 60 << 10;
#endif

namespace {
// One fiber runs at a time, whichever system thread holds the emulator's lock.
void* scheduler_stack_pointer = nullptr;
Fiber* running = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
#endif
}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
  memory_ = nullptr;
}

void Stacks::reserve(std::size_t count) {
  if (count <= count_) return;
  release();
  count_ = 0;
  bytes_ = count * (kSize + kGuard);
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = memory;
  count_ = count;
  for (std::size_t i = 0; i < count; ++i) mprotect(low_end(i) - kGuard, kGuard, PROT_NONE);
}

char* Stacks::low_end(std::size_t index) const {
  return static_cast<char*>(memory_) + index * (kSize + kGuard) + kGuard;
}

void Fiber::prepare(char* stack_low_end, void (*function)(void*), void* context) {
  stack_ = stack_low_end;
  function_ = function;
  context_ = context;
  ended_ = false;
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, Stacks::kSize);
#endif
  void** frame = reinterpret_cast<void**>(stack_ + Stacks::kSize) - kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) frame[i] = nullptr;
  frame[kReturnWord] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = frame;
}

void Fiber::enter() {
  running = this;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, Stacks::kSize);
#endif
  fastconv_emulator_switch(&scheduler_stack_pointer, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ended_ ? nullptr : &fake_stack_, scheduler_stack,
                                 scheduler_stack_size);
#endif
  fastconv_emulator_switch(&stack_pointer_, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Fiber::start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  Fiber* self = running;
  self->function_(self->context_);
  self->ended_ = true;
  self->leave();
  std::abort();  // an ended fiber is never entered
}

}  // namespace fastconv::emulator
