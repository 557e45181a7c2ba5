// Winograd's minimal filtering along the rows of images of few channels (the first layer of a network), fprop:
// F(4, 3), F(3, 4) and F(2, 5), of any stride and any number of rows of taps.
//
// A stride of s along the row is none of a row whose pixels are taken s together: of s C channels, under a filter of
// ceil(S / s) taps, the last of which may be partly zeros. So a 7 x 7 filter of stride 2 on 3 channels has 4 taps of 6
// channels a row, and one of 11 x 11 and stride 4 has 3 of 12. Of a tile of M outputs,
//
//   Y = A^T [ sum over rows of taps, channels (G g) * (B^T d) ],  elementwise in the brackets
//
// (S. Winograd, "Arithmetic Complexity of Computations", 1980, at the points of winograd_transform.hpp.) The sum
// is taken before the way back, so that its length is that of a column of the filter, all channels of it: in two
// dimensions, of 3 channels, what is done for each sum would take longer than the sum. Rows of more taps than R
// are cut into pieces that begin M taps apart: a piece's transformed input is the next tile's, and the sum longer.
//
// A task takes a strip of output rows. It transforms the input rows under it, and then, one panel of output
// channels after the other, multiplies with the register tiles of small_channel.hpp, all points of a tile, and
// transforms the tile before back. The rounding errors are those of one dimension.
//
// Where the source under the filter is zero throughout, the result is exactly the bias, as in winograd.hpp.
#pragma once

#include "cpu/blank.hpp"
#include "cpu/small_channel.hpp"
#include "cpu/streaming.hpp"
#include "cpu/winograd_transform.hpp"

namespace fastconv::cpu {
namespace {

// Tiles whose products are to be transformed back, which is done between the products of those that come next:
// the stores of the output wait for its lines, and so are spread out.
struct TilesBack {
  // Of a panel: all pixels of a tile, and so many.
  void (*whole)(const TilesBack&);
  void (*part)(const TilesBack&, int64_t pixels);
  int64_t outputs;                      // of a tile
  int64_t y_pixel;                      // floats from one to the next
  const float* bias;                    // null for none
  int columns;                          // of the last vector
  float ceiling;                        // of ReLU
  int64_t product_point, product_tile;  // floats from one to the next
  int64_t tiles;
  int64_t pixels;  // of the output row, from y on
  const float* products;
  float* y;

  void next() {
    if (pixels >= outputs) {
      whole(*this);
    } else {
      part(*this, pixels);
    }
    products += product_tile;
    y += outputs * y_pixel;
    pixels -= outputs;
    --tiles;
  }
};

// Register tiles of one row and panel, one after the other: product[point][tile] = sum over steps of
// x[point][tile * step + offset] * filter[point]. (`common`: of StridedTile, whose y is the products, without a bias.)
struct PointsTile {
  StridedTile common;
  int64_t x_point, filter_point;  // floats from one to the next
  float* other;    // where the products of the register tile after this one go: they take turns
  TilesBack back;  // of the first tile
};

// `waiting` are the tiles before, and then the last of these.
template <class V, int Rows, int Vectors, int Group>
void points_tile(PointsTile& t, TilesBack& waiting) {
  constexpr int kPoints = SixPoints<V>::kPoints;
  constexpr int kATime = ceil_div(strided_rows<V>(Vectors), kPoints);
  StridedTile& common = t.common;
  for (; common.tiles > 0; --common.tiles) {
    const float *filter = common.filter, *x = common.x;
    float* products = common.y;
    for (int point = 0; point < kPoints; ++point) {
      one_strided_tile<V, Rows, Vectors, Group>(common, x, filter, nullptr, products, V::kWidth);
      x += t.x_point;
      products += t.back.product_point;
      filter += t.filter_point;
      for (int i = 0; i < kATime && waiting.tiles > 0; ++i) waiting.next();
    }
    while (waiting.tiles > 0) waiting.next();  // of a narrower panel, whose tiles are more
    waiting = t.back;
    waiting.tiles = Rows;
    waiting.products = common.y;
    std::swap(common.y, t.other);
    common.x += Rows * common.step;
    t.back.y += Rows * t.back.outputs * t.back.y_pixel;
    t.back.pixels -= Rows * t.back.outputs;
  }
}

using PointsTileFunction = void (*)(PointsTile&, TilesBack&);

template <class V, int Group>
PointsTileFunction points_tile_function(int rows, int vectors) {
  static constexpr auto kTable = by_vectors_and_rows<V, std::size_t{V::kVectors}>(
      []<int Rows, int Vectors>() -> PointsTileFunction {
        return points_tile<V, Rows, Vectors, Group>;
      });
  return kTable[static_cast<std::size_t>(vectors - 1)][static_cast<std::size_t>(rows - 1)];
}

template <class V>
struct WinogradRows {
  using Reg = typename V::Reg;
  static constexpr int kPoints = SixPoints<V>::kPoints;

  static bool serves(const Conv2dProblem& p, Direction direction) {
    return direction == Direction::fprop && p.groups == 1 && p.dilation_w == 1 &&
           ceil_div(p.s, p.stride_w) >= kLeastTaps && p.c * p.stride_w <= kMostChannels &&
           !mostly_padding(p, (p.r - 1) * p.dilation_h + 1, (p.ow - 1) * p.stride_w + p.s);
  }

  static void run(const Conv2dProblem& p, Direction, const Conv2dOperands& t) {
    if (p.y_size() == 0) return;
    const Plan plan(p);
    FilterForms::Floats kept;
    if (t.packed) {
      kept = t.packed->in_layout({kName, V::kWidth, plan.panels, 1, {p.stride_w}},
                                 static_cast<std::size_t>(plan.filter_floats) * 4,
                                 [&](float* u) { transform_filter(plan, t.filter, t.scale, u); });
    }
    const int workers = workers_for(plan.tasks());
    const int64_t unused = kept ? plan.filter_floats * 4 : 0;
    const Workspace workspace(static_cast<std::size_t>(plan.workspace_bytes(workers) - unused));
    int64_t* const steps = reinterpret_cast<int64_t*>(workspace.floats());
    write_steps(steps, p.r, p.dilation_h * plan.row_floats, plan.run, plan.group,
                [](int64_t j) { return j; });
    float* const own = workspace.floats() + plan.steps_floats;
    float* const filter = own + workers * plan.own_floats;
    if (!kept) transform_filter(plan, t.filter, t.scale, filter);
    // Where no cache holds the output, stores that wait for its lines hold up those of the products behind them.
    const bool streams = beyond_caches(p.x_size() + p.y_size()) && whole_lines(t.out, p.k);
    const PanelKind whole(plan, 0, streams), last(plan, plan.panels - 1, streams);
    const Shared shared{kept ? kept.get() : filter, steps, whole, last, streams};
    parallel_for(plan.tasks(), workers, [&](int64_t task, int worker) {
      compute_strip(plan, t, shared, task, Scratch(plan, own + worker * plan.own_floats));
    });
  }

  static Estimate estimate(const Conv2dProblem& p, Direction) {
    const Plan plan(p, 1);  // the choice must not depend on the number of threads
    // In cycles of a core that does one vector multiply-add each; fitted to the times of 260 problems with AVX2, one
    // thread of a Zen 3. With AVX-512 it has not been tried.
    constexpr double kUntried = V::kRegisters == 32 ? 1.2 : 1;
    constexpr double kProduct = 1.01, kLoneVector = 0.27, kSum = 3.2, kOutput = 7.7, kInput = 44,
                     kFilter = 79;
    constexpr double kTail = 5.5, kStored = 2.3, kStreamed = 0.5, kWaitedFor = 12;  // of a vector
    const double rows = static_cast<double>(p.n * p.oh);
    const double products = kPoints * static_cast<double>(p.r * plan.run);
    const double sums = static_cast<double>(plan.tiles * plan.vectors);
    // Of fewer sums than this, a register tile waits for the multiply-adds before.
    constexpr int64_t kLeastSums = 8;
    const auto of_panel = [&](int64_t panel) {
      const int vectors = plan.vectors_of(panel);
      const LikeTiles cut = plan.cut(vectors);
      return (vectors == 1 ? kProduct + kLoneVector : kProduct) *
             static_cast<double>(cut.larger * max64(kLeastSums, (cut.least + 1) * vectors) +
                                 (cut.count - cut.larger) * max64(kLeastSums, cut.least * vectors));
    };
    const double computed =
        static_cast<double>(plan.panels - 1) * of_panel(0) + of_panel(plan.panels - 1);
    const double source_tiles = static_cast<double>(p.n * plan.strips) *
                                static_cast<double>(plan.source_rows * plan.tiles_read);
    // What a second-level cache does not hold.
    const double stored =
        static_cast<double>(max64(0, p.y_size() - (int64_t{64} << 10))) / V::kWidth;
    const double a_vector = !beyond_caches(p.x_size() + p.y_size()) ? kStored
                            : p.k % kLine == 0                      ? kStreamed
                                                                    : kWaitedFor;
    constexpr double kCall = 20000;  // lest it be chosen where it wins little
    const double cycles =
        kCall +
        rows * (products * computed + kPoints * kSum * sums +
                kOutput * sums * static_cast<double>(plan.outputs)) +
        kInput * source_tiles * static_cast<double>(ceil_div(plan.depth, V::kWidth)) +
        kFilter * static_cast<double>(p.r * plan.run * plan.vectors) + a_vector * stored +
        (p.k % V::kWidth == 0 ? 0 : kTail * rows * static_cast<double>(p.ow));
    return {kUntried * cycles * V::kWidth, plan.workspace_bytes(workers_for(plan.tasks())), 2e-6};
  }

  static std::string blocking(const Conv2dProblem& p, Direction) {
    const Plan plan(p);
    return "tiles of " + std::to_string(plan.outputs) + " pixels of a row under " +
           std::to_string(plan.pieces) + " x " + std::to_string(kPoints + 1 - plan.outputs) +
           " taps, strips of " + std::to_string(plan.strip_rows) + " rows";
  }

  static constexpr const char* kName = "winograd_rows";
  static constexpr Conv2dAlgorithm kAlgorithm{.name = kName,
                                              .masks_dgrad = false,
                                              .masks_wgrad = false,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run,
                                              .scales_filter = true};

 private:
  static constexpr int64_t kLeastTaps = 3, kMostChannels = 64;  // of pixels taken together

  struct Plan {
    const Conv2dProblem& p;
    int64_t taps, depth;            // of a row, and channels, of pixels taken together
    int64_t outputs, pieces;        // of a tile; of a row of taps
    int64_t run;                    // products of a row of taps
    int64_t tiles;                  // of an output row
    int64_t tiles_read;             // with those whose input the last tile's pieces take
    int64_t vectors, panels;        // of output channels
    int64_t group;                  // products that the register tile takes at once
    int64_t strip_rows, strips;     // output rows of a task; tasks of an image
    int64_t source_rows, source_w;  // below a strip; pixels of one that are looked at
    int64_t point_floats,
        row_floats;          // from point to point, from row to row of the transformed input
    int64_t product_floats;  // from point to point of the products
    int64_t filter_floats, steps_floats, source_floats, own_floats;

    explicit Plan(const Conv2dProblem& problem, int64_t threads = num_threads())
        : p(problem), taps(ceil_div(p.s, p.stride_w)), depth(p.stride_w * p.c) {
      outputs = taps == 3 ? 4 : taps == 5 ? 2 : 3;
      const int64_t of_piece = kPoints + 1 - outputs;
      pieces = 1 + ceil_div(max64(0, taps - of_piece), outputs);
      run = pieces * depth;
      tiles = ceil_div(p.ow, outputs);
      tiles_read = tiles + pieces - 1;
      vectors = ceil_div(p.k, V::kWidth);
      panels = ceil_div(vectors, V::kVectors);
      group = V::kProductsAtOnce == 1 ? 1 : run % 3 == 0 ? 3 : run % 2 == 0 ? 2 : 1;
      source_w = (p.ow - 1) * p.stride_w + p.s;
      const int64_t source_reads = (tiles_read * outputs + kPoints - outputs) * depth;
      source_floats = round_up(max64(source_reads, source_w * p.c) + V::kWidth, kLine);
      point_floats = odd_lines(tiles_read * depth + V::kWidth);
      row_floats = kPoints * point_floats;
      // What stays in a second-level cache beside the output, and strips enough for all threads.
      constexpr int64_t kStripBytes = int64_t{192} << 10;
      const int64_t enough =
          threads > 1 ? tasks_for(p.n * p.oh * tiles * kPoints * p.r * run * p.k) : 1;
      strip_rows = p.oh;
      while (strip_rows > 1 && (source_rows_of(strip_rows) * row_floats * 4 > kStripBytes ||
                                p.n * ceil_div(p.oh, strip_rows) < enough)) {
        strip_rows = (strip_rows + 1) / 2;
      }
      strips = ceil_div(p.oh, strip_rows);
      source_rows = source_rows_of(strip_rows);
      product_floats = odd_lines(strided_rows<V>(1) * V::kVectors * V::kWidth);
      filter_floats = round_up(kPoints * p.r * run * vectors * V::kWidth, kLine);
      steps_floats = round_up(p.r * (run / group) * 2, kLine);
      own_floats = source_floats + source_rows * row_floats + 2 * kPoints * product_floats +
                   round_up(source_rows * (source_w + 1), kLine);
    }
    int64_t source_rows_of(int64_t rows) const {
      return (rows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    }
    int64_t tasks() const { return p.n * strips; }
    int64_t workspace_bytes(int workers) const {
      return 4 * (filter_floats + steps_floats + workers * own_floats);
    }
    int vectors_of(int64_t panel) const {
      return static_cast<int>(min64(V::kVectors, vectors - panel * V::kVectors));
    }
    // A row's tiles as a panel of so many vectors takes them.
    LikeTiles cut(int vectors) const { return {tiles, ceil_div(tiles, strided_rows<V>(vectors))}; }
    // Floats of a panel's point, and where those of a panel begin.
    int64_t filter_point(int64_t panel) const { return p.r * run * vectors_of(panel) * V::kWidth; }
    int64_t filter_offset(int64_t panel) const {
      return kPoints * p.r * run * panel * V::kVectors * V::kWidth;
    }
  };

  // A worker's memory.
  struct Scratch {
    float* source;    // a row of the image, with its padding
    float* points;    // [row][point][tile][channel]: the transformed input
    float* products;  // [2][point][tile][channel of the panel], of two register tiles
    // [row][column]: how many pixels are zero throughout, up to this one; and whether that is a filter's row of
    // them anywhere.
    std::int32_t *zeros, *may_be_blank;

    Scratch(const Plan& plan, float* own)
        : source(own), points(source + plan.source_floats),
          products(points + plan.source_rows * plan.row_floats),
          zeros(reinterpret_cast<std::int32_t*>(products + 2 * kPoints * plan.product_floats)),
          may_be_blank(zeros + plan.source_rows * plan.source_w) {}
  };

  // Calls body(M) with the outputs of a tile as a constant.
  template <class Body>
  static void of_outputs(const Plan& plan, const Body& body) {
    switch (plan.outputs) {
      case 2: return body(std::integral_constant<int, 2>{});
      case 3: return body(std::integral_constant<int, 3>{});
      case 4: return body(std::integral_constant<int, 4>{});
    }
  }
  template <int M>
  using Transform = WinogradTransform<V, M, kPoints + 1 - M>;

  // u[panel][point][row of taps][piece][channel][column of the panel]
  static void transform_filter(const Plan& plan, const float* filter, const float* scale,
                               float* u) {
    of_outputs(plan, [&](auto outputs) { transform_filter<outputs()>(plan, filter, scale, u); });
  }

  template <int M>
  static void transform_filter(const Plan& plan, const float* filter, const float* scale,
                               float* u) {
    constexpr int kTaps = Transform<M>::kTaps;
    const Conv2dProblem& p = plan.p;
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      const int vectors = plan.vectors_of(panel);
      for (int v = 0; v < vectors; ++v) {
        const int64_t k = (panel * V::kVectors + v) * V::kWidth;
        const auto tail = V::tail(static_cast<int>(min64(V::kWidth, p.k - k)));
        const Reg scales = scale ? V::load(scale + k, tail) : V::set(1);
        float* out = u + plan.filter_offset(panel) + v * V::kWidth;
        for (int64_t row = 0; row < p.r * plan.run; ++row, out += vectors * V::kWidth) {
          const int64_t r = row / plan.run, piece = row % plan.run / plan.depth;
          const int64_t pixel = row % plan.depth / p.c, c = row % p.c;
          Reg g[kTaps], points[kPoints];
#pragma GCC unroll 5
          for (int i = 0; i < kTaps; ++i) {
            const int64_t s = (piece * M + i) * p.stride_w + pixel;
            // A tap that the next piece begins with is that one's.
            const bool own = s < p.s && (i < M || piece + 1 == plan.pieces);
            const float* const tap = filter + ((r * p.s + s) * p.c + c) * p.k + k;
            g[i] = own ? V::multiply(V::load(tap, tail), scales) : V::zero();
          }
          Transform<M>::filter(g, points);
#pragma GCC unroll 6
          for (int i = 0; i < kPoints; ++i) {
            V::store(out + i * plan.filter_point(panel), points[i]);
          }
        }
      }
    }
  }

  static PointsTileFunction tile_function(int64_t group, int rows, int vectors) {
    if constexpr (V::kProductsAtOnce > 1) {
      if (group == 3) return points_tile_function<V, 3>(rows, vectors);
      if (group == 2) return points_tile_function<V, 2>(rows, vectors);
    }
    return points_tile_function<V, 1>(rows, vectors);
  }

  // How panels of as many channels as this one are computed.
  struct PanelKind {
    LikeTiles cut;                     // of a row's tiles
    PointsTileFunction least, larger;  // of register tiles of these sizes
    TilesBack back{};

    PanelKind(const Plan& plan, int64_t panel, bool streams) {
      const Conv2dProblem& p = plan.p;
      const int vectors = plan.vectors_of(panel);
      cut = plan.cut(vectors);
      least = tile_function(plan.group, static_cast<int>(cut.least), vectors);
      larger = cut.larger > 0 ? tile_function(plan.group, static_cast<int>(cut.least + 1), vectors)
                              : nullptr;
      back.outputs = plan.outputs;
      back.y_pixel = p.k;
      back.columns =
          static_cast<int>(min64(V::kWidth, p.k - (panel * V::kVectors + vectors - 1) * V::kWidth));
      back.ceiling = ceiling_of(p.activation);
      back.product_point = plan.product_floats;
      back.product_tile = int64_t{vectors} * V::kWidth;
      const auto set = [&](auto outputs, auto count, auto relu, auto limited) {
        back.whole = streams ? whole_back<outputs(), count(), relu(), limited(), true>
                             : whole_back<outputs(), count(), relu(), limited(), false>;
        back.part = part_back<outputs(), count(), relu(), limited()>;
      };
      of_outputs(plan, [&](auto outputs) {
        as_constant(vectors == V::kVectors, [&](auto several) {
          constexpr int kVectors = several() ? V::kVectors : 1;
          constexpr std::integral_constant<int, kVectors> kCount;
          as_constant(p.activation != Activation::linear, [&](auto relu) {
            as_constant(p.activation == Activation::relu6,
                        [&](auto limited) { set(outputs, kCount, relu, limited); });
          });
        });
      });
    }
  };

  // What all tasks of a call share.
  struct Shared {
    const float* filter;
    const int64_t* steps;
    const PanelKind &whole, &last;  // of panels
    bool streams;
  };

  static void compute_strip(const Plan& plan, const Conv2dOperands& t, const Shared& shared,
                            int64_t task, const Scratch& own) {
    const Conv2dProblem& p = plan.p;
    const int64_t n = task / plan.strips;
    const Span rows = part_of(p.oh, plan.strips, task % plan.strips);
    of_outputs(plan, [&](auto outputs) {
      transform_rows<outputs()>(plan, t.x + n * p.h * p.w * p.c, rows, own);
    });
    float* const y = t.out + n * p.oh * p.ow * p.k;
    TilesBack waiting{};
    PointsTile tile{};
    tile.x_point = plan.point_floats;
    tile.other = own.products + kPoints * plan.product_floats;
    StridedTile& common = tile.common;
    common.step = plan.depth;
    common.steps = shared.steps;
    common.groups = p.r * (plan.run / plan.group);
    common.y = own.products;
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      const PanelKind& kind = panel + 1 < plan.panels ? shared.whole : shared.last;
      const int64_t k = panel * V::kVectors * V::kWidth;
      common.filter = shared.filter + plan.filter_offset(panel);
      common.y_step = kind.back.product_tile;
      tile.filter_point = plan.filter_point(panel);
      tile.back = kind.back;
      tile.back.bias = t.bias ? t.bias + k : nullptr;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        common.x = own.points + (row - rows.begin) * p.stride_h * plan.row_floats;
        tile.back.y = y + row * p.ow * p.k + k;
        tile.back.pixels = p.ow;
        common.tiles = kind.cut.larger;
        if (common.tiles > 0) kind.larger(tile, waiting);
        common.tiles = kind.cut.count - kind.cut.larger;
        kind.least(tile, waiting);
      }
    }
    while (waiting.tiles > 0) waiting.next();
    if (shared.streams) V::drain();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      blank_out(plan, own, (row - rows.begin) * p.stride_h, t.bias, y + row * p.ow * p.k);
    }
  }

  // The input rows below some output rows of an image.
  template <int M>
  static void transform_rows(const Plan& plan, const float* image, Span rows, const Scratch& own) {
    const Conv2dProblem& p = plan.p;
    const int64_t left = min64(p.pad_left, plan.source_w) * p.c;
    const int64_t middle = min64(p.w * p.c, plan.source_w * p.c - left);
    std::memset(own.source, 0, static_cast<std::size_t>(plan.source_floats) * 4);
    const int64_t first = rows.begin * p.stride_h - p.pad_top;
    float* points = own.points;
    std::int32_t* zeros = own.zeros;
    const int64_t count = plan.source_rows_of(rows.size());
    for (int64_t i = 0; i < count; ++i, points += plan.row_floats, zeros += plan.source_w) {
      const int64_t row = first + i;
      if (row < 0 || row >= p.h) {
        std::memset(points, 0, static_cast<std::size_t>(plan.row_floats) * 4);
        std::fill(zeros, zeros + plan.source_w, static_cast<std::int32_t>(p.s));
        own.may_be_blank[i] = 1;
        continue;
      }
      if (middle > 0) {
        std::memcpy(own.source + left, image + row * p.w * p.c,
                    static_cast<std::size_t>(middle) * 4);
      }
      own.may_be_blank[i] = count_zeros(
          plan.source_w, p.s,
          [&](int64_t j) { return is_zero<V>(own.source + j * p.c, nullptr, p.c); }, zeros);
      transform_row<M>(plan, own.source, points);
    }
  }

  // Whole vectors, whose spare lanes the next tile writes over.
  template <int M>
  static void transform_row(const Plan& plan, const float* source, float* points) {
    const int64_t depth = plan.depth, next_point = plan.point_floats;
    const auto transform = [&](const float* from, float* to) __attribute__((always_inline)) {
      Reg d[kPoints], out[kPoints];
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) d[i] = V::load(from + i * depth);
      Transform<M>::input(d, out);
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) V::store(to + i * next_point, out[i]);
    };
    for (int64_t tile = plan.tiles_read; tile > 0; --tile) {
      transform(source, points);
      for (int64_t c = V::kWidth; c < depth; c += V::kWidth) transform(source + c, points + c);
      source += M * depth;
      points += depth;
    }
  }

  template <int M, bool Relu, bool Limited>
  [[gnu::always_inline]] static void vector_back(const TilesBack& t, int v, Reg start,
                                                 Reg (&sums)[M]) {
    Reg m[kPoints];
#pragma GCC unroll 6
    for (int i = 0; i < kPoints; ++i) {
      m[i] = V::load(t.products + i * t.product_point + v * V::kWidth);
    }
    Transform<M>::output(m, sums);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      sums[i] = V::add(sums[i], start);
      if (Relu) sums[i] = Limited ? relu_to<V>(V::set(t.ceiling), sums[i]) : V::relu(sums[i]);
    }
  }

  // By vectors; or, past the caches, by pixels, so that lines are written whole.
  template <int M, int Vectors, bool Relu, bool Limited, bool Streams>
  static void whole_back(const TilesBack& t) {
    if (t.columns < V::kWidth) return part_back<M, Vectors, Relu, Limited>(t, M);
    Reg sums[Vectors][M];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const Reg start = t.bias ? V::load(t.bias + v * V::kWidth) : V::zero();
      vector_back<M, Relu, Limited>(t, v, start, sums[v]);
      if (Streams) continue;
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) V::store(t.y + i * t.y_pixel + v * V::kWidth, sums[v][i]);
    }
    if (!Streams) return;
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        V::stream(t.y + i * t.y_pixel + v * V::kWidth, sums[v][i]);
      }
  }

  template <int M, int Vectors, bool Relu, bool Limited>
  static void part_back(const TilesBack& t, int64_t pixels) {
    for (int v = 0; v < Vectors; ++v) {
      Reg sums[M];
      const auto tail = V::tail(v + 1 < Vectors ? V::kWidth : t.columns);
      const Reg start = t.bias ? V::load(t.bias + v * V::kWidth, tail) : V::zero();
      vector_back<M, Relu, Limited>(t, v, start, sums);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        if (i < pixels) V::store(t.y + i * t.y_pixel + v * V::kWidth, sums[i], tail);
      }
    }
  }

  // The pixels of an output row whose source is zero throughout become the bias. `first`: its first input row, of
  // the strip's.
  static void blank_out(const Plan& plan, const Scratch& own, int64_t first, const float* bias,
                        float* y) {
    const Conv2dProblem& p = plan.p;
    for (int64_t r = 0; r < p.r; ++r) {
      if (!own.may_be_blank[first + r * p.dilation_h]) return;
    }
    for (int64_t j = 0; j < p.ow; ++j) {
      const std::int32_t* zeros = own.zeros + first * plan.source_w + j * p.stride_w + p.s - 1;
      bool blank = true;
      for (int64_t r = 0; r < p.r && blank; ++r, zeros += p.dilation_h * plan.source_w) {
        blank = *zeros >= p.s;
      }
      if (blank) write_blank(p.activation, bias, p.k, y + j * p.k);
    }
  }
};

}  // namespace
}  // namespace fastconv::cpu
