// Transposition in memory, from one layout to the other: squares of registers in tiles that keep the
// cache lines of both sides.
#pragma once

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// out[j][i] = in[i][j] for a part of a matrix, whose rows are `in_row` and `out_row` floats apart.
template <class V>
void transpose_tile(int64_t rows, int64_t columns, const float* in, int64_t in_row, float* out,
                    int64_t out_row) {
  for (int64_t i = 0; i < rows; i += V::kWidth) {
    const int64_t height = min64(V::kWidth, rows - i);
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      const int64_t width = min64(V::kWidth, columns - j);
      const float* const from = in + i * in_row + j;
      float* const to = out + j * out_row + i;
      typename V::Reg square[V::kWidth];
      if (height == V::kWidth && width == V::kWidth) {
#pragma GCC unroll 16
        for (int k = 0; k < V::kWidth; ++k) square[k] = V::load(from + k * in_row);
        V::transpose(square);
#pragma GCC unroll 16
        for (int k = 0; k < V::kWidth; ++k) V::store(to + k * out_row, square[k]);
        continue;
      }
      const auto in_tail = V::tail(static_cast<int>(width));
      const auto out_tail = V::tail(static_cast<int>(height));
#pragma GCC unroll 16
      for (int k = 0; k < V::kWidth; ++k) {
        square[k] = k < height ? V::load(from + k * in_row, in_tail) : V::zero();
      }
      V::transpose(square);
      for (int64_t k = 0; k < width; ++k) V::store(to + k * out_row, square[k], out_tail);
    }
  }
}

// out[n][j][i] = in[n][i][j].
template <class V>
void transpose(int64_t matrices, int64_t rows, int64_t columns, const float* in, float* out) {
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
