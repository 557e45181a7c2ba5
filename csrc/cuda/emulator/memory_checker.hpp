// The check build's detectors: kernels compiled with -fsanitize=thread call memory_checker.cpp at each
// access, where the shadow of each 4 bytes tells who touched them last.
//
// An access is ordered after another one of the same launch if both are of one block and either of
// one thread, or a block's barrier lies between, or both are of one warp with a __syncwarp between.
// Two accesses to a byte that are not, one of them a write, are a race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/emulator/execution.hpp"

namespace fastconv::emulator {

#if defined(FASTCONV_EMULATOR_CHECK)
void check_launch_start();
void check_barrier();  // all threads of the block have met
void check_block_end();
void check_launch_end();
// An access on behalf of the running thread by the emulator itself.
void check_access(const void* address, std::size_t bytes, bool write, Location where);
// The target of an asynchronous copy: not to be read before it is waited for.
void check_copy_started(void* address, std::size_t bytes, Location where);
void check_copy_finished(void* address, std::size_t bytes, Location where);
#else
inline void check_launch_start() {}
inline void check_barrier() {}
inline void check_block_end() {}
inline void check_launch_end() {}
inline void check_access(const void*, std::size_t, bool, Location) {}
inline void check_copy_started(void*, std::size_t, Location) {}
inline void check_copy_finished(void*, std::size_t, Location) {}
#endif

}  // namespace fastconv::emulator
