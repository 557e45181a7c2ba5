// Depthwise convolutions row by row of the output, some neighbouring pixels at a time; a tile's rows
// are as many as one likes. Filters of one row go this way everywhere, a few taps at a time beside the sums of
// some pixels. With 16 vector registers so do others: of 3 x 3 taps these hold all nine,
// or, of wgrad, their nine sums; of larger filters, for fprop and dgrad of stride 1, a row of taps and
// the sums of the pixels.
//
// A row of the source is read once for each row of taps, where tiles that take several rows at once
// (depthwise.hpp) read it less often, but from the first-level cache. In return edges cost next to
// nothing: which rows of taps meet the source is decided once a row, and the pixels at its ends have
// code of their own or, of one row of taps, are computed with their neighbours. Small images are mostly
// edges.
#pragma once

#include <type_traits>

#include "cpu/depthwise_tile.hpp"

namespace fastconv::cpu {
namespace {

// Bytes from row to row of the source, from column to column, and over three columns.
struct SourceSteps {
  int64_t row, column, columns_3;

  explicit SourceSteps(const DepthwiseTile& t) : SourceSteps(t, t.source_column) {}
  SourceSteps(const DepthwiseTile& t, int64_t column_floats)
      : row(hidden(t.source_row * 4)), column(hidden(column_floats * 4)),
        columns_3(hidden(3 * column)) {}
};

// A Span of all there is.
struct Everywhere {};

// A Span that the compiler knows, with the names of one.
template <int Begin, int End>
struct KnownSpan {
  // NOLINTNEXTLINE(readability-identifier-naming)
  static constexpr int64_t begin = Begin, end = End;
};

// Calls body(taps) with those of an axis that meet the source, where it has begin .. end - 1 of what they
// may meet. Those of an edge with one line of padding are known; the rest is a matter of small images.
template <class Body>
inline __attribute__((always_inline)) void with_taps(int64_t begin, int64_t end, const Body& body) {
  if (begin <= 0 && end >= 3) return body(KnownSpan<0, 3>{});
  if (begin <= 0 && end == 2) return body(KnownSpan<0, 2>{});
  if (begin == 1 && end >= 3) return body(KnownSpan<1, 3>{});
  body(Span{begin, end});
}

// The rows of the source that a row of the output meets, of the taps of `Taps`, a Span. Each has a
// pointer, and distances are in bytes: addresses that an x86 instruction adds up by itself.
template <class V, int Step, class Taps>
struct SourceRows {
  const char* rows[3];
  int64_t column, columns_3;
  Taps taps;

  SourceRows(const float* source, const SourceSteps& steps, Taps which)
      : column(steps.column), columns_3(steps.columns_3), taps(which) {
    const char* at = reinterpret_cast<const char*>(source);
    for (int r = 0; r < 3; ++r, at += steps.row) rows[r] = at;
  }

  // Calls body(r, s, j, source vector) for the taps of `Pixels` neighbours, j of 0 .. Pixels - 1, that
  // meet the columns `inside`, a Span, of theirs. Then goes on to the next pixel.
  template <int Pixels, class Inside, class Channels, class Body>
  __attribute__((always_inline)) void meet(Inside inside, const Channels& channels,
                                           const Body& body) {
    constexpr int kOwn =
        Pixels == 1 ? 3 : Pixels * Step;  // before those of the next pixel's, if several
    const auto columns = [&]<int From, int To>() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < 3; ++r) {
        if (r < taps.begin || r >= taps.end) continue;
#pragma GCC unroll 8
        for (int at = From; at < To; ++at) {
          if (at < inside.begin || at >= inside.end) continue;
          const int64_t apart = at - From == 3 ? columns_3 : (at - From) * column;
          auto a = channels.load(reinterpret_cast<const float*>(rows[r] + apart), 0);
          const int first_pixel = at < 3 ? 0 : (at - 3) / Step + 1, last_pixel = at / Step;
          // Left to itself, the compiler loads it for each of them.
          if (first_pixel < last_pixel && first_pixel < Pixels - 1) a = V::held(a);
#pragma GCC unroll 4
          for (int j = 0; j < Pixels; ++j) {
            const int s = at - j * Step;
            if (s >= 0 && s < 3) body(r, s, j, a);
          }
        }
      }
    };
    columns.template operator()<0, kOwn>();
    const int64_t advance = Pixels * Step == 3 ? columns_3 : Pixels * Step * column;
#pragma GCC unroll 4
    for (int r = 0; r < 3; ++r) rows[r] = hidden(rows[r] + advance);
    if constexpr (Pixels > 1) columns.template operator()<kOwn, (Pixels - 1) * Step + 3>();
  }
};

// The columns of a tile: those at the left edge of the source, within, and at the right edge.
struct DepthwiseColumns {
  int64_t left, inner, right;
  int64_t begin, end;  // the source columns that exist

  DepthwiseColumns(const DepthwiseTile& t, int64_t step)
      : begin(t.column_begin), end(t.column_end) {
    left = max64(0, min64(t.columns, ceil_div(begin, step)));
    inner = max64(0, min64(t.columns, (end - 3 + step) / step) - left);
    right = t.columns - left - inner;
  }

  // Calls meet<pixels>(inside) for neighbours that meet the columns `inside` of theirs, mostly for `Pixels`
  // of them; and ask(pixels) before, if there is something to ask for.
  template <int Step, int Pixels, class Meet, class Ask>
  __attribute__((always_inline)) void walk(const Meet& meet, bool asks, const Ask& ask) const {
    const auto edge = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      for (int64_t j = from; j < to; ++j) {
        meet.template operator()<1>(Span{begin - j * Step, end - j * Step});
      }
    };
    if (left == 1 && begin == 1 && end >= 3) {
      meet.template operator()<1>(KnownSpan<1, 3>{});
    } else {
      edge(0, left);
    }
    using All = KnownSpan<0, (Pixels - 1) * Step + 3>;
    int64_t some = inner;
    if (asks) {
      for (; some >= Pixels; some -= Pixels) {
        ask(std::integral_constant<int, Pixels>{});
        meet.template operator()<Pixels>(All{});
      }
    } else {
      for (; some >= Pixels; some -= Pixels) meet.template operator()<Pixels>(All{});
    }
    for (; some > 0; --some) meet.template operator()<1>(KnownSpan<0, 3>{});
    const int64_t last = left + inner;
    if (right == 1 && begin <= last * Step && end - last * Step == 2) {
      meet.template operator()<1>(KnownSpan<0, 2>{});
    } else {
      edge(last, last + right);
    }
  }
};

// Asks for what the tile below has of the columns of `Pixels` pixels, in the row as far below as this
// tile has rows.
template <class V, int R, int Step, bool Writes, int Pixels>
inline __attribute__((always_inline)) void ask_for_row(const DepthwiseTile& t, const char* source,
                                                       const float* out) {
  const float* const below =
      reinterpret_cast<const float*>(source) + (R - Step + t.rows * Step) * t.source_row;
#pragma GCC unroll 8
  for (int column = 0; column < Pixels * Step; ++column) {
    ask_for_rows<Step, false>(below + column * t.source_column, t.source_row, V::kWidth);
  }
#pragma GCC unroll 4
  for (int j = 0; j < Pixels; ++j) {
    ask_for_rows<1, Writes>(out + t.rows * t.out_row + j * t.out_column, 0, V::kWidth);
  }
}

// fprop, and dgrad of stride 1: the taps in registers.
template <class V, int Step>
void depthwise_rows(const DepthwiseTile& t) {
  constexpr int kPixels = Step == 1 ? 3 : 2;
  using Reg = typename V::Reg;
  const DepthwiseColumns columns(t, Step);
  const SourceSteps steps(t);
  for_each_channel_vector<V, 1>(
      t.channels, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
        Reg tap[3][3];
#pragma GCC unroll 4
        for (int r = 0; r < 3; ++r)
#pragma GCC unroll 4
          for (int s = 0; s < 3; ++s) {
            tap[r][s] = channels.load(t.filter + r * t.filter_row + s * t.filter_column + c, 0);
          }
        const Reg start = t.bias ? channels.load(t.bias + c, 0) : V::zero();
        const bool asks_below = t.asks_below && c % kLine == 0;
        const float* source = t.source + c;
        float* out_row = t.out + c;
        for (int64_t i = 0; i < t.rows; ++i, source += Step * t.source_row, out_row += t.out_row) {
          float* out = out_row;
          with_taps(
              t.row_begin - i * Step, t.row_end - i * Step,
              [&]<class Taps>(Taps taps) __attribute__((always_inline)) {
                SourceRows<V, Step, Taps> rows(source, steps, taps);
                const auto meet =
                    [&]<int Pixels, class Inside>(Inside inside) __attribute__((always_inline)) {
                      Reg sum[Pixels];
#pragma GCC unroll 4
                      for (int j = 0; j < Pixels; ++j) sum[j] = start;
                      rows.template meet<Pixels>(inside, channels,
                                                 [&](int r, int s, int j, Reg a)
                                                     __attribute__((always_inline)) {
                                                       sum[j] = V::fma(a, tap[r][s], sum[j]);
                                                     });
                      if (t.relu) {
                        const Reg ceiling = V::set(t.ceiling);
#pragma GCC unroll 4
                        for (int j = 0; j < Pixels; ++j) sum[j] = relu_to<V>(ceiling, sum[j]);
                      }
#pragma GCC unroll 4
                      for (int j = 0; j < Pixels; ++j)
                        channels.store(out + j * t.out_column, sum[j], 0);
                      out = hidden(out + Pixels * t.out_column);
                    };
                const auto ask = [&]<int Pixels>(std::integral_constant<int, Pixels>)
                                     __attribute__((always_inline)) {
                                       ask_for_row<V, 3, Step, true, Pixels>(t, rows.rows[0], out);
                                     };
                columns.walk<Step, kPixels>(meet, asks_below, ask);
              });
        }
      });
}

// sum[j] += what a row of taps makes of pixel j, of neighbours whose first source column is at `row`. Of
// their source columns those of `inside`, a Span, exist.
template <class V, int Step, int Taps, int Pixels, class Inside, class Channels>
inline __attribute__((always_inline)) void add_row_of_taps(const char* row,
                                                           const SourceSteps& steps, Inside inside,
                                                           const Channels& channels,
                                                           const typename V::Reg (&tap)[Taps],
                                                           typename V::Reg (&sum)[Pixels]) {
  const char* four = row;
#pragma GCC unroll 32
  for (int at = 0; at < (Pixels - 1) * Step + Taps; ++at) {
    if (at >= inside.begin && at < inside.end) {
      const int64_t apart = at % 4 == 3 ? steps.columns_3 : at % 4 * steps.column;
      const auto a = V::held(channels.load(reinterpret_cast<const float*>(four + apart), 0));
#pragma GCC unroll 16
      for (int j = 0; j < Pixels; ++j) {
        const int s = at - j * Step;
        if (s >= 0 && s < Taps) sum[j] = V::fma(a, tap[s], sum[j]);
      }
    }
    if (at % 4 == 3) four = hidden(four + 4 * steps.column);
  }
}

// Calls body(s, j, source vector) for a row of taps and the pixels that lie `step` columns apart, from the
// source column at `row` on: each pixel reads what it meets by itself, from the first-level cache, as fast as
// it is multiplied.
template <class V, int Taps, int Pixels, class Inside, class Channels, class Body>
inline __attribute__((always_inline)) void meet_pixels_apart(
    const char* row, const SourceSteps& steps, const SourceSteps& pixel_steps, int64_t step,
    Inside inside, const Channels& channels, const Body& body) {
#pragma GCC unroll 8
  for (int s = 0; s < Taps; ++s) {
    const char* four = row;
#pragma GCC unroll 16
    for (int j = 0; j < Pixels; ++j) {
      const auto meet = [&]() __attribute__((always_inline)) {
        const int64_t apart = j % 4 == 3 ? pixel_steps.columns_3 : j % 4 * pixel_steps.column;
        body(s, j, channels.load(reinterpret_cast<const float*>(four + apart), 0));
      };
      if constexpr (std::is_same_v<Inside, Everywhere>) {
        meet();
      } else if (const int64_t at = j * step + s; at >= inside.begin && at < inside.end) {
        meet();
      }
      if (j % 4 == 3) four = hidden(four + 4 * pixel_steps.column);
    }
    row = hidden(row + steps.column);
  }
}

template <class V, int Pixels>
inline __attribute__((always_inline)) void activate_pixels(bool relu, typename V::Reg ceiling,
                                                           typename V::Reg (&sum)[Pixels]) {
  if (!relu) return;
#pragma GCC unroll 16
  for (int j = 0; j < Pixels; ++j) sum[j] = relu_to<V>(ceiling, sum[j]);
}

// Neighbouring taps of a row, to registers.
template <class V, int Taps, class Channels>
inline __attribute__((always_inline)) void load_taps(const float* filter, int64_t column,
                                                     const Channels& channels,
                                                     typename V::Reg (&tap)[Taps]) {
#pragma GCC unroll 16
  for (int s = 0; s < Taps; ++s) tap[s] = V::held(channels.load(filter + s * column, 0));
}

// Portable code has few kernels, for the sake of those who compile it.
template <class V>
constexpr int64_t kMostTapsOfPart = V::kWidth == 1       ? 3
                                    : V::kRegisters < 32 ? 5
                                                         : 8;

// Of so many taps in a row, how many are in registers at a time: all of them, or parts of like sizes.
template <class V>
constexpr int64_t taps_of_part(int64_t taps) {
  constexpr int64_t kMost = kMostTapsOfPart<V>;
  const bool at_once = taps <= kMost || (taps == 7 && V::kWidth > 1);
  return at_once ? taps : ceil_div(taps, ceil_div(taps, kMost));
}

// Whether some number of taps comes in such parts; `many`: in several.
template <class V>
constexpr bool is_part_of_taps(int64_t part, bool many) {
  // More than these come in parts of the same sizes.
  for (int64_t taps = 2; taps <= 2 * kMostTapsOfPart<V>; ++taps) {
    if (taps_of_part<V>(taps) == part && (part < taps) == many) return true;
  }
  return false;
}

// Neighbouring pixels whose sums, beside these, are in registers too.
template <class V>
constexpr int pixels_of_one_row(int64_t taps) {
  return V::kRegisters == 32 ? 12 : taps == 7 ? 7 : 8;
}

// Calls part(number of taps, a std::integral_constant) for `taps` taps: all of them at once or, of many, parts of
// `Taps` or one less.
template <int Taps, bool Many, class Part>
inline __attribute__((always_inline)) void for_each_part_of_taps(int64_t taps, const Part& part) {
  if constexpr (Many) {
    const int64_t parts = ceil_div(taps, Taps);
    const int64_t whole_parts = taps - parts * (Taps - 1);
    for (int64_t i = 0; i < whole_parts; ++i) part(std::integral_constant<int, Taps>{});
    for (int64_t i = whole_parts; i < parts; ++i) part(std::integral_constant<int, Taps - 1>{});
  } else {
    part(std::integral_constant<int, Taps>{});
  }
}

// Of one row, asks for `Pixels` pixels' lines of the source, `step` columns each, and of the output, or dy: a
// vector's of those that come next, which lie too far apart for the hardware to ask for them.
template <int Pixels, bool Writes>
inline __attribute__((always_inline)) void ask_for_pixels(const float* source,
                                                          int64_t source_column, int64_t step,
                                                          const float* out, int64_t out_column) {
#pragma GCC unroll 16
  for (int j = 0; j < Pixels; ++j) {
    for (int64_t k = 0; k < step; ++k) {
      __builtin_prefetch(source + (j * step + k) * source_column, 0, 2);
    }
    __builtin_prefetch(out + j * out_column, Writes ? 1 : 0, 2);
  }
}

// What source columns some pixels meet that are all there, of stride 1 `Columns` of them.
template <bool Strided, int Columns>
constexpr auto all_inside() {
  if constexpr (Strided) {
    return Everywhere{};
  } else {
    return KnownSpan<0, Columns>{};
  }
}

// Of pixels that lie `step` columns apart, the first in column 0, those before column `columns`.
inline int64_t pixels_before(int64_t columns, int64_t step) {
  return step == 1 ? columns : columns <= 0 ? 0 : ceil_div(columns, step);
}

// fprop, and dgrad of stride 1, of filters of one row, as those of signals in one dimension are. Of some
// neighbouring pixels all channels come before the next pixels': so memory is read and written nearly in
// its order, and what neighbours share is still in the first-level cache, even where pixels lie a power of
// two apart. Of few channels it is all pixels for each vector, whose taps stay in registers. `Many`: taps
// are taken in parts, of Taps or one less, beside sums that stay. `Strided`: pixels lie t.step source columns
// apart.
template <class V, int Taps, bool Many, bool Strided>
void depthwise_rows_of_one(const DepthwiseTile& t) {
  constexpr int kPixels = pixels_of_one_row<V>(Taps);
  constexpr int64_t kFewChannels = Many ? 0 : 3 * V::kWidth;
  using Reg = typename V::Reg;
  constexpr std::integral_constant<int, kPixels> kAllStored;
  static constexpr float kNoBias[V::kWidth] = {};
  const int64_t step = Strided ? t.step : 1;
  const SourceSteps steps(t), pixel_steps(t, step * t.source_column);
  // Not read anew behind each store.
  const int64_t out_column = hidden(t.out_column), filter_column = hidden(t.filter_column);
  const int64_t columns = t.columns, channel_count = t.channels, taps = t.taps;
  const float* const first_bias = t.bias ? t.bias : kNoBias;
  const int64_t bias_step = t.bias ? V::kWidth : 0;
  const bool relu = t.relu, asks_ahead = t.asks_below;
  const Reg ceiling = V::set(t.ceiling);

  const auto add_taps = [&](const char* row, auto inside, const auto& channels, const auto& tap,
                            Reg(&sum)[kPixels]) __attribute__((always_inline)) {
    constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(tap)>>;
    if constexpr (Strided) {
      meet_pixels_apart<V, kCount, kPixels>(
          row, steps, pixel_steps, step, inside, channels,
          [&](int s, int j, Reg a)
              __attribute__((always_inline)) { sum[j] = V::fma(a, tap[s], sum[j]); });
    } else {
      add_row_of_taps<V, 1>(row, steps, inside, channels, tap, sum);
    }
  };
  // A vector of kPixels pixels. `add`: the products of all taps to the sums, where `inside` exists.
  const auto pixels_of = [&](Reg start, float* out, const auto& channels, auto stored,
                             const auto& add) __attribute__((always_inline)) {
    Reg sum[kPixels];
#pragma GCC unroll 16
    for (int j = 0; j < kPixels; ++j) sum[j] = start;
    add(sum);
    activate_pixels<V>(relu, ceiling, sum);
#pragma GCC unroll 16
    for (int j = 0; j < kPixels; ++j) {
      if (j < stored) channels.store(out + j * out_column, sum[j], 0);
    }
  };
  // All channels of kPixels pixels.
  const auto all_channels = [&](const float* source, float* out, auto inside,
                                auto stored) __attribute__((always_inline)) {
    const float *filter = t.filter, *bias = first_bias;
    int64_t left = channel_count;
    const auto vector = [&](const auto& channels) __attribute__((always_inline)) {
      if (asks_ahead && (channel_count - left) % kLine == 0) {
        ask_for_pixels<kPixels, true>(source + ((kPixels - 1) * step + taps) * t.source_column,
                                      t.source_column, step, out + kPixels * out_column,
                                      out_column);
      }
      pixels_of(channels.load(bias, 0), out, channels, stored,
                [&](Reg(&sum)[kPixels]) __attribute__((always_inline)) {
                  const char* row = reinterpret_cast<const char*>(source);
                  const float* from = filter;
                  int64_t done = 0;
                  const auto part = [&](auto count) __attribute__((always_inline)) {
                    Reg tap[count];
                    load_taps<V>(from, filter_column, channels, tap);
                    add_taps(row, inside(done, count), channels, tap, sum);
                    row += count * steps.column;
                    from += count * filter_column;
                    done += count;
                  };
                  for_each_part_of_taps<Taps, Many>(taps, part);
                });
    };
    for (; left >= V::kWidth; left -= V::kWidth) {
      vector(ChannelVectors<V, 1, true>(V::kWidth));
      source = hidden(source + V::kWidth);
      out = hidden(out + V::kWidth);
      filter = hidden(filter + V::kWidth);
      bias += bias_step;
    }
    if (left > 0) vector(ChannelVectors<V, 1, false>(left));
  };
  // Of few channels, `count` pixels within the source.
  const auto few_channels = [&](const float* first_source, float* first_out, int64_t count) {
    for_each_channel_vector<V, 1>(
        channel_count, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
          Reg tap[Taps];
          load_taps<V>(t.filter + c, filter_column, channels, tap);
          const Reg start = V::held(channels.load(first_bias + (bias_step > 0 ? c : 0), 0));
          for (int64_t done = 0; done < count; done += kPixels) {
            const int64_t pixel = min64(done, count - kPixels);
            const char* const row =
                reinterpret_cast<const char*>(first_source + c) + pixel * pixel_steps.column;
            pixels_of(start, first_out + pixel * out_column + c, channels, kAllStored,
                      [&](Reg(&sum)[kPixels]) __attribute__((always_inline)) {
                        add_taps(row, all_inside<Strided, kPixels - 1 + Taps>(), channels, tap,
                                 sum);
                      });
          }
        });
  };

  const int64_t pixels = min64(kPixels, columns);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* const source = t.source + i * t.source_row;
    float* const out = t.out + i * t.out_row;
    const bool exists = t.row_begin <= i && i < t.row_end;
    const Span own{exists ? t.column_begin : 0, exists ? t.column_end : 0};
    const int64_t inner_end = min64(columns, pixels_before(own.end - taps + 1, step));
    for (int64_t done = 0; done < columns;) {
      // The last ones once more, if their number does not fit.
      const int64_t pixel = min64(done, columns - pixels), column = pixel * step;
      const float* const from = source + column * t.source_column;
      float* const to = out + pixel * out_column;
      done = pixel + pixels;
      if (own.begin > column || done > inner_end || pixels < kPixels) {
        // Fewer pixels than there are sums for meet fewer columns, of which alone there may be a copy.
        const Span met{own.begin - column, min64(own.end - column, (pixels - 1) * step + taps)};
        all_channels(
            from, to, [&](int64_t tap, auto) { return Span{met.begin - tap, met.end - tap}; },
            pixels);
      } else if (channel_count > kFewChannels) {
        all_channels(
            from, to,
            [](int64_t, auto count) { return all_inside<Strided, kPixels - 1 + count>(); },
            kAllStored);
      } else {
        few_channels(from, to, inner_end - pixel);
        done = inner_end;
      }
    }
  }
}

// wgrad of filters of one row: a part of the taps' sums, and some neighbouring pixels of dy, are in registers. Of a few taps each has two sums: one would wait for its own multiply-adds.
template <class V, int Taps, bool Many, bool Strided>
void depthwise_wgrad_rows_of_one(const DepthwiseTile& t) {
  constexpr int kPixels = pixels_of_one_row<V>(Taps);
  constexpr int kSums = V::kRegisters == 32 && Taps <= 4 ? 2 : 1;
  using Reg = typename V::Reg;
  const int64_t step = Strided ? t.step : 1;
  const SourceSteps steps(t), pixel_steps(t, step * t.source_column);
  const int64_t out_column = hidden(t.out_column), taps = t.taps;

  // Pixels of all channels, of which `inside(first tap, taps)` of the source exists.
  const auto all_channels = [&](const float* source, const float* dy, auto pixels,
                                const auto& inside) __attribute__((always_inline)) {
    float* sums = t.sums;
    for_each_channel_vector<V, 1>(t.channels, [&](int64_t c, const auto& channels) __attribute__((
                                                  always_inline)) {
      if (t.asks_below && c % kLine == 0) {
        ask_for_pixels<kPixels, false>(source + c + ((kPixels - 1) * step + taps) * t.source_column,
                                       t.source_column, step, dy + c + kPixels * out_column,
                                       out_column);
      }
      Reg b[kPixels];
#pragma GCC unroll 16
      for (int j = 0; j < kPixels; ++j) {
        b[j] = j < pixels ? channels.load(dy + c + j * out_column, 0) : V::zero();
      }
      if (t.bias_sums) {
        Reg sum = V::load(t.bias_sums + c);
#pragma GCC unroll 16
        for (int j = 0; j < kPixels; ++j) sum = V::add(sum, b[j]);
        V::store(t.bias_sums + c, sum);
      }
      const char* row = reinterpret_cast<const char*>(source + c);
      int64_t done = 0;
      const auto part = [&](auto count) __attribute__((always_inline)) {
        constexpr int kCount = decltype(count)::value;
        const auto met = inside(done, count);
        Reg sum[kCount][kSums];
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s) {
          sum[s][0] = V::load(sums + s * V::kWidth);
          if (kSums > 1) sum[s][kSums - 1] = V::zero();
        }
        // Not of pixels that do not exist, which would be 0, unless what they met is not finite.
        const auto add = [&](int s, int j, Reg a) __attribute__((always_inline)) {
          if (j < pixels) sum[s][j % kSums] = V::fma(a, b[j], sum[s][j % kSums]);
        };
        if constexpr (Strided) {
          meet_pixels_apart<V, kCount, kPixels>(row, steps, pixel_steps, step, met, channels, add);
        } else {
          const char* four = row;
#pragma GCC unroll 32
          for (int at = 0; at < kPixels - 1 + kCount; ++at) {
            if (at >= met.begin && at < met.end) {
              const int64_t apart = at % 4 == 3 ? steps.columns_3 : at % 4 * steps.column;
              const auto a =
                  V::held(channels.load(reinterpret_cast<const float*>(four + apart), 0));
#pragma GCC unroll 16
              for (int j = 0; j < kPixels; ++j) {
                if (at >= j && at < j + kCount) add(at - j, j, a);
              }
            }
            if (at % 4 == 3) four = hidden(four + 4 * steps.column);
          }
        }
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s) {
          if (kSums > 1) sum[s][0] = V::add(sum[s][0], sum[s][kSums - 1]);
          V::store(sums + s * V::kWidth, sum[s][0]);
        }
        row += kCount * steps.column;
        sums += kCount * V::kWidth;
        done += kCount;
      };
      for_each_part_of_taps<Taps, Many>(taps, part);
    });
  };

  for (int64_t i = 0; i < t.rows; ++i) {
    const bool exists = t.row_begin <= i && i < t.row_end;
    const Span own{exists ? t.column_begin : 0, exists ? t.column_end : 0};
    for (int64_t pixel = 0; pixel < t.columns; pixel += kPixels) {
      const int64_t column = pixel * step;
      const float* const source = t.source + i * t.source_row + column * t.source_column;
      const float* const dy = t.out + i * t.out_row + pixel * out_column;
      const int64_t pixels = min64(kPixels, t.columns - pixel);
      const Span met{own.begin - column, min64(own.end - column, (pixels - 1) * step + taps)};
      if (pixels == kPixels && met.begin <= 0 && met.end == (kPixels - 1) * step + taps) {
        all_channels(source, dy, std::integral_constant<int, kPixels>{}, [](int64_t, auto count) {
          return all_inside<Strided, kPixels - 1 + count>();
        });
      } else {
        all_channels(source, dy, pixels,
                     [&](int64_t tap, auto) { return Span{met.begin - tap, met.end - tap}; });
      }
    }
  }
}

// fprop, and dgrad of stride 1, of more taps than there are registers for: a row of them at a time, for
// `kPixels` neighbours, whose sums are in registers.
template <class V, int R, int Step>
void depthwise_rows_of_many_taps(const DepthwiseTile& t) {
  constexpr int kPixels = 7;
  using Reg = typename V::Reg;
  const SourceSteps steps(t);
  for_each_channel_vector<V, 1>(t.channels, [&](int64_t c, const auto& channels) __attribute__((
                                                always_inline)) {
    copy_depthwise_taps<V, R>(t, c, channels);
    const bool asks_below = t.asks_below && c % kLine == 0;
    const float* source = t.source + c;
    float* out_row = t.out + c;
    for (int64_t i = 0; i < t.rows; ++i, source += Step * t.source_row, out_row += t.out_row) {
      const int64_t first = max64(0, t.row_begin - i * Step), end = min64(R, t.row_end - i * Step);
      for (int64_t pixel = 0; pixel < t.columns; pixel += kPixels) {
        const int64_t pixels = min64(kPixels, t.columns - pixel);
        const float* const at_pixel = source + pixel * Step * t.source_column;
        float* const out = out_row + pixel * t.out_column;
        if (asks_below) {
          ask_for_row<V, R, Step, true, kPixels>(t, reinterpret_cast<const char*>(at_pixel), out);
        }
        // Of their source columns.
        const int64_t column_begin = t.column_begin - pixel * Step;
        const int64_t column_end = min64(t.column_end - pixel * Step, (pixels - 1) * Step + R);
        Reg sum[kPixels];
        const Reg start = V::load(t.scratch + R * R * V::kWidth);
#pragma GCC unroll 16
        for (int j = 0; j < kPixels; ++j) sum[j] = start;
        const auto add = [&](auto inside) __attribute__((always_inline)) {
          const char* row = reinterpret_cast<const char*>(at_pixel) + first * steps.row;
          const float* taps = t.scratch + first * R * V::kWidth;
          for (int64_t r = first; r < end; ++r, row += steps.row, taps += R * V::kWidth) {
            Reg tap[R];
#pragma GCC unroll 16
            for (int s = 0; s < R; ++s) tap[s] = V::held(V::load(taps + s * V::kWidth));
            add_row_of_taps<V, Step>(row, steps, inside, channels, tap, sum);
          }
        };
        constexpr int kColumns = (kPixels - 1) * Step + R;
        if (column_begin <= 0 && column_end == kColumns) {
          add(KnownSpan<0, kColumns>{});
        } else {
          add(Span{column_begin, column_end});
        }
        activate_pixels<V>(t.relu, V::set(t.ceiling), sum);
#pragma GCC unroll 16
        for (int j = 0; j < kPixels; ++j) {
          if (j < pixels) channels.store(out + j * t.out_column, sum[j], 0);
        }
      }
    }
  });
}

// wgrad: their sums in registers.
template <class V, int Step, bool Masked>
void depthwise_wgrad_rows(const DepthwiseTile& t) {
  constexpr int kPixels = Step == 1 ? 3 : 1;
  using Reg = typename V::Reg;
  const DepthwiseColumns columns(t, Step);
  const SourceSteps steps(t);
  for_each_channel_vector<V, 1>(
      t.channels, [&](int64_t c, const auto& channels) __attribute__((always_inline)) {
        float* const sums = t.sums + c * 9;
        Reg sum[3][3];
#pragma GCC unroll 4
        for (int r = 0; r < 3; ++r)
#pragma GCC unroll 4
          for (int s = 0; s < 3; ++s) sum[r][s] = V::load(sums + (r * 3 + s) * V::kWidth);
        const bool asks_below = t.asks_below && c % kLine == 0;
        const float* source = t.source + c;
        const float* dy_row = t.out + c;
        for (int64_t i = 0; i < t.rows; ++i, source += Step * t.source_row, dy_row += t.out_row) {
          const float* dy = dy_row;
          const float* mask = Masked ? t.mask + i * t.out_row + c : nullptr;
          with_taps(t.row_begin - i * Step, t.row_end - i * Step,
                    [&]<class Taps>(Taps taps) __attribute__((always_inline)) {
                      if (taps.begin < taps.end) {
                        SourceRows<V, Step, Taps> rows(source, steps, taps);
                        const auto meet = [&]<int Pixels, class Inside>(
                                              Inside inside) __attribute__((always_inline)) {
                          Reg b[Pixels];
#pragma GCC unroll 4
                          for (int j = 0; j < Pixels; ++j)
                            b[j] = channels.load(dy, mask, j * t.out_column, 0);
                          rows.template meet<Pixels>(inside, channels,
                                                     [&](int r, int s, int j, Reg a)
                                                         __attribute__((always_inline)) {
                                                           sum[r][s] = V::fma(a, b[j], sum[r][s]);
                                                         });
                          dy = hidden(dy + Pixels * t.out_column);
                          if (Masked) mask = hidden(mask + Pixels * t.out_column);
                        };
                        const auto ask =
                            [&]<int Pixels>(std::integral_constant<int, Pixels>)
                                __attribute__((always_inline)) {
                                  ask_for_row<V, 3, Step, false, Pixels>(t, rows.rows[0], dy);
                                  if (!Masked) return;
#pragma GCC unroll 4
                                  for (int j = 0; j < Pixels; ++j) {
                                    ask_for_rows<1, false>(
                                        mask + t.rows * t.out_row + j * t.out_column, 0, V::kWidth);
                                  }
                                };
                        columns.walk<Step, kPixels>(meet, asks_below, ask);
                      }
                    });
        }
#pragma GCC unroll 4
        for (int r = 0; r < 3; ++r)
#pragma GCC unroll 4
          for (int s = 0; s < 3; ++s) V::store(sums + (r * 3 + s) * V::kWidth, sum[r][s]);
        if (t.bias_sums) add_bias_sums<V, Masked>(t, c, channels);
      });
}

}  // namespace
}  // namespace fastconv::cpu
