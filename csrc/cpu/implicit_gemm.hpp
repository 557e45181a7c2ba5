// Convolution fprop and dgrad as an implicit GEMM: no im2col buffer. Both are "tap convolutions":
// every output pixel sums, over a list of taps, a run of source floats times packed filter rows.
//
// The register tile is V::kGemmRows[v] output pixels x v vectors of output channels, as many vectors
// as there are channels for: the more there are, the fewer loads a multiply-add takes. The A operand is
// indirect, a pointer a pixel, so that stride and dilation cost the inner loop nothing.
// (M. Dukhan, "The Indirect Convolution Algorithm", 2019; the packed panels are those of Goto and
// van de Geijn, 2008.) Padding costs nothing at all: output pixels are taken region by region, and
// all pixels of a region meet the source with the same taps.
//
// dgrad with stride (a, b) is a*b independent tap convolutions of stride 1, one a residue class of
// input pixels: no zeros are stuffed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {
namespace {  // one copy an ISA: an inline function shared between them could run on the wrong CPU

using std::int64_t;

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t kLine = 16;  // floats of a cache line
// So many floats at least, in an odd number of cache lines: what lies multiples of it apart is spread over
// the sets of a cache.
constexpr int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLine) | 1) * kLine; }

// Items begin .. end - 1 of whatever.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Of `count` items, cut into `parts` of like sizes.
constexpr Span part_of(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Items cut into tiles of like sizes, the larger ones first: a register tile's function is called for
// many alike in a row.
struct LikeTiles {
  int64_t count, least, larger;  // the first `larger` tiles have one item more than `least`

  LikeTiles() = default;
  LikeTiles(int64_t items, int64_t tiles)
      : count(tiles), least(items / tiles), larger(items % tiles) {}
  int64_t begin(int64_t tile) const { return tile * least + min64(tile, larger); }
  int64_t size(int64_t tile) const { return least + (tile < larger ? 1 : 0); }
  // From this tile on, how many are as large as it.
  int64_t alike(int64_t tile) const { return (tile < larger ? larger : count) - tile; }
};

// Whether tensors of so many floats are more than the caches keep.
constexpr bool beyond_caches(int64_t floats) { return floats * 4 > int64_t{12} << 20; }

// Pixels `apart` floats from each other of which the first-level cache keeps the same line. Those that lie a
// power of two apart share a few of its 64 sets, of 8 lines each or somewhat more.
inline int64_t pixels_kept(int64_t apart) {
  constexpr int64_t kSets = 64, kWays = 8;
  return kSets / std::gcd(max64(1, apart / kLine), kSets) * kWays;
}

// Whether `pixels`, the same channels of pixels that lie `apart` floats from each other, are more than the
// first-level cache keeps.
inline bool crowds_cache(int64_t pixels, int64_t apart) {
  return 5 * pixels > 6 * pixels_kept(apart);
}

// What more an algorithm takes that goes over the images group by group, `floats` of a line at a time, where
// no cache holds them: each line comes from memory more than once, and nothing asks for it in time.
template <class V>
double cost_of_pieces(const Conv2dProblem& p, double floats, double weight = 8) {
  if (p.groups == 1 || V::kRegisters == 32 || !beyond_caches(p.x_size() + p.y_size())) return 1;
  return 1 + weight / (8 + floats);
}

// The largest value that an activation leaves.
constexpr float ceiling_of(Activation activation) {
  return activation == Activation::relu6 ? 6.0f : std::numeric_limits<float>::infinity();
}

// Whether a copy of this many rows and columns of an image, padding included, would be large, and the
// image a small part of it.
inline bool mostly_padding(const Conv2dProblem& p, int64_t rows, int64_t columns) {
  constexpr double kTimes = 8, kFloats = 16384;
  const double copy =
      static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(p.c);
  return copy > kFloats && copy > kTimes * static_cast<double>(p.h * p.w * p.c);
}

// Tasks that are enough for many threads.
constexpr int64_t kTasksForMany = 32;

// How many tasks share some multiply-adds well: a few a thread, that none waits long for another, but
// not so few multiply-adds a task that what goes around them counts.
inline int64_t tasks_for(int64_t multiply_adds) {
  const int64_t threads = num_threads();
  constexpr int64_t kFew = int64_t{4} << 20;
  if (threads == 1) return 1;
  return threads * (multiply_adds / threads < 2 * kFew ? 2 : 4);
}

// Calls body(i) for i = 0 .. count - 1, as many a task as touch some 64 KiB: `floats` for each.
template <class Body>
void parallel_by_floats(int64_t count, int64_t floats, const Body& body) {
  const int64_t a_task = max64(1, (int64_t{16} << 10) / max64(floats, 1));
  parallel_for(ceil_div(count, a_task), [&](int64_t task) {
    const int64_t end = min64(count, (task + 1) * a_task);
    for (int64_t i = task * a_task; i < end; ++i) body(i);
  });
}

// Which workers of a parallel_for have made their own copy of something. To fetch a line that another
// core wrote takes as long as to make several anew: a small filter is packed by each.
class OncePerWorker {
 public:
  explicit OncePerWorker(int workers) : done_(static_cast<std::size_t>(workers)) {}
  // True once for each.
  bool first(int worker) {
    bool& done = done_[static_cast<std::size_t>(worker)].done;
    return !std::exchange(done, true);
  }

 private:
  struct alignas(64) Flag {
    bool done = false;
  };
  std::vector<Flag> done_;
};
constexpr int64_t kOwnFilterBytes = int64_t{512} << 10;  // at most

// A pointer or a number of which the compiler does not know how it came about.
template <class T>
T hidden(T value) {
  asm("" : "+r"(value));  // NOLINT(portability-no-assembler): of no instruction
  return value;
}

// Pointers to N evenly spaced elements of a loop, four to a general register and not one each: there
// are not registers enough, and the compiler, which would form all pointers before the loop, is kept
// from seeing that it could.
template <int N>
class Spaced {
 public:
  Spaced(const float* first, int64_t step) : step_(step), step_3_(3 * step) {
    for (int i = 0; i < kBases; ++i) bases_[i] = first + 4 * i * step;
  }
  const float* operator[](int i) const {
    const float* const base = bases_[i / 4];
    return i % 4 == 3 ? base + step_3_ : base + i % 4 * step_;
  }
  // Each `count` elements on.
  void advance(int64_t count) {
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) {
      bases_[i] = hidden(bases_[i] + count);
    }
  }

 private:
  static constexpr int kBases = (N + 3) / 4;
  const float* bases_[kBases];
  int64_t step_, step_3_;
};

// Pointers to N elements of a loop that lie anywhere.
template <int N>
class Listed {
 public:
  template <class ElementAt>
  explicit Listed(const ElementAt& element_at) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) elements_[i] = element_at(i);
  }
  const float* operator[](int i) const { return elements_[i] + at_; }
  void advance(int64_t count) { at_ = hidden(at_ + count); }

 private:
  const float* elements_[N];
  int64_t at_ = 0;
};

// A loop's `count` steps, AtOnce of them at a time: body(number of the step among those, from 0 on), and
// then advance(how many they were). What goes around the products of a register tile counts where two
// threads share a core.
template <int AtOnce, class Body, class Advance>
[[gnu::always_inline]] inline void unrolled(int64_t count, const Body& body,
                                            const Advance& advance) {
  for (; AtOnce > 1 && count >= AtOnce; count = hidden(count - AtOnce)) {
#pragma GCC unroll 4
    for (int step = 0; step < AtOnce; ++step) body(step);
    advance(AtOnce);
  }
  for (; count > 0; --count) {
    body(0);
    advance(1);
  }
}

// sum[v] += *a * b[v]. `Often`: in an unrolled loop.
template <class V, bool Often, int Vectors>
[[gnu::always_inline]] inline void add_products(const float* a, const typename V::Reg (&b)[Vectors],
                                                typename V::Reg (&sum)[Vectors]) {
  if constexpr (Often && requires { V::add_products(a, b, sum); }) {
    V::add_products(a, b, sum);
  } else {
    const typename V::Reg factor = V::broadcast(a);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[v] = V::fma(factor, b[v], sum[v]);
  }
}

// The same of every row of a register tile, with the vectors that begin at `row`: sum[i] += *x_of(i) * row.
template <class V, bool Often, int Rows, int Vectors, class XOf>
[[gnu::always_inline]] inline void add_row_of_products(const XOf& x_of, const float* row,
                                                       typename V::Reg (&sum)[Rows][Vectors]) {
  typename V::Reg b[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) b[v] = V::load(row + v * V::kWidth);
#pragma GCC unroll 28
  for (int i = 0; i < Rows; ++i) add_products<V, Often>(x_of(i), b, sum[i]);
}

// Register tiles, one or several that follow one another: pixel i's y[0 .. columns) += sum over taps, c
// of x[tap + c] * filter.
struct TapTile {
  int64_t tiles;  // of evenly spaced pixels, else 1
  // Of pixel 0, and floats from pixel to pixel.
  const float* x;
  float* y;
  int64_t x_step, y_step;
  // Where pixels are not evenly spaced, a pointer a pixel; else null.
  const float* const* x_pixels;
  float* const* y_pixels;
  int64_t x_offset, y_offset;     // floats, added to all of them
  int64_t residual;               // bytes from y to what is added to the sums; 0 for nothing
  const int64_t* tap_offsets;     // floats, added to those of x
  const int64_t* filter_offsets;  // rows of the panel, `vectors` vectors each
  int64_t taps;
  int64_t run;          // contiguous source floats a tap
  const float* filter;  // [tap][run][vectors * width]
  const float* bias;    // `columns` values or null
  int columns;          // of the last vector: 1 .. width
  bool relu;
  float ceiling;     // with relu
  bool first, last;  // of the parts that a sum is made of: y holds it in between
  bool streams;      // whether x is read for the first time
  // What is asked for meanwhile, for later: `run` cache lines, a step apart, and how far from there the
  // next tile's are. And for how many tiles more. Of several taps, those from `asking_tap` on ask,
  // `ahead_as_x` for what lies as far apart as what they read.
  const float* ahead;
  int64_t ahead_step, ahead_tile;
  int64_t ahead_lines;
  int64_t asking_tap;
  bool ahead_as_x;
  // The first tile that reads a panel of one tap may pack it, as `filter`: its rows are those of the
  // caller's filter, `unpacked_step` floats apart, times the scales of its columns, if not null.
  float* packed;
  const float* unpacked;
  int64_t unpacked_step;
  const float* scales;
};

// What else a tile does: asks for t.ahead, or packs the panel that it reads.
enum class TapTileTask { none, ahead, packing };

// A plain tile's pixels lie evenly and meet one tap; its sums begin here, with the bias or zero. Of few
// channels, what goes around their products would take a third as long as these.
inline bool is_plain(const TapTile& t) {
  return t.taps == 1 && t.first && t.residual == 0 && !t.x_pixels;
}

// What the sums of a register tile's vector v begin with: the bias, or zero where that is null.
template <class V, int Vectors>
typename V::Reg start_of_sum(const float* bias, int v, const typename V::Tail& tail) {
  if (!bias) return V::zero();
  return v == Vectors - 1 ? V::load(bias + v * V::kWidth, tail) : V::load(bias + v * V::kWidth);
}

// 0 .. ceiling; NaN stays.
template <class V>
[[gnu::always_inline]] inline typename V::Reg relu_to(typename V::Reg ceiling, typename V::Reg x) {
  return V::min(ceiling, V::relu(x));
}

// ReLU of a register tile's sums.
template <class V, int Rows, int Vectors>
[[gnu::always_inline]] inline void activate(typename V::Reg (&sum)[Rows][Vectors], float most) {
  const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 28
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[i][v] = body(sum[i][v]);
  };
  // Of few products, to compare with infinity shows.
  if (most == std::numeric_limits<float>::infinity()) {
    each([](typename V::Reg x) { return V::relu(x); });
  } else {
    each([ceiling = V::set(most)](typename V::Reg x) { return relu_to<V>(ceiling, x); });
  }
}

// Calls body(tail) for vectors of so many lanes, or body() for whole ones where these are quicker. Asked
// once, not for each pixel: of few products, that would take as long as these.
template <class V, class Body>
[[gnu::always_inline]] inline void with_tail(int lanes, const Body& body) {
  if (!V::kFreeMasks && lanes == V::kWidth) {
    body();
  } else {
    body(V::tail(lanes));
  }
}

// Pixel i's go to `to(i)`; the last vector has `columns`.
template <class V, int Rows, int Vectors, class To>
[[gnu::always_inline]] inline void store_tile(const typename V::Reg (&sum)[Rows][Vectors],
                                              int columns, const To& to) {
  with_tail<V>(columns, [&](const auto&... tail) __attribute__((always_inline)) {
#pragma GCC unroll 28
    for (int i = 0; i < Rows; ++i) {
      float* const at = to(i);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors - 1; ++v) V::store(at + v * V::kWidth, sum[i][v]);
      V::store(at + (Vectors - 1) * V::kWidth, sum[i][Vectors - 1], tail...);
    }
  });
}

template <class V, int Rows, int Vectors, TapTileTask Task, bool Plain>
[[gnu::always_inline]] inline void one_tap_tile(const TapTile& t, const float* first_x, float* y,
                                                const float* first_ahead) {
  const auto tail = V::tail(t.columns);
  typename V::Reg sum[Rows][Vectors];
  float* const* const y_pixels = t.y_pixels;
  const int64_t y_step = t.y_step, y_offset = t.y_offset;
  const auto y_of = [&](int i) { return y_pixels ? y_pixels[i] + y_offset : y + i * y_step; };
  if (Plain || t.first) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const typename V::Reg start = start_of_sum<V, Vectors>(t.bias, v, tail);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) sum[i][v] = start;
    }
    if (!Plain && t.residual != 0) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const char* const at = reinterpret_cast<const char*>(y_of(i)) + t.residual;
        const float* const from = reinterpret_cast<const float*>(at);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const bool last = v == Vectors - 1;
          const typename V::Reg added =
              last ? V::load(from + v * V::kWidth, tail) : V::load(from + v * V::kWidth);
          sum[i][v] = V::add(sum[i][v], added);
        }
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float* const from = y_of(i);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sum[i][v] =
            v == Vectors - 1 ? V::load(from + v * V::kWidth, tail) : V::load(from + v * V::kWidth);
      }
    }
  }
  const int64_t taps = Plain ? 1 : t.taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t offset = t.x_offset + t.tap_offsets[tap];
    const float* filter = t.filter + t.filter_offsets[tap] * (Vectors * V::kWidth);
    const float* ahead = first_ahead + (t.ahead_as_x ? t.tap_offsets[tap] : 0);
    const int64_t ahead_step = tap < t.asking_tap ? 0 : t.ahead_step;
    const float* unpacked = t.unpacked;
    float* packed = t.packed;
    // The caller's rows are as far apart as pages: no processor reads them ahead. Of narrow vectors a
    // row is soon through, and more than eight that fall into one set of the first-level cache are asked
    // for: into the second level.
    constexpr bool kNarrow = V::kWidth < 16;
    constexpr int64_t kRowsAhead = kNarrow ? 32 : 16;
    constexpr bool kPacks = Task == TapTileTask::packing;
    constexpr int kAtOnce = kPacks ? 1 : V::kProductsAtOnce;
    // That of the filter which comes after so many others.
    const auto add_row = [&](const auto& x,
                             [[maybe_unused]] int after) __attribute__((always_inline)) {
      if constexpr (Task == TapTileTask::ahead) {
        __builtin_prefetch(ahead + after * ahead_step, 0, 2);
      }
      if constexpr (kPacks) {
        typename V::Reg b[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const auto load = [&](const float* from) {
            return v == Vectors - 1 ? V::load(from + v * V::kWidth, tail)
                                    : V::load(from + v * V::kWidth);
          };
          b[v] = load(unpacked);
          if (t.scales) b[v] = V::multiply(b[v], load(t.scales));
          V::store(packed + v * V::kWidth, b[v]);
          const int end = (v + 1) * V::kWidth;
          if (end % kLine == 0 || v == Vectors - 1) {
            __builtin_prefetch(unpacked + (kRowsAhead * t.unpacked_step + end - 1), 0,
                               kNarrow ? 2 : 3);
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) add_products<V, false>(x[i], b, sum[i]);
      } else {
        add_row_of_products<V, (kAtOnce > 1)>(
            [&](int i) __attribute__((always_inline)) { return x[i] + after; },
            filter + after * Vectors * V::kWidth, sum);
      }
    };
    const auto add_rows = [&](auto x) __attribute__((always_inline)) {
      unrolled<kAtOnce>(
          t.run, [&](int after) __attribute__((always_inline)) { add_row(x, after); },
          [&](int64_t rows) __attribute__((always_inline)) {
            x.advance(rows);
            filter = hidden(filter + rows * Vectors * V::kWidth);
            if constexpr (Task == TapTileTask::ahead) ahead += rows * ahead_step;
            if constexpr (kPacks) {
              unpacked += rows * t.unpacked_step;
              packed += rows * Vectors * V::kWidth;
            }
          });
    };
    // A tile of one vector has the most pixels, and the fewest multiply-adds for each.
    if (Plain || (Vectors == 1 && !t.x_pixels)) {
      add_rows(Spaced<Rows>(first_x + offset, t.x_step));
    } else {
      add_rows(Listed<Rows>(
          [&](int i) { return (t.x_pixels ? t.x_pixels[i] : first_x + i * t.x_step) + offset; }));
    }
  }
  // Read anew: in the loop, registers are short.
  const TapTile* const end = hidden(&t);
  if (end->relu && end->last) activate<V>(sum, end->ceiling);
  if (float* const* const pixels = Plain ? nullptr : end->y_pixels) {
    store_tile<V>(sum, end->columns,
                  [pixels, offset = end->y_offset](int i) { return pixels[i] + offset; });
  } else {
    store_tile<V>(sum, end->columns, [y, step = end->y_step](int i) { return y + i * step; });
  }
}

template <class V, int Rows, int Vectors, TapTileTask Task, bool Plain>
void tap_tile(const TapTile& t) {
  const float* x = t.x;
  float* y = t.y + t.y_offset;
  const float* ahead = t.ahead;
  for (int64_t tile = t.tiles; tile > 0; --tile) {
    one_tap_tile<V, Rows, Vectors, Task, Plain>(t, x, y, ahead);
    x += Rows * t.x_step;
    y += Rows * t.y_step;
    ahead += t.ahead_tile;
  }
}

using TapTileFunction = void (*)(const TapTile&);

// The most vectors of a register tile.
template <class V>
constexpr int kGemmVectors = static_cast<int>(std::size(V::kGemmRows)) - 1;

// Panels of so many vectors: of V::kPanelVectors, or, where these would leave a vector alone, which waits
// for its loads, of as many as a register tile has.
template <class V>
constexpr int64_t gemm_panels(int64_t vectors) {
  const int64_t wide = ceil_div(vectors, kGemmVectors<V>);
  const bool one_alone = vectors % V::kPanelVectors == 1, else_too = vectors % kGemmVectors<V> == 1;
  return one_alone && !else_too ? wide : ceil_div(vectors, V::kPanelVectors);
}

template <class V>
constexpr int kMostGemmRows = *std::max_element(std::begin(V::kGemmRows), std::end(V::kGemmRows));

// Of `Vectors` vectors, by rows - 1.
template <class V, int Vectors, TapTileTask Task, bool Plain, std::size_t... I>
constexpr auto make_tap_tiles(std::index_sequence<I...>) {
  return std::array<TapTileFunction, kMostGemmRows<V>>{tap_tile<V, I + 1, Vectors, Task, Plain>...};
}

// By vectors - 1 and rows - 1.
template <class V, TapTileTask Task, bool Plain, std::size_t... I>
constexpr auto make_tap_tile_table(std::index_sequence<I...>) {
  return std::array{make_tap_tiles<V, I + 1, Task, Plain>(
      std::make_index_sequence<std::size_t{V::kGemmRows[I + 1]}>{})...};
}

// For at most V::kGemmRows[vectors] rows.
template <class V, TapTileTask Task, bool Plain>
TapTileFunction tap_tile_function(int rows, int vectors) {
  static constexpr auto kTable =
      make_tap_tile_table<V, Task, Plain>(std::make_index_sequence<std::size_t{kGemmVectors<V>}>{});
  return kTable[static_cast<std::size_t>(vectors - 1)][static_cast<std::size_t>(rows - 1)];
}
template <class V>
TapTileFunction tap_tile_function(TapTileTask task, bool plain, int rows, int vectors) {
  switch (task) {
    case TapTileTask::packing:
      return tap_tile_function<V, TapTileTask::packing, false>(rows, vectors);
    case TapTileTask::ahead:
      return plain ? tap_tile_function<V, TapTileTask::ahead, true>(rows, vectors)
                   : tap_tile_function<V, TapTileTask::ahead, false>(rows, vectors);
    default:
      return plain ? tap_tile_function<V, TapTileTask::none, true>(rows, vectors)
                   : tap_tile_function<V, TapTileTask::none, false>(rows, vectors);
  }
}

// The taps of one axis, in ascending order of what they meet: source index = i * step + offset(tap),
// tap = 0 .. count - 1.
struct AxisTaps {
  int64_t count, step, first, stride;   // offset(tap) = first + tap * stride, stride >= 0
  int64_t filter_first, filter_stride;  // the filter's row or column of a tap
  int64_t offset(int64_t tap) const { return first + tap * stride; }
  int64_t lowest() const { return first; }
  int64_t highest() const { return offset(count - 1); }
  // How many of the taps, the last ones, meet what none did from the output index before.
  int64_t news() const { return min64(count, step / std::gcd(step, stride)); }

  // The taps [begin, end) that meet a source of `size` from output index i: the first that lies in it
  // or beyond, and the first beyond it. From one i to the next, neither grows.
  void meeting(int64_t i, int64_t size, int64_t& begin, int64_t& end) const {
    const int64_t at = i * step + first;
    if (at >= 0 && at + (count - 1) * stride < size) {  // most; divisions take long
      begin = 0;
      end = count;
      return;
    }
    if (count <= 1 || stride == 0) {
      begin = at >= 0 ? 0 : count;
      end = at < size ? count : 0;
      return;
    }
    begin = at >= 0 ? 0 : min64(count, ceil_div(-at, stride));
    end = at >= size ? 0 : min64(count, (size - 1 - at) / stride + 1);
  }

  // The output indices, of `outputs`, from which a tap meets a source of `size`.
  Span met_by(int64_t tap, int64_t outputs, int64_t size) const {
    const int64_t at = offset(tap);
    const int64_t begin = at >= 0 ? 0 : min64(outputs, ceil_div(-at, step));
    const int64_t end = at >= size ? 0 : min64(outputs, (size - 1 - at) / step + 1);
    return {begin, max64(begin, end)};
  }

  // How many pairs of a tap and an output index, of `outputs`, meet a source of `size`.
  int64_t pairs_met(int64_t outputs, int64_t size) const {
    int64_t pairs = 0;
    for (int64_t tap = 0; tap < count; ++tap) pairs += met_by(tap, outputs, size).size();
    return pairs;
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
  float ceiling;  // with relu
};

// Where one tap meets pixel after pixel, images and rows do not matter: they make one long row.
inline TapConvolution flattened(TapConvolution g) {
  if (g.vertical.count != 1 || g.horizontal.count != 1 || g.vertical.step != 1 ||
      g.horizontal.step != 1 || g.vertical.first != 0 || g.horizontal.first != 0 ||
      g.out_h != g.source_h || g.out_w != g.source_w || g.y_row != g.out_w * g.y_column ||
      g.y_image != g.out_h * g.y_row) {
    return g;
  }
  g.out_w = g.source_w = g.images * g.out_h * g.out_w;
  g.images = g.out_h = g.source_h = 1;
  g.source_image = g.source_w * g.source_c;
  g.y_row = g.y_image = g.out_w * g.y_column;
  return g;
}

// A rectangle of output pixels and the taps that all of them meet the source with.
struct TapRegion {
  int64_t row, row_end, column, column_end;
  int64_t r, r_end, s, s_end;

  int64_t pixels(int64_t images) const { return images * (row_end - row) * (column_end - column); }
  // Of the output's pixels before this one, how many are the region's.
  int64_t pixels_before(const TapConvolution& g, int64_t pixel) const {
    const int64_t n = pixel / (g.out_h * g.out_w);
    const int64_t i = pixel / g.out_w % g.out_h, j = pixel % g.out_w;
    const int64_t width = column_end - column;
    const int64_t rows = n * (row_end - row) + std::clamp(i, row, row_end) - row;
    const bool within = row <= i && i < row_end;
    return rows * width + (within ? std::clamp(j, column, column_end) - column : 0);
  }
};

// All output pixels that meet the source with one tap (counted r * S + s), whichever others they meet.
inline TapRegion region_of_tap(const TapConvolution& g, int64_t tap) {
  const int64_t r = tap / g.horizontal.count, s = tap % g.horizontal.count;
  const Span rows = g.vertical.met_by(r, g.out_h, g.source_h);
  const Span columns = g.horizontal.met_by(s, g.out_w, g.source_w);
  return {rows.begin, rows.end, columns.begin, columns.end, r, r + 1, s, s + 1};
}

// Calls body(region) for each, row by row; they cover the output.
template <class Body>
void for_each_region(const TapConvolution& g, const Body& body) {
  // The taps at output index `begin`, and the last index + 1 that meets the same.
  const auto extend = [](const AxisTaps& axis, int64_t begin, int64_t size, int64_t source,
                         int64_t& tap, int64_t& tap_end) {
    axis.meeting(begin, source, tap, tap_end);
    int64_t alike = begin, other = size;  // of which nothing is known between them
    const auto is_alike = [&](int64_t at) {
      int64_t next = 0, next_end = 0;
      axis.meeting(at, source, next, next_end);
      return next == tap && next_end == tap_end;
    };
    if (is_alike(size - 1)) alike = size - 1;
    while (other - alike > 1) {
      const int64_t middle = alike + (other - alike) / 2;
      (is_alike(middle) ? alike : other) = middle;
    }
    if (tap >= tap_end) tap = tap_end = 0;
    return alike + 1;
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

// The filter as register tiles read it: panels of at most `Vectors` vectors of output channels, in each
// [tap][source channel][output channel], spare lanes zero. Panels are as wide as one another, or one
// vector narrower: the tiles of all have the same rows, and a tile's pixels go through all panels. Narrow
// ones are spread evenly, so that runs of like numbers of panels have like numbers of vectors.
template <class V, int Vectors = V::kVectors>
struct FilterPanels {
  const TapConvolution& g;
  int64_t panels, reduce, group_floats;  // reduce: the products of one sum
  int64_t widest;                        // vectors of a panel, at most

  // As few panels as there can be, or more so that `threads` share them evenly.
  explicit FilterPanels(const TapConvolution& convolution, int64_t threads = 1)
      : g(convolution), reduce(g.vertical.count * g.horizontal.count * g.reduce) {
    const int64_t vectors = ceil_div(g.columns, V::kWidth);
    panels = Vectors == kGemmVectors<V> ? gemm_panels<V>(vectors) : ceil_div(vectors, Vectors);
    const int64_t even = round_up(panels, threads);
    constexpr int64_t kLeastVectors = 2;
    if (even * kLeastVectors <= vectors) panels = even;
    widest = ceil_div(vectors, panels);
    vectors_a_panel_ = ceil_div(vectors << kFraction, max64(panels, 1));
    group_floats = reduce * vectors * V::kWidth;
  }

  // Of all groups, packed.
  static int64_t floats_of(const TapConvolution& g) {
    return g.groups * g.vertical.count * g.horizontal.count * g.reduce *
           round_up(g.columns, V::kWidth);
  }
  int64_t bytes() const { return round_up(floats_of(g) * 4, 64); }
  int vectors_of(int64_t panel) const {
    return static_cast<int>(first_vector(panel + 1) - first_vector(panel));
  }
  // The first channel of a panel; spare lanes count.
  int64_t first_column(int64_t panel) const { return first_vector(panel) * V::kWidth; }
  // Channels in the last vector of a panel.
  int last_columns(int64_t panel) const {
    return static_cast<int>(min64(g.columns - first_column(panel + 1) + V::kWidth, V::kWidth));
  }
  int64_t offset(int64_t group, int64_t panel) const {
    return group * group_floats + first_column(panel) * reduce;
  }

  // Alone, or with all threads.
  void pack_all(const float* filter, const float* scale, float* packed) const {
    const int64_t taps = g.vertical.count * g.horizontal.count;
    const int64_t rows_a_task = 64, parts = ceil_div(g.reduce, rows_a_task);
    const int64_t floats = min64(rows_a_task, g.reduce) * g.columns * 2;
    parallel_by_floats(g.groups * taps * parts, floats, [&](int64_t task) {
      const int64_t group = task / parts / taps, tap = task / parts % taps;
      const int64_t c = task % parts * rows_a_task, c_end = min64(g.reduce, c + rows_a_task);
      pack(filter, scale, group, 0, panels, tap, tap + 1, c, c_end, packed + offset(group, 0),
           reduce, tap * g.reduce + c);
    });
  }

  // Rows of some panels: taps tap .. tap_end - 1 (counted r * S + s), channels c .. c_end - 1 of each.
  // The panels have `panel_rows` rows each in `out`; the first row goes to row `at`. A row of the
  // filter is read in one go, whichever panels it goes to. Output channel k is multiplied by scale[k],
  // if that is not null; fprop alone has one.
  void pack(const float* filter, const float* scale, int64_t group, int64_t panel_begin,
            int64_t panel_end, int64_t tap, int64_t tap_end, int64_t c, int64_t c_end, float* out,
            int64_t panel_rows, int64_t at) const {
    const int64_t first = first_column(panel_begin);
    for (; tap < tap_end; ++tap, at += c_end - c) {
      const float* in = row_of(filter, group, panel_begin, tap, c);
      if (g.filter_column == 1) {
        const float* const scales = scale ? scale + group * g.columns + first : nullptr;
        for (int64_t row = 0; row < c_end - c; ++row, in += g.filter_reduce) {
          for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            const int64_t skipped = first_column(panel) - first;
            copy_row(in + skipped, scales ? scales + skipped : nullptr, panel,
                     out + skipped * panel_rows + (at + row) * vectors_of(panel) * V::kWidth);
          }
        }
      } else {
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t skipped = first_column(panel) - first;
          transpose_rows(in + skipped * g.filter_column, c_end - c, panel,
                         out + skipped * panel_rows + at * vectors_of(panel) * V::kWidth);
        }
      }
    }
  }

  // Where the filter has the first channel of a panel.
  const float* row_of(const float* filter, int64_t group, int64_t panel, int64_t tap,
                      int64_t c) const {
    const int64_t r = tap / g.horizontal.count, s = tap % g.horizontal.count;
    return filter + group * g.filter_group + first_column(panel) * g.filter_column +
           (g.vertical.filter_first + r * g.vertical.filter_stride) * g.filter_tap_row +
           (g.horizontal.filter_first + s * g.horizontal.filter_stride) * g.filter_tap_column +
           c * g.filter_reduce;
  }

 private:
  // part_of(vectors, panels, panel).begin, without a division a call.
  int64_t first_vector(int64_t panel) const { return panel * vectors_a_panel_ >> kFraction; }
  static constexpr int kFraction = 32;
  int64_t vectors_a_panel_;  // times 2 to the power of kFraction, rounded up

  void copy_row(const float* in, const float* scale, int64_t panel, float* out) const {
    const int64_t last = int64_t{vectors_of(panel) - 1} * V::kWidth;
    const auto tail = V::tail(last_columns(panel));
    const auto copy = [&](int64_t at, const auto&... mask) {
      const typename V::Reg value = V::load(in + at, mask...);
      V::store(out + at, scale ? V::multiply(value, V::load(scale + at, mask...)) : value);
    };
    for (int64_t at = 0; at < last; at += V::kWidth) copy(at);
    copy(last, tail);
  }

  // in[j][c] to out[c][j], a square of registers at a time: of each row a line, and then the next rows, of
  // which there are more than a processor reads ahead for.
  void transpose_rows(const float* in, int64_t rows, int64_t panel, float* out) const {
    const int64_t width = vectors_of(panel) * V::kWidth;
    const int64_t valid = min64(width, g.columns - first_column(panel));
    constexpr int64_t kLinesAhead = 4;
    for (int64_t line = 0; line < rows; line += kLine) {
      const int64_t line_end = min64(rows, line + kLine);
      for (int64_t j0 = 0; j0 < width; j0 += V::kWidth) {
        for (int64_t j = j0; j < min64(j0 + V::kWidth, valid); ++j) {
          __builtin_prefetch(in + (j * g.filter_column + line + kLinesAhead * kLine));
        }
        for (int64_t c0 = line; c0 < line_end; c0 += V::kWidth) {
          const int64_t depth = min64(V::kWidth, line_end - c0);
          const auto tail = V::tail(static_cast<int>(depth));
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
  }
};

// Computes tiles of a tap convolution from a packed filter. Allocates nothing and throws nothing: it
// serves the tasks of a runner.
template <class V>
struct TapTiles {
  using Panels = FilterPanels<V, kGemmVectors<V>>;
  const TapConvolution& g;
  const Panels& panels;
  const float* x;
  const float* bias;
  const float* residual;
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

  // Walks some of a region's pixels tile by tile.
  class Cursor {
   public:
    Cursor(const TapTiles& tiles, const TapRegion& region, Span pixels, int rows, int64_t tile)
        : tiles_(tiles), region_(region), cut_(pixels.size(), ceil_div(pixels.size(), rows)),
          tile_(tile) {
      const int64_t begin = pixels.begin + cut_.begin(tile);
      const int64_t width = region.column_end - region.column;
      const int64_t height = region.row_end - region.row;
      n_ = begin / (width * height);
      row_ = region.row + begin / width % height;
      go_to(region.column + begin % width);
    }

    // Source and output addresses of the next tile's pixels; returns how many. `x` and `y` have room
    // for them. And how many like tiles follow one another evenly, `most` of them.
    int locate(TapTile& t, int64_t most, const float** x, float** y) {
      const int64_t count = cut_.size(tile_);
      if (left_ == 0) next_row();
      t.tiles = 1;
      if (count <= left_) {
        t.x = x_;
        t.y = y_;
        t.x_pixels = nullptr;
        t.y_pixels = nullptr;
        if (most > 1) t.tiles = min64(min64(most, left_ / count), cut_.alike(tile_));
        x_ += t.tiles * count * t.x_step;
        y_ += t.tiles * count * t.y_step;
        left_ -= t.tiles * count;
        tile_ += t.tiles;
        return static_cast<int>(count);
      }
      ++tile_;
      t.x_pixels = x;
      t.y_pixels = y;
      for (int64_t pixel = 0; pixel < count; ++pixel, --left_) {
        if (left_ == 0) next_row();
        x[pixel] = x_;
        y[pixel] = y_;
        x_ += t.x_step;
        y_ += t.y_step;
      }
      return static_cast<int>(count);
    }

    // Where the first pixel of the next tile reads.
    const float* next_x() const {
      if (left_ > 0) return x_;
      const bool image_ends = row_ + 1 == region_.row_end;
      return x_of(n_ + image_ends, image_ends ? region_.row : row_ + 1, region_.column);
    }

   private:
    void next_row() {
      if (++row_ == region_.row_end) {
        row_ = region_.row;
        ++n_;
      }
      go_to(region_.column);
    }
    void go_to(int64_t column) {
      const TapConvolution& g = tiles_.g;
      left_ = region_.column_end - column;
      x_ = x_of(n_, row_, column);
      y_ = tiles_.y + n_ * g.y_image + row_ * g.y_row + column * g.y_column;
    }

    const float* x_of(int64_t n, int64_t row, int64_t column) const {
      const TapConvolution& g = tiles_.g;
      return tiles_.x + n * g.source_image +
             (row * g.vertical.step * g.source_w + column * g.horizontal.step) * g.source_c;
    }

    const TapTiles& tiles_;
    const TapRegion& region_;
    LikeTiles cut_;
    int64_t tile_, n_, row_, left_;  // left: pixels of the row
    const float* x_;
    float* y_;
  };

  // Whether the next tile's pixels should be asked for. Of one long row of pixels, a tile reads each float once.
  // Where no cache holds the tensors, hardware asks for the pixels of one row in time, but not for those of
  // several, as under a stride, or for many channels. With AVX-512 that has not been tried.
  bool reads_late() const {
    if (g.reduce != g.source_c) return false;
    if (g.vertical.count * g.horizontal.count == 1 && g.images * g.out_h == 1) return true;
    constexpr int64_t kManyChannels = 96;
    const bool strided = g.vertical.step * g.horizontal.step > 1 || g.y_column != g.columns;
    return V::kRegisters < 32 && (strided || g.reduce >= kManyChannels) &&
           beyond_caches(g.images * (g.source_image + g.y_image));
  }

  // Of at most so many pixels.
  int rows() const { return V::kGemmRows[panels.widest]; }

  // A run of the tiles into which some of a region's pixels are cut, for panels `panel` .. `panel_end` - 1.
  // `filter` has those of them, of `filter_rows` rows each; `t` says which rows these are.
  void run(const TapRegion& region, Span pixels, int64_t group, int64_t panel, int64_t panel_end,
           int64_t tile, int64_t tile_end, const float* filter, int64_t filter_rows,
           TapTile& t) const {
    const float* x_pixels[kMostGemmRows<V>];
    float* y_pixels[kMostGemmRows<V>];
    t.x_step = g.horizontal.step * g.source_c;
    t.y_step = g.y_column;
    t.x_offset = group * g.reduce;
    t.relu = g.relu;
    t.ceiling = g.ceiling;
    t.residual =
        residual ? reinterpret_cast<std::intptr_t>(residual) - reinterpret_cast<std::intptr_t>(y)
                 : 0;
    const int64_t first_y = group * g.columns + panels.first_column(panel);
    const bool streams = t.streams && t.first && t.last && t.taps > 0 && reads_late();
    // Of the taps, in rows of one or several, those that read what no tile before has.
    const int64_t taps_a_row = t.taps / max64(1, region.r_end - region.r);
    t.ahead_as_x = streams;
    t.asking_tap = streams ? max64(0, t.taps - (g.vertical.news() - 1) * taps_a_row - 1) : 0;
    // Tiles that pass through a panel before the next panel's turn: few, for the rows of y had better be
    // written in one go. Of narrow vectors more: a call for a few would be over soon.
    constexpr int64_t kPixelFloats = V::kWidth < 16 ? 2048 : 512;
    const int64_t tiles_a_panel = panel_end - panel == 1
                                      ? tile_end - tile
                                      : max64(1, kPixelFloats / max64(1, rows() * t.taps * t.run));
    Cursor cursor(*this, region, pixels, rows(), tile);
    while (tile < tile_end) {
      const bool packing = t.packed, ahead = !packing && t.ahead_lines > 0;
      const int64_t most = packing ? 1
                           : ahead ? min64(t.ahead_lines, tiles_a_panel)
                                   : tiles_a_panel;
      const int count = cursor.locate(t, min64(most, tile_end - tile), x_pixels, y_pixels);
      if (streams) {  // the last floats of the next tile's pixels, which make up what is new
        const float* const next = t.tiles == 1 ? cursor.next_x() : t.x + count * t.x_step;
        t.ahead = next + t.x_offset + t.run - t.x_step;
        t.ahead_step = ceil_div(count * t.x_step, t.run);
        t.ahead_tile = count * t.x_step;
      } else {
        t.ahead_tile = kLine;
      }
      t.filter = filter;
      t.y_offset = first_y;
      const bool plain = is_plain(t);
      for (int64_t i = panel; i < panel_end; ++i) {
        const int vectors = panels.vectors_of(i);
        t.columns = panels.last_columns(i);
        t.bias = bias ? bias + t.y_offset : nullptr;
        const TapTileTask task = packing                            ? TapTileTask::packing
                                 : ahead || (streams && i == panel) ? TapTileTask::ahead
                                                                    : TapTileTask::none;
        tap_tile_function<V>(task, plain, count, vectors)(t);
        t.filter += vectors * V::kWidth * filter_rows;
        t.y_offset += vectors * V::kWidth;
      }
      t.packed = nullptr;
      if (ahead) {
        t.ahead += t.tiles * kLine;
        t.ahead_lines -= t.tiles;
      }
      tile += t.tiles;
    }
  }
};

// Blocking, tasks and scratch memory of one tap convolution.
//
// Where pixels are many, the whole filter is packed first. Where they are few, packing it costs as
// much as using it: then a task owns a panel and all (or many) pixels, and packs a chunk of the panel
// at a time, which stays in the first-level cache while the pixels pass; sums wait in y. Chunks of one tap
// need no regions: all pixels that meet the tap are one rectangle.
template <class V>
struct TapConvolutionRunner {
  using Panels = FilterPanels<V, kGemmVectors<V>>;
  // Filter rows, so that those of a panel stay in the first-level cache; with AVX-512, whose processors have
  // more of the second level and read it fast enough, there: sums go to y and back less often.
  static constexpr int64_t kChunkBytes = int64_t{V::kRegisters == 32 ? 132 : 40} << 10;
  static constexpr int64_t kChunkRows = kChunkBytes / (V::kPanelVectors * V::kWidth * 4);
  static constexpr int64_t kMostVectorsAChunk = 16;

  const TapConvolution g;
  const int64_t pixels;
  const int64_t shares;  // threads that share the panels evenly
  const Panels panels;
  std::vector<TapRegion> regions;
  std::vector<int64_t> first_tile;       // of each region, and behind the last
  int64_t blocks;                        // runs of tiles
  int64_t panel_groups, panels_a_group;  // runs of panels
  int64_t tasks;
  bool by_chunks, own_filters;
  int64_t packed_bytes, entries_bytes;  // entries: of one worker
  int64_t workspace_bytes;
  int workers;

  explicit TapConvolutionRunner(const TapConvolution& convolution,
                                std::optional<int64_t> shares_of_panels = {})
      : g(flattened(convolution)), pixels(g.images * g.out_h * g.out_w),
        shares(shares_of_panels.value_or(fitting_shares())), panels(g, shares) {
    if (pixels > 0) for_each_region(g, [&](const TapRegion& region) { regions.push_back(region); });
    first_tile.push_back(0);
    for (const TapRegion& region : regions) {
      const int64_t rows = V::kGemmRows[panels.widest];
      first_tile.push_back(tiles() + ceil_div(region.pixels(g.images), rows));
    }

    // Time to pack, in vector operations a filter vector: by chunks it stays in the cache, and may be a
    // tile's by-product, but every block packs anew; as a whole it goes to memory and comes back if it
    // is large and one for all threads.
    const int64_t threads = num_threads();
    const int64_t enough_tasks = tasks_for(pixels * panels.reduce * g.columns * g.groups);
    constexpr int64_t kMostPixelsAChunk = 512;
    const int64_t filter_floats = Panels::floats_of(g);
    const bool large = is_large();
    own_filters = threads > 1 && !large;
    const int64_t chunk_cost = packs_in_tiles() ? 2 : 5;
    const int64_t whole_cost = large ? 24 : 10;
    int64_t chunked_blocks =
        min64(ceil_div(pixels, V::kRows), ceil_div(enough_tasks, g.groups * panels.panels));
    if (shares > 1 && panels.panels % threads == 0) chunked_blocks = 1;
    if (own_pixels()) {
      const bool two = packs_in_tiles() && pixels >= 2 * threads * least_own_pixels();
      chunked_blocks = threads * (threads > 1 && two ? 2 : 1);
    }
    const int64_t many_blocks = round_up(ceil_div(pixels, kMostPixelsAChunk), threads);
    if (pixels > kMostPixelsAChunk) chunked_blocks = max64(chunked_blocks, many_blocks);
    // Between chunks, sums go to y and come back.
    const int64_t chunks = g.vertical.count * g.horizontal.count * ceil_div(g.reduce, kChunkRows);
    const int64_t sums_cost = chunks > 1 ? 6 * pixels / kChunkRows : 0;
    const int64_t whole_costs = own_filters ? whole_cost * threads : whole_cost;
    by_chunks = filter_floats > 0 && chunked_blocks * chunk_cost + sums_cost < whole_costs;
    own_filters = own_filters && !by_chunks;

    if (by_chunks) {
      block_by_chunks(chunked_blocks, enough_tasks);
    } else {
      block_whole(enough_tasks);
    }
    blocks = max64(1, blocks);
    tasks = g.groups * panel_groups * blocks;
    entries_bytes = round_up(2 * TapTiles<V>::most_entries(g) * 8, 64);
    workers = workers_for(tasks);  // asked once: their number may change at any time
    workspace_bytes =
        (by_chunks || own_filters ? workers : 1) * packed_bytes + workers * entries_bytes;
  }

  // `scale`, `bias` and `residual` (of y's shape) may be null: y = activation(conv(x, filter * scale) +
  // bias + residual).
  // `kept` has the whole filter packed, as pack_all does it, or is null: then it is packed here.
  void execute(const float* x, const float* filter, const float* scale, const float* bias,
               const float* residual, float* y, const float* kept = nullptr) const {
    if (pixels == 0) return;
    const Workspace workspace(
        static_cast<std::size_t>(kept ? workers * entries_bytes : workspace_bytes));
    const TapTiles<V> tap_tiles{g, panels, x, bias, residual, y};
    char* const entries = reinterpret_cast<char*>(workspace.floats());
    float* const packed = workspace.floats(static_cast<std::size_t>(workers * entries_bytes));
    OncePerWorker packs(workers);
    if (!by_chunks && !own_filters && !kept) panels.pack_all(filter, scale, packed);
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
      int64_t* own_entries = reinterpret_cast<int64_t*>(entries + worker * entries_bytes);
      Part part{};
      // A thread begins with neighbouring tasks: of the same pixels, or of the same part of the filter
      // where this is large.
      const int64_t all_groups = g.groups * panel_groups;
      const int64_t block = by_chunks ? task / all_groups : task % blocks;
      const int64_t group = by_chunks ? task % all_groups : task / blocks;
      const Span own_tiles = part_of(tiles(), blocks, block);
      part.tile = own_tiles.begin;
      part.tile_end = own_tiles.end;
      const Span own_panels = part_of(panels.panels, panel_groups, group % panel_groups);
      part.panel = own_panels.begin;
      part.panel_end = own_panels.end;
      part.group = group / panel_groups;
      part.kept = kept;
      const bool owns = !kept && (by_chunks || own_filters);
      float* const own = packed + (owns ? worker * (packed_bytes / 4) : 0);
      part.pixels = part_of(pixels, blocks, block);
      if (by_chunks && taps_a_chunk() == 1) {
        return work_by_taps(tap_tiles, part, filter, scale, own, own_entries);
      }
      if (by_chunks) return work_by_chunks(tap_tiles, part, filter, scale, own, own_entries);
      if (own_filters && !kept && packs.first(worker)) panels.pack_all(filter, scale, own);
      const float* const whole = kept ? kept : own;
      TapTile t{};
      t.first = t.last = t.streams = true;
      for_each_region_of(part, [&](const TapRegion& region, int64_t tile, int64_t tile_end) {
        tap_tiles.list_taps(region, own_entries, t);
        tap_tiles.run(region, {0, region.pixels(g.images)}, part.group, part.panel, part.panel_end,
                      tile, tile_end, whole + panels.offset(part.group, part.panel), panels.reduce,
                      t);
      });
    });
  }

 private:
  bool is_large() const { return Panels::floats_of(g) * 4 > kOwnFilterBytes; }
  // Threads that write to other panels of the same pixels disturb each other: what one writes, the
  // other's hardware reads ahead. They have pixels of their own where these make up for the packing.
  int64_t least_own_pixels() const { return packs_in_tiles() ? 96 : 48; }
  bool own_pixels() const { return !is_large() && pixels >= num_threads() * least_own_pixels(); }
  // All threads where pixels are too few to share.
  int64_t fitting_shares() const {
    constexpr int64_t kFewPixels = 256;
    return g.groups > 1 || own_pixels() || pixels > kFewPixels ? 1 : num_threads();
  }

  // The first row of a part of the filter.
  struct Chunk {
    int64_t tap, c;
  };

  // What a task computes.
  struct Part {
    int64_t group, panel, panel_end, tile, tile_end;
    Span pixels;
    const float* kept;  // the filter packed as a whole, or null
  };

  // Where a filter that is packed as a whole has a panel's rows of a chunk.
  const float* kept_rows(const Part& part, int64_t panel, const Chunk& from) const {
    return part.kept + panels.offset(part.group, panel) +
           (from.tap * g.reduce + from.c) * panels.vectors_of(panel) * V::kWidth;
  }

  int64_t tiles() const { return first_tile.back(); }

  // A few neighbouring panels a task: rows of the filter are read in longer pieces.
  void block_by_chunks(int64_t most_blocks, int64_t enough_tasks) {
    blocks = min64(tiles(), most_blocks);
    const int64_t spare = g.groups * panels.panels * blocks / enough_tasks;
    panels_a_group = max64(1, min64(spare, kMostVectorsAChunk / panels.widest));
    panel_groups = ceil_div(panels.panels, panels_a_group);
    if (blocks == 1) panel_groups = min64(panels.panels, round_up(panel_groups, shares));
    panels_a_group = ceil_div(panels.panels, panel_groups);
    packed_bytes = chunk_rows() * panels_a_group * panels.widest * V::kWidth * 4;
  }

  void block_whole(int64_t enough_tasks) {
    packed_bytes = panels.bytes();
    // Filter panels that stay in half of a 1 MiB second-level cache while tiles pass by.
    const int64_t panel_bytes = max64(panels.reduce * panels.widest * V::kWidth * 4, 1);
    panels_a_group = max64(1, min64(panels.panels, (int64_t{512} << 10) / panel_bytes));
    constexpr int64_t kPixelsABlock = 96;
    blocks = ceil_div(tiles(), kPixelsABlock / V::kGemmRows[panels.widest]);
    if (blocks * g.groups * ceil_div(panels.panels, panels_a_group) < enough_tasks) {
      blocks = min64(tiles(), enough_tasks);
      if (blocks * g.groups < enough_tasks) panels_a_group = 1;
    }
    panel_groups = ceil_div(panels.panels, panels_a_group);
    // As many tasks for each thread, where they are few.
    const int64_t threads = num_threads(), others = g.groups * panel_groups;
    if (blocks * others < 16 * threads) {
      blocks = min64(tiles(), round_up(blocks, threads / std::gcd(threads, others)));
    }
  }

  // Rows of one tap, where they lie as a tile wants them, are packed by the first tile of each panel.
  bool packs_in_tiles() const {
    return g.filter_column == 1 &&
           (taps_a_chunk() == 1 || g.vertical.count * g.horizontal.count == 1);
  }

  // Rows of a chunk: of one tap if it has enough channels, else of several.
  int64_t channels_a_chunk() const { return ceil_div(g.reduce, ceil_div(g.reduce, kChunkRows)); }
  // All pixels that meet one tap are cut into tiles together: worth a few more chunks.
  int64_t taps_a_chunk() const {
    constexpr int64_t kRowsOfOne = 128;
    return g.reduce >= kRowsOfOne ? 1 : max64(1, kChunkRows / g.reduce);
  }
  int64_t chunk_rows() const { return channels_a_chunk() * taps_a_chunk(); }

  // Calls body(region, first tile, last tile + 1) for each region that a part's tiles touch.
  template <class Body>
  void for_each_region_of(const Part& part, const Body& body) const {
    std::size_t at = 0;
    while (first_tile[at + 1] <= part.tile) ++at;
    for (int64_t tile = part.tile; tile < part.tile_end; ++at) {
      const int64_t end = min64(part.tile_end, first_tile[at + 1]);
      body(regions[at], tile - first_tile[at], end - first_tile[at]);
      tile = end;
    }
  }

  // While a panel of a chunk is used, its part of the next chunk comes from memory: that of the chunk's
  // rows (or columns, whichever are contiguous) which lie under it, a line of all of them a tile.
  void ask_for(const Chunk& now, const Chunk& next, const Part& part, int64_t panel,
               const float* filter, TapTile& t) const {
    t.ahead_lines = 0;
    if (part.kept) {
      // The next panel's rows of this chunk, or the first one's of the next.
      const bool last = panel + 1 == part.panel_end;
      if (last && next.tap == g.vertical.count * g.horizontal.count) return;
      const int64_t then = last ? part.panel : panel + 1;
      t.ahead = kept_rows(part, then, last ? next : now);
      t.ahead_step = panels.vectors_of(then) * V::kWidth;
      t.ahead_lines = max64(1, t.ahead_step / kLine);
      return;
    }
    const int64_t channels = channels_a_chunk();
    const int64_t columns =
        min64(g.columns, panels.first_column(part.panel_end)) - panels.first_column(part.panel);
    if (next.tap == g.vertical.count * g.horizontal.count || channels < 128) return;
    const bool by_rows = g.filter_column == 1;
    const int64_t contiguous = by_rows ? columns : channels;
    if (!by_rows && columns < channels) return;
    const int64_t lines = contiguous / kLine, panels_here = part.panel_end - part.panel;
    const int64_t line = lines * (panel - part.panel) / panels_here;
    t.ahead_lines = lines * (panel - part.panel + 1) / panels_here - line;
    t.ahead = panels.row_of(filter, part.group, part.panel, next.tap, next.c) + line * kLine;
    t.ahead_step = by_rows ? g.filter_reduce : g.filter_column;
  }

  // The first tile that comes packs the panel's rows of a chunk, as `packed`.
  void pack_in_tile(const Part& part, int64_t panel, int64_t tap, int64_t c, const float* filter,
                    const float* scale, float* packed, TapTile& t) const {
    t.packed = packed;
    t.unpacked = panels.row_of(filter, part.group, panel, tap, c);
    t.unpacked_step = g.filter_reduce;
    t.scales = scale ? scale + part.group * g.columns + panels.first_column(panel) : nullptr;
  }

  // Chunks of one tap: all pixels that meet it are cut into tiles together.
  void work_by_taps(const TapTiles<V>& tap_tiles, const Part& part, const float* filter,
                    const float* scale, float* chunk, int64_t* entries) const {
    const int64_t taps = g.vertical.count * g.horizontal.count;
    TapTile t{};
    const auto run = [&](const TapRegion& region, int64_t panel, int64_t panel_end,
                         const float* from, int64_t filter_rows) {
      const Span own{region.pixels_before(g, part.pixels.begin),
                     region.pixels_before(g, part.pixels.end)};
      const int64_t tile_end = ceil_div(own.size(), tap_tiles.rows());
      tap_tiles.run(region, own, part.group, panel, panel_end, 0, tile_end, from, filter_rows, t);
    };
    // Where a tap does not meet all pixels, sums begin before the first tap and end behind the last.
    const TapRegion everything{0, g.out_h, 0, g.out_w, 0, 0, 0, 0};
    bool apart = taps == 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      apart |= region_of_tap(g, tap).pixels(1) < g.out_h * g.out_w;
    }
    const auto pass = [&](bool first, bool last) {
      t.first = first;
      t.last = last;
      t.taps = t.ahead_lines = 0;
      run(everything, part.panel, part.panel_end, nullptr, 0);
    };
    if (apart) pass(true, false);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const TapRegion region = region_of_tap(g, tap);
      if (region.pixels_before(g, part.pixels.begin) == region.pixels_before(g, part.pixels.end)) {
        continue;
      }
      for (int64_t c = 0; c < g.reduce; c += channels_a_chunk()) {
        const int64_t c_end = min64(g.reduce, c + channels_a_chunk());
        const int64_t rows_here = c_end - c;
        const bool packs = !part.kept && packs_in_tiles();
        if (!packs && !part.kept) {
          panels.pack(filter, scale, part.group, part.panel, part.panel_end, tap, tap + 1, c, c_end,
                      chunk, rows_here, 0);
        }
        t.first = !apart && tap == 0 && c == 0;
        t.last = !apart && tap + 1 == taps && c_end == g.reduce;
        const Chunk next = c_end < g.reduce ? Chunk{tap, c_end} : Chunk{tap + 1, 0};
        const int64_t first = panels.first_column(part.panel);
        tap_tiles.list_taps(region, tap, tap + 1, c, c_end, entries, t);
        for (int64_t panel = part.panel; panel < part.panel_end; ++panel) {
          float* const own = chunk + (panels.first_column(panel) - first) * rows_here;
          t.streams = panel == part.panel;
          ask_for({tap, c}, next, part, panel, filter, t);
          if (packs) pack_in_tile(part, panel, tap, c, filter, scale, own, t);
          run(region, panel, panel + 1, part.kept ? kept_rows(part, panel, {tap, c}) : own,
              rows_here);
        }
      }
    }
    if (apart && g.relu) pass(false, true);
  }

  void work_by_chunks(const TapTiles<V>& tap_tiles, const Part& part, const float* filter,
                      const float* scale, float* chunk, int64_t* entries) const {
    const int64_t taps = g.vertical.count * g.horizontal.count;
    TapTile t{};
    // A sum without taps is still written.
    for (int64_t tap = 0; tap == 0 || tap < taps; tap += taps_a_chunk()) {
      const int64_t tap_end = min64(taps, tap + taps_a_chunk());
      for (int64_t c = 0; c < g.reduce; c += channels_a_chunk()) {
        const int64_t c_end = min64(g.reduce, c + channels_a_chunk());
        const int64_t rows_here = (tap_end - tap) * (c_end - c);
        const bool packs = !part.kept && packs_in_tiles();
        if (!packs && !part.kept) {
          panels.pack(filter, scale, part.group, part.panel, part.panel_end, tap, tap_end, c, c_end,
                      chunk, rows_here, 0);
        }
        t.first = tap == 0 && c == 0;
        t.last = tap_end >= taps && c_end == g.reduce;
        const Chunk next = c_end < g.reduce ? Chunk{tap, c_end} : Chunk{tap_end, 0};
        const int64_t first = panels.first_column(part.panel);
        for (int64_t panel = part.panel; panel < part.panel_end; ++panel) {
          float* const own = chunk + (panels.first_column(panel) - first) * rows_here;
          t.streams = panel == part.panel;
          ask_for({tap, c}, next, part, panel, filter, t);
          if (packs) pack_in_tile(part, panel, tap, c, filter, scale, own, t);
          for_each_region_of(part, [&](const TapRegion& region, int64_t tile, int64_t tile_end) {
            tap_tiles.list_taps(region, tap, tap_end, c, c_end, entries, t);
            // Where a region meets none of the taps, sums at most begin or end.
            if (t.taps == 0 && !t.first && !t.last) return;
            float* const packed = t.packed;
            const int64_t ahead_lines = t.ahead_lines;
            if (t.taps == 0) {
              t.packed = nullptr;
              t.ahead_lines = 0;
            }
            tap_tiles.run(region, {0, region.pixels(g.images)}, part.group, panel, panel + 1, tile,
                          tile_end, part.kept ? kept_rows(part, panel, {tap, c}) : own, rows_here,
                          t);
            if (t.taps == 0) {
              t.packed = packed;
              t.ahead_lines = ahead_lines;
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
  g.relu = p.activation != Activation::linear;
  g.ceiling = ceiling_of(p.activation);
  return g;
}

// The residues, by the stride, of what taps add to an index. Taps have them in turn.
struct TapResidues {
  int64_t stride, dilation;
  int64_t period;  // how many taps on the next one of the same residue is
  int64_t count;   // of residues

  TapResidues(int64_t taps, int64_t stride, int64_t dilation)
      : stride(stride), dilation(dilation), period(stride / std::gcd(stride, dilation)),
        count(min64(taps, period)) {}
  int64_t of_tap(int64_t tap) const { return tap * dilation % stride; }
  // Which residue an index has, counted in the order of the taps; -1 for one of no tap.
  int64_t find(int64_t index) const {
    for (int64_t i = 0; i < count; ++i) {
      if (of_tap(i) == index % stride) return i;
    }
    return -1;
  }
};

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

// dgrad of one residue class of input pixels, but for its taps and its size.
inline TapConvolution dgrad_taps(const Conv2dProblem& p) {
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
  return g;
}

// Calls body(convolution, first float of its outputs) for each residue class of input pixels.
template <class Body>
void for_each_dgrad_class(const Conv2dProblem& p, const Body& body) {
  TapConvolution g = dgrad_taps(p);
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

// fprop's filter as a runner takes it, of operands that keep it.
template <class V>
FilterForms::Floats kept_panels(const TapConvolutionRunner<V>& runner, const Conv2dProblem& p,
                                const Conv2dOperands& t) {
  const auto& panels = runner.panels;
  return t.packed->in_layout({"direct", V::kWidth, panels.panels, p.groups},
                             static_cast<std::size_t>(panels.bytes()),
                             [&](float* packed) { panels.pack_all(t.filter, t.scale, packed); });
}

template <class V>
void implicit_gemm_fprop(const Conv2dProblem& p, const Conv2dOperands& t) {
  const TapConvolutionRunner<V> runner(fprop_taps(p));
  FilterForms::Floats kept;
  if (t.packed) kept = kept_panels(runner, p, t);
  runner.execute(t.x, t.filter, t.scale, t.bias, t.residual, t.out, kept.get());
}

// The filter of dgrad packed for all classes of pixels that meet taps, one behind the other: in the order of the
// taps' residues, whatever the padding and the size of the images are.
template <class V>
class DgradForm {
  using Panels = FilterPanels<V, kGemmVectors<V>>;

 public:
  const int64_t shares;  // of all classes

  DgradForm(const Conv2dProblem& problem, int64_t shares)
      : shares(shares), p_(problem), rows_(p_.r, p_.stride_h, p_.dilation_h),
        columns_(p_.s, p_.stride_w, p_.dilation_w) {
    for_each_class([&](const Panels& panels) {
      offsets_.push_back(floats_);
      floats_ += panels.bytes() / 4;
      panels_ = panels.panels;
    });
  }

  FilterForms::Floats of(const FilterForms& forms, const float* filter) const {
    const FilterForms::Layout layout{"direct dgrad",
                                     V::kWidth,
                                     panels_,
                                     p_.groups,
                                     {p_.stride_h, p_.stride_w, p_.dilation_h, p_.dilation_w}};
    return forms.in_layout(layout, static_cast<std::size_t>(floats_ * 4), [&](float* packed) {
      std::size_t i = 0;
      for_each_class(
          [&](const Panels& panels) { panels.pack_all(filter, nullptr, packed + offsets_[i++]); });
    });
  }
  // Where the class of the pixel at (row, column) of the padded image has its panels, if it meets a tap.
  int64_t offset(int64_t row, int64_t column) const {
    const int64_t i = rows_.find(row), j = columns_.find(column);
    return i < 0 || j < 0 ? 0 : offsets_[static_cast<std::size_t>(i * columns_.count + j)];
  }

 private:
  template <class Body>
  void for_each_class(const Body& body) const {
    TapConvolution g = dgrad_taps(p_);
    for (int64_t i = 0; i < rows_.count; ++i) {
      g.vertical = residue_taps(p_.r, rows_.of_tap(i), 0, p_.stride_h, p_.dilation_h);
      for (int64_t j = 0; j < columns_.count; ++j) {
        g.horizontal = residue_taps(p_.s, columns_.of_tap(j), 0, p_.stride_w, p_.dilation_w);
        body(Panels(g, shares));
      }
    }
  }

  Conv2dProblem p_;
  TapResidues rows_, columns_;
  int64_t panels_ = 0, floats_ = 0;
  std::vector<int64_t> offsets_;
};

template <class V>
void implicit_gemm_dgrad(const Conv2dProblem& p, const Conv2dOperands& t) {
  using Runner = TapConvolutionRunner<V>;
  std::optional<DgradForm<V>> form;
  FilterForms::Floats kept;
  for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t first) {
    float* const dx = t.out + first;
    if (!t.packed) return Runner(g).execute(t.dy, t.filter, nullptr, nullptr, nullptr, dx);
    if (!form) {  // the first class has the most pixels
      form.emplace(p, Runner(g).shares);
      kept = form->of(*t.packed, t.filter);
    }
    const int64_t row = first / p.c / p.w, column = first / p.c % p.w;
    Runner(g, form->shares)
        .execute(t.dy, t.filter, nullptr, nullptr, nullptr, dx,
                 kept.get() + form->offset(p.pad_top + row, p.pad_left + column));
  });
}

}  // namespace
}  // namespace fastconv::cpu
