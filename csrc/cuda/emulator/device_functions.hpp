// What CUDA offers to device code, by its names: indices, barriers, shuffles, intrinsics.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/emulator/execution.hpp"
#include "cuda/emulator/half.hpp"
#include "cuda/emulator/vector_types.hpp"

#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

#define threadIdx (::fastconv::emulator::thread_index())
#define blockIdx (::fastconv::emulator::block_index())
#define blockDim (::fastconv::emulator::block_extent())
#define gridDim (::fastconv::emulator::grid_extent())
inline constexpr int warpSize = 32;

inline void __syncthreads(
    fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  fastconv::emulator::block_barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffff, fastconv::emulator::Location where =
                                                       fastconv::emulator::Location::current()) {
  fastconv::emulator::warp_meeting(mask, nullptr, nullptr, nullptr, true, where);
}

namespace fastconv::emulator {

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Location where) {
  struct Operand {
    T given, taken;
    int source;
  } mine{value, value, source_lane};
  warp_collective(
      mask, mine,
      [](Operand* const* operands) {
        for (int i = 0; i < 32; ++i)
          if (operands[i] != nullptr && operands[operands[i]->source] != nullptr)
            operands[i]->taken = operands[operands[i]->source]->given;
      },
      where);
  return mine.taken;
}

inline unsigned ballot(unsigned mask, bool predicate, Location where) {
  struct Operand {
    bool given;
    unsigned taken;
  } mine{predicate, 0};
  warp_collective(
      mask, mine,
      [](Operand* const* operands) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i)
          if (operands[i] != nullptr && operands[i]->given) votes |= 1u << i;
        for (int i = 0; i < 32; ++i)
          if (operands[i] != nullptr) operands[i]->taken = votes;
      },
      where);
  return mine.taken;
}

}  // namespace fastconv::emulator

// Lanes exchange within segments of `width`; one whose source lies outside keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  const int lane = fastconv::emulator::lane();
  return fastconv::emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)),
                                     where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  const int lane = fastconv::emulator::lane(), source = lane ^ lane_mask;
  const bool inside = source / width <= lane / width;
  return fastconv::emulator::shuffle(mask, value, inside ? source : lane, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  const int lane = fastconv::emulator::lane(), source = lane + int(delta);
  return fastconv::emulator::shuffle(mask, value, source / width == lane / width ? source : lane,
                                     where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  const int lane = fastconv::emulator::lane(), source = lane - int(delta);
  const bool inside = source >= 0 && source / width == lane / width;
  return fastconv::emulator::shuffle(mask, value, inside ? source : lane, where);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  return fastconv::emulator::ballot(mask, predicate != 0, where);
}

inline int __any_sync(
    unsigned mask, int predicate,
    fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  return fastconv::emulator::ballot(mask, predicate != 0, where) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate,
    fastconv::emulator::Location where = fastconv::emulator::Location::current()) {
  return fastconv::emulator::ballot(mask, predicate != 0, where) == mask;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(std::int64_t(a) * b >> 32); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(unsigned(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(unsigned(value)) + 1; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1 / value; }

// Byte i of the result is byte (selector >> 4 i & 7) of the eight of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

using std::max;
using std::min;
