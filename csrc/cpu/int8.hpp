// Convolution of int8 as an implicit GEMM: the source is quantised into a copy with its padding laid out,
// which makes all output pixels alike; the filter is packed as register tiles read it.
//
// Each lane of a vector is an output channel and multiplies D::kQuad neighbouring source channels at once:
// a broadcast of them meets a vector of the filter. The taps of a filter row are neighbours in the source
// too, and make one run, unless groups or dilation part them. Where a run ends within a quad, the
// filter's part of it is zero, and it does not matter what the source has there.
//
// VPDPBUSD multiplies unsigned by signed bytes. The source is thus stored with D::kZero, 128, added, and
// sums begin at -128 times the sum of the filter's values. Integers wrap around: the shift is undone
// exactly, even where it has overflowed in between.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/implicit_gemm.hpp"
#include "cpu/int8_kernels.hpp"

namespace fastconv::cpu {
namespace {

// --- quantisation ---------------------------------------------------------------------------------

// As keras.quantizers.AbsMaxQuantizer has it, of whose defaults these are: q(x) = round(x * scale), half
// to even, scale = kInt8Most / (largest absolute value + kInt8Epsilon).
constexpr float kInt8Most = 127, kInt8Epsilon = 1e-7f;

// The bits of absolute values are in the order of the values, above all infinity and then NaN.
constexpr std::uint32_t kInfinityBits = 0x7F800000u;

inline float scale_of_abs_max(std::uint32_t bits) {
  if (bits >= kInfinityBits) return std::numeric_limits<float>::quiet_NaN();
  float abs_max = 0;
  std::memcpy(&abs_max, &bits, sizeof abs_max);
  return kInt8Most / (abs_max + kInt8Epsilon);
}

// --- the register tile ----------------------------------------------------------------------------

template <class D>
constexpr int kInt8Vectors = static_cast<int>(std::size(D::kRows)) - 1;
template <class D>
constexpr int kMostInt8Rows = *std::max_element(std::begin(D::kRows), std::end(D::kRows));

template <class D>
struct Int8Tile {
  const typename D::Source* x[kMostInt8Rows<D>];  // of each pixel
  const float* multiplier[kMostInt8Rows<D>];      // what its sums are multiplied by, K values
  float* y;                                       // of pixel 0
  int64_t y_step;
  const int64_t* tap_offsets;        // elements of x
  int64_t taps, quads;               // quads: of each tap
  const typename D::Weight* filter;  // [tap][quad][vectors * width][in the quad]
  const std::int32_t* start;         // of the sums
  const float* bias;                 // null for none
  int64_t x_offset, column;          // of the group; of the first output channel
  int columns;                       // of the last vector: 1 .. width
  bool relu;
};

template <class D>
typename D::Floats finished(typename D::Sums sum, typename D::Floats multiplier,
                            typename D::Floats bias, bool relu) {
  const typename D::Floats out = D::add(D::multiply(D::to_floats(sum), multiplier), bias);
  return relu ? D::relu(out) : out;
}

template <class D, int Rows, int Vectors>
void int8_tile(const Int8Tile<D>& t) {
  constexpr int kPanel = Vectors * D::kWidth;
  typename D::Sums sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const typename D::Sums start = D::load_sums(t.start + v * D::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) sum[i][v] = start;
  }
  const typename D::Weight* filter = t.filter;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const typename D::Source* x[Rows];
    const int64_t offset = t.x_offset + t.tap_offsets[tap];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) x[i] = t.x[i] + offset;
    for (int64_t quad = 0; quad < t.quads; ++quad, filter += kPanel * D::kQuad) {
      typename D::Sums b[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b[v] = D::load_filter(filter + v * D::kWidth * D::kQuad);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const typename D::Sums a = D::broadcast(x[i] + quad * D::kQuad);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = D::dot(sum[i][v], a, b[v]);
      }
    }
  }
  const auto tail = D::tail(t.columns);
  const bool relu = t.relu;
  const float* const bias = t.bias ? t.bias + t.column : nullptr;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const float* const multiplier = t.multiplier[i] + t.column;
    float* const to = t.y + i * t.y_step + t.column;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int at = v * D::kWidth;
      if (v < Vectors - 1) {
        D::store(to + at, finished<D>(sum[i][v], D::load(multiplier + at),
                                      bias ? D::load(bias + at) : D::zero(), relu));
      } else {
        D::store(to + at,
                 finished<D>(sum[i][v], D::load(multiplier + at, tail),
                             bias ? D::load(bias + at, tail) : D::zero(), relu),
                 tail);
      }
    }
  }
}

template <class D>
using Int8TileFunction = void (*)(const Int8Tile<D>&);

template <class D, int Vectors, std::size_t... I>
constexpr auto make_int8_tiles(std::index_sequence<I...>) {
  return std::array<Int8TileFunction<D>, kMostInt8Rows<D>>{int8_tile<D, I + 1, Vectors>...};
}

// By vectors - 1 and rows - 1.
template <class D, std::size_t... I>
constexpr auto make_int8_tile_table(std::index_sequence<I...>) {
  return std::array{
      make_int8_tiles<D, I + 1>(std::make_index_sequence<std::size_t{D::kRows[I + 1]}>{})...};
}

template <class D>
Int8TileFunction<D> int8_tile_function(int rows, int vectors) {
  static constexpr auto kTable =
      make_int8_tile_table<D>(std::make_index_sequence<std::size_t{kInt8Vectors<D>}>{});
  return kTable[static_cast<std::size_t>(vectors - 1)][static_cast<std::size_t>(rows - 1)];
}

// --- one convolution ------------------------------------------------------------------------------

template <class D>
class Int8Convolution {
 public:
  // Whether the copy with its padding is no larger than it is worth.
  static bool serves(const Conv2dProblem& p) {
    return !mostly_padding(p, p.h + p.pad_top + p.pad_bottom, p.w + p.pad_left + p.pad_right);
  }

  static void run(const Conv2dProblem& p, const Int8Operands& t) { Int8Convolution(p, t).run(); }

 private:
  using Source = typename D::Source;
  using Weight = typename D::Weight;
  static constexpr int kVectors = kInt8Vectors<D>;
  static constexpr int64_t kPanel = int64_t{kVectors} * D::kWidth;

  const Conv2dProblem& p_;
  const Int8Operands& t_;
  const int64_t row_, image_;         // elements of the copy
  const bool merged_;                 // the taps of a row into one run
  const int64_t taps_, run_, quads_;  // runs of source elements, how long; how many quads
  const int64_t pixels_;
  const int64_t vectors_, panels_;  // of a group
  const int64_t panel_weights_;     // of a whole panel
  const int64_t group_weights_;
  std::vector<int64_t> tap_offsets_;
  Source* source_ = nullptr;
  float* multipliers_ = nullptr;  // [image][K]
  Weight* filter_ = nullptr;
  std::int32_t* start_ = nullptr;

  Int8Convolution(const Conv2dProblem& p, const Int8Operands& t)
      : p_(p), t_(t), row_((p.w + p.pad_left + p.pad_right) * p.c),
        image_((p.h + p.pad_top + p.pad_bottom) * row_),
        merged_(p.groups == 1 && p.dilation_w == 1), taps_(merged_ ? p.r : p.r * p.s),
        run_(merged_ ? p.s * p.c : p.c_per_group()), quads_(ceil_div(run_, D::kQuad)),
        pixels_(p.n * p.oh * p.ow), vectors_(ceil_div(p.k_per_group(), D::kWidth)),
        panels_(ceil_div(vectors_, kVectors)), panel_weights_(taps_ * quads_ * kPanel * D::kQuad),
        group_weights_(taps_ * quads_ * vectors_ * D::kWidth * D::kQuad) {
    for (int64_t r = 0; r < p.r; ++r) {
      for (int64_t s = 0; s < (merged_ ? 1 : p.s); ++s) {
        tap_offsets_.push_back(r * p.dilation_h * row_ + s * p.dilation_w * p.c);
      }
    }
  }

  // Where pixels are few, a task packs a panel of the filter and uses it up: it stays in the cache.
  bool packs_in_tasks() const {
    constexpr int64_t kMostPixels = 512;
    return pixels_ <= kMostPixels && p_.groups * panels_ >= 2 * int64_t{num_threads()};
  }

  void run() {
    if (pixels_ == 0) return;
    const bool in_tasks = packs_in_tasks();
    const int64_t most_tasks = p_.groups * panels_;
    const int workers = workers_for(most_tasks);
    const int64_t own_weights = round_up(panel_weights_ * int64_t{sizeof(Weight)}, 64);

    int64_t bytes = 0;
    const auto reserve = [&bytes](int64_t size) {
      return std::exchange(bytes, round_up(bytes + size, 64));
    };
    // The last quad of the last run may reach behind the source.
    const int64_t source = reserve((p_.n * image_ + D::kQuad) * int64_t{sizeof(Source)});
    const int64_t multipliers = reserve(p_.n * p_.k * 4);
    const int64_t maxima = reserve(p_.n * chunks() * 4);
    const int64_t start = reserve(p_.groups * vectors_ * D::kWidth * 4);
    const int64_t filter = reserve(in_tasks ? workers * own_weights
                                            : p_.groups * group_weights_ * int64_t{sizeof(Weight)});
    const Workspace workspace(static_cast<std::size_t>(bytes));
    char* const base = reinterpret_cast<char*>(workspace.floats());
    source_ = reinterpret_cast<Source*>(base + source);
    multipliers_ = reinterpret_cast<float*>(base + multipliers);
    start_ = reinterpret_cast<std::int32_t*>(base + start);
    filter_ = reinterpret_cast<Weight*>(base + filter);

    quantize(reinterpret_cast<std::uint32_t*>(base + maxima));
    if (in_tasks) {
      parallel_for(most_tasks, workers, [&](int64_t task, int worker) {
        const int64_t group = task / panels_, panel = task % panels_;
        Weight* const own = filter_ + worker * own_weights / int64_t{sizeof(Weight)};
        pack(group, panel, own);
        multiply(group, panel, panel + 1, 0, tiles_of(panel), own);
      });
      return;
    }
    parallel_for(most_tasks, [&](int64_t task) {
      const int64_t group = task / panels_, panel = task % panels_;
      pack(group, panel, filter_ + weights_before(group, panel));
    });
    multiply_all();
  }

  // --- the source ---------------------------------------------------------------------------------

  // Parts of an image that tasks search for their maximum.
  int64_t chunks() const {
    constexpr int64_t kFloats = 16384;
    const int64_t size = p_.h * p_.w * p_.c;
    return min64(ceil_div(size, kFloats), 64);
  }

  void quantize(std::uint32_t* maxima) {
    std::memset(static_cast<void*>(source_ + p_.n * image_), 0, D::kQuad * sizeof(Source));
    const int64_t parts = chunks();
    if (parts == 1 || p_.n >= 4 * num_threads()) {
      parallel_for(p_.n, [&](int64_t n) {
        quantize_rows(n, 0, p_.h, scale_of(n, D::abs_max_bits(image(n), p_.h * p_.w * p_.c)));
      });
      return;
    }
    parallel_for(p_.n * parts, [&](int64_t task) {
      const Span part = part_of(p_.h * p_.w * p_.c, parts, task % parts);
      maxima[task] = D::abs_max_bits(image(task / parts) + part.begin, part.size());
    });
    const int64_t bands = min64(parts, p_.h);
    parallel_for(p_.n * bands, [&](int64_t task) {
      const int64_t n = task / bands, band = task % bands;
      std::uint32_t bits = 0;
      for (int64_t i = 0; i < parts; ++i) bits = std::max(bits, maxima[n * parts + i]);
      const float scale = band == 0 ? scale_of(n, bits) : scale_of_abs_max(bits);
      const Span rows = part_of(p_.h, bands, band);
      quantize_rows(n, rows.begin, rows.end, scale);
    });
  }

  const float* image(int64_t n) const { return t_.x + n * p_.h * p_.w * p_.c; }

  // Of image n, whose multipliers are computed.
  float scale_of(int64_t n, std::uint32_t abs_max_bits) const {
    const float scale = scale_of_abs_max(abs_max_bits);
    float* const out = multipliers_ + n * p_.k;
    for (int64_t k = 0; k < p_.k; ++k) out[k] = 1 / (t_.filter_scale[k] * scale);
    return scale;
  }

  // Rows begin .. end - 1, with the padding beside them, and that above and below the image.
  void quantize_rows(int64_t n, int64_t begin, int64_t end, float scale) const {
    Source* const out = source_ + n * image_;
    const int64_t width = p_.w * p_.c, left = p_.pad_left * p_.c;
    if (begin == 0) fill(out, p_.pad_top * row_);
    for (int64_t h = begin; h < end; ++h) {
      Source* const row = out + (p_.pad_top + h) * row_;
      fill(row, left);
      if (std::isnan(scale)) {
        fill(row + left, width);  // its multipliers are NaN
      } else {
        D::quantize(image(n) + h * width, width, scale, row + left);
      }
      fill(row + left + width, p_.pad_right * p_.c);
    }
    if (end == p_.h) fill(out + (p_.pad_top + p_.h) * row_, p_.pad_bottom * row_);
  }

  static void fill(Source* out, int64_t count) { std::fill_n(out, count, Source{D::kZero}); }

  // --- the filter ---------------------------------------------------------------------------------

  int vectors_of(int64_t panel) const {
    return static_cast<int>(min64(kVectors, vectors_ - panel * kVectors));
  }
  int64_t weights_before(int64_t group, int64_t panel) const {
    return group * group_weights_ + panel * panel_weights_;
  }
  std::int32_t* start_of(int64_t group, int64_t panel) const {
    return start_ + (group * vectors_ + panel * kVectors) * D::kWidth;
  }

  void pack(int64_t group, int64_t panel, Weight* out) const {
    const int vectors = vectors_of(panel);
    const int64_t width = int64_t{vectors} * D::kWidth, first = panel * kPanel;
    const int64_t columns = min64(width, p_.k_per_group() - first);
    const std::int8_t* row = t_.filter + group * p_.k_per_group() + first;
    std::int8_t rest[D::kQuad][kPanel] = {};  // of rows that are not as wide, or not there
    const std::int8_t* rows[D::kQuad];
    typename D::Sums sums[kVectors];
    for (auto& sum : sums) sum = D::no_sums();
    const typename D::Sums zero = D::broadcast_zero();
    constexpr int64_t kRowsAhead = 32;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t quad = 0; quad < quads_; ++quad, out += width * D::kQuad) {
        for (int64_t i = 0; i < D::kQuad; ++i) {
          const bool there = quad * D::kQuad + i < run_;
          rows[i] = row;
          if (!there || columns < width) {
            std::memset(rest[i], 0, kPanel);
            for (int64_t k = 0; there && k < columns; ++k) rest[i][k] = row[k];
            rows[i] = rest[i];
          }
          // Neighbouring rows are far apart: no processor foresees them.
          __builtin_prefetch(row + kRowsAhead * p_.k);
          if (there) row += p_.k;
        }
        D::interleave(rows, vectors, out);
        for (int v = 0; v < vectors; ++v) {
          sums[v] = D::dot(sums[v], zero, D::load_filter(out + int64_t{v} * D::kWidth * D::kQuad));
        }
      }
    }
    for (int v = 0; v < vectors; ++v) {
      D::store_sums(start_of(group, panel) + v * D::kWidth, D::negative(sums[v]));
    }
  }

  // --- the product --------------------------------------------------------------------------------

  int64_t tiles_of(int64_t panel) const { return ceil_div(pixels_, D::kRows[vectors_of(panel)]); }

  void multiply_all() const {
    // Filter panels that stay in half of a 1 MiB second-level cache while tiles pass by.
    constexpr int64_t kPixelsABlock = 96, kCache = int64_t{512} << 10;
    const int64_t whole = vectors_ / kVectors;
    const int64_t most = max64(1, kCache / (panel_weights_ * int64_t{sizeof(Weight)}));
    const int64_t enough = 4 * int64_t{num_threads()};
    struct Pass {
      int64_t first, last, panels_a_task, panel_groups, blocks, tasks;
    };
    std::array<Pass, 2> passes{};  // of whole panels, and of one with fewer vectors
    int64_t tasks = 0;
    for (int i = 0; i < 2; ++i) {
      Pass& pass = passes[static_cast<std::size_t>(i)];
      pass.first = i == 0 ? 0 : whole;
      pass.last = i == 0 ? whole : panels_;
      const int64_t panels = pass.last - pass.first;
      if (panels == 0) continue;
      const int64_t tiles = tiles_of(pass.first);
      pass.panels_a_task = min64(most, panels);
      pass.blocks = max64(1, ceil_div(pixels_, kPixelsABlock));
      if (pass.blocks * p_.groups * ceil_div(panels, pass.panels_a_task) < enough) {
        pass.blocks = min64(tiles, enough);
        if (pass.blocks * p_.groups < enough) pass.panels_a_task = 1;
      }
      pass.panel_groups = ceil_div(panels, pass.panels_a_task);
      pass.tasks = p_.groups * pass.panel_groups * pass.blocks;
      tasks += pass.tasks;
    }
    parallel_for(tasks, [&](int64_t task) {
      const bool second = task >= passes[0].tasks;
      const Pass& pass = passes[second];
      if (second) task -= passes[0].tasks;
      const int64_t block = task % pass.blocks, group = task / pass.blocks / pass.panel_groups;
      const int64_t panel =
          pass.first + task / pass.blocks % pass.panel_groups * pass.panels_a_task;
      const int64_t panel_end = min64(pass.last, panel + pass.panels_a_task);
      const Span tiles = part_of(tiles_of(panel), pass.blocks, block);
      multiply(group, panel, panel_end, tiles.begin, tiles.end,
               filter_ + weights_before(group, panel));
    });
  }

  // Tiles tile .. tile_end - 1 for panels of one number of vectors, which lie packed in `filter`.
  void multiply(int64_t group, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end,
                const Weight* filter) const {
    const int vectors = vectors_of(panel);
    const LikeTiles tiles(pixels_, tiles_of(panel));
    int64_t pixel = tiles.begin(tile);
    int64_t n = pixel / (p_.oh * p_.ow), row = pixel / p_.ow % p_.oh, column = pixel % p_.ow;
    Int8Tile<D> t{};
    t.y_step = p_.k;
    t.tap_offsets = tap_offsets_.data();
    t.taps = taps_;
    t.quads = quads_;
    t.bias = t_.bias;
    t.relu = p_.activation == Activation::relu;
    t.x_offset = group * p_.c_per_group();
    for (; tile < tile_end; ++tile) {
      const int count = static_cast<int>(tiles.size(tile));
      t.y = t_.y + pixel * p_.k;
      pixel += count;
      for (int i = 0; i < count; ++i) {
        t.x[i] = source_ + n * image_ + row * p_.stride_h * row_ + column * p_.stride_w * p_.c;
        t.multiplier[i] = multipliers_ + n * p_.k;
        if (++column < p_.ow) continue;
        column = 0;
        if (++row < p_.oh) continue;
        row = 0;
        ++n;
      }
      const Int8TileFunction<D> function = int8_tile_function<D>(count, vectors);
      t.filter = filter;
      for (int64_t i = panel; i < panel_end; ++i, t.filter += panel_weights_) {
        t.start = start_of(group, i);
        t.column = group * p_.k_per_group() + i * kPanel;
        t.columns = static_cast<int>(
            min64(p_.k_per_group() - i * kPanel - int64_t{vectors - 1} * D::kWidth, D::kWidth));
        function(t);
      }
    }
  }
};

template <class D>
constexpr Int8Algorithm int8_algorithm(const char* name, bool (*on_this_cpu)()) {
  return {name, on_this_cpu, Int8Convolution<D>::serves, Int8Convolution<D>::run};
}

}  // namespace
}  // namespace fastconv::cpu
