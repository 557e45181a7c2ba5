// Max- and average-pooling, forward and backward, in both layouts; no tensor is transposed as a whole.
//
// Vectors run along channels: a window's taps are registers of their own, whatever the stride. Of
// NCHW, a task takes a strip of as many planes as a vector has lanes (of one image or several), turns
// it in registers so that the lanes are the planes, does the same to it, and turns the results back.
// Windows that meet padding are clipped.
//
// Max: the first maximum in row-major order wins, a NaN in the window is the result. Average: the
// sum of the window's rows, each summed by itself, over the number of taps inside the input.
// Backward, every input pixel sums the shares of the windows above it in a fixed order: no atomics.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/streaming.hpp"
#include "cpu/transpose.hpp"

namespace fastconv::cpu {
namespace {

// The taps of a window at `origin` (negative: in the padding) that meet an input of `extent`.
inline Span taps_inside(int64_t origin, int64_t window, int64_t extent) {
  return {max64(0, -origin), min64(window, extent - origin)};
}

// The windows that see an input position, `at` counted from the padding's edge.
inline Span windows_over(int64_t at, int64_t window, int64_t stride, int64_t windows) {
  return {at < window ? 0 : (at - window) / stride + 1, min64(windows, at / stride + 1)};
}

// The windows that lie inside the input as a whole.
inline Span windows_inside(int64_t pad, int64_t window, int64_t stride, int64_t extent,
                           int64_t windows) {
  const int64_t begin = min64(windows, ceil_div(pad, stride));
  const int64_t room = extent + pad - window;
  return {begin, max64(begin, room < 0 ? 0 : min64(windows, room / stride + 1))};
}

// All lanes of a vector, or the first few.
template <class V>
struct AllLanes {
  typename V::Reg load(const float* p) const { return V::load(p); }
  void store(float* p, typename V::Reg v) const { V::store(p, v); }
  template <class Index>
  typename V::Int load_index(const Index* p) const {
    return V::load_index(p);
  }
  template <class Index>
  void store_index(Index* p, typename V::Int v) const {
    V::store_index(p, v);
  }
};

// All lanes, stored past the caches.
template <class V>
struct StreamedLanes : AllLanes<V> {
  void store(float* p, typename V::Reg v) const { V::stream(p, v); }
};

template <class V>
struct SomeLanes {
  typename V::Tail tail;
  explicit SomeLanes(int64_t count) : tail(V::tail(static_cast<int>(count))) {}
  typename V::Reg load(const float* p) const { return V::load(p, tail); }
  void store(float* p, typename V::Reg v) const { V::store(p, v, tail); }
  template <class Index>
  typename V::Int load_index(const Index* p) const {
    return V::load_index(p, tail);
  }
  template <class Index>
  void store_index(Index* p, typename V::Int v) const {
    V::store_index(p, v, tail);
  }
};

// Calls body(element, lanes) for a range of elements, a vector at a time.
template <class V, class Whole = AllLanes<V>, class Body>
void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  for (; begin + V::kWidth <= end; begin += V::kWidth) body(begin, Whole{});
  if (begin < end) body(begin, SomeLanes<V>(end - begin));
}

// Floats read or written that make a task worth handing to another thread.
constexpr int64_t kPoolFloatsATask = 16384;

// Rows of work as tasks: neighbouring rows together, or parts of a row where rows are few.
struct RowTasks {
  int64_t rows, parts, rows_a_task;

  RowTasks(int64_t rows_given, int64_t row_floats, int64_t most_parts) : rows(rows_given) {
    const int64_t enough = 4 * int64_t{num_threads()};
    parts = 1;
    if (rows < enough && rows > 0) {
      parts =
          max64(1, min64(min64(most_parts, ceil_div(enough, rows)), row_floats / kPoolFloatsATask));
    }
    rows_a_task =
        parts > 1 ? 1 : max64(1, min64(ceil_div(kPoolFloatsATask, max64(row_floats, 1)), rows));
  }
  int64_t count() const { return ceil_div(rows, rows_a_task) * parts; }

  // Calls body(row, part) for what a task holds.
  template <class Body>
  void run(int64_t task, const Body& body) const {
    const int64_t first = task / parts * rows_a_task;
    for (int64_t row = first; row < min64(rows, first + rows_a_task); ++row) {
      body(row, task % parts);
    }
  }
};

// --- strips of planes ------------------------------------------------------------------------------

// A strip holds V::kWidth planes as NHWC does channels, strip[pixel][plane]; transpose_tile takes it back
// to the planes. planes[k][0 .. pixels) to a strip, k below `count`; spare lanes get zeros.
template <class V, class T>
void to_strip(const T* planes, int64_t plane_elements, int64_t count, int64_t pixels, T* strip) {
  if (count < V::kWidth) {
    std::memset(strip, 0, static_cast<std::size_t>(pixels * V::kWidth) * sizeof(T));
  }
  transpose_tile<V>(count, pixels, planes, plane_elements, strip, V::kWidth);
}

// --- what a window makes of its taps ------------------------------------------------------------
//
// A forward policy computes the outputs from `at` on. vector<R, S>(load(r, s), at, lanes) has a window of R x S
// taps, all of which exist. vectors<Vectors>(load(r, s, v), rows, columns, at, lanes) has one of any extent, of
// which these taps exist, and as many vectors: each waits for its own last addition or comparison, and memory is
// read in runs.

template <class V, class Index>  // Index void: no argmax
struct MaxForward {
  float* y;
  Index* argmax;
  int64_t window_columns;

  template <int R, int S, class Load, class Lanes>
  void vector(const Load& load, int64_t at, const Lanes& lanes) const {
    typename V::Reg best = load(0, 0);
    if constexpr (std::is_void_v<Index>) {
      // Two values a comparison: whether either is NaN.
      typename V::Reg waiting = best;
      typename V::Mask nan = V::unordered(best, best);
      int count = 0;
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int s = 0; s < S; ++s, ++count) {
          if (count == 0) continue;
          const typename V::Reg value = load(r, s);
          best = V::max(value, best);
          if (count == 1) {
            nan = V::unordered(waiting, value);
          } else if (count % 2 == 1) {
            nan = V::mask_or(nan, V::unordered(waiting, value));
          }
          waiting = value;
        }
      if constexpr (R * S % 2 == 1) nan = V::mask_or(nan, V::unordered(waiting, waiting));
      lanes.store(y + at, V::select(nan, V::set(std::numeric_limits<float>::quiet_NaN()), best));
    } else {
      typename V::Int tap = V::int_broadcast(0);
#pragma GCC unroll 9
      for (int next = 1; next < R * S; ++next) {
        const typename V::Reg value = load(next / S, next % S);
        const auto better = V::greater_or_first_nan(value, best);
        best = V::select(better, value, best);
        tap = V::int_select(better, V::int_broadcast(next), tap);
      }
      lanes.store(y + at, best);
      lanes.store_index(argmax + at, tap);
    }
  }

  template <int Vectors, class Load, class Lanes>
  void vectors(const Load& load, Span rows, Span columns, int64_t at, const Lanes& lanes) const {
    constexpr bool kTellsTap = !std::is_void_v<Index>;
    typename V::Reg best[Vectors];
    typename V::Mask nan[Vectors];  // without argmax
    typename V::Int tap[Vectors];   // with one
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      best[v] = load(rows.begin, columns.begin, v);
      nan[v] = V::unordered(best[v], best[v]);
      tap[v] = V::int_broadcast(static_cast<int>(rows.begin * window_columns + columns.begin));
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t s = columns.begin; s < columns.end; ++s) {
        const auto here = V::int_broadcast(static_cast<int>(r * window_columns + s));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const typename V::Reg value = load(r, s, v);
          if constexpr (kTellsTap) {
            const auto better = V::greater_or_first_nan(value, best[v]);
            best[v] = V::select(better, value, best[v]);
            tap[v] = V::int_select(better, here, tap[v]);
          } else {
            best[v] = V::max(value, best[v]);
            nan[v] = V::mask_or(nan[v], V::unordered(value, value));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t to = at + v * V::kWidth;
      if constexpr (kTellsTap) {
        lanes.store(y + to, best[v]);
        lanes.store_index(argmax + to, tap[v]);
      } else {
        lanes.store(y + to,
                    V::select(nan[v], V::set(std::numeric_limits<float>::quiet_NaN()), best[v]));
      }
    }
  }

  MaxForward with_results(float* strip, float* index_strip) const {
    return {strip, reinterpret_cast<Index*>(index_strip), window_columns};
  }
  // Strips' results to the planes from `at` on.
  template <class W>
  void take_results(const MaxForward& strip, int64_t planes, int64_t pixels, int64_t at,
                    int64_t plane_floats) const {
    transpose_tile<W>(pixels, planes, strip.y, W::kWidth, y + at, plane_floats);
    if constexpr (!std::is_void_v<Index>) {
      transpose_tile<W>(pixels, planes, strip.argmax, W::kWidth, argmax + at, plane_floats);
    }
  }
};

// What a convolution with a 2 x 2 pooling behind it ends with: y = the maximum of the four values of a
// window, in row-major order, after their ReLU and its ceiling where `relu` is set; the first `count`
// lanes are stored. `argmax` may be null. By value, for they are to stay in registers.
template <class V>
[[gnu::always_inline]] inline void max_of_four(typename V::Reg first, typename V::Reg second,
                                               typename V::Reg third, typename V::Reg fourth,
                                               bool relu, float ceiling, int count, float* y,
                                               std::uint8_t* argmax) {
  using Reg = typename V::Reg;
  if (relu) {
    // The others need none: what is not above a positive value, or zero, is not taken.
    first = V::relu(first);
    if (ceiling < std::numeric_limits<float>::infinity()) {
      const Reg most = V::set(ceiling);
      first = V::min(most, first);
      second = V::min(most, second);
      third = V::min(most, third);
      fourth = V::min(most, fourth);
    }
  }
  const bool whole = count == V::kWidth;
  const auto tail = V::tail(count);
  Reg best = first;
  if (argmax) {
    auto tap = V::int_broadcast(0);
    const auto take = [&](Reg value, int at) __attribute__((always_inline)) {
      const auto better = V::greater_or_first_nan(value, best);
      best = V::select(better, value, best);
      tap = V::int_select(better, V::int_broadcast(at), tap);
    };
    take(second, 1);
    take(third, 2);
    take(fourth, 3);
    if (whole) {
      V::store_index(argmax, tap);
    } else {
      V::store_index(argmax, tap, tail);
    }
  } else {
    const auto nan = V::mask_or(V::unordered(first, second), V::unordered(third, fourth));
    best = V::max(fourth, V::max(third, V::max(second, first)));
    best = V::select(nan, V::set(std::numeric_limits<float>::quiet_NaN()), best);
  }
  if (whole) {
    V::store(y, best);
  } else {
    V::store(y, best, tail);
  }
}

template <class V>
struct AverageForward {
  float* y;

  template <int R, int S, class Load, class Lanes>
  void vector(const Load& load, int64_t at, const Lanes& lanes) const {
    typename V::Reg sum = V::zero();
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      typename V::Reg row_sum = load(r, 0);
#pragma GCC unroll 3
      for (int s = 1; s < S; ++s) row_sum = V::add(row_sum, load(r, s));
      sum = r == 0 ? row_sum : V::add(sum, row_sum);
    }
    lanes.store(y + at, V::divide(sum, V::set(static_cast<float>(R * S))));
  }

  template <int Vectors, class Load, class Lanes>
  void vectors(const Load& load, Span rows, Span columns, int64_t at, const Lanes& lanes) const {
    typename V::Reg sum[Vectors], row_sum[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[v] = V::zero();
    for (int64_t r = rows.begin; r < rows.end; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) row_sum[v] = load(r, columns.begin, v);
      for (int64_t s = columns.begin + 1; s < columns.end; ++s) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) row_sum[v] = V::add(row_sum[v], load(r, s, v));
      }
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sum[v] = r == rows.begin ? row_sum[v] : V::add(sum[v], row_sum[v]);
      }
    }
    const typename V::Reg taps = V::set(static_cast<float>(rows.size() * columns.size()));
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      lanes.store(y + at + v * V::kWidth, V::divide(sum[v], taps));
    }
  }

  AverageForward with_results(float* strip, float*) const { return {strip}; }
  template <class W>
  void take_results(const AverageForward& strip, int64_t planes, int64_t pixels, int64_t at,
                    int64_t plane_floats) const {
    transpose_tile<W>(pixels, planes, strip.y, W::kWidth, y + at, plane_floats);
  }
};

// A backward policy has load(at, lanes), which loads what it needs of the windows at `at`. The result's
// at_tap(tap, scale) is what they give to the input pixels below their tap `tap`; `scale` is 1 over the
// number of a window's taps inside the input.

template <class V, class Index, bool Masked>
struct MaxBackward {
  static constexpr bool kScales = false;
  const float* dy;
  const float* y;  // where it is positive dy goes through; null: everywhere
  const Index* argmax;

  struct Loaded {
    typename V::Reg dy;
    typename V::Int chosen;
    typename V::Reg at_tap(int tap, float) const {
      return V::select(V::int_equal(chosen, V::int_broadcast(tap)), dy, V::zero());
    }
  };
  template <class Lanes>
  Loaded load(int64_t at, const Lanes& lanes) const {
    typename V::Reg value = lanes.load(dy + at);
    if constexpr (Masked) value = V::where_positive(lanes.load(y + at), value);
    return {value, lanes.load_index(argmax + at)};
  }

  // The policy of a strip: dy and argmax of some planes from `at` on.
  template <class W>
  MaxBackward turned(int64_t at, int64_t plane_floats, int64_t planes, int64_t pixels, float* strip,
                     float* index_strip) const {
    Index* const indices = reinterpret_cast<Index*>(index_strip);
    to_strip<W>(dy + at, plane_floats, planes, pixels, strip);
    to_strip<W>(argmax + at, plane_floats, planes, pixels, indices);
    float* const mask = index_strip + pixels * W::kWidth;
    if constexpr (Masked) to_strip<W>(y + at, plane_floats, planes, pixels, mask);
    return {strip, mask, indices};
  }
};

template <class V>
struct AverageBackward {
  static constexpr bool kScales = true;
  const float* dy;

  struct Loaded {
    typename V::Reg dy;
    typename V::Reg at_tap(int, float scale) const { return V::multiply(dy, V::set(scale)); }
  };
  template <class Lanes>
  Loaded load(int64_t at, const Lanes& lanes) const {
    return {lanes.load(dy + at)};
  }

  template <class W>
  AverageBackward turned(int64_t at, int64_t plane_floats, int64_t planes, int64_t pixels,
                         float* strip, float*) const {
    to_strip<W>(dy + at, plane_floats, planes, pixels, strip);
    return {strip};
  }
};

// --- rows -----------------------------------------------------------------------------------------

// Where the channels of pixel (i, j) of an image begin, from a tensor's or a strip's start.
struct Pixels {
  int64_t base, row, pixel;
  int64_t at(int64_t i, int64_t j) const { return base + i * row + j * pixel; }
};

inline void clear(float* at, int64_t floats) {
  std::memset(at, 0, static_cast<std::size_t>(floats) * 4);
}

inline float one_over(Span rows, Span columns) {
  return 1.0f / static_cast<float>(rows.size() * columns.size());
}

// Whether windows ask for what they will meet, of tensors that no cache holds. Those of R x S taps, a row of
// them for what the next row meets: rows end before the hardware has begun to ask ahead of them, unless they are
// long. Of any extent, R = 0, for their next pixels.
template <int R>
bool pool_asks(const Pool2dProblem& p) {
  constexpr int64_t kLongRow = 8192;
  if (R == 0) return beyond_caches(p.x_size());
  return p.w * p.c <= kLongRow && beyond_caches((p.x_size() + p.y_size()) / 4 * 3);
}

// Asks for what the windows of the next row meet and those of this one do not, below the window of R x S taps
// whose first tap is at `corner`. `in` has no gaps between pixels.
template <int R, int S>
inline __attribute__((always_inline)) void ask_below_window(const Pool2dProblem& p,
                                                            const float* corner, const Pixels& in) {
  const int64_t floats = min64(p.stride_w, S) * in.pixel;
  const float* below = corner + max64(p.stride_h, R) * in.row;
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r, below += in.row) {
    if (r == p.stride_h) break;
    for (int64_t at = 0; at < floats; at += kLine) __builtin_prefetch(below + at, 0, 2);
  }
}

// Output row i, channels `channels`, of one image.
template <class V, class Policy, int R, int S>
void pool_row(const Pool2dProblem& p, int64_t i, const float* x, const Pixels& in,
              const Pixels& out, Span channels, bool asks, bool streams, const Policy& policy) {
  const int64_t top = i * p.stride_h - p.pad_top;
  const Span rows = taps_inside(top, p.r, p.h);
  const Policy own = policy;  // copies, which no store can change
  const int64_t in_row = in.row, in_pixel = in.pixel, out_pixel = out.pixel;
  const int64_t step = p.stride_w, pad = p.pad_left, begin = channels.begin, end = channels.end;
  const auto clipped = [&](auto asks_ahead, int64_t j_begin, int64_t j_end) {
    int64_t at = out.at(i, j_begin);
    for (int64_t j = j_begin; j < j_end; ++j, at += out_pixel) {
      const int64_t left = j * step - pad;
      const Span columns = taps_inside(left, p.s, p.w);
      const float* const corner = x + in.at(top, left);
      const auto take = [&](auto vectors, int64_t channel, const auto& lanes) {
        const float* const first = corner + channel;
        const auto load = [&](int64_t r, int64_t s, int v) __attribute__((always_inline)) {
          const float* const from = first + r * in_row + s * in_pixel + v * V::kWidth;
          constexpr int64_t kAhead = 16;  // pixels, which lie too far apart for the hardware
          if (asks_ahead && v * V::kWidth % kLine == 0) {
            __builtin_prefetch(from + kAhead * in_pixel, 0, 2);
          }
          return lanes.load(from);
        };
        own.template vectors<vectors>(load, rows, columns, at + channel, lanes);
      };
      constexpr int kVectors = 4;
      int64_t channel = begin;
      for (; channel + kVectors * V::kWidth <= end; channel += kVectors * V::kWidth) {
        take(std::integral_constant<int, kVectors>{}, channel, AllLanes<V>{});
      }
      for_each_vector<V>(channel, end, [&](int64_t rest, const auto& lanes) {
        take(std::integral_constant<int, 1>{}, rest, lanes);
      });
    }
  };
  if constexpr (R == 0) {
    as_constant(asks, [&](auto asks_ahead) { clipped(asks_ahead, 0, p.ow); });
  } else {
    if (rows.size() < p.r) return clipped(std::false_type{}, 0, p.ow);
    const Span inside = windows_inside(p.pad_left, p.s, p.stride_w, p.w, p.ow);
    clipped(std::false_type{}, 0, inside.begin);
    const auto whole = [&](auto asks_below, auto streamed) {
      using Whole = std::conditional_t<streamed, StreamedLanes<V>, AllLanes<V>>;
      const float* corner = x + in.at(top, inside.begin * step - pad);
      int64_t at = out.at(i, inside.begin);
      for (int64_t j = inside.begin; j < inside.end;
           ++j, corner += step * in_pixel, at += out_pixel) {
        if constexpr (asks_below) ask_below_window<R, S>(p, corner, in);
        for_each_vector<V, Whole>(begin, end, [&](int64_t channel, const auto& lanes) {
          const float* const first = corner + channel;
          const auto load = [&](int64_t r, int64_t s) {
            return lanes.load(first + r * in_row + s * in_pixel);
          };
          own.template vector<R, S>(load, at + channel, lanes);
        });
      }
    };
    as_constant(asks, [&](auto asks_below) {
      as_constant(streams, [&](auto streamed) { whole(asks_below, streamed); });
    });
    clipped(std::false_type{}, inside.end, p.ow);
  }
}

// Windows that do not overlap: row i of them writes the input rows from its own to the next one's.
// `in` has no gaps between pixels.
template <class V, class Policy, int R, int S>
void pool_grad_apart(const Pool2dProblem& p, int64_t i, const Pixels& out, const Policy& policy,
                     float* dx, const Pixels& in) {
  const int64_t c = in.pixel;
  const int64_t top = i * p.stride_h - p.pad_top;
  const Span rows = taps_inside(top, p.r, p.h);
  const auto clear_rows = [&](int64_t begin, int64_t end) {
    if (begin < end) clear(dx + in.at(begin, 0), (end - begin) * in.row);
  };
  if (i == 0) clear_rows(0, top + rows.begin);
  clear_rows(top + rows.end, i + 1 == p.oh ? p.h : top + p.stride_h);
  int64_t done = 0;  // columns written
  const auto clear_columns = [&](int64_t end) {
    if (end <= done) return;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      clear(dx + in.at(top + r, done), (end - done) * c);
    }
  };
  for (int64_t j = 0; j < p.ow; ++j) {
    const int64_t left = j * p.stride_w - p.pad_left;
    const Span columns = taps_inside(left, p.s, p.w);
    clear_columns(left + columns.begin);
    done = left + columns.end;
    const float scale = Policy::kScales ? one_over(rows, columns) : 0;
    const int64_t at = out.at(i, j);
    if (R > 0 && rows.size() == R && columns.size() == S) {
      float* const corner = dx + in.at(top, left);
      for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
        const auto window = policy.load(at + channel, lanes);
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int s = 0; s < S; ++s) {
            float* const to = corner + channel + r * in.row + s * c;
            // A row of windows writes several streams, of which the processor prefetches too little.
            constexpr int64_t kAhead = 128;
            if constexpr (V::kWidth > 1) __builtin_prefetch(to + kAhead, 1);
            lanes.store(to, window.at_tap(r * S + s, scale));
          }
      });
      continue;
    }
    // Of some channels pixel by pixel, in memory's order; what is read again is in the first-level cache.
    if (c >= max64(24, 3 * V::kWidth)) {
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t s = columns.begin; s < columns.end; ++s) {
          float* const to = dx + in.at(top + r, left + s);
          const int tap = static_cast<int>(r * p.s + s);
          for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
            lanes.store(to + channel, policy.load(at + channel, lanes).at_tap(tap, scale));
          });
        }
      continue;
    }
    for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
      const auto window = policy.load(at + channel, lanes);
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t s = columns.begin; s < columns.end; ++s) {
          lanes.store(dx + in.at(top + r, left + s) + channel,
                      window.at_tap(static_cast<int>(r * p.s + s), scale));
        }
    });
  }
  clear_columns(p.w);
}

// A window over an input pixel, and the tap that the pixel is to it.
struct Share {
  int64_t at;
  int tap;
  float scale;
};

template <class V, int Count, class Policy>
void add_shares(const Policy& policy, const Share* shares, int64_t c, float* out) {
  for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
    typename V::Reg sum = V::zero();
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      const auto window = policy.load(shares[i].at + channel, lanes);
      const typename V::Reg share = window.at_tap(shares[i].tap, shares[i].scale);
      sum = i == 0 ? share : V::add(sum, share);
    }
    lanes.store(out + channel, sum);
  });
}

// Windows that overlap: every input pixel asks those above it.
template <class V, class Policy>
struct OverlappingGrad {
  const Pool2dProblem& p;
  const Policy& policy;
  float* dx;
  Pixels in, out;

  // Input rows are taken by the stride: row i of them begins with the first row of window row i.
  static int64_t count_rows(const Pool2dProblem& p) {
    return ceil_div(p.h + p.pad_top, p.stride_h);
  }
  static Span input_rows(const Pool2dProblem& p, int64_t i) {
    const int64_t top = i * p.stride_h - p.pad_top;
    return {max64(0, top), min64(p.h, top + p.stride_h)};
  }

  void row(int64_t i) const {
    const Span rows = input_rows(p, i);
    if (p.r == 3 && p.s == 3 && p.stride_h == 2 && p.stride_w == 2 && rows.size() == 2 &&
        usable(i - 1, p.pad_top, p.r, p.stride_h, p.h, p.oh) &&
        usable(i, p.pad_top, p.r, p.stride_h, p.h, p.oh)) {
      return cells(i, rows);
    }
    for (int64_t h = rows.begin; h < rows.end; ++h)
      for (int64_t w = 0; w < p.w; ++w) pixel(h, w);
  }

 private:
  // Whether there is a window i, and, where its share depends on it, all of it inside.
  static bool usable(int64_t i, int64_t pad, int64_t window, int64_t stride, int64_t extent,
                     int64_t windows) {
    if (i < 0 || i >= windows) return false;
    return !Policy::kScales || taps_inside(i * stride - pad, window, extent).size() == window;
  }

  void pixel(int64_t h, int64_t w) const {
    const Span is = windows_over(h + p.pad_top, p.r, p.stride_h, p.oh);
    const Span js = windows_over(w + p.pad_left, p.s, p.stride_w, p.ow);
    const auto share = [&](int64_t i, int64_t j) {
      const int64_t top = i * p.stride_h - p.pad_top, left = j * p.stride_w - p.pad_left;
      const float scale =
          Policy::kScales ? one_over(taps_inside(top, p.r, p.h), taps_inside(left, p.s, p.w)) : 0;
      return Share{out.at(i, j), static_cast<int>((h - top) * p.s + w - left), scale};
    };
    const int64_t c = in.pixel;
    float* const to = dx + in.at(h, w);
    const int64_t count = max64(0, is.size()) * max64(0, js.size());
    if (count == 0) return clear(to, c);
    if (is.size() <= 2 && js.size() <= 2) {
      Share shares[4];
      int found = 0;
      for (int64_t i = is.begin; i < is.end; ++i)
        for (int64_t j = js.begin; j < js.end; ++j) shares[found++] = share(i, j);
      if (count == 1) add_shares<V, 1>(policy, shares, c, to);
      if (count == 2) add_shares<V, 2>(policy, shares, c, to);
      if (count == 4) add_shares<V, 4>(policy, shares, c, to);
      return;
    }
    for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
      typename V::Reg sum = V::zero();
      for (int64_t i = is.begin; i < is.end; ++i)
        for (int64_t j = js.begin; j < js.end; ++j) {
          const Share from = share(i, j);
          const auto window = policy.load(from.at + channel, lanes);
          sum = V::add(sum, window.at_tap(from.tap, from.scale));
        }
      lanes.store(to + channel, sum);
    });
  }

  // 3 x 3 windows of stride 2: two by two pixels have four windows above them, each loaded once.
  void cells(int64_t i, Span rows) const {
    int64_t done = 0;  // columns written
    for (int64_t j = 1; j < p.ow; ++j) {
      const int64_t left = j * 2 - p.pad_left;
      if (left < 0 || left + 2 > p.w || !usable(j - 1, p.pad_left, 3, 2, p.w, p.ow) ||
          !usable(j, p.pad_left, 3, 2, p.w, p.ow)) {
        continue;
      }
      for (; done < left; ++done) {
        for (int64_t h = rows.begin; h < rows.end; ++h) pixel(h, done);
      }
      done = left + 2;
      const int64_t windows = out.at(i - 1, j - 1);
      float* const to = dx + in.at(rows.begin, left);
      constexpr float kNinth = 1.0f / 9;
      for_each_vector<V>(0, in.pixel, [&](int64_t channel, const auto& lanes) {
        const auto nw = policy.load(windows + channel, lanes);
        const auto ne = policy.load(windows + out.pixel + channel, lanes);
        const auto sw = policy.load(windows + out.row + channel, lanes);
        const auto se = policy.load(windows + out.row + out.pixel + channel, lanes);
        float* const at = to + channel;
        const typename V::Reg north = V::add(nw.at_tap(8, kNinth), ne.at_tap(6, kNinth));
        lanes.store(at, V::add(V::add(north, sw.at_tap(2, kNinth)), se.at_tap(0, kNinth)));
        lanes.store(at + in.pixel, V::add(ne.at_tap(7, kNinth), se.at_tap(1, kNinth)));
        lanes.store(at + in.row, V::add(sw.at_tap(5, kNinth), se.at_tap(3, kNinth)));
        lanes.store(at + in.row + in.pixel, se.at_tap(4, kNinth));
      });
    }
    for (; done < p.w; ++done) {
      for (int64_t h = rows.begin; h < rows.end; ++h) pixel(h, done);
    }
  }
};

inline bool windows_overlap(const Pool2dProblem& p) {
  return (p.stride_h < p.r && p.oh > 1) || (p.stride_w < p.s && p.ow > 1);
}

// The first input row of window row i, of windows that do not overlap; rows above the first window
// and below the last one are theirs too.
inline int64_t first_row_of(const Pool2dProblem& p, int64_t i) {
  if (i <= 0) return 0;
  return i >= p.oh ? p.h : i * p.stride_h - p.pad_top;
}

// --- NHWC -----------------------------------------------------------------------------------------

template <class V, class Policy, int R, int S>
void pool_fprop_nhwc(const Pool2dProblem& p, const float* x, const Policy& policy) {
  const int64_t vectors = ceil_div(p.c, V::kWidth);
  const RowTasks tasks(p.n * p.oh, min64(p.r, p.h) * min64(p.w, p.ow * p.s) * p.c, vectors);
  const bool asks = pool_asks<R>(p);
  const bool streams = R > 0 && streams_pixels(policy.y, p.c, p.x_size() + p.y_size());
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t part) {
      const int64_t n = row / p.oh;
      const Span own = part_of(vectors, tasks.parts, part);
      const Span channels{own.begin * V::kWidth, min64(p.c, own.end * V::kWidth)};
      pool_row<V, Policy, R, S>(p, row % p.oh, x, {n * p.h * p.w * p.c, p.w * p.c, p.c},
                                {n * p.oh * p.ow * p.c, p.ow * p.c, p.c}, channels, asks, streams,
                                policy);
    });
    if (streams) V::drain();
  });
}

template <class V, class Policy, int R, int S>
void pool_bprop_nhwc(const Pool2dProblem& p, const Policy& policy, float* dx) {
  const bool overlap = windows_overlap(p);
  const int64_t rows = overlap ? OverlappingGrad<V, Policy>::count_rows(p) : p.oh;
  const RowTasks tasks(p.n * rows, ceil_div(p.h, rows) * p.w * p.c, 1);
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t) {
      const int64_t n = row / rows;
      const Pixels in{n * p.h * p.w * p.c, p.w * p.c, p.c};
      const Pixels out{n * p.oh * p.ow * p.c, p.ow * p.c, p.c};
      if (overlap) {
        OverlappingGrad<V, Policy>{p, policy, dx, in, out}.row(row % rows);
      } else {
        pool_grad_apart<V, Policy, R, S>(p, row % rows, out, policy, dx, in);
      }
    });
  });
}

// --- NCHW -----------------------------------------------------------------------------------------

// The strips of an NCHW problem: V::kWidth planes, and rows of them such that scratch memory stays in
// the caches next to the core.
template <class V>
struct PlaneStrips {
  int64_t planes, blocks;      // blocks of planes
  int64_t rows, rows_a_strip;  // of windows, or of input rows
  int64_t strips;              // of a block

  PlaneStrips(const Pool2dProblem& p, int64_t rows_given, int64_t floats_a_row)
      : planes(p.n * p.c), blocks(ceil_div(planes, V::kWidth)), rows(rows_given) {
    constexpr int64_t kFloatsAStrip = 16384;
    rows_a_strip = max64(1, min64(rows, kFloatsAStrip / max64(floats_a_row * V::kWidth, 1)));
    const int64_t enough = 4 * int64_t{num_threads()};
    if (blocks * ceil_div(rows, rows_a_strip) < enough) {
      rows_a_strip = max64(1, min64(rows_a_strip, rows * blocks / enough));
    }
    strips = ceil_div(rows, rows_a_strip);
  }
  int64_t tasks() const { return blocks * strips; }
  int64_t first_plane(int64_t task) const { return task / strips * V::kWidth; }
  int64_t planes_of(int64_t task) const { return min64(V::kWidth, planes - first_plane(task)); }
  Span rows_of(int64_t task) const {
    const int64_t begin = task % strips * rows_a_strip;
    return {begin, min64(rows, begin + rows_a_strip)};
  }
};

// A pointer that the strip's row `first` would have row 0 at: rows are counted as in the image.
inline Pixels strip_pixels(int64_t first_row, int64_t columns, int64_t width) {
  return {-first_row * columns * width, columns * width, width};
}

template <class V, class Policy, int R, int S>
void pool_fprop_nchw(const Pool2dProblem& p, const float* x, const Policy& policy) {
  constexpr int64_t kWidth = V::kWidth;
  const PlaneStrips<V> strips(p, p.oh, min64(p.stride_h, p.r) * p.w);
  const int64_t in_rows = min64(p.h, (strips.rows_a_strip - 1) * p.stride_h + p.r);
  const int64_t in_floats = in_rows * p.w * kWidth;
  const int64_t out_floats = strips.rows_a_strip * p.ow * kWidth;
  // Of the argmax too, of four bytes at most.
  const int64_t scratch_floats = round_up(in_floats + 2 * out_floats, 16);
  const int workers = workers_for(strips.tasks());
  const Workspace workspace(static_cast<std::size_t>(workers * scratch_floats * 4));
  parallel_for(strips.tasks(), workers, [&](int64_t task, int worker) {
    float* const in = workspace.floats() + worker * scratch_floats;
    const int64_t plane = strips.first_plane(task), count = strips.planes_of(task);
    const Span rows = strips.rows_of(task);
    const int64_t first = max64(0, rows.begin * p.stride_h - p.pad_top);
    const int64_t end = min64(p.h, (rows.end - 1) * p.stride_h - p.pad_top + p.r);
    to_strip<V>(x + (plane * p.h + first) * p.w, p.h * p.w, count, (end - first) * p.w, in);
    const Policy own = policy.with_results(in + in_floats, in + in_floats + out_floats);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      pool_row<V, Policy, R, S>(p, i, in, strip_pixels(first, p.w, kWidth),
                                strip_pixels(rows.begin, p.ow, kWidth), {0, kWidth}, false, false,
                                own);
    }
    policy.template take_results<V>(own, count, rows.size() * p.ow,
                                    (plane * p.oh + rows.begin) * p.ow, p.oh * p.ow);
  });
}

template <class V, class Policy, int R, int S>
void pool_bprop_nchw(const Pool2dProblem& p, const Policy& policy, float* dx) {
  using Overlapping = OverlappingGrad<V, Policy>;
  constexpr int64_t kWidth = V::kWidth;
  const bool overlap = windows_overlap(p);
  const PlaneStrips<V> strips(p, overlap ? Overlapping::count_rows(p) : p.oh,
                              min64(p.h, p.stride_h) * p.w);
  // Rows of windows over a strip, and its input rows; the last rows of an image, below all windows,
  // belong to the last window row.
  const int64_t most_windows =
      overlap ? min64(p.oh, strips.rows_a_strip + ceil_div(p.r, p.stride_h)) : strips.rows_a_strip;
  const int64_t most_rows = min64(p.h, (strips.rows_a_strip + 1) * p.stride_h + p.r);
  const int64_t windows_floats = most_windows * p.ow * kWidth;
  // dy, its argmax and, of a fused ReLU, y.
  const int64_t scratch_floats = round_up(3 * windows_floats + most_rows * p.w * kWidth, 16);
  const int workers = workers_for(strips.tasks());
  const Workspace workspace(static_cast<std::size_t>(workers * scratch_floats * 4));
  parallel_for(strips.tasks(), workers, [&](int64_t task, int worker) {
    float* const scratch = workspace.floats() + worker * scratch_floats;
    float* const to = scratch + 3 * windows_floats;
    const int64_t plane = strips.first_plane(task), count = strips.planes_of(task);
    const Span at = strips.rows_of(task);
    Span rows{first_row_of(p, at.begin), first_row_of(p, at.end)};
    Span windows = at;
    if (overlap) {
      rows = {Overlapping::input_rows(p, at.begin).begin,
              Overlapping::input_rows(p, at.end - 1).end};
      windows = {windows_over(rows.begin + p.pad_top, p.r, p.stride_h, p.oh).begin,
                 windows_over(rows.end - 1 + p.pad_top, p.r, p.stride_h, p.oh).end};
    }
    const Policy own = policy.template turned<V>((plane * p.oh + windows.begin) * p.ow, p.oh * p.ow,
                                                 count, max64(0, windows.size()) * p.ow, scratch,
                                                 scratch + windows_floats);
    const Pixels out = strip_pixels(windows.begin, p.ow, kWidth);
    const Pixels in = strip_pixels(rows.begin, p.w, kWidth);
    for (int64_t i = at.begin; i < at.end; ++i) {
      if (overlap) {
        Overlapping{p, own, to, in, out}.row(i);
      } else {
        pool_grad_apart<V, Policy, R, S>(p, i, out, own, to, in);
      }
    }
    transpose_tile<V>(rows.size() * p.w, count, to, kWidth, dx + (plane * p.h + rows.begin) * p.w,
                      p.h * p.w);
  });
}

// --- which of them --------------------------------------------------------------------------------

// An NCHW problem whose vectors have one lane: its planes are NHWC images of one channel.
inline Pool2dProblem as_single_channels(Pool2dProblem p) {
  p.n *= p.c;
  p.c = 1;
  p.layout = Layout::nhwc;
  return p;
}

template <class V, class Policy, int R, int S>
void pool_fprop(const Pool2dProblem& p, const float* x, const Policy& policy) {
  if (p.layout == Layout::nhwc) return pool_fprop_nhwc<V, Policy, R, S>(p, x, policy);
  if constexpr (V::kWidth == 1) {
    pool_fprop_nhwc<V, Policy, R, S>(as_single_channels(p), x, policy);
  } else {
    pool_fprop_nchw<V, Policy, R, S>(p, x, policy);
  }
}

template <class V, class Policy>
void pool_fprop(const Pool2dProblem& p, const float* x, const Policy& policy) {
  if (p.r == 2 && p.s == 2) return pool_fprop<V, Policy, 2, 2>(p, x, policy);
  if (p.r == 3 && p.s == 3) return pool_fprop<V, Policy, 3, 3>(p, x, policy);
  pool_fprop<V, Policy, 0, 0>(p, x, policy);
}

template <class V, class Policy, int R, int S>
void pool_bprop(const Pool2dProblem& p, const Policy& policy, float* dx) {
  if (p.layout == Layout::nhwc) return pool_bprop_nhwc<V, Policy, R, S>(p, policy, dx);
  if constexpr (V::kWidth == 1) {
    pool_bprop_nhwc<V, Policy, R, S>(as_single_channels(p), policy, dx);
  } else {
    pool_bprop_nchw<V, Policy, R, S>(p, policy, dx);
  }
}

template <class V, class Policy>
void pool_bprop(const Pool2dProblem& p, const Policy& policy, float* dx) {
  if (p.r == 2 && p.s == 2) return pool_bprop<V, Policy, 2, 2>(p, policy, dx);
  pool_bprop<V, Policy, 0, 0>(p, policy, dx);
}

// Calls body(a pointer of argmax's type).
template <class Void, class Body>
void with_argmax_type(const Pool2dProblem& p, Void* argmax, const Body& body) {
  if (p.argmax_fits_byte()) {
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const std::uint8_t*, std::uint8_t*>>(
        argmax));
  } else {
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const std::int32_t*, std::int32_t*>>(
        argmax));
  }
}

template <class V>
void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  if (!argmax) return pool_fprop<V>(p, x, MaxForward<V, void>{y, nullptr, p.s});
  with_argmax_type(p, argmax, [&]<class Index>(Index* index) {
    pool_fprop<V>(p, x, MaxForward<V, Index>{y, index, p.s});
  });
}

template <class V>
void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const float* y, const void* argmax,
                      float* dx) {
  with_argmax_type(p, argmax, [&]<class Index>(const Index* index) {
    if (y) {
      pool_bprop<V>(p, MaxBackward<V, Index, true>{dy, y, index}, dx);
    } else {
      pool_bprop<V>(p, MaxBackward<V, Index, false>{dy, nullptr, index}, dx);
    }
  });
}

template <class V>
void avg_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y) {
  pool_fprop<V>(p, x, AverageForward<V>{y});
}

template <class V>
void avg_pool2d_bprop(const Pool2dProblem& p, const float* dy, float* dx) {
  pool_bprop<V>(p, AverageBackward<V>{dy}, dx);
}

}  // namespace
}  // namespace fastconv::cpu
