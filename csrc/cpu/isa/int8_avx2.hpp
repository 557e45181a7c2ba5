// What int8 convolution takes of AVX2, and its products by VPMADDWD, of pairs of 16-bit numbers: VPMADDUBSW,
// of bytes, saturates. A register tile of 6 pixels x 16 channels: 12 sums, 2 filter vectors and a broadcast of
// the 16 registers.
#pragma once

#include <immintrin.h>

#include "cpu/int8.hpp"

namespace fastconv::cpu {
namespace {

struct Int8Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kRows[] = {0, 8, 6};  // of a register tile, by its vectors
  // Not __m256i, of 64-bit integers: GCC copies that between registers at every instruction of 32-bit ones.
  using Sums = std::int32_t __attribute__((vector_size(32)));
  using Floats = __m256;
  struct Tail {
    int count;
  };
  static Tail tail(int count) { return {count}; }

  static Sums no_sums() { return Sums{}; }
  static Sums load_sums(const std::int32_t* p) { return load_filter(p); }
  static void store_sums(std::int32_t* p, Sums v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(v));
  }
  static Sums negative(Sums v) { return Sums(_mm256_sub_epi32(__m256i{}, __m256i(v))); }
  static Sums load_filter(const void* p) { return Sums(load_integers(p)); }
  static __m256i load_integers(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static Sums broadcast(const void* p) {
    std::int32_t quad = 0;
    std::memcpy(&quad, p, sizeof quad);
    return Sums(_mm256_set1_epi32(quad));
  }
  static Floats to_floats(Sums v) { return _mm256_cvtepi32_ps(__m256i(v)); }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load(const float* p, Tail t) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(t.count), lane));
  }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  // Not VMASKMOVPS: AMD's processors take a dozen cycles and more for a masked store.
  static void store(float* p, Floats v, Tail t) {
    if (t.count == kWidth) return store(p, v);
    alignas(32) float lanes[kWidth];
    _mm256_store_ps(lanes, v);
    for (int i = 0; i < t.count; ++i) p[i] = lanes[i];
  }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  // MAXPS returns its second operand where one is NaN: relu(NaN) is NaN, as stock.
  static Floats relu(Floats v) { return _mm256_max_ps(zero(), v); }

  static std::uint32_t abs_max_bits(const float* x, std::int64_t count) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most[4];
    for (auto& each : most) each = _mm256_setzero_si256();
    std::int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        most[j] =
            _mm256_max_epu32(most[j], _mm256_and_si256(load_integers(x + i + j * 8), magnitude));
      }
    }
    for (; i < count; i += 8) {
      const Floats rest = load(x + i, tail(static_cast<int>(min64(8, count - i))));
      most[0] = _mm256_max_epu32(most[0], _mm256_and_si256(_mm256_castps_si256(rest), magnitude));
    }
    alignas(32) std::uint32_t lanes[kWidth];
    _mm256_store_si256(
        reinterpret_cast<__m256i*>(lanes),
        _mm256_max_epu32(_mm256_max_epu32(most[0], most[1]), _mm256_max_epu32(most[2], most[3])));
    return *std::max_element(lanes, lanes + kWidth);
  }

  // Calls body(first, 16 values of 16 bits), and with fewer of them rest(first, values, how many).
  template <class Body, class Rest>
  static void quantize_by_16(const float* x, std::int64_t count, float scale, const Body& body,
                             const Rest& rest) {
    const Floats scales = _mm256_set1_ps(scale);
    const auto pair = [&](Floats low, Floats high) {
      const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, scales)),
                                                _mm256_cvtps_epi32(_mm256_mul_ps(high, scales)));
      return _mm256_permute4x64_epi64(packed, 0xD8);
    };
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16) body(i, pair(load(x + i), load(x + i + 8)));
    const int left = static_cast<int>(count - i);
    if (left == 0) return;
    const Floats low = load(x + i, tail(std::min(left, 8)));
    rest(i, pair(low, left > 8 ? load(x + i + 8, tail(left - 8)) : zero()), left);
  }
};

struct Int8Avx2Madd : Int8Avx2 {
  static constexpr int kQuad = 2;
  using Source = std::int16_t;
  using Weight = std::int16_t;
  static constexpr Source kZero = 0;
  static Sums broadcast_zero() { return no_sums(); }
  static Sums dot(Sums sum, Sums source, Sums filter) {
    return Sums(
        _mm256_add_epi32(__m256i(sum), _mm256_madd_epi16(__m256i(source), __m256i(filter))));
  }
  static void interleave(const std::int8_t* const* rows, int vectors, Weight* out) {
    for (int v = 0; v < vectors; ++v, out += 16) {
      const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[0] + v * 8));
      const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[1] + v * 8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
    }
  }
  static void quantize(const float* x, std::int64_t count, float scale, Source* out) {
    quantize_by_16(
        x, count, scale,
        [&](std::int64_t i, __m256i v) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
        },
        [&](std::int64_t i, __m256i v, int left) {
          std::memcpy(out + i, &v, static_cast<std::size_t>(left) * sizeof(Source));
        });
  }
};

}  // namespace
}  // namespace fastconv::cpu
