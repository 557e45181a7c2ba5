// int8 convolution on AVX-512 with VNNI: VPDPBUSD adds four products to each 32-bit sum, at the rate of a
// multiply-add of float32 (latency 5 cycles, ports 0 and 5).
#include "core/cpu_features.hpp"
#include "cpu/isa/int8_avx512.hpp"

namespace fastconv::cpu {
namespace {

struct Int8Avx512Vnni : Int8Avx512 {
  static constexpr int kQuad = 4;
  using Source = std::uint8_t;
  using Weight = std::int8_t;
  static constexpr Source kZero = 128;
  static Sums broadcast_zero() { return Sums(_mm512_set1_epi8(static_cast<char>(kZero))); }
  static Sums dot(Sums sum, Sums source, Sums filter) {
    return Sums(_mm512_dpbusd_epi32(__m512i(sum), __m512i(source), __m512i(filter)));
  }

  // rows[i][j] to out[j][i].
  static void interleave(const std::int8_t* const* rows, int vectors, Weight* out) {
    if (vectors == 4) return interleave64(rows, out);
    for (int v = 0; v < vectors; ++v, out += 64) {
      __m128i row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + v * 16));
      }
      const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]);
      const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]);
      const __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]);
      const __m128i high23 = _mm_unpackhi_epi8(row[2], row[3]);
      const auto at = [out](int i) { return reinterpret_cast<__m128i*>(out + i * 16); };
      _mm_storeu_si128(at(0), _mm_unpacklo_epi16(low01, low23));
      _mm_storeu_si128(at(1), _mm_unpackhi_epi16(low01, low23));
      _mm_storeu_si128(at(2), _mm_unpacklo_epi16(high01, high23));
      _mm_storeu_si128(at(3), _mm_unpackhi_epi16(high01, high23));
    }
  }

  static void quantize(const float* x, std::int64_t count, float scale, Source* out) {
    const Floats scales = _mm512_set1_ps(scale);
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(kZero));
    // Packed within 128 bits, four floats of each vector go together.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    std::int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      const auto part = [&](int j) { return quantized(load(x + i + j * 16), scales); };
      const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(part(0), part(1)),
                                               _mm512_packs_epi32(part(2), part(3)));
      _mm512_storeu_si512(out + i, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), zero));
    }
    for (; i < count; i += 16) {
      const Tail rest = tail(static_cast<int>(min64(16, count - i)));
      const __m128i bytes = _mm512_cvtepi32_epi8(quantized(load(x + i, rest), scales));
      _mm_mask_storeu_epi8(out + i, rest, _mm_xor_si128(bytes, _mm512_castsi512_si128(zero)));
    }
  }

 private:
  // Likewise, of 64 columns: within each 128 bits, and then these among the vectors.
  static void interleave64(const std::int8_t* const* rows, Weight* out) {
    const __m512i row0 = _mm512_loadu_si512(rows[0]), row1 = _mm512_loadu_si512(rows[1]);
    const __m512i row2 = _mm512_loadu_si512(rows[2]), row3 = _mm512_loadu_si512(rows[3]);
    const __m512i low01 = _mm512_unpacklo_epi8(row0, row1);
    const __m512i high01 = _mm512_unpackhi_epi8(row0, row1);
    const __m512i low23 = _mm512_unpacklo_epi8(row2, row3);
    const __m512i high23 = _mm512_unpackhi_epi8(row2, row3);
    // Part l of vector q: columns 16 l + 4 q .. + 3.
    const __m512i q0 = _mm512_unpacklo_epi16(low01, low23);
    const __m512i q1 = _mm512_unpackhi_epi16(low01, low23);
    const __m512i q2 = _mm512_unpacklo_epi16(high01, high23);
    const __m512i q3 = _mm512_unpackhi_epi16(high01, high23);
    const __m512i low_q01 = _mm512_shuffle_i32x4(q0, q1, 0x44);   // q0: 0, 1; q1: 0, 1
    const __m512i high_q01 = _mm512_shuffle_i32x4(q0, q1, 0xEE);  // q0: 2, 3; q1: 2, 3
    const __m512i low_q23 = _mm512_shuffle_i32x4(q2, q3, 0x44);
    const __m512i high_q23 = _mm512_shuffle_i32x4(q2, q3, 0xEE);
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low_q01, low_q23, 0x88));
    _mm512_storeu_si512(out + 64, _mm512_shuffle_i32x4(low_q01, low_q23, 0xDD));
    _mm512_storeu_si512(out + 128, _mm512_shuffle_i32x4(high_q01, high_q23, 0x88));
    _mm512_storeu_si512(out + 192, _mm512_shuffle_i32x4(high_q01, high_q23, 0xDD));
  }
};

}  // namespace

constinit const Int8Algorithm kInt8Avx512Vnni = int8_algorithm<Int8Avx512Vnni>(
    "vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0; });

}  // namespace fastconv::cpu
