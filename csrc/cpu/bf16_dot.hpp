// The unit of vector registers: a pair of a row's elements, broadcast, meets vectors of packed columns.
// D adds both products to each of the 16 sums of a vector, and knows what that costs.
#pragma once

#include <array>
#include <utility>

#include "cpu/bf16.hpp"

namespace fastconv::cpu {
namespace {

template <class D, int Rows, int Vectors>
void bf16_dot_tile(const Bf16Product& t) {
  typename D::Sums sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[i][v] = D::zero();
  }
  const Bits* packed = t.packed;
  const int64_t pairs = t.slices * t.slice / 2;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const Bits* source[Rows];
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) source[i] = t.source[i] + t.tap_offsets[tap];
    for (int64_t pair = 0; pair < pairs; ++pair, packed += 2 * kBf16Width) {
      typename D::Pairs b[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b[v] = D::load(packed + v * t.vector_step);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const typename D::Pairs a = D::broadcast(source[i] + 2 * pair);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = D::dot(sum[i][v], a, b[v]);
      }
    }
  }
  float* const sums = t.sums;
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      D::store(sums + (i * Vectors + v) * kBf16Width, sum[i][v]);
    }
  }
}

template <class D>
struct Bf16DotUnit {
  static constexpr int kVectors = 4;
  static constexpr int kRows[] = {0, 12, 12, 8, 6};  // of a product, by its vectors
  static constexpr int64_t kSlice = int64_t{1} << 40;
  static constexpr bool kEvenRows = false;
  static Bf16Costs costs() { return D::costs(); }

  struct Session {
    void multiply(const Bf16Product& t) {
      static constexpr auto kTiles = table(std::make_index_sequence<kVectors>{});
      kTiles[static_cast<std::size_t>(t.vectors - 1)][static_cast<std::size_t>(t.rows - 1)](t);
    }
  };

 private:
  using Tile = void (*)(const Bf16Product&);
  template <int Vectors, std::size_t... I>
  static constexpr auto tiles(std::index_sequence<I...>) {
    return std::array<Tile, 12>{bf16_dot_tile<D, I + 1, Vectors>...};
  }
  template <std::size_t... I>
  static constexpr auto table(std::index_sequence<I...>) {
    return std::array{tiles<I + 1>(std::make_index_sequence<std::size_t{kRows[I + 1]}>{})...};
  }
};

}  // namespace
}  // namespace fastconv::cpu
