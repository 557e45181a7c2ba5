// Convolution wgrad: dfilter[q, k] = sum over output pixels of x[pixel + offset(q)] * dy[pixel, k],
// q running over (r, s, c). A register tile of V::kGemmRows[v] q's x v vectors of k stays in
// registers while a block of pixels streams by. dy comes from a packed copy of the block, which the
// ReLU mask and the bias gradient are part of; x from a list of addresses.
//
// With channels enough to fill a tile, a tile's rows are channels of one tap, and its list leaves out
// the pixels that meet padding. The input is packed first where enough tiles read it, the channels of a
// tile side by side: from the input itself a tile would use a few floats of every cache line, of lines
// that fall into few sets of the first-level cache. Of one tap, tiles of a task's first panel pack what
// they read, block by block: what another core packed would take longer to fetch. With fewer channels, a
// tile spans taps, and the input is copied with its padding first, unless taps or windows lie so far
// apart that the copy would be mostly padding.
//
// The pixels are cut into `parts`, each with a sum of its own, added up in order at the end. The cut
// depends on the problem alone and there are no atomics: the same bits for any thread count.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/transpose.hpp"

namespace fastconv::cpu {
namespace {

// Pixels of a list that lie evenly in the source.
struct PixelRun {
  int64_t x;      // floats from the source's first
  int64_t pixel;  // the first one's number in the list
  int64_t count;
  int64_t ahead = 0;  // floats from a pixel to what a tile of `fetched` rows asks for
};

// Adds `more` pixels from `pixel` on, `step` floats apart, to runs first .. end - 1, the last of which they may
// go on. Returns the new end.
inline PixelRun* add_run(int64_t x, int64_t pixel, int64_t more, int64_t step, PixelRun* first,
                         PixelRun* end) {
  if (end != first) {
    PixelRun& last = end[-1];
    if (last.x + last.count * step == x && last.pixel + last.count == pixel) {
      last.count += more;
      return end;
    }
  }
  *end = {.x = x, .pixel = pixel, .count = more};
  return end + 1;
}

struct WgradTile {
  const float* x;
  const float* dy;
  int64_t dy_step;  // floats, from one pixel of the block to the next
  const PixelRun* runs;
  int64_t run_count;
  int64_t x_step;  // floats, from one pixel of a run to the next
  // What a tile of `..._ahead` rows asks for meanwhile, a line or two a round of its loop: of pixels that lie as
  // those of x do, or else `ahead_step` apart, the first of each round.
  const float* ahead;
  int64_t ahead_step;
  bool ahead_as_x;
  const int64_t* offsets;  // where rows lie apart, of each from x
  // Instead of runs, where pixels are `listed`: floats from x, a pixel.
  const int64_t* x_pixels;
  int64_t pixels;
  // Where tiles of `packing_...` rows put what they read: of x, `packed_step` floats a pixel; of dy, whole
  // vectors.
  float *packed_x, *packed_dy;
  int64_t packed_step;

  float* sum;
  int64_t sum_row;
  float* next_sum;  // the next tile's, asked for meanwhile
  int valid;        // columns of the last vector
  bool first;
};

// Where a tile's rows are. `near`: they follow one another in the input itself, of which the tile uses a
// few floats of a pixel, of lines that a tile before it has read. `fetched`: of the next lines. Pixels lie
// too far apart for the hardware to ask for them in time. `..._ahead`: and it asks for t.ahead.
// `packing_...`: as `fetched`, or packed, and x or dy or both are packed meanwhile, which takes no time
// beside the products.
// `apart_once`: apart, and dy is read where it lies, for the first time. `listed`: apart, and so are the
// pixels.
enum class WgradRows {
  packed,
  packed_ahead,
  packing_x,
  packing_dy,
  packing_both,
  near,
  fetched,
  fetched_ahead,
  apart,
  apart_once,
  apart_ahead,
  listed,
  listed_ahead,
};
constexpr int64_t kPixelsAhead = 24;  // of their use

// Of the input, where pixels lie `apart` floats: multiples of 16 lines fall into few sets of the first-level
// cache, where what is asked for too early is gone when it is used. With AVX2, of 8, 16 and 32 lines that stay there,
// 1, 3 and 12 pixels were fastest.
template <class V>
int64_t wgrad_pixels_ahead(int64_t apart) {
  if (V::kRegisters == 32) return kPixelsAhead / (apart % (16 * kLine) == 0 ? 2 : 1);
  const int64_t kept = pixels_kept(apart);
  return max64(1, min64(kPixelsAhead, kept * kept / 80));
}

// Lines that a tile of `apart_ahead` or `listed_ahead` rows asks for, a pixel, at most; others ask for one.
template <class V>
constexpr int64_t wgrad_lines_ahead(int64_t vectors) {
  return max64(1, vectors * V::kWidth / (2 * kLine));
}

// `Count` floats, to where there is room for whole vectors.
template <class V, int Count>
[[gnu::always_inline]] inline void copy_few(const float* from, float* to) {
  constexpr int kLast = (Count - 1) / V::kWidth * V::kWidth;
  const auto tail = V::tail(Count - kLast);
  for (int i = 0; i < kLast; i += V::kWidth) V::store(to + i, V::load(from + i));
  if constexpr (2 * (Count - kLast) <= V::kWidth && requires { V::copy_half(from, tail, to); }) {
    V::copy_half(from + kLast, tail, to + kLast);
  } else {
    V::store(to + kLast, V::load(from + kLast, tail));
  }
}

// Whether there are tiles of `packed_ahead` rows.
template <class V>
constexpr bool kPackedTilesAsk = V::kRegisters < 32;

template <class V, int Rows, int Vectors, WgradRows Where>
void wgrad_tile(const WgradTile& t) {
  const auto tail = V::tail(t.valid);
  typename V::Reg sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const float* at = t.sum + i * t.sum_row + v * V::kWidth;
      if (t.first) {
        __builtin_prefetch(at, 1, 3);
        sum[i][v] = V::zero();
      } else {
        sum[i][v] = v == Vectors - 1 ? V::load(at, tail) : V::load(at);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int at = 0; at < Vectors * V::kWidth; at += kLine) {
      __builtin_prefetch(t.next_sum + i * t.sum_row + at, 1, 3);
    }
  constexpr bool kFetchesAhead = Where == WgradRows::fetched_ahead;
  constexpr bool kPacked = Where == WgradRows::packed || Where == WgradRows::packed_ahead;
  constexpr bool kListed = Where == WgradRows::listed || Where == WgradRows::listed_ahead;
  constexpr bool kAsksAhead = kFetchesAhead || Where == WgradRows::packed_ahead ||
                              Where == WgradRows::apart_ahead || Where == WgradRows::listed_ahead;
  constexpr bool kPacksX = Where == WgradRows::packing_x || Where == WgradRows::packing_both;
  constexpr bool kPacksDy = Where == WgradRows::packing_dy || Where == WgradRows::packing_both;
  constexpr bool kFetches = Where == WgradRows::fetched || kFetchesAhead || kPacksX;
  constexpr bool kFollow = kPacked || Where == WgradRows::near || kFetches || kPacksDy;
  constexpr int kAtOnce =
      kPacked || Where == WgradRows::near || Where == WgradRows::fetched ? V::kProductsAtOnce : 1;
  constexpr int kLinesAhead = kFollow ? 1 : wgrad_lines_ahead<V>(Vectors);
  const auto ask = [](const float* at) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int line = 0; line < kLinesAhead; ++line) __builtin_prefetch(at + line * kLine, 0, 2);
  };
  const auto add_pixel = [&](const float* x, const float* dy, const auto& offset) {
    add_row_of_products<V, (kAtOnce > 1)>(
        [&](int i) __attribute__((always_inline)) { return x + offset(i); }, dy, sum);
  };
  int64_t offsets[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) offsets[i] = kFollow ? i : t.offsets[i];
  const auto offset = [&](int i) { return kFollow ? i : offsets[i]; };
  if constexpr (kListed) {
    const int64_t* const x_pixels = t.x_pixels;
    for (int64_t j = 0; j < t.pixels; ++j) {
      if constexpr (kAsksAhead) ask(t.ahead + j * t.ahead_step);
      add_pixel(t.x + x_pixels[j], t.dy + j * t.dy_step, offset);
    }
  } else {
    for (const PixelRun* run = t.runs; run != t.runs + t.run_count; ++run) {
      const float* x = t.x + run->x;
      const float* dy = t.dy + run->pixel * t.dy_step;
      [[maybe_unused]] const float* ahead = nullptr;
      if constexpr (kAsksAhead) {
        ahead = t.ahead + (t.ahead_as_x ? run->x : run->pixel * t.ahead_step);
      }
      [[maybe_unused]] float *packed_x = nullptr, *packed_dy = nullptr;
      if constexpr (kPacksX) packed_x = t.packed_x + run->pixel * t.packed_step;
      if constexpr (kPacksDy) packed_dy = t.packed_dy + run->pixel * (Vectors * V::kWidth);
      const auto add = [&](int pixel) __attribute__((always_inline)) {
        const float* const from = x + pixel * t.x_step;
        if constexpr (kFetches) __builtin_prefetch(from + (Rows - 1) + run->ahead);
        if constexpr (kPacksX) copy_few<V, Rows>(from, packed_x);
        if constexpr (Where == WgradRows::apart_once || kPacksDy) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            __builtin_prefetch(dy + (pixel + kPixelsAhead) * t.dy_step + v * V::kWidth);
          }
        }
        if constexpr (kAsksAhead) {
          if (pixel == 0) ask(ahead);
        }
        const float* const row = dy + pixel * t.dy_step;
        if constexpr (kPacksDy) {
          typename V::Reg b[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            const float* const at = row + v * V::kWidth;
            b[v] = v == Vectors - 1 ? V::load(at, tail) : V::load(at);
            V::store(packed_dy + v * V::kWidth, b[v]);
          }
#pragma GCC unroll 16
          for (int i = 0; i < Rows; ++i) add_products<V, false>(from + i, b, sum[i]);
        } else {
          add_pixel(from, row, offset);
        }
      };
      unrolled<kAtOnce>(run->count, add, [&](int64_t count) {
        x += count * t.x_step;
        if constexpr (kAsksAhead) ahead += count * t.ahead_step;
        if constexpr (kPacksX) packed_x += count * t.packed_step;
        if constexpr (kPacksDy) packed_dy += count * (Vectors * V::kWidth);
        // GCC 12 vectorises scalar code here to load two pixels at once, of which the last one's
        // neighbour may be in no memory.
        dy = hidden(dy + count * t.dy_step);
      });
    }
  }
  store_tile<V>(sum, t.valid, [to = t.sum, row = t.sum_row](int i) { return to + i * row; });
}

using WgradTileFunction = void (*)(const WgradTile&);

// Of `Vectors` vectors, by rows - 1.
template <class V, WgradRows Where, int Vectors, std::size_t... I>
constexpr auto make_wgrad_tiles(std::index_sequence<I...>) {
  return std::array<WgradTileFunction, kMostGemmRows<V>>{wgrad_tile<V, I + 1, Vectors, Where>...};
}

// By vectors - 1 and rows - 1.
template <class V, WgradRows Where, std::size_t... I>
constexpr auto make_wgrad_tile_table(std::index_sequence<I...>) {
  return std::array{make_wgrad_tiles<V, Where, I + 1>(
      std::make_index_sequence<std::size_t{V::kGemmRows[I + 1]}>{})...};
}

template <class V, WgradRows Where>
const WgradTileFunction* wgrad_tiles(int vectors) {
  constexpr bool kAsks = Where != WgradRows::packed_ahead || kPackedTilesAsk<V>;
  static constexpr auto kTable = make_wgrad_tile_table<V, kAsks ? Where : WgradRows::packed>(
      std::make_index_sequence<std::size_t{kGemmVectors<V>}>{});
  return kTable[static_cast<std::size_t>(vectors - 1)].data();
}

// Of so many vectors, by where rows are and rows - 1.
template <class V>
class WgradTileFunctions {
 public:
  explicit WgradTileFunctions(int vectors)
      : WgradTileFunctions(vectors, std::make_index_sequence<kPlaces>{}) {}
  WgradTileFunction operator()(WgradRows where, int64_t rows) const {
    return of_[static_cast<std::size_t>(where)][rows - 1];
  }

 private:
  static constexpr std::size_t kPlaces = static_cast<std::size_t>(WgradRows::listed_ahead) + 1;

  template <std::size_t... I>
  WgradTileFunctions(int vectors, std::index_sequence<I...>)
      : of_{wgrad_tiles<V, static_cast<WgradRows>(I)>(vectors)...} {}

  std::array<const WgradTileFunction*, kPlaces> of_;
};

// The rows of the input that taps meet, or the columns, by residues of the stride ("phases"): within a phase
// the next output meets the next one. Every tap is of one phase, in turn.
struct PhasedAxis : TapResidues {
  int64_t size, pad;
  int64_t length;  // of a phase, at most

  PhasedAxis(int64_t size, int64_t stride, int64_t dilation, int64_t pad, int64_t taps)
      : TapResidues(taps, stride, dilation), size(size), pad(pad), length(ceil_div(size, stride)) {}

  int64_t phase_of(int64_t tap) const { return tap % period; }
  // The input's first row of a phase.
  int64_t residue(int64_t phase) const {
    const int64_t at = (of_tap(phase) - pad) % stride;
    return at < 0 ? at + stride : at;
  }
  int64_t rows_of(int64_t phase) const { return max64(0, ceil_div(size - residue(phase), stride)); }
  // Which of its phase's rows output 0 meets with a tap; it may lie before the first one.
  int64_t met_first(int64_t tap) const {
    return (tap * dilation - pad - residue(phase_of(tap))) / stride;
  }
};

// Panels that vectors of output channels are cut into. Wider ones have fewer rows a tile, which few channels
// may fill better: counted in the instructions of a pixel.
template <class V>
int64_t wgrad_panels(int64_t vectors, int64_t channels) {
  const int64_t usual = gemm_panels<V>(vectors), fewest = ceil_div(vectors, kGemmVectors<V>);
  const auto instructions = [&](int64_t panels) {
    const int64_t wide = ceil_div(vectors, panels);
    const int64_t tiles = ceil_div(channels, V::kGemmRows[wide]);
    return panels * (tiles * wide + channels * (wide + 1));
  };
  return 100 * instructions(fewest) < 93 * instructions(usual) ? fewest : usual;
}

// Of the products of taps and output pixels, how many meet no padding.
inline double share_inside(const Conv2dProblem& p) {
  const AxisTaps vertical{p.r, p.stride_h, -p.pad_top, p.dilation_h, 0, 1};
  const AxisTaps horizontal{p.s, p.stride_w, -p.pad_left, p.dilation_w, 0, 1};
  const int64_t down = vertical.pairs_met(p.oh, p.h), across = horizontal.pairs_met(p.ow, p.w);
  return static_cast<double>(down * across) / static_cast<double>(p.r * p.s * p.oh * p.ow);
}

// Whether tiles that span taps take less time although channels fill those of one tap: the latter list the
// pixels anew for every tap, in pieces where rows are short, and end it with a tile that may be partly empty.
// The former multiply the padding too, of a copy that they need, and what they read of many channels' pixels
// is more than the first-level cache has. The terms were fitted to 350 shapes with AVX2.
template <class V>
bool better_across_taps(const Conv2dProblem& p, int64_t panel_vectors, int64_t copied_pixels) {
  constexpr int64_t kMostChannels = 96, kMostFloatsApart = 192;
  const int64_t taps = p.r * p.s;
  // Of one vector, addresses of rows are more than there are registers for.
  if (V::kRegisters == 32 || taps == 1 || p.groups != 1 || panel_vectors == 1 ||
      p.c > kMostChannels || p.stride_w * p.c > kMostFloatsApart) {
    return false;
  }
  const double around_a_tap = 1.25 / static_cast<double>(p.c) + 0.5 / static_cast<double>(p.ow);
  const double copying =
      3.5 * static_cast<double>(copied_pixels) / static_cast<double>(p.oh * p.ow * taps * p.k);
  return share_inside(p) * (1 + around_a_tap) > 1.03 + copying;
}

// What tiles ask for ahead should fit in the second-level cache with what they have.
constexpr int64_t kBytesOfTwoBlocks = int64_t{1} << 20;

// The cut of one wgrad: input copies, partial sums, tasks and scratch memory.
template <class V>
struct WgradPlan {
  int64_t floats, pixels;
  int64_t panels, panel;  // output channels of a group, cut into like panels of so many
  int64_t rows;           // of a tile, at most
  bool by_taps;           // a tile's rows are channels of one tap
  int64_t source_h, source_w, image_floats, chunk;  // the copy, where there is one
  bool copied, packed;
  bool packs_blocks;        // packed by the tasks themselves, of a block what their tiles read
  PhasedAxis down, across;  // packed: [group][tile][phase][image][row][column][plan.rows]
  int64_t parts, q_tiles, q_groups;
  int64_t channel_groups;  // of tiles; each has its share of the q_groups, of all taps
  int64_t tiles_a_tap;     // or of all taps, if tiles span them
  LikeTiles cut;           // of its rows into tiles
  int64_t panel_groups;    // of panels that a task has one after the other
  bool asks_ahead;         // for the next block
  bool asks_for_dy;        // of the next block, where tiles span taps
  int64_t pixels_a_block;
  int64_t offsets_bytes, sums_bytes, bias_bytes, copy_bytes;
  int64_t block_bytes, packed_block_bytes, list_bytes;  // of a worker; there are two lists

  WgradPlan(const Conv2dProblem& p, bool with_bias)
      : down(p.h, p.stride_h, p.dilation_h, p.pad_top, p.r),
        across(p.w, p.stride_w, p.dilation_w, p.pad_left, p.s) {
    floats = p.filter_size();
    pixels = p.n * p.oh * p.ow;

    const int64_t vectors = ceil_div(p.k_per_group(), V::kWidth);
    panels = wgrad_panels<V>(vectors, p.c_per_group());
    const int64_t panel_vectors = ceil_div(vectors, panels);
    panel = panel_vectors * V::kWidth;
    rows = V::kGemmRows[panel_vectors];

    // The input rows and columns that the taps reach, with their padding.
    const int64_t reach_h = (p.oh - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    const int64_t reach_w = (p.ow - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1;
    const bool padded =
        p.pad_top || p.pad_left || reach_h - p.pad_top > p.h || reach_w - p.pad_left > p.w;
    by_taps = (padded && mostly_padding(p, reach_h, reach_w)) ||
              (p.c_per_group() >= rows &&
               !better_across_taps<V>(p, panel_vectors, padded ? reach_h * reach_w : 0));
    copied = !by_taps && padded;
    source_h = copied ? reach_h : p.h;
    source_w = copied ? reach_w : p.w;

    const int64_t cg = p.c_per_group(), taps = p.r * p.s;
    const int64_t rows_a_tap = by_taps ? cg : taps * cg;
    tiles_a_tap = ceil_div(rows_a_tap, rows);
    cut = {rows_a_tap, tiles_a_tap};
    q_tiles = by_taps ? taps * tiles_a_tap : tiles_a_tap;

    // Tiles that read a pixel, for packing it to pay: fewer where pixels lie apart by what falls into a set
    // or two of the first-level cache.
    const bool narrow = kGemmVectors<V> * V::kWidth < 64;  // panels, each of which reads all
    const auto in_few_sets = [&p](int64_t sets) { return p.c * sets % (64 * kLine) == 0; };
    const bool beyond = beyond_caches(p.x_size() + p.y_size());
    const int64_t tiles_a_packing = taps > 1         ? 4
                                    : !narrow        ? (p.c <= 128 ? 8
                                                        : beyond   ? 4
                                                                   : 2)
                                    : in_few_sets(1) ? 3
                                    : in_few_sets(2) ? 5
                                                     : 8;
    packed = by_taps && cg >= rows && taps * panels / tiles_a_packing >= down.count * across.count;
    packs_blocks = packed && taps == 1;
    // As many images at a time as fit in the second-level cache, or have pixels for whole blocks; all of
    // them where none is copied. Each block takes the sums from memory and back, which of several taps are
    // many: then blocks had better be whole even if the copy is large.
    image_floats =
        packed ? packed_pixels() * p.groups * tiles_a_tap * rows : source_h * source_w * p.c;
    const int64_t image_bytes = max64(image_floats * 4, 1);
    constexpr int64_t kChunkPixels = 768, kMostBytes = int64_t{8} << 20;
    const int64_t of_whole_blocks =
        min64(kMostBytes / image_bytes, ceil_div(kChunkPixels, p.oh * p.ow));
    const int64_t fitting = max64(int64_t{1} << 20, 512 * p.c * 4) / image_bytes;
    const int64_t images = packed && taps > 1 ? max64(fitting, of_whole_blocks) : fitting;
    chunk = copied || (packed && !packs_blocks) ? max64(1, min64(p.n, images)) : p.n;
    // Tasks share dy: each packs what it needs, which some tiles of work make up for. What they read of a
    // block stays in the second-level cache, of which processors without AVX-512 may have 512 KiB: that is
    // the channels of a tap or two, for taps of one phase meet the same pixels.
    const bool few_rows = V::kRegisters < 32 && packed && cg * across.count > 192;
    const int64_t rows_a_task = few_rows ? 192 : 432;
    q_groups = ceil_div(q_tiles, rows_a_task / rows);
    // Partial sums serve where tiles are too few for many threads, or where the input is read as it lies,
    // which tasks of the same pixels would each fetch from memory; and where pixels are enough to make up
    // for adding them up. 1 MiB of them at most.
    constexpr int64_t kTilesATask = 4, kPixelsAPart = 512, kMostParts = 16;
    const int64_t whole_tasks = max64(ceil_div(q_tiles, kTilesATask) * panels * p.groups, 1);
    // What a task asks for is a stretch of memory, of all panels. For less than this the questions cost more
    // than they bring.
    constexpr int64_t kNearFloats = int64_t{3} << 19;
    asks_for_dy = !by_taps && p.groups == 1 && p.y_size() > kNearFloats;
    const int64_t most = asks_for_dy ? kTasksForMany : kMostParts;
    // Where a task packs its own, parts keep two from fetching the same pixels from memory.
    constexpr int64_t kPartsFromMemory = 8;
    const int64_t useful = packs_blocks && beyond ? kPartsFromMemory
                           : !asks_for_dy && (packed || copied)
                               ? ceil_div(kTasksForMany, whole_tasks)
                               : most;
    parts = max64(1, min64(min64(useful, pixels / kPixelsAPart),
                           min64(most, (int64_t{1} << 20) / max64(floats * 4, 1))));

    // The panels of a task share a block of the input, its tiles one of dy. How many tasks there are
    // changes no sum.
    if (packs_blocks) {
      cut_by_packing(p);
    } else {
      const int64_t wanted_tasks = tasks_for(pixels * floats);
      panel_groups =
          asks_for_dy ? 1 : min64(panels, ceil_div(wanted_tasks, parts * p.groups * q_groups));
      q_groups =
          max64(q_groups, min64(q_tiles, ceil_div(wanted_tasks, parts * p.groups * panel_groups)));
      share_evenly(pixels * floats, parts * p.groups);
    }

    // A thread multiplies channels that it packed, for what another core packed may be far away. Not fewer than
    // some tiles, in which a processor learns where the runs of a tap's pixels end. Without AVX-512 there is
    // time to fetch them.
    constexpr int64_t kLeastTiles = 10;
    channel_groups = 1;
    if (V::kRegisters == 32 && packed && taps > 1) {
      channel_groups = max64(1, min64(num_threads(), tiles_a_tap / kLeastTiles));
      q_groups = round_up(q_groups, channel_groups);
    }

    const int64_t part_pixels = ceil_div(min64(chunk, p.n) * p.oh * p.ow, parts);
    const bool by_lines = by_taps && !packed && taps == 1;
    // Processors without AVX-512 have the next block in time where a cache holds it, but of few channels, which
    // soon need it, no more than this. Tiles of what is packed ask where a block is worth its name that fits in
    // the second-level cache with the next one.
    constexpr int64_t kManyChannels = 64, kInTimeFloats = int64_t{3} << 18;
    constexpr int64_t kLeastPixels = 192, kMostPixels = 256;
    const bool few_late = by_lines && V::kRegisters < 32 && cg < kManyChannels && !beyond &&
                          p.x_size() + p.y_size() > kInTimeFloats;
    const int64_t lines_a_pixel = ceil_div(cg, q_groups * kLine) + 1 +
                                  ceil_div(ceil_div(panels, panel_groups) * panel, kLine);
    const int64_t fitting_pixels = kBytesOfTwoBlocks / (2 * lines_a_pixel * kLine * 4);
    const bool packed_ask = kPackedTilesAsk<V> && packs_blocks && fitting_pixels >= kLeastPixels;
    asks_ahead = by_lines ? V::kRegisters == 32 || beyond || few_late : packed_ask && beyond;
    // Few tiles are through with a block soon: it should still be in the first-level cache. To begin and
    // end a tile takes as long as some ten pixels: where a block of many channels does not stay there
    // anyway, and is not asked for ahead, it has as many pixels as the second-level cache keeps.
    constexpr int64_t kBlockBytes = int64_t{448} << 10;
    const bool long_block = by_lines && !asks_ahead && cg >= kManyChannels;
    const int64_t most_pixels = long_block ? max64(128, min64(1024, kBlockBytes / (4 * cg)))
                                : packs_blocks && asks_ahead ? min64(kMostPixels, fitting_pixels)
                                : by_taps && packed          ? 384
                                : few_late                   ? 160
                                                             : 128;
    const int64_t blocks = max64(1, ceil_div(part_pixels, most_pixels));
    pixels_a_block = max64(1, ceil_div(part_pixels, blocks));

    offsets_bytes = by_taps ? 0 : round_up(taps * cg * 8, 64);
    sums_bytes = parts == 1 ? 0 : round_up(parts * floats * 4, 64);
    bias_bytes = with_bias ? round_up(parts * p.k * 4, 64) : 0;
    copy_bytes = packs_blocks ? 0
                 : packed     ? p.groups * tiles_a_tap * packed_tile_floats() * 4
                 : copied     ? round_up(chunk * image_floats * 4, 64)
                              : 0;
    packed_block_bytes = packs_blocks ? ceil_div(q_tiles, q_groups) * packed_tile_floats() * 4 : 0;
    block_bytes = round_up(pixels_a_block * panel * 4, 64);
    // A block may begin and end in the middle of a row.
    const int64_t runs = min64(pixels_a_block, pixels_a_block / p.ow + 2) + 1;
    list_bytes = round_up(runs * int64_t{sizeof(PixelRun)}, 64);
  }

  // The last of few tasks may leave threads idle. Then there are more groups of panels, for which nothing is
  // packed twice, or of tiles, each of which packs its dy.
  void share_evenly(int64_t multiply_adds, int64_t others) {
    constexpr int64_t kFewMultiplyAdds = int64_t{1} << 18;  // of a task
    const int64_t threads = num_threads(), most_panel_groups = asks_for_dy ? panel_groups : panels;
    for (int64_t of_tiles = q_groups; of_tiles <= min64(q_tiles, 2 * q_groups); ++of_tiles) {
      for (int64_t of_panels = panel_groups; of_panels <= most_panel_groups; ++of_panels) {
        const int64_t tasks = others * of_panels * of_tiles;
        if (tasks * kFewMultiplyAdds > multiply_adds) break;
        if (of_panels > panel_groups && panels % of_panels != 0) continue;
        if (10 * round_up(tasks, threads) > 11 * tasks) continue;
        panel_groups = of_panels;
        q_groups = of_tiles;
        return;
      }
    }
  }

  // Tasks that each pack their own: tiles of x for all their panels, and dy for all their tiles. Of the cuts
  // into enough tasks, or nearest to it, the one that has them pack least.
  void cut_by_packing(const Conv2dProblem& p) {
    const int64_t threads = num_threads(), wanted = threads == 1 ? 1 : 2 * threads;
    const int64_t least = q_groups, others = parts * p.groups;
    int64_t fewest_missing = std::numeric_limits<int64_t>::max(), fewest_floats = 0;
    for (int64_t of_panels = 1; of_panels <= panels; ++of_panels) {
      if (panels % of_panels != 0) continue;
      const int64_t tasks = round_up(max64(wanted, others * of_panels * least), threads);
      const int64_t of_tiles = min64(q_tiles, ceil_div(tasks, others * of_panels));
      const int64_t floats_a_pixel = of_tiles * p.k_per_group() + of_panels * p.c_per_group();
      const int64_t missing = max64(0, wanted - others * of_panels * of_tiles);
      if (missing > fewest_missing) continue;
      if (missing == fewest_missing && floats_a_pixel >= fewest_floats) continue;
      fewest_missing = missing;
      fewest_floats = floats_a_pixel;
      panel_groups = of_panels;
      q_groups = of_tiles;
    }
  }

  // Of an image, in all phases.
  int64_t packed_pixels() const { return down.count * across.count * phase_pixels(); }
  int64_t phase_pixels() const { return down.length * across.length; }
  // From the packed channels of one tile to the next: all of them are written to in turns.
  int64_t packed_tile_floats() const {
    return odd_lines((packs_blocks ? pixels_a_block : chunk * packed_pixels()) * rows + V::kWidth);
  }

  void make_blocks_of_windows(const Conv2dProblem& p) {
    offsets_bytes += round_up(p.oh * p.ow * 8, 64);
    pixels_a_block = round_up(pixels_a_block, 4);
    block_bytes = round_up(pixels_a_block * panel * 4, 64);
  }
  int64_t tasks(const Conv2dProblem& p) const { return parts * p.groups * panel_groups * q_groups; }
  int64_t worker_bytes() const { return block_bytes + packed_block_bytes + 2 * list_bytes; }
  int64_t workspace_bytes(int workers) const {
    return offsets_bytes + sums_bytes + bias_bytes + copy_bytes + workers * worker_bytes();
  }
};

// Of a tile's multiply-adds, those that count, where `channels` fill its vectors. One of a single vector
// waits for its loads.
template <class V>
double share_of_tile(int64_t channels) {
  const int64_t vectors = ceil_div(channels, V::kWidth);
  const double filled = static_cast<double>(channels) / static_cast<double>(vectors * V::kWidth);
  return vectors == 1 && kGemmVectors<V> > 1 ? 0.75 * filled : filled;
}

// A 1 x 1 layer's wgrad is the product of two like matrices, of which either may be the one whose
// channels fill vectors: where input channels do so better than output channels, dfilter is computed
// transposed.
template <class V>
bool better_turned(const Conv2dProblem& p) {
  constexpr int64_t kPixels = 128;  // that make up for the transposition
  return p.sees_each_pixel_once() && p.groups == 1 && p.n * p.h * p.w >= kPixels &&
         share_of_tile<V>(p.c) > 1.1 * share_of_tile<V>(p.k);
}

// To a 1 x 1 layer's wgrad all images are one row of pixels, of which blocks are whole: in an image of a few
// they are not.
inline Conv2dProblem of_one_row(Conv2dProblem p) {
  if (!p.sees_each_pixel_once() || p.n == 0) return p;
  p.w = p.ow = p.n * p.h * p.w;
  p.n = p.h = p.oh = 1;
  return p;
}

inline Conv2dProblem turned(Conv2dProblem p) {
  std::swap(p.c, p.k);
  return p;
}

// With stride 1 so is a larger filter's, where dy, with its padding, takes the input's place and the taps
// come in reverse: for filters so few that they leave vectors empty.
template <class V>
bool better_reversed(const Conv2dProblem& p) {
  constexpr int64_t kMostFilters = 4;
  const int64_t reach_h = (p.r - 1) * p.dilation_h, reach_w = (p.s - 1) * p.dilation_w;
  return p.k <= kMostFilters && p.groups == 1 && p.stride_h == 1 && p.stride_w == 1 &&
         max64(p.pad_top, p.pad_bottom) <= reach_h && max64(p.pad_left, p.pad_right) <= reach_w &&
         share_of_tile<V>(p.c) > 1.1 * share_of_tile<V>(p.k);
}

inline Conv2dProblem reversed(Conv2dProblem p) {
  const int64_t reach_h = (p.r - 1) * p.dilation_h, reach_w = (p.s - 1) * p.dilation_w;
  std::swap(p.c, p.k);
  std::swap(p.h, p.oh);
  std::swap(p.w, p.ow);
  p.pad_top = reach_h - p.pad_top;
  p.pad_bottom = reach_h - p.pad_bottom;
  p.pad_left = reach_w - p.pad_left;
  p.pad_right = reach_w - p.pad_right;
  return p;
}

// Floats from an input's first pixel to the one at the corner of an output pixel's window, which meets no
// padding.
inline int64_t corner_of_window(const Conv2dProblem& p, int64_t pixel) {
  const int64_t row = pixel / p.ow;
  return ((row / p.oh * p.h + row % p.oh * p.stride_h) * p.w + pixel % p.ow * p.stride_w) * p.c;
}

// Copies images of NHWC with the padding that their taps meet.
inline void copy_padded(const Conv2dProblem& p, const float* x, int64_t images, int64_t source_h,
                        int64_t source_w, float* copy) {
  parallel_by_floats(images * source_h, 2 * source_w * p.c, [&](int64_t task) {
    const int64_t n = task / source_h, i = task % source_h - p.pad_top;
    float* out = copy + task * source_w * p.c;
    const auto clear = [](float* at, int64_t floats) {
      std::memset(at, 0, static_cast<std::size_t>(floats) * 4);
    };
    if (i < 0 || i >= p.h) return clear(out, source_w * p.c);
    const int64_t left = min64(p.pad_left, source_w);
    const int64_t middle = max64(0, min64(p.w, source_w - left));
    clear(out, left * p.c);
    std::memcpy(out + left * p.c, x + (n * p.h + i) * p.w * p.c,
                static_cast<std::size_t>(middle * p.c) * 4);
    clear(out + (left + middle) * p.c, (source_w - left - middle) * p.c);
  });
}

// Lists pixels begin .. end - 1 of a phase, of all images, without those beyond the input's edge. Returns how
// many runs they are.
template <class V>
int64_t list_phase(const Conv2dProblem& p, const WgradPlan<V>& plan, int64_t row_phase,
                   int64_t column_phase, int64_t begin, int64_t end, PixelRun* runs) {
  const PhasedAxis &down = plan.down, &across = plan.across;
  const int64_t top = down.residue(row_phase), left = across.residue(column_phase);
  const int64_t columns = across.rows_of(column_phase), step = p.stride_w * p.c;
  PixelRun* runs_end = runs;
  for (int64_t pixel = begin, next = 0; pixel < end; pixel = next) {
    const int64_t line = pixel / across.length, column = pixel % across.length;
    next = min64(end, (line + 1) * across.length);
    const int64_t i = top + line % down.length * p.stride_h, j = left + column * p.stride_w;
    const int64_t met = min64(next - pixel, columns - column);
    if (i >= p.h || met <= 0) continue;
    const int64_t x = ((line / down.length * p.h + i) * p.w + j) * p.c;
    runs_end = add_run(x, pixel, met, step, runs, runs_end);
  }
  return runs_end - runs;
}

// `count` pixels of the input, `step` floats apart, to `apart` ones each. What a whole vector spills beyond a
// pixel, the next one covers, of `room` pixels that the caller may write to.
template <class V>
void pack_run(const float* from, int64_t step, int64_t count, int64_t channels, float* to,
              int64_t apart, int64_t room) {
  const int64_t last = (channels - 1) / V::kWidth * V::kWidth;
  const auto tail = V::tail(static_cast<int>(channels - last));
  int64_t spilling = max64(0, min64(count, room - ceil_div(last + V::kWidth, apart) + 1));
  int64_t within = count - spilling;
  if (last == 0) {
    unrolled<4>(
        spilling,
        [&](int pixel) __attribute__((always_inline)) {
          V::store(to + pixel * apart, V::load(from + pixel * step, tail));
        },
        [&](int64_t pixels) __attribute__((always_inline)) {
          from += pixels * step;
          to += pixels * apart;
        });
    spilling = 0;
  }
  const auto copy = [&](const auto&... mask) {
    for (int64_t at = 0; at < last; at += V::kWidth) V::store(to + at, V::load(from + at));
    V::store(to + last, V::load(from + last, tail), mask...);
    from += step;
    to += apart;
  };
  for (; spilling > 0; --spilling) copy();
  for (; within > 0; --within) copy(tail);
}

// The channels of images, those of a tile side by side, phase by phase.
template <class V>
void pack_x(const Conv2dProblem& p, const WgradPlan<V>& plan, const float* x, int64_t images,
            float* packed) {
  const int64_t cg = p.c_per_group(), tile_floats = plan.packed_tile_floats();
  constexpr int64_t kPixelsATask = 64;
  const int64_t pixels = images * plan.phase_pixels(), parts = ceil_div(pixels, kPixelsATask);
  const int64_t row_phases = plan.down.count, column_phases = plan.across.count;
  // Tasks share the channels where pixels are few, and where they are multiplied in groups.
  const int64_t enough = tasks_for(row_phases * column_phases * pixels * p.c);
  const bool by_channels = plan.channel_groups > 1 && plan.parts == 1;
  const int64_t cuts =
      min64(plan.tiles_a_tap, max64(by_channels ? plan.channel_groups : 1,
                                    ceil_div(enough, p.groups * row_phases * parts)));
  // One after the other, phases of the same rows find the lines that they share in the cache.
  parallel_for(p.groups * row_phases * parts * cuts, [&](int64_t task) {
    const int64_t stretches = row_phases * parts;
    const int64_t group = task / cuts / stretches, in_group = task % (cuts * stretches);
    const int64_t cut = by_channels ? in_group / stretches : in_group % cuts;
    const int64_t stretch = by_channels ? in_group % stretches : in_group / cuts;
    const int64_t row_phase = stretch / parts, begin = stretch % parts * kPixelsATask;
    const int64_t end = min64(pixels, begin + kPixelsATask);
    const Span tiles = part_of(plan.tiles_a_tap, cuts, cut);
    PixelRun runs[kPixelsATask];
    const int64_t step = p.stride_w * p.c;
    const float* const channels = x + group * cg + plan.cut.begin(tiles.begin);
    const int64_t floats = plan.cut.begin(tiles.end) - plan.cut.begin(tiles.begin);
    for (int64_t column_phase = 0; column_phase < column_phases; ++column_phase) {
      const int64_t run_count = list_phase(p, plan, row_phase, column_phase, begin, end, runs);
      // The tiles read each line in pieces, too far apart for a processor to ask for them ahead.
      for (const PixelRun* run = runs; run != runs + run_count; ++run) {
        for (int64_t i = 0; i < run->count; ++i) {
          for (int64_t at = 0; at < floats; at += kLine) {
            __builtin_prefetch(channels + run->x + i * step + at, 0, 2);
          }
        }
      }
      const int64_t phase = row_phase * column_phases + column_phase;
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        float* const to = packed + (group * plan.tiles_a_tap + tile) * tile_floats +
                          phase * plan.chunk * plan.phase_pixels() * plan.rows;
        const float* const from = x + group * cg + plan.cut.begin(tile);
        for (const PixelRun* run = runs; run != runs + run_count; ++run) {
          pack_run<V>(from + run->x, step, run->count, plan.cut.size(tile),
                      to + run->pixel * plan.rows, plan.rows, end - run->pixel);
        }
      }
    }
  });
}

// dy of `count` pixels, one panel of channels, spare lanes zero; what ReLU stopped is zero too. Their
// sum over the pixels is added to `sums`, if that is not null.
template <class V>
void pack_dy(const float* dy, const float* y, int64_t count, int64_t channels, int vectors,
             int valid, float* out, float* sums) {
  const auto tail = V::tail(valid);
  const auto pack = [&]<int Vectors, bool Relu, bool Sums>() {
    typename V::Reg sum[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[v] = V::zero();
    for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = j * channels + v * V::kWidth;
        const bool last = v == Vectors - 1;
        if (v * V::kWidth % kLine == 0) __builtin_prefetch(dy + at + kPixelsAhead * channels);
        typename V::Reg value = last ? V::load(dy + at, tail) : V::load(dy + at);
        if constexpr (Relu) {
          value = V::where_positive(last ? V::load(y + at, tail) : V::load(y + at), value);
        }
        V::store(out + (j * Vectors + v) * V::kWidth, value);
        if constexpr (Sums) sum[v] = V::add(sum[v], value);
      }
    }
    if constexpr (Sums) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* at = sums + v * V::kWidth;
        if (v == Vectors - 1) {
          V::store(at, V::add(V::load(at, tail), sum[v]), tail);
        } else {
          V::store(at, V::add(V::load(at), sum[v]));
        }
      }
    }
  };
  const auto pack_vectors = [&]<std::size_t... I>(std::index_sequence<I...>) {
    const auto pack_of = [&]<int Vectors>() {
      if (y) {
        sums ? pack.template operator()<Vectors, true, true>()
             : pack.template operator()<Vectors, true, false>();
      } else {
        sums ? pack.template operator()<Vectors, false, true>()
             : pack.template operator()<Vectors, false, false>();
      }
      return true;
    };
    (void)((vectors == I + 1 && pack_of.template operator()<I + 1>()) || ...);
  };
  pack_vectors(std::make_index_sequence<std::size_t{kGemmVectors<V>}>{});
}

// The same of dy behind a 2 x 2 max-pooling: `windows` of them, four pixels each, of which dy goes to
// the one that `argmax` names.
template <class V>
void pack_pooled_dy(const float* dy, const float* y, const std::uint8_t* argmax, int64_t windows,
                    int64_t channels, int vectors, int valid, float* out, float* sums) {
  const auto pack = [&](int v, const auto&... tail) {
    typename V::Reg sum = V::zero();
    for (int64_t j = 0; j < windows; ++j) {
      const int64_t at = j * channels + v * V::kWidth;
      typename V::Reg value = V::load(dy + at, tail...);
      if (y) value = V::where_positive(V::load(y + at, tail...), value);
      const typename V::Int chosen = V::load_index(argmax + at, tail...);
      sum = V::add(sum, value);
#pragma GCC unroll 4
      for (int tap = 0; tap < 4; ++tap) {
        V::store(out + ((4 * j + tap) * vectors + v) * V::kWidth,
                 V::select(V::int_equal(chosen, V::int_broadcast(tap)), value, V::zero()));
      }
    }
    if (!sums) return;
    float* const at = sums + v * V::kWidth;
    V::store(at, V::add(V::load(at, tail...), sum), tail...);
  };
  for (int v = 0; v < vectors; ++v) {
    if (v + 1 < vectors || valid == V::kWidth) {
      pack(v);
    } else {
      pack(v, V::tail(valid));
    }
  }
}

// Pixels as a tap meets them: output (i, j) of image n meets the one in row i * stride_h + row and column
// j * stride_w + column of that image, where there is one.
struct PixelsOfTap {
  int64_t first;  // the first image's first pixel
  int64_t image_pixels, row_pixels;
  int64_t h, w, stride_h, stride_w, row, column;
};

// Of what tiles read or pack: the input, a copy of it with its padding, or the phase that is packed.
template <class V>
PixelsOfTap pixels_of_tap(const Conv2dProblem& p, const WgradPlan<V>& plan, int64_t r, int64_t s) {
  if (!plan.packed || plan.packs_blocks) {
    return {.first = 0,
            .image_pixels = plan.source_h * plan.source_w,
            .row_pixels = plan.source_w,
            .h = plan.source_h,
            .w = plan.source_w,
            .stride_h = p.stride_h,
            .stride_w = p.stride_w,
            .row = r * p.dilation_h - (plan.copied ? 0 : p.pad_top),
            .column = s * p.dilation_w - (plan.copied ? 0 : p.pad_left)};
  }
  const int64_t i = plan.down.phase_of(r), j = plan.across.phase_of(s);
  return {.first = (i * plan.across.count + j) * plan.chunk * plan.phase_pixels(),
          .image_pixels = plan.phase_pixels(),
          .row_pixels = plan.across.length,
          .h = plan.down.rows_of(i),
          .w = plan.across.rows_of(j),
          .stride_h = 1,
          .stride_w = 1,
          .row = plan.down.met_first(r),
          .column = plan.across.met_first(s)};
}

// The pixels of a block that meet the source with a tap, those of x `x_pixel` floats apart. Returns how many
// runs there are.
inline int64_t list_runs(const Conv2dProblem& p, const PixelsOfTap& at, int64_t begin, int64_t end,
                         int64_t x_pixel, PixelRun* runs) {
  const Span columns = AxisTaps{1, at.stride_w, at.column, 1, 0, 1}.met_by(0, p.ow, at.w);
  const int64_t step = at.stride_w * x_pixel;
  PixelRun* runs_end = runs;
  int64_t row = begin / p.ow, j = begin % p.ow;
  for (int64_t pixel = begin; pixel < end; ++row, j = 0) {
    const int64_t stretch = min64(end - pixel, p.ow - j);
    const int64_t n = row / p.oh, source_i = row % p.oh * at.stride_h + at.row;
    const int64_t from = max64(j, columns.begin), to = min64(j + stretch, columns.end);
    if (source_i >= 0 && source_i < at.h && from < to) {
      const int64_t x = at.first + n * at.image_pixels + source_i * at.row_pixels +
                        from * at.stride_w + at.column;
      runs_end = add_run(x * x_pixel, pixel - begin + from - j, to - from, step, runs, runs_end);
    }
    pixel += stretch;
  }
  return runs_end - runs;
}

// Of runs of pixels `step` floats apart, what a tile of `fetched` rows asks for: the line of the pixel that
// comes `pixels` later. At the end of a single run that is the next line of its first pixels, where a later
// tile begins: a tile whose first lines nobody has asked for waits for them. Returns how many runs there
// are, which may be one more.
inline int64_t ask_ahead(int64_t count, int64_t step, int64_t pixels, PixelRun* runs) {
  for (int64_t i = 0; i < count; ++i) runs[i].ahead = pixels * step;
  if (count != 1 || runs[0].count < 2 * pixels) return count;
  const int64_t first = runs[0].count - pixels;
  runs[1] = {.x = runs[0].x + first * step,
             .pixel = runs[0].pixel + first,
             .count = pixels,
             .ahead = kLine - first * step};
  runs[0].count = first;
  return 2;
}

// Whether a line of the cache may begin among so many floats from x on, or those as far from it as a
// multiple of `spacing`, a power of two up to kLine.
inline bool meets_a_line(const float* x, int64_t floats, int64_t spacing) {
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(x) / sizeof(float);
  const auto last = first + static_cast<std::uintptr_t>(floats - 1);
  return ((last ^ (first - 1)) & -static_cast<std::uintptr_t>(spacing)) != 0;
}

// The lines of x and dy that a task's next block of pixels has, and which tile of this block asks for
// which: left to the tiles that read them first, memory would idle while the others compute. In a round of its
// loop a tile asks for a line of one pixel: Zen 4 forgets what it is asked for faster than that. The other pixels
// of the round are left to other tiles.
template <class V>
struct LinesAhead {
  const Conv2dProblem& p;
  const float *x, *dy, *y;  // of the first channel; dy is null where it is not of the pixels
  bool as_x;                // whether tiles read x where it lies
  int64_t pixels_a_round;   // of the loop of tiles that ask
  int64_t x_lines, dy_lines, lines;
  // Lines of every pixels_a_round-th pixel are spread evenly over tiles that ask: `whole` a tile and `rest` more
  // over all of them.
  int64_t tiles, whole = 0, rest = 0;
  int64_t next = 0, spread = 0;
  // Floats to the next block from x and dy; of x that is read as it lies, from this block.
  int64_t x_distance = 0, dy_distance = 0;

  LinesAhead(const Conv2dProblem& p, const WgradPlan<V>& plan, const Conv2dOperands& operands,
             int64_t group, Span panels, Span own_tiles)
      : p(p) {
    const int64_t cg = p.c_per_group(), kg = p.k_per_group();
    const int64_t c = cg * own_tiles.begin / plan.q_tiles,
                  c_end = cg * own_tiles.end / plan.q_tiles;
    const int64_t k = panels.begin * plan.panel, k_end = min64(kg, panels.end * plan.panel);
    x = operands.x + group * cg + c;
    dy = operands.argmax_of_y ? nullptr : operands.dy + group * kg + k;
    y = dy && operands.y ? operands.y + group * kg + k : nullptr;
    // Of a copy, tiles do not know where the input's pixels lie, but in one row.
    as_x = !plan.packed;
    pixels_a_round = as_x ? 1 : V::kProductsAtOnce;
    x_lines = as_x || p.sees_each_pixel_once() ? ceil_div(c_end - c, kLine) : 0;
    dy_lines = dy ? ceil_div(k_end - k, kLine) : 0;
    lines = x_lines + dy_lines * (y ? 2 : 1);
    if (2 * lines * kLine * 4 * plan.pixels_a_block > kBytesOfTwoBlocks) lines = x_lines = 0;
    // Those that pack are the first panel's.
    tiles = own_tiles.size() * (panels.size() - (plan.packed ? 1 : 0));
    if (tiles == 0) return;
    whole = lines * pixels_a_round / tiles;
    rest = lines * pixels_a_round % tiles;
  }

  // Of the block from `begin`, where the next one is from `next_begin`. Rows of a stride may be missed.
  void go_to(int64_t begin, int64_t next_begin) {
    x_distance = corner_of_window(p, next_begin) - (as_x ? corner_of_window(p, begin) : 0);
    dy_distance = next_begin * p.k;
    next = spread = 0;
  }

  // A tile asks for one line at most, of a pixel a round. Returns whether it does.
  bool next_tile(WgradTile& t) {
    spread += rest;
    const bool one_more = spread >= tiles;
    if (one_more) spread -= tiles;
    const int64_t some = whole + (one_more ? 1 : 0);
    if (some == 0) return false;
    const int64_t line = next / pixels_a_round, pixel = next % pixels_a_round;
    next += some;
    t.ahead_as_x = as_x && line < x_lines;
    if (line < x_lines) {
      t.ahead_step = p.stride_w * p.c;
      t.ahead = x + line * kLine + x_distance;
    } else {
      const int64_t of_dy = line - x_lines;
      t.ahead_step = p.k;
      t.ahead =
          (of_dy < dy_lines ? dy + of_dy * kLine : y + (of_dy - dy_lines) * kLine) + dy_distance;
    }
    t.ahead += pixel * t.ahead_step;
    return true;
  }
};

// to[i] = the sum of from[part][i] over the parts, in order.
template <class V>
void add_parts(const float* from, int64_t parts, int64_t count, float* to) {
  constexpr int64_t kFloatsATask = 4096;
  parallel_for(ceil_div(count, kFloatsATask), [&](int64_t task) {
    const int64_t end = min64(count, (task + 1) * kFloatsATask);
    for (int64_t i = task * kFloatsATask; i < end; i += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, end - i)));
      typename V::Reg sum = V::load(from + i, tail);
      for (int64_t part = 1; part < parts; ++part) {
        sum = V::add(sum, V::load(from + part * count + i, tail));
      }
      V::store(to + i, sum, tail);
    }
  });
}

// `Vectors` neighbouring vectors of channels through a block of pixels, every line read once.
template <class V, int Vectors, bool Relu>
void activation_grad_block(int64_t pixels, int64_t channels, int valid, const float* dy,
                           const float* y, float* dz, float* sums) {
  const auto tail = V::tail(valid);
  typename V::Reg sum[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) sum[v] = V::zero();
  for (int64_t at = 0; at < pixels * channels; at += channels) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const bool last = v == Vectors - 1;
      const int64_t here = at + v * V::kWidth;
      typename V::Reg value = last ? V::load(dy + here, tail) : V::load(dy + here);
      if constexpr (Relu) {
        value = V::where_positive(last ? V::load(y + here, tail) : V::load(y + here), value);
        if (last) {
          V::store(dz + here, value, tail);
        } else {
          V::store(dz + here, value);
        }
      }
      sum[v] = V::add(sum[v], value);
    }
  }
  if (!sums) return;
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    if (v == Vectors - 1) {
      V::store(sums + v * V::kWidth, sum[v], tail);
    } else {
      V::store(sums + v * V::kWidth, sum[v]);
    }
  }
}

template <class V, bool Relu>
auto activation_grad_function(int64_t vectors) {
  return vectors == 1   ? activation_grad_block<V, 1, Relu>
         : vectors == 2 ? activation_grad_block<V, 2, Relu>
         : vectors == 3 ? activation_grad_block<V, 3, Relu>
                        : activation_grad_block<V, 4, Relu>;
}

// dz = dy where y > 0; dbias = the sum of dz over pixels, by blocks of a fixed size in order.
template <class V>
void activation_grad(int64_t pixels, int64_t channels, const float* dy, const float* y, float* dz,
                     float* dbias) {
  // Blocks grow with the problem so that their sums stay few.
  const int64_t pixels_a_block = max64(64, ceil_div(pixels, 64));
  const int64_t blocks = ceil_div(pixels, pixels_a_block);
  const Workspace workspace(static_cast<std::size_t>(dbias ? blocks * channels * 4 : 0));
  float* sums = dbias ? workspace.floats() : nullptr;
  parallel_for(blocks, [&](int64_t block) {
    const int64_t begin = block * pixels_a_block, end = min64(pixels, begin + pixels_a_block);
    constexpr int64_t kChannels = 4 * V::kWidth;
    for (int64_t c = 0; c < channels; c += kChannels) {
      const int64_t width = min64(kChannels, channels - c);
      const int64_t vectors = ceil_div(width, V::kWidth);
      const auto block_of = y ? activation_grad_function<V, true>(vectors)
                              : activation_grad_function<V, false>(vectors);
      const int64_t at = begin * channels + c;
      block_of(end - begin, channels, static_cast<int>(width - (vectors - 1) * V::kWidth), dy + at,
               y ? y + at : nullptr, y ? dz + at : nullptr,
               sums ? sums + block * channels + c : nullptr);
    }
  });
  if (!dbias) return;
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[block * channels + c];
    dbias[c] = sum;
  }
}

template <class V>
void implicit_gemm_wgrad(const Conv2dProblem& p, const Conv2dOperands& operands);

// By the problem reversed, of dy that is masked and summed beforehand. Returns whether the gradient is
// finite. If it is not, that may be of an infinite input times the zeros around dy, which it does not meet.
template <class V>
bool reversed_wgrad(const Conv2dProblem& p, const Conv2dOperands& operands) {
  const int64_t taps = p.r * p.s;
  const Workspace workspace(
      static_cast<std::size_t>(p.filter_size() + (operands.y ? p.y_size() : 0)) * 4);
  float* const found = workspace.floats();
  const float* dy = operands.dy;
  if (operands.y || operands.dbias) {
    float* const dz = operands.y ? found + p.filter_size() : nullptr;
    activation_grad<V>(p.n * p.oh * p.ow, p.k, dy, operands.y, dz, operands.dbias);
    if (dz) dy = dz;
  }
  implicit_gemm_wgrad<V>(reversed(p), {.x = dy, .dy = operands.x, .out = found});
  if (!std::all_of(found, found + p.filter_size(), [](float w) { return std::isfinite(w); })) {
    return false;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float* const from = found + (taps - 1 - tap) * p.k * p.c;
    float* const to = operands.out + tap * p.c * p.k;
    for (int64_t c = 0; c < p.c; ++c)
      for (int64_t k = 0; k < p.k; ++k) to[c * p.k + k] = from[k * p.c + c];
  }
  return true;
}

// The gradient of a plan. A task goes through the pixels of its part in blocks: of each, all tiles of its
// panels and rows add to their sums.
template <class V>
class ImplicitGemmWgrad {
 public:
  ImplicitGemmWgrad(const Conv2dProblem& p, const Conv2dOperands& operands)
      : p_(p), operands_(operands), unit_(operands.argmax_of_y ? 4 : 1),
        plan_(plan_of(p, operands)), workers_(workers_for(plan_.tasks(p))),
        workspace_(static_cast<std::size_t>(plan_.workspace_bytes(workers_))) {
    char* at = reinterpret_cast<char*>(workspace_.floats());
    const auto take = [&at](int64_t bytes) {
      char* here = at;
      at += bytes;
      return here;
    };
    offsets_ = reinterpret_cast<int64_t*>(take(plan_.offsets_bytes));
    sums_ = reinterpret_cast<float*>(take(plan_.sums_bytes));
    if (plan_.parts == 1) sums_ = operands.out;
    bias_sums_ = reinterpret_cast<float*>(take(plan_.bias_bytes));
    copy_ = reinterpret_cast<float*>(take(plan_.copy_bytes));
    scratch_ = take(workers_ * plan_.worker_bytes());
    if (!plan_.by_taps) list_offsets();
  }

  void run() {
    if (operands_.dbias) std::memset(bias_sums_, 0, static_cast<std::size_t>(plan_.bias_bytes));
    for (int64_t image = 0; image < p_.n; image += plan_.chunk) add_images(image);
    if (plan_.parts > 1) add_parts<V>(sums_, plan_.parts, plan_.floats, operands_.out);
    if (operands_.dbias) add_parts<V>(bias_sums_, plan_.parts, p_.k, operands_.dbias);
  }

 private:
  // The images that are copied at a time.
  struct Chunk {
    const float* source;  // the input, or the copy of it
    int64_t first_pixel, pixels;
  };

  struct Task {
    int64_t group, part, q_group;
    Span panels;
    Span of_tap, tiles;           // a group of a tap's tiles; and of these, of all taps, the task's
    float *packed_dy, *packed_x;  // of a block
    PixelRun *runs, *packed_runs;
    int64_t run_count, packed_run_count;
    LinesAhead<V> ahead;
  };

  // Pixels begin .. end - 1 of a chunk.
  struct Block {
    int64_t begin, end;
    int64_t image, in_image;  // of the chunk; the first pixel in it
    int64_t next_pixels;      // of the block behind it, at most
    bool first;               // of all that a task adds
  };

  static WgradPlan<V> plan_of(const Conv2dProblem& p, const Conv2dOperands& operands) {
    WgradPlan<V> plan(p, operands.dbias != nullptr);
    if (operands.argmax_of_y) plan.make_blocks_of_windows(p);
    return plan;
  }

  void list_offsets() {
    int64_t* to = offsets_;
    for (int64_t r = 0; r < p_.r; ++r)
      for (int64_t s = 0; s < p_.s; ++s)
        for (int64_t c = 0; c < p_.c_per_group(); ++c) {
          *to++ = (r * p_.dilation_h * plan_.source_w + s * p_.dilation_w) * p_.c + c;
        }
    if (!operands_.argmax_of_y) return;
    // Window by window: where the pixels of an image are.
    window_pixels_ = to;
    for (int64_t i = 0; i < p_.oh; ++i)
      for (int64_t j = 0; j < p_.ow; ++j) {
        to[(i / 2 * (p_.ow / 2) + j / 2) * 4 + i % 2 * 2 + j % 2] =
            (i * p_.stride_h * plan_.source_w + j * p_.stride_w) * p_.c;
      }
  }

  void add_images(int64_t image) {
    const int64_t images = min64(plan_.chunk, p_.n - image), image_pixels = p_.oh * p_.ow;
    const float* const x = operands_.x + image * p_.h * p_.w * p_.c;
    if (plan_.copied) copy_padded(p_, x, images, plan_.source_h, plan_.source_w, copy_);
    if (plan_.packed && !plan_.packs_blocks) pack_x<V>(p_, plan_, x, images, copy_);
    const Chunk chunk{plan_.copied ? copy_ : x, image * image_pixels, images * image_pixels};
    parallel_for(plan_.tasks(p_), workers_,
                 [&](int64_t task, int worker) { add_task(chunk, task, worker); });
  }

  void add_task(const Chunk& chunk, int64_t number, int worker) {
    // Tasks of a group of channels follow one another: one thread mostly has them.
    const int64_t tile_groups = plan_.q_groups / plan_.channel_groups;
    const int64_t tile_group = number % tile_groups;
    const int64_t panel_group = number / tile_groups % plan_.panel_groups;
    const int64_t channel_group = number / tile_groups / plan_.panel_groups % plan_.channel_groups;
    const int64_t others = number / plan_.q_groups / plan_.panel_groups;
    const int64_t group = others % p_.groups, part = others / p_.groups;
    const Span panels = part_of(plan_.panels, plan_.panel_groups, panel_group);
    const Span of_tap = part_of(plan_.tiles_a_tap, plan_.channel_groups, channel_group);
    const int64_t loops = plan_.q_tiles / plan_.tiles_a_tap;  // of taps, where tiles are of one
    const Span tiles = part_of(loops * of_tap.size(), tile_groups, tile_group);
    char* const scratch = scratch_ + worker * plan_.worker_bytes();
    char* const lists = scratch + plan_.block_bytes + plan_.packed_block_bytes;
    Task task{.group = group,
              .part = part,
              .q_group = channel_group * tile_groups + tile_group,
              .panels = panels,
              .of_tap = of_tap,
              .tiles = tiles,
              .packed_dy = reinterpret_cast<float*>(scratch),
              .packed_x = reinterpret_cast<float*>(scratch + plan_.block_bytes),
              .runs = reinterpret_cast<PixelRun*>(lists),
              .packed_runs = reinterpret_cast<PixelRun*>(lists + plan_.list_bytes),
              .run_count = 0,
              .packed_run_count = 0,
              .ahead = LinesAhead<V>(p_, plan_, operands_, group, panels, tiles)};
    const Span units = part_of(chunk.pixels / unit_, plan_.parts, part);
    const int64_t part_begin = units.begin * unit_, part_end = units.end * unit_;
    // A chunk may have fewer pixels than there are parts. In the first one the sums are zeroed all the same.
    if (part_begin == part_end && chunk.first_pixel > 0) return;
    const int64_t image_pixels = p_.oh * p_.ow;
    Block block{};
    block.end = part_begin;
    do {
      block.begin = block.end;
      block.end = min64(block.begin + plan_.pixels_a_block, part_end);
      block.image = block.begin / image_pixels;
      block.in_image = block.begin % image_pixels;
      block.first = chunk.first_pixel == 0 && block.begin == part_begin;
      if (operands_.argmax_of_y) block.end = min64(block.end, (block.image + 1) * image_pixels);
      block.next_pixels = min64(plan_.pixels_a_block, part_end - block.end);
      if (plan_.asks_ahead) {
        task.ahead.go_to(block.begin, block.end < part_end ? block.end : block.begin);
      }
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        add_panel(chunk, task, block, panel);
      }
    } while (block.end < part_end);
  }

  void add_panel(const Chunk& chunk, Task& task, const Block& block, int64_t panel) {
    const int64_t kg = p_.k_per_group();
    const int64_t column = task.group * kg + panel * plan_.panel;
    const int64_t width = min64(kg - panel * plan_.panel, plan_.panel);
    const int vectors = static_cast<int>(ceil_div(width, V::kWidth));
    WgradTile t{};
    t.runs = task.runs;
    t.x_step = x_step_;
    t.sum_row = p_.k;
    t.valid = static_cast<int>(width - (vectors - 1) * V::kWidth);
    t.first = block.first;
    const bool in_place = place_dy(chunk, task, block, column, vectors, t);
    if (plan_.packs_blocks) {
      add_packing(chunk, task, block, column, vectors, panel == task.panels.begin, t);
    } else if (plan_.by_taps) {
      add_taps(chunk, task, block, column, vectors, t);
    } else {
      add_across_taps(chunk, task, block, panel, column, vectors, in_place, t);
    }
  }

  // Sets where the tiles read dy: where it lies, or a packed copy, which a first tile may make. Returns
  // whether it is the former.
  bool place_dy(const Chunk& chunk, const Task& task, const Block& block, int64_t column,
                int vectors, WgradTile& t) const {
    const int64_t from = (chunk.first_pixel + block.begin) / unit_ * p_.k + column;
    const float* const dy = operands_.dy + from;
    const float* const y = operands_.y ? operands_.y + from : nullptr;
    float* const own_bias =
        operands_.dbias && task.q_group == 0 ? bias_sums_ + task.part * p_.k + column : nullptr;
    // A copy for a few tiles would cost more than it saves. Pixels that lie a multiple of 8 lines
    // apart fall into few sets of the first-level cache, and are worth one sooner; so are those whose
    // vectors lie in two lines, where a tile takes few products of each.
    constexpr bool kFewProducts = V::kRegisters < 32;
    const bool split =
        kFewProducts && reinterpret_cast<std::uintptr_t>(dy) % sizeof(typename V::Reg) != 0;
    const int64_t few_tiles = p_.k % (8 * 16) == 0 || split ? 3 : kFewProducts ? 24 : 16;
    const bool as_it_is = !y && !own_bias && !operands_.argmax_of_y;
    const bool tile_packs = as_it_is && plan_.packs_blocks;
    // Lanes beyond the last channel read what follows, which nobody stores: behind the last pixel, another's.
    const int64_t pixels = block.end - block.begin;
    const bool spills = from + (pixels - 1) * p_.k + int64_t{vectors} * V::kWidth > p_.y_size();
    const bool in_place = tile_packs || (as_it_is && task.tiles.size() <= few_tiles && !spills);
    t.packed_dy = tile_packs ? task.packed_dy : nullptr;
    t.dy_step = in_place ? p_.k : int64_t{vectors} * V::kWidth;
    t.dy = in_place ? dy : task.packed_dy;
    if (operands_.argmax_of_y) {
      pack_pooled_dy<V>(dy, y, operands_.argmax_of_y + from, pixels / 4, p_.k, vectors, t.valid,
                        task.packed_dy, own_bias);
    } else if (!in_place) {
      pack_dy<V>(dy, y, pixels, p_.k, vectors, t.valid, task.packed_dy, own_bias);
    }
    return in_place;
  }

  // What the `pass`th tile of a block asks for: its share of the next block's dy, and of y. Left to the tile
  // that reads them first, memory would idle while the others compute. Returns whether there is any.
  bool ask_for_dy(const Chunk& chunk, const Task& task, const Block& block, int64_t pass,
                  int vectors, WgradTile& t) const {
    if (!plan_.asks_for_dy || block.next_pixels == 0) return false;
    const int64_t passes = plan_.panels * task.tiles.size();
    const int64_t of_y = operands_.y ? passes / 2 : 0, of_dy = passes - of_y;
    const bool asks_for_y = pass >= of_dy;
    const int64_t share =
        ceil_div(block.next_pixels / unit_ * p_.k, asks_for_y ? of_y : of_dy);  // in floats
    t.ahead = (asks_for_y ? operands_.y : operands_.dy) +
              (chunk.first_pixel + block.end) / unit_ * p_.k +
              (asks_for_y ? pass - of_dy : pass) * share;
    t.ahead_step = min64(ceil_div(share, t.pixels), wgrad_lines_ahead<V>(vectors) * kLine);
    return true;
  }

  float* sum_of(const Task& task, int64_t row, int64_t column) const {
    return sums_ + task.part * plan_.floats + row * p_.k + column;
  }

  // Tiles of the only tap. Those of the first panel pack what they read of x, the first one dy if nobody
  // has.
  void add_packing(const Chunk& chunk, Task& task, const Block& block, int64_t column, int vectors,
                   bool first_panel, WgradTile& t) const {
    const int64_t x_step = p_.stride_w * p_.c;
    if (first_panel) list_block(task, block, x_step);
    t.runs = first_panel ? task.runs : task.packed_runs;
    t.run_count = first_panel ? task.run_count : task.packed_run_count;
    t.x_step = first_panel ? x_step : plan_.rows;
    t.packed_step = plan_.rows;
    const float* const x = chunk.source + task.group * p_.c_per_group();
    const WgradTileFunctions<V> tile_of(vectors);
    t.next_sum = sum_of(task, plan_.cut.begin(task.tiles.begin), column);
    for (int64_t tile = task.tiles.begin; tile < task.tiles.end; ++tile) {
      const int64_t rows = plan_.cut.size(tile);
      t.sum = t.next_sum;
      if (tile + 1 < task.tiles.end) t.next_sum += rows * p_.k;
      t.packed_x = task.packed_x + (tile - task.tiles.begin) * packed_tile_;
      t.x = first_panel ? x + plan_.cut.begin(tile) : t.packed_x;
      WgradRows where = WgradRows::packed;
      if (t.packed_dy) {
        where = first_panel ? WgradRows::packing_both : WgradRows::packing_dy;
      } else if (first_panel) {
        where = WgradRows::packing_x;
      } else if (plan_.asks_ahead && task.ahead.next_tile(t)) {
        where = WgradRows::packed_ahead;
      }
      tile_of(where, rows)(t);
      if (!t.packed_dy) continue;
      t.dy = std::exchange(t.packed_dy, nullptr);
      t.dy_step = int64_t{vectors} * V::kWidth;
    }
  }

  // The pixels of a block as they lie in x, and as they will be packed.
  void list_block(Task& task, const Block& block, int64_t x_step) const {
    const int64_t count =
        list_runs(p_, pixels_of_tap(p_, plan_, 0, 0), block.begin, block.end, p_.c, task.runs);
    task.run_count = ask_ahead(count, x_step, pixels_ahead_, task.runs);
    PixelRun* end = task.packed_runs;
    for (const PixelRun* run = task.runs; run != task.runs + task.run_count; ++run) {
      end = add_run(run->pixel * plan_.rows, run->pixel, run->count, plan_.rows, task.packed_runs,
                    end);
    }
    task.packed_run_count = end - task.packed_runs;
  }

  // Tiles whose rows are channels of one tap.
  void add_taps(const Chunk& chunk, Task& task, const Block& block, int64_t column, int vectors,
                WgradTile& t) const {
    const int64_t cg = p_.c_per_group();
    const WgradTileFunctions<V> tile_of(vectors);
    const Span of_tap = task.of_tap;
    const auto sum_of_tile = [&](int64_t tap, int64_t tile) {
      return sum_of(task, tap * cg + plan_.cut.begin(tile), column);
    };
    int64_t tap = task.tiles.begin / of_tap.size();
    int64_t tile = of_tap.begin + task.tiles.begin % of_tap.size();
    t.next_sum = sum_of_tile(tap, tile);
    for (int64_t left = task.tiles.size(); left > 0; ++tap, tile = of_tap.begin) {
      const int64_t tile_end = min64(of_tap.end, tile + left);
      left -= tile_end - tile;
      t.run_count = list_runs(p_, pixels_of_tap(p_, plan_, tap / p_.s, tap % p_.s), block.begin,
                              block.end, plan_.packed ? plan_.rows : p_.c, task.runs);
      if (!plan_.packed) t.run_count = ask_ahead(t.run_count, x_step_, pixels_ahead_, task.runs);
      t.x = plan_.packed ? copy_ + (task.group * plan_.tiles_a_tap + tile) * packed_tile_
                         : chunk.source + task.group * cg + plan_.cut.begin(tile);
      for (bool first = true; tile < tile_end; ++tile, first = false) {
        const int64_t rows = plan_.cut.size(tile);
        t.sum = t.next_sum;
        if (tile + 1 < tile_end) {
          t.next_sum += rows * p_.k;
        } else if (left > 0) {
          t.next_sum = sum_of_tile(tap + 1, of_tap.begin);
        }
        WgradRows where = WgradRows::packed;
        if (!plan_.packed) {
          const bool near = !first && lines_stay_ && !meets_a_line(t.x, rows, line_spacing_);
          where = plan_.asks_ahead && task.ahead.next_tile(t) ? WgradRows::fetched_ahead
                  : near                                      ? WgradRows::near
                                                              : WgradRows::fetched;
        }
        tile_of(where, rows)(t);
        t.x += plan_.packed ? packed_tile_ : rows;
      }
    }
  }

  // Tiles whose rows are of several taps.
  void add_across_taps(const Chunk& chunk, const Task& task, const Block& block, int64_t panel,
                       int64_t column, int vectors, bool in_place, WgradTile& t) const {
    const int64_t passed = (panel - task.panels.begin) * task.tiles.size() - task.tiles.begin;
    t.x = chunk.source + block.image * plan_.image_floats + task.group * p_.c_per_group();
    t.pixels = block.end - block.begin;
    if (window_pixels_) {
      t.x_pixels = window_pixels_ + block.in_image;
    } else {
      t.run_count = list_runs(p_, pixels_of_tap(p_, plan_, 0, 0), block.in_image,
                              block.in_image + t.pixels, p_.c, task.runs);
    }
    const WgradTileFunctions<V> tile_of(vectors);
    t.next_sum = sum_of(task, plan_.cut.begin(task.tiles.begin), column);
    for (int64_t tile = task.tiles.begin; tile < task.tiles.end; ++tile) {
      const int64_t rows = plan_.cut.size(tile);
      t.offsets = offsets_ + plan_.cut.begin(tile);
      t.sum = t.next_sum;
      if (tile + 1 < task.tiles.end) t.next_sum += rows * p_.k;
      const bool asks = ask_for_dy(chunk, task, block, passed + tile, vectors, t);
      const bool once = in_place && tile == task.tiles.begin;
      tile_of(window_pixels_ ? (asks ? WgradRows::listed_ahead : WgradRows::listed)
              : asks         ? WgradRows::apart_ahead
              : once         ? WgradRows::apart_once
                             : WgradRows::apart,
              rows)(t);
    }
  }

  const Conv2dProblem& p_;
  const Conv2dOperands& operands_;
  const int64_t unit_;  // behind a pooling, pixels are counted window by window; windows have four
  const WgradPlan<V> plan_;
  const int workers_;
  const Workspace workspace_;
  const int64_t packed_tile_ = plan_.packed ? plan_.packed_tile_floats() : 0;
  const int64_t x_step_ =
      plan_.packed ? plan_.rows : p_.stride_w * p_.c;  // floats, to the next pixel
  const int64_t pixels_ahead_ = wgrad_pixels_ahead<V>(p_.stride_w * p_.c);
  const int64_t line_spacing_ = std::gcd(x_step_, kLine);
  const bool lines_stay_ = !crowds_cache(plan_.pixels_a_block, x_step_);
  int64_t* offsets_;
  int64_t* window_pixels_ = nullptr;
  float *sums_, *bias_sums_, *copy_;
  char* scratch_;
};

template <class V>
void implicit_gemm_wgrad(const Conv2dProblem& p, const Conv2dOperands& operands) {
  if (p.n * p.oh * p.ow == 0) {
    std::memset(operands.out, 0, static_cast<std::size_t>(p.filter_size()) * 4);
    if (operands.dbias) std::memset(operands.dbias, 0, static_cast<std::size_t>(p.k) * 4);
    return;
  }
  const bool pooled = operands.argmax_of_y != nullptr;
  if (better_turned<V>(p) && !operands.y && !operands.dbias && !pooled) {
    const Workspace transposed(static_cast<std::size_t>(p.filter_size()) * 4);
    implicit_gemm_wgrad<V>(turned(p),
                           {.x = operands.dy, .dy = operands.x, .out = transposed.floats()});
    transpose<V>(1, p.k, p.c, transposed.floats(), operands.out);
    return;
  }
  if (better_reversed<V>(p) && !pooled && reversed_wgrad<V>(p, operands)) return;
  const Conv2dProblem by_rows = pooled ? p : of_one_row(p);
  ImplicitGemmWgrad<V>(by_rows, operands).run();
}

}  // namespace
}  // namespace fastconv::cpu
