// The AVX2 + FMA instances. A register tile of 6 pixels x 16 channels: 12 sums, 2 filter vectors and
// 1 broadcast of the 16 registers.
#include <immintrin.h>

#include "cpu/direct.hpp"
#include "cpu/kernels.hpp"
#include "cpu/max_pool.hpp"

namespace fastconv::cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8, kRows = 6, kVectors = 2;
  using Reg = __m256;
  using Int = __m256i;
  using Mask = __m256;
  struct Tail {
    __m256i mask;
    int count;
  };
  static Tail tail(int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), count};
  }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const float* p, Tail t) { return _mm256_maskload_ps(p, t.mask); }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, Reg v, Tail t) { _mm256_maskstore_ps(p, t.mask, v); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  // MAXPS returns its second operand where one is NaN: relu(NaN) is NaN, as stock.
  static Reg relu(Reg v) { return _mm256_max_ps(zero(), v); }
  static Reg where_positive(Reg y, Reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_GT_OQ), v);
  }
  static Mask greater_or_first_nan(Reg a, Reg best) {
    return _mm256_and_ps(_mm256_cmp_ps(a, best, _CMP_NLE_UQ),
                         _mm256_cmp_ps(best, best, _CMP_ORD_Q));
  }
  static Reg select(Mask m, Reg a, Reg b) { return _mm256_blendv_ps(b, a, m); }
  static Int int_broadcast(int v) { return _mm256_set1_epi32(v); }
  static Int int_select(Mask m, Int a, Int b) {
    return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m));
  }
  static Mask int_equal(Int a, Int b) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b));
  }
  static Int load_index(const std::int32_t* p, Tail t) { return _mm256_maskload_epi32(p, t.mask); }
  static Int load_index(const std::uint8_t* p, Tail t) {
    long long bytes = 0;
    std::memcpy(&bytes, p, t.count == kWidth ? kWidth : static_cast<std::size_t>(t.count));
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  }
  static void store_index(std::int32_t* p, Int v, Tail t) { _mm256_maskstore_epi32(p, t.mask, v); }
  static void store_index(std::uint8_t* p, Int v, Tail t) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const long long bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    std::memcpy(p, &bytes, t.count == kWidth ? kWidth : static_cast<std::size_t>(t.count));
  }
};

constexpr Conv2dAlgorithm kConv2dAlgorithms[] = {
    Direct<Avx2>::kAlgorithm,
};

}  // namespace

const Kernels kAvx2Kernels = {
    .conv2d = kConv2dAlgorithms,
    .activation_grad = activation_grad<Avx2>,
    .max_pool2d_fprop = max_pool2d_fprop<Avx2>,
    .max_pool2d_bprop = max_pool2d_bprop<Avx2>,
};

}  // namespace fastconv::cpu
