// Winograd's minimal filtering for wgrad, F(3x3, 4x4), and F(3, 4) in one dimension: the 3 x 3 gradient that
// a 4 x 4 tile of dy and the 6 x 6 tile of the input under it make, by 36 multiplications a pair of channels
// instead of 144.
//
//   dfilter = G^T [ sum over tiles (B^T x B) * (A dy A^T) ] G, elementwise in the brackets
//
// The points are those of winograd.hpp, and so are the matrices: of Y = A^T [(G g G^T) * (B^T x B)] A this is
// the derivative by g. (A. Lavin, S. Gray, 2016, section 4.1; it names this F(3x3, 4x4) for the gradient.)
//
// Sums over tiles are 36 small matrix products of channels x tiles x filters. Tiles are cut into parts by
// the problem alone. Of each part, all tiles are transformed first; then some input channels are multiplied
// by a panel of output channels at all points, and transformed back. Parts add up in order: the same bits
// for any number of threads.
//
// Where the filter is small, a task takes some parts from the beginning to the end, with a sum of its own
// (a slot), in the caches of its core. Else all threads share each part, first its tiles and then its
// channels.
#pragma once

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/wgrad.hpp"
#include "cpu/winograd_transform.hpp"

namespace fastconv::cpu {
namespace {

// The product of one point: rows of channels x vectors of filters, summed over tiles.
struct PointTile {
  const float* x;  // [tile][x_row]
  int64_t x_row;
  const float* dy;  // [tile][vectors * width]
  int64_t tiles;
  float* product;  // [row][vectors * width]
};

template <class V, int Rows, int Vectors>
void point_tile(const PointTile& t) {
  typename V::Reg sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[i][v] = V::zero();
  const float* x = t.x;
  const float* dy = t.dy;
  unrolled<V::kProductsAtOnce>(
      t.tiles,
      [&](int tile) __attribute__((always_inline)) {
        add_row_of_products<V, true>(
            [&](int i) __attribute__((always_inline)) { return x + tile * t.x_row + i; },
            dy + tile * Vectors * V::kWidth, sum);
      },
      [&](int64_t tiles) {
        x += tiles * t.x_row;
        dy += tiles * Vectors * V::kWidth;
      });
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      V::store(t.product + (i * Vectors + v) * V::kWidth, sum[i][v]);
    }
}

using PointTileFunction = void (*)(const PointTile&);

// Of `Vectors` vectors, by rows - 1.
template <class V, int Vectors, std::size_t... I>
constexpr auto make_point_tiles(std::index_sequence<I...>) {
  return std::array<PointTileFunction, kMostGemmRows<V>>{point_tile<V, I + 1, Vectors>...};
}

// By vectors - 1 and rows - 1.
template <class V, std::size_t... I>
constexpr auto make_point_tile_table(std::index_sequence<I...>) {
  return std::array{
      make_point_tiles<V, I + 1>(std::make_index_sequence<std::size_t{V::kGemmRows[I + 1]}>{})...};
}

template <class V, class Vertical, class Horizontal>
struct WinogradWgrad {
  static constexpr int kTileH = Vertical::kPoints, kTileW = Horizontal::kPoints;
  static constexpr int kPoints = kTileH * kTileW;
  static constexpr bool kSixBySix = kTileH == 6 && kTileW == 6;
  static constexpr int kDyH = Vertical::kOutputs, kDyW = Horizontal::kOutputs;  // of a tile
  static constexpr int kR = Vertical::kTaps, kS = Horizontal::kTaps;
  using Reg = typename V::Reg;

  static void run(const Conv2dProblem& p, const Conv2dOperands& operands) {
    const std::size_t filter_bytes = static_cast<std::size_t>(p.filter_size()) * 4;
    const std::size_t bias_bytes = static_cast<std::size_t>(p.k) * 4;
    if (p.n * p.oh * p.ow == 0) {
      std::memset(operands.out, 0, filter_bytes);
      if (operands.dbias) std::memset(operands.dbias, 0, bias_bytes);
      return;
    }
    const Plan plan(p, operands.dbias != nullptr);
    const Workspace workspace(static_cast<std::size_t>(plan.workspace_bytes()));
    float* const zeros = workspace.floats();
    std::memset(zeros, 0, static_cast<std::size_t>(plan.zeros_floats) * 4);
    float* const sums = zeros + plan.zeros_floats;
    float* const bias_sums = sums + plan.sums_floats;
    float* const scratch = bias_sums + plan.bias_sums_floats;
    // Each group is a convolution of some channels of the tensors.
    const auto of_group = [&](int64_t group, int worker) {
      const int64_t k = group * plan.k;
      Conv2dOperands own = operands;
      own.x += group * plan.c;
      own.dy += k;
      if (own.y) own.y += k;
      own.out += k;
      if (own.dbias) own.dbias += k;
      float* const own_scratch = scratch + worker * plan.worker_floats();
      if (plan.slots > 1) {
        by_slots(p, plan, own, {zeros, sums + k, bias_sums + k, own_scratch});
      } else {
        by_parts(p, plan, own, {zeros, nullptr, nullptr, own_scratch});
      }
    };
    if (plan.groups_at_once) {
      parallel_for(p.groups, plan.workers, of_group);
    } else {
      for (int64_t group = 0; group < p.groups; ++group) of_group(group, 0);
    }
    if (plan.slots == 1) return;
    add_parts<V>(sums, plan.slots, p.filter_size(), operands.out);
    if (operands.dbias) add_parts<V>(bias_sums, plan.slots, p.k, operands.dbias);
  }

  static Estimate estimate(const Conv2dProblem& p) {
    const Plan plan(p, true);
    // In cycles of a core that does one vector multiply-add each; constants by measurement.
    const double tiles = static_cast<double>(plan.tiles), c = static_cast<double>(plan.c);
    const double c_vectors = static_cast<double>(ceil_div(plan.c, V::kWidth));
    const double k_vectors = static_cast<double>(plan.vectors);
    const double parts = static_cast<double>(plan.parts);
    // A tile's sums are made ready and stored at each point and part. With AVX2 fitted to 280 problems' times.
    constexpr bool kNarrow = V::kRegisters < 32;
    constexpr double kProduct = !kSixBySix ? 1.05 : kNarrow ? 1.15 : 1.25, kSum = kNarrow ? 2 : 10;
    constexpr double kX = kSixBySix ? (kNarrow ? 430 : 450) : kNarrow ? 60 : 80;
    constexpr double kDy = kSixBySix ? (kNarrow ? 290 : 400) : kNarrow ? 48 : 70;
    constexpr double kBack = kSixBySix ? 300 : 50, kPart = kNarrow ? 2500 : 6000;
    const double products = kPoints * (tiles * kProduct + parts * kSum) * c * k_vectors;
    const double apart = p.dilation_h * p.dilation_w > 1 ? 2 : 1;  // neighbours share fewer lines
    const double transforms = apart * tiles * (c_vectors * kX + k_vectors * kDy);
    const double back = parts * c * k_vectors * kBack;
    // Of few channels, each product is short of work and each load of the source short of a line.
    const double a_group = kNarrow ? 0.9 + 2 / c : 1 + 4 / c;
    const double groups = static_cast<double>(p.groups) * (p.groups > 1 ? a_group : 1);
    const double pieces = cost_of_pieces<V>(p, c, 16);
    return {(products + transforms + back + kPart * parts) * V::kWidth * groups * pieces,
            plan.workspace_bytes(), kSixBySix ? 5e-6 : 2e-6};
  }

  static std::string blocking(const Conv2dProblem& p) {
    const Plan plan(p, true);
    return tiles_in_words(plan.tiles, kDyH, kDyW, " in ", plan.parts, " partial sums");
  }

 private:
  // Of one group.
  struct Plan {
    WinogradGrid grid;
    int64_t c, k, tiles, parts, part_tiles;
    int64_t vectors, panels, panel_vectors;  // of output channels
    int64_t rows, c_tiles, c_groups, group_channels;
    int64_t x_row;                             // floats from tile to tile
    int64_t x_point, dy_point, product_point;  // and from point to point
    int64_t slots;  // partial sums, each of some parts; 1 where threads share the parts instead
    int64_t zeros_floats, sums_floats, bias_sums_floats;
    int64_t x_floats, dy_floats, bias_floats, product_floats;
    bool groups_at_once;  // threads take whole groups
    bool asks_ahead;      // for the next tile's pixels
    int workers;

    Plan(const Conv2dProblem& p, bool with_bias)
        : grid{{p.oh, p.dilation_h, kDyH}, {p.ow, p.dilation_w, kDyW}} {
      c = p.c_per_group();
      k = p.k_per_group();
      tiles = grid.count(p.n);
      vectors = ceil_div(k, V::kWidth);
      panels = gemm_panels<V>(vectors);
      panel_vectors = ceil_div(vectors, panels);
      // Tiles of a part: what they are transformed to stays in the second-level cache, and what they make
      // of one point and panel in the first; but enough of them to make up for the way back.
      x_row = odd_lines(c);
      constexpr int64_t kLeast = 56, kMost = 112;
      const int64_t fitting = (int64_t{1100} << 10) / (kPoints * (x_row + vectors * V::kWidth) * 4);
      parts = max64(1, ceil_div(tiles, max64(kLeast, min64(fitting, kMost))));
      part_tiles = ceil_div(tiles, parts);

      rows = V::kGemmRows[panel_vectors];
      c_tiles = ceil_div(c, rows);
      constexpr int64_t kTilesATask = 4, kEnoughTasks = 16;
      c_groups =
          max64(ceil_div(c_tiles, kTilesATask), min64(c_tiles, ceil_div(kEnoughTasks, panels)));
      group_channels = ceil_div(c_tiles, c_groups) * rows;

      x_point = odd_lines(part_tiles * x_row);
      dy_point = odd_lines(part_tiles * vectors * V::kWidth);
      product_point = odd_lines(group_channels * panel_vectors * V::kWidth);
      zeros_floats = round_up(max64(c, k) + V::kWidth, 16);
      x_floats = round_up(kPoints * x_point, 16);
      dy_floats = round_up(kPoints * dy_point, 16);
      bias_floats = with_bias ? round_up(dy_point, 16) : 0;
      product_floats = kPoints * product_point;

      constexpr int64_t kSumsBytes = int64_t{5} << 20, kMostSlots = 16, kLeastSlots = 4;
      slots = min64(min64(parts, kMostSlots), kSumsBytes / max64(p.filter_size() * 4, 1));
      if (slots < kLeastSlots) slots = 1;
      sums_floats = slots > 1 ? round_up(slots * p.filter_size(), 16) : 0;
      bias_sums_floats = slots > 1 && with_bias ? round_up(slots * p.k, 16) : 0;
      asks_ahead = kTilesAsk<V> && p.groups == 1 && beyond_caches(p.x_size() + p.y_size());
      const int threads = num_threads();
      groups_at_once = p.groups >= 4 * threads || (p.groups > 1 && p.groups % threads == 0);
      workers = workers_for(groups_at_once ? p.groups : slots > 1 ? slots : c_groups * panels);
    }
    int64_t worker_floats() const { return x_floats + dy_floats + bias_floats + product_floats; }
    int64_t workspace_bytes() const {
      const bool own = groups_at_once || slots > 1;
      const int64_t scratch =
          own ? workers * worker_floats() : worker_floats() + (workers - 1) * product_floats;
      return 4 * (zeros_floats + sums_floats + bias_sums_floats + scratch);
    }
    int vectors_of(int64_t panel) const {
      return static_cast<int>(min64(panel_vectors, vectors - panel * panel_vectors));
    }
    // Where a panel of one point begins: [point][panel][tile][vectors * width].
    int64_t panel_offset(int64_t panel) const {
      return panel * panel_vectors * V::kWidth * part_tiles;
    }
    // A group's register tiles, and a tile's input channels.
    int64_t first_tile(int64_t group) const { return c_tiles * group / c_groups; }
    int64_t channel(int64_t tile) const { return c * tile / c_tiles; }
  };

  // Memory of a group: its columns of the slots' sums, and scratch.
  struct Memory {
    float *zeros, *sums, *bias_sums, *scratch;
  };

  // Scratch memory of a part, and where its product goes.
  struct Buffers {
    const float* zeros;
    float *x, *dy, *bias_sums, *product;

    Buffers(const Plan& plan, const float* zeros, float* at)
        : zeros(zeros), x(at), dy(x + plan.x_floats), bias_sums(dy + plan.dy_floats),
          product(bias_sums + plan.bias_floats) {}
  };

  static void transform_tile(const Conv2dProblem& p, const Plan& plan, const Conv2dOperands& t,
                             int64_t tile, int64_t slot, const Buffers& buffers) {
    const bool asks = plan.asks_ahead;
    (asks ? transform_x<kTilesAsk<V>> : transform_x<false>)(p, plan, t.x, tile, slot, buffers);
    (asks ? transform_dy<kTilesAsk<V>> : transform_dy<false>)(p, plan, t, tile, slot, buffers);
  }

  // A part's share of a panel and a group of channels; the first part sets what the others add to.
  static void multiply_and_add(const Conv2dProblem& p, const Plan& plan, int64_t panel,
                               int64_t group, int64_t tiles, const Buffers& buffers, bool adds,
                               float* dfilter, float* dbias) {
    multiply(plan, panel, group, tiles, buffers);
    transform_back(p, plan, panel, group, buffers.product, adds, dfilter);
    if (dbias && group == 0) add_bias(plan, panel, tiles, buffers.bias_sums, adds, dbias);
  }

  // Leaves the sums of each slot in memory.sums and memory.bias_sums.
  static void by_slots(const Conv2dProblem& p, const Plan& plan, const Conv2dOperands& t,
                       const Memory& memory) {
    parallel_for(plan.slots, plan.workers, [&](int64_t slot, int worker) {
      const Buffers buffers(plan, memory.zeros, memory.scratch + worker * plan.worker_floats());
      const Span parts = part_of(plan.parts, plan.slots, slot);
      for (int64_t part = parts.begin; part < parts.end; ++part) {
        const Span of_part = part_of(plan.tiles, plan.parts, part);
        const int64_t tiles = of_part.size();
        for (int64_t tile = 0; tile < tiles; ++tile) {
          transform_tile(p, plan, t, of_part.begin + tile, tile, buffers);
        }
        for (int64_t panel = 0; panel < plan.panels; ++panel)
          for (int64_t group = 0; group < plan.c_groups; ++group) {
            multiply_and_add(p, plan, panel, group, tiles, buffers, part > parts.begin,
                             memory.sums + slot * p.filter_size(),
                             t.dbias ? memory.bias_sums + slot * p.k : nullptr);
          }
      }
    });
  }

  static void by_parts(const Conv2dProblem& p, const Plan& plan, const Conv2dOperands& t,
                       const Memory& memory) {
    const Buffers shared(plan, memory.zeros, memory.scratch);
    for (int64_t part = 0; part < plan.parts; ++part) {
      const Span of_part = part_of(plan.tiles, plan.parts, part);
      const int64_t tiles = of_part.size();
      const int64_t tile_floats = kPoints * (plan.x_row + plan.vectors * V::kWidth);
      parallel_by_floats(tiles, tile_floats, [&](int64_t tile) {
        transform_tile(p, plan, t, of_part.begin + tile, tile, shared);
      });
      parallel_for(plan.c_groups * plan.panels, plan.workers, [&](int64_t task, int worker) {
        Buffers buffers = shared;
        buffers.product += worker * plan.product_floats;
        multiply_and_add(p, plan, task / plan.c_groups, task % plan.c_groups, tiles, buffers,
                         part > 0, t.out, t.dbias);
      });
    }
  }

  // Calls body(first channel, vector, tail...) for each vector of `channels` channels.
  template <class Body>
  static void for_each_vector(int64_t channels, const Body& body) {
    const int64_t whole = channels / V::kWidth;
    for (int64_t v = 0; v < whole; ++v) body(v * V::kWidth, v);
    if (whole * V::kWidth < channels) {
      body(whole * V::kWidth, whole, V::tail(static_cast<int>(channels - whole * V::kWidth)));
    }
  }

  // Where the next tile's dy begins, and what it reads of x and this one does not.
  static int64_t next_dy(const Conv2dProblem& p, const Plan& plan, int64_t tile) {
    const WinogradGrid::Corner at = plan.grid.corner(tile + 1);
    return ((at.n * p.oh + at.row) * p.ow + at.column) * p.k;
  }
  static int64_t next_x(const Conv2dProblem& p, const Plan& plan, int64_t tile) {
    const WinogradGrid::Corner at = plan.grid.corner(tile + 1);
    const int64_t column = at.column - p.pad_left + (kTileW - kDyW) * p.dilation_w;
    return ((at.n * p.h + at.row - p.pad_top) * p.w + column) * p.c;
  }

  // `tile` of the problem, `slot` of the part.
  template <bool Asks>
  static void transform_x(const Conv2dProblem& p, const Plan& plan, const float* x, int64_t tile,
                          int64_t slot, const Buffers& buffers) {
    const WinogradGrid::Corner corner = plan.grid.corner(tile);
    const int64_t top = corner.row - p.pad_top, left = corner.column - p.pad_left;
    const float* pixels[kPoints];
    for (int i = 0; i < kTileH; ++i)
      for (int j = 0; j < kTileW; ++j) {
        const int64_t row = top + i * p.dilation_h, column = left + j * p.dilation_w;
        const bool inside = row >= 0 && row < p.h && column >= 0 && column < p.w;
        pixels[i * kTileW + j] =
            inside ? x + ((corner.n * p.h + row) * p.w + column) * p.c : buffers.zeros;
      }
    float* const out = buffers.x + slot * plan.x_row;
    const int64_t next_pixel = p.dilation_w * p.c, next_row = p.dilation_h * p.w * p.c;
    const float* const next = x + next_x(p, plan, tile);
    for_each_vector(plan.c, [&](int64_t c, int64_t, const auto&... tail) {
      if (Asks && c % kLine == 0) {
        ask_for_pixels<kTileH, kDyW>(next + c, next_row, next_pixel);
      }
      transform_2d<V, kTileH, kTileW, kTileH, kTileW>(
          Vertical::input, Horizontal::input,
          [&](int i, int j) { return V::load(pixels[i * kTileW + j] + c, tail...); },
          [&](int i, int j, Reg value) {
            V::store(out + (i * kTileW + j) * plan.x_point + c, value);
          });
    });
  }

  // Likewise; what ReLU stopped is zero, and the sum of the tile is kept for the bias.
  template <bool Asks>
  static void transform_dy(const Conv2dProblem& p, const Plan& plan, const Conv2dOperands& t,
                           int64_t tile, int64_t slot, const Buffers& buffers) {
    const WinogradGrid::Corner corner = plan.grid.corner(tile);
    const float *pixels[kDyH * kDyW], *masks[kDyH * kDyW];
    for (int i = 0; i < kDyH; ++i)
      for (int j = 0; j < kDyW; ++j) {
        const int64_t row = corner.row + i * p.dilation_h;
        const int64_t column = corner.column + j * p.dilation_w;
        const bool inside = row < p.oh && column < p.ow;
        const int64_t at = ((corner.n * p.oh + row) * p.ow + column) * p.k;
        pixels[i * kDyW + j] = inside ? t.dy + at : buffers.zeros;
        masks[i * kDyW + j] = inside && t.y ? t.y + at : buffers.zeros;
      }
    const int64_t next_pixel = p.dilation_w * p.k, next_row = p.dilation_h * p.ow * p.k;
    const int64_t next = next_dy(p, plan, tile);
    for_each_vector(plan.k, [&](int64_t k, int64_t vector, const auto&... tail) {
      if (Asks && k % kLine == 0) {
        ask_for_pixels<kDyH, kDyW>(t.dy + next + k, next_row, next_pixel);
        if (t.y) ask_for_pixels<kDyH, kDyW>(t.y + next + k, next_row, next_pixel);
      }
      const int64_t panel = vector / plan.panel_vectors;
      float* const out = buffers.dy + plan.panel_offset(panel) +
                         (slot * plan.vectors_of(panel) + vector % plan.panel_vectors) * V::kWidth;
      Reg sum = V::zero();
      transform_2d<V, kDyH, kDyW, kTileH, kTileW>(
          Vertical::dy, Horizontal::dy,
          [&](int i, int j) {
            Reg value = V::load(pixels[i * kDyW + j] + k, tail...);
            if (t.y) {
              value = V::where_positive(V::load(masks[i * kDyW + j] + k, tail...), value);
            }
            sum = V::add(sum, value);
            return value;
          },
          [&](int i, int j, Reg value) {
            V::store(out + (i * kTileW + j) * plan.dy_point, value);
          });
      if (t.dbias) {
        V::store(buffers.bias_sums + (slot * plan.vectors + vector) * V::kWidth, sum);
      }
    });
  }

  // product[point][channel of the group][vectors * width].
  static void multiply(const Plan& plan, int64_t panel, int64_t group, int64_t tiles,
                       const Buffers& buffers) {
    static constexpr auto kTiles =
        make_point_tile_table<V>(std::make_index_sequence<std::size_t{kGemmVectors<V>}>{});
    const int vectors = plan.vectors_of(panel);
    const auto& tile_by_rows = kTiles[static_cast<std::size_t>(vectors - 1)];
    const int64_t begin = plan.first_tile(group), end = plan.first_tile(group + 1);
    const int64_t first = plan.channel(begin);
    PointTile t{};
    t.x_row = plan.x_row;
    t.tiles = tiles;
    for (int point = 0; point < kPoints; ++point) {
      t.dy = buffers.dy + point * plan.dy_point + plan.panel_offset(panel);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t c = plan.channel(tile);
        const int64_t count = plan.channel(tile + 1) - c;
        t.x = buffers.x + point * plan.x_point + c;
        t.product = buffers.product + point * plan.product_point +
                    (c - first) * int64_t{vectors} * V::kWidth;
        tile_by_rows[static_cast<std::size_t>(count - 1)](t);
      }
    }
  }

  // Adds to dfilter, or sets it.
  static void transform_back(const Conv2dProblem& p, const Plan& plan, int64_t panel, int64_t group,
                             const float* product, bool adds, float* dfilter) {
    const int64_t first = plan.channel(plan.first_tile(group));
    const int64_t end = plan.channel(plan.first_tile(group + 1));
    const int64_t vectors = plan.vectors_of(panel);
    for (int64_t c = first; c < end; ++c)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t k = (panel * plan.panel_vectors + v) * V::kWidth;
        const auto tail = V::tail(static_cast<int>(min64(V::kWidth, plan.k - k)));
        const float* const from = product + ((c - first) * vectors + v) * V::kWidth;
        float* const to = dfilter + c * p.k + k;
        transform_2d<V, kTileH, kTileW, kR, kS>(
            Vertical::dfilter, Horizontal::dfilter,
            [&](int i, int j) { return V::load(from + (i * kTileW + j) * plan.product_point); },
            [&](int r, int s, Reg value) {
              float* const here = to + (kS * r + s) * plan.c * p.k;
              if (adds) value = V::add(V::load(here, tail), value);
              V::store(here, value, tail);
            });
      }
  }

  // The sums of the tiles of a part, in order.
  static void add_bias(const Plan& plan, int64_t panel, int64_t tiles, const float* sums, bool adds,
                       float* dbias) {
    for (int64_t v = 0; v < plan.vectors_of(panel); ++v) {
      const int64_t vector = panel * plan.panel_vectors + v, k = vector * V::kWidth;
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, plan.k - k)));
      Reg sum = V::zero();
      for (int64_t tile = 0; tile < tiles; ++tile) {
        sum = V::add(sum, V::load(sums + (tile * plan.vectors + vector) * V::kWidth));
      }
      if (adds) sum = V::add(V::load(dbias + k, tail), sum);
      V::store(dbias + k, sum, tail);
    }
  }
};

}  // namespace
}  // namespace fastconv::cpu
