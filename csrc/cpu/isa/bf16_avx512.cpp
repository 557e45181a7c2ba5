// bfloat16 convolution on AVX-512 with BF16: VDPBF16PS adds two products to each float32 sum.
#include <immintrin.h>

#include "cpu/bf16_dot.hpp"

namespace fastconv::cpu {
namespace {

struct Bf16Avx512Dot {
  // AMD's processors take VDPBF16PS as often as a multiply-add of float32 (measured on a Zen 5), Intel's half
  // as often; an Emerald Rapids needs twice float32's time.
  static Bf16Costs costs() {
    if (__builtin_cpu_is("amd")) return {.product = 0.65, .wgrad_product = 0.75, .moved = 18};
    return {.product = 2, .wgrad_product = 2, .moved = 40};
  }
  using Sums = __m512;
  using Pairs = __m512i;
  static Sums zero() { return _mm512_setzero_ps(); }
  static Pairs load(const Bits* p) { return _mm512_loadu_si512(p); }
  static Pairs broadcast(const Bits* p) {
    std::int32_t pair = 0;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Sums dot(Sums sum, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
  static void store(float* p, Sums sum) { _mm512_storeu_ps(p, sum); }
};

}  // namespace

constinit const Bf16Algorithm kBf16Dot = bf16_algorithm<Bf16DotUnit<Bf16Avx512Dot>>(
    "bf16_dot", Isa::avx512, false, [] { return __builtin_cpu_supports("avx512bf16") != 0; });

}  // namespace fastconv::cpu
