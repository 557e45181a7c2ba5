// Winograd's minimal filtering for fprop and dgrad of stride 1: F(2x2, 3x3), F(4x4, 3x3), F(2x2, 5x5), and
// in one dimension F(4, 3) and F(2, 5). An M x M tile of the output under R x R taps from an
// (M + R - 1)^2 tile of the source by (M + R - 1)^2 multiplications a channel instead of M^2 R^2.
//
//   Y = A^T [ sum over channels (G g G^T) * (B^T d B) ] A, elementwise in the brackets
//
// (A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.) Tiles of six evaluate at
// 0, +-sqrt(1/2), +-sqrt(2) and infinity: a quarter of the rounding error of the textbook's 0, +-1,
// +-2, and the constants a^2 b^2 = 1 and a^2 + b^2 = 5/2 are exact.
//
// A dilated filter is d x d filters that are not, each on every d-th row and column: tiles are cut from
// these, and the rest is the same.
//
// The sums over channels are (M + R - 1)^2 small matrix products. A task takes a block of tiles that
// stays in the second-level cache: it transforms their input, then for one panel of output channels
// after the other multiplies, transforms back and adds bias and ReLU. Where tiles are few, all
// inputs are transformed first and tasks are blocks times groups of panels, or, if the filter is
// large, panels, of which each transforms its own filters as it goes.
//
// dgrad is the same with the filter turned and transposed; the ReLU mask is part of the input
// transform.
//
// A last row or column that four by four tiles leave over is summed directly where it meets padding: a tile
// would compute four rows for it, and taps that meet nothing cost the direct sum nothing.
//
// Where the source under the filter is zero throughout, as in blank parts of an image, the result is
// exactly the bias: such outputs are marked when their tile is transformed. Rounding errors of the
// tile's other pixels there would pass for activity that ReLU lets gradients through for.
#pragma once

#include <array>
#include <limits>

#include "cpu/blank.hpp"
#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pool.hpp"
#include "cpu/streaming.hpp"
#include "cpu/winograd_transform.hpp"
#include "cpu/winograd_wgrad.hpp"

namespace fastconv::cpu {
namespace {

// Of an algorithm whose tiles have M x M outputs; or of what its dgrad makes of filters.
constexpr const char* winograd_name(int m, bool turned = false) {
  switch (m) {
    case 2: return turned ? "winograd2 dgrad" : "winograd2";
    case 3: return turned ? "winograd3 dgrad" : "winograd3";
    case 4: return turned ? "winograd4 dgrad" : "winograd4";
    default: return turned ? "winograd5 dgrad" : "winograd5";
  }
}

// M x M outputs under R x S taps; or one row or column of them, where there is one tap.
template <class V, int M, int R, int S>
struct WinogradOfTaps {
  using Vertical = WinogradTransform<V, R == 1 ? 1 : M, R>;
  using Horizontal = WinogradTransform<V, S == 1 ? 1 : M, S>;
  static constexpr int kOutH = Vertical::kOutputs, kOutW = Horizontal::kOutputs;
  static constexpr int kTileH = Vertical::kPoints, kTileW = Horizontal::kPoints;
  static constexpr int kPoints = kTileH * kTileW, kTaps = R * S;
  static constexpr bool kSixBySix = kTileH == 6 && kTileW == 6;
  static constexpr bool kHasWgrad = M == 4;
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;
  // Where a tensor is, and what a tile does about it: nothing, or ask for the next one's pixels, or, of an output,
  // write past the caches, by panels that are a line of a pixel.
  enum class Memory : std::uint8_t { cached, asked, streamed };
  static_assert(!kTilesAsk<V> || kPanel == kLine);
  using Reg = typename V::Reg;

  // Whether the last row and the last column of the output are summed directly. That depends on nothing but
  // the image and the padding, lest parts of a batch or of an image round otherwise than the whole.
  struct Edges {
    bool bottom = false, right = false;
    double pixels = 0, taps = 0;  // of an image: how many, and what they meet

    bool any() const { return bottom || right; }
    int strips() const { return (bottom ? 1 : 0) + (right ? 1 : 0); }
  };

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    if constexpr (kHasWgrad) {
      if (direction == Direction::wgrad) return WinogradWgrad<V, Vertical, Horizontal>::run(p, t);
    }
    const Edges edges = t.pooled ? Edges{} : edges_of(p, direction);
    compute_tiles(Plan(p, direction, edges), direction, t);
    if (edges.any()) sum_edges(p, direction, t, edges);
  }

  // Pooling takes two by two outputs of a tile.
  static bool fuses_pool(const Conv2dProblem& p) {
    return kOutH % 2 == 0 && kOutW % 2 == 0 && p.dilation_h == 1 && p.dilation_w == 1;
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    if constexpr (kHasWgrad) {
      if (direction == Direction::wgrad) return WinogradWgrad<V, Vertical, Horizontal>::estimate(p);
    }
    return estimate(p, direction, edges_of(p, direction));
  }
  // `share`: of the products, those that are computed.
  static Estimate estimate(const Conv2dProblem& p, Direction direction, const Edges& edges,
                           double share = 1) {
    const Plan plan(p, direction, edges, 1);  // the choice must not depend on the number of threads
    // In cycles of a core that does one vector multiply-add each; constants by measurement.
    const double tiles = static_cast<double>(plan.tiles), c = static_cast<double>(plan.c);
    const double c_vectors = static_cast<double>(plan.padded_c / V::kWidth);
    const double k_vectors = static_cast<double>(ceil_div(plan.k, V::kWidth));
    constexpr Costs kCosts = costs();
    constexpr double kTile = kPoints < 16 ? 50 : 0;  // where that is little beside it
    const double products = tiles * kPoints * (share * c * kCosts.product + kCosts.sum) * k_vectors;
    const double apart = p.dilation_h * p.dilation_w > 1 ? 1.3 : 1;  // neighbours share fewer lines
    const double transforms =
        apart * tiles * (c_vectors * kCosts.input + k_vectors * kCosts.output + kTile);
    const double filter_vectors = c * k_vectors * kPoints;
    double cycles = products + transforms + kCosts.call;
    if (edges.any()) {
      constexpr double kAPixel = 12, kPacking = 3, kAStrip = 4000;
      const double pixels = static_cast<double>(p.n) * edges.pixels;
      cycles += k_vectors * (static_cast<double>(p.n) * edges.taps * c * 1.25 + pixels * kAPixel) +
                edges.strips() * (kPacking * kTaps * c * k_vectors + kAStrip);
    }
    if (plan.by_panels) {  // sums of a chunk come and go
      cycles += kCosts.chunked * products + kCosts.made * filter_vectors;
    } else {
      // The transformed filter is written once and read once a block: from beyond the caches if large.
      const double filter_bytes = filter_vectors * V::kWidth * 4;
      const bool is_large = filter_bytes > (8 << 20);
      const double to_cache = (filter_bytes > (1 << 19) ? 5 : 2.5) * (kSpills ? 2 : 1);
      const double blocks = static_cast<double>(plan.blocks) * (plan.block_tiles < 12 ? 2 : 1);
      cycles += filter_vectors * ((is_large ? kCosts.to_memory : to_cache) +
                                  blocks * (is_large ? kCosts.from_memory : kCosts.from_cache));
    }
    // Of few channels, each product is short of work and each load of the source short of a line.
    const double a_group = !kSpills ? 1.2 + 8 / c : kSixBySix ? 0.82 + 4 / c : 0.85 + 4.5 / c;
    const double groups = static_cast<double>(p.groups) * (p.groups > 1 ? a_group : 1);
    // Tiles of 3 x 3 and of 5 x 5, fitted to the times of 60 problems each.
    constexpr double kOfOdd = kOutH == 3 || kOutH == 5 ? 1.15 : 1;
    return {kOfOdd * cycles * V::kWidth * groups * cost_of_pieces<V>(p, c),
            workspace_bytes(p, direction, edges), kSixBySix ? 5e-6 : 2e-6};
  }

  // What estimate() counts, in cycles of a core that does one vector multiply-add each: of a vector of channels
  // that is transformed; of a product of a point, and of a sum of them; of a vector of the filter.
  struct Costs {
    double input, output;
    double product, sum;
    double call;
    double chunked, made;  // by panels
    double to_memory, from_memory, from_cache;
  };
  static constexpr bool kSpills =
      V::kRegisters < 32;  // what the larger tiles' transforms have at hand

  // With AVX2 fitted to the times of 100 to 300 problems of each kind, one thread of a Zen 4.
  static constexpr Costs costs() {
    // 25 taps, C K floats apart, are more than a set of a cache has lines: rows are fetched again and again.
    constexpr bool kManyTaps = kTaps > 16;
    constexpr bool kFourByFour = kOutH * kOutW == 16;
    if constexpr (kSpills) {
      return {.input = kSixBySix       ? 460
                       : kPoints == 16 ? 150
                                       : 60,
              .output = kOutH == 5      ? 330
                        : kFourByFour   ? 240
                        : kOutH == 3    ? 180
                        : kSixBySix     ? 125
                        : kPoints == 16 ? 80
                                        : 55,
              .product = 1,
              .sum = 4,
              .call = 6500,
              .chunked = 0.2,
              .made = kManyTaps ? 16 : 8,
              .to_memory = kManyTaps ? 80 : 70,
              .from_memory = kManyTaps ? 7 : 4,
              .from_cache = kManyTaps ? 1.6 : 0.8};
    } else {
      return {.input = kSixBySix       ? 330
                       : kPoints == 16 ? 150
                                       : 85,
              .output = kOutH == 5      ? 340
                        : kFourByFour   ? 250
                        : kOutH == 3    ? 200
                        : kSixBySix     ? 150
                        : kPoints == 16 ? 110
                                        : 70,
              .product = 1.08,
              .sum = 6,
              .call = 8000,
              .chunked = 0.25,
              .made = kManyTaps      ? 60
                      : kPoints < 16 ? 8
                                     : 13,
              .to_memory = kManyTaps ? 140 : 70,
              .from_memory = kManyTaps ? 12 : 4,
              .from_cache = 0.6};
    }
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    if constexpr (kHasWgrad) {
      if (direction == Direction::wgrad) return WinogradWgrad<V, Vertical, Horizontal>::blocking(p);
    }
    const Edges edges = edges_of(p, direction);
    const Plan plan(p, direction, edges);
    return tiles_in_words(plan.tiles, kOutH, kOutW, ", ", plan.block_tiles, " a block") +
           (plan.by_panels    ? ", filters transformed by panels"
            : plan.two_phases ? ", inputs transformed first"
                              : "") +
           (edges.any() ? ", the rest directly" : "");
  }

  static constexpr const char* kName = winograd_name(M);
  static constexpr const char* kTurnedName = winograd_name(M, true);

  // The convolution that is computed (dgrad's has the roles of C and K changed) and its blocking;
  // channels, tiles and panels are those of one group. Strides are from pixel to pixel, and from row
  // to row of the filter.
  struct Plan {
    int64_t groups, h, w, c, k, pad_top, pad_left, dilation_h, dilation_w;
    int64_t out_h, out_w;
    WinogradGrid grid;  // of the output but for its edges
    int64_t c_stride, k_stride, filter_stride;
    bool turned, relu;
    float ceiling;  // with relu
    int64_t tiles, block_tiles, blocks;
    int64_t padded_c, panels, panel_parts;
    int64_t sets, tasks;  // sets of groups
    bool own_filters;     // a task has a set's
    bool own_copies;      // a worker has all
    bool two_phases;
    bool by_panels;         // a task has a panel, and its filter by chunks of channels
    int64_t floats_of_all;  // of source and output
    Memory memory;          // of the source, and of the output unless that is streamed
    int64_t chunk_channels;
    int64_t filter_groups;  // that one buffer of filters has
    int workers;
    int64_t input_point, product_point;  // floats from point to point
    // Of pixels taken together (winograd_strided.hpp), `rows` of `run` channels each, the filter's last tap down has
    // so many rows, and the last across so many channels of each: the others are zeros there, and so at infinity.
    // Of dgrad, whose filter is turned, at 0.
    struct LastTap {
      int64_t rows = 1, run = 0;
      int64_t rows_down = 1, run_across = 0;
      static constexpr int64_t kMostRows = 8;

      bool is_whole() const { return rows == rows_down && run == run_across; }
      // Of all products, all points.
      double share() const {
        const double down = static_cast<double>(rows_down) / static_cast<double>(rows);
        const double across =
            run > 0 ? static_cast<double>(run_across) / static_cast<double>(run) : 1;
        return (kTileH - 1 + down) * (kTileW - 1 + across) / kPoints;
      }
    } last_tap;
    int64_t zeros_bytes, group_filter_floats, filter_bytes, input_bytes, product_bytes,
        blanks_bytes;

    Plan(const Conv2dProblem& p, Direction direction, const Edges& edges,
         int64_t threads = num_threads())
        : out_h(direction == Direction::dgrad ? p.h : p.oh),
          out_w(direction == Direction::dgrad ? p.w : p.ow),
          grid{{out_h - (edges.bottom ? 1 : 0), p.dilation_h, kOutH},
               {out_w - (edges.right ? 1 : 0), p.dilation_w, kOutW}},
          turned(direction == Direction::dgrad) {
      groups = p.groups;
      h = turned ? p.oh : p.h;
      w = turned ? p.ow : p.w;
      c = turned ? p.k_per_group() : p.c_per_group();
      k = turned ? p.c_per_group() : p.k_per_group();
      c_stride = turned ? p.k : p.c;
      k_stride = turned ? p.c : p.k;
      filter_stride = p.k;
      dilation_h = p.dilation_h;
      dilation_w = p.dilation_w;
      pad_top = turned ? (R - 1) * dilation_h - p.pad_top : p.pad_top;
      pad_left = turned ? (S - 1) * dilation_w - p.pad_left : p.pad_left;
      relu = !turned && p.activation != Activation::linear;
      ceiling = ceiling_of(p.activation);

      floats_of_all = p.x_size() + p.y_size();
      // Of several groups, a tile asks for the next one's pixels in any case.
      const bool asks = kTilesAsk<V> && groups == 1 && beyond_caches(floats_of_all);
      memory = asks ? Memory::asked : Memory::cached;

      tiles = grid.count(p.n);
      padded_c = round_up(c, V::kWidth);
      panels = ceil_div(k, kPanel);
      // Transformed inputs of a block in half of a 1 MiB second-level cache, but tiles enough that
      // what is read of the filter is used twice: rows of the register tile, twice. Each thread
      // should have some blocks. (Their number changes no result.)
      const int64_t fitting = (int64_t{400} << 10) / max64(kPoints * padded_c * 4, 1);
      const int64_t least = 2 * V::kRows;
      constexpr int64_t kMost = (kPoints < 16 ? 16 : 4) * V::kRows;
      const int64_t most = max64(least, min64(fitting, kMost));
      blocks = max64(1, max64(ceil_div(tiles, most), min64(4 * threads, tiles / least)));
      block_tiles = max64(1, ceil_div(tiles, blocks));
      blocks = max64(1, ceil_div(tiles, block_tiles));
      // A block is taken through a set of groups, whose filters stay in the second-level cache:
      // neighbouring groups share the source's pages, and what is read ahead. Of many groups, a task
      // has a set's filters to itself and takes all blocks.
      group_filter_floats =
          k == 0 ? 0 : panel_offset(panels - 1) + kPoints * filter_point(panels - 1);
      const int64_t fitting_groups = (int64_t{1} << 19) / (group_filter_floats * 4);
      sets = ceil_div(groups, max64(1, min64(groups, fitting_groups)));
      own_filters = groups >= max64(2, 4 * threads);
      sets = min64(groups, max64(sets, own_filters ? 4 * threads : ceil_div(4 * threads, blocks)));
      // With fewer tasks than that, threads share blocks by panels. What one core transforms, another
      // multiplies then, which costs as much as it saves where there are blocks for all.
      two_phases = threads > 1 && !own_filters && blocks * sets < 4 * threads;
      constexpr int64_t kEnoughTasks = 16;
      panel_parts = two_phases ? min64(panels, ceil_div(kEnoughTasks, blocks * sets)) : 1;
      tasks = own_filters ? sets : blocks * sets * panel_parts;
      workers = static_cast<int>(min64(tasks, threads));
      own_copies =
          threads > 1 && !own_filters && groups * group_filter_floats * 4 <= kOwnFilterBytes;
      plan_panels(threads);
      const int64_t slots = two_phases ? groups * blocks : workers;
      zeros_bytes = padded_c * 4;
      filter_groups = own_filters ? set_groups() : groups;
      filter_bytes = by_panels ? workers * kPoints * chunk_point() * 4
                               : (own_filters || own_copies ? workers : 1) * filter_groups *
                                     group_filter_floats * 4;
      input_point = odd_lines(block_tiles * padded_c);
      product_point = odd_lines(block_tiles * kPanel);
      input_bytes = slots * kPoints * input_point * 4;
      product_bytes = workers * kPoints * product_point * 4;
      blanks_bytes = slots * block_tiles * 4;
    }

    // Where tiles are few and the transformed filter is large, that is not worth writing to memory: it is
    // made, used and dropped, some channels of a panel at a time, which stay in the second-level cache.
    void plan_panels(int64_t threads) {
      constexpr int64_t kMostTiles = 100, kMostChannels = 64, kLeastBytes = int64_t{1} << 20;
      const bool is_large = group_filter_floats * 4 > kLeastBytes;
      const bool shared_evenly = 4 * round_up(panels, threads) <= 5 * panels;
      by_panels = groups == 1 && tiles <= kMostTiles && is_large && shared_evenly;
      if (!by_panels) return;
      block_tiles = tiles;
      blocks = sets = panel_parts = 1;
      own_filters = own_copies = false;
      two_phases = true;
      tasks = panels;
      workers = static_cast<int>(min64(tasks, threads));
      chunk_channels = round_up(ceil_div(c, ceil_div(c, kMostChannels)), V::kWidth);
    }

    int64_t chunk_point() const { return odd_lines(chunk_channels * kPanel); }
    int64_t workspace_bytes() const {
      return round_up(zeros_bytes, 64) + filter_bytes_held() + round_up(input_bytes, 64) +
             round_up(product_bytes, 64) + blanks_bytes;
    }
    int64_t filter_bytes_held() const { return round_up(filter_bytes, 64); }
    int64_t filter_floats() const { return groups * group_filter_floats; }  // of all groups
    int vectors_of(int64_t panel) const {
      return static_cast<int>(min64(V::kVectors, ceil_div(k - panel * kPanel, V::kWidth)));
    }
    // A panel is [point][c][vectors * width].
    int64_t filter_point(int64_t panel) const {
      return odd_lines(c * vectors_of(panel) * V::kWidth);
    }
    int64_t panel_offset(int64_t panel) const { return panel * kPoints * odd_lines(c * kPanel); }
    // The channels that are not zero at a point: so many rows of them, of so many each.
    struct Live {
      int64_t rows, run;
    };
    Live live_at(int point) const {
      const int down = turned ? 0 : kTileH - 1, across = turned ? 0 : kTileW - 1;
      return {point / kTileW == down ? last_tap.rows_down : last_tap.rows,
              point % kTileW == across ? last_tap.run_across : last_tap.run};
    }
    // Whether those of a panel of dgrad's results are zero at a point.
    bool is_zero_at(int point, int64_t panel) const {
      const Live live = live_at(point);
      const int64_t first = panel * kPanel, last = min64(k, first + kPanel) - 1;
      return first / last_tap.run >= live.rows ||
             (first / last_tap.run == last / last_tap.run && first % last_tap.run >= live.run);
    }
    int64_t first_group(int64_t set) const { return groups * set / sets; }
    int64_t set_groups() const { return ceil_div(groups, sets); }  // at most
  };

  // All tiles that the plan has. `made`: what transform_filters() makes of the filter; or null.
  static void compute_tiles(const Plan& plan, Direction direction, const Conv2dOperands& t,
                            const float* made) {
    const Workspace workspace(
        static_cast<std::size_t>(plan.workspace_bytes() - (made ? plan.filter_bytes_held() : 0)));
    if (direction == Direction::fprop) {
      execute(plan, workspace, {t.x, nullptr, t.filter, t.scale, t.bias, made},
              {t.out, t.residual, t.argmax, t.pooled});
    } else {
      execute(plan, workspace, {t.dy, t.y, t.filter, nullptr, nullptr, made}, {t.out});
    }
  }
  static void transform_filters(const Plan& plan, const Conv2dOperands& t, float* u) {
    transform_filters(plan, Sources{t.x, nullptr, t.filter, t.scale, nullptr}, u);
  }

 private:
  static void compute_tiles(const Plan& plan, Direction direction, const Conv2dOperands& t) {
    if (plan.tiles == 0) return;
    FilterForms::Floats kept;
    if (t.packed) {
      kept = t.packed->in_layout(
          {plan.turned ? kTurnedName : kName, V::kWidth, plan.panels, plan.groups},
          static_cast<std::size_t>(plan.filter_floats()) * 4,
          [&](float* u) { transform_filters(plan, t, u); });
    }
    compute_tiles(plan, direction, t, kept.get());
  }

  static TapConvolution taps_of(const Conv2dProblem& p, Direction direction) {
    if (direction == Direction::fprop) return fprop_taps(p);
    TapConvolution out{};
    for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t) { out = g; });  // the only one
    return out;
  }

  static Edges edges_of(const Conv2dProblem& p, Direction direction) {
    Edges edges;
    if constexpr (M == 4 && R == 3 && S == 3) {
      if (p.dilation_h > 1 || p.dilation_w > 1) return edges;
      const TapConvolution g = taps_of(p, direction);
      const auto met = [](const AxisTaps& taps, int64_t i, int64_t size) {
        int64_t begin = 0, end = 0;
        taps.meeting(i, size, begin, end);
        return max64(0, end - begin);
      };
      const auto left_over = [&](const AxisTaps& taps, int64_t outputs, int64_t size) {
        return outputs > 2 * M && outputs % M == 1 && met(taps, outputs - 1, size) < taps.count;
      };
      edges.bottom = left_over(g.vertical, g.out_h, g.source_h);
      edges.right = left_over(g.horizontal, g.out_w, g.source_w);
      const auto all_met = [&](const AxisTaps& taps, Span outputs, int64_t size) {
        int64_t sum = 0;
        for (int64_t i = outputs.begin; i < outputs.end; ++i) sum += met(taps, i, size);
        return sum;
      };
      const auto add = [&](Span rows, Span columns) {
        edges.pixels += static_cast<double>(rows.size() * columns.size());
        edges.taps += static_cast<double>(all_met(g.vertical, rows, g.source_h) *
                                          all_met(g.horizontal, columns, g.source_w));
      };
      for_each_edge(g, edges, add);
    }
    return edges;
  }

  // Calls body(rows, columns) for each.
  template <class Body>
  static void for_each_edge(const TapConvolution& g, const Edges& edges, const Body& body) {
    const int64_t rows = g.out_h - (edges.bottom ? 1 : 0);
    if (edges.bottom) body(Span{rows, g.out_h}, Span{0, g.out_w});
    if (edges.right) body(Span{0, rows}, Span{g.out_w - 1, g.out_w});
  }

  template <class Body>
  static void for_each_strip(const Conv2dProblem& p, Direction direction, const Edges& edges,
                             const Body& body) {
    const TapConvolution g = taps_of(p, direction);
    for_each_edge(g, edges, [&](Span rows, Span columns) {
      TapConvolution strip = g;
      strip.vertical.first += rows.begin * g.vertical.step;
      strip.horizontal.first += columns.begin * g.horizontal.step;
      strip.out_h = rows.size();
      strip.out_w = columns.size();
      body(strip, rows.begin * g.y_row + columns.begin * g.y_column);
    });
  }

  // Panels as of any other direct sum, whatever the threads: the filter may be kept in them.
  static TapConvolutionRunner<V> runner_of(const TapConvolution& strip) {
    return TapConvolutionRunner<V>(strip, 1);
  }

  // What a strip meets of its source, where the mask is positive: the source that it has from then on.
  class MaskedSource {
   public:
    MaskedSource(TapConvolution& strip, const float* x, const float* mask)
        : rows_(met_by(strip.vertical, strip.out_h, strip.source_h)),
          columns_(met_by(strip.horizontal, strip.out_w, strip.source_w)),
          run_(columns_.size() * strip.source_c), copy_(static_cast<std::size_t>(bytes_of(strip))) {
      const int64_t row_floats = strip.source_w * strip.source_c;
      parallel_by_floats(strip.images * rows_.size(), 2 * run_, [&](int64_t row) {
        const int64_t n = row / rows_.size(), i = rows_.begin + row % rows_.size();
        const int64_t from =
            n * strip.source_image + i * row_floats + columns_.begin * strip.source_c;
        float* const to = copy_.floats() + row * run_;
        for (int64_t at = 0; at < run_; at += V::kWidth) {
          const auto tail = V::tail(static_cast<int>(min64(V::kWidth, run_ - at)));
          V::store(to + at,
                   V::where_positive(V::load(mask + from + at, tail), V::load(x + from + at, tail)),
                   tail);
        }
      });
      strip.vertical.first -= rows_.begin;
      strip.horizontal.first -= columns_.begin;
      strip.source_h = rows_.size();
      strip.source_w = columns_.size();
      strip.source_image = rows_.size() * run_;
    }
    const float* floats() const { return copy_.floats(); }

    static int64_t bytes_of(const TapConvolution& strip) {
      return strip.images * met_by(strip.vertical, strip.out_h, strip.source_h).size() *
             met_by(strip.horizontal, strip.out_w, strip.source_w).size() * strip.source_c * 4;
    }

   private:
    // One at least, though nothing may be met.
    static Span met_by(const AxisTaps& taps, int64_t outputs, int64_t size) {
      const int64_t begin = max64(0, min64(size - 1, taps.lowest()));
      const int64_t end = (outputs - 1) * taps.step + taps.highest() + 1;
      return {begin, max64(begin + 1, min64(size, end))};
    }

    Span rows_, columns_;
    int64_t run_;  // floats of a row
    Workspace copy_;
  };

  static void sum_edges(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t,
                        const Edges& edges) {
    const bool fprop = direction == Direction::fprop;
    FilterForms::Floats kept;
    int64_t offset = 0;
    for_each_strip(p, direction, edges, [&](TapConvolution& strip, int64_t first) {
      const float* x = fprop ? t.x : t.dy;
      std::optional<MaskedSource> masked;
      if (t.y && !fprop) x = masked.emplace(strip, x, t.y).floats();
      const TapConvolutionRunner<V> runner = runner_of(strip);
      if (t.packed && fprop) kept = kept_panels(runner, p, t);
      if (t.packed && !fprop) {
        const DgradForm<V> form(p, runner.shares);
        kept = form.of(*t.packed, t.filter);
        offset = form.offset(p.pad_top, p.pad_left);
      }
      runner.execute(x, t.filter, t.scale, t.bias, t.residual ? t.residual + first : nullptr,
                     t.out + first, kept ? kept.get() + offset : nullptr);
    });
  }

  static int64_t workspace_bytes(const Conv2dProblem& p, Direction direction, const Edges& edges) {
    int64_t bytes = Plan(p, direction, edges).workspace_bytes();
    const bool masks = direction == Direction::dgrad && p.activation == Activation::relu;
    for_each_strip(p, direction, edges, [&](const TapConvolution& strip, int64_t) {
      bytes = max64(bytes,
                    runner_of(strip).workspace_bytes + (masks ? MaskedSource::bytes_of(strip) : 0));
    });
    return bytes;
  }

  // What is computed from. All but x and the filter may be null.
  struct Sources {
    const float* x;
    const float* mask;  // x counts where it is positive
    const float *filter, *scale, *bias;
    const float* kept = nullptr;  // what transform_filters made of the filter, if that is kept
  };

  // Where results go: the convolution's output, or what 2 x 2 max-pooling makes of it.
  struct Results {
    float* y;
    const float* residual = nullptr;  // added to y, which is not pooled then; may be null
    std::uint8_t* argmax = nullptr;   // of the pooling; may be null
    bool pooled = false;
    Memory memory = Memory::cached;
  };

  static void execute(const Plan& plan, const Workspace& workspace, const Sources& t,
                      Results results) {
    if (!results.pooled) results.memory = plan.memory;
    if (results.memory == Memory::asked && !plan.by_panels && takes_whole_tiles(plan, results) &&
        streams_pixels(results.y, plan.k, plan.floats_of_all)) {
      results.memory = Memory::streamed;
    }
    float* at = workspace.floats();
    const auto take = [&at](int64_t bytes) {
      float* here = at;
      at += round_up(bytes, 64) / 4;
      return here;
    };
    float* zeros = take(plan.zeros_bytes);
    float* u = t.kept ? nullptr : take(plan.filter_bytes);
    float* v = take(plan.input_bytes);
    float* products = take(plan.product_bytes);
    std::uint32_t* blanks = reinterpret_cast<std::uint32_t*>(take(plan.blanks_bytes));
    std::memset(zeros, 0, static_cast<std::size_t>(plan.zeros_bytes));

    const int64_t block_floats = kPoints * plan.input_point;
    const auto bring_tile = [&](int64_t group, int64_t tile, int64_t slot) {
      const int64_t place = tile % plan.block_tiles, c = group * plan.c;
      const auto transform =
          plan.memory == Memory::asked ? transform_input<kTilesAsk<V>> : transform_input<false>;
      blanks[slot * plan.block_tiles + place] =
          transform(plan, t.x + c, t.mask ? t.mask + c : nullptr, zeros, tile,
                    v + slot * block_floats + place * plan.padded_c);
    };
    const auto compute = [&](int64_t group, int64_t block, const float* group_u, int64_t part,
                             int worker) {
      const int64_t begin = block * plan.block_tiles;
      const int64_t end = min64(plan.tiles, begin + plan.block_tiles);
      const int64_t slot = plan.two_phases ? group * plan.blocks + block : worker;
      if (!plan.two_phases) {
        for (int64_t tile = begin; tile < end; ++tile) bring_tile(group, tile, slot);
      }
      float* product = products + worker * kPoints * plan.product_point;
      const Span panels = part_of(plan.panels, plan.panel_parts, part);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        multiply(plan, v + slot * block_floats, group_u + plan.panel_offset(panel),
                 plan.filter_point(panel), panel, {0, plan.c}, end - begin, product);
        transform_outputs(plan, product, group, panel, t.bias, blanks + slot * plan.block_tiles,
                          {begin, end}, results);
      }
      if (results.memory == Memory::streamed) V::drain();
    };
    if (plan.by_panels) {
      parallel_by_floats(plan.tiles, kPoints * plan.padded_c,
                         [&](int64_t tile) { bring_tile(0, tile, 0); });
      parallel_for(plan.tasks, plan.workers, [&](int64_t panel, int worker) {
        float* const own = t.kept ? nullptr : u + worker * kPoints * plan.chunk_point();
        float* const product = products + worker * kPoints * plan.product_point;
        const int64_t width = int64_t{plan.vectors_of(panel)} * V::kWidth;
        if (t.kept) {
          multiply(plan, v, t.kept + plan.panel_offset(panel), plan.filter_point(panel), panel,
                   {0, plan.c}, plan.tiles, product);
        }
        for (int64_t c = 0; c < plan.c && !t.kept; c += plan.chunk_channels) {
          const Span chunk{c, min64(plan.c, c + plan.chunk_channels)};
          for (int64_t i = c; i < chunk.end; i += V::kWidth) {
            transform_filter(plan, t, 0, panel, i, min64(chunk.end, i + V::kWidth),
                             own + (i - c) * width, plan.chunk_point());
          }
          multiply(plan, v, own, plan.chunk_point(), panel, chunk, plan.tiles, product);
        }
        transform_outputs(plan, product, 0, panel, t.bias, blanks, {0, plan.tiles}, results);
      });
      return;
    }
    if (plan.own_filters) {
      parallel_for(plan.tasks, plan.workers, [&](int64_t set, int worker) {
        const int64_t first = plan.first_group(set), last = plan.first_group(set + 1);
        const int64_t first_kept = t.kept ? 0 : first;
        float* own = t.kept ? nullptr : u + worker * plan.filter_groups * plan.group_filter_floats;
        const float* const filters = t.kept ? t.kept : own;
        const auto group_u = [&](int64_t group) {
          return filters + (group - first_kept) * plan.group_filter_floats;
        };
        for (int64_t group = first; group < last && !t.kept; ++group) {
          transform_group(plan, t, group, own + (group - first) * plan.group_filter_floats);
        }
        for (int64_t block = 0; block < plan.blocks; ++block)
          for (int64_t group = first; group < last; ++group) {
            compute(group, block, group_u(group), 0, worker);
          }
      });
      return;
    }
    OncePerWorker brings(plan.workers);
    if (!plan.own_copies && !t.kept) transform_filters(plan, t, u);
    if (plan.two_phases) {
      parallel_by_floats(plan.groups * plan.tiles, kPoints * plan.padded_c, [&](int64_t task) {
        const int64_t group = task / plan.tiles, tile = task % plan.tiles;
        bring_tile(group, tile, group * plan.blocks + tile / plan.block_tiles);
      });
    }
    parallel_for(plan.tasks, plan.workers, [&](int64_t task, int worker) {
      const int64_t block = task % plan.blocks, part = task / plan.blocks % plan.panel_parts;
      const int64_t set = task / plan.blocks / plan.panel_parts;
      const bool copies = plan.own_copies && !t.kept;
      float* own = copies ? u + worker * plan.groups * plan.group_filter_floats : u;
      if (copies && brings.first(worker)) transform_filters(plan, t, own);
      const float* const filters = t.kept ? t.kept : own;
      for (int64_t group = plan.first_group(set); group < plan.first_group(set + 1); ++group) {
        compute(group, block, filters + group * plan.group_filter_floats, part, worker);
      }
    });
  }

  // A vector of channels of a panel is a task.
  static int64_t tasks_of_group(const Plan& plan) {
    return plan.panels * ceil_div(plan.c, V::kWidth);
  }
  static void transform_part(const Plan& plan, const Sources& t, int64_t group, int64_t task,
                             float* group_u) {
    const int64_t panel = task % plan.panels, begin = task / plan.panels * V::kWidth;
    transform_filter(
        plan, t, group, panel, begin, min64(plan.c, begin + V::kWidth),
        group_u + plan.panel_offset(panel) + begin * plan.vectors_of(panel) * V::kWidth,
        plan.filter_point(panel));
  }
  static void transform_group(const Plan& plan, const Sources& t, int64_t group, float* group_u) {
    for (int64_t task = 0; task < tasks_of_group(plan); ++task) {
      transform_part(plan, t, group, task, group_u);
    }
  }
  // Alone, or with all threads.
  static void transform_filters(const Plan& plan, const Sources& t, float* u) {
    const int64_t group_tasks = tasks_of_group(plan);
    parallel_for(plan.groups * group_tasks, [&](int64_t task) {
      const int64_t group = task / group_tasks;
      transform_part(plan, t, group, task % group_tasks, u + group * plan.group_filter_floats);
    });
  }

  // Channels c .. c_end - 1 of a panel of filters: G g G^T, the points `point_floats` apart. Output channel
  // k is multiplied by scale[k], if that is not null; fprop alone has one.
  static void transform_filter(const Plan& plan, const Sources& t, int64_t group, int64_t panel,
                               int64_t c, int64_t c_end, float* out, int64_t point_floats) {
    const int vectors = plan.vectors_of(panel);
    const int64_t width = int64_t{vectors} * V::kWidth;
    const int64_t depth = c_end - c;
    // The group's columns of the filter are its output channels.
    const float* filter = t.filter + group * (plan.turned ? plan.c : plan.k);
    const float* scale = t.scale ? t.scale + group * plan.k : nullptr;
    for (int v = 0; v < vectors; ++v) {
      const int64_t k = panel * kPanel + int64_t{v} * V::kWidth;
      const int valid = static_cast<int>(min64(V::kWidth, plan.k - k));
      // dgrad: filter[R - 1 - r][S - 1 - s][k][c], whose rows are made columns here.
      alignas(64) float square[kTaps][V::kWidth * V::kWidth];
      if (plan.turned) {
        const auto tail = V::tail(static_cast<int>(depth));
        for (int tap = 0; tap < kTaps; ++tap) {
          Reg rows[V::kWidth];
#pragma GCC unroll 16
          for (int j = 0; j < V::kWidth; ++j) {
            const int64_t row = (kTaps - 1 - tap) * plan.k + k + j;
            rows[j] = j < valid ? V::load(filter + row * plan.filter_stride + c, tail) : V::zero();
          }
          V::transpose(rows);
#pragma GCC unroll 16
          for (int j = 0; j < V::kWidth; ++j) V::store(square[tap] + j * V::kWidth, rows[j]);
        }
      }
      const auto tail = V::tail(valid);
      const Reg factor = scale ? V::load(scale + k, tail) : V::zero();
      for (int64_t i = 0; i < depth; ++i) {
        // Not by transform_2d, of which GCC 12 makes code here that takes 6 % longer where pixels are few.
        Reg columns[S][kTileH];  // of G g
#pragma GCC unroll 5
        for (int s = 0; s < S; ++s) {
          Reg g[R];
#pragma GCC unroll 5
          for (int r = 0; r < R; ++r) {
            const int tap = S * r + s;
            const float* const row = filter + (tap * plan.c + c + i) * plan.filter_stride + k;
            // Row after row, of which a panel has a line or two: no processor foresees them.
            constexpr int64_t kRowsAhead = 4;
            if (plan.by_panels && !plan.turned) {
              __builtin_prefetch(row + kRowsAhead * plan.filter_stride);
            }
            g[r] = plan.turned ? V::load(square[tap] + i * V::kWidth) : V::load(row, tail);
            if (scale) g[r] = V::multiply(g[r], factor);
          }
          Vertical::filter(g, columns[s]);
        }
#pragma GCC unroll 6
        for (int row = 0; row < kTileH; ++row) {
          Reg g[S], points[kTileW];
#pragma GCC unroll 5
          for (int s = 0; s < S; ++s) g[s] = columns[s][row];
          Horizontal::filter(g, points);
#pragma GCC unroll 6
          for (int column = 0; column < kTileW; ++column) {
            V::store(out + (row * kTileW + column) * point_floats + i * width + v * V::kWidth,
                     points[column]);
          }
        }
      }
    }
  }

  // B^T d B of one tile, all channels; the points lie plan.input_point floats apart. Returns a
  // bit for each output, kOutW * row + column, whose source is zero throughout.
  template <bool Asks>
  static std::uint32_t transform_input(const Plan& plan, const float* x, const float* mask,
                                       const float* zeros, int64_t tile, float* out) {
    const int64_t row_floats = plan.w * plan.c_stride;
    const int64_t next_row = plan.dilation_h * row_floats;
    const int64_t next_pixel = plan.dilation_w * plan.c_stride;
    const auto source = [&](int64_t of_tile) {
      WinogradGrid::Corner corner = plan.grid.corner(of_tile);
      corner.row -= plan.pad_top;
      corner.column -= plan.pad_left;
      return corner;
    };
    const auto place = [&](const WinogradGrid::Corner& at) {
      return (at.n * plan.h + at.row) * row_floats + at.column * plan.c_stride;
    };
    const WinogradGrid::Corner corner = source(tile);
    const float* pixels[kPoints];
    const float* masks[kPoints];
    int64_t row_at = place(corner);
    for (int i = 0; i < kTileH; ++i, row_at += next_row) {
      const int64_t row = corner.row + i * plan.dilation_h;
      const bool row_inside = row >= 0 && row < plan.h;
      int64_t column = corner.column, at = row_at;
#pragma GCC unroll 6
      for (int j = 0; j < kTileW; ++j, column += plan.dilation_w, at += next_pixel) {
        const bool inside = row_inside && column >= 0 && column < plan.w;
        pixels[i * kTileW + j] = inside ? x + at : zeros;
        masks[i * kTileW + j] = inside && mask ? mask + at : zeros;
      }
    }
    if (plan.groups > 1) {
      const float* row = x + place(source(tile + 1));
      for (int i = 0; i < kTileH; ++i, row += next_row) {
        const float* at = row;
#pragma GCC unroll 6
        for (int j = 0; j < kTileW; ++j, at += next_pixel) {
          __builtin_prefetch(at, 0, 2);
          if (plan.c > 16) __builtin_prefetch(at + 16, 0, 2);
        }
      }
    }
    const int64_t whole = plan.c / V::kWidth * V::kWidth;
    const auto transform = [&](int64_t c, const auto&... tail) {
      transform_2d<V, kTileH, kTileW, kTileH, kTileW>(
          Vertical::input, Horizontal::input,
          [&](int i, int j) {
            const Reg d = V::load(pixels[i * kTileW + j] + c, tail...);
            if (!mask) return d;
            return V::where_positive(V::load(masks[i * kTileW + j] + c, tail...), d);
          },
          [&](int i, int j, Reg point) {
            V::store(out + (i * kTileW + j) * plan.input_point + c, point);
          });
    };
    const int64_t next = Asks ? place(source(tile + 1)) + (kTileW - kOutW) * next_pixel : 0;
    for (int64_t c = 0; c < whole; c += V::kWidth) {
      if (Asks && c % kLine == 0) {
        ask_for_pixels<kTileH, kOutW>(x + next + c, next_row, next_pixel);
        if (mask) ask_for_pixels<kTileH, kOutW>(mask + next + c, next_row, next_pixel);
      }
      transform(c);
    }
    if (whole < plan.c) transform(whole, V::tail(static_cast<int>(plan.c - whole)));

    const auto is_live = [&](int i, int j) {
      const int at = i * kTileW + j;
      return pixels[at] != zeros && !is_zero<V>(pixels[at], mask ? masks[at] : nullptr, plan.c);
    };
    // Every window of the filter holds one of these pixels.
    bool middle = true;
    for (int i = R - 1; i < std::max(R, kOutH); ++i)
      for (int j = S - 1; j < std::max(S, kOutW); ++j) middle = middle && is_live(i, j);
    if (middle) return 0;
    std::uint64_t live = 0;  // a bit a pixel
    for (int i = 0; i < kTileH; ++i)
      for (int j = 0; j < kTileW; ++j) {
        if (is_live(i, j)) live |= std::uint64_t{1} << (i * kTileW + j);
      }
    std::uint64_t window = 0;
    for (int r = 0; r < R; ++r) window |= ((std::uint64_t{1} << S) - 1) << (r * kTileW);
    std::uint32_t blank = 0;
    for (int i = 0; i < kOutH; ++i)
      for (int j = 0; j < kOutW; ++j) {
        if ((live >> (i * kTileW + j) & window) == 0) blank |= 1u << (i * kOutW + j);
      }
    return blank;
  }

  // product[point][tile][0 .. kPanel) = sum over c of v[point][tile][c] * u[point][c][...], of some
  // channels, which are all that `u` has; what those before made is in it.
  static void multiply(const Plan& plan, const float* v, const float* u, int64_t filter_point,
                       int64_t panel, Span channels, int64_t tiles, float* product) {
    const int vectors = plan.vectors_of(panel);
    const LikeTiles cut(tiles, ceil_div(tiles, V::kRows));
    std::array<int64_t, Plan::LastTap::kMostRows>
        offsets{};  // of the rows of pixels taken together
    for (int64_t i = 0; i < Plan::LastTap::kMostRows; ++i) {
      offsets[static_cast<std::size_t>(i)] = i * plan.last_tap.run;
    }
    const bool leaves_out = !plan.last_tap.is_whole() && channels.size() == plan.c;
    TapTile t{};
    t.x_step = plan.padded_c;
    t.y_step = kPanel;
    t.tap_offsets = t.filter_offsets = offsets.data();
    t.taps = 1;
    t.run = channels.size();
    t.columns = V::kWidth;
    t.first = channels.begin == 0;
    t.last = true;
    for (int point = 0; point < kPoints; ++point) {
      t.filter = u + point * filter_point;
      t.x = v + point * plan.input_point + channels.begin;
      t.y = product + point * plan.product_point;
      if (leaves_out && plan.turned) {
        if (plan.is_zero_at(point, panel)) {
          std::memset(t.y, 0, static_cast<std::size_t>(tiles * kPanel) * 4);
          continue;
        }
      } else if (leaves_out) {
        const typename Plan::Live live = plan.live_at(point);
        const bool joined = live.run == plan.last_tap.run;
        t.taps = joined ? 1 : live.rows;
        t.run = joined ? live.rows * live.run : live.run;
      }
      for (int64_t tile = 0; tile < cut.count; tile += t.tiles) {
        const int64_t rows = cut.size(tile);
        t.tiles = cut.alike(tile);
        tap_tile_function<V>(TapTileTask::none, is_plain(t), static_cast<int>(rows), vectors)(t);
        t.x += t.tiles * rows * t.x_step;
        t.y += t.tiles * rows * t.y_step;
      }
    }
  }

  // A^T m A of a panel of some tiles, bias, ReLU and pooling.
  static void transform_outputs(const Plan& plan, const float* product, int64_t group,
                                int64_t panel, const float* bias, const std::uint32_t* blanks,
                                Span tiles, const Results& results) {
    WinogradGrid::Walk walk(plan.grid, tiles.begin);
    const auto transform_output = output_function(results.memory);
    for (int64_t tile = 0; tile < tiles.size(); ++tile, walk.next()) {
      transform_output(plan, product + tile * kPanel, group, panel, bias, blanks[tile],
                       walk.corner(), results);
    }
  }

  static auto output_function(Memory memory) {
    if constexpr (kTilesAsk<V>) {
      if (memory == Memory::asked) return transform_output<Memory::asked>;
      if (memory == Memory::streamed) return transform_output<Memory::streamed>;
    }
    return transform_output<Memory::cached>;
  }

  // Whether all outputs of a tile may be stored alike.
  static bool takes_whole_tiles(const Plan& plan, const Results& results) {
    const bool limited = plan.relu && plan.ceiling < std::numeric_limits<float>::infinity();
    return !results.residual && !results.pooled && !limited;
  }

  template <Memory kMemory>
  static void transform_output(const Plan& plan, const float* product, int64_t group, int64_t panel,
                               const float* bias, std::uint32_t blank,
                               const WinogradGrid::Corner& corner, const Results& results) {
    const int64_t height = plan.grid.down.outputs_from(corner.row);
    const int64_t width = plan.grid.across.outputs_from(corner.column);
    const int64_t column = group * plan.k + panel * kPanel;
    // Of the output, or of the pooled one, a pixel of which is two by two of these.
    const int64_t shift = results.pooled ? 1 : 0;
    const int64_t row_floats = (plan.out_w >> shift) * plan.k_stride;
    const int64_t first = (corner.n * (plan.out_h >> shift) + (corner.row >> shift)) * row_floats +
                          (corner.column >> shift) * plan.k_stride + column;
    const int64_t next_row = plan.dilation_h * row_floats;
    const int64_t next_pixel = plan.dilation_w * plan.k_stride;
    // Nothing to ask of each pixel, which of a tile of one row takes as long as the transform.
    const bool whole =
        height == kOutH && width == kOutW && blank == 0 && takes_whole_tiles(plan, results);
    const bool streams = kMemory == Memory::streamed && whole;
    alignas(64) float lines[kMemory == Memory::streamed ? kOutH * kOutW : 1][kLine];
    for (int v = 0; v < plan.vectors_of(panel); ++v) {
      const int64_t at = int64_t{v} * V::kWidth;
      const int valid = static_cast<int>(min64(V::kWidth, plan.k - panel * kPanel - at));
      if (kMemory == Memory::asked && at % kLine == 0) {
        ask_for_pixels<kOutH, kOutW>(results.y + first + at + kOutW * next_pixel, next_row,
                                     next_pixel);
      }
      const auto tail = V::tail(valid);
      const Reg start = bias ? V::load(bias + column + at, tail) : V::zero();
      Reg rows[kOutH][kTileW];
#pragma GCC unroll 6
      for (int j = 0; j < kTileW; ++j) {
        Reg m[kTileH], out[kOutH];
#pragma GCC unroll 6
        for (int i = 0; i < kTileH; ++i) {
          m[i] = V::load(product + (i * kTileW + j) * plan.product_point + at);
        }
        Vertical::output(m, out);
#pragma GCC unroll 5
        for (int i = 0; i < kOutH; ++i) rows[i][j] = out[i];
      }
      if (whole && valid == V::kWidth) {
        float* y = streams ? lines[0] + at : results.y + first + at;
        const int64_t row = streams ? kOutW * kLine : next_row;
        const int64_t pixel = streams ? kLine : next_pixel;
#pragma GCC unroll 5
        for (int i = 0; i < kOutH; ++i, y += row) {
          Reg out[kOutW];
          Horizontal::output(rows[i], out);
#pragma GCC unroll 5
          for (int j = 0; j < kOutW; ++j) {
            const Reg sum = V::add(out[j], start);
            V::store(y + j * pixel, plan.relu ? V::relu(sum) : sum);
          }
        }
        continue;
      }
      const auto biased = [&](int i, int j, Reg out) {
        return blank >> (i * kOutW + j) & 1 ? start : V::add(out, start);
      };
      if (!results.pooled) {
#pragma GCC unroll 5
        for (int i = 0; i < kOutH; ++i) {
          if (i >= height) break;
          Reg out[kOutW];
          Horizontal::output(rows[i], out);
          int64_t to = first + i * next_row + at;
#pragma GCC unroll 5
          for (int j = 0; j < kOutW; ++j, to += next_pixel) {
            if (j >= width) break;
            Reg sum = biased(i, j, out[j]);
            if (results.residual) sum = V::add(sum, V::load(results.residual + to, tail));
            const Reg result = plan.relu ? relu_to<V>(V::set(plan.ceiling), sum) : sum;
            if (valid == V::kWidth) {
              V::store(results.y + to, result);
            } else {
              V::store(results.y + to, result, tail);
            }
          }
        }
        continue;
      }
      if constexpr (kOutH % 2 == 0 && kOutW % 2 == 0) {
#pragma GCC unroll 2
        for (int i = 0; i < kOutH; i += 2) {
          if (i >= height) break;
          Reg upper[kOutW], lower[kOutW];
          Horizontal::output(rows[i], upper);
          Horizontal::output(rows[i + 1], lower);
#pragma GCC unroll 2
          for (int j = 0; j < kOutW; j += 2) {
            if (j >= width) break;
            const int64_t to = first + i / 2 * row_floats + j / 2 * plan.k_stride + at;
            max_of_four<V>(biased(i, j, upper[j]), biased(i, j + 1, upper[j + 1]),
                           biased(i + 1, j, lower[j]), biased(i + 1, j + 1, lower[j + 1]),
                           plan.relu, plan.ceiling, valid, results.y + to,
                           results.argmax ? results.argmax + to : nullptr);
          }
        }
      }
    }
    if constexpr (kMemory == Memory::streamed) {
      if (!streams) return;
      for (int i = 0; i < kOutH; ++i) {
        for (int j = 0; j < kOutW; ++j) {
          float* const to = results.y + first + i * next_row + j * next_pixel;
          for (int at = 0; at < kLine; at += V::kWidth) {
            V::stream(to + at, V::load(lines[i * kOutW + j] + at));
          }
        }
      }
    }
  }
};

// The algorithms winograd2 to winograd5, by the edge of an output tile.
template <class V, int M>
struct Winograd {
  static bool serves(const Conv2dProblem& p, Direction direction) {
    constexpr int64_t kLeastOfGroup = 8;  // channels
    const auto has = [&](int64_t r, int64_t s) { return p.r == r && p.s == s; };
    const bool has_taps = has(kTaps, kTaps) || (kHasLines && (has(1, kTaps) || has(kTaps, 1))) ||
                          (M == 2 && has(3, 3));
    return has_taps && (direction != Direction::wgrad || M == 4) && p.stride_h == 1 &&
           p.stride_w == 1 &&
           (p.groups == 1 || min64(p.c_per_group(), p.k_per_group()) >= kLeastOfGroup);
  }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    of_filter(p, [&](auto taps) { taps.run(p, direction, t); });
  }
  static bool fuses_pool(const Conv2dProblem& p, Direction direction) {
    return direction == Direction::fprop &&
           of_filter(p, [&](auto taps) { return taps.fuses_pool(p); });
  }
  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    return of_filter(p, [&](auto taps) { return taps.estimate(p, direction); });
  }
  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    return of_filter(p, [&](auto taps) { return taps.blocking(p, direction); });
  }

  static constexpr Conv2dAlgorithm kAlgorithm{.name = winograd_name(M),
                                              .masks_dgrad = true,
                                              .masks_wgrad = M == 4,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run,
                                              .scales_filter = true,
                                              .adds_residual = true,
                                              .fuses_pool = fuses_pool};

 private:
  // Of the longest filters; and whether there are tiles of one row or column, too.
  static constexpr int kTaps = 7 - M;
  static constexpr bool kHasLines = M % 2 == 0;

  // Calls body with a WinogradOfTaps of the filter's, which is one that serves() knows.
  template <class Body>
  static auto of_filter(const Conv2dProblem& p, const Body& body) {
    if constexpr (kHasLines) {
      if (p.r == 1) return body(WinogradOfTaps<V, M, 1, kTaps>{});
      if (p.s == 1) return body(WinogradOfTaps<V, M, kTaps, 1>{});
    }
    if constexpr (M == 2) {
      if (p.r == 3) return body(WinogradOfTaps<V, M, 3, 3>{});
    }
    return body(WinogradOfTaps<V, M, kTaps, kTaps>{});
  }
};

}  // namespace
}  // namespace fastconv::cpu
