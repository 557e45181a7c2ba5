// The problem as kernels see it: 32-bit integers, division by multiplication, and offsets in either
// layout. Passed to kernels by value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/problem.hpp"
#include "core/selection.hpp"
#include "cuda/device.cuh"

namespace fastconv::cuda {

// n / divisor for 0 <= n < 2^31 by one multiplication: Granlund and Montgomery, "Division by
// invariant integers using multiplication" (1994). The multiplier is floor(2^(31+l) / divisor) + 1
// with l = ceil(log2(divisor)): below 2^32, and too large by a share of less than 2^-31.
struct FastDivisor {
  unsigned multiplier = 0x80000001u;
  int shift = 0;
  int divisor = 1;

  FastDivisor() = default;
  explicit FastDivisor(std::int64_t by) : divisor(int(by)) {
    while ((std::int64_t{1} << shift) < by) ++shift;
    multiplier = unsigned((std::uint64_t{1} << (31 + shift)) / unsigned(divisor)) + 1;
  }

  __host__ __device__ int quotient(int n) const {
    return int(unsigned(std::uint64_t(2u * unsigned(n)) * multiplier >> 32) >> shift);
  }
  // n becomes the quotient; the remainder is returned.
  __host__ __device__ int split(int& n) const {
    const int q = quotient(n);
    const int remainder = n - q * divisor;
    n = q;
    return remainder;
  }
};

// Elements from one image, row, column or channel to the next.
struct Strides {
  int image, row, column, channel;
};

// One spatial axis of a sum over taps, as fprop and each part of dgrad take it: the result of index
// i lies at first + i * step and reads, for t < taps, its source at origin + i * stride + t *
// dilation (nothing where that is outside) and the filter at tap + t * tap_step.
struct Window {
  int first, step, count;
  int origin, stride, dilation;
  int taps, tap, tap_step;
};

// One spatial axis of a convolution. dgrad by a stride is a sum over those taps alone that reach a
// pixel: pixels and taps fall into classes by (pixel + padding) mod stride = tap * dilation mod
// stride, each class a convolution of stride 1. Classes are numbered by their first tap. Pixels of
// a class that no tap reaches are zero: dgrad_leaves_gaps().
struct ConvAxis {
  int in, out, taps, stride, dilation, padding;
  int tap_step;      // from one tap of a class to the next: stride / gcd(stride, dilation)
  int source_step;   // what that moves in dy: dilation / gcd(stride, dilation)
  int classes;       // that taps reach
  int class_pixels;  // pixels in the largest class
  FastDivisor by_out, by_stride, by_class_pixels;

  ConvAxis() = default;
  // A stride to nowhere and a dilation between no taps count as 1: both may be huge.
  ConvAxis(std::int64_t in, std::int64_t out, std::int64_t taps, std::int64_t stride,
           std::int64_t dilation, std::int64_t padding)
      : in(int(in)), out(int(out)), taps(int(taps)), stride(int(out == 1 ? 1 : stride)),
        dilation(int(taps == 1 ? 1 : dilation)), padding(int(padding)), by_out(out),
        by_stride(this->stride) {
    const int divisor = std::gcd(this->stride, this->dilation);
    tap_step = this->stride / divisor;
    source_step = this->dilation / divisor;
    classes = std::min(tap_step, this->taps);
    class_pixels = (this->in - 1) / this->stride + 1;
    by_class_pixels = FastDivisor(class_pixels);
  }

  __device__ Window fprop() const { return {0, 1, out, -padding, stride, dilation, taps, 0, 1}; }

  __device__ Window dgrad(int first_tap) const {
    int source = first_tap * dilation, whole = padding;
    const int residue = by_stride.split(source), phase = by_stride.split(whole);
    const int first = residue - phase + (residue < phase ? stride : 0);
    const int count = first < in ? by_stride.quotient(in - 1 - first) + 1 : 0;
    const int origin = by_stride.quotient(first + padding) - source;
    const int taps_of_class = (taps - 1 - first_tap) / tap_step + 1;
    return {first, stride, count, origin, 1, -source_step, taps_of_class, first_tap, tap_step};
  }
  template <Direction kDirection>
  __device__ Window window(int first_tap) const {
    if constexpr (kDirection == Direction::fprop) return fprop();
    return dgrad(first_tap);
  }
};

struct ConvGeometry {
  int n, c, k, groups;
  int c_per_group, k_per_group;
  ConvAxis rows, columns;
  Strides x, y;
  int plane;  // OH * OW
  FastDivisor by_plane, by_column_taps, by_c_per_group, by_k_per_group, by_column_classes;

  // Whether every offset and coordinate fits a signed 32-bit integer, with room for the last tile
  // and, in coordinates, for some that are always outside.
  static bool fits(const Conv2dProblem& p) {
    constexpr std::int64_t kLimit = (std::int64_t{1} << 31) - (1 << 16), kMostPixels = 1 << 30;
    return p.x_size() < kLimit && p.y_size() < kLimit && p.filter_size() < kLimit &&
           p.h + p.pad_top + p.pad_bottom < kMostPixels &&
           p.w + p.pad_left + p.pad_right < kMostPixels;
  }

  explicit ConvGeometry(const Conv2dProblem& p)
      : n(int(p.n)), c(int(p.c)), k(int(p.k)), groups(int(p.groups)),
        c_per_group(int(p.c_per_group())), k_per_group(int(p.k_per_group())),
        rows(p.h, p.oh, p.r, p.stride_h, p.dilation_h, p.pad_top),
        columns(p.w, p.ow, p.s, p.stride_w, p.dilation_w, p.pad_left),
        x(strides(p.layout, p.h, p.w, p.c)), y(strides(p.layout, p.oh, p.ow, p.k)),
        plane(int(p.oh * p.ow)), by_plane(p.oh * p.ow), by_column_taps(p.s),
        by_c_per_group(p.c_per_group()), by_k_per_group(p.k_per_group()),
        by_column_classes(columns.classes) {}

  static Strides strides(Layout layout, std::int64_t height, std::int64_t width,
                         std::int64_t channels) {
    if (layout == Layout::nhwc) {
      return {int(height * width * channels), int(width * channels), int(channels), 1};
    }
    return {int(channels * height * width), int(width), 1, int(height * width)};
  }

  int dgrad_classes() const { return rows.classes * columns.classes; }
  bool dgrad_leaves_gaps() const {
    return rows.classes < rows.stride || columns.classes < columns.stride;
  }
};

}  // namespace fastconv::cuda
