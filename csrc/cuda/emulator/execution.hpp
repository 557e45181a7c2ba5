// Runs a kernel: its blocks one after another, the threads of a block as fibers that change places
// where they wait for one another. Kernels see it through device_functions.hpp.
//
// Environment, read at each launch:
//   FASTCONV_EMULATOR_ORDER  forward (default), reverse or random:SEED: the order of blocks, and in
//                            which the threads of a block run between two barriers
//   FASTCONV_EMULATOR_COPY   late (default): an asynchronous copy writes when it is waited for, and
//                            its target holds NaN until then; early: it writes at once. By a random
//                            order either may happen to each copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <tuple>

#include "cuda/emulator/vector_types.hpp"

namespace fastconv::emulator {

using Location = std::source_location;

// --- what a kernel calls ------------------------------------------------------------------------

// Constant in a thread, though not in the system thread below it.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_extent();
[[gnu::const]] dim3 grid_extent();
[[gnu::const]] int lane();

void block_barrier(Location where);

// The memory of a __shared__ variable, known by its identity. The same for all threads of a block;
// holds NaN when the block starts.
void* static_shared(const void* identity, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();

// An asynchronous copy of `bytes` (4, 8 or 16) of which the first `valid` are read, the rest zero.
void copy_async(void* shared, const void* global, int bytes, int valid, Location where);
void copy_async_commit();
void copy_async_wait(int pending);

// The threads of `mask` meet; the last to come calls combine(operands, context), operands[lane] of
// each lane in the mask being what that lane gave, null for the others. They go on with the memory
// accesses before it ordered before those after it if `orders_memory`.
void warp_meeting(unsigned mask, void* operand,
                  void (*combine)(void* const* operands, void* context), void* context,
                  bool orders_memory, Location where);

// The same for any type of operand: combine(Operand* const (&operands)[32]) reads what the lanes put
// into theirs and writes their results there. Shuffles, ldmatrix and mma are made of this.
template <class Operand, class Combine>
void warp_collective(unsigned mask, Operand& mine, Combine combine,
                     Location where = Location::current()) {
  warp_meeting(
      mask, &mine,
      [](void* const* operands, void* context) {
        Operand* typed[32];
        for (int i = 0; i < 32; ++i) typed[i] = static_cast<Operand*>(operands[i]);
        (*static_cast<Combine*>(context))(typed);
      },
      &combine, false, where);
}

// --- what a launch calls ------------------------------------------------------------------------

struct KernelCall {
  virtual ~KernelCall() = default;
  virtual void run() const = 0;
  const void* kernel = nullptr;
  std::size_t size = 0;  // of this object: kernels read their arguments from it
};

template <class... Parameters>
struct KernelCallOf final : KernelCall {
  template <class... Arguments>
  explicit KernelCallOf(void (*function)(Parameters...), const Arguments&... arguments)
      : function(function), arguments(static_cast<Parameters>(arguments)...) {
    kernel = reinterpret_cast<const void*>(function);
    size = sizeof(*this);
  }
  void run() const override { std::apply(function, arguments); }

  void (*function)(Parameters...);
  std::tuple<Parameters...> arguments;
};

struct LaunchShape {
  dim3 grid, block;
  std::size_t dynamic_shared_bytes = 0;
};

// Runs the whole grid. What the detectors find is in findings() afterwards.
void execute(const LaunchShape& shape, const KernelCall& call);

// --- what the detectors call --------------------------------------------------------------------

struct Finding {
  std::string kind;  // "race in shared memory", "divergent barrier", ...
  std::string text;
};

// Notes a finding; the launch goes on, and ends in an error. Repetitions are counted, not kept.
void report(const char* kind, const std::string& text);
// Notes a finding after which this launch cannot go on. From a kernel it does not return.
void report_fatal(const char* kind, const std::string& text);

bool has_findings();
std::string take_findings();  // in words; forgets them

std::string describe(Location where);  // file:line

}  // namespace fastconv::emulator
