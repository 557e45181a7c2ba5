// The direct algorithm, which serves every problem: an implicit GEMM in all three directions, and
// what the selector knows of it.
#pragma once

#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/wgrad.hpp"

namespace fastconv::cpu {
namespace {

template <class V>
struct Direct {
  static bool serves(const Conv2dProblem&, Direction) { return true; }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    switch (direction) {
      case Direction::fprop: return implicit_gemm_fprop<V>(p, t);
      case Direction::dgrad: return implicit_gemm_dgrad<V>(p, t);
      case Direction::wgrad: return implicit_gemm_wgrad<V>(p, t);
    }
  }

  // wgrad of few channels: its tiles span taps, so that the order of pixels does not matter to them.
  static bool fuses_pool(const Conv2dProblem& p, Direction direction) {
    return direction == Direction::wgrad && !WgradPlan<V>(p, true).by_taps;
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    Estimate out;
    const auto pieces = [&](double weight) {
      return cost_of_pieces<V>(p, static_cast<double>(p.c_per_group()), weight);
    };
    const auto add = [&](const TapConvolution& g) {
      const TapConvolutionRunner<V> runner(g);
      out.multiply_adds +=
          pieces(16) *
          (V::kRegisters == 32 ? cost_by_pixels(g, share_of_taps(p, direction)) : cost_by_tiles(g));
      out.workspace_bytes = max64(out.workspace_bytes, runner.workspace_bytes);
    };
    switch (direction) {
      case Direction::fprop: add(fprop_taps(p)); break;
      case Direction::dgrad:
        for_each_dgrad_class(p, [&](const TapConvolution& g, int64_t) { add(g); });
        break;
      case Direction::wgrad: {
        if (better_reversed<V>(p)) return estimate_reversed(p);
        const WgradPlan<V> plan(of_one_row(p), true);
        // A vector alone waits for its loads.
        const bool waits = V::kRegisters < 32 && p.k_per_group() <= V::kWidth;
        out.multiply_adds =
            (waits ? 1.5 : 1.1) * pieces(5) * share_of_taps(p, direction) *
            static_cast<double>(plan.pixels) * static_cast<double>(p.r * p.s * p.c_per_group()) *
            lanes(p.k_per_group(), p.groups) * group_cost(p.c_per_group(), p.groups);
        out.workspace_bytes = plan.workspace_bytes(workers_for(plan.tasks(p)));
        if (better_turned<V>(p)) {  // where nothing is masked
          const WgradPlan<V> other(of_one_row(turned(p)), false);
          out.workspace_bytes =
              max64(out.workspace_bytes,
                    other.workspace_bytes(workers_for(other.tasks(turned(p)))) + plan.floats * 4);
        }
      }
    }
    return out;
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    const auto tile = [](int64_t rows, int64_t columns) {
      return std::to_string(rows) + " x " + std::to_string(columns) + " tile of ";
    };
    if (direction == Direction::wgrad) {
      const WgradPlan<V> plan(of_one_row(p), true);
      return tile(plan.rows, plan.panel) + "filter taps x filters, " + std::to_string(plan.parts) +
             " partial sums";
    }
    const int64_t columns = direction == Direction::fprop ? p.k_per_group() : p.c_per_group();
    const int64_t all = ceil_div(columns, V::kWidth);
    const int64_t vectors = ceil_div(all, gemm_panels<V>(all));
    return tile(V::kGemmRows[vectors], vectors * V::kWidth) + "pixels x channels";
  }

  static constexpr Conv2dAlgorithm kAlgorithm{.name = "direct",
                                              .masks_dgrad = false,
                                              .masks_wgrad = true,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run,
                                              .scales_filter = true,
                                              .adds_residual = true,
                                              .fuses_pool = fuses_pool};

 private:
  static Estimate estimate_reversed(const Conv2dProblem& p) {
    Estimate out = estimate(reversed(p), Direction::wgrad);
    out.workspace_bytes += (p.filter_size() + p.y_size()) * 4;  // where dy is masked
    return out;
  }

  // Vector lanes that hold no channel cost as much as those that do.
  static double lanes(int64_t channels_a_group, int64_t groups) {
    return static_cast<double>(ceil_div(channels_a_group, V::kWidth) * V::kWidth * groups);
  }

  // Of few channels a group, a pixel is read a piece of a line at a time.
  static double group_cost(int64_t channels_a_group, int64_t groups) {
    if (groups == 1 || V::kRegisters == 32) return 1;
    const double of_eight = static_cast<double>(channels_a_group) / 8;
    return 1 + 0.4 / (of_eight * of_eight);
  }

  // How many of the taps meet the image, of all pixels'. Taps of a filter that is not dilated leave it in
  // regions so narrow that their short tiles cost what the taps save.
  static double share_of_taps(const Conv2dProblem& p, Direction direction) {
    const auto of_axis = [&](int64_t in, int64_t out, int64_t taps, int64_t stride,
                             int64_t dilation, int64_t pad) {
      if (dilation == 1 || in * out == 0) return 1.0;
      const int64_t pairs = AxisTaps{taps, stride, -pad, dilation, 0, 1}.pairs_met(out, in);
      const double pixels = direction == Direction::dgrad
                                ? static_cast<double>(in) / static_cast<double>(stride)
                                : static_cast<double>(out);
      return std::min(1.0, static_cast<double>(pairs) / (pixels * static_cast<double>(taps)));
    };
    return of_axis(p.h, p.oh, p.r, p.stride_h, p.dilation_h, p.pad_top) *
           of_axis(p.w, p.ow, p.s, p.stride_w, p.dilation_w, p.pad_left);
  }

  // In multiply-adds; the terms were fitted with AVX-512.
  static double cost_by_pixels(const TapConvolution& g, double share) {
    const double pixels = static_cast<double>(g.images * g.out_h * g.out_w);
    const double taps = share * static_cast<double>(g.vertical.count * g.horizontal.count);
    constexpr double kAroundATap = 5, kAroundATile = 40;  // in multiply-adds of a tile row
    return pixels * lanes(g.columns, g.groups) * group_cost(g.columns, g.groups) *
           (1.06 * taps * static_cast<double>(g.reduce) +
            (kAroundATap * taps + kAroundATile) / V::kRows);
  }

  // The same by the tiles of each region; fitted with AVX2, one thread of a Zen 4, to the times of 1000 problems.
  static double cost_by_tiles(const TapConvolution& convolution) {
    constexpr int64_t kFewPixels = 512, kManyChannels = 128;  // for chunks of one tap
    constexpr double kSumsInFlight = 8;  // multiply-adds take four cycles, two begin in each
    // In multiply-adds of a core. A tile of few products begins and ends while others would compute. In a region
    // the processor learns anew where loops end. A vector alone waits for its loads.
    constexpr double kCall = 35000, kRegion = 2500, kRegionTap = 500, kFilter = 10;
    constexpr double kATile = 30, kAShortTile = 8000, kLeastProducts = 20;
    constexpr double kProduct = 1.06, kProductAlone = 1.25;
    const TapConvolution g = flattened(convolution);
    const int64_t vectors = ceil_div(g.columns, V::kWidth);
    const int64_t panels = max64(1, gemm_panels<V>(vectors)), widest = ceil_div(vectors, panels);
    const double least_rows = kSumsInFlight / static_cast<double>(max64(1, widest));
    const double reduce = static_cast<double>(g.reduce);
    double rows = 0, around = 0;  // of all taps; and of a panel
    const auto add = [&](int64_t pixels, int64_t of_taps) {
      const double tiles = static_cast<double>(ceil_div(pixels, V::kGemmRows[widest]));
      const double taps = static_cast<double>(of_taps);
      rows += taps * std::max(static_cast<double>(pixels), tiles * least_rows);
      around += tiles * kATile;
      if (of_taps > 1) around += tiles * kAShortTile / std::max(taps * reduce, kLeastProducts);
    };
    const int64_t all_taps = g.vertical.count * g.horizontal.count;
    if (g.images * g.out_h * g.out_w <= kFewPixels && g.reduce >= kManyChannels) {
      for (int64_t tap = 0; tap < all_taps; ++tap) add(region_of_tap(g, tap).pixels(g.images), 1);
    } else {
      const bool merged = g.horizontal.stride == 1 || g.horizontal.count == 1;
      for_each_region(g, [&](const TapRegion& region) {
        const int64_t r = region.r_end - region.r, s = region.s_end - region.s;
        add(region.pixels(g.images), r * s);
        around += kRegion + kRegionTap * static_cast<double>(merged ? r : r * s);
      });
    }
    const double product = vectors == 1 && kGemmVectors<V> > 1 ? kProductAlone : kProduct;
    const double products = rows * reduce * lanes(g.columns, g.groups);
    return product * group_cost(g.columns, g.groups) * products +
           static_cast<double>(panels * g.groups) * around +
           kFilter * static_cast<double>(TapConvolutionRunner<V>::Panels::floats_of(g)) + kCall;
  }
};

}  // namespace
}  // namespace fastconv::cpu
