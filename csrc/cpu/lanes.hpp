// Convolutions with few channels a group, depthwise ones among them: vectors run along the output
// channels of several groups at once, and each lane takes its source channel from its own group.
//
// fprop and dgrad are tap convolutions (see implicit_gemm.hpp). A tile is a few neighbouring output
// pixels of one row; their sums stay in registers while the taps of a filter row, in registers as
// well, slide over the source: a source vector is loaded (and permuted) once for all the taps and
// pixels that it meets. wgrad is the same walk with the sums in the place of the taps.
//
// Padding is left out, not multiplied by zero.
#pragma once

#include <numeric>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/wgrad.hpp"

namespace fastconv::cpu {
namespace {

// How the lanes of a vector of output channels find channel c of their groups.
enum class Lanes {
  plain,      // one channel a group: the source's lanes are the output's
  masked,     // so, and the source counts where another tensor is positive
  broadcast,  // all lanes are of one group
  permute,    // their groups lie within one vector of the source
  permute2,   // within two
  gather,     // within more
};

// What a vector of output channels reads.
struct LaneVector {
  int64_t source;  // first source channel
  int columns;     // output lanes
  int loaded[2];   // source lanes of one or two loads
};

struct LaneTile {
  const LaneVector* vectors;
  const std::int32_t* index;  // [vector][width]: lanes' places in the source, from `source` on
  int64_t begin, end;         // vectors
  const float* x;             // source pixel of tap (row 0, column 0) and output pixel 0
  const float* mask;          // likewise
  int64_t x_row, x_column;    // floats from tap row to tap row, from pixel to pixel
  int64_t column_begin, column_end;  // pixels from x on that are in the source
  int64_t rows, reduce;              // tap rows; source channels a group
  int64_t taps, tap_step, step;      // of a row, where they are not known to the compiler
  int64_t x_left;                    // floats of the source from x on
  // Of the source, from a pixel's first channel on, where some vector has fewer lanes to load than it has.
  // Elsewhere 0.
  int64_t pixel_reads;
  bool at_end;              // loads of whole vectors would go beyond the source
  const float* filter;      // [vector][row][c][tap][width]; wgrad: the sums
  int64_t filter_vector;    // floats from vector to vector
  int64_t filter_row_step;  // floats from row to row
  const float* bias;        // null for none
  float* y;                 // wgrad: dy, read only
  int64_t y_column;
  bool relu;
  float ceiling;        // with relu
  const float* y_mask;  // wgrad: dy counts where it is positive; null for everywhere
  float* bias_sums;     // wgrad: [vector][width], null for none
  // Whether to ask for what the tile below needs that this one does not: the last source row, some rows of
  // a stride, and its pixels of y. Floats to them.
  bool asks_below;
  int64_t x_below, y_below;
  int64_t rows_below;
};

// `Masked`: no more is read than what is wanted; else whole vectors, whose other lanes come to nothing: no
// filter is there, or no permutation takes them.
template <class V, Lanes kLanes, bool Masked>
struct LaneSource {
  typename V::Int index;
  typename V::Tail tails[2];

  LaneSource(const LaneTile& t, int64_t v)
      : index(V::int_broadcast(0)),
        tails{V::tail(t.vectors[v].loaded[0]), V::tail(t.vectors[v].loaded[1])} {
    if constexpr (kLanes == Lanes::permute || kLanes == Lanes::permute2 ||
                  kLanes == Lanes::gather) {
      index = V::load_index(t.index + v * V::kWidth, V::tail(V::kWidth));
    }
  }
  void next_channel() { index = V::int_add(index, V::int_broadcast(1)); }
  static typename V::Reg part(const float* p, typename V::Tail tail) {
    return Masked ? V::load(p, tail) : V::load(p);
  }
  // Channel c of the group of each lane; next_channel has been called c times. `p` is the pixel's
  // first channel, or channel c where channels are broadcast.
  typename V::Reg load(const float* p, const float* mask) const {
    if constexpr (kLanes == Lanes::plain) return part(p, tails[0]);
    if constexpr (kLanes == Lanes::masked) {
      return V::where_positive(part(mask, tails[0]), part(p, tails[0]));
    }
    if constexpr (kLanes == Lanes::broadcast) return V::broadcast(p);
    if constexpr (kLanes == Lanes::permute) return V::permute(part(p, tails[0]), index);
    if constexpr (kLanes == Lanes::permute2) {
      return V::permute(V::load(p), part(p + V::kWidth, tails[1]), index);
    }
    if constexpr (kLanes == Lanes::gather) return V::gather(p, index);
  }
};

// Pixels of a tile of one vector. Each source value serves all taps of a row; where channels are
// broadcast, there must be sums enough to hide the multiply-add's latency, three to one sum in a row.
template <class V>
constexpr int kLaneColumns = V::kWidth == 1 ? 4 : 8;
template <class V>
constexpr int kBroadcastColumns = V::kWidth == 16 ? 16 : kLaneColumns<V>;
// Where a group has several vectors, two share what is broadcast.
template <class V>
constexpr bool kLanePairs = V::kWidth == 16;

// As Spaced, of elements that are read once.
struct SpacedOnce {
  const float* first;
  int64_t step;
  const float* operator[](int i) const { return first + i * step; }
};

// Source pixels under `Cols` pixels and `Taps` taps; of taps that the compiler does not know, the first
// alone.
template <Lanes kLanes, int Taps, int Step, int Cols>
using LaneSourcePixels =
    std::conditional_t<kLanes == Lanes::broadcast,
                       Spaced<(Taps > 0 ? (Cols - 1) * Step + Taps : 1)>, SpacedOnce>;

template <int Taps, int Step, int Cols>
constexpr int kLaneSourceColumns = (Cols - 1) * Step + Taps;

// Calls body(channel, tap, pixel, source vector) for all that meet, `Taps` of a row and `Cols` pixels,
// with every source vector loaded once; of several channels where they are broadcast. `inside`: the
// columns that are in the source; only the outermost Taps - 1 may be outside: a test of every column
// would cost as much as the multiplications.
template <class V, int Taps, int Step, int Cols, int Channels, class Source, class Pixels,
          class Body>
inline __attribute__((always_inline)) void slide(Span inside, const Source& source, const Pixels& x,
                                                 const Pixels& mask, const Body& body) {
  constexpr int kColumns = kLaneSourceColumns<Taps, Step, Cols>, kMargin = Taps - 1;
#pragma GCC unroll 64
  for (int column = 0; column < kColumns; ++column) {
    if (column < kMargin && column < inside.begin) [[unlikely]]
      continue;
    if (column >= kColumns - kMargin && column >= inside.end) [[unlikely]]
      continue;
#pragma GCC unroll 2
    for (int channel = 0; channel < Channels; ++channel) {
      const typename V::Reg a = source.load(x[column] + channel, mask[column] + channel);
#pragma GCC unroll 8
      for (int tap = 0; tap < Taps; ++tap) {
        const int pixel = (column - tap) / Step;
        if (column < tap || (column - tap) % Step != 0 || pixel >= Cols) continue;
        body(channel, tap, pixel, a);
      }
    }
  }
}

// For one tap, at any distance from its neighbours, calls body(pixel, source vector).
template <class V, int Cols, class Source, class Body>
inline __attribute__((always_inline)) void stroll(const LaneTile& t, const Source& source,
                                                  const float* x, const float* mask, int64_t tap,
                                                  const Body& body) {
  const auto inside = static_cast<std::uint64_t>(t.column_end - t.column_begin);
#pragma GCC unroll 16
  for (int pixel = 0; pixel < Cols; ++pixel) {
    const int64_t column = pixel * t.step + tap * t.tap_step;
    if (static_cast<std::uint64_t>(column - t.column_begin) >= inside) continue;
    const int64_t at = column * t.x_column;
    body(pixel, source.load(x + at, mask + at));
  }
}

// A tile is compiled for rows of `Taps` taps: of any number where it is 0; where it is negative, of any
// number, in pieces of -Taps.
template <int Taps>
constexpr bool kInPieces = Taps < 0;
template <int Taps>
constexpr int kPiece = Taps < 0 ? -Taps : max64(Taps, 1);

// The taps of a row.
template <int Taps>
int64_t taps_of_row(const LaneTile& t) {
  return Taps > 0 ? Taps : t.taps;
}

// Calls dense(tap, columns inside the source) for pieces of a row, or the whole of it, from `tap` on, and
// sparse(tap, end) for the taps of others: what is left of a row, and pieces that meet more padding than
// `slide` takes.
template <int Taps, int Step, int Cols, class Dense, class Sparse>
inline __attribute__((always_inline)) void for_each_piece(const LaneTile& t, const Dense& dense,
                                                          const Sparse& sparse) {
  if constexpr (Taps == 0) {
    sparse(0, t.taps);
  } else if constexpr (Taps > 0) {
    dense(0, Span{t.column_begin, t.column_end});
  } else {
    constexpr int kTaps = kPiece<Taps>, kMargin = kTaps - 1;
    constexpr int kColumns = kLaneSourceColumns<kTaps, Step, Cols>;
    int64_t tap = 0;
    for (; tap + kTaps <= t.taps; tap += kTaps) {
      const Span inside{t.column_begin - tap, t.column_end - tap};
      if (inside.begin <= kMargin && inside.end >= kColumns - kMargin) {
        dense(tap, inside);
      } else if (inside.begin < kColumns && inside.end > 0) {
        sparse(tap, tap + kTaps);
      }
    }
    if (tap < t.taps) sparse(tap, t.taps);
  }
}

// The source pixels of the piece that begins with `tap`.
template <int Taps, class Pixels>
decltype(auto) pixels_of_piece(const Pixels& pixels, int64_t tap) {
  if constexpr (kInPieces<Taps>) {
    return Pixels{pixels.first + tap * pixels.step, pixels.step};
  } else {
    return (pixels);
  }
}

// Tiles go down the image: no two lines that they read first follow one another, and the hardware does not
// ask for them in time. x and y are those of the tile's pixel 0, from channel `channel` of y on: of the
// vectors in a line, the first asks.
template <int Taps, int Step, int Cols, bool Writes>
inline __attribute__((always_inline)) void ask_below(const LaneTile& t, const float* x,
                                                     const float* y, int64_t channel) {
  if (!t.asks_below || channel % kLine != 0) return;
  constexpr int kColumns = Taps == 0 ? Cols : Cols * Step;
  const int64_t column = Taps == 0 ? t.step * t.x_column : t.x_column;
  for (int64_t row = 0; row < t.rows_below; ++row) {
    const float* const below = x + t.x_below - row * t.x_row;
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) __builtin_prefetch(below + j * column, 0, 2);
  }
#pragma GCC unroll 16
  for (int j = 0; j < Cols; ++j) {
    __builtin_prefetch(y + channel + t.y_below + j * t.y_column, Writes ? 1 : 0, 2);
  }
}

// Vectors v .. v + Vectors - 1, which take the same source channels if they are several.
template <class V, Lanes kLanes, int Taps, int Step, int Cols, int Vectors, bool Masked>
inline __attribute__((always_inline)) void lane_vectors(const LaneTile& t, int64_t v) {
  using Reg = typename V::Reg;
  const LaneVector& vector = t.vectors[v];
  const auto tail = [&](int i) { return V::tail(t.vectors[v + i].columns); };
  Reg sum[Vectors][Cols];
#pragma GCC unroll 2
  for (int i = 0; i < Vectors; ++i) {
    Reg start = V::zero();
    if (t.bias) start = V::load(t.bias + (v + i) * V::kWidth, tail(i));
#pragma GCC unroll 16
    for (int j = 0; j < Cols; ++j) sum[i][j] = start;
  }

  const float* x = t.x + vector.source;
  const float* mask = kLanes == Lanes::masked ? t.mask + vector.source : x;
  ask_below<Taps, Step, Cols, true>(t, x, t.y, v * V::kWidth);
  const float* row = t.filter + v * t.filter_vector;
  for (int64_t r = 0; r < t.rows; ++r, x += t.x_row, mask += t.x_row, row += t.filter_row_step) {
    LaneSource<V, kLanes, Masked> source(t, v);
    const float* filter = row;
    const int64_t reduce = kLanes == Lanes::plain || kLanes == Lanes::masked ? 1 : t.reduce;
    LaneSourcePixels<kLanes, Taps, Step, Cols> pixels{x, t.x_column}, masks{mask, t.x_column};
    for (int64_t c = 0; c < reduce; ++c) {
      const auto dense = [&](int64_t first, Span inside) __attribute__((always_inline)) {
        constexpr int kTaps = kPiece<Taps>;
        Reg taps[Vectors][kTaps];
#pragma GCC unroll 2
        for (int i = 0; i < Vectors; ++i)
#pragma GCC unroll 8
          for (int tap = 0; tap < kTaps; ++tap) {
            taps[i][tap] = V::load(filter + i * t.filter_vector + (first + tap) * V::kWidth);
          }
        slide<V, kTaps, Step, Cols, 1>(inside, source, pixels_of_piece<Taps>(pixels, first),
                                       pixels_of_piece<Taps>(masks, first),
                                       [&](int, int tap, int pixel, Reg a) {
#pragma GCC unroll 2
                                         for (int i = 0; i < Vectors; ++i) {
                                           sum[i][pixel] = V::fma(a, taps[i][tap], sum[i][pixel]);
                                         }
                                       });
      };
      const auto sparse = [&](int64_t tap, int64_t end) __attribute__((always_inline)) {
        for (; tap < end; ++tap) {
          Reg b[Vectors];
#pragma GCC unroll 2
          for (int i = 0; i < Vectors; ++i) {
            b[i] = V::load(filter + i * t.filter_vector + tap * V::kWidth);
          }
          stroll<V, Cols>(t, source, pixels[0], masks[0], tap, [&](int pixel, Reg a) {
#pragma GCC unroll 2
            for (int i = 0; i < Vectors; ++i) sum[i][pixel] = V::fma(a, b[i], sum[i][pixel]);
          });
        }
      };
      for_each_piece<Taps, Step, Cols>(t, dense, sparse);
      filter += taps_of_row<Taps>(t) * V::kWidth;
      if constexpr (kLanes == Lanes::broadcast) pixels.advance(1);
      if constexpr (kLanes != Lanes::plain) source.next_channel();
    }
  }

#pragma GCC unroll 2
  for (int i = 0; i < Vectors; ++i) {
    float* y = t.y + (v + i) * V::kWidth;
    with_tail<V>(t.vectors[v + i].columns, [&](auto... tails) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) {
        const Reg out = t.relu ? relu_to<V>(V::set(t.ceiling), sum[i][j]) : sum[i][j];
        V::store(y + j * t.y_column, out, tails...);
      }
    });
  }
}

template <class V, Lanes kLanes, int Taps, int Step, int Cols, int Vectors, bool Masked>
inline __attribute__((always_inline)) void lane_wgrad_vectors(const LaneTile& t, int64_t v) {
  using Reg = typename V::Reg;
  const LaneVector& vector = t.vectors[v];
  Reg dy[Vectors][Cols];
#pragma GCC unroll 2
  for (int i = 0; i < Vectors; ++i) {
    const int64_t at = (v + i) * V::kWidth;
    with_tail<V>(t.vectors[v + i].columns, [&](auto... tails) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) dy[i][j] = V::load(t.y + at + j * t.y_column, tails...);
      if (!t.y_mask) return;
#pragma GCC unroll 16
      for (int j = 0; j < Cols; ++j) {
        const Reg mask = V::load(t.y_mask + at + j * t.y_column, tails...);
        dy[i][j] = V::where_positive(mask, dy[i][j]);
      }
    });
    if (t.bias_sums) {
      Reg sum = dy[i][0];
#pragma GCC unroll 16
      for (int j = 1; j < Cols; ++j) sum = V::add(sum, dy[i][j]);
      V::store(t.bias_sums + at, V::add(V::load(t.bias_sums + at), sum));
    }
  }

  const float* x = t.x + vector.source;
  ask_below<Taps, Step, Cols, false>(t, x, t.y, v * V::kWidth);
  float* row = const_cast<float*>(t.filter) + v * t.filter_vector;
  for (int64_t r = 0; r < t.rows; ++r, x += t.x_row, row += t.filter_row_step) {
    LaneSource<V, kLanes, Masked> source(t, v);
    float* sums = row;
    const int64_t reduce = kLanes == Lanes::plain ? 1 : t.reduce;
    LaneSourcePixels<kLanes, Taps, Step, Cols> pixels{x, t.x_column};
    // Of the next `Channels` source channels. A sum is one chain of multiply-adds as long as the tile:
    // those of two channels hide each other's latency.
    const auto dense = [&]<int Channels>(std::integral_constant<int, Channels>, int64_t first,
                                         Span inside) __attribute__((always_inline)) {
      constexpr int kSums = Vectors * Channels, kTaps = kPiece<Taps>;
      Reg sum[kSums][kTaps];
      const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 8
          for (int tap = 0; tap < kTaps; ++tap) {
            const int64_t at = i / Channels * t.filter_vector + first * V::kWidth;
            body(sums + at + (i % Channels * kTaps + tap) * V::kWidth, sum[i][tap]);
          }
      };
      each([](const float* at, Reg& value) { value = V::load(at); });
      const auto& from = pixels_of_piece<Taps>(pixels, first);
      slide<V, kTaps, Step, Cols, Channels>(inside, source, from, from,
                                            [&](int channel, int tap, int pixel, Reg a) {
#pragma GCC unroll 2
                                              for (int i = 0; i < Vectors; ++i) {
                                                Reg& to = sum[i * Channels + channel][tap];
                                                to = V::fma(a, dy[i][pixel], to);
                                              }
                                            });
      each([](float* at, Reg& value) { V::store(at, value); });
    };
    const auto sparse = [&](int64_t tap, int64_t end) __attribute__((always_inline)) {
      for (; tap < end; ++tap) {
        float* const at = sums + tap * V::kWidth;
        Reg sum[Vectors];
#pragma GCC unroll 2
        for (int i = 0; i < Vectors; ++i) sum[i] = V::load(at + i * t.filter_vector);
        stroll<V, Cols>(t, source, pixels[0], pixels[0], tap, [&](int pixel, Reg a) {
#pragma GCC unroll 2
          for (int i = 0; i < Vectors; ++i) sum[i] = V::fma(a, dy[i][pixel], sum[i]);
        });
#pragma GCC unroll 2
        for (int i = 0; i < Vectors; ++i) V::store(at + i * t.filter_vector, sum[i]);
      }
    };
    int64_t c = 0;
    if constexpr (Taps > 0 && kLanes == Lanes::broadcast && Vectors == 1 && kLanePairs<V>) {
      for (; c + 2 <= reduce; c += 2) {
        dense(std::integral_constant<int, 2>{}, 0, Span{t.column_begin, t.column_end});
        sums += 2 * Taps * V::kWidth;
        pixels.advance(2);
      }
    }
    for (; c < reduce; ++c) {
      for_each_piece<Taps, Step, Cols>(
          t,
          [&](int64_t first, Span inside) __attribute__((always_inline)) {
            dense(std::integral_constant<int, 1>{}, first, inside);
          },
          sparse);
      sums += taps_of_row<Taps>(t) * V::kWidth;
      if constexpr (kLanes == Lanes::broadcast) pixels.advance(1);
      if constexpr (kLanes != Lanes::plain) source.next_channel();
    }
  }
}

template <class V, bool Wgrad, Lanes kLanes, int Taps, int Step, int Cols>
void lane_tile(const LaneTile& tile) {
  // Of a copy the compiler knows that no store changes it.
  constexpr bool kCopies = !Wgrad || kLanes == Lanes::plain;
  const std::conditional_t<kCopies, const LaneTile, const LaneTile&> t = tile;
  constexpr bool kPairs = kLanePairs<V> && kLanes == Lanes::broadcast && Cols <= kLaneColumns<V>;
  // The other tiles are not called at the end.
  constexpr bool kMasked = V::kFreeMasks;
  constexpr bool kAtEnd =
      !kMasked && Taps == 0 && kLanes != Lanes::broadcast && kLanes != Lanes::gather;
  const auto some = [&]<int Vectors, bool Masked>(int64_t v) __attribute__((always_inline)) {
    if constexpr (Wgrad) {
      lane_wgrad_vectors<V, kLanes, Taps, Step, Cols, Vectors, Masked>(t, v);
    } else {
      lane_vectors<V, kLanes, Taps, Step, Cols, Vectors, Masked>(t, v);
    }
  };
  for (int64_t v = t.begin; v < t.end; ++v) {
    if constexpr (kPairs) {
      if (v + 1 < t.end && t.vectors[v].source == t.vectors[v + 1].source) {
        some.template operator()<2, kMasked>(v);
        ++v;
        continue;
      }
    }
    if constexpr (kAtEnd) {
      if (t.at_end) {
        some.template operator()<1, true>(v);
        continue;
      }
    }
    some.template operator()<1, kMasked>(v);
  }
}

using LaneTileFunction = void (*)(const LaneTile&);

template <class V, bool Wgrad, Lanes kLanes, int Taps, int Step, int... Less>
const LaneTileFunction* lane_tiles_of(std::integer_sequence<int, Less...>) {
  static constexpr LaneTileFunction kTiles[] = {
      lane_tile<V, Wgrad, kLanes, Taps, Step, Less + 1>...};
  return kTiles;
}

template <class V, bool Wgrad, Lanes kLanes, int Taps, int Step>
const LaneTileFunction* lane_tiles() {
  constexpr int kMost = kLanes == Lanes::broadcast ? kBroadcastColumns<V> : kLaneColumns<V>;
  return lane_tiles_of<V, Wgrad, kLanes, Taps, Step>(std::make_integer_sequence<int, kMost>{});
}

// The tiles of 1, 2, .. pixels for taps (0 for those with no tile of their own).
template <class V, bool Wgrad, Lanes kLanes>
const LaneTileFunction* lane_tiles(int64_t taps, int64_t step) {
  if constexpr (V::kWidth > 1) {
    constexpr bool kPlain = kLanes == Lanes::plain || kLanes == Lanes::masked;
    if constexpr (kPlain) {
      if (step == 1 && taps == 1) return lane_tiles<V, Wgrad, kLanes, 1, 1>();
      if (step == 1 && taps == 2) return lane_tiles<V, Wgrad, kLanes, 2, 1>();
    }
    if constexpr (kLanes == Lanes::plain) {
      if (step == 1 && taps == 5) return lane_tiles<V, Wgrad, kLanes, 5, 1>();
      if (step == 1 && taps == 7) return lane_tiles<V, Wgrad, kLanes, 7, 1>();
      // Longer rows: with as few taps left as can be.
      if (step == 1 && taps > 5 && taps % 5 <= taps % 7) {
        return lane_tiles<V, Wgrad, kLanes, -5, 1>();
      }
      if (step == 1 && taps > 7) return lane_tiles<V, Wgrad, kLanes, -7, 1>();
    }
    if constexpr (kLanes != Lanes::gather) {
      if (step == 1 && taps == 3) return lane_tiles<V, Wgrad, kLanes, 3, 1>();
    }
    if constexpr (kLanes != Lanes::gather && kLanes != Lanes::masked) {
      if (step == 2 && taps == 3) return lane_tiles<V, Wgrad, kLanes, 3, 2>();
    }
  }
  return lane_tiles<V, Wgrad, kLanes, 0, 1>();
}

template <class V, bool Wgrad>
const LaneTileFunction* lane_tiles(Lanes lanes, int64_t taps, int64_t step) {
  switch (lanes) {
    case Lanes::plain: return lane_tiles<V, Wgrad, Lanes::plain>(taps, step);
    case Lanes::broadcast: return lane_tiles<V, Wgrad, Lanes::broadcast>(taps, step);
    case Lanes::masked:
      if constexpr (!Wgrad) return lane_tiles<V, Wgrad, Lanes::masked>(taps, step);
      return nullptr;
    default: break;
  }
  if constexpr (V::kWidth > 1) {
    switch (lanes) {
      case Lanes::permute: return lane_tiles<V, Wgrad, Lanes::permute>(taps, step);
      case Lanes::permute2: return lane_tiles<V, Wgrad, Lanes::permute2>(taps, step);
      default: return lane_tiles<V, Wgrad, Lanes::gather>(taps, step);
    }
  }
  return nullptr;
}

// The vectors of output channels of a convolution, and how the channels are dealt to tasks.
template <class V>
struct LanePlan {
  Lanes lanes;
  int64_t columns;                    // pixels of a tile
  int64_t channels, vectors, reduce;  // output channels; source channels a group
  int64_t block, blocks;              // vectors of a task; such blocks
  int64_t rows;                       // output rows that a column of tiles goes down

  // `sums`: wgrad's, in the filter's place.
  LanePlan(const TapConvolution& g, int64_t taps_h, int64_t taps_w, bool sums)
      : channels(g.groups * g.columns), vectors(ceil_div(channels, V::kWidth)), reduce(g.reduce) {
    int64_t span = 0;
    bool one_group = true;
    for (int64_t v = 0; v < min64(vectors, g.columns); ++v) {  // the rest repeats these
      const int64_t groups = last_group(g, v) - first_group(g, v) + 1;
      one_group = one_group && groups == 1;
      span = max64(span, groups * reduce);
    }
    lanes = g.columns == 1 && reduce == 1 ? Lanes::plain
            : one_group                   ? Lanes::broadcast
            : span <= V::kWidth           ? Lanes::permute
            : span <= 2 * V::kWidth       ? Lanes::permute2
                                          : Lanes::gather;
    const bool pairs = kLanePairs<V> && g.columns >= 2 * V::kWidth;
    columns = lanes == Lanes::broadcast && !pairs ? kBroadcastColumns<V> : kLaneColumns<V>;
    // The filter of a block stays in half of the second-level cache: the larger the block, the longer the
    // pieces of pixels that are read from end to end. Sums, which come and go, have less room. So have
    // several channels with AVX-512, half of the first level: larger blocks were not timed there.
    constexpr int64_t kSecondLevel = int64_t{256} << 10, kFirstLevel = int64_t{16} << 10;
    const int64_t filter = taps_h * taps_w * reduce * V::kWidth * 4;
    const int64_t most = lanes == Lanes::plain ? kSecondLevel
                         : V::kRegisters == 32 ? kFirstLevel
                         : sums                ? kSecondLevel / 8
                                               : kSecondLevel;
    blocks = ceil_div(vectors, max64(1, min64(vectors, most / filter)));
    if (lanes != Lanes::plain) {  // of few tiles, enough for many threads
      const int64_t rows_of_task = sums ? 8 : 2;
      const int64_t tiles = g.images * ceil_div(g.out_h, rows_of_task) * ceil_div(g.out_w, columns);
      blocks = max64(blocks, min64(vectors, ceil_div(kTasksForMany, max64(1, tiles))));
    }
    constexpr int64_t kLineVectors = max64(1, kLine / V::kWidth);
    block = min64(vectors, round_up(ceil_div(vectors, blocks), kLineVectors));
    blocks = ceil_div(vectors, block);
    // So do the source rows under a column of tiles, as far as they go.
    const int64_t row = (columns * g.horizontal.step + taps_w) * block * max64(V::kWidth, span) * 4;
    const int64_t source_rows = (int64_t{24} << 10) / row;
    rows = max64(1, min64(8, (source_rows - taps_h) / g.vertical.step + 1));
  }

  static int64_t first_group(const TapConvolution& g, int64_t v) {
    return v * V::kWidth / g.columns;
  }
  int64_t last_group(const TapConvolution& g, int64_t v) const {
    return (min64(channels, (v + 1) * V::kWidth) - 1) / g.columns;
  }

  // Of the two tables below, in memory aligned to 64.
  int64_t table_bytes() const {
    return round_up(vectors * static_cast<int64_t>(sizeof(LaneVector)), 64) +
           round_up(vectors * V::kWidth * 4, 64);
  }
  void make_tables(const TapConvolution& g, float* memory, LaneTile& t) const {
    LaneVector* out = reinterpret_cast<LaneVector*>(memory);
    std::int32_t* index = reinterpret_cast<std::int32_t*>(
        memory + round_up(vectors * static_cast<int64_t>(sizeof(LaneVector)), 64) / 4);
    t.vectors = out;
    t.index = index;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = first_group(g, v);
      const int64_t span = (last_group(g, v) - first + 1) * reduce;
      const int columns = static_cast<int>(min64(V::kWidth, channels - v * V::kWidth));
      out[v].source = first * reduce;
      out[v].columns = columns;
      // permute2 loads whole vectors at first: a shorter span comes last, and its vector begins
      // earlier.
      int64_t shift = 0;
      if (lanes == Lanes::permute2 && span < V::kWidth) {
        shift = min64(out[v].source, V::kWidth - span);
        out[v].source -= shift;
      }
      out[v].loaded[0] = static_cast<int>(min64(V::kWidth, span + shift));
      out[v].loaded[1] = static_cast<int>(max64(0, min64(V::kWidth, span + shift - V::kWidth)));
      const bool loads = !V::kFreeMasks && lanes != Lanes::broadcast && lanes != Lanes::gather;
      if (loads && out[v].loaded[lanes == Lanes::permute2 ? 1 : 0] < V::kWidth) {
        t.pixel_reads = g.source_c + V::kWidth;
      }
      if (lanes == Lanes::plain || lanes == Lanes::broadcast) continue;
      for (int64_t lane = 0; lane < V::kWidth; ++lane) {
        const int64_t group = (v * V::kWidth + lane) / g.columns - first;
        index[v * V::kWidth + lane] =
            lane < columns ? static_cast<std::int32_t>(group * reduce + shift) : 0;
      }
    }
  }
};

// The pixels of an output row, dealt to tiles of neighbours. Under a dilated filter with stride 1
// neighbours are those that lie `apart`, as the taps do: they meet the same source pixels.
struct LaneRow {
  AxisTaps taps{};  // counted in source pixels that lie apart so
  int64_t pixels = 0, apart = 1, residues = 1, parts = 0;

  LaneRow() = default;
  // `columns`: of a tile, of vectors of `width` lanes.
  LaneRow(const TapConvolution& g, int64_t columns, int64_t width)
      : taps(g.horizontal), pixels(g.out_w) {
    if (taps.count > 1 && taps.stride > 1 && taps.step == 1) {
      // A line that is read by halves should stay until the second.
      const int64_t source = g.vertical.count * (columns + taps.count - 1);
      const bool stays =
          width >= kLine || !crowds_cache(source + columns, taps.stride * g.source_c);
      if (stays) apart = std::exchange(taps.stride, 1);
    }
    residues = max64(1, min64(apart, pixels));
    parts = ceil_div(ceil_div(pixels, residues), columns);
  }

  int64_t tiles() const { return residues * parts; }
  // Its first pixel, and how many it has.
  int64_t tile(int64_t index, int64_t& first) const {
    const int64_t residue = index % residues;
    const Span own = part_of(ceil_div(pixels - residue, residues), parts, index / residues);
    first = residue + own.begin * residues;
    return own.size();
  }
};

// Where tile (output row i, output pixels from j on) of image n begins in the source, in floats,
// and what of it t says: the taps that meet the source. Returns the first tap row.
inline int64_t locate_lane_tile(const TapConvolution& g, const LaneRow& pixels, int64_t n,
                                int64_t i, int64_t j, LaneTile& t, int64_t& source) {
  int64_t row, row_end;
  g.vertical.meeting(i, g.source_h, row, row_end);
  if (row >= row_end) row = row_end = 0;
  const int64_t column = j * g.horizontal.step + g.horizontal.first;
  source = n * g.source_image +
           ((i * g.vertical.step + g.vertical.offset(row)) * g.source_w + column) * g.source_c;
  t.rows = row_end - row;
  t.x_row = g.vertical.stride * g.source_w * g.source_c;
  t.x_column = pixels.apart * g.source_c;
  t.y_column = pixels.apart * g.y_column;
  t.column_begin = max64(0, -column);
  t.column_end = max64(0, g.source_w - column);
  if (pixels.apart > 1) {
    t.column_begin = ceil_div(t.column_begin, pixels.apart);
    t.column_end = ceil_div(t.column_end, pixels.apart);
  }
  t.column_end = max64(t.column_begin, t.column_end);
  t.x_left = g.images * g.source_image - source;
  t.taps = pixels.taps.count;
  t.tap_step = pixels.taps.stride;
  t.step = pixels.taps.step;
  t.x_below = g.vertical.step * g.source_w * g.source_c + (g.vertical.count - 1 - row) * t.x_row;
  t.y_below = g.y_row;
  t.rows_below = min64(g.vertical.step, g.vertical.count);
  return row;
}

// Whether tiles should ask for what is below them, of tensors of so many floats and `rows` of tiles: in a
// cache that costs an eighth of the time, beyond all of them it saves up to two thirds
// (docs/kernels/depthwise.md).
inline bool tiles_ask_below(int64_t floats, int64_t rows) {
  constexpr int64_t kFewRows = 4;
  return beyond_caches(floats) && rows >= kFewRows;
}

inline bool lane_tiles_ask_below(const TapConvolution& g) {
  return tiles_ask_below(g.images * (g.source_image + g.y_image), g.out_h);
}

// The tiles for the taps of one axis.
struct LaneTiles {
  // Those for tiles that hardly meet padding and lie before the source's end, and those for all.
  const LaneTileFunction *quick, *any;

  void run(LaneTile& t, int64_t pixels) const {
    const int64_t margin = t.taps - 1;
    const int64_t columns = (pixels - 1) * t.step + margin * t.tap_step + 1;
    const int64_t last = (t.rows - 1) * t.x_row + (min64(columns, t.column_end) - 1) * t.x_column;
    t.at_end = last + t.pixel_reads > t.x_left;
    const bool hardly = t.column_begin <= margin && t.column_end >= columns - margin;
    (hardly && !t.at_end ? quick : any)[pixels - 1](t);
  }
};

template <class V, bool Wgrad>
LaneTiles lane_tiles_for(Lanes lanes, const AxisTaps& h) {
  const bool dense = h.count <= 1 || h.stride == 1;
  const LaneTileFunction* const quick = lane_tiles<V, Wgrad>(lanes, dense ? h.count : 0, h.step);
  return {quick, lane_tiles<V, Wgrad>(lanes, 0, 1)};
}

// fprop, or dgrad: as many convolutions as there are residue classes, row by row together.
template <class V>
struct LaneConvolution {
  static constexpr int64_t kMostClasses = 16;

  struct Class {
    TapConvolution g;
    LaneRow row;
    int64_t first;                              // float of its outputs
    int64_t packed, filter_vector, filter_row;  // floats
    LaneTiles tiles;
  };

  static bool fits(const Conv2dProblem& p) {
    return min64(p.stride_h, p.h) * min64(p.stride_w, p.w) <= kMostClasses;
  }

  LaneConvolution(const Conv2dProblem& p, Direction direction) : plan(make_plan(p, direction)) {
    if (direction == Direction::fprop) {
      add(fprop_taps(p), 0);
    } else {
      for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t first) { add(g, first); });
    }
    const TapConvolution& g = classes[0].g;  // the largest
    // Tasks of some 10 us, yet enough of them for many threads.
    constexpr int64_t kMultiplyAdds = int64_t{1} << 19, kLeast = int64_t{1} << 16;
    const int64_t row = g.out_w * plan.block * V::kWidth * plan.reduce * max64(1, taps);
    strips = ceil_div(g.out_h, max64(1, kMultiplyAdds / row));
    if (g.images * strips * plan.blocks < kTasksForMany) {
      strips = max64(strips, min64(ceil_div(g.out_h, 2),
                                   ceil_div(kTasksForMany, max64(1, g.images * plan.blocks))));
    }
    // Of few rows, those of one-dimensional data, parts of a row.
    const int64_t own_tasks = max64(1, g.images * strips * plan.blocks);
    const int64_t by_work = row * g.out_h / strips / kLeast;
    spans = max64(1, min64(min64(tiles, by_work), kTasksForMany / own_tasks));
  }

  int64_t workspace_bytes() const { return round_up(packed_floats * 4, 64) + plan.table_bytes(); }

  void execute(const float* x, const float* mask, const float* filter, const float* bias,
               float* y) {
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    float* packed = workspace.floats();
    LaneTile common{};
    plan.make_tables(classes[0].g, packed + round_up(packed_floats, 16), common);
    const Lanes lanes = mask ? Lanes::masked : plan.lanes;
    for (int64_t k = 0; k < count; ++k) {
      classes[k].tiles = lane_tiles_for<V, false>(lanes, classes[k].row.taps);
    }
    parallel_for(plan.blocks, [&](int64_t block) {
      for (int64_t k = 0; k < count; ++k) {
        pack(classes[k], filter, block * plan.block, min64(plan.vectors, (block + 1) * plan.block),
             packed + classes[k].packed);
      }
    });
    common.reduce = plan.reduce;
    common.bias = bias;
    common.relu = classes[0].g.relu;
    common.ceiling = classes[0].g.ceiling;
    common.asks_below = lane_tiles_ask_below(classes[0].g);
    parallel_for(classes[0].g.images * strips * spans * plan.blocks, [&](int64_t task) {
      LaneTile t = common;
      const int64_t block = task % plan.blocks, part = task / plan.blocks;
      const int64_t span = part % spans, strip = part / spans % strips, n = part / spans / strips;
      t.begin = block * plan.block;
      t.end = min64(plan.vectors, t.begin + plan.block);
      const Span rows = part_of(classes[0].g.out_h, strips, strip);
      const Span own_tiles = part_of(tiles, spans, span);
      for (int64_t begin = rows.begin; begin < rows.end; begin += plan.rows) {
        const int64_t end = min64(rows.end, begin + plan.rows);
        for (int64_t tile = own_tiles.begin; tile < own_tiles.end; ++tile)
          for (int64_t i = begin; i < end; ++i)
            for (int64_t k = 0; k < count; ++k) {
              const Class& own = classes[k];
              const TapConvolution& g = own.g;
              if (i >= g.out_h || tile >= own.row.tiles()) continue;
              int64_t column, source;
              const int64_t pixels = own.row.tile(tile, column);
              const int64_t row = locate_lane_tile(g, own.row, n, i, column, t, source);
              t.x = x + source;
              t.mask = mask ? mask + source : nullptr;
              t.filter = packed + own.packed + row * own.filter_row;
              t.filter_vector = own.filter_vector;
              t.filter_row_step = own.filter_row;
              t.y = y + own.first + n * g.y_image + i * g.y_row + column * g.y_column;
              own.tiles.run(t, pixels);
            }
      }
    });
  }

  Class classes[kMostClasses];
  int64_t count = 0;
  LanePlan<V> plan;
  int64_t packed_floats = 0, taps = 0, strips = 0, spans = 0;
  int64_t tiles = 0;  // of a row: the most of a class

 private:
  static LanePlan<V> make_plan(const Conv2dProblem& p, Direction direction) {
    TapConvolution first = fprop_taps(p);
    if (direction == Direction::fprop) return LanePlan<V>(first, p.r, p.s, false);
    bool found = false;
    for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t) {
      if (!found) first = g;
      found = true;
    });
    return LanePlan<V>(first, ceil_div(p.r, p.stride_h), ceil_div(p.s, p.stride_w), false);
  }

  void add(const TapConvolution& g, int64_t first) {
    Class& out = classes[count++];
    out.g = g;
    out.row = LaneRow(g, plan.columns, V::kWidth);
    tiles = max64(tiles, out.row.tiles());
    out.first = first;
    out.packed = packed_floats;
    out.filter_row = g.reduce * g.horizontal.count * V::kWidth;
    out.filter_vector = g.vertical.count * out.filter_row;
    packed_floats += round_up(plan.vectors * out.filter_vector, 16);
    taps += g.vertical.count * g.horizontal.count;
  }

  void pack(const Class& own, const float* filter, int64_t begin, int64_t end,
            float* packed) const {
    const TapConvolution& g = own.g;
    for (int64_t v = begin; v < end; ++v) {
      const int64_t first = v * V::kWidth;
      const int valid = static_cast<int>(min64(V::kWidth, plan.channels - first));
      const auto tail = V::tail(valid);
      int64_t lanes[V::kWidth] = {};
      for (int lane = 0; lane < valid; ++lane) {
        lanes[lane] = (first + lane) / g.columns * g.filter_group +
                      (first + lane) % g.columns * g.filter_column;
      }
      float* out = packed + v * own.filter_vector;
      const int64_t out_c = g.horizontal.count * V::kWidth;  // from source channel to channel
      for (int64_t r = 0; r < g.vertical.count; ++r, out += own.filter_row)
        for (int64_t s = 0; s < g.horizontal.count; ++s) {
          const float* in =
              filter + (g.vertical.filter_first + r * g.vertical.filter_stride) * g.filter_tap_row +
              (g.horizontal.filter_first + s * g.horizontal.filter_stride) * g.filter_tap_column;
          float* to = out + s * V::kWidth;
          if (g.filter_column == 1 || (g.columns == 1 && g.filter_group == 1)) {
            // The filter's lines run along the output channels of all groups.
            for (int64_t c = 0; c < g.reduce; ++c) {
              V::store(to + c * out_c, V::load(in + first + c * g.filter_reduce, tail));
            }
            continue;
          }
          // They run along c.
          for (int64_t c = 0; c < g.reduce; c += V::kWidth) {
            const int depth = static_cast<int>(min64(V::kWidth, g.reduce - c));
            const auto deep = V::tail(depth);
            typename V::Reg rows[V::kWidth];
#pragma GCC unroll 16
            for (int lane = 0; lane < V::kWidth; ++lane) {
              rows[lane] = lane < valid ? V::load(in + lanes[lane] + c, deep) : V::zero();
            }
            V::transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < V::kWidth; ++i) {
              if (i < depth) V::store(to + (c + i) * out_c, rows[i]);
            }
          }
        }
    }
  }
};

// wgrad: output rows are dealt to parts whose number depends on the problem alone; a part has sums
// of its own, which are added up in order. Where rows are few, a part has tiles of some.
template <class V>
struct LaneWgrad {
  TapConvolution g;
  LanePlan<V> plan;
  LaneRow row;
  int64_t lines, spans, parts, row_floats, vector_floats, part_floats;
  bool bias;

  LaneWgrad(const Conv2dProblem& p, bool bias)
      : g(fprop_taps(p)), plan(g, p.r, p.s, true), row(g, plan.columns, V::kWidth),
        lines(p.n * p.oh), bias(bias) {
    row_floats = g.reduce * p.s * V::kWidth;
    vector_floats = p.r * row_floats;
    part_floats = plan.vectors * (vector_floats + (bias ? V::kWidth : 0));
    // Some 20 us a task at least; 4 MiB of sums at most, and fewer than the lines they are made of. More
    // sums than a quarter of what is read only for the sake of many threads.
    constexpr int64_t kMultiplyAdds = int64_t{1} << 20, kMostTasks = 64;
    const int64_t line = p.ow * p.r * p.s * g.reduce * plan.block * V::kWidth;
    const int64_t by_work = lines * line / kMultiplyAdds;
    const int64_t by_bytes = (int64_t{4} << 20) / (part_floats * 4);
    const int64_t by_data =
        max64((p.x_size() + p.y_size()) / (4 * part_floats), ceil_div(kTasksForMany, plan.blocks));
    const int64_t most =
        min64(min64(by_work, by_bytes), min64(by_data, ceil_div(kMostTasks, plan.blocks)));
    const int64_t line_parts = max64(1, min64(most, ceil_div(lines, 4)));
    // Of few lines, those of one-dimensional data, parts of a line.
    spans = max64(1, min64(most / line_parts, row.tiles() / 4));
    parts = line_parts * spans;
  }

  int64_t workspace_bytes() const {
    return round_up(parts * part_floats * 4, 64) + plan.table_bytes();
  }

  // `y`: dy counts where it is positive; null for everywhere. `dbias` may be null.
  void execute(const float* x, const float* dy, const float* y, float* dfilter, float* dbias) {
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    float* sums = workspace.floats();
    LaneTile common{};
    plan.make_tables(g, sums + round_up(parts * part_floats, 16), common);
    common.reduce = g.reduce;
    common.filter_vector = vector_floats;
    common.filter_row_step = row_floats;
    common.asks_below = lane_tiles_ask_below(g);
    const LaneTiles functions = lane_tiles_for<V, true>(plan.lanes, row.taps);
    parallel_for(parts * plan.blocks, [&](int64_t task) {
      const int64_t block = task % plan.blocks, part = task / plan.blocks;
      LaneTile t = common;
      t.begin = block * plan.block;
      t.end = min64(plan.vectors, t.begin + plan.block);
      float* own = sums + part * part_floats;
      float* own_bias = own + plan.vectors * vector_floats;
      std::memset(own + t.begin * vector_floats, 0,
                  static_cast<std::size_t>((t.end - t.begin) * vector_floats) * 4);
      if (bias) {
        std::memset(own_bias + t.begin * V::kWidth, 0,
                    static_cast<std::size_t>((t.end - t.begin) * V::kWidth) * 4);
        t.bias_sums = own_bias;
      }
      // A few rows at a time under each column of tiles: their source rows meet again in the
      // first-level cache, the neighbouring column of tiles in the second.
      const Span own_lines = part_of(lines, parts / spans, part / spans);
      const Span own_tiles = part_of(row.tiles(), spans, part % spans);
      for (int64_t begin = own_lines.begin; begin < own_lines.end; begin += plan.rows) {
        const int64_t end = min64(own_lines.end, begin + plan.rows);
        for (int64_t tile = own_tiles.begin; tile < own_tiles.end; ++tile) {
          int64_t column;
          const int64_t pixels = row.tile(tile, column);
          for (int64_t line = begin; line < end; ++line) {
            int64_t source;
            const int64_t tap_row =
                locate_lane_tile(g, row, line / g.out_h, line % g.out_h, column, t, source);
            const int64_t at = line * g.y_row + column * g.y_column;
            t.x = x + source;
            t.filter = own + tap_row * row_floats;
            t.y = const_cast<float*>(dy) + at;
            t.y_mask = y ? y + at : nullptr;
            functions.run(t, pixels);
          }
        }
      }
    });
    parallel_by_floats(plan.vectors, parts * (vector_floats + V::kWidth), [&](int64_t v) {
      const auto tail = V::tail(common.vectors[v].columns);
      const auto total = [&](int64_t at) {
        typename V::Reg sum = V::load(sums + at);
        for (int64_t part = 1; part < parts; ++part) {
          sum = V::add(sum, V::load(sums + part * part_floats + at));
        }
        return sum;
      };
      int64_t at = v * vector_floats;
      for (int64_t r = 0; r < g.vertical.count; ++r)
        for (int64_t c = 0; c < g.reduce; ++c)
          for (int64_t s = 0; s < g.horizontal.count; ++s, at += V::kWidth) {
            float* out = dfilter + r * g.filter_tap_row + s * g.filter_tap_column +
                         c * g.filter_reduce + v * V::kWidth;
            V::store(out, total(at), tail);
          }
      if (dbias) {
        V::store(dbias + v * V::kWidth, total(plan.vectors * vector_floats + v * V::kWidth), tail);
      }
    });
  }
};

// What the algorithms "depthwise" and "grouped" have in common.

template <class V>
void run_lanes(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
  if (direction == Direction::fprop) {
    LaneConvolution<V>(p, direction).execute(t.x, nullptr, t.filter, t.bias, t.out);
    return;
  }
  if (direction == Direction::wgrad) {
    LaneWgrad<V>(p, t.dbias).execute(t.x, t.dy, t.y, t.out, t.dbias);
    return;
  }
  LaneConvolution<V> convolution(p, direction);
  if (!t.y || convolution.plan.lanes == Lanes::plain) {
    convolution.execute(t.dy, t.y, t.filter, nullptr, t.out);
    return;
  }
  // Where a source vector is read several times, the mask is better applied once.
  const Workspace dz(static_cast<std::size_t>(p.y_size()) * 4);
  activation_grad<V>(p.n * p.oh * p.ow, p.k, t.dy, t.y, dz.floats(), nullptr);
  convolution.execute(dz.floats(), nullptr, t.filter, nullptr, t.out);
}

// What a multiply-add takes with its share of loads and permutations, on the scale of Direct's
// estimates.
template <class V>
double lane_cost(Lanes lanes, const LaneRow& row) {
  constexpr bool kFewRegisters = V::kRegisters < 32;
  const AxisTaps& h = row.taps;
  const bool slides = (h.count == 3 || lanes == Lanes::plain) && h.stride == 1 && h.step <= 2;
  switch (lanes) {
    case Lanes::plain:
    case Lanes::masked: return slides ? 1.2 : 1.6;
    case Lanes::broadcast:
      if (V::kWidth > 1 && kFewRegisters) return !slides ? 4 : row.apart > 1 ? 1.4 : 1.25;
      return V::kWidth == 1 ? 3 : slides ? 1.0 : 1.5;
    case Lanes::permute: return slides ? 1.25 : 2;
    case Lanes::permute2: return slides ? 1.6 : 3;
    case Lanes::gather: return 16;
  }
  return 1;
}

template <class V>
Estimate estimate_lanes(const Conv2dProblem& p, Direction direction) {
  constexpr double kAroundAFilterFloat = 8;  // to bring it into the order of lanes, and back
  Estimate out;
  const auto add = [&](const TapConvolution& g, const LaneRow& row, const LanePlan<V>& plan,
                       double pixels) {
    const double lanes = static_cast<double>(plan.vectors * V::kWidth) * pixels;
    const double products = static_cast<double>(g.vertical.count * g.horizontal.count * g.reduce);
    out.multiply_adds += lanes * (products * lane_cost<V>(plan.lanes, row) + 6);
  };
  if (direction == Direction::wgrad) {
    const LaneWgrad<V> wgrad(p, true);
    add(wgrad.g, wgrad.row, wgrad.plan, static_cast<double>(p.n * p.oh * p.ow));
    out.multiply_adds += kAroundAFilterFloat * static_cast<double>(wgrad.part_floats);
    out.workspace_bytes = wgrad.workspace_bytes();
    return out;
  }
  const LaneConvolution<V> convolution(p, direction);
  for (int64_t k = 0; k < convolution.count; ++k) {
    const TapConvolution& g = convolution.classes[k].g;
    add(g, convolution.classes[k].row, convolution.plan,
        static_cast<double>(g.images * g.out_h * g.out_w));
  }
  out.multiply_adds += kAroundAFilterFloat * static_cast<double>(convolution.packed_floats);
  out.workspace_bytes = convolution.workspace_bytes();
  return out;
}

template <class V>
std::string describe_lanes(const Conv2dProblem& p, Direction direction) {
  const auto text = [](const LanePlan<V>& plan) {
    const char* const names[] = {"plain",    "masked",          "broadcast",
                                 "permuted", "permuted of two", "gathered"};
    return std::to_string(plan.columns) + " x " + std::to_string(int{V::kWidth}) +
           " tile of pixels x channels, source lanes " + names[static_cast<int>(plan.lanes)] +
           ", blocks of " + std::to_string(plan.block) + " vectors";
  };
  if (direction != Direction::wgrad) return text(LaneConvolution<V>(p, direction).plan);
  const LaneWgrad<V> wgrad(p, true);
  return text(wgrad.plan) + ", " + std::to_string(wgrad.parts) + " partial sums";
}

}  // namespace
}  // namespace fastconv::cpu
