// Stores past the caches, for outputs that no cache keeps until something reads them. Before an ordinary
// store its line is read: where as much is written as read, a third of what memory moves.
//
// A line has to be written whole and at once, else it goes to memory in pieces. So kernels stream that write
// pixels one after the other, all channels of each.
#pragma once

#include <type_traits>

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// Whether pixels of so many channels are whole lines.
inline bool whole_lines(const float* out, int64_t channels) {
  return channels % kLine == 0 &&
         reinterpret_cast<std::uintptr_t>(out) % (kLine * sizeof(float)) == 0;
}

// Whether to stream such pixels, of tensors that, all together, are more than the 32 MiB of most third-level
// caches. V::drain() has to come before other threads' loads.
inline bool streams_pixels(const float* out, int64_t channels, int64_t floats_of_all) {
  constexpr int64_t kFloats = int64_t{8} << 20;
  return floats_of_all > kFloats && whole_lines(out, channels);
}

// Calls body(flag), for which the compiler makes code of its own: a loop that might stream, or ask for lines,
// is slower even where it does not.
template <class Body>
inline __attribute__((always_inline)) void as_constant(bool flag, const Body& body) {
  if (flag) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace
}  // namespace fastconv::cpu
