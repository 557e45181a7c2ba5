// Tensor cores on the emulator: a warp's lanes bring their registers and rows, the last to arrive
// computes for all. Fragments are the hardware's (mma.cuh has the table), so that a wrong lane or a
// wrong transposition gives wrong numbers here as it would there.
//
// Products of float16, bfloat16 and TF32 operands are exact in float32. They are added to the
// accumulator one after the other in the order of k, each sum rounded to float32; the hardware's
// order and rounding are not documented (it keeps more bits in places and truncates in others).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cuda/emulator/execution.hpp"
#include "cuda/emulator/half.hpp"
#include "cuda/emulator/memory_checker.hpp"

namespace fastconv::emulator {

// cvt.rna.tf32.f32: 10 bits of mantissa, to nearest, ties away from zero; NaN and infinities stay.
inline std::uint32_t round_to_tf32(std::uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) {
    return (bits & 0x7fffffu) ? 0x7fffffffu : bits;
  }
  return (bits + 0x1000u) & 0xffffe000u;
}

constexpr unsigned kWholeWarp = 0xffffffffu;

// The 4 matrices of a warp, 8 rows of 8 16-bit elements each; lane l names row l % 8 of matrix l / 8.
// Its register j holds elements 2t and 2t + 1 of row g of matrix j; transposed, of column g.
template <bool kTranspose>
inline void load_matrices(std::uint32_t (&registers)[4], const void* row,
                          Location where = Location::current()) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    report_fatal("misaligned access", "a row of ldmatrix at " + describe(where));
  }
  check_access(row, 16, false, where);
  struct Lane {
    const void* row;
    std::uint32_t* registers;
  } mine{row, registers};
  warp_collective(
      kWholeWarp, mine,
      [](Lane* const(&lanes)[32]) {
        std::uint16_t matrices[4][8][8];
        for (int lane = 0; lane < 32; ++lane) {
          std::memcpy(matrices[lane / 8][lane % 8], lanes[lane]->row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int j = 0; j < 4; ++j) {
            const auto& m = matrices[j];
            const std::uint32_t low = kTranspose ? m[2 * t][g] : m[g][2 * t];
            const std::uint32_t high = kTranspose ? m[2 * t + 1][g] : m[g][2 * t + 1];
            lanes[lane]->registers[j] = low | high << 16;
          }
        }
      },
      where);
}

struct Fragments {
  float* d;
  const std::uint32_t *a, *b;
};

template <class T>
inline float element(std::uint32_t pair, int which) {
  T value;
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * which));
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

// d of every lane += a * b, given all of A (16 x K) and B (K x 8).
template <int K>
inline void multiply(Fragments* const (&lanes)[32], const float (&a)[16][K],
                     const float (&b)[K][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    float* d = lanes[lane]->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = d[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         Location where = Location::current()) {
  Fragments mine{d, a, b};
  warp_collective(
      kWholeWarp, mine,
      [](Fragments* const(&lanes)[32]) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i)
            for (int e = 0; e < 2; ++e)
              a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = element<T>(lanes[lane]->a[i], e);
          for (int i = 0; i < 2; ++i)
            for (int e = 0; e < 2; ++e) b[2 * t + e + i * 8][g] = element<T>(lanes[lane]->b[i], e);
        }
        multiply<16>(lanes, a, b);
      },
      where);
}

// The lower 13 bits of a TF32 register are ignored, as by the hardware.
inline float tf32_value(std::uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2], Location where = Location::current()) {
  Fragments mine{d, a, b};
  warp_collective(
      kWholeWarp, mine,
      [](Fragments* const(&lanes)[32]) {
        float a[16][8], b[8][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i)
            a[g + i % 2 * 8][t + i / 2 * 4] = tf32_value(lanes[lane]->a[i]);
          for (int i = 0; i < 2; ++i) b[t + i * 4][g] = tf32_value(lanes[lane]->b[i]);
        }
        multiply<8>(lanes, a, b);
      },
      where);
}

}  // namespace fastconv::emulator
