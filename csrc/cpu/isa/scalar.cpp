// The scalar instances: one float a vector. Runs everywhere; what the compiler makes of it.
#include <bit>

#include "cpu/batch_norm.hpp"
#include "cpu/depthwise.hpp"
#include "cpu/direct.hpp"
#include "cpu/grouped.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pool.hpp"
#include "cpu/small_channel.hpp"
#include "cpu/transpose.hpp"
#include "cpu/winograd.hpp"

namespace fastconv::cpu {
namespace {

struct Scalar {
  static constexpr int kWidth = 1, kRegisters = 16, kRows = 4, kVectors = 2;
  static constexpr int kGemmRows[] = {0, 4, 4};  // of a register tile, by its vectors
  static constexpr bool kFreeMasks = true;
  using Reg = float;
  using Int = std::int32_t;
  using Mask = bool;
  struct Tail {};
  static Tail tail(int) { return {}; }
  static Reg zero() { return 0; }
  static Reg load(const float* p) { return *p; }
  static Reg load(const float* p, Tail) { return *p; }
  static void store(float* p, Reg v) { *p = v; }
  static void store(float* p, Reg v, Tail) { *p = v; }
  static Reg broadcast(const float* p) { return *p; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
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

constexpr Conv2dAlgorithm kConv2dAlgorithms[] = {
    SmallChannel<Scalar>::kAlgorithm, Depthwise<Scalar>::kAlgorithm,
    Grouped<Scalar>::kAlgorithm,      Direct<Scalar>::kAlgorithm,
    Winograd<Scalar, 2>::kAlgorithm,  Winograd<Scalar, 4>::kAlgorithm,
};

}  // namespace

const Kernels kScalarKernels = {
    .conv2d = kConv2dAlgorithms,
    .activation_grad = activation_grad<Scalar>,
    .transpose = transpose<Scalar, float>,
    .transpose_bytes = transpose<Scalar, std::uint8_t>,
    .max_pool2d_fprop = max_pool2d_fprop<Scalar>,
    .max_pool2d_bprop = max_pool2d_bprop<Scalar>,
    .avg_pool2d_fprop = avg_pool2d_fprop<Scalar>,
    .avg_pool2d_bprop = avg_pool2d_bprop<Scalar>,
    .batch_norm_moments = batch_norm_moments<Scalar>,
    .batch_norm_fprop = batch_norm_fprop<Scalar>,
    .batch_norm_bprop = batch_norm_bprop<Scalar>,
};

}  // namespace fastconv::cpu
