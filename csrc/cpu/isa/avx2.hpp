// The AVX2 + FMA vector type, and which of its instances have files of their own. A register tile of 6
// pixels x 16 channels: 12 sums, 2 filter vectors and 1 broadcast of the 16 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/data_type.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {

// Each file is compiled beside the others, and alone where its kernels change.
extern const Conv2dAlgorithm kAvx2Depthwise, kAvx2Grouped;  // depthwise_avx2.cpp
extern const Conv2dAlgorithm kAvx2Direct, kAvx2Winograd2, kAvx2Winograd3, kAvx2Winograd4,
    kAvx2Winograd5, kAvx2WinogradStrided;  // gemm_avx2.cpp

namespace {

struct Avx2 {
  static constexpr int kWidth = 8, kRegisters = 16, kRows = 6, kVectors = 2;
  static constexpr int kGemmRows[] = {0, 12, 6, 4};  // of a register tile, by its vectors
  static constexpr int kPanelVectors = 2;            // of most panels of a filter
  static constexpr bool kFreeMasks = false;          // a masked store costs ten others
  static constexpr int kProductsAtOnce = 4;          // in a loop of register tiles
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
  // Past the caches, to a multiple of a vector; and what has to come between that and other threads' loads.
  static void stream(float* p, Reg v) { _mm256_stream_ps(p, v); }
  static void drain() { _mm_sfence(); }
  // Not VMASKMOVPS: AMD's processors take a dozen cycles and more for a masked store.
  static void store(float* p, Reg v, Tail t) {
    if (t.count == kWidth) return store(p, v);
    __m128 rest = _mm256_castps256_ps128(v);
    if (t.count & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (t.count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (t.count & 1) _mm_store_ss(p, rest);
  }
  static Reg load(const Float16* p) { return _mm256_cvtph_ps(load_halves(p)); }
  static Reg load(const Float16* p, Tail t) { return _mm256_cvtph_ps(load_halves(p, t)); }
  static Reg load(const Bfloat16* p) { return as_high_halves(load_halves(p)); }
  static Reg load(const Bfloat16* p, Tail t) { return as_high_halves(load_halves(p, t)); }
  template <class... Tails>
  static void store(Float16* p, Reg v, Tails... t) {
    store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), t...);
  }
  template <class... Tails>
  static void store(Bfloat16* p, Reg v, Tails... t) {
    store_halves(p, rounded_to_bfloat16(v), t...);
  }
  static __m128i load_halves(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static __m128i load_halves(const void* p, Tail t) {
    __m128i v = _mm_setzero_si128();
    std::memcpy(&v, p, t.count == kWidth ? 2 * kWidth : 2 * static_cast<std::size_t>(t.count));
    return v;
  }
  static void store_halves(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static void store_halves(void* p, __m128i v, Tail t) {
    std::memcpy(p, &v, t.count == kWidth ? 2 * kWidth : 2 * static_cast<std::size_t>(t.count));
  }
  static Reg as_high_halves(__m128i v) {
    return bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static __m128i rounded_to_bfloat16(Reg v) {
    const Int all = int_bits(v), high = _mm256_srli_epi32(all, 16);
    const Int is_odd = _mm256_and_si256(high, int_broadcast(1));
    const Int rounded = _mm256_srli_epi32(int_add(all, int_add(is_odd, int_broadcast(0x7FFF))), 16);
    const Int quiet =
        _mm256_or_si256(high, int_broadcast(0x40));  // else a NaN might round to infinity
    const Int words = int_select(unordered(v, v), quiet, rounded);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // Stays in a register until its last use.
  static Reg held(Reg v) {
    asm("" : "+x"(v));  // NOLINT(portability-no-assembler): of no instruction
    return v;
  }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which do not see it read
  // sum[v] += *a * b[v]. A register tile has 14 or 15 of the 16 registers for its sums and its filter
  // vectors. Left to choose among FMA's forms, the compiler moves and spills some where a loop takes
  // several products; here it has no choice.
  static void add_products(const float* a, const Reg (&b)[2], Reg (&sum)[2]) {
    Reg sum_0 = sum[0], sum_1 = sum[1];
    asm("vbroadcastss %[a], %%ymm15\n\t"  // NOLINT(portability-no-assembler)
        "vfmadd231ps %[b_0], %%ymm15, %[sum_0]\n\t"
        "vfmadd231ps %[b_1], %%ymm15, %[sum_1]"
        : [sum_0] "+x"(sum_0), [sum_1] "+x"(sum_1)
        : [a] "m"(*a), [b_0] "x"(b[0]), [b_1] "x"(b[1])
        : "xmm15");
    sum[0] = sum_0;
    sum[1] = sum_1;
  }
  static void add_products(const float* a, const Reg (&b)[3], Reg (&sum)[3]) {
    Reg sum_0 = sum[0], sum_1 = sum[1], sum_2 = sum[2];
    asm("vbroadcastss %[a], %%ymm15\n\t"  // NOLINT(portability-no-assembler)
        "vfmadd231ps %[b_0], %%ymm15, %[sum_0]\n\t"
        "vfmadd231ps %[b_1], %%ymm15, %[sum_1]\n\t"
        "vfmadd231ps %[b_2], %%ymm15, %[sum_2]"
        : [sum_0] "+x"(sum_0), [sum_1] "+x"(sum_1), [sum_2] "+x"(sum_2)
        : [a] "m"(*a), [b_0] "x"(b[0]), [b_1] "x"(b[1]), [b_2] "x"(b[2])
        : "xmm15");
    sum[0] = sum_0;
    sum[1] = sum_1;
    sum[2] = sum_2;
  }
#endif
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg set(float v) { return _mm256_set1_ps(v); }
  static Reg subtract(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg divide(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  // b where one is NaN or they are equal.
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  // MAXPS returns its second operand where one is NaN: relu(NaN) is NaN, as stock.
  static Reg relu(Reg v) { return _mm256_max_ps(zero(), v); }
  // Lane j of register i and lane i of register j change places.
  static void transpose(Reg (&m)[8]) {
    Reg pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      m[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      m[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  // Of all lanes, in a fixed order.
  static float sum(Reg v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static bool any_nonzero(Reg v) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_NEQ_UQ)) != 0;
  }
  static Reg where_positive(Reg y, Reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_GT_OQ), v);
  }
  static Mask greater_or_first_nan(Reg a, Reg best) {
    return _mm256_and_ps(_mm256_cmp_ps(a, best, _CMP_NLE_UQ),
                         _mm256_cmp_ps(best, best, _CMP_ORD_Q));
  }
  static Mask unordered(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  static Mask mask_or(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Reg select(Mask m, Reg a, Reg b) { return _mm256_blendv_ps(b, a, m); }
  static Int int_add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  // 2^n, n from -126 to 128 (infinity), where v is 1.5 * 2^23 + n.
  static Reg power_of_two(Reg v) {
    return bits(_mm256_slli_epi32(int_add(int_bits(v), int_broadcast(127)), 23));
  }
  // Lane i of the result is lane index[i] of v, or of lo and hi one after the other.
  static Reg permute(Reg v, Int index) { return _mm256_permutevar8x32_ps(v, index); }
  static Reg permute(Reg lo, Reg hi, Int index) {
    const Int of_hi = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(kWidth - 1));
    return _mm256_blendv_ps(permute(lo, index), permute(hi, index), _mm256_castsi256_ps(of_hi));
  }
  static Reg gather(const float* p, Int index) { return _mm256_i32gather_ps(p, index, 4); }
  static Reg bits(Int v) { return _mm256_castsi256_ps(v); }
  static Int int_bits(Reg v) { return _mm256_castps_si256(v); }
  static Int int_broadcast(int v) { return _mm256_set1_epi32(v); }
  static Int int_select(Mask m, Int a, Int b) {
    return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m));
  }
  static Mask int_equal(Int a, Int b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static Int load_index(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Int load_index(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_index(std::int32_t* p, Int v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static void store_index(std::uint8_t* p, Int v) { store_index(p, v, tail(kWidth)); }
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

}  // namespace
}  // namespace fastconv::cpu
