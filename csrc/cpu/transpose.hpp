// Transposition in memory, from one layout to the other: squares of registers in tiles that keep the
// cache lines of both sides.
#pragma once

#include <type_traits>

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// Elements on their way through registers of floats; those of an argmax travel as integers. Of 16-bit
// types, which the loads and stores of V convert, see convert.hpp.
template <class T>
inline constexpr bool kIsArgmax = std::is_integral_v<T>;

template <class V, class T, class... Tail>
typename V::Reg load_elements(const T* p, const Tail&... tail) {
  if constexpr (!kIsArgmax<T>) {
    return V::load(p, tail...);
  } else {
    return V::bits(V::load_index(p, tail...));
  }
}

template <class V, class T, class... Tail>
void store_elements(T* p, typename V::Reg v, const Tail&... tail) {
  if constexpr (!kIsArgmax<T>) {
    V::store(p, v, tail...);
  } else {
    V::store_index(p, V::int_bits(v), tail...);
  }
}

// out[j][i] = in[i][j] for a part of a matrix, whose rows are `in_row` and `out_row` elements apart.
template <class V, class From, class To>
void transpose_tile(int64_t rows, int64_t columns, const From* in, int64_t in_row, To* out,
                    int64_t out_row) {
  for (int64_t i = 0; i < rows; i += V::kWidth) {
    const int64_t height = min64(V::kWidth, rows - i);
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      const int64_t width = min64(V::kWidth, columns - j);
      const From* const from = in + i * in_row + j;
      To* const to = out + j * out_row + i;
      typename V::Reg square[V::kWidth];
      if (height == V::kWidth && width == V::kWidth) {
#pragma GCC unroll 16
        for (int k = 0; k < V::kWidth; ++k) square[k] = load_elements<V>(from + k * in_row);
        V::transpose(square);
#pragma GCC unroll 16
        for (int k = 0; k < V::kWidth; ++k) store_elements<V>(to + k * out_row, square[k]);
        continue;
      }
      const auto in_tail = V::tail(static_cast<int>(width));
      const auto out_tail = V::tail(static_cast<int>(height));
#pragma GCC unroll 16
      for (int k = 0; k < V::kWidth; ++k) {
        square[k] = k < height ? load_elements<V>(from + k * in_row, in_tail) : V::zero();
      }
      V::transpose(square);
      for (int64_t k = 0; k < width; ++k) {
        store_elements<V>(to + k * out_row, square[k], out_tail);
      }
    }
  }
}

// out[n][j][i] = in[n][i][j].
template <class V, class From, class To>
void transpose(int64_t matrices, int64_t rows, int64_t columns, const From* in, To* out) {
  constexpr int64_t kTile = 64;
  const int64_t down = ceil_div(rows, kTile), across = ceil_div(columns, kTile);
  parallel_for(matrices * down * across, [&](int64_t task) {
    const int64_t matrix = task / (down * across) * rows * columns;
    // Down the longer side: tiles that follow one another are neighbours there.
    const bool tall = rows >= columns;
    const int64_t number = task % (down * across);
    const int64_t i = (tall ? number / across : number % down) * kTile;
    const int64_t j = (tall ? number % across : number / down) * kTile;
    transpose_tile<V>(min64(kTile, rows - i), min64(kTile, columns - j),
                      in + matrix + i * columns + j, columns, out + matrix + j * rows + i, rows);
  });
}

}  // namespace
}  // namespace fastconv::cpu
