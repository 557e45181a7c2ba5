// Depthwise convolutions: one input channel a group. Those of square filters of 3, 5 or 7 taps a
// side, stride 1 or 2 and channel multiplier 1 have the kernels below, with 16 registers also fprop and
// dgrad of one row of as many taps, stride 1; what computes the others is in lanes.hpp.
//
// A multiply-add of a depthwise convolution has two operands of its own: what counts is how often a
// vector is loaded, and from which cache. A tile is some rows of some columns of one to four vectors
// of channels. The kernel goes along the columns of the source; the sums of the output columns that
// a source column meets stay in registers, and move on by one as a column is done. A source vector
// is thereby loaded once a tile for all its taps: with 4 rows of a 3 x 3 filter, 6 loads for 36
// multiply-adds, and none is needed twice from the first-level cache, which the rows of all
// channels would not fit in. The tile needs no particular width, so borders cost nothing but
// themselves: a column in padding is left out, and so is a row (not multiplied by zero).
//
// The taps come from a copy in the first-level cache, one load for all rows of the tile.
//
// dgrad of stride 1 is fprop with the filter turned round. With stride 2 it scatters: a column of
// dy adds to the columns of dx that it meets, in registers likewise, so that dy is read once for
// all residue classes. wgrad holds the sums of the taps in registers, of as many filter rows as
// there are registers for. With 16 registers some of this is faster row by row, and so are most edges:
// depthwise_rows.hpp.
//
// Of a dilated filter, the pixels that meet the same of the source lie as far apart as the taps: a tile
// takes these.
#pragma once

#include <string>
#include <type_traits>

#include "cpu/depthwise_rows.hpp"
#include "cpu/depthwise_tile.hpp"
#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/lanes.hpp"

namespace fastconv::cpu {
namespace {

enum class DepthwiseWalk { gather, scatter, wgrad };

// Vectors of channels that a tile of 3 x 3 taps has, registers allowing. A source of C channels has
// its pixels C * 4 bytes apart: of one vector, they may all lie in one bank in four of the
// second-level cache, which then gives half of what it can.
template <class V, int R>
constexpr int kDepthwiseVectors = V::kRegisters >= 32 && R == 3 ? 2 : 1;

// The same of a tile that takes whole lines of channels: with half a line a vector, AVX2 otherwise reads
// each line twice.
template <class V, int R, DepthwiseWalk kWalk>
constexpr int kDepthwiseLineVectors = V::kWidth != 8 || R != 3          ? kDepthwiseVectors<V, R>
                                      : kWalk == DepthwiseWalk::scatter ? 2
                                                                        : 4;

// fprop, and dgrad of stride 1: the rows of a tile, as many as there are registers for beside a
// column of the source and a tap. None where there are not enough for one; then every
// multiply-add reads its tap from the first-level cache.
template <class V, int R, int Step, int Vectors>
constexpr int depthwise_rows_in_registers() {
  constexpr int kLive = (R - 1) / Step + 1;
  for (int rows = 4; rows > 0; --rows) {
    const int sums = Vectors * rows * kLive;
    if (sums + (rows - 1) * Step + R + 1 < V::kRegisters) return rows;
  }
  return 0;
}

template <class V, int R, int Step, int Vectors>
constexpr int kDepthwiseRows =
    max64(Vectors > 2 ? 1 : 2, depthwise_rows_in_registers<V, R, Step, Vectors>());

// `Edge`: some source rows may be missing, above no more than R; or some rows of the tile.
template <class V, int R, int Step, int Rows, bool Edge, bool Masked, class Channels>
inline __attribute__((always_inline)) void depthwise_vectors(const DepthwiseTile& t, int64_t c,
                                                             const Channels& channels) {
  using Reg = typename V::Reg;
  constexpr int kVectors = Channels::kVectors;
  constexpr bool kHoldsColumn = !Edge && depthwise_rows_in_registers<V, R, Step, kVectors>() > 1;
  constexpr int kSourceRows = (Rows - 1) * Step + R;
  constexpr int kLive = (R - 1) / Step + 1;  // output columns that a source column meets
  copy_depthwise_taps<V, R>(t, c, channels);
  const float* const taps = t.scratch;
  Reg sum[kLive][Rows][kVectors];
  const auto start = [&](int l) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Reg value = V::load(taps + (R * R * kVectors + v) * V::kWidth);
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) sum[l][row][v] = value;
    }
  };
#pragma GCC unroll 8
  for (int l = 0; l < kLive; ++l) start(l);

  // The source columns of output column m: those from m * Step on, as many as the stride.
  const float* source = t.source + c;
  const float* mask = Masked ? t.mask + c : nullptr;
  const int64_t source_row = t.source_row, row_begin = t.row_begin, row_end = t.row_end;
  constexpr int64_t kFloats = kVectors * V::kWidth;
  const bool asks_below = t.asks_below && c % kLine == 0;
  const auto meet = [&]<bool Checked>(std::bool_constant<Checked>,
                                      int64_t m) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int d = 0; d < Step; ++d) {
      if (Checked && (m * Step + d < t.column_begin || m * Step + d >= t.column_end)) continue;
      const int64_t column = d * t.source_column;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto tap = [&](int r, int s) {
          return V::load(taps + ((r * R + s) * kVectors + v) * V::kWidth);
        };
        if constexpr (kHoldsColumn) {
          Reg a[kSourceRows];
#pragma GCC unroll 16
          for (int q = 0; q < kSourceRows; ++q) {
            a[q] = channels.load(source, mask, column + q * source_row, v);
          }
#pragma GCC unroll 8
          for (int l = 0; l < kLive; ++l) {
            const int s = d + l * Step;
            if (s >= R || (Checked && (m < l || m - l >= t.columns))) continue;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
              const Reg b = tap(r, s);
#pragma GCC unroll 8
              for (int row = 0; row < Rows; ++row) {
                sum[l][row][v] = V::fma(a[row * Step + r], b, sum[l][row][v]);
              }
            }
          }
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < kSourceRows; ++q) {
            if (Edge && ((q < R && q < row_begin) || q >= row_end)) continue;
            const Reg a = channels.load(source, mask, column + q * source_row, v);
#pragma GCC unroll 8
            for (int l = 0; l < kLive; ++l) {
              const int s = d + l * Step;
              if (s >= R || (Checked && (m < l || m - l >= t.columns))) continue;
#pragma GCC unroll 8
              for (int row = 0; row < Rows; ++row) {
                const int r = q - row * Step;
                if (r < 0 || r >= R) continue;
                sum[l][row][v] = V::fma(a, tap(r, s), sum[l][row][v]);
              }
            }
          }
        }
      }
    }
    source += Step * t.source_column;
    if (Masked) mask += Step * t.source_column;
  };
  float* out = t.out + c;
  const int64_t out_row = t.out_row;
  const bool relu = t.relu;
  const int64_t rows = t.rows;
  const auto finish = [&]() __attribute__((always_inline)) {
    const auto store_all = [&](const auto& activation) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) {
        if (Edge && row >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          channels.store(out + row * out_row, activation(sum[kLive - 1][row][v]), v);
        }
      }
    };
    if (relu) {
      const Reg ceiling = V::set(t.ceiling);
      store_all([&](Reg value) { return relu_to<V>(ceiling, value); });
    } else {
      store_all([](Reg value) { return value; });
    }
    out += t.out_column;
  };
  const auto move_on = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int l = kLive - 1; l > 0; --l) {
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[l][row][v] = sum[l - 1][row][v];
      }
    }
    start(0);
  };

  const int64_t end = t.columns + kLive - 1;
  const int64_t inner = max64(kLive - 1, ceil_div(t.column_begin, Step));
  const int64_t inner_end = min64(t.columns, t.column_end / Step);
  for (int64_t m = 0; m < end;) {
    if (m == inner && inner < inner_end) {
      for (; m < inner_end; ++m) {
        if (asks_below) {
#pragma GCC unroll 2
          for (int d = 0; d < Step; ++d) {
            const int64_t below = kSourceRows * source_row + d * t.source_column;
            ask_for_rows<Rows * Step, false>(source + below, source_row, kFloats);
            if (Masked) ask_for_rows<Rows * Step, false>(mask + below, source_row, kFloats);
          }
          ask_for_rows<Rows, true>(out + Rows * out_row, out_row, kFloats);
        }
        meet(std::false_type{}, m);
        finish();
        move_on();
      }
      continue;
    }
    meet(std::true_type{}, m);
    if (m >= kLive - 1) finish();
    move_on();
    ++m;
  }
}

template <class V, int R, int Step, int Vectors, int Rows, bool Edge, bool Masked>
void depthwise_tile(const DepthwiseTile& t) {
  for_each_channel_vector<V, Vectors>(
      t.channels, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
        depthwise_vectors<V, R, Step, Rows, Edge, Masked>(t, c, channels);
      });
}

// dgrad with stride: output rows and columns in cells of Step x Step. Source column m begins cell
// column m, and adds to it and to those behind it that a filter's width reaches.
template <class V, int R, int Step, int Vectors>
constexpr int depthwise_cells_in_registers() {
  constexpr int kLive = (R - 1) / Step + 1;
  for (int cells : {2, 1}) {
    if (Vectors * cells * Step * R + cells + kLive < V::kRegisters) return cells;
  }
  return 0;
}

template <class V, int R, int Step, int Vectors>
constexpr int kDepthwiseCellRows = max64(1, depthwise_cells_in_registers<V, R, Step, Vectors>());

// `Rows` of cells. `Edge`: some source rows, or some output rows, may not exist.
template <class V, int R, int Step, int Rows, bool Edge, bool Masked, class Channels>
inline __attribute__((always_inline)) void depthwise_scatter_vectors(const DepthwiseTile& t,
                                                                     int64_t c,
                                                                     const Channels& channels) {
  using Reg = typename V::Reg;
  constexpr int kVectors = Channels::kVectors;
  constexpr bool kHoldsColumn = !Edge && depthwise_cells_in_registers<V, R, Step, kVectors>() > 0;
  constexpr int kLive = (R - 1) / Step + 1;  // cells that a source pixel meets in each direction
  constexpr int kSourceRows = Rows + kLive - 1, kOutRows = Rows * Step;
  copy_depthwise_taps<V, R>(t, c, channels);
  const float* const taps = t.scratch;
  const auto tap = [&](int r, int s, int v) {
    return V::load(taps + ((r * R + s) * kVectors + v) * V::kWidth);
  };
  Reg sum[R][kOutRows][kVectors];  // of columns, from those of the source column's own cell on
#pragma GCC unroll 8
  for (int s = 0; s < R; ++s) {
#pragma GCC unroll 8
    for (int row = 0; row < kOutRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[s][row][v] = V::zero();
    }
  }

  const float* source = t.source + c;
  const float* mask = Masked ? t.mask + c : nullptr;
  constexpr int64_t kFloats = kVectors * V::kWidth;
  const bool asks_below = t.asks_below && c % kLine == 0;
  const auto meet = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kHoldsColumn) {
        Reg a[kSourceRows];
#pragma GCC unroll 8
        for (int q = 0; q < kSourceRows; ++q) {
          a[q] = channels.load(source, mask, q * t.source_row, v);
        }
#pragma GCC unroll 8
        for (int r = R - 1; r >= 0; --r) {
#pragma GCC unroll 8
          for (int s = 0; s < R; ++s) {
            const Reg b = tap(r, s, v);
#pragma GCC unroll 2
            for (int cell = 0; cell < Rows; ++cell) {
              Reg& to = sum[s][cell * Step + r % Step][v];
              to = V::fma(a[cell + kLive - 1 - r / Step], b, to);
            }
          }
        }
      } else {
#pragma GCC unroll 8
        for (int q = 0; q < kSourceRows; ++q) {
          if (Edge && (q < t.row_begin || q >= t.row_end)) continue;
          const Reg a = channels.load(source, mask, q * t.source_row, v);
#pragma GCC unroll 8
          for (int r = R - 1; r >= 0; --r) {
            const int cell = q - (kLive - 1) + r / Step;
            if (cell < 0 || cell >= Rows) continue;
#pragma GCC unroll 8
            for (int s = 0; s < R; ++s) {
              Reg& to = sum[s][cell * Step + r % Step][v];
              to = V::fma(a, tap(r, s, v), to);
            }
          }
        }
      }
    }
  };
  float* out = t.out + c;
  const auto finish = [&]<bool Checked>(std::bool_constant<Checked>,
                                        int64_t m) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int b = 0; b < Step; ++b) {
      const int64_t column = m * Step + b;
      if (Checked && (column < t.out_column_begin || column >= t.out_column_end)) continue;
#pragma GCC unroll 8
      for (int row = 0; row < kOutRows; ++row) {
        if (Edge && (row < t.out_row_begin || row >= t.out_row_end)) continue;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          channels.store(out + row * t.out_row + b * t.out_column, sum[b][row][v], v);
        }
      }
    }
    // The columns move on by a cell.
#pragma GCC unroll 8
    for (int s = 0; s < R; ++s) {
#pragma GCC unroll 8
      for (int row = 0; row < kOutRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[s][row][v] = s + Step < R ? sum[s + Step][row][v] : V::zero();
        }
      }
    }
    source += t.source_column;
    if (Masked) mask += t.source_column;
    out += Step * t.out_column;
  };

  // Cell columns -(kLive - 1) and on are met, those from 0 on are stored.
  source -= (kLive - 1) * t.source_column;
  if (Masked) mask -= (kLive - 1) * t.source_column;
  out -= (kLive - 1) * Step * t.out_column;
  const int64_t inner = max64(max64(0, t.column_begin), ceil_div(t.out_column_begin, Step));
  const int64_t inner_end = min64(min64(t.columns, t.column_end), t.out_column_end / Step);
  for (int64_t m = -(kLive - 1); m < t.columns;) {
    if (m == inner && inner < inner_end) {
      for (; m < inner_end; ++m) {
        if (asks_below) {
          const int64_t below = kSourceRows * t.source_row;
          ask_for_rows<Rows, false>(source + below, t.source_row, kFloats);
          if (Masked) ask_for_rows<Rows, false>(mask + below, t.source_row, kFloats);
#pragma GCC unroll 2
          for (int b = 0; b < Step; ++b) {
            ask_for_rows<kOutRows, true>(out + kOutRows * t.out_row + b * t.out_column, t.out_row,
                                         kFloats);
          }
        }
        meet();
        finish(std::false_type{}, m);
      }
      continue;
    }
    if (m >= t.column_begin && m < t.column_end) meet();
    finish(std::true_type{}, m);
    ++m;
  }
}

template <class V, int R, int Step, int Vectors, int Rows, bool Edge, bool Masked>
void depthwise_scatter_tile(const DepthwiseTile& t) {
  for_each_channel_vector<V, Vectors>(
      t.channels, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
        depthwise_scatter_vectors<V, R, Step, Rows, Edge, Masked>(t, c, channels);
      });
}

// wgrad: `rows` of dy, and so many filter rows at a time: all of them, half, or one, as there are
// registers for with a source column and a vector of dy, which comes from the first-level cache.
struct DepthwiseWgradTile {
  int rows, taps;
};

template <class V, int R, int Step, int Vectors>
constexpr DepthwiseWgradTile depthwise_wgrad_tile_in_registers() {
  for (int taps : {R, (R + 1) / 2, R / 2, 1}) {
    const int sums = Vectors * taps * R;
    for (int rows = 4; rows > 1; --rows) {
      if (sums + (rows - 1) * Step + taps + 1 < V::kRegisters) return {rows, taps};
    }
  }
  return {1, 1};
}

// Filter rows from `first` on, `Taps` of them.
template <class V, int R, int Step, int Rows, int Taps, bool Edge, bool Masked, class Channels>
inline __attribute__((always_inline)) void depthwise_wgrad_vectors(const DepthwiseTile& t,
                                                                   int first, int64_t c,
                                                                   const Channels& channels) {
  using Reg = typename V::Reg;
  constexpr int kVectors = Channels::kVectors;
  constexpr int kSourceRows = (Rows - 1) * Step + Taps;
  constexpr int kLive = (R - 1) / Step + 1;  // columns of dy that a source column meets
  float* const sums = t.sums + (c / V::kWidth * R + first) * R * V::kWidth;
  const auto place = [&](int r, int s, int v) { return sums + ((v * R + r) * R + s) * V::kWidth; };
  Reg sum[Taps][R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Taps; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < R; ++s) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][s][v] = V::load(place(r, s, v));
    }
  }

  const float* source = t.source + first * t.source_row + c;
  const float* dy = t.out + c;
  const float* mask = Masked ? t.mask + c : nullptr;
  const int64_t row_begin = t.row_begin - first, row_end = t.row_end - first;
  const int64_t source_row = t.source_row, out_row = t.out_row, out_column = t.out_column;
  constexpr int64_t kFloats = kVectors * V::kWidth;
  const bool asks_below = t.asks_below && first == 0 && c % kLine == 0;
  const auto meet = [&]<bool Checked>(std::bool_constant<Checked>,
                                      int64_t m) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int d = 0; d < Step; ++d) {
      if (Checked && (m * Step + d < t.column_begin || m * Step + d >= t.column_end)) continue;
      const int64_t column = d * t.source_column;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (!Edge) {
          Reg a[kSourceRows];
#pragma GCC unroll 16
          for (int q = 0; q < kSourceRows; ++q) {
            a[q] = channels.load(source + column + q * source_row, v);
          }
#pragma GCC unroll 8
          for (int l = 0; l < kLive; ++l) {
            const int s = d + l * Step;
            if (s >= R || (Checked && (m < l || m - l >= t.columns))) continue;
#pragma GCC unroll 8
            for (int row = 0; row < Rows; ++row) {
              const Reg b = channels.load(dy, mask, row * out_row - l * out_column, v);
#pragma GCC unroll 8
              for (int r = 0; r < Taps; ++r) {
                sum[r][s][v] = V::fma(a[row * Step + r], b, sum[r][s][v]);
              }
            }
          }
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < kSourceRows; ++q) {
            if (q < row_begin || q >= row_end) continue;
            const Reg a = channels.load(source + column + q * source_row, v);
#pragma GCC unroll 8
            for (int l = 0; l < kLive; ++l) {
              const int s = d + l * Step;
              if (s >= R || (Checked && (m < l || m - l >= t.columns))) continue;
#pragma GCC unroll 8
              for (int row = 0; row < Rows; ++row) {
                const int r = q - row * Step;
                if (r < 0 || r >= Taps) continue;
                const Reg b = channels.load(dy, mask, row * out_row - l * out_column, v);
                sum[r][s][v] = V::fma(a, b, sum[r][s][v]);
              }
            }
          }
        }
      }
    }
    source += Step * t.source_column;
    dy += t.out_column;
    if (Masked) mask += t.out_column;
  };
  const int64_t end = t.columns + kLive - 1;
  const int64_t inner = max64(kLive - 1, ceil_div(t.column_begin, Step));
  const int64_t inner_end = min64(t.columns, t.column_end / Step);
  for (int64_t m = 0; m < end;) {
    if (m == inner && inner < inner_end) {
      for (; m < inner_end; ++m) {
        if (asks_below) {
#pragma GCC unroll 2
          for (int d = 0; d < Step; ++d) {
            const int64_t below = ((Rows - 1) * Step + R) * source_row + d * t.source_column;
            ask_for_rows<Rows * Step, false>(source + below, source_row, kFloats);
          }
          ask_for_rows<Rows, false>(dy + Rows * out_row, out_row, kFloats);
          if (Masked) ask_for_rows<Rows, false>(mask + Rows * out_row, out_row, kFloats);
        }
        meet(std::false_type{}, m);
      }
      continue;
    }
    meet(std::true_type{}, m);
    ++m;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Taps; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < R; ++s) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(place(r, s, v), sum[r][s][v]);
    }
  }
}

template <class V, int R, int Step, int Vectors, int Rows, bool Edge, bool Masked>
void depthwise_wgrad_tile(const DepthwiseTile& t) {
  constexpr int kTaps = depthwise_wgrad_tile_in_registers<V, R, Step, Vectors>().taps;
  constexpr int kRest = R % kTaps;
  for_each_channel_vector<V, Vectors>(
      t.channels, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
        for (int first = 0; first + kTaps <= R; first += kTaps) {
          depthwise_wgrad_vectors<V, R, Step, Rows, kTaps, Edge, Masked>(t, first, c, channels);
        }
        if constexpr (kRest > 0) {
          depthwise_wgrad_vectors<V, R, Step, Rows, kRest, Edge, Masked>(t, R - kRest, c, channels);
        }
        if (t.bias_sums) add_bias_sums<V, Masked>(t, c, channels);
      });
}

// The kernels of one direction: for tiles all of whose rows exist, and for others.
struct DepthwiseKernels {
  static constexpr int kMostRows = 4;

  int64_t vectors;                   // of a tile
  int64_t rows;                      // of a tile: of the output; of a scattering dgrad, cells
  int64_t source_rows, source_step;  // of such a tile; from tile row to tile row
  int64_t cell;                      // output rows of a tile row; 0 for wgrad, which has none
  int64_t missing;                   // source rows that may be missing above in `edge`
  DepthwiseTileFunction whole;
  // By rows - 1. Where there is none, rows go one by one.
  DepthwiseTileFunction edge[kMostRows];
  bool by_rows = false;  // `whole` takes any tile
  bool stages = false;   // of a copy of its source, one line of channels at a time

  void run(DepthwiseTile& t) const {
    if (by_rows) return whole(t);
    if (t.rows == rows && t.row_begin == 0 && t.row_end >= source_rows && t.out_row_begin == 0 &&
        t.out_row_end >= rows * cell) {
      return whole(t);
    }
    t.row_end = min64(t.row_end, source_rows - (rows - t.rows) * source_step);
    t.out_row_end = min64(t.out_row_end, t.rows * cell);
    if (t.row_begin <= missing && edge[t.rows - 1]) return edge[t.rows - 1](t);
    for (int64_t row = 0; row < t.rows; ++row) {
      DepthwiseTile one = t;
      one.rows = 1;
      one.source += row * source_step * t.source_row;
      one.out += row * t.out_row;
      if (t.mask) one.mask += row * (cell > 0 ? source_step * t.source_row : t.out_row);
      one.row_begin = min64(missing, max64(0, t.row_begin - row * source_step));
      one.row_end = min64(t.row_end - row * source_step, source_rows - (rows - 1) * source_step);
      edge[0](one);
    }
  }
};

// Whether dgrad and wgrad of filters of this size mask dy as they read it; for the others it is
// done beforehand.
inline bool depthwise_kernels_mask(int64_t taps) { return taps == 3; }

// Of wgrad's tiles of `most` rows, which have one of their own at an edge: not all, they take long to
// compile.
constexpr bool has_edge_kernel(int rows, int most) { return rows == 1 || rows == most; }

// Whether 3 x 3 wgrad and larger filters' fprop and dgrad go row by row throughout
// (depthwise_rows.hpp): with few registers, tiles of several rows have to read taps, or dy, anew for
// each multiply-add or two.
template <class V>
constexpr bool kByRows = V::kRegisters < 32;

// The others do so at edges, but for dgrad that masks what it reads, which it would do for each row of
// taps, and tiles of whole lines, which would read each line by halves.
template <class V, int Vectors, bool Masked>
constexpr bool kEdgesByRows = !Masked && (Vectors == 1 || V::kWidth >= kLine);

template <class V, DepthwiseWalk kWalk, int R, int Step, int Vectors, bool Masked>
DepthwiseKernels depthwise_kernels_of() {
  constexpr int64_t kAny = int64_t{1} << 60;
  if constexpr (kWalk == DepthwiseWalk::gather) {
    constexpr int kRows = kDepthwiseRows<V, R, Step, Vectors>;
    constexpr auto kEdge = [] {
      if constexpr (!kEdgesByRows<V, Vectors, Masked>) {
        return depthwise_tile<V, R, Step, Vectors, kRows, true, Masked>;
      } else if constexpr (R == 3) {
        return depthwise_rows<V, Step>;
      } else {
        return depthwise_rows_of_many_taps<V, R, Step>;
      }
    }();
    return {.vectors = Vectors,
            .rows = kRows,
            .source_rows = (kRows - 1) * Step + R,
            .source_step = Step,
            .cell = 1,
            .missing = kEdgesByRows<V, Vectors, Masked> ? kAny : R,
            .whole = depthwise_tile<V, R, Step, Vectors, kRows, false, Masked>,
            .edge = {kEdge, kEdge, kEdge, kEdge}};
  } else if constexpr (kWalk == DepthwiseWalk::scatter) {
    constexpr int kRows = kDepthwiseCellRows<V, R, Step, Vectors>;
    constexpr auto kEdge = depthwise_scatter_tile<V, R, Step, Vectors, kRows, true, Masked>;
    return {.vectors = Vectors,
            .rows = kRows,
            .source_rows = kRows + (R - 1) / Step,
            .source_step = 1,
            .cell = Step,
            .missing = kAny,
            .whole = depthwise_scatter_tile<V, R, Step, Vectors, kRows, false, Masked>,
            .edge = {kEdge, kEdge, kEdge, kEdge}};
  } else {
    constexpr int kRows = depthwise_wgrad_tile_in_registers<V, R, Step, Vectors>().rows;
    DepthwiseKernels out{.vectors = Vectors,
                         .rows = kRows,
                         .source_rows = (kRows - 1) * Step + R,
                         .source_step = Step,
                         .cell = 0,
                         .missing = kAny,
                         .whole = depthwise_wgrad_tile<V, R, Step, Vectors, kRows, false, Masked>,
                         .edge = {}};
    const auto add = [&]<int Rows>(std::integral_constant<int, Rows>) {
      if constexpr (R == 3 && kEdgesByRows<V, Vectors, false>) {
        out.edge[Rows - 1] = depthwise_wgrad_rows<V, Step, Masked>;
      } else if constexpr (has_edge_kernel(Rows, kRows)) {
        out.edge[Rows - 1] = depthwise_wgrad_tile<V, R, Step, Vectors, Rows, true, Masked>;
      }
    };
    add(std::integral_constant<int, 1>{});
    add(std::integral_constant<int, 2>{});
    add(std::integral_constant<int, 3>{});
    add(std::integral_constant<int, 4>{});
    return out;
  }
}

template <class V, DepthwiseWalk kWalk, int R, int Step, int Vectors>
DepthwiseKernels depthwise_kernels_with(bool masked) {
  // Of a gathering walk with stride, fprop, nothing is masked.
  if constexpr (R == 3 && (kWalk != DepthwiseWalk::gather || Step == 1)) {
    if (masked) return depthwise_kernels_of<V, kWalk, R, Step, Vectors, true>();
  }
  return depthwise_kernels_of<V, kWalk, R, Step, Vectors, false>();
}

// Row by row: a tile's rows are as many as have lines, of columns that lie `apart` floats, which stay
// in the first-level cache for the next vector, and no more than `most`; 0 for none. Of a filter of R x S
// taps.
inline int64_t depthwise_rows_that_stay(int64_t r, int64_t s, int64_t step, int64_t columns,
                                        int64_t apart, int64_t most) {
  int64_t rows = most;
  while (rows > 0 && crowds_cache(((rows - 1) * step + r) * ((columns - 1) * step + s), apart)) {
    --rows;
  }
  return rows;
}

// Of lines that are copied first, as many rows as the first-level cache has room for: the copy, what is above and
// below in it, and as many pixels of the output, or of dy.
inline int64_t depthwise_rows_of_copy(int64_t r, int64_t s, int64_t step, int64_t columns) {
  constexpr int64_t kPixels = (int64_t{30} << 10) / (4 * kLine), kMost = 14;
  int64_t rows = kMost;
  while (rows > 1 &&
         ((rows - 1) * step + r) * ((columns - 1) * step + s) + rows * columns > kPixels) {
    --rows;
  }
  return rows;
}

// Whether lines of channels can be copied first (run_tile): of vectors of half a line.
template <class V>
constexpr bool kCopiesLines = V::kWidth == kLine / 2;

template <class V, DepthwiseWalk kWalk, int R, int Step>
DepthwiseKernels depthwise_kernels_by_rows(int64_t rows, bool masked) {
  DepthwiseKernels out{.vectors = 1,
                       .rows = rows,
                       .source_rows = (rows - 1) * Step + R,
                       .source_step = Step,
                       .cell = kWalk == DepthwiseWalk::gather ? 1 : 0,
                       .missing = 0,
                       .whole = nullptr,
                       .edge = {},
                       .by_rows = true};
  if constexpr (kWalk == DepthwiseWalk::gather && R == 3) {
    out.whole = depthwise_rows<V, Step>;
  } else if constexpr (kWalk == DepthwiseWalk::gather) {
    out.whole = depthwise_rows_of_many_taps<V, R, Step>;
  } else {
    out.whole = masked ? depthwise_wgrad_rows<V, Step, true> : depthwise_wgrad_rows<V, Step, false>;
  }
  return out;
}

// The same of lines that are copied first, masked if need be.
template <class V, DepthwiseWalk kWalk, int R, int Step>
DepthwiseKernels depthwise_kernels_of_copies(int64_t columns) {
  DepthwiseKernels out = depthwise_kernels_by_rows<V, kWalk, R, Step>(
      depthwise_rows_of_copy(R, R, Step, columns), false);
  out.stages = true;
  return out;
}

// Tiles of whole lines have fewer rows, which read what they share once more. With a scattering walk that
// is never slower; else it is faster where lines would not stay until their next vector is computed. With 3 x 3
// taps and stride 1 a copy is faster still: of fprop and dgrad unless few lines stay even of the output, which is
// written by halves of lines; of wgrad unless no cache holds the tensors, for a copy is not asked for ahead (where
// few lines stay it is faster all the same). `apart`: floats from a tile's column to its next; `beyond`: all caches.
template <class V, DepthwiseWalk kWalk, int R, int Step>
DepthwiseKernels depthwise_kernels(int64_t channels, int64_t columns, int64_t apart, bool beyond,
                                   bool masked) {
  constexpr int kVectors = kDepthwiseVectors<V, R>;
  constexpr int kLineVectors = kDepthwiseLineVectors<V, R, kWalk>;
  const bool whole_lines = kLineVectors != kVectors && channels % (kLineVectors * V::kWidth) == 0;
  constexpr int64_t kFewPixels = 32;
  const bool few_stay = pixels_kept(apart) < kFewPixels;
  if constexpr (kWalk == DepthwiseWalk::wgrad && R == 3 && kByRows<V>) {
    constexpr int64_t kMost = 4, kAnyway = 3;
    const int64_t stay = depthwise_rows_that_stay(R, R, Step, columns, apart, kMost);
    if (kCopiesLines<V> && Step == 1 && stay == 0 && (few_stay || !beyond)) {
      return depthwise_kernels_of_copies<V, kWalk, R, Step>(columns);
    }
    return stay == 0 && whole_lines
               ? depthwise_kernels_with<V, kWalk, R, Step, kLineVectors>(masked)
               : depthwise_kernels_by_rows<V, kWalk, R, Step>(stay > 0 ? stay : kAnyway, masked);
  } else if constexpr (kWalk == DepthwiseWalk::gather && R > 3 && kByRows<V>) {
    constexpr int64_t kMost = 8, kAnyway = 4;
    const int64_t stay = depthwise_rows_that_stay(R, R, Step, columns, apart, kMost);
    if (kCopiesLines<V> && stay == 0) {
      return depthwise_kernels_of_copies<V, kWalk, R, Step>(columns);
    }
    return depthwise_kernels_by_rows<V, kWalk, R, Step>(stay > 0 ? stay : kAnyway, masked);
  } else {
    constexpr int64_t kRows = (kDepthwiseRows<V, R, Step, kVectors> - 1) * Step + R;
    const bool crowded = crowds_cache(kRows * ((columns - 1) * Step + R), apart);
    if constexpr (kWalk == DepthwiseWalk::gather && R == 3 && Step == 1 && kCopiesLines<V>) {
      if (whole_lines && crowded && !few_stay) {
        return depthwise_kernels_of_copies<V, kWalk, R, Step>(columns);
      }
    }
    if (whole_lines && (kWalk == DepthwiseWalk::scatter || crowded)) {
      return depthwise_kernels_with<V, kWalk, R, Step, kLineVectors>(masked);
    }
    return depthwise_kernels_with<V, kWalk, R, Step, kVectors>(masked);
  }
}

// Whether many taps meet more lines, of the source and of the output, than stay in the first-level cache until
// the next vector is computed.
template <class V>
bool one_row_crowds(int64_t taps, int64_t step, int64_t apart) {
  const int64_t part = taps_of_part<V>(taps), pixels = pixels_of_one_row<V>(part);
  return part < taps && crowds_cache(pixels + (pixels - 1) * step + taps, apart);
}

template <class V, bool Wgrad, bool Strided, int Taps, bool Many>
constexpr DepthwiseTileFunction depthwise_function_of_part() {
  // One tap is what a cell of dgrad may have.
  constexpr bool kOccurs = Taps == 1 ? !Wgrad && !Strided && !Many : is_part_of_taps<V>(Taps, Many);
  if constexpr (!kOccurs) {
    return nullptr;
  } else if constexpr (Wgrad) {
    return depthwise_wgrad_rows_of_one<V, Taps, Many, Strided>;
  } else {
    return depthwise_rows_of_one<V, Taps, Many, Strided>;
  }
}

// Of filters of one row.
template <class V, bool Wgrad, bool Strided>
DepthwiseTileFunction depthwise_function_of_one_row(int64_t taps) {
  const auto of = [&]<int... Before>(std::integer_sequence<int, Before...>) {
    static constexpr DepthwiseTileFunction kFunctions[][2] = {
        {depthwise_function_of_part<V, Wgrad, Strided, Before + 1, false>(),
         depthwise_function_of_part<V, Wgrad, Strided, Before + 1, true>()}...};
    const int64_t part = taps_of_part<V>(taps);
    return kFunctions[part - 1][part < taps];
  };
  constexpr int kMostTaps = kMostTapsOfPart<V> < 7 ? 7 : kMostTapsOfPart<V>;
  return of(std::make_integer_sequence<int, kMostTaps>{});
}

// dgrad with stride, of filters of one row: a cell is t.step neighbouring pixels of dx. The first pixels of all
// cells, all second ones and so on are fprop of stride 1 with every t.step-th tap, turned round.
template <class V>
void depthwise_cells_of_one_row(const DepthwiseTile& t) {
  for (int64_t residue = 0; residue < t.step; ++residue) {
    DepthwiseTile own = t;
    own.taps = ceil_div(t.taps - residue, t.step);
    own.filter += (residue + (own.taps - 1) * t.step) * t.filter_column;
    own.filter_column = -t.step * t.filter_column;
    own.out_column = t.step * t.out_column;
    // The cells whose pixel exists.
    const int64_t begin = pixels_before(t.out_column_begin - residue, t.step);
    const int64_t end = min64(t.columns, pixels_before(t.out_column_end - residue, t.step));
    own.columns = end - begin;
    if (own.columns <= 0) continue;
    const int64_t first = begin - (own.taps - 1);  // source column, from that of the first cell
    own.out += begin * own.out_column + residue * t.out_column;
    own.source += first * t.source_column;
    own.column_begin -= first;
    own.column_end -= first;
    depthwise_function_of_one_row<V, false, false>(own.taps)(own);
  }
}

template <class V>
DepthwiseKernels depthwise_kernels_of_one_row(Direction direction, int64_t taps, int64_t step,
                                              int64_t apart) {
  const bool wgrad = direction == Direction::wgrad;
  const bool scatter = direction == Direction::dgrad && step > 1;
  const bool stages = !wgrad && !scatter && one_row_crowds<V>(taps, step, apart);
  const int64_t rows = stages ? 1 : 4;
  return {.vectors = 1,
          .rows = rows,
          .source_rows = rows,
          .source_step = 1,
          .cell = wgrad ? 0 : 1,
          .missing = 0,
          .whole = scatter    ? depthwise_cells_of_one_row<V>
                   : wgrad    ? (step > 1 ? depthwise_function_of_one_row<V, true, true>(taps)
                                          : depthwise_function_of_one_row<V, true, false>(taps))
                   : step > 1 ? depthwise_function_of_one_row<V, false, true>(taps)
                              : depthwise_function_of_one_row<V, false, false>(taps),
          .edge = {},
          .by_rows = true,
          .stages = stages};
}

// `columns`: of a tile.
template <class V, DepthwiseWalk kWalk, int Step>
DepthwiseKernels depthwise_kernels(const Conv2dProblem& p, int64_t columns, int64_t apart,
                                   bool masked) {
  const bool beyond = beyond_caches(p.x_size() + p.y_size());
  if (p.r == 3) return depthwise_kernels<V, kWalk, 3, Step>(p.c, columns, apart, beyond, masked);
  if (p.r == 5) return depthwise_kernels<V, kWalk, 5, Step>(p.c, columns, apart, beyond, masked);
  return depthwise_kernels<V, kWalk, 7, Step>(p.c, columns, apart, beyond, masked);
}

// `masked`: dgrad or wgrad of what an activation gave.
template <class V>
bool has_depthwise_kernels(const Conv2dProblem& p, Direction direction, bool masked) {
  const bool dilated = p.dilation_h > 1 || p.dilation_w > 1;
  if (p.c_per_group() != 1 || p.k_per_group() != 1) return false;
  // Of one row, the lanes mask as they read. They read what no cache holds in its order, where a line of
  // channels would be copied whose vectors are less, or where wgrad's taps lie apart.
  if (p.r == 1) {
    const bool copies = V::kWidth < kLine && (direction == Direction::fprop || p.stride_w == 1) &&
                        one_row_crowds<V>(p.s, p.stride_w, p.dilation_w * p.c);
    const bool apart = direction == Direction::wgrad ? p.dilation_w > 1 : copies;
    // Of dgrad with a larger stride than the filter is long, there are pixels that no tap reaches.
    const bool strides = p.stride_w == 1 || (p.dilation_w == 1 &&
                                             (direction != Direction::dgrad || p.stride_w <= p.s));
    return !masked && !(apart && beyond_caches(p.x_size() + p.y_size())) && p.s > 1 &&
           p.stride_h == 1 && strides;
  }
  if ((p.s != 3 && p.s != 5 && p.s != 7) || p.stride_h != p.stride_w) return false;
  return p.r == p.s && p.stride_h <= (dilated ? 1 : 2);
}

template <class V>
struct DepthwiseConvolution {
  static constexpr int64_t kColumns =
      32;  // of a tile; what it reads stays in the first-level cache

  const Conv2dProblem& p;
  Direction direction;
  bool scatter;
  // Of the source and of what is walked over: the output, or its cells.
  int64_t source_h, source_w, rows, columns;
  // Source row = row * step_h + first_row + tap * apart_h. A tile's rows lie as far apart as the taps do,
  // and so do its columns: then they meet the same of the source.
  int64_t step_h, step_w, first_row, first_column, apart_h, apart_w;
  int64_t cell_h, cell_w;           // output rows and columns of one that is walked over
  int64_t residues_h, residues_w;   // of rows and columns, by what lies between a tile's
  int64_t row_tiles, column_tiles;  // of one residue
  int64_t neighbours;               // whose columns no two tiles share
  int64_t tiles;                    // of an image
  int64_t vectors;                  // of all channels, a multiple of a tile's
  int64_t strip, strips;            // tiles of a task; such strips of all images, or parts
  int64_t block, blocks;            // vectors of a task
  int64_t parts, part_floats;       // wgrad: of sums
  int64_t taps_floats;              // wgrad: of one vector
  DepthwiseKernels kernels;
  int64_t staged_source, staged_dy;  // floats of a worker that run_tile copies to, or none
  bool asks_below;
  int workers;

  DepthwiseConvolution(const Conv2dProblem& problem, Direction which, bool masked, bool bias)
      : p(problem), direction(which), scatter(which == Direction::dgrad && problem.stride_w > 1),
        apart_h(problem.dilation_h), apart_w(problem.dilation_w) {
    source_h = direction == Direction::dgrad ? p.oh : p.h;
    source_w = direction == Direction::dgrad ? p.ow : p.w;
    cell_h = scatter ? p.stride_h : 1;
    cell_w = scatter ? p.stride_w : 1;
    if (scatter) {
      // Cells are counted in the padded image.
      step_h = step_w = 1;
      first_row = p.pad_top / cell_h - (p.r - 1) / cell_h;
      first_column = p.pad_left / cell_w;
      rows = ceil_div(p.pad_top + p.h, cell_h) - p.pad_top / cell_h;
      columns = ceil_div(p.pad_left + p.w, cell_w) - p.pad_left / cell_w;
    } else {
      const bool turned = direction == Direction::dgrad;
      step_h = turned ? 1 : p.stride_h;
      step_w = turned ? 1 : p.stride_w;
      first_row = turned ? p.pad_top - (p.r - 1) * apart_h : -p.pad_top;
      first_column = turned ? p.pad_left - (p.s - 1) * apart_w : -p.pad_left;
      rows = turned ? p.h : p.oh;
      columns = turned ? p.w : p.ow;
    }
    residues_h = min64(apart_h, rows);
    residues_w = min64(apart_w, columns);
    const int64_t own_columns = ceil_div(columns, residues_w);
    neighbours = p.r == 1 ? pixels_of_one_row<V>(taps_of_part<V>(ceil_div(p.s, cell_w))) : 1;
    column_tiles = ceil_div(own_columns, kColumns);
    const int64_t most_columns =
        ceil_div(ceil_div(own_columns, neighbours), column_tiles) * neighbours;  // of a tile
    const auto of = [&]<DepthwiseWalk kWalk, int Step>() {
      return depthwise_kernels<V, kWalk, Step>(p, most_columns, apart_w * p.c, masked);
    };
    constexpr auto kGather = DepthwiseWalk::gather, kWgrad = DepthwiseWalk::wgrad;
    kernels = p.r == 1  ? depthwise_kernels_of_one_row<V>(direction, p.s, p.stride_w, apart_w * p.c)
              : scatter ? of.template operator()<DepthwiseWalk::scatter, 2>()
              : direction == Direction::wgrad ? (step_h == 1 ? of.template operator()<kWgrad, 1>()
                                                             : of.template operator()<kWgrad, 2>())
              : step_h == 1                   ? of.template operator()<kGather, 1>()
                                              : of.template operator()<kGather, 2>();
    vectors = round_up(ceil_div(p.c, V::kWidth), kernels.vectors);
    // wgrad of a larger filter reads a tile again for each vector of a line and for some of its rows. A
    // copy pays where a set of the first-level cache would have to hold five times its lines.
    const int64_t columns_met = (most_columns - 1) * step_w + p.s;
    const bool wgrad = direction == Direction::wgrad;
    const bool staged_anyway =
        wgrad && p.r > 3 && crowds_cache(kernels.source_rows * columns_met / 4, apart_w * p.c);
    const bool staged = kCopiesLines<V> && (kernels.stages || staged_anyway);
    staged_source = staged ? kernels.source_rows * columns_met * kLine : 0;
    staged_dy = staged && wgrad ? kernels.rows * most_columns * kLine : 0;
    row_tiles = ceil_div(ceil_div(rows, residues_h), kernels.rows);
    // Where a tile's lines crowd the first-level cache, asking pays from twice the size on; wgrad, which only
    // reads, gains all the same.
    const bool crowds = !wgrad && crowds_cache(kernels.source_rows * columns_met, apart_w * p.c);
    const int64_t floats = p.x_size() + p.y_size();
    asks_below = !staged && (p.r == 1 ? beyond_caches(floats)
                                      : tiles_ask_below(crowds ? floats / 2 : floats, rows));
    tiles = residues_h * row_tiles * residues_w * column_tiles;
    taps_floats = p.r * p.s * V::kWidth;
    part_floats = vectors * (taps_floats + (bias ? V::kWidth : 0));
    divide();
    workers = workers_for(strips * blocks);
  }

  int64_t workspace_bytes() const {
    const int64_t sums = direction == Direction::wgrad ? round_up(parts * part_floats, kLine) : 0;
    return (sums + workers * (staged_source + staged_dy)) * 4;
  }

  // fprop and dgrad.
  void execute(const float* source, const float* mask, const float* filter, const float* bias,
               float* out) {
    DepthwiseTile common{};
    common.filter_row = p.s * p.c;
    common.filter_column = p.c;
    common.taps = p.s;
    common.step = p.stride_w;
    if (direction == Direction::dgrad && !scatter) {
      filter += (p.r * p.s - 1) * p.c;
      common.filter_row = -common.filter_row;
      common.filter_column = -common.filter_column;
    }
    common.relu = direction == Direction::fprop && p.activation != Activation::linear;
    common.ceiling = ceiling_of(p.activation);
    const int64_t out_h = direction == Direction::fprop ? p.oh : p.h;
    const int64_t out_w = direction == Direction::fprop ? p.ow : p.w;
    common.out_row = out_w * p.c * apart_h;
    common.out_column = p.c * apart_w;
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    float* const staged = workspace.floats();
    parallel_for(strips * blocks, workers, [&](int64_t task, int worker) {
      alignas(64) float scratch[(7 * 7 + 1) * V::kWidth];
      DepthwiseTile t = common;
      t.scratch = scratch;
      const int64_t first = begin_block(task % blocks, t);
      const int64_t strips_of_one = ceil_div(tiles, strip);
      const int64_t n = task / blocks / strips_of_one;
      const int64_t tile = task / blocks % strips_of_one * strip;
      t.filter = filter + first;
      t.bias = bias ? bias + first : nullptr;
      for_each_tile(n, tile, min64(tiles, tile + strip), source, mask, first, t,
                    [&](int64_t row, int64_t column) {
                      // Of the output; a cell's first pixel may lie in padding.
                      const int64_t i = row * cell_h - (scatter ? p.pad_top % cell_h : 0);
                      const int64_t j = column * cell_w - (scatter ? p.pad_left % cell_w : 0);
                      t.out_row_begin = max64(0, -i);
                      t.out_row_end = out_h - i;
                      t.out_column_begin = max64(0, -j);
                      t.out_column_end = out_w - j;
                      t.out = out + ((n * out_h + i) * out_w + j) * p.c + first;
                      run_tile(t, staged + worker * (staged_source + staged_dy));
                    });
    });
  }

  // wgrad. Row tiles are dealt to parts whose number depends on the problem alone; a part has sums
  // of its own, which are added up in order. `y`: dy counts where it is positive; null for all.
  void execute_wgrad(const float* x, const float* dy, const float* y, float* dfilter,
                     float* dbias) {
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    float* const sums = workspace.floats();
    const auto finish = [this, sums, dfilter, dbias, parts = parts, part = part_floats,
                         channels = p.c](int64_t v) {
      const int64_t own = min64(V::kWidth, channels - v * V::kWidth);
      const auto add_up = [&](int64_t at, float* out, const auto&... tail) {
        typename V::Reg sum = V::load(sums + at);
        for (int64_t i = 1; i < parts; ++i) sum = V::add(sum, V::load(sums + i * part + at));
        V::store(out + v * V::kWidth, sum, tail...);
      };
      const auto add_up_all = [&](const auto&... tail) {
        float* out = dfilter;
        const int64_t end = (v + 1) * taps_floats;
        for (int64_t at = v * taps_floats; at < end; at += V::kWidth, out += channels) {
          add_up(at, out, tail...);
        }
        if (dbias) add_up(vectors * taps_floats + v * V::kWidth, dbias, tail...);
      };
      if (own == V::kWidth) {
        add_up_all();
      } else {
        add_up_all(V::tail(static_cast<int>(own)));
      }
    };
    float* const staged = sums + round_up(parts * part_floats, kLine);
    parallel_for(parts * blocks, workers, [&](int64_t task, int worker) {
      DepthwiseTile t{};
      const int64_t first = begin_block(task % blocks, t), part = task / blocks;
      const int64_t vector = first / V::kWidth;
      const int64_t count = round_up(ceil_div(t.channels, V::kWidth), kernels.vectors);
      float* const own = sums + part * part_floats;
      t.sums = own + vector * taps_floats;
      clear_floats(t.sums, count * taps_floats);
      if (dbias) {
        t.bias_sums = own + vectors * taps_floats + first;
        clear_floats(t.bias_sums, count * V::kWidth);
      }
      t.taps = p.s;
      t.step = p.stride_w;
      t.out_row = p.ow * p.c * apart_h;
      t.out_column = p.c * apart_w;
      const Span own_tiles = part_of(p.n * tiles, parts, part);
      for (int64_t i = own_tiles.begin; i < own_tiles.end; ++i) {
        const int64_t n = i / tiles, tile = i % tiles;
        for_each_tile(n, tile, tile + 1, x, nullptr, first, t, [&](int64_t row, int64_t column) {
          const int64_t at = ((n * p.oh + row) * p.ow + column) * p.c + first;
          t.out = const_cast<float*>(dy) + at;
          t.mask = y ? y + at : nullptr;
          run_tile(t, staged + worker * (staged_source + staged_dy));
        });
      }
      for (int64_t v = vector; parts == 1 && v < vector + ceil_div(t.channels, V::kWidth); ++v) {
        finish(v);
      }
    });
    const int64_t vector_floats = parts * (taps_floats + V::kWidth);
    if (parts > 1) parallel_by_floats(ceil_div(p.c, V::kWidth), vector_floats, finish);
  }

 private:
  // The tile itself, or its lines of channels, one after the other, each copied to `source` where its
  // pixels are neighbours: a power of two apart, they would not stay in the first-level cache until they
  // are read again. wgrad's dy is copied as well.
  void run_tile(DepthwiseTile& t, float* source) const {
    if (staged_source == 0) return kernels.run(t);
    const int64_t columns_met = (t.columns - 1) * step_w + p.s;
    const Span rows_met{t.row_begin, min64(t.row_end, (t.rows - 1) * step_h + p.r)};
    const Span own_columns{t.column_begin, min64(t.column_end, columns_met)};
    for (int64_t c = 0; c < t.channels; c += kLine) {
      DepthwiseTile line = t;
      line.channels = min64(kLine, t.channels - c);
      line.source = source;
      line.source_column = kLine;
      line.source_row = columns_met * kLine;
      line.mask = nullptr;
      const float* const mask = t.mask ? t.mask + c : nullptr;
      copy_line(t.source + c, direction == Direction::wgrad ? nullptr : mask, t.source_row,
                t.source_column, rows_met, own_columns, line.channels, source, line.source_row);
      line.out = t.out + c;
      if (t.filter) line.filter = t.filter + c;
      if (t.bias) line.bias = t.bias + c;
      if (staged_dy > 0) {
        line.out = source + staged_source;
        line.out_column = kLine;
        line.out_row = t.columns * kLine;
        copy_line(t.out + c, mask, t.out_row, t.out_column, {0, t.rows}, {0, t.columns},
                  line.channels, line.out, line.out_row);
        line.sums = t.sums + c / V::kWidth * taps_floats;
        if (t.bias_sums) line.bias_sums = t.bias_sums + c;
      }
      kernels.run(line);
    }
  }

  // Up to kLine channels of pixels that lie `row` and `column` floats apart, where `mask`, if not null, is
  // positive.
  static void copy_line(const float* from, const float* mask, int64_t row, int64_t column,
                        Span rows, Span columns, int64_t channels, float* to, int64_t to_row) {
    const auto copy_all = [&](const auto& copy_pixel) __attribute__((always_inline)) {
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        int64_t at = i * row + columns.begin * column;
        float* out = to + i * to_row + columns.begin * kLine;
        for (int64_t j = columns.begin; j < columns.end; ++j, at += column, out += kLine) {
          // Of the next line, for pixels lie too far apart for the hardware to ask in time.
          __builtin_prefetch(from + at + kLine, 0, 2);
          copy_pixel(at, out);
        }
      }
    };
    // The rule. To ask each vector for its mask and its end took a tenth of the time of all.
    if (mask == nullptr && channels == kLine) {
      return copy_all([&](int64_t at, float* out) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int64_t c = 0; c < kLine; c += V::kWidth) V::store(out + c, V::load(from + at + c));
      });
    }
    copy_all([&](int64_t at, float* out) __attribute__((always_inline)) {
      if (mask) __builtin_prefetch(mask + at + kLine, 0, 2);
      const auto copy = [&](int64_t c, const auto&... tail) {
        typename V::Reg value = V::load(from + at + c, tail...);
        if (mask) value = V::where_positive(V::load(mask + at + c, tail...), value);
        V::store(out + c, value, tail...);
      };
      int64_t c = 0;
      for (; c + V::kWidth <= channels; c += V::kWidth) copy(c);
      if (c < channels) copy(c, V::tail(static_cast<int>(channels - c)));
    });
  }

  static void clear_floats(float* at, int64_t count) {
    std::memset(at, 0, static_cast<std::size_t>(count) * 4);
  }

  void divide() {
    // Tasks of some 10 us, yet enough of them for many threads as long as they take a few.
    constexpr int64_t kMultiplyAdds = int64_t{1} << 19, kLeast = int64_t{1} << 16;
    const int64_t tile = max64(1, p.oh * p.ow * p.r * p.s * vectors * V::kWidth / tiles);
    const int64_t work = p.n * tiles * tile;
    const int64_t tasks = max64(work / kMultiplyAdds, min64(work / kLeast, kTasksForMany));
    // Of neighbouring vectors: pixels are read in runs.
    constexpr int64_t kLeastVectors = 64 / V::kWidth;
    const int64_t most_blocks = max64(1, vectors / kLeastVectors);
    if (direction == Direction::wgrad) {
      // 4 MiB of sums at most. Fewer parts than the tiles they are made of: a part has its sums to
      // clear and to add up.
      constexpr int64_t kTilesAPart = 2, kMostParts = 64, kWorkAPart = int64_t{1} << 18;
      const int64_t by_bytes = (int64_t{4} << 20) / (part_floats * 4);
      const int64_t by_tiles = p.n * tiles / kTilesAPart;
      // Blocks of channels have nothing to add up. But one row of taps goes along memory, in which a block's
      // channels lie apart.
      const int64_t by_work =
          ceil_div(min64(work / kWorkAPart, kMostParts), p.r == 1 ? 1 : most_blocks);
      parts = max64(1, min64(by_work, min64(by_bytes, by_tiles)));
      strips = parts;
    } else {
      const int64_t strips_wanted = min64(tiles, max64(1, tasks / max64(1, p.n)));
      strip = tiles / strips_wanted;
      strips = ceil_div(tiles, strip);
      strips *= p.n;
    }
    blocks = max64(1, min64(most_blocks, min64(tasks, kTasksForMany) / max64(1, strips)));
    block = round_up(ceil_div(vectors, blocks), kernels.vectors);
    blocks = ceil_div(vectors, block);
  }

  int64_t begin_block(int64_t index, DepthwiseTile& t) const {
    const int64_t first = index * block * V::kWidth;
    t.channels = min64(p.c, first + block * V::kWidth) - first;
    return first;
  }

  // Of so many, those of a tile.
  Span columns_of(int64_t tile, int64_t count) const {
    if (neighbours == 1) return part_of(count, column_tiles, tile);
    const Span own = part_of(ceil_div(count, neighbours), column_tiles, tile);
    return {min64(count, own.begin * neighbours), min64(count, own.end * neighbours)};
  }

  // Of what is not negative, for a division takes long.
  static int64_t steps(int64_t distance, int64_t apart) {
    return apart == 1 ? max64(0, distance) : ceil_div(max64(0, distance), apart);
  }

  // Calls body(row, column) for tiles tile .. tile_end - 1 of image n, with what t says of the source.
  template <class Body>
  void for_each_tile(int64_t n, int64_t tile, int64_t tile_end, const float* source,
                     const float* mask, int64_t channel, DepthwiseTile& t, const Body& body) const {
    t.source_column = p.c * apart_w;
    t.source_row = source_w * p.c * apart_h;
    t.asks_below = asks_below;
    const int64_t tiles_of_row = residues_w * column_tiles;
    for (; tile < tile_end; ++tile) {
      const int64_t i = tile / tiles_of_row, j = tile % tiles_of_row;
      const int64_t row = i / row_tiles + i % row_tiles * kernels.rows * apart_h;
      const int64_t residue = j % residues_w;
      const Span own = columns_of(j / residues_w, steps(columns - residue, apart_w));
      const int64_t column = residue + own.begin * apart_w;
      // A residue may have a tile less than the first.
      t.rows = min64(kernels.rows, steps(rows - row, apart_h));
      t.columns = own.size();
      if (row >= rows || t.columns == 0) continue;
      const int64_t source_i = row * step_h + first_row, source_j = column * step_w + first_column;
      t.row_begin = steps(-source_i, apart_h);
      t.row_end = steps(source_h - source_i, apart_h);
      t.column_begin = scatter ? -source_j : steps(-source_j, apart_w);
      // A scattering tile counts from columns before its own, where the source may end, too.
      t.column_end = scatter ? source_w - source_j : steps(source_w - source_j, apart_w);
      const int64_t at = ((n * source_h + source_i) * source_w + source_j) * p.c + channel;
      t.source = source + at;
      if (mask) t.mask = mask + at;
      body(row, column);
    }
  }
};

template <class V>
struct Depthwise {
  static bool serves(const Conv2dProblem& p, Direction direction) {
    return p.groups > 1 && p.c_per_group() == 1 &&
           (direction != Direction::dgrad || LaneConvolution<V>::fits(p));
  }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    if (!has_depthwise_kernels<V>(p, direction, t.y != nullptr)) {
      return run_lanes<V>(p, direction, t);
    }
    if (t.y && !depthwise_kernels_mask(p.r)) {
      const Workspace dz(static_cast<std::size_t>(p.y_size()) * 4);
      activation_grad<V>(p.n * p.oh * p.ow, p.k, t.dy, t.y, dz.floats(), t.dbias);
      Conv2dOperands masked = t;
      masked.dy = dz.floats();
      masked.y = nullptr;
      masked.dbias = nullptr;
      return run(p, direction, masked);
    }
    DepthwiseConvolution<V> convolution(p, direction, t.y != nullptr, t.dbias != nullptr);
    switch (direction) {
      case Direction::fprop: return convolution.execute(t.x, nullptr, t.filter, t.bias, t.out);
      case Direction::dgrad: return convolution.execute(t.dy, t.y, t.filter, nullptr, t.out);
      case Direction::wgrad: return convolution.execute_wgrad(t.x, t.dy, t.y, t.out, t.dbias);
    }
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    if (!has_depthwise_kernels<V>(p, direction, false)) return estimate_lanes<V>(p, direction);
    constexpr double kATap = 1.1, kAPixel = 3;
    const DepthwiseConvolution<V> convolution(p, direction, true, true);
    const double pixels = static_cast<double>(p.n * p.oh * p.ow);
    Estimate out;
    out.multiply_adds = static_cast<double>(convolution.vectors * V::kWidth) * pixels *
                        (static_cast<double>(p.r * p.s) * kATap + kAPixel);
    out.workspace_bytes = convolution.workspace_bytes();
    return out;
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    if (!has_depthwise_kernels<V>(p, direction, false)) return describe_lanes<V>(p, direction);
    const DepthwiseConvolution<V> convolution(p, direction, true, true);
    std::string text =
        std::to_string(convolution.kernels.rows) + " rows x " +
        std::to_string(min64(convolution.columns, convolution.kColumns)) + " x " +
        std::to_string(V::kWidth * convolution.kernels.vectors) + " tile of " +
        (convolution.scatter ? std::to_string(convolution.cell_h) + " x " +
                                   std::to_string(convolution.cell_w) + " cells"
                             : "pixels") +
        " x channels, " +
        (convolution.kernels.by_rows ? "row by row" : "sums of a column in registers");
    if (convolution.staged_source > 0) text += ", of lines copied beforehand";
    if (direction == Direction::wgrad) {
      text += ", " + std::to_string(convolution.parts) + " partial sums";
    }
    return text;
  }

  static constexpr Conv2dAlgorithm kAlgorithm{.name = "depthwise",
                                              .masks_dgrad = true,
                                              .masks_wgrad = true,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run};
};

}  // namespace
}  // namespace fastconv::cpu
