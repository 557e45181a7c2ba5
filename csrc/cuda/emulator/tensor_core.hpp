// Tensor cores on the emulator: a warp's lanes bring their registers and rows, the last to arrive
// computes for all. Fragments are the hardware's (mma.cuh has the table), so that a wrong lane or a
// wrong transposition gives wrong numbers here as it would there.
//
// Products of float16, bfloat16 and TF32 operands are exact in float32. They are added to the
// accumulator one after the other in the order of k, each sum rounded to float32; the hardware's
// order and rounding are not documented (it keeps more bits in places and truncates in others).
#pragma once

#include <cstdint>

#include "cuda/emulator/execution.hpp"

namespace fastconv::emulator {

enum class MmaType { float16, bfloat16, tf32 };

// The 4 matrices of a warp, 8 rows of 8 16-bit elements each; lane l names row l % 8 of matrix l / 8.
// Its register j holds elements 2t and 2t + 1 of row g of matrix j; transposed, of column g.
void load_matrices(std::uint32_t (&registers)[4], const void* row, bool transpose,
                   Location where = Location::current());

// d += a * b: m16n8k16, or m16n8k8 of TF32 (the lower 13 bits of its registers are ignored, as by
// the hardware).
void multiply_accumulate(MmaType type, float (&d)[4], const std::uint32_t (&a)[4],
                         const std::uint32_t (&b)[2], Location where = Location::current());

// cvt.rna.tf32.f32: 10 bits of mantissa, to nearest, ties away from zero; NaN and infinities stay.
std::uint32_t round_to_tf32(std::uint32_t bits);

}  // namespace fastconv::emulator
