// Convolution fprop and dgrad as an implicit GEMM: no im2col buffer. Both are "tap convolutions":
// every output pixel sums, over a list of taps, a run of source floats times packed filter rows.
//
// The register tile is V::kRows output pixels x V::kVectors vectors of output channels. The A
// operand is indirect, a pointer a pixel, so that stride and dilation cost the inner loop nothing.
// (M. Dukhan, "The Indirect Convolution Algorithm", 2019; the packed panels are those of Goto and
// van de Geijn, 2008.) Padding costs nothing at all: output pixels are taken region by region, and
// all pixels of a region meet the source with the same taps.
//
// dgrad with stride (a, b) is a*b independent tap convolutions of stride 1, one a residue class of
// input pixels: no zeros are stuffed.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"

namespace fastconv::cpu {
namespace {  // one copy an ISA: an inline function shared between them could run on the wrong CPU

using std::int64_t;

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether a copy of this many rows and columns of an image, padding included, would be large, and the
// image a small part of it.
inline bool mostly_padding(const Conv2dProblem& p, int64_t rows, int64_t columns) {
  constexpr double kTimes = 8, kFloats = 16384;
  const double copy =
      static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(p.c);
  return copy > kFloats && copy > kTimes * static_cast<double>(p.h * p.w * p.c);
}

// One register tile: y[i][0 .. columns) += sum over taps, c of rows[i][tap + c] * filter.
struct TapTile {
  const float* const* rows;       // a pointer a pixel
  int64_t row_offset, y_offset;   // floats, added to all of them and to those of y
  const int64_t* tap_offsets;     // floats, added to the pointers
  const int64_t* filter_offsets;  // rows of the panel, `vectors` vectors each
  int64_t taps;
  int64_t run;          // contiguous source floats a tap
  const float* filter;  // [tap][run][vectors * width]
  const float* bias;    // `columns` values or null
  float* const* y;
  int columns;  // of the last vector: 1 .. width
  bool relu;
  bool first, last;  // of the parts that a sum is made of: y holds it in between
};

// What the sums of a register tile's vector v begin with: the bias, or zero where that is null.
template <class V, int Vectors>
typename V::Reg start_of_sum(const float* bias, int v, const typename V::Tail& tail) {
  if (!bias) return V::zero();
  return v == Vectors - 1 ? V::load(bias + v * V::kWidth, tail) : V::load(bias + v * V::kWidth);
}

template <class V, int Rows, int Vectors>
void tap_tile(const TapTile& t) {
  const auto tail = V::tail(t.columns);
  typename V::Reg sum[Rows][Vectors];
  if (t.first) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const typename V::Reg start = start_of_sum<V, Vectors>(t.bias, v, tail);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) sum[i][v] = start;
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const float* y = t.y[i] + t.y_offset + v * V::kWidth;
        sum[i][v] = v == Vectors - 1 ? V::load(y, tail) : V::load(y);
      }
  }
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const float* a[Rows];
    const int64_t offset = t.row_offset + t.tap_offsets[tap];
    const float* filter = t.filter + t.filter_offsets[tap] * (Vectors * V::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) a[i] = t.rows[i] + offset;
    for (int64_t c = 0; c < t.run; ++c, filter += Vectors * V::kWidth) {
      typename V::Reg b[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b[v] = V::load(filter + v * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const typename V::Reg x = V::broadcast(a[i] + c);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = V::fma(x, b[v], sum[i][v]);
      }
    }
  }
  const bool relu = t.relu && t.last;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const typename V::Reg out = relu ? V::relu(sum[i][v]) : sum[i][v];
      float* y = t.y[i] + t.y_offset + v * V::kWidth;
      if (v == Vectors - 1) {
        V::store(y, out, tail);
      } else {
        V::store(y, out);
      }
    }
}

using TapTileFunction = void (*)(const TapTile&);

// By rows - 1 and vectors - 1.
template <class V, std::size_t... I>
constexpr auto make_tap_tile_table(std::index_sequence<I...>) {
  static_assert(V::kVectors == 2);
  return std::array<TapTileFunction, sizeof...(I)>{tap_tile<V, I / 2 + 1, I % 2 + 1>...};
}

template <class V>
TapTileFunction tap_tile_function(int rows, int vectors) {
  static constexpr auto kTable =
      make_tap_tile_table<V>(std::make_index_sequence<2 * std::size_t{V::kRows}>{});
  return kTable[static_cast<std::size_t>(2 * (rows - 1) + vectors - 1)];
}

// The taps of one axis, in ascending order of what they meet: source index = i * step + offset(tap),
// tap = 0 .. count - 1.
struct AxisTaps {
  int64_t count, step, first, stride;   // offset(tap) = first + tap * stride, stride >= 0
  int64_t filter_first, filter_stride;  // the filter's row or column of a tap
  int64_t offset(int64_t tap) const { return first + tap * stride; }
  int64_t lowest() const { return first; }
  int64_t highest() const { return offset(count - 1); }

  // The taps [begin, end) that meet a source of `size` from output index i; 0, 0 for none.
  void meeting(int64_t i, int64_t size, int64_t& begin, int64_t& end) const {
    const int64_t at = i * step + first;
    if (count <= 1 || stride == 0) {
      begin = 0;
      end = count > 0 && at >= 0 && at < size ? count : 0;
      return;
    }
    begin = at >= 0 ? 0 : min64(count, ceil_div(-at, stride));
    end = at >= size ? 0 : min64(count, (size - 1 - at) / stride + 1);
    if (begin >= end) begin = end = 0;
  }
};

struct TapConvolution {
  int64_t images, out_h, out_w;
  int64_t source_h, source_w, source_c;  // source_c: floats from pixel to pixel
  int64_t source_image;                  // floats from image to image
  AxisTaps vertical, horizontal;
  int64_t groups, reduce, columns;  // per group: source and output channels
  // Floats from element to element of the (strided) output and of the filter.
  int64_t y_image, y_row, y_column;
  int64_t filter_tap_row, filter_tap_column, filter_reduce, filter_column, filter_group;
  bool relu;
};

// A rectangle of output pixels and the taps that all of them meet the source with.
struct TapRegion {
  int64_t row, row_end, column, column_end;
  int64_t r, r_end, s, s_end;

  int64_t pixels(int64_t images) const { return images * (row_end - row) * (column_end - column); }
};

// Calls body(region) for each, row by row; they cover the output.
template <class Body>
void for_each_region(const TapConvolution& g, const Body& body) {
  const auto extend = [](const AxisTaps& axis, int64_t begin, int64_t size, int64_t source,
                         int64_t& tap, int64_t& tap_end) {
    axis.meeting(begin, source, tap, tap_end);
    int64_t end = begin + 1;
    for (; end < size; ++end) {
      int64_t next = 0, next_end = 0;
      axis.meeting(end, source, next, next_end);
      if (next != tap || next_end != tap_end) break;
    }
    return end;
  };
  TapRegion region{};
  for (region.row = 0; region.row < g.out_h; region.row = region.row_end) {
    region.row_end = extend(g.vertical, region.row, g.out_h, g.source_h, region.r, region.r_end);
    for (region.column = 0; region.column < g.out_w; region.column = region.column_end) {
      region.column_end =
          extend(g.horizontal, region.column, g.out_w, g.source_w, region.s, region.s_end);
      body(region);
    }
  }
}

// The filter as register tiles read it: panels of V::kVectors vectors of output channels (the last
// one of fewer, its spare lanes zero), in each [tap][source channel][output channel].
template <class V>
struct FilterPanels {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;

  const TapConvolution& g;
  int64_t panels, reduce, group_floats;  // reduce: the products of one sum

  explicit FilterPanels(const TapConvolution& convolution)
      : g(convolution), panels(ceil_div(g.columns, kPanel)),
        reduce(g.vertical.count * g.horizontal.count * g.reduce),
        group_floats(reduce * ceil_div(g.columns, V::kWidth) * V::kWidth) {}

  int64_t bytes() const { return ceil_div(g.groups * group_floats * 4, 64) * 64; }
  int vectors_of(int64_t panel) const {
    return static_cast<int>(min64(V::kVectors, ceil_div(g.columns - panel * kPanel, V::kWidth)));
  }
  // Channels in the last vector of a panel.
  int last_columns(int64_t panel) const {
    return static_cast<int>(
        min64(g.columns - panel * kPanel - int64_t{vectors_of(panel) - 1} * V::kWidth, V::kWidth));
  }
  int64_t offset(int64_t group, int64_t panel) const {
    return group * group_floats + panel * kPanel * reduce;
  }

  void pack_all(const float* filter, float* packed) const {
    const int64_t taps = g.vertical.count * g.horizontal.count;
    const int64_t rows_a_task = 64, parts = ceil_div(g.reduce, rows_a_task);
    parallel_for(g.groups * taps * parts, [&](int64_t task) {
      const int64_t group = task / parts / taps, tap = task / parts % taps;
      const int64_t c = task % parts * rows_a_task, c_end = min64(g.reduce, c + rows_a_task);
      pack(filter, group, 0, panels, tap, tap + 1, c, c_end, packed + offset(group, 0), reduce,
           tap * g.reduce + c);
    });
  }

  // Rows of some panels: taps tap .. tap_end - 1 (counted r * S + s), channels c .. c_end - 1 of each.
  // The panels lie `panel_rows` rows apart in `out`; the first row goes to row `at`. A row of the
  // filter is read in one go, whichever panels it goes to.
  void pack(const float* filter, int64_t group, int64_t panel_begin, int64_t panel_end, int64_t tap,
            int64_t tap_end, int64_t c, int64_t c_end, float* out, int64_t panel_rows,
            int64_t at) const {
    for (; tap < tap_end; ++tap, at += c_end - c) {
      const float* in = tap_of(filter, group, panel_begin, tap) + c * g.filter_reduce;
      if (g.filter_column == 1) {
        for (int64_t row = 0; row < c_end - c; ++row, in += g.filter_reduce) {
          for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            const int64_t skipped = (panel - panel_begin) * kPanel;
            copy_row(in + skipped, panel,
                     out + skipped * panel_rows + (at + row) * vectors_of(panel) * V::kWidth);
          }
        }
      } else {
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t skipped = (panel - panel_begin) * kPanel;
          transpose_rows(in + skipped * g.filter_column, c_end - c, panel,
                         out + skipped * panel_rows + at * vectors_of(panel) * V::kWidth);
        }
      }
    }
  }

 private:
  const float* tap_of(const float* filter, int64_t group, int64_t panel, int64_t tap) const {
    const int64_t r = tap / g.horizontal.count, s = tap % g.horizontal.count;
    return filter + group * g.filter_group + panel * kPanel * g.filter_column +
           (g.vertical.filter_first + r * g.vertical.filter_stride) * g.filter_tap_row +
           (g.horizontal.filter_first + s * g.horizontal.filter_stride) * g.filter_tap_column;
  }

  void copy_row(const float* in, int64_t panel, float* out) const {
    const int vectors = vectors_of(panel);
    const auto tail = V::tail(last_columns(panel));
#pragma GCC unroll 4
    for (int v = 0; v < V::kVectors; ++v) {
      if (v == vectors) break;
      const float* from = in + v * V::kWidth;
      V::store(out + v * V::kWidth, v == vectors - 1 ? V::load(from, tail) : V::load(from));
    }
  }

  // in[j][c] to out[c][j], a square of registers at a time.
  void transpose_rows(const float* in, int64_t rows, int64_t panel, float* out) const {
    const int64_t width = vectors_of(panel) * V::kWidth;
    const int64_t valid = min64(width, g.columns - panel * kPanel);
    for (int64_t c0 = 0; c0 < rows; c0 += V::kWidth) {
      const int64_t depth = min64(V::kWidth, rows - c0);
      const auto tail = V::tail(static_cast<int>(depth));
      for (int64_t j0 = 0; j0 < width; j0 += V::kWidth) {
        typename V::Reg square[V::kWidth];
#pragma GCC unroll 16
        for (int64_t j = 0; j < V::kWidth; ++j) {
          square[j] =
              j0 + j < valid ? V::load(in + (j0 + j) * g.filter_column + c0, tail) : V::zero();
        }
        V::transpose(square);
        for (int64_t c = 0; c < depth; ++c) V::store(out + (c0 + c) * width + j0, square[c]);
      }
    }
  }
};

// Computes tiles of a tap convolution from a packed filter. Allocates nothing and throws nothing: it
// serves the tasks of a runner.
template <class V>
struct TapTiles {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;

  const TapConvolution& g;
  const float* x;
  const float* bias;
  float* y;

  static int64_t most_entries(const TapConvolution& g) {
    return max64(g.vertical.count * g.horizontal.count, 1);
  }

  // What the taps of a region read. Where the taps of a filter row read neighbouring pixels, they
  // are one run. `entries` holds 2 * most_entries numbers.
  void list_taps(const TapRegion& region, int64_t* entries, TapTile& t) const {
    int64_t* offsets = entries;
    int64_t* filter_offsets = entries + most_entries(g);
    t.tap_offsets = offsets;
    t.filter_offsets = filter_offsets;
    t.taps = 0;
    t.run = g.reduce;
    if (region.s == region.s_end) return;
    const bool merged =
        g.reduce == g.source_c && (g.horizontal.stride == 1 || g.horizontal.count == 1);
    if (merged) t.run *= region.s_end - region.s;
    const int64_t s_end = merged ? region.s + 1 : region.s_end;
    for (int64_t r = region.r; r < region.r_end; ++r)
      for (int64_t s = region.s; s < s_end; ++s, ++t.taps) {
        offsets[t.taps] = (g.vertical.offset(r) * g.source_w + g.horizontal.offset(s)) * g.source_c;
        filter_offsets[t.taps] = (r * g.horizontal.count + s) * g.reduce;
      }
  }

  // The taps of a region among first .. end - 1 (counted r * S + s), channels c .. c_end - 1, for a
  // filter of which these are all that is packed.
  void list_taps(const TapRegion& region, int64_t first, int64_t end, int64_t c, int64_t c_end,
                 int64_t* entries, TapTile& t) const {
    int64_t* offsets = entries;
    int64_t* filter_offsets = entries + most_entries(g);
    t.tap_offsets = offsets;
    t.filter_offsets = filter_offsets;
    t.taps = 0;
    t.run = c_end - c;
    for (int64_t tap = first; tap < end; ++tap) {
      const int64_t r = tap / g.horizontal.count, s = tap % g.horizontal.count;
      if (r < region.r || r >= region.r_end || s < region.s || s >= region.s_end) continue;
      offsets[t.taps] =
          (g.vertical.offset(r) * g.source_w + g.horizontal.offset(s)) * g.source_c + c;
      filter_offsets[t.taps] = (tap - first) * t.run;
      ++t.taps;
    }
  }

  // Walks a region's pixels tile by tile: tiles of like sizes, the larger ones first.
  struct Cursor {
    int64_t width, height, pixels_a_tile, larger_tiles;
    int64_t n, i, j;

    Cursor(const TapRegion& region, int64_t images, int64_t tile)
        : width(region.column_end - region.column), height(region.row_end - region.row) {
      const int64_t pixels = region.pixels(images), tiles = ceil_div(pixels, V::kRows);
      pixels_a_tile = pixels / tiles;
      larger_tiles = pixels % tiles;
      const int64_t begin = tile * pixels_a_tile + min64(tile, larger_tiles);
      n = begin / (width * height);
      i = region.row + begin / width % height;
      j = region.column + begin % width;
      row = region.row;
      row_end = region.row_end;
      column = region.column;
      column_end = region.column_end;
    }
    int count_of(int64_t tile) const {
      return static_cast<int>(pixels_a_tile + (tile < larger_tiles));
    }

    int64_t row, row_end, column, column_end;
  };

  // Source and output addresses of the next tile's pixels; returns how many.
  int locate(Cursor& at, int64_t tile, const float** rows, float** out) const {
    const int count = at.count_of(tile);
    const int64_t to_step = g.y_column, from_step = g.horizontal.step * g.source_c;
    for (int row = 0; row < count;) {
      float* to = y + at.n * g.y_image + at.i * g.y_row + at.j * to_step;
      const float* from = x + at.n * g.source_image +
                          at.i * g.vertical.step * g.source_w * g.source_c + at.j * from_step;
      const int64_t stretch = min64(count - row, at.column_end - at.j);
      for (int64_t p = 0; p < stretch; ++p) {
        out[row + p] = to + p * to_step;
        rows[row + p] = from + p * from_step;
      }
      row += static_cast<int>(stretch);
      at.j += stretch;
      if (at.j < at.column_end) break;
      at.j = at.column;
      if (++at.i == at.row_end) {
        at.i = at.row;
        ++at.n;
      }
    }
    return count;
  }

  // One tile of `count` pixels and one panel, whose taps `t` lists already.
  void tile(const FilterPanels<V>& panels, int64_t group, int64_t panel, int count,
            const float* const* rows, float* const* out, const float* filter, TapTile& t) const {
    const int vectors = panels.vectors_of(panel);
    const int64_t column = group * g.columns + panel * kPanel;
    t.rows = rows;
    t.row_offset = group * g.reduce;
    t.y = out;
    t.y_offset = column;
    t.filter = filter;
    t.bias = bias ? bias + column : nullptr;
    t.columns = panels.last_columns(panel);
    t.relu = g.relu;
    tap_tile_function<V>(count, vectors)(t);
  }

  // A run of a region's tiles: all panels of `first_panel` .. `last_panel` - 1, from a filter packed
  // as a whole.
  void run(const FilterPanels<V>& panels, const float* packed, const TapRegion& region,
           int64_t group, int64_t first_panel, int64_t last_panel, int64_t tile_begin,
           int64_t tile_end, int64_t* entries) const {
    const float* rows[V::kRows];
    float* out[V::kRows];
    TapTile t{};
    t.first = t.last = true;
    list_taps(region, entries, t);
    Cursor cursor(region, g.images, tile_begin);
    for (int64_t i = tile_begin; i < tile_end; ++i) {
      const int count = locate(cursor, i, rows, out);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        tile(panels, group, panel, count, rows, out, packed + panels.offset(group, panel), t);
      }
    }
  }

  // The whole convolution on the calling thread.
  void run_all(const FilterPanels<V>& panels, const float* packed, int64_t* entries) const {
    for (int64_t group = 0; group < g.groups; ++group) {
      for_each_region(g, [&](const TapRegion& region) {
        const int64_t tiles = ceil_div(region.pixels(g.images), V::kRows);
        run(panels, packed, region, group, 0, panels.panels, 0, tiles, entries);
      });
    }
  }
};

// Blocking, tasks and scratch memory of one tap convolution.
//
// Where pixels are many, the whole filter is packed first. Where they are few, packing it costs as
// much as using it: then a task owns a panel and all (or many) pixels, and packs a chunk of the panel
// at a time, which stays in the first-level cache while the pixels pass; sums wait in y.
template <class V>
struct TapConvolutionRunner {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;
  static constexpr int64_t kChunkRows = 256;  // filter rows: 32 KiB a panel with AVX-512
  static constexpr int64_t kMostPanelsAChunk = 8;

  const TapConvolution g;
  const FilterPanels<V> panels;
  std::vector<TapRegion> regions;
  std::vector<int64_t> first_tile;  // of each region, and behind the last
  int64_t pixels, tasks;
  int64_t blocks;                        // runs of tiles
  int64_t panel_groups, panels_a_group;  // with the filter packed as a whole
  bool by_chunks;
  int64_t packed_bytes, entries_bytes;  // entries: of one worker
  int64_t workspace_bytes;
  int workers;

  explicit TapConvolutionRunner(const TapConvolution& convolution) : g(convolution), panels(g) {
    pixels = g.images * g.out_h * g.out_w;
    first_tile.push_back(0);
    if (pixels > 0) {
      for_each_region(g, [&](const TapRegion& region) {
        regions.push_back(region);
        first_tile.push_back(first_tile.back() + ceil_div(region.pixels(g.images), V::kRows));
      });
    }
    const int64_t tiles = first_tile.back();
    const int64_t enough_tasks = 4 * int64_t{num_threads()};

    // Time to pack, in vector operations a filter vector: by chunks it stays in the cache, but every
    // block packs anew; as a whole it goes to memory and comes back if it is large.
    constexpr int64_t kMostPixelsAChunk = 512;
    const int64_t filter_floats = g.groups * panels.group_floats;
    const int64_t chunked_blocks =
        max64(ceil_div(pixels, kMostPixelsAChunk),
              min64(tiles, ceil_div(enough_tasks, g.groups * panels.panels)));
    const int64_t whole_cost = filter_floats * 4 > (int64_t{512} << 10) ? 24 : 6;
    by_chunks = chunked_blocks * 5 < whole_cost;

    if (by_chunks) {
      blocks = chunked_blocks;
      // A few neighbouring panels a task: rows of the filter are read in longer pieces.
      const int64_t spare = g.groups * panels.panels * blocks / enough_tasks;
      panels_a_group = max64(1, min64(spare, kMostPanelsAChunk));
      panel_groups = ceil_div(panels.panels, panels_a_group);
      panels_a_group = ceil_div(panels.panels, panel_groups);
      packed_bytes = chunk_rows() * panels_a_group * kPanel * 4;
    } else {
      // Filter panels that stay in half of a 1 MiB second-level cache while tiles pass by.
      const int64_t panel_bytes = max64(panels.reduce * kPanel * 4, 1);
      panels_a_group = max64(1, min64(panels.panels, (int64_t{512} << 10) / panel_bytes));
      constexpr int64_t kTilesABlock = 8;
      blocks = ceil_div(tiles, kTilesABlock);
      if (blocks * g.groups * ceil_div(panels.panels, panels_a_group) < enough_tasks) {
        blocks = min64(tiles, enough_tasks);
        if (blocks * g.groups < enough_tasks) panels_a_group = 1;
      }
      panel_groups = ceil_div(panels.panels, panels_a_group);
      packed_bytes = panels.bytes();
    }
    blocks = max64(1, blocks);
    tasks = g.groups * panel_groups * blocks;
    entries_bytes = round_up(2 * TapTiles<V>::most_entries(g) * 8, 64);
    workers = workers_for(tasks);  // asked once: their number may change at any time
    workspace_bytes = (by_chunks ? workers : 1) * packed_bytes + workers * entries_bytes;
  }

  void execute(const float* x, const float* filter, const float* bias, float* y) const {
    if (pixels == 0) return;
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes));
    const TapTiles<V> tap_tiles{g, x, bias, y};
    char* const entries = reinterpret_cast<char*>(workspace.floats());
    float* const packed = workspace.floats(static_cast<std::size_t>(workers * entries_bytes));
    if (!by_chunks) panels.pack_all(filter, packed);
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
      int64_t* own_entries = reinterpret_cast<int64_t*>(entries + worker * entries_bytes);
      const int64_t block = task % blocks;
      const int64_t panel_group = task / blocks % panel_groups;
      const int64_t group = task / blocks / panel_groups;
      const int64_t tile_begin = first_tile.back() * block / blocks;
      const int64_t tile_end = first_tile.back() * (block + 1) / blocks;
      const int64_t first_panel = panel_group * panels_a_group;
      const int64_t last_panel = min64(panels.panels, first_panel + panels_a_group);
      if (by_chunks) {
        float* chunk = packed + worker * (packed_bytes / 4);
        work_by_chunks(tap_tiles, filter, group, first_panel, last_panel, tile_begin, tile_end,
                       chunk, own_entries);
        return;
      }
      for_each_part(tile_begin, tile_end, [&](const TapRegion& region, int64_t from, int64_t to) {
        tap_tiles.run(panels, packed, region, group, first_panel, last_panel, from, to,
                      own_entries);
      });
    });
  }

 private:
  // Rows of a chunk: of one tap if it has enough channels, else of several.
  int64_t channels_a_chunk() const { return min64(g.reduce, kChunkRows); }
  int64_t taps_a_chunk() const { return max64(1, kChunkRows / g.reduce); }
  int64_t chunk_rows() const { return channels_a_chunk() * taps_a_chunk(); }

  // Calls body(region, first tile, last tile + 1) for each region that tiles begin .. end - 1 touch.
  template <class Body>
  void for_each_part(int64_t begin, int64_t end, const Body& body) const {
    std::size_t at = 0;
    while (first_tile[at + 1] <= begin) ++at;
    while (begin < end) {
      const int64_t part_end = min64(end, first_tile[at + 1]);
      body(regions[at], begin - first_tile[at], part_end - first_tile[at]);
      begin = part_end;
      ++at;
    }
  }

  void work_by_chunks(const TapTiles<V>& tap_tiles, const float* filter, int64_t group,
                      int64_t first_panel, int64_t last_panel, int64_t tile_begin, int64_t tile_end,
                      float* chunk, int64_t* entries) const {
    const int64_t taps = g.vertical.count * g.horizontal.count;
    const float* rows[V::kRows];
    float* out[V::kRows];
    TapTile t{};
    // A sum without taps is still written.
    for (int64_t tap = 0; tap == 0 || tap < taps; tap += taps_a_chunk()) {
      const int64_t tap_end = min64(taps, tap + taps_a_chunk());
      for (int64_t c = 0; c < g.reduce; c += channels_a_chunk()) {
        const int64_t c_end = min64(g.reduce, c + channels_a_chunk());
        const int64_t rows_here = (tap_end - tap) * (c_end - c);
        panels.pack(filter, group, first_panel, last_panel, tap, tap_end, c, c_end, chunk,
                    rows_here, 0);
        t.first = tap == 0 && c == 0;
        t.last = tap_end >= taps && c_end == g.reduce;
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const float* own = chunk + (panel - first_panel) * kPanel * rows_here;
          for_each_part(tile_begin, tile_end,
                        [&](const TapRegion& region, int64_t from, int64_t to) {
                          tap_tiles.list_taps(region, tap, tap_end, c, c_end, entries, t);
                          typename TapTiles<V>::Cursor cursor(region, g.images, from);
                          for (int64_t i = from; i < to; ++i) {
                            const int count = tap_tiles.locate(cursor, i, rows, out);
                            tap_tiles.tile(panels, group, panel, count, rows, out, own, t);
                          }
                        });
        }
      }
    }
  }
};

inline TapConvolution fprop_taps(const Conv2dProblem& p) {
  TapConvolution g{};
  g.images = p.n;
  g.out_h = p.oh;
  g.out_w = p.ow;
  g.source_h = p.h;
  g.source_w = p.w;
  g.source_c = p.c;
  g.source_image = p.h * p.w * p.c;
  g.vertical = {p.r, p.stride_h, -p.pad_top, p.dilation_h, 0, 1};
  g.horizontal = {p.s, p.stride_w, -p.pad_left, p.dilation_w, 0, 1};
  g.groups = p.groups;
  g.reduce = p.c_per_group();
  g.columns = p.k_per_group();
  g.y_image = p.oh * p.ow * p.k;
  g.y_row = p.ow * p.k;
  g.y_column = p.k;
  g.filter_tap_row = p.s * p.c_per_group() * p.k;
  g.filter_tap_column = p.c_per_group() * p.k;
  g.filter_reduce = p.k;
  g.filter_column = 1;
  g.filter_group = p.k_per_group();
  g.relu = p.activation == Activation::relu;
  return g;
}

// The taps that reach input index stride * i + residue: output index i + offset.
inline AxisTaps residue_taps(int64_t taps, int64_t residue, int64_t pad, int64_t stride,
                             int64_t dilation) {
  AxisTaps out{0, 1, 0, 0, 0, 0};
  int64_t last_tap = 0, last_offset = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t reach = residue + pad - tap * dilation;
    if (reach % stride != 0) continue;
    const int64_t offset = reach / stride;
    if (out.count == 0) {
      out.first = offset;
      out.filter_first = tap;
    } else {
      // Taps of one class are evenly spaced, by stride / gcd(stride, dilation).
      out.stride = offset - last_offset;
      out.filter_stride = tap - last_tap;
    }
    last_tap = tap;
    last_offset = offset;
    ++out.count;
  }
  if (out.stride < 0) {  // ascending
    out.first = last_offset;
    out.filter_first = last_tap;
    out.stride = -out.stride;
    out.filter_stride = -out.filter_stride;
  }
  return out;
}

// Calls body(convolution, first float of its outputs) for each residue class of input pixels.
template <class Body>
void for_each_dgrad_class(const Conv2dProblem& p, const Body& body) {
  TapConvolution g{};
  g.images = p.n;
  g.source_h = p.oh;
  g.source_w = p.ow;
  g.source_c = p.k;
  g.source_image = p.oh * p.ow * p.k;
  g.groups = p.groups;
  g.reduce = p.k_per_group();
  g.columns = p.c_per_group();
  g.y_image = p.h * p.w * p.c;
  g.y_row = p.stride_h * p.w * p.c;
  g.y_column = p.stride_w * p.c;
  g.filter_tap_row = p.s * p.c_per_group() * p.k;
  g.filter_tap_column = p.c_per_group() * p.k;
  g.filter_reduce = 1;
  g.filter_column = p.k;
  g.filter_group = p.k_per_group();
  for (int64_t a = 0; a < min64(p.stride_h, p.h); ++a) {
    g.vertical = residue_taps(p.r, a, p.pad_top, p.stride_h, p.dilation_h);
    g.out_h = ceil_div(p.h - a, p.stride_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.w); ++b) {
      g.horizontal = residue_taps(p.s, b, p.pad_left, p.stride_w, p.dilation_w);
      g.out_w = ceil_div(p.w - b, p.stride_w);
      body(g, (a * p.w + b) * p.c);
    }
  }
}

template <class V>
void implicit_gemm_fprop(const Conv2dProblem& p, const float* x, const float* filter,
                         const float* bias, float* y) {
  const TapConvolution g = fprop_taps(p);
  TapConvolutionRunner<V>(g).execute(x, filter, bias, y);
}

template <class V>
void implicit_gemm_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, float* dx) {
  for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t first) {
    TapConvolutionRunner<V>(g).execute(dy, filter, nullptr, dx + first);
  });
}

}  // namespace
}  // namespace fastconv::cpu
