// Convolution of int8 for inference, with float32 at both ends, as core/operations.hpp describes
// conv2d_int8. Sums are of 32-bit integers, exact whatever computes them, so that every algorithm gives
// the same bits, on every instruction set.
#pragma once

#include <cstdint>
#include <span>

#include "core/cpu_features.hpp"
#include "core/problem.hpp"

namespace fastconv::cpu {

// NHWC.
struct Int8Operands {
  const float* x;
  const std::int8_t* filter;  // R, S, C/groups, K
  const float* filter_scale;  // K
  const float* bias;          // K, or null
  float* y;
};

struct Int8Algorithm {
  const char* name;
  bool (*on_this_cpu)();  // beyond what its instruction set is chosen by
  bool (*serves)(const Conv2dProblem&);
  void (*run)(const Conv2dProblem&, const Int8Operands&);
};

extern const Int8Algorithm kInt8Plain;       // any processor, any problem
extern const Int8Algorithm kInt8ScalarMadd;  // and those of an instruction set
extern const Int8Algorithm kInt8Avx2Madd;
extern const Int8Algorithm kInt8AvxVnni;
extern const Int8Algorithm kInt8Avx512Madd;
extern const Int8Algorithm kInt8Avx512Vnni;

// Those of an instruction set, the fastest first.
std::span<const Int8Algorithm* const> int8_algorithms(Isa isa);

// The first of the current instruction set's that serves the problem here; the named one if `name` is not
// null. Throws InvalidArgument if there is no such.
const Int8Algorithm& choose_int8(const Conv2dProblem& problem, const char* name);

}  // namespace fastconv::cpu
