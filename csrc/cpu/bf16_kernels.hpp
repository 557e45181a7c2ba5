// Convolution of bfloat16 by units that multiply bfloat16: AVX512-BF16 (VDPBF16PS) and AMX (TDPBF16PS).
// Products of two bfloat16 are exact in float32, and so are sums of these what they are elsewhere; results
// are rounded once. Where no such unit is, operations.cpp brings the tensors to float32 instead.
//
// All units compute the same sums in the same blocks. Two of them run on any processor and are there to be
// compared with: none chooses them that does not name them.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/cpu_features.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {

// The tensors of one convolution, NHWC; a direction reads those that it needs.
struct Bf16Operands {
  const Bfloat16* x = nullptr;         // fprop, wgrad
  const Bfloat16* filter = nullptr;    // fprop, dgrad
  const Bfloat16* residual = nullptr;  // fprop, of y's shape; may be null
  const Bfloat16* dy = nullptr;        // dgrad, wgrad
  const Bfloat16* y = nullptr;         // dgrad, wgrad: dy counts where y > 0; null for everywhere
  Bfloat16* out = nullptr;             // y or dx
  // fprop: y = activation(conv(x, filter) * scale + bias + residual); K values each, may be null.
  const float* scale = nullptr;
  const float* bias = nullptr;
  float* dfilter = nullptr;  // wgrad; may be null
  float* dbias = nullptr;    // wgrad; may be null
};

struct Bf16Algorithm {
  const char* name;
  Isa isa;               // at least
  bool is_for_its_name;  // chosen only where it is named
  bool (*on_this_cpu)();
  bool (*serves)(const Conv2dProblem&, Direction);
  Estimate (*estimate)(const Conv2dProblem&, Direction);
  std::string (*blocking)(const Conv2dProblem&, Direction);
  void (*run)(const Conv2dProblem&, Direction, const Bf16Operands&);
};

extern const Bf16Algorithm kBf16Portable;       // any processor, and
extern const Bf16Algorithm kBf16EmulatedTiles;  // the instructions of AMX in C++
extern const Bf16Algorithm kBf16Dot;            // AVX512-BF16
extern const Bf16Algorithm kBf16Tiles;          // AMX

// Those that this processor runs on the current instruction set.
std::span<const Bf16Algorithm* const> bf16_algorithms();

// The one for this problem, null where float32's algorithms are to compute it: they take less time, or
// `name` is none of these. Throws InvalidArgument if `name` is one that does not serve the problem.
const Bf16Algorithm* choose_bf16(const Conv2dProblem& problem, Direction direction,
                                 const char* name = nullptr);

}  // namespace fastconv::cpu
