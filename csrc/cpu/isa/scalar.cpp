// The scalar instances: one float a vector. Runs everywhere; what the compiler makes of it.
#include <bit>

#include "cpu/activation.hpp"
#include "cpu/batch_norm.hpp"
#include "cpu/convert.hpp"
#include "cpu/depthwise.hpp"
#include "cpu/direct.hpp"
#include "cpu/grouped.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pool.hpp"
#include "cpu/pool_gradient.hpp"
#include "cpu/small_channel.hpp"
#include "cpu/winograd.hpp"
#include "cpu/winograd_rows.hpp"
#include "cpu/winograd_strided.hpp"

namespace fastconv::cpu {
namespace {

struct Scalar {
  static constexpr int kWidth = 1, kRegisters = 16, kRows = 4, kVectors = 2;
  static constexpr int kGemmRows[] = {0, 4, 4};  // of a register tile, by its vectors
  static constexpr int kPanelVectors = 2;        // of most panels of a filter
  static constexpr bool kFreeMasks = true;
  static constexpr int kProductsAtOnce = 1;  // in a loop of register tiles
  using Reg = float;
  using Int = std::int32_t;
  using Mask = bool;
  struct Tail {};
  static Tail tail(int) { return {}; }
  static Reg zero() { return 0; }
  static Reg load(const float* p) { return *p; }
  static Reg load(const float* p, Tail) { return *p; }
  static void store(float* p, Reg v) { *p = v; }
  static void stream(float* p, Reg v) { *p = v; }
  static void drain() {}
  static void store(float* p, Reg v, Tail) { *p = v; }
  template <class... Tails>
  static Reg load(const Float16* p, Tails...) {
    return from_float16(p->bits);
  }
  template <class... Tails>
  static Reg load(const Bfloat16* p, Tails...) {
    return std::bit_cast<float>(std::uint32_t{p->bits} << 16);
  }
  template <class... Tails>
  static void store(Float16* p, Reg v, Tails...) {
    p->bits = rounded_to_float16(std::bit_cast<std::uint32_t>(v));
  }
  template <class... Tails>
  static void store(Bfloat16* p, Reg v, Tails...) {
    p->bits = rounded_to_bfloat16(std::bit_cast<std::uint32_t>(v));
  }
  static float from_float16(std::uint32_t half) {
    const std::uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31;
    std::uint32_t mantissa = half & 0x3FF;
    if (exponent == 31) {  // infinity or NaN, which becomes a quiet one
      return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    }
    if (exponent > 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    if (mantissa == 0) return std::bit_cast<float>(sign);
    const auto shift = static_cast<std::uint32_t>(std::countl_zero(mantissa)) - 21;
    mantissa = mantissa << shift & 0x3FF;
    return std::bit_cast<float>(sign | (113 - shift) << 23 | mantissa << 13);
  }
  static std::uint16_t rounded_to_float16(std::uint32_t all) {
    const std::uint32_t sign = all >> 16 & 0x8000, magnitude = all & 0x7FFFFFFF;
    std::uint32_t half = 0;
    if (magnitude > 0x7F800000) {  // NaN
      half = 0x7E00 | (magnitude >> 13 & 0x3FF);
    } else if (magnitude >= 0x47800000) {  // 2^16 and above
      half = 0x7C00;
    } else if (magnitude >=
               0x38800000) {  // 2^-14: a carry counts the exponent up, to infinity at last
      half = (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    } else if (magnitude > 0x33000000) {  // 2^-25, which is a tie with 0
      const std::uint32_t shift = 126 - (magnitude >> 23);
      const std::uint32_t mantissa = (magnitude & 0x7FFFFF) | 0x800000;
      half = mantissa >> shift;
      const std::uint32_t rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
      if (rest > tie || (rest == tie && half % 2 == 1)) ++half;
    }
    return static_cast<std::uint16_t>(sign | half);
  }
  static std::uint16_t rounded_to_bfloat16(std::uint32_t all) {
    const std::uint32_t high = all >> 16;
    // A NaN might round to infinity.
    const bool is_nan = (all & 0x7FFFFFFF) > 0x7F800000;
    return static_cast<std::uint16_t>(is_nan ? high | 0x40 : (all + 0x7FFF + (high & 1)) >> 16);
  }
  static Reg broadcast(const float* p) { return *p; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg held(Reg v) { return v; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg set(float v) { return v; }
  static Reg subtract(Reg a, Reg b) { return a - b; }
  static Reg multiply(Reg a, Reg b) { return a * b; }
  static Reg divide(Reg a, Reg b) { return a / b; }
  // b where one is NaN or they are equal.
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Mask unordered(Reg a, Reg b) { return a != a || b != b; }
  static Mask mask_or(Mask a, Mask b) { return a || b; }
  static Reg relu(Reg v) { return v < 0 ? 0 : v; }
  static void transpose(Reg (&)[1]) {}
  static float sum(Reg v) { return v; }
  static bool any_nonzero(Reg v) { return v != 0; }
  static Reg where_positive(Reg y, Reg v) { return y > 0 ? v : 0; }
  static Mask greater_or_first_nan(Reg a, Reg best) { return a > best || (a != a && best == best); }
  static Reg select(Mask m, Reg a, Reg b) { return m ? a : b; }
  static Int int_add(Int a, Int b) { return a + b; }
  // 2^n, n from -126 to 128 (infinity), where v is 1.5 * 2^23 + n.
  static Reg power_of_two(Reg v) {
    return std::bit_cast<Reg>((std::bit_cast<std::uint32_t>(v) + 127) << 23);
  }
  static Reg bits(Int v) { return std::bit_cast<Reg>(v); }
  static Int int_bits(Reg v) { return std::bit_cast<Int>(v); }
  static Int int_broadcast(int v) { return v; }
  static Int int_select(Mask m, Int a, Int b) { return m ? a : b; }
  static Mask int_equal(Int a, Int b) { return a == b; }
  template <class Index>
  static Int load_index(const Index* p) {
    return *p;
  }
  template <class Index>
  static void store_index(Index* p, Int v) {
    *p = static_cast<Index>(v);
  }
  template <class Index>
  static Int load_index(const Index* p, Tail) {
    return *p;
  }
  template <class Index>
  static void store_index(Index* p, Int v, Tail) {
    *p = static_cast<Index>(v);
  }
};

constexpr const Conv2dAlgorithm* kConv2dAlgorithms[] = {
    &SmallChannel<Scalar>::kAlgorithm,    &Depthwise<Scalar>::kAlgorithm,
    &Grouped<Scalar>::kAlgorithm,         &Direct<Scalar>::kAlgorithm,
    &Winograd<Scalar, 2>::kAlgorithm,     &Winograd<Scalar, 4>::kAlgorithm,
    &Winograd<Scalar, 3>::kAlgorithm,     &Winograd<Scalar, 5>::kAlgorithm,
    &WinogradStrided<Scalar>::kAlgorithm, &WinogradRows<Scalar>::kAlgorithm,
};

}  // namespace

const Kernels kScalarKernels = {
    .conv2d = kConv2dAlgorithms,
    .pool_gradient = PoolGradient<Scalar>::kKernel,
    .activation_grad = activation_grad<Scalar>,
    .add_and_activate = add_and_activate<Scalar>,
    .widen = widen<Scalar>,
    .narrow = narrow<Scalar>,
    .transpose_in = transpose_in<Scalar>,
    .transpose_out = transpose_out<Scalar>,
    .transpose_bytes = transpose<Scalar, std::uint8_t, std::uint8_t>,
    .max_pool2d_fprop = max_pool2d_fprop<Scalar>,
    .max_pool2d_bprop = max_pool2d_bprop<Scalar>,
    .avg_pool2d_fprop = avg_pool2d_fprop<Scalar>,
    .avg_pool2d_bprop = avg_pool2d_bprop<Scalar>,
    .batch_norm_moments = batch_norm_moments<Scalar>,
    .batch_norm_fprop = batch_norm_fprop<Scalar>,
    .batch_norm_bprop = batch_norm_bprop<Scalar>,
};

}  // namespace fastconv::cpu
