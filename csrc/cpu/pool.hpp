// Max- and average-pooling, forward and backward, in both layouts without a transposition.
//
// NHWC: vectors run along channels; a window's taps are registers of their own. NCHW: vectors run
// along output columns; with stride 2 two loads and a permutation make one. Windows that meet
// padding are clipped, which NCHW does an output at a time.
//
// Max: the first maximum in row-major order wins, a NaN in the window is the result. Average: the
// sum of the window's rows, each summed by itself, over the number of taps inside the input.
// Backward, every input pixel sums the shares of the windows above it in a fixed order: no atomics.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// Input positions or window taps begin .. end - 1.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

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
  typename V::Int load_index(const Index* p) const { return V::load_index(p); }
  template <class Index>
  void store_index(Index* p, typename V::Int v) const { V::store_index(p, v); }
};

template <class V>
struct SomeLanes {
  typename V::Tail tail;
  explicit SomeLanes(int64_t count) : tail(V::tail(static_cast<int>(count))) {}
  typename V::Reg load(const float* p) const { return V::load(p, tail); }
  void store(float* p, typename V::Reg v) const { V::store(p, v, tail); }
  template <class Index>
  typename V::Int load_index(const Index* p) const { return V::load_index(p, tail); }
  template <class Index>
  void store_index(Index* p, typename V::Int v) const { V::store_index(p, v, tail); }
};

// Calls body(element, lanes) for a range of elements, a vector at a time.
template <class V, class Body>
void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  for (; begin + V::kWidth <= end; begin += V::kWidth) body(begin, AllLanes<V>{});
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
      parts = max64(1, min64(min64(most_parts, ceil_div(enough, rows)),
                             row_floats / kPoolFloatsATask));
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

// --- what a window makes of its taps ------------------------------------------------------------
//
// A forward policy has vector<R, S>(load(r, s), rows, columns, at, lanes), which computes the
// outputs from `at` on. R and S are the window's extent where all of it is inside, else 0.

template <class V, class Index>  // Index void: no argmax
struct MaxForward {
  float* y;
  Index* argmax;
  int64_t window_columns;

  template <int R, int S, class Load, class Lanes>
  void vector(const Load& load, Span rows, Span columns, int64_t at, const Lanes& lanes) const {
    if constexpr (R > 0) {
      rows = {0, R};
      columns = {0, S};
    }
    typename V::Reg best = load(rows.begin, columns.begin);
    if constexpr (std::is_void_v<Index>) {
      // Two values a comparison: whether either is NaN.
      typename V::Reg waiting = best;
      typename V::Mask nan = V::unordered(best, best);
      int64_t count = 0;
#pragma GCC unroll 3
      for (int64_t r = rows.begin; r < rows.end; ++r)
#pragma GCC unroll 3
        for (int64_t s = columns.begin; s < columns.end; ++s, ++count) {
          if (count == 0) continue;
          const typename V::Reg value = load(r, s);
          best = V::max(value, best);
          if (R == 0 || count % 2 == 1) {
            if (R > 0 && count == 1) {
              nan = V::unordered(waiting, value);
            } else {
              nan = V::mask_or(nan, V::unordered(waiting, value));
            }
          }
          waiting = value;
        }
      if constexpr (R * S % 2 == 1) nan = V::mask_or(nan, V::unordered(waiting, waiting));
      lanes.store(y + at,
                  V::select(nan, V::set(std::numeric_limits<float>::quiet_NaN()), best));
    } else {
      typename V::Int tap = V::int_broadcast(
          static_cast<int>(rows.begin * window_columns + columns.begin));
#pragma GCC unroll 3
      for (int64_t r = rows.begin; r < rows.end; ++r)
#pragma GCC unroll 3
        for (int64_t s = columns.begin; s < columns.end; ++s) {
          const typename V::Reg value = load(r, s);
          const auto better = V::greater_or_first_nan(value, best);
          best = V::select(better, value, best);
          tap = V::int_select(better, V::int_broadcast(static_cast<int>(r * window_columns + s)),
                              tap);
        }
      lanes.store(y + at, best);
      lanes.store_index(argmax + at, tap);
    }
  }

  template <class Load>
  void single(const Load& load, Span rows, Span columns, int64_t at) const {
    float best = load(rows.begin, columns.begin);
    int64_t tap = rows.begin * window_columns + columns.begin;
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t s = columns.begin; s < columns.end; ++s) {
        const float value = load(r, s);
        if (value > best || (value != value && best == best)) {
          best = value;
          tap = r * window_columns + s;
        }
      }
    y[at] = best;
    if constexpr (!std::is_void_v<Index>) argmax[at] = static_cast<Index>(tap);
  }

  // Of `count` contiguous floats, which are one window.
  void whole(const float* x, int64_t count, int64_t at) const {
    typename V::Reg best = V::set(x[0]);
    typename V::Mask nan = V::unordered(best, best);
    int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) {
      const typename V::Reg value = V::load(x + i);
      best = V::max(value, best);
      nan = V::mask_or(nan, V::unordered(value, value));
    }
    float lanes[V::kWidth], nans[V::kWidth];
    V::store(lanes, best);
    V::store(nans, V::select(nan, V::set(1), V::zero()));
    float largest = x[0];
    bool any_nan = false;
    for (int lane = 0; lane < V::kWidth; ++lane) {
      if (lanes[lane] > largest) largest = lanes[lane];
      any_nan = any_nan || nans[lane] != 0;
    }
    for (; i < count; ++i) {
      if (x[i] > largest) largest = x[i];
      any_nan = any_nan || x[i] != x[i];
    }
    int64_t first = 0;
    if (any_nan) {
      while (x[first] == x[first]) ++first;
    } else {
      while (x[first] != largest) ++first;
    }
    y[at] = x[first];
    if constexpr (!std::is_void_v<Index>) argmax[at] = static_cast<Index>(first);
  }
};

template <class V>
struct AverageForward {
  float* y;

  template <int R, int S, class Load, class Lanes>
  void vector(const Load& load, Span rows, Span columns, int64_t at, const Lanes& lanes) const {
    if constexpr (R > 0) {
      rows = {0, R};
      columns = {0, S};
    }
    typename V::Reg sum = V::zero();
#pragma GCC unroll 3
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      typename V::Reg row_sum = load(r, columns.begin);
#pragma GCC unroll 3
      for (int64_t s = columns.begin + 1; s < columns.end; ++s) {
        row_sum = V::add(row_sum, load(r, s));
      }
      sum = r == rows.begin ? row_sum : V::add(sum, row_sum);
    }
    lanes.store(y + at, V::divide(sum, V::set(taps(rows, columns))));
  }

  template <class Load>
  void single(const Load& load, Span rows, Span columns, int64_t at) const {
    float sum = 0;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      float row_sum = load(r, columns.begin);
      for (int64_t s = columns.begin + 1; s < columns.end; ++s) row_sum += load(r, s);
      sum = r == rows.begin ? row_sum : sum + row_sum;
    }
    y[at] = sum / taps(rows, columns);
  }

  void whole(const float* x, int64_t count, int64_t at) const {
    typename V::Reg sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 4 * V::kWidth <= count; i += 4 * V::kWidth)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = V::add(sum[v], V::load(x + i + v * V::kWidth));
    for (; i + V::kWidth <= count; i += V::kWidth) sum[0] = V::add(sum[0], V::load(x + i));
    float total = V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    for (; i < count; ++i) total += x[i];
    y[at] = total / static_cast<float>(count);
  }

  static float taps(Span rows, Span columns) {
    return static_cast<float>(rows.size() * columns.size());
  }
};

// A backward policy has share(at, tap, scale, lanes): what the windows at `at` give to the input
// pixels below their tap `tap`; `scale` is 1 over the number of a window's taps inside the input.

template <class V, class Index>
struct MaxBackward {
  static constexpr bool kScales = false;
  const float* dy;
  const Index* argmax;

  template <class Lanes>
  struct Loaded {
    typename V::Reg dy;
    typename V::Int chosen;
    typename V::Reg at_tap(int tap, float) const {
      return V::select(V::int_equal(chosen, V::int_broadcast(tap)), dy, V::zero());
    }
  };
  template <class Lanes>
  Loaded<Lanes> load(int64_t at, const Lanes& lanes) const {
    return {lanes.load(dy + at), lanes.load_index(argmax + at)};
  }
  float single(int64_t at, int64_t tap, float) const {
    return static_cast<int64_t>(argmax[at]) == tap ? dy[at] : 0.0f;
  }
};

template <class V>
struct AverageBackward {
  static constexpr bool kScales = true;
  const float* dy;

  template <class Lanes>
  struct Loaded {
    typename V::Reg dy;
    typename V::Reg at_tap(int, float scale) const { return V::multiply(dy, V::set(scale)); }
  };
  template <class Lanes>
  Loaded<Lanes> load(int64_t at, const Lanes& lanes) const {
    return {lanes.load(dy + at)};
  }
  float single(int64_t at, int64_t, float scale) const { return dy[at] * scale; }
};

inline float one_over(Span rows, Span columns) {
  return 1.0f / static_cast<float>(rows.size() * columns.size());
}

// --- NHWC -----------------------------------------------------------------------------------------

template <class V, class Policy, int R, int S>
void pool_rows_nhwc(const Pool2dProblem& p, const float* x, const Policy& policy) {
  const int64_t row_floats = p.w * p.c, c = p.c;
  const int64_t most_parts = ceil_div(c, V::kWidth);
  const RowTasks tasks(p.n * p.oh, min64(p.r, p.h) * min64(p.w, p.ow * p.s) * c, most_parts);
  const Span inside = windows_inside(p.pad_left, p.s, p.stride_w, p.w, p.ow);
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t part) {
      const int64_t n = row / p.oh, i = row % p.oh;
      const int64_t c_begin = most_parts * part / tasks.parts * V::kWidth;
      const int64_t c_end = min64(c, most_parts * (part + 1) / tasks.parts * V::kWidth);
      const int64_t top = i * p.stride_h - p.pad_top;
      const Span rows = taps_inside(top, p.r, p.h);
      const float* image = x + n * p.h * row_floats;
      const auto clipped = [&](int64_t j_begin, int64_t j_end) {
        for (int64_t j = j_begin; j < j_end; ++j) {
          const int64_t left = j * p.stride_w - p.pad_left;
          const Span columns = taps_inside(left, p.s, p.w);
          const int64_t at = (row * p.ow + j) * c;
          for_each_vector<V>(c_begin, c_end, [&](int64_t channel, const auto& lanes) {
            const auto load = [&](int64_t r, int64_t s) {
              return lanes.load(image + (top + r) * row_floats + (left + s) * c + channel);
            };
            policy.template vector<0, 0>(load, rows, columns, at + channel, lanes);
          });
        }
      };
      if (R == 0 || rows.size() < p.r) {
        clipped(0, p.ow);
        return;
      }
      clipped(0, inside.begin);
      for (int64_t j = inside.begin; j < inside.end; ++j) {
        const float* corner = image + top * row_floats + (j * p.stride_w - p.pad_left) * c;
        const int64_t at = (row * p.ow + j) * c;
        for_each_vector<V>(c_begin, c_end, [&](int64_t channel, const auto& lanes) {
          const float* first = corner + channel;
          const auto load = [&](int64_t r, int64_t s) {
            return lanes.load(first + r * row_floats + s * c);
          };
          policy.template vector<R, S>(load, {}, {}, at + channel, lanes);
        });
      }
      clipped(inside.end, p.ow);
    });
  });
}

inline void clear(float* at, int64_t floats) {
  std::memset(at, 0, static_cast<std::size_t>(floats) * 4);
}

// Windows that do not overlap: each window writes the pixels below it, from one load of its dy. A
// task owns the input rows from a window's to the next one's.
template <class V, class Policy, int R, int S>
void pool_grad_apart_nhwc(const Pool2dProblem& p, const Policy& policy, float* dx) {
  const int64_t row_floats = p.w * p.c, c = p.c;
  const RowTasks tasks(p.n * p.oh, max64(p.h / p.oh, 1) * row_floats, 1);
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t) {
      const int64_t n = row / p.oh, i = row % p.oh;
      const int64_t top = i * p.stride_h - p.pad_top;
      const Span rows = taps_inside(top, p.r, p.h);
      float* image = dx + n * p.h * row_floats;
      const int64_t band_end = i + 1 == p.oh ? p.h : max64(0, top + p.stride_h);
      float* first = image + (top + rows.begin) * row_floats;
      float* behind = image + (top + rows.end) * row_floats;
      if (i == 0) clear(image, (top + rows.begin) * row_floats);
      clear(behind, image + band_end * row_floats - behind);
      int64_t done = 0;  // columns written
      const auto clear_columns = [&](int64_t end) {
        if (end == done) return;
        for (int64_t r = 0; r < rows.size(); ++r) {
          clear(first + r * row_floats + done * c, (end - done) * c);
        }
      };
      for (int64_t j = 0; j < p.ow; ++j) {
        const int64_t left = j * p.stride_w - p.pad_left;
        const Span columns = taps_inside(left, p.s, p.w);
        clear_columns(left + columns.begin);
        done = left + columns.end;
        const float scale = Policy::kScales ? one_over(rows, columns) : 0;
        const int64_t at = (row * p.ow + j) * c;
        if (R > 0 && rows.size() == R && columns.size() == S) {
          float* const corner = first + left * c;
          for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
            const auto window = policy.load(at + channel, lanes);
#pragma GCC unroll 3
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
              for (int s = 0; s < S; ++s) {
                lanes.store(corner + channel + r * row_floats + s * c,
                            window.at_tap(r * S + s, scale));
              }
          });
          continue;
        }
        for_each_vector<V>(0, c, [&](int64_t channel, const auto& lanes) {
          const auto window = policy.load(at + channel, lanes);
          for (int64_t r = rows.begin; r < rows.end; ++r)
            for (int64_t s = columns.begin; s < columns.end; ++s) {
              lanes.store(image + (top + r) * row_floats + (left + s) * c + channel,
                          window.at_tap(static_cast<int>(r * p.s + s), scale));
            }
        });
      }
      clear_columns(p.w);
    });
  });
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
void pool_grad_overlapping_nhwc(const Pool2dProblem& p, const Policy& policy, float* dx) {
  const RowTasks tasks(p.n * p.h, p.w * p.c, 1);
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t) {
      const int64_t n = row / p.h, h = row % p.h;
      const Span is = windows_over(h + p.pad_top, p.r, p.stride_h, p.oh);
      const auto share = [&](int64_t i, int64_t j, int64_t w) {
        const int64_t top = i * p.stride_h - p.pad_top, left = j * p.stride_w - p.pad_left;
        const float scale = Policy::kScales ? one_over(taps_inside(top, p.r, p.h),
                                                       taps_inside(left, p.s, p.w))
                                            : 0;
        return Share{((n * p.oh + i) * p.ow + j) * p.c,
                     static_cast<int>((h - top) * p.s + w - left), scale};
      };
      for (int64_t w = 0; w < p.w; ++w) {
        const Span js = windows_over(w + p.pad_left, p.s, p.stride_w, p.ow);
        float* const out = dx + (row * p.w + w) * p.c;
        const int64_t count = max64(0, is.size()) * max64(0, js.size());
        if (count == 0) {
          clear(out, p.c);
          continue;
        }
        if (is.size() <= 2 && js.size() <= 2) {
          Share shares[4];
          int found = 0;
          for (int64_t i = is.begin; i < is.end; ++i)
            for (int64_t j = js.begin; j < js.end; ++j) shares[found++] = share(i, j, w);
          if (count == 1) add_shares<V, 1>(policy, shares, p.c, out);
          if (count == 2) add_shares<V, 2>(policy, shares, p.c, out);
          if (count == 4) add_shares<V, 4>(policy, shares, p.c, out);
          continue;
        }
        for_each_vector<V>(0, p.c, [&](int64_t channel, const auto& lanes) {
          typename V::Reg sum = V::zero();
          for (int64_t i = is.begin; i < is.end; ++i)
            for (int64_t j = js.begin; j < js.end; ++j) {
              const Share from = share(i, j, w);
              const auto window = policy.load(from.at + channel, lanes);
              sum = V::add(sum, window.at_tap(from.tap, from.scale));
            }
          lanes.store(out + channel, sum);
        });
      }
    });
  });
}

// --- NCHW -----------------------------------------------------------------------------------------

// The floats p[0], p[Stride], p[2 * Stride] ... of `count` lanes; nothing behind the last is read.
// Stride 0: `stride`.
template <class V, int Stride>
typename V::Reg load_strided(const float* p, int64_t stride, int64_t count) {
  if constexpr (Stride == 1) {
    if (count == V::kWidth) return V::load(p);
    return V::load(p, V::tail(static_cast<int>(count)));
  }
  if constexpr (Stride == 2) {
    if (count == V::kWidth) return V::load_even(p);
  }
  float lanes[V::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i * stride];
  return V::load(lanes);
}

// One window a plane.
inline bool is_global(const Pool2dProblem& p) {
  return p.r == p.h && p.s == p.w && p.oh == 1 && p.ow == 1 && p.pad_top == 0 && p.pad_left == 0;
}

template <class V, class Policy, int R, int S, int Stride>
void pool_rows_nchw(const Pool2dProblem& p, const float* x, const Policy& policy) {
  const int64_t planes = p.n * p.c;
  if (is_global(p)) {
    const RowTasks tasks(planes, p.h * p.w, 1);
    parallel_for(tasks.count(), [&](int64_t task) {
      tasks.run(task, [&](int64_t plane, int64_t) {
        policy.whole(x + plane * p.h * p.w, p.h * p.w, plane);
      });
    });
    return;
  }
  const RowTasks tasks(planes * p.oh, min64(p.r, p.h) * min64(p.w, p.ow * p.s), 1);
  const Span inside = windows_inside(p.pad_left, p.s, p.stride_w, p.w, p.ow);
  parallel_for(tasks.count(), [&](int64_t task) {
    tasks.run(task, [&](int64_t row, int64_t) {
      const int64_t plane = row / p.oh, i = row % p.oh;
      const int64_t top = i * p.stride_h - p.pad_top;
      const Span rows = taps_inside(top, p.r, p.h);
      const float* const image = x + plane * p.h * p.w;
      const auto clipped = [&](int64_t j_begin, int64_t j_end) {
        for (int64_t j = j_begin; j < j_end; ++j) {
          const int64_t left = j * p.stride_w - p.pad_left;
          const auto load = [&](int64_t r, int64_t s) {
            return image[(top + r) * p.w + left + s];
          };
          policy.single(load, rows, taps_inside(left, p.s, p.w), row * p.ow + j);
        }
      };
      clipped(0, inside.begin);
      for_each_vector<V>(inside.begin, inside.end, [&](int64_t j, const auto& lanes) {
        const float* const corner = image + top * p.w + j * p.stride_w - p.pad_left;
        const int64_t count = min64(V::kWidth, inside.end - j);
        const auto load = [&](int64_t r, int64_t s) {
          if constexpr (std::is_same_v<std::decay_t<decltype(lanes)>, AllLanes<V>>) {
            return load_strided<V, Stride>(corner + r * p.w + s, p.stride_w, V::kWidth);
          } else {
            return load_strided<V, Stride>(corner + r * p.w + s, p.stride_w, count);
          }
        };
        if (R > 0 && rows.size() == R) {
          policy.template vector<R, S>(load, {}, {}, row * p.ow + j, lanes);
        } else {
          policy.template vector<0, 0>(load, rows, {0, p.s}, row * p.ow + j, lanes);
        }
      });
      clipped(inside.end, p.ow);
    });
  });
}

// An input row gathers from the windows above it. Columns of one residue (column + pad) % stride
// meet the taps s of that residue, and then neighbouring columns neighbouring windows: sums are
// kept a residue apart, [residue][column / stride], and interleaved at the end.
template <class V, class Policy>
void pool_grad_nchw(const Pool2dProblem& p, const Policy& policy, float* dx) {
  const int64_t planes = p.n * p.c;
  if (is_global(p)) {
    const RowTasks tasks(planes, p.h * p.w, 1);
    parallel_for(tasks.count(), [&](int64_t task) {
      tasks.run(task, [&](int64_t plane, int64_t) {
        float* const out = dx + plane * p.h * p.w;
        if constexpr (Policy::kScales) {
          const float value = policy.single(plane, 0, one_over({0, p.h}, {0, p.w}));
          for_each_vector<V>(0, p.h * p.w, [&](int64_t at, const auto& lanes) {
            lanes.store(out + at, V::set(value));
          });
        } else {
          clear(out, p.h * p.w);
          const int64_t tap = static_cast<int64_t>(policy.argmax[plane]);
          if (tap >= 0 && tap < p.h * p.w) out[tap] = policy.dy[plane];
        }
      });
    });
    return;
  }
  const int64_t residues = min64(p.stride_w, p.s);
  const int64_t length = round_up(p.ow + p.s / p.stride_w + 2, 16);
  const int64_t scratch_floats = residues * length + (Policy::kScales ? round_up(p.ow, 16) : 0);
  const RowTasks tasks(planes * p.h, p.w, 1);
  const int workers = workers_for(tasks.count());
  const Workspace workspace(static_cast<std::size_t>(workers * scratch_floats * 4));
  parallel_for(tasks.count(), workers, [&](int64_t task, int worker) {
    float* const sums = workspace.floats() + worker * scratch_floats;
    float* const scales = sums + residues * length;
    tasks.run(task, [&](int64_t row, int64_t) {
      const int64_t plane = row / p.h, h = row % p.h;
      clear(sums, residues * length);
      const Span is = windows_over(h + p.pad_top, p.r, p.stride_h, p.oh);
      for (int64_t i = is.begin; i < is.end; ++i) {
        const int64_t top = i * p.stride_h - p.pad_top;
        if constexpr (Policy::kScales) {
          const Span rows = taps_inside(top, p.r, p.h);
          for (int64_t j = 0; j < p.ow; ++j) {
            scales[j] =
                one_over(rows, taps_inside(j * p.stride_w - p.pad_left, p.s, p.w));
          }
        }
        const int64_t at = (plane * p.oh + i) * p.ow;
        for_each_vector<V>(0, p.ow, [&](int64_t j, const auto& lanes) {
          const auto window = policy.load(at + j, lanes);
          for (int64_t s = 0; s < p.s; ++s) {
            float* const sum = sums + s % p.stride_w * length + s / p.stride_w + j;
            typename V::Reg share;
            if constexpr (Policy::kScales) {
              share = V::multiply(window.dy, lanes.load(scales + j));
            } else {
              share = window.at_tap(static_cast<int>((h - top) * p.s + s), 0);
            }
            lanes.store(sum, V::add(lanes.load(sum), share));
          }
        });
      }
      float* const out = dx + row * p.w;
      if (p.stride_w == 1) {
        std::memcpy(out, sums + p.pad_left, static_cast<std::size_t>(p.w) * 4);
        return;
      }
      if (p.stride_w == 2 && residues == 2 && p.pad_left == 0) {
        const int64_t pairs = p.w / 2;
        int64_t q = 0;
        for (; q + V::kWidth <= pairs; q += V::kWidth) {
          V::store_interleaved(out + 2 * q, V::load(sums + q), V::load(sums + length + q));
        }
        for (; q < pairs; ++q) {
          out[2 * q] = sums[q];
          out[2 * q + 1] = sums[length + q];
        }
        if (p.w % 2) out[p.w - 1] = sums[pairs];
        return;
      }
      int64_t residue = p.pad_left % p.stride_w, q = p.pad_left / p.stride_w;
      for (int64_t w = 0; w < p.w; ++w) {
        out[w] = residue < residues ? sums[residue * length + q] : 0.0f;
        if (++residue == p.stride_w) {
          residue = 0;
          ++q;
        }
      }
    });
  });
}

// --- which of them --------------------------------------------------------------------------------

template <class V, class Policy>
void pool_fprop(const Pool2dProblem& p, const float* x, const Policy& policy) {
  const bool two = p.r == 2 && p.s == 2, three = p.r == 3 && p.s == 3;
  if (p.layout == Layout::nhwc) {
    if (two) return pool_rows_nhwc<V, Policy, 2, 2>(p, x, policy);
    if (three) return pool_rows_nhwc<V, Policy, 3, 3>(p, x, policy);
    return pool_rows_nhwc<V, Policy, 0, 0>(p, x, policy);
  }
  if (p.stride_w == 2) {
    if (two) return pool_rows_nchw<V, Policy, 2, 2, 2>(p, x, policy);
    if (three) return pool_rows_nchw<V, Policy, 3, 3, 2>(p, x, policy);
    return pool_rows_nchw<V, Policy, 0, 0, 2>(p, x, policy);
  }
  if (p.stride_w == 1) return pool_rows_nchw<V, Policy, 0, 0, 1>(p, x, policy);
  pool_rows_nchw<V, Policy, 0, 0, 0>(p, x, policy);
}

template <class V, class Policy>
void pool_bprop(const Pool2dProblem& p, const Policy& policy, float* dx) {
  if (p.layout == Layout::nchw) return pool_grad_nchw<V, Policy>(p, policy, dx);
  if (p.stride_h < p.r || p.stride_w < p.s) {
    return pool_grad_overlapping_nhwc<V, Policy>(p, policy, dx);
  }
  if (p.r == 2 && p.s == 2) return pool_grad_apart_nhwc<V, Policy, 2, 2>(p, policy, dx);
  pool_grad_apart_nhwc<V, Policy, 0, 0>(p, policy, dx);
}

// Calls body(a pointer of argmax's type).
template <class Void, class Body>
void with_argmax_type(const Pool2dProblem& p, Void* argmax, const Body& body) {
  if (p.argmax_fits_byte()) {
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const std::uint8_t*,
                                        std::uint8_t*>>(argmax));
  } else {
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const std::int32_t*,
                                        std::int32_t*>>(argmax));
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
void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  with_argmax_type(p, argmax, [&]<class Index>(const Index* index) {
    pool_bprop<V>(p, MaxBackward<V, Index>{dy, index}, dx);
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
