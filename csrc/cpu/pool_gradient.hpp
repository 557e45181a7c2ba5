// wgrad and dgrad of a convolution with 2 x 2 max-pooling behind it, from the pooled gradient and its
// argmax. Of the four pixels of a window, one has a gradient in a channel, and none where ReLU is zero:
// the gradient of the convolution's output is for three quarters zeros at least. It is never made.
// Instead, every output channel has a list of what is not zero, by blocks of windows, and both gradients
// walk the lists:
//
//   wgrad: dfilter[tap, c, k] += x[pixel + tap, c] * value   the sums of k stay in registers
//   dgrad: dx[pixel + tap, c] += filter[tap, c, k] * value   the filter of k stays in registers
//
// Vectors run along input channels. The input under a block, padding included, is copied to a buffer
// that stays in the first-level cache, its channels cut into groups of a few vectors; dx has another.
//
// A task is a part of the images and some of the groups. The parts' sums are added up in order; how many
// parts there are rests on the problem alone: the same bits for any thread count.
#pragma once

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/transpose.hpp"
#include "cpu/wgrad.hpp"

namespace fastconv::cpu {
namespace {

// What of the gradient of the convolution's output is not zero.
struct Nonzero {
  float value;
  std::int32_t pixel;  // in the block's buffers
};

struct SparseTile {
  const Nonzero* lists;  // [k][capacity]
  const std::int32_t* counts;
  int64_t channels, capacity;  // output channels
  float* buffer;               // of the input or its gradient: [row][column][vector]
  int64_t row_floats;
  float* filter;          // or its gradient, [k][tap][vector], from the first row of the tile on
  int64_t filter_floats;  // of an output channel
  bool first;             // the filter's gradient is yet to be begun
};

template <class V>
constexpr int kSparseRegisters = V::kRegisters - 4;

// Rows of the filter, its columns, and vectors of channels.
template <class V, int Rows, int Columns, int Vectors, bool Wgrad>
void sparse_tile(const SparseTile& t) {
  constexpr int kRow = Columns * Vectors;
  float* const buffer = t.buffer;
  const int64_t row_floats = t.row_floats;
  for (int64_t k = 0; k < t.channels; ++k) {
    const Nonzero* at = t.lists + k * t.capacity;
    const Nonzero* const end = at + t.counts[k];
    float* const filter = t.filter + k * t.filter_floats;
    typename V::Reg own[Rows][kRow];
#pragma GCC unroll 5
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < kRow; ++i) {
        own[r][i] = Wgrad && t.first ? V::zero() : V::load(filter + (r * kRow + i) * V::kWidth);
      }
    for (; at != end; ++at) {
      const typename V::Reg value = V::broadcast(&at->value);
      float* pixel = buffer + int64_t{at->pixel} * (Vectors * V::kWidth);
#pragma GCC unroll 5
      for (int r = 0; r < Rows; ++r, pixel += row_floats)
#pragma GCC unroll 16
        for (int i = 0; i < kRow; ++i) {
          float* const there = pixel + i * V::kWidth;
          if constexpr (Wgrad) {
            own[r][i] = V::fma(value, V::load(there), own[r][i]);
          } else {
            V::store(there, V::fma(value, own[r][i], V::load(there)));
          }
        }
    }
    if constexpr (Wgrad) {
#pragma GCC unroll 5
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kRow; ++i) V::store(filter + (r * kRow + i) * V::kWidth, own[r][i]);
    }
  }
}

using SparseTileFunction = void (*)(const SparseTile&);

template <class V, int Rows, int Columns, int Vectors, bool Wgrad>
constexpr SparseTileFunction sparse_tile_if_it_fits() {
  if constexpr (Rows * Columns * Vectors <= kSparseRegisters<V>) {
    return sparse_tile<V, Rows, Columns, Vectors, Wgrad>;
  } else {
    return nullptr;
  }
}

constexpr int kMostSparseVectors = 2;

// By rows - 1 and vectors - 1; null where they do not fit in the registers.
template <class V, int Columns, bool Wgrad, std::size_t... I>
SparseTileFunction sparse_tile_of(int64_t rows, int64_t vectors, std::index_sequence<I...>) {
  static constexpr SparseTileFunction kTable[] = {
      sparse_tile_if_it_fits<V, int{I} / kMostSparseVectors + 1, Columns,
                             int{I} % kMostSparseVectors + 1, Wgrad>()...};
  return kTable[(rows - 1) * kMostSparseVectors + vectors - 1];
}

template <class V, bool Wgrad>
SparseTileFunction sparse_tile_function(int64_t rows, int64_t columns, int64_t vectors) {
  return columns == 3 ? sparse_tile_of<V, 3, Wgrad>(
                            rows, vectors, std::make_index_sequence<3 * kMostSparseVectors>{})
                      : sparse_tile_of<V, 5, Wgrad>(
                            rows, vectors, std::make_index_sequence<5 * kMostSparseVectors>{});
}

template <class V>
struct PoolGradient {
  // `p` is as for the other algorithms: its output has even height and width. With wider strides, the
  // pixels under a block would fill no cache.
  static bool serves(const Conv2dProblem& p) {
    return p.groups == 1 && (p.s == 3 || p.s == 5) && p.dilation_h == 1 && p.dilation_w == 1 &&
           p.stride_h <= 2 && p.stride_w <= 2 && p.y_size() > 0;
  }

  // See Estimate::multiply_adds.
  static double estimate(const Conv2dProblem& p, bool with_dx) {
    const Plan plan(p, with_dx);
    const double windows = static_cast<double>(p.n * plan.windows_h * plan.windows_w);
    // Where there is a ReLU, some are zero.
    constexpr double kNonzero = 0.8;
    const double entries = windows * static_cast<double>(p.k) * kNonzero;
    const double lines = static_cast<double>(p.r * p.s) * static_cast<double>(plan.vectors);
    // Measured cycles, of a line: half of one would be two multiply-adds, or one a store.
    constexpr double kWgrad = 0.8, kDgrad = 1.5, kListed = 6;
    // Of a vector of the input, copied, and of its gradient, cleared and added.
    constexpr double kCopied = 3, kAdded = 5;
    const double pixels = 4 * windows * static_cast<double>(p.stride_h * p.stride_w);
    const double cycles =
        entries * lines * (kWgrad + (with_dx ? kDgrad : 0.0)) +
        entries * static_cast<double>(plan.group_tasks) * kListed +
        static_cast<double>(plan.parts * p.k) * lines +
        pixels * static_cast<double>(plan.vectors) * (kCopied + (with_dx ? kAdded : 0.0));
    // Where images are few, many threads would find nothing to do.
    constexpr int64_t kFewTasks = 4;
    const double idle = static_cast<double>(max64(1, ceil_div(kFewTasks, max64(1, plan.tasks()))));
    return cycles * idle * 2 * V::kWidth;
  }

  static void run(const Conv2dProblem& p, const PoolGradientOperands& t) {
    const Plan plan(p, t.dx != nullptr);
    const int workers = workers_for(plan.tasks());
    const Workspace workspace(
        static_cast<std::size_t>(4 * (plan.packed_floats + plan.parts * plan.filter_floats +
                                      plan.bias_floats() + workers * plan.worker_floats)));
    float* const packed = workspace.floats();
    float* const sums = packed + plan.packed_floats;
    float* const bias_sums = sums + plan.parts * plan.filter_floats;
    float* const scratch = bias_sums + plan.bias_floats();
    if (t.dx) pack(p, plan, t.filter, packed);
    parallel_for(plan.tasks(), workers, [&](int64_t task, int worker) {
      const int64_t part = task / plan.group_tasks;
      run_task(p, plan, task % plan.group_tasks, part, t, packed, sums + part * plan.filter_floats,
               bias_sums + part * p.k, scratch + worker * plan.worker_floats);
    });
    unpack(p, plan, sums, t.dfilter);
    if (t.dbias) add_parts<V>(bias_sums, plan.parts, p.k, t.dbias);
  }

  static constexpr PoolGradientKernel kKernel{
      .name = "sparse", .serves = serves, .estimate = estimate, .run = run};

 private:
  struct Plan {
    int64_t taps;
    int64_t windows_h, windows_w;  // of an image
    int64_t blocks_h, blocks_w;    // of windows
    int64_t rows, columns;         // of the input under a block, at most
    int64_t images;                // of a block, where one has a block of its own at most
    int64_t capacity;              // windows of a block, at most
    int64_t passes;                // over the rows of a filter
    int64_t vectors, groups;       // of input channels
    int64_t group_tasks;           // to which the groups are dealt
    int64_t parts;                 // of the images
    int64_t filter_floats;         // [group][k][tap][vector of the group]
    int64_t packed_floats;
    int64_t buffer_floats, lists_floats, channel_floats, worker_floats;
    int64_t output_channels;

    Plan(const Conv2dProblem& p, bool with_dx) {
      taps = p.r * p.s;
      windows_h = p.oh / 2;
      windows_w = p.ow / 2;
      constexpr int64_t kSide = 6;  // windows: a buffer takes some 24 KiB
      blocks_h = ceil_div(windows_h, kSide);
      const int64_t block_h = ceil_div(windows_h, blocks_h);
      blocks_w = ceil_div(windows_w, kSide * kSide / block_h);
      const int64_t block_w = ceil_div(windows_w, blocks_w);
      images = blocks_h * blocks_w > 1 ? 1 : max64(1, kSide * kSide / (block_h * block_w));
      capacity = images * block_h * block_w;
      rows = (2 * block_h - 1) * p.stride_h + p.r;
      columns = (2 * block_w - 1) * p.stride_w + p.s;

      const int64_t most = kSparseRegisters<V>;
      const int64_t most_rows = min64(p.s, most / p.s);
      passes = ceil_div(p.r, most_rows);
      const int64_t most_vectors = min64(kMostSparseVectors, most / (ceil_div(p.r, passes) * p.s));
      vectors = ceil_div(p.c, V::kWidth);
      groups = ceil_div(vectors, most_vectors);
      // The groups of a task share its lists, and their sums the second-level cache. Each part has sums of
      // its own.
      constexpr int64_t kTasks = 16, kSumsBytes = int64_t{1} << 20;
      const int64_t group_bytes = p.k * taps * ceil_div(vectors, groups) * V::kWidth * 4;
      group_tasks = ceil_div(groups, max64(1, kSumsBytes / group_bytes));
      parts = min64(p.n, ceil_div(kTasks, group_tasks));

      output_channels = p.k;
      filter_floats = p.k * taps * vectors * V::kWidth;
      packed_floats = with_dx ? filter_floats : 0;
      buffer_floats = images * rows * columns * ceil_div(vectors, groups) * V::kWidth;
      lists_floats = round_up(p.k * capacity * int64_t{sizeof(Nonzero) / 4}, 16);
      channel_floats = round_up(p.k, 16);
      worker_floats =
          round_up((with_dx ? 2 : 1) * buffer_floats, 16) + lists_floats + 2 * channel_floats;
    }

    int64_t tasks() const { return parts * group_tasks; }
    int64_t bias_floats() const { return round_up(parts * output_channels, 16); }
    Span vectors_of(int64_t group) const { return part_of(vectors, groups, group); }
    // Where a group's filters begin.
    int64_t filter_at(int64_t group) const {
      return vectors_of(group).begin * V::kWidth * taps * output_channels;
    }
  };

  // A block of windows: those of a few images, or some of one.
  struct Block {
    Span images, down, across;
    int64_t top, left;  // the input's pixel at the buffer's corner; negative in the padding
    int64_t rows, columns;

    Block(const Conv2dProblem& p, const Plan& plan, const Span& of_images, int64_t i, int64_t j)
        : images(of_images), down(part_of(plan.windows_h, plan.blocks_h, i)),
          across(part_of(plan.windows_w, plan.blocks_w, j)),
          top(2 * down.begin * p.stride_h - p.pad_top),
          left(2 * across.begin * p.stride_w - p.pad_left),
          rows((2 * down.size() - 1) * p.stride_h + p.r),
          columns((2 * across.size() - 1) * p.stride_w + p.s) {}
    int64_t pixels() const { return images.size() * rows * columns; }
  };

  static void run_task(const Conv2dProblem& p, const Plan& plan, int64_t group_task, int64_t part,
                       const PoolGradientOperands& tensors, float* packed, float* sums,
                       float* bias_sums, float* scratch) {
    float* const x_buffer = scratch;
    float* const dx_buffer = x_buffer + plan.buffer_floats;
    float* const values = scratch + plan.worker_floats - plan.channel_floats;
    auto* const counts = reinterpret_cast<std::int32_t*>(values - plan.channel_floats);
    auto* const lists =
        reinterpret_cast<Nonzero*>(values - plan.channel_floats - plan.lists_floats);
    if (group_task > 0) bias_sums = nullptr;
    if (bias_sums) clear(bias_sums, p.k);
    const Span groups = part_of(plan.groups, plan.group_tasks, group_task);
    const Span images = part_of(p.n, plan.parts, part);
    const int64_t chunks = ceil_div(images.size(), plan.images);

    SparseTile t{};
    t.lists = lists;
    t.counts = counts;
    t.channels = p.k;
    t.capacity = plan.capacity;
    t.first = true;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Span some = part_of(images.size(), chunks, chunk);
      some.begin += images.begin;
      some.end += images.begin;
      for (int64_t i = 0; i < plan.blocks_h; ++i)
        for (int64_t j = 0; j < plan.blocks_w; ++j) {
          const Block block(p, plan, some, i, j);
          make_lists(p, plan, block, tensors, bias_sums, values, lists, counts);
          for (int64_t group = groups.begin; group < groups.end; ++group) {
            const Channels channels(p, plan.vectors_of(group));
            t.filter_floats = plan.taps * channels.lanes();
            t.buffer = x_buffer;
            copy_in(p, block, channels, tensors.x, x_buffer);
            t.filter = sums + plan.filter_at(group);
            multiply<true>(p, plan, block, channels, t);
            if (!tensors.dx) continue;
            if (i + j == 0) clear_images(p, some, channels, tensors.dx);
            t.buffer = dx_buffer;
            clear(dx_buffer, block.pixels() * channels.lanes());
            t.filter = packed + plan.filter_at(group);
            multiply<false>(p, plan, block, channels, t);
            add_out(p, block, channels, dx_buffer, tensors.dx);
          }
          t.first = false;
        }
    }
  }

  // Of a block's windows and all output channels: what counts, and where it is. bias_sums may be null.
  static void make_lists(const Conv2dProblem& p, const Plan& plan, const Block& block,
                         const PoolGradientOperands& tensors, float* bias_sums, float* values,
                         Nonzero* lists, std::int32_t* counts) {
    std::memset(counts, 0, static_cast<std::size_t>(p.k) * sizeof(*counts));
    const int64_t right = p.stride_w, below = p.stride_h * block.columns;
    for (int64_t n = block.images.begin; n < block.images.end; ++n)
      for (int64_t i = block.down.begin; i < block.down.end; ++i)
        for (int64_t step = 0; step < block.across.size(); ++step) {
          // Neighbours not one after the other: their results overlap.
          const int64_t half = (block.across.size() + 1) / 2;
          const int64_t j = block.across.begin + (step < half ? 2 * step : 2 * (step - half) + 1);
          const int64_t at = ((n * plan.windows_h + i) * plan.windows_w + j) * p.k;
          const int64_t corner = (n - block.images.begin) * block.rows * block.columns +
                                 2 * (i - block.down.begin) * below +
                                 2 * (j - block.across.begin) * right;
          const std::int32_t pixels[4] = {static_cast<std::int32_t>(corner),
                                          static_cast<std::int32_t>(corner + right),
                                          static_cast<std::int32_t>(corner + below),
                                          static_cast<std::int32_t>(corner + below + right)};
          take_values(p.k, tensors.dy + at, tensors.y ? tensors.y + at : nullptr, bias_sums,
                      values);
          const std::uint8_t* const argmax = tensors.argmax + at;
          Nonzero* list = lists;
          for (int64_t k = 0; k < p.k; ++k, list += plan.capacity) {
            // Without a branch: nobody can guess which are zero. An argmax is data, of which some names no
            // pixel.
            list[counts[k]] = {values[k], pixels[argmax[k] & 3]};
            counts[k] += static_cast<int>(values[k] != 0.0f) & static_cast<int>(argmax[k] < 4);
          }
        }
  }

  // values = dy where y is positive, if it is not null; bias_sums += values, likewise.
  static void take_values(int64_t channels, const float* dy, const float* y, float* bias_sums,
                          float* values) {
    for (int64_t k = 0; k < channels; k += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, channels - k)));
      typename V::Reg value = V::load(dy + k, tail);
      if (y) value = V::where_positive(V::load(y + k, tail), value);
      V::store(values + k, value, tail);
      if (bias_sums) V::store(bias_sums + k, V::add(V::load(bias_sums + k, tail), value), tail);
    }
  }

  // Of a group.
  struct Channels {
    int64_t first, vectors;
    int columns;  // of the last vector

    Channels(const Conv2dProblem& p, const Span& of_vectors)
        : first(of_vectors.begin * V::kWidth), vectors(of_vectors.size()),
          columns(static_cast<int>(min64(p.c - first, lanes()) - (lanes() - V::kWidth))) {}
    int64_t lanes() const { return vectors * V::kWidth; }
    // Calls body(lane) for the first of each vector, body(lane, tail) for that of the last.
    template <class Body>
    void for_each_vector(const Body& body) const {
      const int64_t last = lanes() - V::kWidth;
      for (int64_t lane = 0; lane < last; lane += V::kWidth) body(lane);
      body(last, V::tail(columns));
    }
  };

  template <bool Wgrad>
  static void multiply(const Conv2dProblem& p, const Plan& plan, const Block& block,
                       const Channels& channels, SparseTile t) {
    t.row_floats = block.columns * channels.lanes();
    float* const buffer = t.buffer;
    float* const filter = t.filter;
    for (int64_t pass = 0; pass < plan.passes; ++pass) {
      const Span rows = part_of(p.r, plan.passes, pass);
      t.buffer = buffer + rows.begin * t.row_floats;
      t.filter = filter + rows.begin * p.s * channels.lanes();
      sparse_tile_function<V, Wgrad>(rows.size(), p.s, channels.vectors)(t);
    }
  }

  // Calls inside(floats to a pixel of x, floats to it in the buffer) for those of a block that lie in
  // the images, and outside(floats in the buffer) for those in their padding.
  template <class Inside, class Outside>
  static void for_each_pixel(const Conv2dProblem& p, const Block& block, const Channels& channels,
                             const Inside& inside, const Outside& outside) {
    int64_t at = 0;
    for (int64_t n = block.images.begin; n < block.images.end; ++n)
      for (int64_t i = block.top; i < block.top + block.rows; ++i)
        for (int64_t j = block.left; j < block.left + block.columns; ++j) {
          if (i >= 0 && i < p.h && j >= 0 && j < p.w) {
            inside(((n * p.h + i) * p.w + j) * p.c + channels.first, at);
          } else {
            outside(at);
          }
          at += channels.lanes();
        }
  }

  // Spare lanes of the last vector get zeros.
  static void copy_in(const Conv2dProblem& p, const Block& block, const Channels& channels,
                      const float* x, float* buffer) {
    for_each_pixel(
        p, block, channels,
        [&](int64_t from, int64_t to) {
          channels.for_each_vector([&](int64_t lane, const auto&... tail) {
            V::store(buffer + to + lane, V::load(x + from + lane, tail...));
          });
        },
        [&](int64_t to) { clear(buffer + to, channels.lanes()); });
  }

  static void add_out(const Conv2dProblem& p, const Block& block, const Channels& channels,
                      const float* buffer, float* dx) {
    for_each_pixel(
        p, block, channels,
        [&](int64_t to, int64_t from) {
          channels.for_each_vector([&](int64_t lane, const auto&... tail) {
            float* const out = dx + to + lane;
            V::store(out, V::add(V::load(out, tail...), V::load(buffer + from + lane)), tail...);
          });
        },
        [](int64_t) {});
  }

  // A group's channels.
  static void clear_images(const Conv2dProblem& p, const Span& images, const Channels& channels,
                           float* dx) {
    for (int64_t pixel = images.begin * p.h * p.w; pixel < images.end * p.h * p.w; ++pixel) {
      float* const out = dx + pixel * p.c + channels.first;
      channels.for_each_vector(
          [&](int64_t lane, const auto&... tail) { V::store(out + lane, V::zero(), tail...); });
    }
  }

  // packed[group][k][tap][lane] = filter[tap][c][k], zeros in spare lanes.
  static void pack(const Conv2dProblem& p, const Plan& plan, const float* filter, float* packed) {
    parallel_for(plan.taps * plan.vectors, [&](int64_t task) {
      const int64_t tap = task / plan.vectors, vector = task % plan.vectors;
      const int64_t group = group_of(plan, vector), c = vector * V::kWidth;
      const int64_t row = plan.taps * plan.vectors_of(group).size() * V::kWidth;
      float* const out = packed + filter_at(plan, group, tap, vector);
      const int64_t channels = min64(V::kWidth, p.c - c);
      if (channels < V::kWidth) {
        for (int64_t k = 0; k < p.k; ++k) V::store(out + k * row, V::zero());
      }
      transpose_tile<V>(channels, p.k, filter + (tap * p.c + c) * p.k, p.k, out, row);
    });
  }

  // The parts' sums, added up, to the filter's layout.
  static void unpack(const Conv2dProblem& p, const Plan& plan, float* sums, float* dfilter) {
    parallel_for(plan.taps * plan.vectors, [&](int64_t task) {
      const int64_t tap = task / plan.vectors, vector = task % plan.vectors;
      const int64_t group = group_of(plan, vector), c = vector * V::kWidth;
      const int64_t row = plan.taps * plan.vectors_of(group).size() * V::kWidth;
      float* const in = sums + filter_at(plan, group, tap, vector);
      for (int64_t k = 0; k < p.k; ++k) {
        float* const at = in + k * row;
        typename V::Reg sum = V::load(at);
        for (int64_t part = 1; part < plan.parts; ++part) {
          sum = V::add(sum, V::load(at + part * plan.filter_floats));
        }
        V::store(at, sum);
      }
      transpose_tile<V>(p.k, min64(V::kWidth, p.c - c), in, row, dfilter + (tap * p.c + c) * p.k,
                        p.k);
    });
  }

  static int64_t group_of(const Plan& plan, int64_t vector) {
    int64_t group = vector * plan.groups / plan.vectors;
    while (plan.vectors_of(group).end <= vector) ++group;
    return group;
  }
  static int64_t filter_at(const Plan& plan, int64_t group, int64_t tap, int64_t vector) {
    const Span vectors = plan.vectors_of(group);
    return plan.filter_at(group) + (tap * vectors.size() + vector - vectors.begin) * V::kWidth;
  }

  static void clear(float* at, int64_t floats) {
    std::memset(at, 0, static_cast<std::size_t>(floats) * 4);
  }
};

}  // namespace
}  // namespace fastconv::cpu
