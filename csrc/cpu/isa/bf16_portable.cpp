// bfloat16 convolution on any processor: what the units of AVX512-BF16 and AMX are compared with. As long as
// it takes, nothing chooses it that does not name it.
#include "cpu/bf16_dot.hpp"
#include "cpu/bf16_tiles.hpp"

namespace fastconv::cpu {
namespace {

struct Bf16PortableDot {
  struct Sums {
    float lanes[kBf16Width];
  };
  struct Pairs {
    Bits bits[2 * kBf16Width];
  };
  static Sums zero() { return {}; }
  static Pairs load(const Bits* p) {
    Pairs out;
    std::copy_n(p, 2 * kBf16Width, out.bits);
    return out;
  }
  static Pairs broadcast(const Bits* p) {
    Pairs out;
    for (int64_t i = 0; i < 2 * kBf16Width; ++i) out.bits[i] = p[i % 2];
    return out;
  }
  static Sums dot(Sums sum, const Pairs& a, const Pairs& b) {
    for (int64_t i = 0; i < kBf16Width; ++i) {
      for (int64_t j = 2 * i; j < 2 * i + 2; ++j) {
        sum.lanes[i] += bf16_to_float(a.bits[j]) * bf16_to_float(b.bits[j]);
      }
    }
    return sum;
  }
  static void store(float* p, const Sums& sum) { std::copy_n(sum.lanes, kBf16Width, p); }
};

}  // namespace

constinit const Bf16Algorithm kBf16Portable = bf16_algorithm<Bf16DotUnit<Bf16PortableDot>>(
    "bf16_portable", Isa::scalar, true, [] { return true; });
constinit const Bf16Algorithm kBf16EmulatedTiles = bf16_algorithm<Bf16TileUnit<EmulatedTiles>>(
    "bf16_emulated_tiles", Isa::scalar, true, [] { return true; });

}  // namespace fastconv::cpu
