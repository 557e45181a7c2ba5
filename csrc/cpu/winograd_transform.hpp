// What Winograd's algorithms in all directions share: the one-dimensional transforms, and how outputs are
// cut into tiles.
#pragma once

#include <string>

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// The transforms of F(Outputs, Taps), on vectors: of inputs (B^T), filters (G), products (A^T), and for the
// gradient by the filter of dy (A) and of products (G^T).
template <class V, int Outputs, int Taps>
struct WinogradTransform;

// A dimension in which the filter has one tap.
template <class V>
struct WinogradTransform<V, 1, 1> {
  using Reg = typename V::Reg;
  static constexpr int kOutputs = 1, kTaps = 1, kPoints = 1;
  static void input(const Reg (&d)[1], Reg (&out)[1]) { out[0] = d[0]; }
  static void filter(const Reg (&g)[1], Reg (&out)[1]) { out[0] = g[0]; }
  static void output(const Reg (&m)[1], Reg (&y)[1]) { y[0] = m[0]; }
  static void dy(const Reg (&d)[1], Reg (&out)[1]) { out[0] = d[0]; }
  static void dfilter(const Reg (&m)[1], Reg (&g)[1]) { g[0] = m[0]; }
};

// At the points 0, 1, -1 and infinity.
template <class V>
struct WinogradTransform<V, 2, 3> {
  using Reg = typename V::Reg;
  static constexpr int kOutputs = 2, kTaps = 3, kPoints = 4;
  static void input(const Reg (&d)[4], Reg (&out)[4]) {
    out[0] = V::subtract(d[0], d[2]);
    out[1] = V::add(d[1], d[2]);
    out[2] = V::subtract(d[2], d[1]);
    out[3] = V::subtract(d[3], d[1]);
  }
  static void filter(const Reg (&g)[3], Reg (&out)[4]) {
    const Reg half = V::set(0.5f);
    const Reg even = V::multiply(half, V::add(g[0], g[2]));
    out[0] = g[0];
    out[1] = V::fma(half, g[1], even);
    out[2] = V::subtract(even, V::multiply(half, g[1]));
    out[3] = g[2];
  }
  static void output(const Reg (&m)[4], Reg (&y)[2]) {
    y[0] = V::add(m[0], V::add(m[1], m[2]));
    y[1] = V::add(V::subtract(m[1], m[2]), m[3]);
  }
};

// At 0, +-a, +-b and infinity, with a^2 = 1/2 and b^2 = 2. The products' denominators are
// 1 / (2 a^2 (a^2 - b^2)) = -2/3 and 1 / (2 b^2 (b^2 - a^2)) = 1/6.
template <class V>
struct SixPoints {
  using Reg = typename V::Reg;
  static constexpr int kPoints = 6;
  static constexpr float kA = 0.70710678f, kB = 1.41421356f;
  static constexpr float kOverA = -2.0f / 3, kOverB = 1.0f / 6;

  // Even and odd powers at a point: their sum and difference are the values there and at its negative.
  struct Halves {
    Reg even, odd;
  };
  // The odd ones are still to be multiplied by the point.
  static void values(Reg at_zero, const Halves& a, const Halves& b, Reg at_infinity,
                     Reg (&out)[6]) {
    out[0] = at_zero;
    out[1] = V::fma(V::set(kA), a.odd, a.even);
    out[2] = V::fma(V::set(-kA), a.odd, a.even);
    out[3] = V::fma(V::set(kB), b.odd, b.even);
    out[4] = V::fma(V::set(-kB), b.odd, b.even);
    out[5] = at_infinity;
  }
  // The odd ones are multiplied, by the denominator as well.
  static void filter_values(Reg at_zero, const Halves& a, const Halves& b, Reg at_infinity,
                            Reg (&out)[6]) {
    out[0] = at_zero;
    out[1] = V::add(a.even, a.odd);
    out[2] = V::subtract(a.even, a.odd);
    out[3] = V::add(b.even, b.odd);
    out[4] = V::subtract(b.even, b.odd);
    out[5] = at_infinity;
  }

  static void input(const Reg (&d)[6], Reg (&out)[6]) {
    const auto upper = [&](float times, int i) { return V::fma(V::set(times), d[i], d[i + 2]); };
    const Reg sum = V::set(-2.5f);
    values(V::fma(sum, d[2], V::add(d[0], d[4])), {upper(-2.0f, 2), upper(-2.0f, 1)},
           {upper(-0.5f, 2), upper(-0.5f, 1)}, V::fma(sum, d[3], V::add(d[1], d[5])), out);
  }
};

template <class V>
struct WinogradTransform<V, 4, 3> : SixPoints<V> {
  using Reg = typename V::Reg;
  using SixPoints<V>::kA, SixPoints<V>::kB, SixPoints<V>::kOverA, SixPoints<V>::kOverB;
  static constexpr int kOutputs = 4, kTaps = 3;
  static void filter(const Reg (&g)[3], Reg (&out)[6]) {
    const auto even = [&](float over, float square) {
      return V::multiply(V::set(over), V::fma(V::set(square), g[2], g[0]));
    };
    const auto odd = [&](float over) { return V::multiply(V::set(over), g[1]); };
    SixPoints<V>::filter_values(g[0], {even(kOverA, 0.5f), odd(kOverA * kA)},
                                {even(kOverB, 2.0f), odd(kOverB * kB)}, g[2], out);
  }
  static void output(const Reg (&m)[6], Reg (&y)[4]) {
    const Reg sum_a = V::add(m[1], m[2]), difference_a = V::subtract(m[1], m[2]);
    const Reg sum_b = V::add(m[3], m[4]), difference_b = V::subtract(m[3], m[4]);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::fma(V::set(kA), difference_a, V::multiply(V::set(kB), difference_b));
    y[2] = V::fma(V::set(0.5f), sum_a, V::add(sum_b, sum_b));
    y[3] = V::fma(V::set(kA / 2), difference_a, V::fma(V::set(2 * kB), difference_b, m[5]));
  }
  static void dy(const Reg (&d)[4], Reg (&out)[6]) {
    const auto half = [&](float square, int i) { return V::fma(V::set(square), d[i + 2], d[i]); };
    SixPoints<V>::values(d[0], {half(0.5f, 0), half(0.5f, 1)}, {half(2.0f, 0), half(2.0f, 1)}, d[3],
                         out);
  }
  static void dfilter(const Reg (&m)[6], Reg (&g)[3]) {
    const Reg even_a = V::multiply(V::set(kOverA), V::add(m[1], m[2]));
    const Reg even_b = V::multiply(V::set(kOverB), V::add(m[3], m[4]));
    g[0] = V::add(m[0], V::add(even_a, even_b));
    g[1] = V::fma(V::set(kOverA * kA), V::subtract(m[1], m[2]),
                  V::multiply(V::set(kOverB * kB), V::subtract(m[3], m[4])));
    g[2] = V::fma(V::set(0.5f), even_a, V::fma(V::set(2.0f), even_b, m[5]));
  }
};

template <class V>
struct WinogradTransform<V, 3, 4> : SixPoints<V> {
  using Reg = typename V::Reg;
  using SixPoints<V>::kA, SixPoints<V>::kB, SixPoints<V>::kOverA, SixPoints<V>::kOverB;
  static constexpr int kOutputs = 3, kTaps = 4;
  static void filter(const Reg (&g)[4], Reg (&out)[6]) {
    const auto half = [&](float over, float square, int i) {
      return V::multiply(V::set(over), V::fma(V::set(square), g[i + 2], g[i]));
    };
    SixPoints<V>::filter_values(g[0], {half(kOverA, 0.5f, 0), half(kOverA * kA, 0.5f, 1)},
                                {half(kOverB, 2.0f, 0), half(kOverB * kB, 2.0f, 1)}, g[3], out);
  }
  static void output(const Reg (&m)[6], Reg (&y)[3]) {
    const Reg sum_a = V::add(m[1], m[2]), sum_b = V::add(m[3], m[4]);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::fma(V::set(kA), V::subtract(m[1], m[2]),
                  V::multiply(V::set(kB), V::subtract(m[3], m[4])));
    y[2] = V::fma(V::set(0.5f), sum_a, V::fma(V::set(2.0f), sum_b, m[5]));
  }
};

template <class V>
struct WinogradTransform<V, 2, 5> : SixPoints<V> {
  using Reg = typename V::Reg;
  using SixPoints<V>::kA, SixPoints<V>::kB, SixPoints<V>::kOverA, SixPoints<V>::kOverB;
  static constexpr int kOutputs = 2, kTaps = 5;
  static void filter(const Reg (&g)[5], Reg (&out)[6]) {
    const auto even = [&](float over, float square) {
      const Reg upper = V::fma(V::set(square), g[4], g[2]);
      return V::multiply(V::set(over), V::fma(V::set(square), upper, g[0]));
    };
    const auto odd = [&](float over, float square) {
      return V::multiply(V::set(over), V::fma(V::set(square), g[3], g[1]));
    };
    SixPoints<V>::filter_values(g[0], {even(kOverA, 0.5f), odd(kOverA * kA, 0.5f)},
                                {even(kOverB, 2.0f), odd(kOverB * kB, 2.0f)}, g[4], out);
  }
  static void output(const Reg (&m)[6], Reg (&y)[2]) {
    y[0] = V::add(V::add(m[0], V::add(m[1], m[2])), V::add(m[3], m[4]));
    y[1] = V::fma(V::set(kA), V::subtract(m[1], m[2]),
                  V::fma(V::set(kB), V::subtract(m[3], m[4]), m[5]));
  }
};

template <class V>
struct WinogradTransform<V, 5, 2> : SixPoints<V> {
  using Reg = typename V::Reg;
  using SixPoints<V>::kA, SixPoints<V>::kB, SixPoints<V>::kOverA, SixPoints<V>::kOverB;
  static constexpr int kOutputs = 5, kTaps = 2;
  static void filter(const Reg (&g)[2], Reg (&out)[6]) {
    const auto times = [&](float factor, int i) { return V::multiply(V::set(factor), g[i]); };
    SixPoints<V>::filter_values(g[0], {times(kOverA, 0), times(kOverA * kA, 1)},
                                {times(kOverB, 0), times(kOverB * kB, 1)}, g[1], out);
  }
  static void output(const Reg (&m)[6], Reg (&y)[5]) {
    const Reg sum_a = V::add(m[1], m[2]), difference_a = V::subtract(m[1], m[2]);
    const Reg sum_b = V::add(m[3], m[4]), difference_b = V::subtract(m[3], m[4]);
    const Reg odd_b = V::multiply(V::set(kB), difference_b);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::fma(V::set(kA), difference_a, odd_b);
    y[2] = V::fma(V::set(0.5f), sum_a, V::add(sum_b, sum_b));
    y[3] = V::fma(V::set(kA / 2), difference_a, V::add(odd_b, odd_b));
    y[4] = V::fma(V::set(0.25f), sum_a, V::fma(V::set(4.0f), sum_b, m[5]));
  }
};

// along_columns() of each column and then along_rows() of each row of an InH x InW tile.
template <class V, int InH, int InW, int OutH, int OutW, class Columns, class Rows, class Load,
          class Store>
void transform_2d(const Columns& along_columns, const Rows& along_rows, const Load& load,
                  const Store& store) {
  typename V::Reg rows[OutH][InW];
#pragma GCC unroll 6
  for (int j = 0; j < InW; ++j) {
    typename V::Reg from[InH], column[OutH];
#pragma GCC unroll 6
    for (int i = 0; i < InH; ++i) from[i] = load(i, j);
    along_columns(from, column);
#pragma GCC unroll 6
    for (int i = 0; i < OutH; ++i) rows[i][j] = column[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < OutH; ++i) {
    typename V::Reg row[OutW];
    along_rows(rows[i], row);
#pragma GCC unroll 6
    for (int j = 0; j < OutW; ++j) store(i, j, row[j]);
  }
}

// A dimension of the output, cut into tiles. Under a filter of dilation d, the places 0, d, 2d ... make up
// a convolution without dilation, as do those that begin at 1 .. d - 1 (phases). A tile is of one phase;
// the tiles of all phases alternate, so that neighbours share cache lines.
struct WinogradTiles {
  int64_t size, dilation, outputs, count;

  WinogradTiles(int64_t size, int64_t dilation, int outputs)
      : size(size), dilation(dilation), outputs(outputs) {
    // The first phases may have one place more than others, and so one tile more.
    const int64_t of_phase = size / dilation, longer = size % dilation;
    count = dilation * ceil_div(of_phase, outputs) + (of_phase % outputs == 0 ? longer : 0);
  }
  int64_t first(int64_t tile) const {
    if (dilation == 1) return tile * outputs;
    return tile / dilation * outputs * dilation + tile % dilation;
  }
  // How many outputs there are of the tile that begins there.
  int64_t outputs_from(int64_t first) const {
    const int64_t left = size - first;
    return min64(outputs, dilation == 1 ? left : ceil_div(left, dilation));
  }
};

// Whether a tile asks for what the next one reads and writes, where no cache holds the tensors. Where one does, even to
// test for it costs a twentieth: there is code for either. With AVX-512 it has not been tried.
template <class V>
constexpr bool kTilesAsk = 2 * V::kWidth == kLine;

// A line of each pixel that a tile of so many columns does not share with the one to its left.
template <int Rows, int Columns>
inline void ask_for_pixels(const float* at, int64_t next_row, int64_t next_pixel) {
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i, at += next_row) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) __builtin_prefetch(at + j * next_pixel, 0, 2);
  }
}

// "12 tiles of 4 x 4, 6 a block": once, not in each of the templates.
[[gnu::noinline]] inline std::string tiles_in_words(int64_t tiles, int64_t out_h, int64_t out_w,
                                                    const char* before, int64_t number,
                                                    const char* behind) {
  return std::to_string(tiles) + " tiles of " + std::to_string(out_h) + " x " +
         std::to_string(out_w) + before + std::to_string(number) + behind;
}

// The tiles of a batch of images.
struct WinogradGrid {
  WinogradTiles down, across;

  int64_t count(int64_t images) const { return images * down.count * across.count; }
  // The first output of a tile: its image, row and column.
  struct Corner {
    int64_t n, row, column;
  };
  Corner corner(int64_t tile) const { return Walk(*this, tile).corner(); }

  // From tile to tile, without a division a tile: beside one of few pixels those count.
  class Walk {
   public:
    Walk(const WinogradGrid& grid, int64_t tile)
        : grid_(grid), n_(tile / grid.across.count / grid.down.count),
          down_(tile / grid.across.count % grid.down.count), across_(tile % grid.across.count) {}
    Corner corner() const { return {n_, grid_.down.first(down_), grid_.across.first(across_)}; }
    void next() {
      if (++across_ < grid_.across.count) return;
      across_ = 0;
      if (++down_ < grid_.down.count) return;
      down_ = 0;
      ++n_;
    }

   private:
    const WinogradGrid& grid_;
    int64_t n_, down_, across_;
  };
};

}  // namespace
}  // namespace fastconv::cpu
