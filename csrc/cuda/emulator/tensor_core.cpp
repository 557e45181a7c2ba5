#include "cuda/emulator/tensor_core.hpp"

#include <bit>
#include <cstring>

#include "cuda/emulator/half.hpp"
#include "cuda/emulator/memory_checker.hpp"
#include "cuda/emulator/state.hpp"

namespace fastconv::emulator {

namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

float element(MmaType type, std::uint32_t pair, int which) {
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * which));
  return type == MmaType::float16 ? float_of_half(bits) : float_of_bfloat16(bits);
}

float tf32_value(std::uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

struct Fragments {
  float* d;
  const std::uint32_t *a, *b;
};

// d of every lane += a * b, given all of A (16 x depth) and B (depth x 8).
void multiply(Fragments* const (&lanes)[32], const float (&a)[16][16], const float (&b)[16][8],
              int depth) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane]->d[i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] = sum;
    }
  }
}

void multiply_16_bit(MmaType type, Fragments* const (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = element(type, lanes[lane]->a[i], e);
      for (int i = 0; i < 2; ++i) b[2 * t + e + i * 8][g] = element(type, lanes[lane]->b[i], e);
    }
  }
  multiply(lanes, a, b, 16);
}

void multiply_tf32(Fragments* const (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32_value(lanes[lane]->a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = tf32_value(lanes[lane]->b[i]);
  }
  multiply(lanes, a, b, 8);
}

}  // namespace

void load_matrices(std::uint32_t (&registers)[4], const void* row, bool transpose, Location where) {
  {
    const InEmulator scope;
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
      report_fatal("misaligned access", "a row of ldmatrix at " + describe(where));
    }
    check_access(row, 16, false, where);
  }
  struct Lane {
    const void* row;
    std::uint32_t* registers;
  } mine{row, registers};
  warp_collective(
      kWholeWarp, mine,
      [transpose](Lane* const(&lanes)[32]) {
        std::uint16_t matrices[4][8][8];
        for (int lane = 0; lane < 32; ++lane) {
          std::memcpy(matrices[lane / 8][lane % 8], lanes[lane]->row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int j = 0; j < 4; ++j) {
            const auto& m = matrices[j];
            const std::uint32_t low = transpose ? m[2 * t][g] : m[g][2 * t];
            const std::uint32_t high = transpose ? m[2 * t + 1][g] : m[g][2 * t + 1];
            lanes[lane]->registers[j] = low | high << 16;
          }
        }
      },
      where);
}

void multiply_accumulate(MmaType type, float (&d)[4], const std::uint32_t (&a)[4],
                         const std::uint32_t (&b)[2], Location where) {
  Fragments mine{d, a, b};
  warp_collective(
      kWholeWarp, mine,
      [type](Fragments* const(&lanes)[32]) {
        if (type == MmaType::tf32) {
          multiply_tf32(lanes);
        } else {
          multiply_16_bit(type, lanes);
        }
      },
      where);
}

std::uint32_t round_to_tf32(std::uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) {
    return (bits & 0x7fffffu) ? 0x7fffffffu : bits;
  }
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace fastconv::emulator
