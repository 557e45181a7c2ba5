// The AVX-512 (F, BW, DQ, VL) vector type, and which of its instances have files of their own. A register
// tile has 24 sums of the 32 registers. Of 6 pixels x 64 channels, it takes 10 loads for 24 multiply-adds,
// and 6 pixel pointers; of 12 x 32, for fewer channels, 14 loads, and more pointers than there are general
// registers for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/data_type.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {

// Each file is compiled beside the others, and alone where its kernels change.
extern const Conv2dAlgorithm kAvx512Depthwise, kAvx512Grouped;  // depthwise_avx512.cpp
extern const Conv2dAlgorithm kAvx512Direct, kAvx512Winograd2, kAvx512Winograd3, kAvx512Winograd4,
    kAvx512Winograd5, kAvx512WinogradStrided;  // gemm_avx512.cpp

namespace {

struct Avx512 {
  static constexpr int kWidth = 16, kRegisters = 32, kRows = 12, kVectors = 2;
  static constexpr int kGemmRows[] = {0, 12, 12, 8, 6};  // of a register tile, by its vectors
  static constexpr int kPanelVectors = 4;                // of most panels of a filter
  static constexpr bool kFreeMasks = true;   // masked loads and stores cost what others do
  static constexpr int kProductsAtOnce = 1;  // in a loop of register tiles
  using Reg = __m512;
  using Int = __m512i;
  using Mask = __mmask16;
  using Tail = __mmask16;
  static Tail tail(int count) { return static_cast<Tail>((1u << count) - 1); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(t, p); }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  // Past the caches, to a multiple of a vector; and what has to come between that and other threads' loads.
  static void stream(float* p, Reg v) { _mm512_stream_ps(p, v); }
  static void drain() { _mm_sfence(); }
  static void store(float* p, Reg v, Tail t) { _mm512_mask_storeu_ps(p, t, v); }
  // 8 floats at most, to where there is room for 8.
  static void copy_half(const float* from, Tail t, float* to) {
    _mm256_storeu_ps(to, _mm256_maskz_loadu_ps(static_cast<__mmask8>(t), from));
  }
  static Reg load(const Float16* p) { return _mm512_cvtph_ps(load_halves(p)); }
  static Reg load(const Float16* p, Tail t) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(t, p));
  }
  static Reg load(const Bfloat16* p) { return as_high_halves(load_halves(p)); }
  static Reg load(const Bfloat16* p, Tail t) {
    return as_high_halves(_mm256_maskz_loadu_epi16(t, p));
  }
  static void store(Float16* p, Reg v) { store_halves(p, rounded_to_float16(v)); }
  static void store(Float16* p, Reg v, Tail t) {
    _mm256_mask_storeu_epi16(p, t, rounded_to_float16(v));
  }
  static void store(Bfloat16* p, Reg v) { store_halves(p, rounded_to_bfloat16(v)); }
  static void store(Bfloat16* p, Reg v, Tail t) {
    _mm256_mask_storeu_epi16(p, t, rounded_to_bfloat16(v));
  }
  static __m256i load_halves(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static void store_halves(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Reg as_high_halves(__m256i v) {
    return bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m256i rounded_to_float16(Reg v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Not VCVTNEPS2BF16, which flushes subnormal numbers to zero and is not on every CPU.
  static __m256i rounded_to_bfloat16(Reg v) {
    const Int all = int_bits(v), high = _mm512_srli_epi32(all, 16);
    const Int is_odd = _mm512_and_si512(high, int_broadcast(1));
    const Int rounded = _mm512_srli_epi32(
        _mm512_add_epi32(all, _mm512_add_epi32(is_odd, int_broadcast(0x7FFF))), 16);
    const Int quiet =
        _mm512_or_si512(high, int_broadcast(0x40));  // else a NaN might round to infinity
    return _mm512_cvtepi32_epi16(int_select(unordered(v, v), quiet, rounded));
  }
  static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // Stays in a register until its last use.
  static Reg held(Reg v) {
    asm("" : "+v"(v));  // NOLINT(portability-no-assembler): of no instruction
    return v;
  }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg set(float v) { return _mm512_set1_ps(v); }
  static Reg subtract(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg divide(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  // b where one is NaN or they are equal.
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  // MAXPS returns its second operand where one is NaN: relu(NaN) is NaN, as stock.
  static Reg relu(Reg v) { return _mm512_max_ps(zero(), v); }
  // Lane j of register i and lane i of register j change places.
  static void transpose(Reg (&m)[16]) {
    Reg pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
      fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
    }
    // 128-bit parts: register 4 r + q has columns q, q + 4, q + 8, q + 12 of rows 4 r .. 4 r + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      eights[i] = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
      eights[i + 4] = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xDD);
      eights[i + 8] = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
      eights[i + 12] = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      m[i] = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0x88);
      m[i + 8] = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0xDD);
      m[i + 4] = _mm512_shuffle_f32x4(eights[i + 4], eights[i + 12], 0x88);
      m[i + 12] = _mm512_shuffle_f32x4(eights[i + 4], eights[i + 12], 0xDD);
    }
  }
  // Of all lanes, in a fixed order.
  static float sum(Reg v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static bool any_nonzero(Reg v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NEQ_UQ) != 0; }
  static Reg where_positive(Reg y, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_GT_OQ), v);
  }
  static Mask greater_or_first_nan(Reg a, Reg best) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(best, best, _CMP_ORD_Q), a, best,
                                   _CMP_NLE_UQ);
  }
  static Mask unordered(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static Mask mask_or(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_mov_ps(b, m, a); }
  static Int int_add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  // 2^n, n from -126 to 128 (infinity), where v is 1.5 * 2^23 + n.
  static Reg power_of_two(Reg v) {
    return bits(_mm512_slli_epi32(int_add(int_bits(v), int_broadcast(127)), 23));
  }
  // Lane i of the result is lane index[i] of v, or of lo and hi one after the other.
  static Reg permute(Reg v, Int index) { return _mm512_permutexvar_ps(index, v); }
  static Reg permute(Reg lo, Reg hi, Int index) { return _mm512_permutex2var_ps(lo, index, hi); }
  static Reg gather(const float* p, Int index) { return _mm512_i32gather_ps(index, p, 4); }
  static Reg bits(Int v) { return _mm512_castsi512_ps(v); }
  static Int int_bits(Reg v) { return _mm512_castps_si512(v); }
  static Int int_broadcast(int v) { return _mm512_set1_epi32(v); }
  static Int int_select(Mask m, Int a, Int b) { return _mm512_mask_mov_epi32(b, m, a); }
  static Mask int_equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Int load_index(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static Int load_index(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_index(std::int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static void store_index(std::uint8_t* p, Int v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static Int load_index(const std::int32_t* p, Tail t) { return _mm512_maskz_loadu_epi32(t, p); }
  static Int load_index(const std::uint8_t* p, Tail t) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(t, p));
  }
  static void store_index(std::int32_t* p, Int v, Tail t) { _mm512_mask_storeu_epi32(p, t, v); }
  static void store_index(std::uint8_t* p, Int v, Tail t) {
    _mm_mask_storeu_epi8(p, t, _mm512_cvtepi32_epi8(v));
  }
};

}  // namespace
}  // namespace fastconv::cpu
