// What int8 convolution takes of AVX-512 (F, BW, DQ, VL), and its products by VPMADDWD. A register tile as
// that of float32: of 6 pixels x 64 channels, it takes 10 loads for 24 vectors of products.
#pragma once

#include <immintrin.h>

#include "cpu/int8.hpp"

namespace fastconv::cpu {
namespace {

struct Int8Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kRows[] = {0, 12, 8, 8, 6};  // of a register tile, by its vectors
  // Not __m512i, of 64-bit integers: GCC copies that between registers at every instruction of 32-bit ones.
  using Sums = std::int32_t __attribute__((vector_size(64)));
  using Floats = __m512;
  using Tail = __mmask16;
  static Tail tail(int count) { return static_cast<Tail>((1u << count) - 1); }

  static Sums no_sums() { return Sums{}; }
  static Sums load_sums(const std::int32_t* p) { return Sums(_mm512_loadu_si512(p)); }
  static void store_sums(std::int32_t* p, Sums v) { _mm512_storeu_si512(p, __m512i(v)); }
  static Sums negative(Sums v) { return Sums(_mm512_sub_epi32(__m512i{}, __m512i(v))); }
  static Sums load_filter(const void* p) { return Sums(_mm512_loadu_si512(p)); }
  static Sums broadcast(const void* p) {
    std::int32_t quad = 0;
    std::memcpy(&quad, p, sizeof quad);
    return Sums(_mm512_set1_epi32(quad));
  }
  static Floats to_floats(Sums v) { return _mm512_cvtepi32_ps(__m512i(v)); }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(t, p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, Floats v, Tail t) { _mm512_mask_storeu_ps(p, t, v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  // MAXPS returns its second operand where one is NaN: relu(NaN) is NaN, as stock.
  static Floats relu(Floats v) { return _mm512_max_ps(zero(), v); }

  static std::uint32_t abs_max_bits(const float* x, std::int64_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most[4];
    for (auto& each : most) each = _mm512_setzero_si512();
    std::int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i + j * 16), magnitude);
        most[j] = _mm512_max_epu32(most[j], bits);
      }
    }
    for (; i < count; i += 16) {
      const Tail rest = tail(static_cast<int>(min64(16, count - i)));
      const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi32(rest, x + i), magnitude);
      most[0] = _mm512_max_epu32(most[0], bits);
    }
    most[0] =
        _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3]));
    return _mm512_reduce_max_epu32(most[0]);
  }
  static __m512i quantized(Floats x, Floats scale) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(x, scale));
  }
};

// Pairs of 16-bit products, for processors without VNNI.
struct Int8Avx512Madd : Int8Avx512 {
  static constexpr int kQuad = 2;
  using Source = std::int16_t;
  using Weight = std::int16_t;
  static constexpr Source kZero = 0;
  static Sums broadcast_zero() { return no_sums(); }
  static Sums dot(Sums sum, Sums source, Sums filter) {
    return Sums(
        _mm512_add_epi32(__m512i(sum), _mm512_madd_epi16(__m512i(source), __m512i(filter))));
  }
  static void interleave(const std::int8_t* const* rows, int vectors, Weight* out) {
    for (int v = 0; v < vectors; ++v, out += 32) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + v * 16));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[1] + v * 16));
      const __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
      const __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), high);
    }
  }
  static void quantize(const float* x, std::int64_t count, float scale, Source* out) {
    const Floats scales = _mm512_set1_ps(scale);
    for (std::int64_t i = 0; i < count; i += 16) {
      const Tail rest = tail(static_cast<int>(min64(16, count - i)));
      _mm256_mask_storeu_epi16(out + i, rest,
                               _mm512_cvtepi32_epi16(quantized(load(x + i, rest), scales)));
    }
  }
};

}  // namespace
}  // namespace fastconv::cpu
