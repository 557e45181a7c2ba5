// int8 convolution on AVX-VNNI: VPDPBUSD on vectors of 256 bits, for processors without AVX-512.
#include <cpuid.h>

#include "cpu/isa/int8_avx2.hpp"

namespace fastconv::cpu {
namespace {

struct Int8AvxVnni : Int8Avx2 {
  static constexpr int kQuad = 4;
  using Source = std::uint8_t;
  using Weight = std::int8_t;
  static constexpr Source kZero = 128;
  static Sums broadcast_zero() { return Sums(_mm256_set1_epi8(static_cast<char>(kZero))); }
  static Sums dot(Sums sum, Sums source, Sums filter) {
    return Sums(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(source), __m256i(filter)));
  }

  // rows[i][j] to out[j][i].
  static void interleave(const std::int8_t* const* rows, int vectors, Weight* out) {
    for (int v = 0; v < vectors; ++v, out += 32) {
      const auto row = [&](int i) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i] + v * 8));
      };
      const __m128i pair01 = _mm_unpacklo_epi8(row(0), row(1));
      const __m128i pair23 = _mm_unpacklo_epi8(row(2), row(3));
      const auto at = [out](int i) { return reinterpret_cast<__m128i*>(out + i * 16); };
      _mm_storeu_si128(at(0), _mm_unpacklo_epi16(pair01, pair23));
      _mm_storeu_si128(at(1), _mm_unpackhi_epi16(pair01, pair23));
    }
  }

  static void quantize(const float* x, std::int64_t count, float scale, Source* out) {
    const auto bytes = [](__m256i v) {
      const __m128i packed =
          _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
      return _mm_xor_si128(packed, _mm_set1_epi8(static_cast<char>(kZero)));
    };
    quantize_by_16(
        x, count, scale,
        [&](std::int64_t i, __m256i v) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes(v));
        },
        [&](std::int64_t i, __m256i v, int left) {
          const __m128i packed = bytes(v);
          std::memcpy(out + i, &packed, static_cast<std::size_t>(left));
        });
  }
};

// Not __builtin_cpu_supports: compilers have known its name for a shorter time than the instructions.
bool cpu_has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}

}  // namespace

constinit const Int8Algorithm kInt8AvxVnni = int8_algorithm<Int8AvxVnni>("vnni", cpu_has_avx_vnni);

}  // namespace fastconv::cpu
