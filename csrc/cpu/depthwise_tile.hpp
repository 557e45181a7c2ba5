// What the kernels of depthwise convolutions share: a tile, its vectors of channels, and asking for the
// rows below it.
#pragma once

#include <cstdint>

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {
namespace {

// Rows of some columns of some channels. What is called the source is x, or, of dgrad, dy.
struct DepthwiseTile {
  // The first channel of the source pixel that the tile's first tap meets; it may lie outside.
  const float* source;
  const float* mask;  // likewise: the source counts where it is positive; null for everywhere
  int64_t source_row, source_column;  // floats
  int64_t row_begin, row_end;         // the tile's source rows that exist
  int64_t column_begin, column_end;   // the tile's source columns that exist
  int64_t taps;                       // of a filter of one row
  int64_t step;         // likewise: source columns from pixel to pixel, or a cell's of dx
  const float* filter;  // of the first tap and channel
  int64_t filter_row, filter_column;  // floats from tap to tap
  const float* bias;                  // null for none
  bool relu;
  float ceiling;  // with relu
  float* out;     // fprop and dgrad; wgrad: dy, read only
  int64_t out_row, out_column;
  int64_t rows, columns;  // of the output; of a scattering dgrad, cells
  int64_t channels;
  // dgrad with stride: the tile's output rows and columns that exist.
  int64_t out_row_begin, out_row_end, out_column_begin, out_column_end;
  float* scratch;  // R * R vectors, for as many neighbouring vectors as a tile has
  // wgrad: the sums, [vector][tap][lane], and those of the bias, [vector][lane], or null.
  float *sums, *bias_sums;
  // Whether to ask, a column at a time, for the rows that the tile below needs and this one does not; of filters of
  // one row, for the pixels that come next.
  bool asks_below;
};

using DepthwiseTileFunction = void (*)(const DepthwiseTile&);

// Neighbouring vectors of channels, loaded and stored whole or by masks.
template <class V, int Vectors, bool Whole>
struct ChannelVectors {
  static constexpr int kVectors = Vectors;
  typename V::Tail tails[Vectors];

  explicit ChannelVectors(int64_t channels) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t own = max64(0, min64(V::kWidth, channels - v * V::kWidth));
      tails[v] = V::tail(static_cast<int>(own));
    }
  }
  typename V::Reg load(const float* p, int v) const {
    return Whole ? V::load(p + v * V::kWidth) : V::load(p + v * V::kWidth, tails[v]);
  }
  // `mask`: null for none.
  typename V::Reg load(const float* p, const float* mask, int64_t at, int v) const {
    return mask ? V::where_positive(load(mask + at, v), load(p + at, v)) : load(p + at, v);
  }
  void store(float* p, typename V::Reg value, int v) const {
    if (Whole) {
      V::store(p + v * V::kWidth, value);
    } else {
      V::store(p + v * V::kWidth, value, tails[v]);
    }
  }
};

// Calls body(first channel, ChannelVectors) for all channels of a tile. The last of several vectors
// may have none, where masks are free; else all are whole.
template <class V, int Vectors, class Body>
inline __attribute__((always_inline)) void for_each_channel_vector(int64_t channels,
                                                                   const Body& body) {
  for (int64_t c = 0; c < channels; c += Vectors * V::kWidth) {
    if (!V::kFreeMasks && (Vectors > 1 || c + V::kWidth <= channels)) {
      body(c, ChannelVectors<V, Vectors, true>(channels - c));
    } else if constexpr (V::kFreeMasks || Vectors == 1) {
      body(c, ChannelVectors<V, Vectors, false>(channels - c));
    }
  }
}

// `floats` channels of a pixel and of those in the rows below it. Tiles go down the image: the hardware
// does not ask for their rows in time.
template <int Rows, bool Writes>
inline __attribute__((always_inline)) void ask_for_rows(const float* below, int64_t row,
                                                        int64_t floats) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int64_t at = 0; at < floats; at += kLine) {
      __builtin_prefetch(below + i * row + at, Writes ? 1 : 0, 2);
    }
}

// A copy of the taps, [tap][vector][lane], and behind it what the sums begin with.
template <class V, int R, class Channels>
inline __attribute__((always_inline)) void copy_depthwise_taps(const DepthwiseTile& t, int64_t c,
                                                               const Channels& channels) {
  float* to = t.scratch;
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < R; ++s) {
      const float* const from = t.filter + r * t.filter_row + s * t.filter_column + c;
#pragma GCC unroll 4
      for (int v = 0; v < Channels::kVectors; ++v, to += V::kWidth) {
        V::store(to, channels.load(from, v));
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Channels::kVectors; ++v, to += V::kWidth) {
    V::store(to, t.bias ? channels.load(t.bias + c, v) : V::zero());
  }
}

// The part of the bias gradient that is a tile's.
template <class V, bool Masked, class Channels>
inline __attribute__((always_inline)) void add_bias_sums(const DepthwiseTile& t, int64_t c,
                                                         const Channels& channels) {
  for (int v = 0; v < Channels::kVectors; ++v) {
    float* const to = t.bias_sums + c + v * V::kWidth;
    typename V::Reg sum = V::load(to);
    for (int64_t row = 0; row < t.rows; ++row) {
      for (int64_t j = 0; j < t.columns; ++j) {
        sum = V::add(sum, channels.load(t.out + c, Masked ? t.mask + c : nullptr,
                                        row * t.out_row + j * t.out_column, v));
      }
    }
    V::store(to, sum);
  }
}

}  // namespace
}  // namespace fastconv::cpu
