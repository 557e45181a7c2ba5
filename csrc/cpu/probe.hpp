// What the machine can do, measured: the limits that benchmarks are held against.
#pragma once

#include <cstdint>

#include "core/export.hpp"

namespace fastconv::probe {

// The most float32 operations a second (a fused multiply-add counts as two) that num_threads()
// threads reach on the instruction set in use, with operands in registers: the best of a few runs
// within about `seconds`. Where the instruction set has no fused multiply-add, multiplications and
// additions are counted.
FASTCONV_API double flops(double seconds);

enum class Stream : std::uint8_t { read, write, copy };

// Bytes a second, the best of a few passes within about `seconds` over `bytes` of memory; a copy
// counts the bytes it reads and those it writes. Writes are ordinary stores, as kernels use them.
// Throws std::bad_alloc.
FASTCONV_API double bandwidth(Stream stream, std::int64_t bytes, double seconds);

}  // namespace fastconv::probe
