// Winograd's minimal filtering of strided convolutions.
//
// A stride is none of an image whose pixels are taken together, as many as the stride is long and wide: the convolution
// is one of stride 1 with stride_h stride_w C channels, under a filter of ceil(R / stride_h) x ceil(S / stride_w) taps
// that is filled up with zeros. So 5 x 5 of stride 2 is 3 x 3 of 4 C channels, 7 x 7 of stride 2 and 4 x 4 are 4 x 4,
// 3 x 3 of stride 2 is 2 x 2, and AlexNet's 11 x 11 of stride 4 is 3 x 3 of 48 channels. Of these F(5x5, 2x2),
// F(4x4, 3x3) and F(3x3, 4x4) all have tiles of 6 x 6, as in winograd.hpp, which computes them.
//
// The image is copied so, padding included, some images at a time; dgrad's result is copied back, and so is wgrad's, of
// 3 x 3 taps taken together alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/blank.hpp"
#include "cpu/implicit_gemm.hpp"
#include "cpu/kernels.hpp"
#include "cpu/winograd.hpp"

namespace fastconv::cpu {
namespace {

template <class V>
struct WinogradStrided {
  static bool serves(const Conv2dProblem& p, Direction direction) {
    const int64_t taps = ceil_div(p.r, p.stride_h);
    const bool has_tiles = direction == Direction::wgrad ? taps == 3 : taps >= 2 && taps <= 4;
    return has_tiles && ceil_div(p.s, p.stride_w) == taps && p.stride_h * p.stride_w > 1 &&
           p.groups == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
           !mostly_padding(p, (p.oh + taps - 1) * p.stride_h, (p.ow + taps - 1) * p.stride_w);
  }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    if (p.y_size() == 0) {
      const int64_t floats = direction == Direction::dgrad   ? p.x_size()
                             : direction == Direction::wgrad ? p.filter_size()
                                                             : 0;
      std::memset(t.out, 0, static_cast<std::size_t>(floats) * 4);
      if (t.dbias) std::memset(t.dbias, 0, static_cast<std::size_t>(p.k) * 4);
      return;
    }
    of_taps(p, [&](auto tiles) {
      if (direction == Direction::wgrad) return run_wgrad<decltype(tiles)>(p, t);
      run_tiles<decltype(tiles)>(p, direction, t);
    });
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    return of_taps(p, [&](auto tiles) {
      const Together g(p, direction, 1);  // the choice must not depend on the number of threads
      using Plan = typename decltype(tiles)::Plan;
      const bool wgrad = direction == Direction::wgrad;
      const double share = g.template last_tap<Plan>().share();
      Estimate estimate = wgrad ? tiles.estimate(g.of_images(p.n), direction)
                                : tiles.estimate(g.of_images(p.n), direction, {}, share);
      // In multiply-adds, as what it is added to; fitted to the times of 300 problems with AVX2, one thread of a
      // Zen 3. With AVX-512 it has not been tried.
      constexpr double kCopied = 20, kFilter = 6, kSource = 150, kCall = 100000;
      constexpr double kUntried = V::kRegisters == 32 ? 1.2 : 1;
      const double tiles_times = kUntried * (wgrad ? 1.35 : 1.1);
      const int64_t source = direction == Direction::fprop ? p.n * p.h * p.w : p.n * p.oh * p.ow;
      estimate.multiply_adds = tiles_times * estimate.multiply_adds +
                               kCopied * static_cast<double>(p.n * g.image_floats()) +
                               kFilter * static_cast<double>(g.filter_floats()) +
                               kSource * static_cast<double>(g.has_zeros && !wgrad ? source : 0) +
                               kCall;
      estimate.relative_error = 7e-6;
      estimate.workspace_bytes = workspace_bytes<decltype(tiles)>(p, direction);
      return estimate;
    });
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    return of_taps(p, [&](auto tiles) {
      const Together g(p, direction);
      return tiles.blocking(g.of_images(g.images), direction) + ", of " +
             std::to_string(p.stride_h) + " x " + std::to_string(p.stride_w) +
             " pixels taken together";
    });
  }

  static constexpr const char* kName = "winograd_strided";
  static constexpr Conv2dAlgorithm kAlgorithm{.name = kName,
                                              .masks_dgrad = true,
                                              .masks_wgrad = true,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run,
                                              .scales_filter = true};

 private:
  // Calls body with tiles of the filter's taps, of which serves() knows.
  template <class Body>
  static auto of_taps(const Conv2dProblem& p, const Body& body) {
    switch (ceil_div(p.r, p.stride_h)) {
      case 2: return body(WinogradOfTaps<V, 5, 2, 2>{});
      case 3: return body(WinogradOfTaps<V, 4, 3, 3>{});
      default: return body(WinogradOfTaps<V, 3, 4, 4>{});
    }
  }

  // The image of pixels taken together, and how many images a chunk has.
  struct Together {
    const Conv2dProblem& p;
    int64_t taps, h, w;
    int64_t run, pixel;  // floats of a row of a pixel, and of all its rows
    int64_t images, chunks;
    bool has_zeros;  // in the filter

    Together(const Conv2dProblem& problem, Direction direction, int64_t threads = num_threads())
        : p(problem), taps(ceil_div(p.r, p.stride_h)), h(p.oh + taps - 1), w(p.ow + taps - 1),
          run(p.stride_w * p.c), pixel(p.stride_h * run),
          has_zeros(taps * p.stride_h != p.r || taps * p.stride_w != p.s) {
      // In the caches from the copy to the tiles; but enough for the filter, which is transformed for all of them or
      // for each chunk.
      // The gradient by the filters is a sum over chunks, whose number must not depend on the threads.
      constexpr int64_t kThreadFloats = int64_t{128} << 10, kSummedFloats = int64_t{2} << 20;
      const int64_t chunk = direction == Direction::wgrad
                                ? kSummedFloats
                                : max64(threads * kThreadFloats, 2 * filter_floats());
      images = min64(p.n, max64(1, chunk / image_floats()));
      chunks = ceil_div(p.n, max64(1, images));
      images = ceil_div(p.n, max64(1, chunks));
    }
    template <class Plan>
    Plan plan(int64_t n, Direction direction) const {
      Plan plan(of_images(n), direction, {});
      plan.last_tap = last_tap<Plan>();
      return plan;
    }
    template <class Plan>
    typename Plan::LastTap last_tap() const {
      if (p.stride_h > Plan::LastTap::kMostRows) return {1, pixel, 1, pixel};
      return {p.stride_h, run, p.r - (taps - 1) * p.stride_h,
              (p.s - (taps - 1) * p.stride_w) * p.c};
    }
    int64_t image_floats() const { return h * w * pixel; }
    int64_t filter_floats() const { return taps * taps * pixel * p.k; }
    Conv2dProblem of_images(int64_t n) const {
      Conv2dProblem out = p;
      out.n = n;
      out.h = h;
      out.w = w;
      out.c = pixel;
      out.r = out.s = taps;
      out.stride_h = out.stride_w = 1;
      out.pad_top = out.pad_bottom = out.pad_left = out.pad_right = 0;
      return out;
    }
    // Calls body(column, offset, columns) for the pixels of an image's row: those from `column` on, which lie from
    // `offset` on in a row of pixels taken together.
    template <class Body>
    void for_each_run(const Body& body) const {
      for (int64_t j = p.pad_left / p.stride_w; j < w; ++j) {
        const int64_t first = j * p.stride_w - p.pad_left;
        const int64_t begin = max64(0, first), end = min64(p.w, first + p.stride_w);
        if (begin >= end) return;
        body(begin, j * pixel + (begin - first) * p.c, end - begin);
      }
    }
    // Where an image's row is among those taken together.
    int64_t row_offset(int64_t row) const {
      const int64_t padded = row + p.pad_top;
      return (padded / p.stride_h * w * p.stride_h + padded % p.stride_h) * run;
    }
  };

  // The parts of a call's workspace.
  struct Sizes {
    int64_t pixels, filter, made, zeros;  // bytes, multiples of 64
    Sizes(const Together& g, Direction direction, int64_t filter_floats) {
      pixels = round_up(g.images * g.image_floats() * 4, 64);
      filter = round_up(g.filter_floats() * 4, 64);
      made = g.chunks > 1 ? round_up(filter_floats * 4, 64) : 0;
      // [image][row][pixel], and of each row whether it is any use.
      const Blanks blanks(g, direction);
      zeros = g.has_zeros ? round_up(g.images * blanks.rows * (blanks.columns + 1) * 4, 64) : 0;
    }
    int64_t sum() const { return pixels + filter + made + zeros; }
  };

  // wgrad's.
  struct SumSizes {
    int64_t pixels, filter, bias;  // floats, whole lines
    explicit SumSizes(const Together& g)
        : pixels(round_up(g.images * g.image_floats(), kLine)),
          filter(round_up(g.filter_floats(), kLine)), bias(round_up(g.p.k, kLine)) {}
    int64_t bytes() const { return (pixels + filter + bias) * 4; }
  };

  template <class Tiles>
  static int64_t workspace_bytes(const Conv2dProblem& p, Direction direction) {
    const Together g(p, direction);
    const Conv2dProblem part = g.of_images(g.images);
    if (direction == Direction::wgrad) {
      return SumSizes(g).bytes() + Tiles::estimate(part, direction).workspace_bytes;
    }
    const typename Tiles::Plan plan(part, direction, {});
    return Sizes(g, direction, plan.filter_floats()).sum() + plan.workspace_bytes();
  }

  template <class Tiles>
  static void run_tiles(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    const bool fprop = direction == Direction::fprop;
    const Together g(p, direction);
    const auto whole = g.template plan<typename Tiles::Plan>(g.images, direction);
    const Sizes sizes(g, direction, whole.filter_floats());
    Conv2dOperands own = t;
    own.packed = nullptr;
    const auto transform = [&](float* filter, float* made) {
      gather_filter(g, t.filter, filter);
      own.filter = filter;
      if (made) Tiles::transform_filters(whole, own, made);
    };
    FilterForms::Floats kept;
    if (t.packed) {
      const auto fill = [&](float* made) {
        const Workspace filter(static_cast<std::size_t>(sizes.filter));
        transform(filter.floats(), made);
      };
      kept = t.packed->in_layout({fprop ? kName : "winograd_strided dgrad",
                                  V::kWidth,
                                  whole.panels,
                                  1,
                                  {p.stride_h, p.stride_w}},
                                 static_cast<std::size_t>(whole.filter_floats()) * 4, fill);
    }
    const int64_t unused = kept ? sizes.filter + sizes.made : 0;
    const Workspace workspace(static_cast<std::size_t>(sizes.sum() - unused));
    float* const pixels = workspace.floats();
    std::int32_t* const zeros =
        reinterpret_cast<std::int32_t*>(workspace.floats(static_cast<std::size_t>(sizes.pixels)));
    const float* made = kept.get();
    if (!kept) {
      const std::size_t at = static_cast<std::size_t>(sizes.pixels + sizes.zeros);
      float* const all =
          sizes.made > 0 ? workspace.floats(at + static_cast<std::size_t>(sizes.filter)) : nullptr;
      transform(workspace.floats(at), all);
      made = all;
    }
    const int64_t x_image = p.h * p.w * p.c, y_image = p.oh * p.ow * p.k;
    for (int64_t n = 0; n < p.n; n += g.images) {
      const int64_t images = min64(g.images, p.n - n);
      const auto plan = g.template plan<typename Tiles::Plan>(images, direction);
      if (fprop) {
        gather(g, images, t.x + n * x_image, pixels);
        own.x = pixels;
        own.out = t.out + n * y_image;
        Tiles::compute_tiles(plan, direction, own, made);
        if (g.has_zeros) blank_y(g, images, pixels, t.bias, zeros, own.out);
      } else {
        own.dy = t.dy + n * y_image;
        own.y = t.y ? t.y + n * y_image : nullptr;
        own.out = pixels;
        Tiles::compute_tiles(plan, direction, own, made);
        scatter(g, images, pixels, t.out + n * x_image);
        if (g.has_zeros) blank_dx(g, images, own.dy, own.y, zeros, t.out + n * x_image);
      }
    }
  }

  template <class Tiles>
  static void run_wgrad(const Conv2dProblem& p, const Conv2dOperands& t) {
    const Together g(p, Direction::wgrad);
    const SumSizes sizes(g);
    const Workspace workspace(static_cast<std::size_t>(sizes.bytes()));
    float* const pixels = workspace.floats();
    Conv2dOperands own = t;
    own.x = pixels;
    own.out = pixels + sizes.pixels;
    if (t.dbias) own.dbias = own.out + sizes.filter;
    const int64_t x_image = p.h * p.w * p.c, y_image = p.oh * p.ow * p.k, tap = p.c * p.k;
    for (int64_t n = 0; n < p.n; n += g.images) {
      const int64_t images = min64(g.images, p.n - n);
      gather(g, images, t.x + n * x_image, pixels);
      own.dy = t.dy + n * y_image;
      own.y = t.y ? t.y + n * y_image : nullptr;
      Tiles::run(g.of_images(images), Direction::wgrad, own);
      for_each_tap(g, [&](int64_t i, int64_t of_filter) {
        if (of_filter >= 0) put(own.out + i * tap, tap, n > 0, t.out + of_filter * tap);
      });
      if (t.dbias) put(own.dbias, p.k, n > 0, t.dbias);
    }
  }

  // to = from, or to += from.
  static void put(const float* from, int64_t count, bool adds, float* to) {
    for (int64_t i = 0; i < count; i += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, count - i)));
      const auto value = V::load(from + i, tail);
      V::store(to + i, adds ? V::add(V::load(to + i, tail), value) : value, tail);
    }
  }

  // Calls body(i, tap) for each tap of the pixels taken together: which of the filter's it is, or -1.
  template <class Body>
  static void for_each_tap(const Together& g, const Body& body) {
    const Conv2dProblem& p = g.p;
    const int64_t together = p.stride_h * p.stride_w;
    parallel_by_floats(g.taps * g.taps * together, p.c * p.k, [&](int64_t i) {
      const int64_t r = i / together / g.taps * p.stride_h + i % together / p.stride_w;
      const int64_t s = i / together % g.taps * p.stride_w + i % p.stride_w;
      body(i, r < p.r && s < p.s ? r * p.s + s : -1);
    });
  }

  // Taps taken together as the pixels are, and zeros beyond the filter.
  static void gather_filter(const Together& g, const float* filter, float* out) {
    const int64_t tap = g.p.c * g.p.k;
    for_each_tap(g, [&](int64_t i, int64_t of_filter) {
      const std::size_t bytes = static_cast<std::size_t>(tap) * 4;
      if (of_filter >= 0) {
        std::memcpy(out + i * tap, filter + of_filter * tap, bytes);
      } else {
        std::memset(out + i * tap, 0, bytes);
      }
    });
  }

  // A few floats: not worth a call.
  static void copy(const float* from, int64_t count, float* to) {
    if (count < V::kWidth) {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i];
      return;
    }
    for (int64_t i = 0; i + V::kWidth < count; i += V::kWidth) V::store(to + i, V::load(from + i));
    V::store(to + count - V::kWidth, V::load(from + count - V::kWidth));
  }

  static void gather(const Together& g, int64_t images, const float* x, float* pixels) {
    const Conv2dProblem& p = g.p;
    const int64_t rows = g.h * p.stride_h;
    parallel_by_floats(images * rows, g.w * g.run, [&](int64_t task) {
      const int64_t n = task / rows, row = task % rows - p.pad_top;
      float* const to = pixels + n * g.image_floats() + g.row_offset(row);
      const auto clear = [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          std::memset(to + j * g.pixel, 0, static_cast<std::size_t>(g.run) * 4);
        }
      };
      if (row < 0 || row >= p.h) return clear(0, g.w);
      // What is partly or wholly padding.
      const int64_t first = min64(g.w, ceil_div(p.pad_left, p.stride_w));
      clear(0, first);
      clear(max64(first, (p.pad_left + p.w) / p.stride_w), g.w);
      const float* const from = x + (n * p.h + row) * p.w * p.c;
      g.for_each_run([&](int64_t column, int64_t offset, int64_t columns) {
        copy(from + column * p.c, columns * p.c, to + offset);
      });
    });
  }

  static void scatter(const Together& g, int64_t images, const float* pixels, float* dx) {
    const Conv2dProblem& p = g.p;
    parallel_by_floats(images * p.h, p.w * p.c, [&](int64_t task) {
      const int64_t n = task / p.h, row = task % p.h;
      float* const to = dx + task * p.w * p.c;
      int64_t written = 0;  // columns
      if (row + p.pad_top < g.h * p.stride_h) {
        const float* const from = pixels + n * g.image_floats() + g.row_offset(row);
        g.for_each_run([&](int64_t column, int64_t offset, int64_t columns) {
          copy(from + offset, columns * p.c, to + column * p.c);
          written = column + columns;
        });
      }
      std::memset(to + written * p.c, 0, static_cast<std::size_t>((p.w - written) * p.c) * 4);
    });
  }

  // A tile knows what of its source is zero, but by pixels taken together: where the filter is filled up with
  // zeros, it takes some for live that no tap meets.
  struct Blanks {
    int64_t rows, columns;  // of the source, whose zeros are counted
    Blanks(const Together& g, Direction direction)
        : rows(direction == Direction::fprop ? g.h * g.p.stride_h : g.p.oh),
          columns(direction == Direction::fprop ? g.w * g.p.stride_w : g.w) {}
  };

  static void blank_y(const Together& g, int64_t images, const float* pixels, const float* bias,
                      std::int32_t* zeros, float* y) {
    const Conv2dProblem& p = g.p;
    const Blanks source(g, Direction::fprop);
    std::int32_t* const may_be_blank = zeros + images * source.rows * source.columns;
    parallel_by_floats(images * source.rows, source.columns, [&](int64_t i) {
      const int64_t n = i / source.rows, row = i % source.rows - p.pad_top;
      std::int32_t* const own = zeros + i * source.columns;
      if (row < 0 || row >= p.h) {
        std::fill(own, own + source.columns, static_cast<std::int32_t>(p.s));
        may_be_blank[i] = 1;
        return;
      }
      const float* const from = pixels + n * g.image_floats() + g.row_offset(row);
      may_be_blank[i] = count_zeros(
          source.columns, p.s,
          [&](int64_t j) {
            if (j < p.pad_left || j >= p.pad_left + p.w) return true;
            return is_zero<V>(from + j / p.stride_w * g.pixel + j % p.stride_w * p.c, nullptr, p.c);
          },
          own);
    });
    parallel_by_floats(images * p.oh, p.ow, [&](int64_t task) {
      const int64_t first = task / p.oh * source.rows + task % p.oh * p.stride_h;
      for (int64_t r = 0; r < p.r; ++r) {
        if (!may_be_blank[first + r]) return;
      }
      for (int64_t j = 0; j < p.ow; ++j) {
        const std::int32_t* at = zeros + first * source.columns + j * p.stride_w + p.s - 1;
        bool blank = true;
        for (int64_t r = 0; r < p.r && blank; ++r, at += source.columns) blank = *at >= p.s;
        if (blank) write_blank(p.activation, bias, p.k, y + (task * p.ow + j) * p.k);
      }
    });
  }

  static void blank_dx(const Together& g, int64_t images, const float* dy, const float* y,
                       std::int32_t* zeros, float* dx) {
    const Conv2dProblem& p = g.p;
    const Blanks source(g, Direction::dgrad);
    std::int32_t* const has_zeros = zeros + images * source.rows * source.columns;
    parallel_by_floats(images * p.oh, source.columns, [&](int64_t i) {
      // Beyond dy on either side, as many as a window may meet there.
      std::int32_t run = static_cast<std::int32_t>(g.taps);
      has_zeros[i] = 0;
      for (int64_t j = 0; j < source.columns; ++j) {
        const int64_t at = (i * p.ow + j) * p.k;
        const bool zero = j >= p.ow || is_zero<V>(dy + at, y ? y + at : nullptr, p.k);
        zeros[i * source.columns + j] = run = zero ? run + 1 : 0;
        if (zero && j < p.ow) has_zeros[i] = 1;
      }
    });
    parallel_by_floats(images * p.h, p.w, [&](int64_t task) {
      const int64_t n = task / p.h, row = task % p.h + p.pad_top;
      const int64_t last = row / p.stride_h;  // of dy's rows
      if (last >= g.h) return;
      const int64_t first = last - (p.r - 1 - row % p.stride_h) / p.stride_h;
      const int64_t begin = max64(0, first), end = min64(p.oh, last + 1);
      bool may_be_blank = begin >= end;
      for (int64_t i = begin; i < end; ++i) may_be_blank |= has_zeros[n * p.oh + i] != 0;
      for (int64_t j = 0; j < p.w; ++j) {
        const int64_t column = (j + p.pad_left) / p.stride_w;
        if (column >= g.w) return;
        // Else it meets a pixel of dy.
        if (!may_be_blank && column >= g.taps - 1 && column < p.ow) continue;
        const int64_t s = (j + p.pad_left) % p.stride_w, taps = ceil_div(p.s - s, p.stride_w);
        bool blank = true;
        for (int64_t i = begin; i < end && blank; ++i) {
          blank = zeros[(n * p.oh + i) * source.columns + column] >= taps;
        }
        if (blank) {
          std::memset(dx + (task * p.w + j) * p.c, 0, static_cast<std::size_t>(p.c) * 4);
        }
      }
    });
  }
};

}  // namespace
}  // namespace fastconv::cpu
