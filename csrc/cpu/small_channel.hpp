// Convolutions with few input channels (the first layer of a network: 1, 3 or 4), fprop and dgrad, and
// with few filters (the last one of a network that makes images), fprop.
// wgrad is the direct one: its register tile runs over taps and channels together.
//
// fprop: so few products make a sum that a pointer a pixel costs as much as the multiplications.
// Here the input rows of a task are copied, padding included, to a strip in which the pixels of a
// register tile are evenly spaced, and one address serves them all. (Without padding they are so
// in the input itself.)
//
// dgrad: with one to four channels to a result, vectors along channels would be empty for the most
// part. They run along K instead, the sum's own axis, where both dy and the filter are contiguous;
// lanes are added up at the end. fprop with one to four filters of more channels is computed likewise.
#pragma once

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pool.hpp"

namespace fastconv::cpu {
namespace {

// y[i][0 .. columns) = bias + sum over products j of x[i * step + offset(j)] * filter[j]. Products come
// in groups whose offsets follow one another.
struct StridedTile {
  int64_t tiles;         // that follow one another
  int64_t rows;          // that have so many tiles each
  int64_t x_row, y_row;  // floats from one to the next
  const float* x;
  int64_t step;          // floats from pixel to pixel
  const int64_t* steps;  // floats from the offset of the group before, or from 0
  int64_t groups;
  int64_t panels;        // of like widths, that take turns at a tile
  int64_t panel_floats;  // from one to the next
  const float* filter;   // [panel][product][vectors * width]
  const float* bias;     // null for none
  float* y;
  int64_t y_step;
  int columns;  // of the last vector of the last panel
  bool ahead;   // the lines of y behind this tile's will be written soon, and are in no cache
  bool relu;
  float ceiling;  // with relu
};

// A tile's steps through `rows` rows of products, `row_floats` apart; `place(j)` is that of product j of a row.
template <class Place>
void write_steps(int64_t* steps, int64_t rows, int64_t row_floats, int64_t products, int64_t group,
                 const Place& place) {
  for (int64_t r = 0, before = 0; r < rows; ++r)
    for (int64_t j = 0; j < products; j += group) {
      const int64_t offset = r * row_floats + place(j);
      *steps++ = offset - std::exchange(before, offset);
    }
}

// Products of a group, where an image's rows have them side by side.
template <class V>
constexpr int kGroup = V::kProductsAtOnce > 1 ? 3 : 1;

// Of the panel that begins at these channels, of `columns` in its last vector.
template <class V, int Rows, int Vectors, int Group>
[[gnu::always_inline]] inline void one_strided_tile(const StridedTile& t, const float* x,
                                                    const float* filter, const float* bias,
                                                    float* first_y, int columns) {
  const auto tail = V::tail(columns);
  if (t.ahead) {
#pragma GCC unroll 1
    for (int i = Rows; i < 2 * Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)
        __builtin_prefetch(first_y + i * t.y_step + v * V::kWidth, 1);
  }
  typename V::Reg sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const typename V::Reg first = start_of_sum<V, Vectors>(bias, v, tail);
#pragma GCC unroll 28
    for (int i = 0; i < Rows; ++i) sum[i][v] = first;
  }
  Spaced<Rows> a(x, t.step);
  const int64_t *step = t.steps, *const end = step + t.groups;
  // One loop: those of taps and of channels would be left as often as a filter has rows.
  for (; step != end; ++step) {
    a.advance(*step);
#pragma GCC unroll 3
    for (int j = 0; j < Group; ++j) {
      add_row_of_products<V, (Group > 1)>([&](int i)
                                              __attribute__((always_inline)) { return a[i] + j; },
                                          filter + j * Vectors * V::kWidth, sum);
    }
    filter += Group * Vectors * V::kWidth;
  }
  const StridedTile* const last = hidden(&t);  // read anew: in the loop, registers are short
  if (last->relu) activate<V>(sum, last->ceiling);
  store_tile<V>(sum, columns, [first_y, step = last->y_step](int i) { return first_y + i * step; });
}

// `Turns`: more than one panel. A function of its own: of short sums, the loop around the panels shows.
template <class V, int Rows, int Vectors, int Group, bool Turns>
void strided_tile(const StridedTile& t) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* x = t.x + row * t.x_row;
    float* y = t.y + row * t.y_row;
    for (int64_t tile = t.tiles; tile > 0; --tile) {
      if constexpr (!Turns) {
        one_strided_tile<V, Rows, Vectors, Group>(t, x, t.filter, t.bias, y, t.columns);
      } else {
        const float *filter = t.filter, *bias = t.bias;
        float* panel_y = y;
        for (int64_t panel = t.panels; panel > 0; --panel) {
          one_strided_tile<V, Rows, Vectors, Group>(t, x, filter, bias, panel_y,
                                                    panel == 1 ? t.columns : V::kWidth);
          filter += t.panel_floats;
          panel_y += Vectors * V::kWidth;
          if (bias) bias += Vectors * V::kWidth;
        }
      }
      x += Rows * t.step;
      y += Rows * t.y_step;
    }
  }
}

using StridedTileFunction = void (*)(const StridedTile&);

// Pixels of a tile: as many as there are registers for beside the filter's vectors and a pixel, and
// general registers for their addresses; of 16 registers, for a round of several products too.
template <class V>
constexpr int strided_rows(int vectors) {
  const int rows = (V::kRegisters - vectors - 1) / vectors, most = V::kRegisters < 32 ? 12 : 28;
  return rows < most ? rows : most;
}

// By vectors - 1 and rows - 1: what `function`, a template of rows and vectors, returns for each.
template <class V, std::size_t MostVectors, class Function>
constexpr auto by_vectors_and_rows(const Function& function) {
  using Tile = decltype(function.template operator()<1, 1>());
  std::array<std::array<Tile, std::size_t{strided_rows<V>(1)}>, MostVectors> table{};
  const auto set_row = [&]<std::size_t Vectors, std::size_t... I>(std::index_sequence<I...>) {
    ((table[Vectors][I] = function.template operator()<int{I} + 1, int{Vectors} + 1>()), ...);
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (set_row.template operator()<I>(
         std::make_index_sequence<std::size_t{strided_rows<V>(int{I} + 1)}>{}),
     ...);
  }(std::make_index_sequence<MostVectors>{});
  return table;
}

template <class V, int Group>
StridedTileFunction strided_tile_function(int rows, int vectors, bool turns) {
  static constexpr auto kTableOf = []<bool Turns>() {
    return by_vectors_and_rows<V, std::size_t{kGemmVectors<V>}>(
        []<int Rows, int Vectors>() -> StridedTileFunction {
          return strided_tile<V, Rows, Vectors, Group, Turns>;
        });
  };
  static constexpr std::array kTables = {kTableOf.template operator()<false>(),
                                         kTableOf.template operator()<true>()};
  return kTables[turns ? 1 : 0][static_cast<std::size_t>(vectors - 1)]
                [static_cast<std::size_t>(rows - 1)];
}

// The same with 2 x 2 max-pooling behind it: `Pixels` windows beside one another, whose pixels stay in
// registers. y_step is from window to window; `below` floats lie between a pixel and the one below.
template <class V, int Pixels, int Vectors, int Group>
[[gnu::always_inline]] inline void one_pooled_tile(const StridedTile& t, const float* x,
                                                   int64_t below, float* y, std::uint8_t* argmax) {
  const auto tail = V::tail(t.columns);
  typename V::Reg sum[2][2 * Pixels][Vectors];  // upper and lower row
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const typename V::Reg first = start_of_sum<V, Vectors>(t.bias, v, tail);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < 2 * Pixels; ++i) sum[row][i][v] = first;
  }
  Spaced<2 * Pixels> upper(x, t.step), lower(x + below, t.step);
  const int64_t *step = t.steps, *const end = step + t.groups;
  for (const float* filter = t.filter; step != end; ++step) {
    upper.advance(*step);
    lower.advance(*step);
#pragma GCC unroll 3
    for (int j = 0; j < Group; ++j) {
      typename V::Reg b[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b[v] = V::load(filter + (j * Vectors + v) * V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < 2 * Pixels; ++i) {
        add_products<V, (Group > 1)>(upper[i] + j, b, sum[0][i]);
        add_products<V, (Group > 1)>(lower[i] + j, b, sum[1][i]);
      }
    }
    filter += Group * Vectors * V::kWidth;
  }
#pragma GCC unroll 4
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = p * t.y_step + v * V::kWidth;
      max_of_four<V>(sum[0][2 * p][v], sum[0][2 * p + 1][v], sum[1][2 * p][v], sum[1][2 * p + 1][v],
                     t.relu, t.ceiling, v < Vectors - 1 ? V::kWidth : t.columns, y + at,
                     argmax ? argmax + at : nullptr);
    }
}

template <class V, int Pixels, int Vectors, int Group>
void pooled_tile(const StridedTile& t, int64_t below, std::uint8_t* argmax) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* x = t.x + row * t.x_row;
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      const int64_t at = row * t.y_row + tile * Pixels * t.y_step;
      one_pooled_tile<V, Pixels, Vectors, Group>(t, x, below, t.y + at,
                                                 argmax ? argmax + at : nullptr);
      x += 2 * Pixels * t.step;
    }
  }
}

using PooledTileFunction = void (*)(const StridedTile&, int64_t below, std::uint8_t* argmax);

// Windows of a tile.
template <class V>
constexpr int kPooledPixels = V::kRows / 4;

// By pixels - 1 and vectors - 1.
template <class V, int Group, std::size_t... I>
constexpr auto make_pooled_tile_table(std::index_sequence<I...>) {
  return std::array<PooledTileFunction, sizeof...(I)>{
      pooled_tile<V, I / 2 + 1, I % 2 + 1, Group>...};
}

template <class V, int Group>
PooledTileFunction pooled_tile_function(int pixels, int vectors) {
  static constexpr auto kTable = make_pooled_tile_table<V, Group>(
      std::make_index_sequence<2 * std::size_t{kPooledPixels<V>}>{});
  return kTable[static_cast<std::size_t>(2 * (pixels - 1) + vectors - 1)];
}

// out[p][c] = bias[c] + sum over taps, k of source[p * step + offset(tap) + k] * filter[offset(tap) + c * K + k].
struct DotTile {
  int64_t tiles;  // that follow one another
  const float* source;
  int64_t step;
  const int64_t* tap_offsets;
  const int64_t* filter_offsets;
  int64_t taps, k;
  const float* filter;
  const float* bias;  // null for none
  bool relu;
  float ceiling;  // with relu
  float* out;
  int64_t out_step;
};

template <class V, int Pixels, int Channels>
[[gnu::always_inline]] inline void one_dot_tile(const DotTile& t, const float* first_source,
                                                float* out) {
  typename V::Reg sum[Pixels][Channels];
#pragma GCC unroll 16
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int c = 0; c < Channels; ++c) sum[p][c] = V::zero();
  const int64_t whole = t.k / V::kWidth * V::kWidth;
  const auto tail = V::tail(static_cast<int>(t.k - whole));
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const float* source = first_source + t.tap_offsets[tap];
    const float* filter = t.filter + t.filter_offsets[tap];
    const auto add = [&](int64_t k, const auto&... mask) {
      typename V::Reg w[Channels];
#pragma GCC unroll 4
      for (int c = 0; c < Channels; ++c) w[c] = V::load(filter + c * t.k + k, mask...);
#pragma GCC unroll 16
      for (int p = 0; p < Pixels; ++p) {
        const typename V::Reg d = V::load(source + p * t.step + k, mask...);
#pragma GCC unroll 4
        for (int c = 0; c < Channels; ++c) sum[p][c] = V::fma(d, w[c], sum[p][c]);
      }
    };
    for (int64_t k = 0; k < whole; k += V::kWidth) add(k);
    if (whole < t.k) add(whole, tail);
  }
#pragma GCC unroll 16
  for (int p = 0; p < Pixels; ++p)
#pragma GCC unroll 4
    for (int c = 0; c < Channels; ++c) {
      float value = V::sum(sum[p][c]);
      if (t.bias) value += t.bias[c];
      // NaN stays.
      if (t.relu) value = value < 0 ? 0 : value > t.ceiling ? t.ceiling : value;
      out[p * t.out_step + c] = value;
    }
}

template <class V, int Pixels, int Channels>
void dot_tiles(const DotTile& t) {
  const float* source = t.source;
  float* out = t.out;
  for (int64_t tile = t.tiles; tile > 0; --tile) {
    one_dot_tile<V, Pixels, Channels>(t, source, out);
    source += Pixels * t.step;
    out += Pixels * t.out_step;
  }
}

using DotTileFunction = void (*)(const DotTile&);

// Pixels of a tile: a quarter of the registers is left to the filter and the source.
template <class V>
constexpr int dot_pixels(int channels) {
  const int pixels = (V::kRows * V::kVectors - channels + 1) / channels;
  return pixels > 12 ? 12 : pixels;
}

// By pixels - 1.
template <class V, int Channels>
DotTileFunction dot_tile_function(int64_t pixels) {
  static constexpr auto kTable = []<std::size_t... I>(std::index_sequence<I...>) {
    return std::array<DotTileFunction, sizeof...(I)>{dot_tiles<V, I + 1, Channels>...};
  }(std::make_index_sequence<std::size_t{dot_pixels<V>(Channels)}>{});
  return kTable[static_cast<std::size_t>(pixels - 1)];
}

template <class V>
struct SmallChannel {
  static constexpr int64_t kMostChannels = 4;
  // A tile whose pixels are pooled is narrower.
  template <bool Pooled>
  using Panels = FilterPanels<V, Pooled ? V::kVectors : kGemmVectors<V>>;

  static bool serves(const Conv2dProblem& p, Direction direction) {
    if (direction == Direction::wgrad || p.groups != 1) return false;
    if (p.c > kMostChannels) return direction == Direction::fprop && p.k <= kMostChannels;
    return direction == Direction::dgrad || !Strip::too_wide(p);
  }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    const bool few_filters = sums_along_channels(p, direction);
    if (direction == Direction::fprop && !few_filters) {
      return t.pooled ? fprop<true>(p, t) : fprop<false>(p, t);
    }
    const auto run_of = [&]<int Channels>() {
      return few_filters ? fprop_by_dots<Channels>(p, t)
                         : dgrad<Channels>(p, t.dy, t.filter, t.out);
    };
    switch (few_filters ? p.k : p.c) {
      case 1: return run_of.template operator()<1>();
      case 2: return run_of.template operator()<2>();
      case 3: return run_of.template operator()<3>();
      case 4: return run_of.template operator()<4>();
    }
  }

  static bool fuses_pool(const Conv2dProblem& p, Direction direction) {
    return direction == Direction::fprop && !sums_along_channels(p, direction);
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    const double pixels = static_cast<double>(p.n);
    const double taps = static_cast<double>(p.r * p.s * p.c);
    constexpr bool kNarrow = V::kRegisters < 32;
    if (sums_along_channels(p, direction)) {
      constexpr double kASum = kNarrow ? 4 : 8;  // to add up lanes
      const double lanes = static_cast<double>(ceil_div(p.c, V::kWidth) * V::kWidth);
      return {pixels * static_cast<double>(p.oh * p.ow * p.k) *
                  (lanes * 1.3 * static_cast<double>(p.r * p.s) + kASum * V::kWidth),
              p.filter_size() * 4, 0};
    }
    if (direction == Direction::fprop) {
      const Strip strip(p, false);
      const double lanes = static_cast<double>(ceil_div(p.k, V::kWidth) * V::kWidth);
      // Taps far apart make strips of many rows. What is usual is in the factor of the taps.
      constexpr double kUsualCopies = 8, kAFloat = 4, kProduct = kNarrow ? 1.02 : 1.1;
      const double copied = static_cast<double>(strip.strips) * static_cast<double>(strip.floats) -
                            kUsualCopies * static_cast<double>(p.h * p.w * p.c + p.oh * p.ow * p.k);
      return {pixels * (static_cast<double>(p.oh * p.ow) * lanes * (kProduct * taps + 3) +
                        kAFloat * (copied > 0 ? copied : 0)),
              strip.workspace_bytes(workers_for(strip.tasks(p))), 0};
    }
    const double lanes = static_cast<double>(ceil_div(p.k, V::kWidth) * V::kWidth);
    constexpr double kProduct = kNarrow ? 1.45 : 1.3;
    return {pixels * (static_cast<double>(p.oh * p.ow) * lanes * kProduct * taps +
                      static_cast<double>(p.h * p.w * p.c) * 10 * V::kWidth),
            0, 0};
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    if (direction == Direction::dgrad) {
      return "sums along K, " + std::to_string(dot_pixels<V>(static_cast<int>(p.c))) +
             " pixels at a time";
    }
    if (sums_along_channels(p, direction)) {
      return "sums along C, " + std::to_string(dot_pixels<V>(static_cast<int>(p.k))) +
             " pixels at a time";
    }
    const Strip strip(p, false);
    const TapConvolution g = fprop_taps(p);
    const int64_t vectors = Panels<false>(g).widest;
    return std::to_string(strided_rows<V>(static_cast<int>(vectors))) + " x " +
           std::to_string(vectors * V::kWidth) + " tile of pixels x channels, strips of " +
           std::to_string(strip.rows) + " rows" + (strip.copied ? ", copied" : "");
  }

  static constexpr Conv2dAlgorithm kAlgorithm{.name = "small_channel",
                                              .masks_dgrad = false,
                                              .masks_wgrad = false,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run,
                                              .scales_filter = true,
                                              .fuses_pool = fuses_pool};

 private:
  // fprop with few filters of more channels: the last layer of a network that makes images.
  static bool sums_along_channels(const Conv2dProblem& p, Direction direction) {
    return direction == Direction::fprop && p.c > kMostChannels;
  }

  // Output rows a task, and the input rows below them.
  struct Strip {
    int64_t rows, strips;                   // output rows of a strip; strips of an image
    int64_t source_rows, source_w, floats;  // of the copy
    int64_t products;
    int64_t packed_bytes, offsets_bytes;
    bool copied, pooled, grouped;  // grouped: products in groups

    Strip(const Conv2dProblem& p, bool pooled_given) {
      pooled = pooled_given;
      copied = p.pad_top || p.pad_bottom || p.pad_left || p.pad_right;
      source_w = copied ? source_columns_of(p) : p.w;
      // Some 1 MFLOP a task, and a copy that stays in the first-level cache's neighbourhood.
      const int64_t row_flops = max64(2 * p.ow * p.k * p.r * p.s * p.c, 1);
      rows = max64(1, min64(p.oh, (int64_t{1} << 20) / row_flops));
      while (rows > 1 && source_rows_of(p, rows) * source_w * p.c * 4 > (int64_t{128} << 10)) {
        rows = (rows + 1) / 2;
      }
      if (pooled) rows += rows % 2;
      strips = ceil_div(p.oh, rows);
      source_rows = source_rows_of(p, rows);
      floats = copied ? ceil_div(source_rows * source_w * p.c, 16) * 16 : 0;
      products = p.r * p.s * p.c;
      // Of a filter's row, or, with a dilation, of a pixel.
      grouped = (p.dilation_w == 1 ? p.s * p.c : p.c) % kGroup<V> == 0;
      packed_bytes = Panels<false>(fprop_taps(p)).bytes();  // of any width
      offsets_bytes = ceil_div(products * 8, 64) * 64;
    }

    int64_t tasks(const Conv2dProblem& p) const { return p.n * strips; }
    int64_t workspace_bytes(int workers) const {
      return packed_bytes + offsets_bytes + workers * floats * 4;
    }
    // Strip number i: output rows begin .. end - 1. A strip of rows that are pooled has pairs of them.
    Span rows_of(const Conv2dProblem& p, int64_t i) const {
      if (!pooled) return part_of(p.oh, strips, i);
      const Span pairs = part_of(p.oh / 2, strips, i);
      return {pairs.begin * 2, pairs.end * 2};
    }
    static int64_t source_rows_of(const Conv2dProblem& p, int64_t rows) {
      return (rows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    }
    // Whether even the copy for one output row is large, beside the image and beside the row: taps
    // lie far apart.
    static bool too_wide(const Conv2dProblem& p) {
      const int64_t rows = source_rows_of(p, 1), columns = source_columns_of(p);
      constexpr double kTimes = 8;
      return mostly_padding(p, rows, columns) &&
             static_cast<double>(rows) * static_cast<double>(columns * p.c) >
                 kTimes * static_cast<double>(p.ow * p.k);
    }
    static int64_t source_columns_of(const Conv2dProblem& p) {
      return max64((p.ow - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1, 1);
    }
  };

  // Where a sum is short and y larger than a cache, tiles wait for the lines that they write.
  static bool asks_for_lines(int64_t products, int64_t bytes) {
    constexpr int64_t kMiB = int64_t{1} << 20;
    if (products <= 16) return bytes > kMiB;
    return products <= 32 && bytes > 4 * kMiB;
  }

  template <bool Pooled>
  static void fprop(const Conv2dProblem& p, const Conv2dOperands& operands) {
    if (p.y_size() == 0) return;
    const float* const bias = operands.bias;
    const TapConvolution g = fprop_taps(p);
    const Panels<Pooled> panels(g);
    const Strip strip(p, Pooled);
    const int workers = workers_for(strip.tasks(p));
    const Workspace workspace(static_cast<std::size_t>(strip.workspace_bytes(workers)));
    float* packed = workspace.floats();
    int64_t* const steps =
        reinterpret_cast<int64_t*>(workspace.floats(static_cast<std::size_t>(strip.packed_bytes)));
    const int64_t group = strip.grouped ? kGroup<V> : 1, row_groups = p.s * p.c / group;
    write_steps(steps, p.r, p.dilation_h * strip.source_w * p.c, p.s * p.c, group,
                [&](int64_t j) { return j / p.c * p.dilation_w * p.c + j % p.c; });
    panels.pack_all(operands.filter, operands.scale, packed);
    // Panels that stay in the first-level cache take turns at a tile: whole pixels are written at once.
    const int64_t panels_a_pass =
        max64(1, (int64_t{16} << 10) / max64(panels.reduce * panels.widest * V::kWidth * 4, 1));
    float* copies =
        workspace.floats(static_cast<std::size_t>(strip.packed_bytes + strip.offsets_bytes));

    parallel_for(strip.tasks(p), workers, [&](int64_t task, int worker) {
      const int64_t n = task / strip.strips;
      const Span strip_rows = strip.rows_of(p, task % strip.strips);
      const int64_t begin = strip_rows.begin, end = strip_rows.end;
      float* const own = copies + worker * strip.floats;
      const float* source = operands.x + (n * p.h + begin * p.stride_h) * p.w * p.c;
      if (strip.copied) {
        copy_strip(p, strip, operands.x + n * p.h * p.w * p.c, begin, end, own);
        source = own;
      }
      StridedTile t{};
      t.step = p.stride_w * p.c;
      t.y_step = p.k;
      t.ahead = asks_for_lines(panels.reduce, p.y_size() * 4);
      t.relu = g.relu;
      t.ceiling = g.ceiling;
      // Pixels of a row, or windows of two rows.
      constexpr int64_t kUnit = Pooled ? 2 : 1;
      const int64_t columns = p.ow / kUnit;
      const LikeTiles tiles(
          columns, ceil_div(columns, Pooled ? kPooledPixels<V>
                                            : strided_rows<V>(static_cast<int>(panels.widest))));
      const int64_t below = p.stride_h * strip.source_w * p.c;
      t.x_row = kUnit * below;
      t.y_row = columns * p.k;
      // Rows of a call, where what is around one shows: of few floats.
      constexpr int64_t kFewFloats = 2048;
      const int64_t most_rows = t.y_row <= kFewFloats ? strip.rows : 1;
      for (int64_t first = 0; first < panels.panels; first += panels_a_pass) {
        const int64_t last = min64(panels.panels, first + panels_a_pass);
        // Tiles of a call at most. Panels of two widths follow one another over as many as stay in the
        // first-level cache.
        const bool alike = panels.vectors_of(first) == panels.vectors_of(last - 1);
        const int64_t kept = max64(1, (int64_t{4} << 10) / (tiles.size(0) * p.k));
        const int64_t most = alike && (!Pooled || last - first == 1) ? tiles.count : kept;
        // The filter's rows that meet the image, with one of the output's rows from i on at least.
        const auto meeting = [&](int64_t i) {
          Span upper{}, lower{};
          g.vertical.meeting(i, p.h, upper.begin, upper.end);
          g.vertical.meeting(i + kUnit - 1, p.h, lower.begin, lower.end);
          return Span{min64(upper.begin, lower.begin), max64(upper.end, lower.end)};
        };
        for (int64_t i = begin; i < end; i += kUnit * t.rows) {
          const auto [r, r_end] = meeting(i);
          for (t.rows = 1; most == tiles.count && t.rows < most_rows; ++t.rows) {
            const int64_t next = i + kUnit * t.rows;
            if (next >= end) break;
            const Span met = meeting(next);
            if (met.begin != r || met.end != r_end) break;
          }
          t.groups = max64(0, r_end - r) * row_groups;
          t.steps = steps + r * row_groups;
          // Where the first group is, less the step that leads to it.
          t.x = source + (i - begin) * below + r * p.dilation_h * strip.source_w * p.c -
                (t.groups > 0 ? *t.steps : 0);
          int64_t at = (n * p.oh + i) / kUnit * columns * p.k;
          for (int64_t tile = 0; tile < tiles.count; tile += t.tiles) {
            const int count = static_cast<int>(tiles.size(tile));
            t.tiles = min64(tiles.alike(tile), most);
            // Panels of one width, which mostly are all, take turns within a call.
            for (int64_t panel = first; panel < last; panel += t.panels) {
              const int64_t column = panels.first_column(panel);
              const int vectors = panels.vectors_of(panel);
              t.panels = 1;
              while (!Pooled && panel + t.panels < last &&
                     panels.vectors_of(panel + t.panels) == vectors) {
                ++t.panels;
              }
              t.panel_floats = panels.reduce * vectors * V::kWidth;
              t.filter = packed + panels.offset(0, panel) + r * p.s * p.c * vectors * V::kWidth;
              t.bias = bias ? bias + column : nullptr;
              t.columns = panels.last_columns(panel + t.panels - 1);
              t.y = operands.out + at + column;
              if constexpr (Pooled) {
                std::uint8_t* const argmax =
                    operands.argmax ? operands.argmax + at + column : nullptr;
                (strip.grouped ? pooled_tile_function<V, kGroup<V>>(count, vectors)
                               : pooled_tile_function<V, 1>(count, vectors))(t, below, argmax);
              } else {
                const bool turns = t.panels > 1;
                (strip.grouped ? strided_tile_function<V, kGroup<V>>(count, vectors, turns)
                               : strided_tile_function<V, 1>(count, vectors, turns))(t);
              }
            }
            t.x += t.tiles * kUnit * count * t.step;
            at += t.tiles * count * p.k;
          }
        }
      }
    });
  }

  // The input rows below output rows begin .. end - 1 of one image, zeros where they meet padding.
  static void copy_strip(const Conv2dProblem& p, const Strip& strip, const float* image,
                         int64_t begin, int64_t end, float* out) {
    const int64_t first = begin * p.stride_h - p.pad_top;
    const int64_t left = min64(p.pad_left, strip.source_w);
    const int64_t middle = max64(0, min64(p.w, strip.source_w - left));
    for (int64_t i = first; i < first + Strip::source_rows_of(p, end - begin);
         ++i, out += strip.source_w * p.c) {
      if (i < 0 || i >= p.h) {
        std::memset(out, 0, static_cast<std::size_t>(strip.source_w * p.c) * 4);
        continue;
      }
      std::memset(out, 0, static_cast<std::size_t>(left * p.c) * 4);
      std::memcpy(out + left * p.c, image + i * p.w * p.c,
                  static_cast<std::size_t>(middle * p.c) * 4);
      std::memset(out + (left + middle) * p.c, 0,
                  static_cast<std::size_t>((strip.source_w - left - middle) * p.c) * 4);
    }
  }

  // The filter with its channels side by side, [r][s][k][c].
  template <int Filters>
  static void fprop_by_dots(const Conv2dProblem& p, const Conv2dOperands& t) {
    const Workspace workspace(static_cast<std::size_t>(p.filter_size()) * 4);
    float* const turned = workspace.floats();
    for (int64_t tap = 0; tap < p.r * p.s; ++tap)
      for (int64_t c = 0; c < p.c; ++c)
        for (int64_t k = 0; k < Filters; ++k) {
          const float value = t.filter[(tap * p.c + c) * Filters + k];
          turned[(tap * Filters + k) * p.c + c] = t.scale ? value * t.scale[k] : value;
        }
    TapConvolution g = fprop_taps(p);
    g.filter_tap_row = p.s * Filters * p.c;
    g.filter_tap_column = Filters * p.c;
    DotTile common{};
    common.bias = t.bias;
    common.relu = g.relu;
    common.ceiling = g.ceiling;
    dot_products<Filters>(g, t.x, turned, common, t.out);
  }

  template <int Channels>
  static void dgrad(const Conv2dProblem& p, const float* dy, const float* filter, float* dx) {
    for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t first) {
      dot_products<Channels>(g, dy, filter, DotTile{}, dx + first);
    });
  }

  // `filter`: reduced channels side by side, in rows of an output channel each.
  template <int Channels>
  static void dot_products(const TapConvolution& g, const float* source, const float* filter,
                           const DotTile& common, float* out) {
    constexpr int64_t kPixels = dot_pixels<V>(Channels);
    const AxisTaps &v = g.vertical, &h = g.horizontal;
    const int64_t taps = v.count * h.count;
    if (g.images * g.out_h * g.out_w == 0) return;
    constexpr int64_t kPixelsATask = 1024;
    const int64_t rows = g.images * g.out_h;
    const int64_t enough_tasks = tasks_for(rows * g.out_w * taps * g.reduce * Channels);
    const int64_t rows_a_task = max64(1, min64(kPixelsATask / g.out_w, rows / enough_tasks));
    // Output rows and columns that no tap takes into the padding.
    const auto inner_of = [](const AxisTaps& axis, int64_t outputs, int64_t size) {
      if (axis.count == 0) return Span{0, outputs};
      const Span first = axis.met_by(0, outputs, size);
      const Span last = axis.met_by(axis.count - 1, outputs, size);
      const int64_t begin = max64(first.begin, last.begin);
      return Span{begin, max64(begin, min64(first.end, last.end))};
    };
    const Span inner = inner_of(h, g.out_w, g.source_w);
    const Span inner_rows = inner_of(v, g.out_h, g.source_h);
    const int64_t row_floats = g.source_w * g.source_c;
    const int64_t tasks = ceil_div(rows, rows_a_task);
    const int workers = workers_for(tasks);
    const Workspace workspace(static_cast<std::size_t>(workers * 2 * taps * 8));
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
      int64_t* tap_offsets = reinterpret_cast<int64_t*>(workspace.floats()) + worker * 2 * taps;
      int64_t* filter_offsets = tap_offsets + taps;
      DotTile t = common;
      t.tap_offsets = tap_offsets;
      t.filter_offsets = filter_offsets;
      t.k = g.reduce;
      t.filter = filter;
      // The taps of output pixel (i, j) that meet the source, from the source's pixel of the first one on.
      const auto gather = [&](int64_t i, int64_t j) {
        t.taps = 0;
        int64_t r_begin = 0, r_end = 0, s_begin = 0, s_end = 0;
        v.meeting(i, g.source_h, r_begin, r_end);
        h.meeting(j, g.source_w, s_begin, s_end);
        for (int64_t r = r_begin; r < r_end; ++r) {
          for (int64_t s = s_begin; s < s_end; ++s) {
            tap_offsets[t.taps] = v.offset(r) * row_floats + h.offset(s) * g.source_c;
            filter_offsets[t.taps] = (v.filter_first + r * v.filter_stride) * g.filter_tap_row +
                                     (h.filter_first + s * h.filter_stride) * g.filter_tap_column;
            ++t.taps;
          }
        }
      };
      // `count` output pixels from (i, j) of image n on, which meet the same taps.
      const auto compute = [&](int64_t n, int64_t i, int64_t j, int64_t count, bool downwards) {
        gather(i, j);
        const LikeTiles tiles(count, ceil_div(count, kPixels));
        t.step = downwards ? v.step * row_floats : h.step * g.source_c;
        t.out_step = downwards ? g.y_row : g.y_column;
        t.source = source + n * g.source_image + i * v.step * row_floats + j * h.step * g.source_c;
        t.out = out + n * g.y_image + i * g.y_row + j * g.y_column;
        for (int64_t tile = 0; tile < tiles.count; tile += t.tiles) {
          t.tiles = tiles.alike(tile);
          dot_tile_function<V, Channels>(tiles.size(tile))(t);
          t.source += t.tiles * tiles.size(tile) * t.step;
          t.out += t.tiles * tiles.size(tile) * t.out_step;
        }
      };
      const int64_t task_end = min64(rows, (task + 1) * rows_a_task);
      for (int64_t row = task * rows_a_task, rows_alike = 0; row < task_end; row += rows_alike) {
        const int64_t n = row / g.out_h, i = row % g.out_h;
        // Rows below one another whose outer columns meet the same taps.
        rows_alike = inner_rows.begin <= i && i < inner_rows.end
                         ? min64(task_end - row, inner_rows.end - i)
                         : 1;
        for (int64_t j = 0; j < g.out_w; ++j) {
          if (j == inner.begin && inner.size() > 0) {
            for (int64_t below = 0; below < rows_alike; ++below) {
              compute(n, i + below, j, inner.size(), false);
            }
            j = inner.end - 1;
          } else {
            compute(n, i, j, rows_alike, true);
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace fastconv::cpu
