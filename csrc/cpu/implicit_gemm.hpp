// Convolution fprop and dgrad as an implicit GEMM: no im2col buffer. Both are "tap convolutions":
// every output pixel sums, over a list of taps, a run of source floats times packed filter rows.
//
// The register tile is V::kRows output pixels x V::kVectors vectors of output channels. The A
// operand is indirect: a pointer a pixel (plus a tap offset where the tile touches no padding, else
// a pointer a pixel and tap, with a row of zeros for padding), so that padding, stride and dilation
// cost the inner loop nothing. (The indirect operand is M. Dukhan's, "The Indirect Convolution
// Algorithm", 2019; the packed panels are those of Goto and van de Geijn, 2008.)
//
// dgrad with stride (a, b) is a*b independent tap convolutions of stride 1, one a residue class of
// input pixels: no zeros are stuffed.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"

namespace fastconv::cpu {
namespace {  // one copy an ISA: an inline function shared between them could run on the wrong CPU

using std::int64_t;

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One register tile: y[i][0 .. columns) = sum over taps, c of rows[i][tap + c] * filter.
struct TapTile {
  const float* const* rows;      // pixel pointers, `row_step` further on for each tap
  int64_t row_step;              // 0: the same pointers for every tap
  const int64_t* tap_offsets;    // floats, added to the pointers; `offset_step` apart
  int64_t offset_step;
  const int64_t* tap_numbers;    // which of the filter's taps each one is
  int64_t taps;
  int64_t run;                   // contiguous source floats a tap
  const float* filter;           // [tap number][run][vectors * width]
  const float* bias;             // `columns` values or null
  float* const* y;
  int columns;                   // of the last vector: 1 .. width
  bool relu;
};

template <class V, int Rows, int Vectors>
void tap_tile(const TapTile& t) {
  typename V::Reg sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[i][v] = V::zero();
  const float* const* rows = t.rows;
  for (int64_t tap = 0; tap < t.taps; ++tap, rows += t.row_step) {
    const float* a[Rows];
    const int64_t offset = t.tap_offsets[tap * t.offset_step];
    const float* filter = t.filter + t.tap_numbers[tap] * t.run * (Vectors * V::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) a[i] = rows[i] + offset;
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
  const auto tail = V::tail(t.columns);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const bool last = v == Vectors - 1;
    typename V::Reg bias = V::zero();
    if (t.bias) {
      bias = last ? V::load(t.bias + v * V::kWidth, tail) : V::load(t.bias + v * V::kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      typename V::Reg out = V::add(sum[i][v], bias);
      if (t.relu) out = V::relu(out);
      float* y = t.y[i] + v * V::kWidth;
      if (last) {
        V::store(y, out, tail);
      } else {
        V::store(y, out);
      }
    }
  }
}

using TapTileFunction = void (*)(const TapTile&);

template <class V, int Rows>
TapTileFunction tap_tile_of_rows(int vectors) {
  static_assert(V::kVectors == 2);
  return vectors == 1 ? tap_tile<V, Rows, 1> : tap_tile<V, Rows, 2>;
}

template <class V, int Rows = V::kRows>
TapTileFunction tap_tile_function(int rows, int vectors) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tap_tile_function<V, Rows - 1>(rows, vectors);
  }
  return tap_tile_of_rows<V, Rows>(vectors);
}

// The taps of one axis: source index = i * step + offset(tap), tap = 0 .. count - 1.
struct AxisTaps {
  int64_t count, step, first, stride;  // offset(tap) = first + tap * stride
  int64_t filter_first, filter_stride;  // the filter's row or column of a tap
  int64_t offset(int64_t tap) const { return first + tap * stride; }
  int64_t lowest() const { return stride < 0 ? offset(count - 1) : first; }
  int64_t highest() const { return stride < 0 ? first : offset(count - 1); }
};

struct TapConvolution {
  int64_t images, out_h, out_w;
  int64_t source_h, source_w, source_c;  // source_c: floats from pixel to pixel
  AxisTaps vertical, horizontal;
  int64_t groups, reduce, columns;  // per group: source and output channels
  // Floats from element to element of the (strided) output and of the filter.
  int64_t y_image, y_row, y_column;
  int64_t filter_tap_row, filter_tap_column, filter_reduce, filter_column, filter_group;
  bool relu;
};

// The filter as register tiles read it: panels of V::kVectors vectors of output channels (the last
// one of fewer, its spare lanes zero), in each [tap][source channel][output channel].
template <class V>
struct FilterPanels {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;

  const TapConvolution& g;
  int64_t panels, reduce, group_floats;  // reduce: the products of one sum

  explicit FilterPanels(const TapConvolution& convolution)
      : g(convolution),
        panels(ceil_div(g.columns, kPanel)),
        reduce(g.vertical.count * g.horizontal.count * g.reduce),
        group_floats(reduce * ceil_div(g.columns, V::kWidth) * V::kWidth) {}

  int64_t bytes() const { return ceil_div(g.groups * group_floats * 4, 64) * 64; }
  int vectors_of(int64_t panel) const {
    return static_cast<int>(
        min64(V::kVectors, ceil_div(g.columns - panel * kPanel, V::kWidth)));
  }
  // Channels in the last vector of a panel.
  int last_columns(int64_t panel) const {
    return static_cast<int>(min64(
        g.columns - panel * kPanel - int64_t{vectors_of(panel) - 1} * V::kWidth, V::kWidth));
  }
  int64_t offset(int64_t group, int64_t panel) const {
    return group * group_floats + panel * kPanel * reduce;
  }

  void pack_all(const float* filter, float* packed) const {
    parallel_for(g.groups * panels, [&](int64_t task) {
      const int64_t group = task / panels, panel = task % panels;
      pack(filter, group, panel, packed + offset(group, panel));
    });
  }

  void pack(const float* filter, int64_t group, int64_t panel, float* out) const {
    const int64_t width = vectors_of(panel) * V::kWidth;
    const int64_t valid = min64(width, g.columns - panel * kPanel);
    for (int64_t r = 0; r < g.vertical.count; ++r)
      for (int64_t s = 0; s < g.horizontal.count; ++s, out += g.reduce * width) {
        const float* in =
            filter + group * g.filter_group + panel * kPanel * g.filter_column +
            (g.vertical.filter_first + r * g.vertical.filter_stride) * g.filter_tap_row +
            (g.horizontal.filter_first + s * g.horizontal.filter_stride) * g.filter_tap_column;
        if (g.filter_column == 1) {
          copy_rows(in, valid, width, out);
        } else {
          transpose_rows(in, valid, width, out);
        }
      }
  }

 private:
  void copy_rows(const float* in, int64_t valid, int64_t width, float* out) const {
    const auto tail = V::tail(static_cast<int>(valid - (width - V::kWidth)));
    for (int64_t c = 0; c < g.reduce; ++c, in += g.filter_reduce, out += width) {
      for (int64_t j = 0; j < width - V::kWidth; j += V::kWidth) V::store(out + j, V::load(in + j));
      V::store(out + width - V::kWidth, V::load(in + width - V::kWidth, tail));
    }
  }

  // in[j][c] to out[c][j], a square of registers at a time.
  void transpose_rows(const float* in, int64_t valid, int64_t width, float* out) const {
    for (int64_t c0 = 0; c0 < g.reduce; c0 += V::kWidth) {
      const int64_t depth = min64(V::kWidth, g.reduce - c0);
      const auto tail = V::tail(static_cast<int>(depth));
      for (int64_t j0 = 0; j0 < width; j0 += V::kWidth) {
        typename V::Reg square[V::kWidth];
#pragma GCC unroll 16
        for (int64_t j = 0; j < V::kWidth; ++j) {
          square[j] = j0 + j < valid ? V::load(in + (j0 + j) * g.filter_column + c0, tail)
                                     : V::zero();
        }
        V::transpose(square);
        for (int64_t c = 0; c < depth; ++c) V::store(out + (c0 + c) * width + j0, square[c]);
      }
    }
  }
};

template <class V>
struct TapConvolutionRunner {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;

  const TapConvolution& g;
  const FilterPanels<V> panels_of_filter;
  const float* x;
  const float* filter;
  const float* bias;
  float* y;

  bool merged;  // a row of taps is one contiguous run: no padding left or right, no dilation
  int64_t taps, run, panels, tiles, pixels;
  int64_t tasks, zero_bytes, packed_bytes, offsets_bytes, workspace_bytes;
  const float* zeros;
  float* packed;
  int64_t *tap_offsets, *tap_numbers, *task_tap_numbers;
  const float** tables;
  int64_t table_size;
  int64_t blocks, panel_groups, panels_a_group;  // tasks: blocks of tiles x groups of panels

  TapConvolutionRunner(const TapConvolution& convolution, const float* source,
                       const float* filters, const float* biases, float* out)
      : g(convolution), panels_of_filter(g), x(source), filter(filters), bias(biases), y(out) {
    plan();
  }

  // Blocking and the sizes of everything in the workspace.
  void plan() {
    pixels = g.images * g.out_h * g.out_w;
    const AxisTaps& h = g.horizontal;
    merged = g.groups == 1 && h.count > 1 && h.stride == 1 && h.first >= 0 &&
             (g.out_w - 1) * h.step + h.highest() < g.source_w && g.reduce == g.source_c;
    taps = g.vertical.count * (merged ? 1 : h.count);
    run = g.reduce * (merged ? h.count : 1);
    panels = panels_of_filter.panels;
    tiles = ceil_div(pixels, V::kRows);

    // Filter panels that stay in half of a 1 MiB second-level cache while tiles pass by.
    const int64_t panel_bytes = max64(taps * run * kPanel * 4, 1);
    panels_a_group = max64(1, min64(panels, (int64_t{512} << 10) / panel_bytes));
    const int64_t enough_tasks = 4 * int64_t{num_threads()};
    constexpr int64_t kTilesABlock = 8, kMostTasks = 1024;
    blocks = ceil_div(tiles, kTilesABlock);
    if (blocks * g.groups * ceil_div(panels, panels_a_group) < enough_tasks) {
      blocks = min64(tiles, enough_tasks);
      if (blocks * g.groups < enough_tasks) panels_a_group = 1;
    }
    panel_groups = ceil_div(panels, panels_a_group);
    blocks = max64(1, min64(blocks, kMostTasks / (panel_groups * g.groups)));
    // A task owns a table of pointers; those of very large filters are few, to bound their memory.
    constexpr int64_t kMostTableBytes = int64_t{16} << 20;
    blocks = max64(1, min64(blocks, kMostTableBytes / ((taps + 1) * V::kRows * 8 * panel_groups *
                                                       g.groups)));
    tasks = g.groups * panel_groups * blocks;

    table_size = (taps + 1) * V::kRows;  // a task's pointers: the pixels', or every tap's
    zero_bytes = ceil_div(run * 4, 64) * 64;
    packed_bytes = panels_of_filter.bytes();
    offsets_bytes = ceil_div((2 * taps + 1 + tasks * taps) * 8, 64) * 64;
    workspace_bytes = packed_bytes + zero_bytes + offsets_bytes + tasks * table_size * 8;
  }

  void execute() {
    if (pixels == 0) return;
    const AxisTaps& h = g.horizontal;
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes));
    packed = workspace.floats();
    float* zero_row = workspace.floats(packed_bytes);
    zeros = zero_row;
    tap_offsets = reinterpret_cast<int64_t*>(workspace.floats(packed_bytes + zero_bytes));
    tap_numbers = tap_offsets + taps + 1;
    task_tap_numbers = tap_numbers + taps;
    tables = reinterpret_cast<const float**>(
        workspace.floats(packed_bytes + zero_bytes + offsets_bytes));
    std::memset(zero_row, 0, static_cast<std::size_t>(zero_bytes));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t r = merged ? tap : tap / h.count;
      const int64_t s = merged ? 0 : tap % h.count;
      tap_numbers[tap] = tap;
      tap_offsets[tap] = (g.vertical.offset(r) * g.source_w + h.offset(s)) * g.source_c;
    }
    tap_offsets[taps] = 0;

    panels_of_filter.pack_all(filter, packed);
    parallel_for(tasks, [&](int64_t task) { work(task); });
  }

  void work(int64_t task) const {
    const float** rows = tables + task * table_size;
    const int64_t block = task % blocks;
    const int64_t panel_group = task / blocks % panel_groups;
    const int64_t group = task / blocks / panel_groups;
    const int64_t first_panel = panel_group * panels_a_group;
    const int64_t last_panel = min64(panels, first_panel + panels_a_group);
    float* out[V::kRows];

    const int64_t tile_end = tiles * (block + 1) / blocks;
    for (int64_t tile = tiles * block / blocks; tile < tile_end; ++tile) {
      // Tiles of equal height (to one) leave no thin one at the end.
      const int64_t begin = pixels * tile / tiles, end = pixels * (tile + 1) / tiles;
      const int count = static_cast<int>(end - begin);
      const bool inside = locate(group, begin, count, rows, out);
      TapTile t{};
      t.rows = rows;
      t.tap_offsets = tap_offsets;
      t.tap_numbers = tap_numbers;
      t.offset_step = 1;
      t.taps = taps;
      t.run = run;
      t.relu = g.relu;
      if (!inside) {
        int64_t* numbers = task_tap_numbers + task * taps;
        t.taps = fill_table(group, begin, count, rows, numbers);
        t.tap_numbers = numbers;
        t.row_step = count;
        t.tap_offsets = tap_offsets + taps;  // a zero
        t.offset_step = 0;
      }
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int vectors = panels_of_filter.vectors_of(panel);
        const int64_t column = group * g.columns + panel * kPanel;
        float* shifted[V::kRows];
        for (int i = 0; i < count; ++i) shifted[i] = out[i] + column;
        t.y = shifted;
        t.filter = packed + panels_of_filter.offset(group, panel);
        t.bias = bias ? bias + column : nullptr;
        t.columns = panels_of_filter.last_columns(panel);
        tap_tile_function<V>(count, vectors)(t);
      }
    }
  }

  // Output and source addresses of `count` pixels from `begin` on; true if no tap meets padding.
  bool locate(int64_t group, int64_t begin, int count, const float** rows, float** out) const {
    bool inside = true;
    int64_t n = begin / (g.out_h * g.out_w);
    int64_t i = begin / g.out_w % g.out_h, j = begin % g.out_w;
    for (int row = 0; row < count; ++row) {
      out[row] = y + n * g.y_image + i * g.y_row + j * g.y_column;
      const int64_t source_i = i * g.vertical.step, source_j = j * g.horizontal.step;
      rows[row] = x + ((n * g.source_h + source_i) * g.source_w + source_j) * g.source_c +
                  group * g.reduce;
      inside = inside && source_i + g.vertical.lowest() >= 0 &&
               source_i + g.vertical.highest() < g.source_h &&
               source_j + g.horizontal.lowest() >= 0 &&
               source_j + g.horizontal.highest() < g.source_w;
      advance(n, i, j);
    }
    return inside;
  }

  // A pointer for each pixel and tap: the source, or zeros in the padding. Filter rows that meet
  // nothing but padding are left out. Returns the number of taps.
  int64_t fill_table(int64_t group, int64_t begin, int count, const float** table,
                     int64_t* numbers) const {
    const int64_t columns = merged ? 1 : g.horizontal.count;
    const int64_t first_line = begin / g.out_w, last_line = (begin + count - 1) / g.out_w;
    int64_t used = 0;
    for (int64_t r = 0; r < g.vertical.count; ++r) {
      bool met = false;
      for (int64_t line = first_line; line <= last_line; ++line) {
        met = met || is_row(source_row(line % g.out_h, r));
      }
      if (!met) continue;
      for (int64_t s = 0; s < columns; ++s) numbers[used + s] = r * columns + s;
      int64_t n = first_line / g.out_h, i = first_line % g.out_h, j = begin % g.out_w;
      for (int row = 0; row < count; ++row) {
        const int64_t source_i = source_row(i, r);
        const float* line = x + (n * g.source_h + source_i) * g.source_w * g.source_c +
                            group * g.reduce;
        for (int64_t s = 0; s < columns; ++s) {
          const int64_t source_j = j * g.horizontal.step + g.horizontal.offset(s);
          const bool is_inside = is_row(source_i) && source_j >= 0 && source_j < g.source_w;
          table[(used + s) * count + row] = is_inside ? line + source_j * g.source_c : zeros;
        }
        advance(n, i, j);
      }
      used += columns;
    }
    return used;
  }

  int64_t source_row(int64_t i, int64_t tap) const {
    return i * g.vertical.step + g.vertical.offset(tap);
  }
  bool is_row(int64_t source_i) const { return source_i >= 0 && source_i < g.source_h; }

  // To the next output pixel.
  void advance(int64_t& n, int64_t& i, int64_t& j) const {
    if (++j < g.out_w) return;
    j = 0;
    if (++i < g.out_h) return;
    i = 0;
    ++n;
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
  TapConvolutionRunner<V>(g, x, filter, bias, y).execute();
}

template <class V>
void implicit_gemm_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, float* dx) {
  for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t first) {
    TapConvolutionRunner<V>(g, dy, filter, nullptr, dx + first).execute();
  });
}

}  // namespace
}  // namespace fastconv::cpu
