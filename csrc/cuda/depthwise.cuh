// Depthwise convolutions: one input channel a group, `multiplier` filters each. Bound by memory: a
// product needs its own input, and reuse is that of neighbouring windows, which the caches give.
//
// fprop and dgrad: a thread owns four results one above the other, so that a weight is read once
// for four products; in NHWC also four neighbouring channels, where C allows it and the multiplier
// is 1. Lanes lie along channels in NHWC, along the columns of the image in NCHW. dgrad by a stride
// goes class by class (geometry.cuh).
//
// wgrad: a block owns channels, up to nine taps and a part of the pixels; column_sum.cuh says how
// the sums are shared. dy is read once for the taps of the block.
#pragma once

#include "cuda/column_sum.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

inline constexpr int kDepthwiseThreads = 256;
inline constexpr int kDepthwiseRows = 4;  // results of a thread, one above the other
inline constexpr int kDepthwiseTaps = 9;  // of a block of wgrad

template <class T>
struct DepthwiseArguments {
  const T* a;  // x; dy for dgrad
  const T* filter;
  const T* bias;  // or null
  T* out;
  ConvGeometry g;
  int threads;                                              // of a class
  FastDivisor by_class_blocks, by_row_blocks, by_channels;  // channels: of vectors
  bool relu;
};

template <class T, Direction kDirection, Layout kLayout, int kVector>
__global__ __launch_bounds__(kDepthwiseThreads,
                             2) void depthwise_kernel(const DepthwiseArguments<T> p) {
  constexpr bool kForward = kDirection == Direction::fprop;
  const ConvGeometry& g = p.g;
  int class_row = int(blockIdx.x);
  const unsigned thread =
      unsigned(p.by_class_blocks.split(class_row)) * kDepthwiseThreads + threadIdx.x;
  if (thread >= unsigned(p.threads)) return;
  const int class_column = g.by_column_classes.split(class_row);
  const Window rows = g.rows.window<kDirection>(class_row);
  const Window columns = g.columns.window<kDirection>(class_column);

  const FastDivisor& by_columns = kForward ? g.columns.by_out : g.columns.by_class_pixels;
  int image = int(thread), channel, i, j;
  if constexpr (kLayout == Layout::nhwc) {
    channel = p.by_channels.split(image) * kVector;
    j = by_columns.split(image);
    i = p.by_row_blocks.split(image) * kDepthwiseRows;
  } else {
    j = by_columns.split(image);
    i = p.by_row_blocks.split(image) * kDepthwiseRows;
    channel = p.by_channels.split(image) * kVector;
  }
  if (i >= rows.count || j >= columns.count) return;

  const Strides& from = kForward ? g.x : g.y;
  const Strides& to = kForward ? g.y : g.x;
  const unsigned in_rows = unsigned(kForward ? g.rows.in : g.rows.out);
  const unsigned in_columns = unsigned(kForward ? g.columns.in : g.columns.out);
  const int multiplier = g.k_per_group;
  // Of the first of the source's channels and filters that this result takes; dgrad takes them all.
  const int source_channel = kForward ? g.by_k_per_group.quotient(channel) : channel * multiplier;
  const int filter = kForward ? channel : channel * multiplier;
  const unsigned source =
      unsigned(image) * unsigned(from.image) + unsigned(source_channel) * unsigned(from.channel);
  const unsigned top = unsigned(rows.origin + i * rows.stride);
  const unsigned left = unsigned(columns.origin + j * columns.stride);

  float sums[kDepthwiseRows][kVector] = {};
#pragma unroll 1
  for (int r = 0; r < rows.taps; ++r) {
    const unsigned y = top + unsigned(r * rows.dilation);
    unsigned weights =
        unsigned((rows.tap + r * rows.tap_step) * g.columns.taps + columns.tap) * unsigned(g.k) +
        unsigned(filter);
    const unsigned next_weights = unsigned(columns.tap_step) * unsigned(g.k);
    unsigned x = left;
    for (int s = 0; s < columns.taps;
         ++s, x += unsigned(columns.dilation), weights += next_weights) {
      if (x >= in_columns) continue;
      for (int m = 0; m < (kForward ? 1 : multiplier); ++m) {
        float weight[kVector];
        load<kVector>(p.filter + (weights + unsigned(m)), weight);
#pragma unroll
        for (int l = 0; l < kDepthwiseRows; ++l) {
          const unsigned here = y + unsigned(l * rows.stride);
          if (here >= in_rows) continue;
          float value[kVector];
          load<kVector>(p.a + (source + here * unsigned(from.row) + x * unsigned(from.column) +
                               unsigned(m) * unsigned(from.channel)),
                        value);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sums[l][v] = multiply_add(value[v], weight[v], sums[l][v]);
          }
        }
      }
    }
  }

  float bias[kVector] = {};
  if (kForward && p.bias != nullptr) load<kVector>(p.bias + channel, bias);
  const unsigned target = unsigned(image) * unsigned(to.image) +
                          unsigned(columns.first + j * columns.step) * unsigned(to.column) +
                          unsigned(channel) * unsigned(to.channel);
#pragma unroll
  for (int l = 0; l < kDepthwiseRows; ++l) {
    if (i + l >= rows.count) break;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[l][v] += bias[v];
      if (kForward && p.relu) sums[l][v] = relu(sums[l][v]);
    }
    store<kVector>(p.out + (target + unsigned(rows.first + (i + l) * rows.step) * unsigned(to.row)),
                   sums[l]);
  }
}

template <class T>
struct DepthwiseWgradArguments {
  const T* x;
  const T* dy;
  T* out;
  float* partials;  // or null: the pixels are not split
  ConvGeometry g;
  int pixels_per_split, log_channels;
  FastDivisor by_channel_blocks, by_tap_blocks;
};

template <class T, Layout kLayout, int kVector>
__global__ __launch_bounds__(kSumThreads,
                             2) void depthwise_wgrad_kernel(const DepthwiseWgradArguments<T> p) {
  FASTCONV_SHARED(scratch, float[kSumThreads * kVector]);
  FASTCONV_SHARED(place, uint4[kDepthwiseTaps]);
  const ConvGeometry& g = p.g;
  const SumLanes lanes(p.log_channels);
  int split = int(blockIdx.x);
  const int channel =
      ((p.by_channel_blocks.split(split) << p.log_channels) + lanes.channel) * kVector;
  const int first_tap = p.by_tap_blocks.split(split) * kDepthwiseTaps;
  const int taps = g.rows.taps * g.columns.taps;

  // Beyond the last tap none: no pixel is inside at 2^31 rows down.
  if (threadIdx.x < kDepthwiseTaps) {
    const int tap = first_tap + int(threadIdx.x);
    int row = tap;
    const int column = g.by_column_taps.split(row);
    const unsigned down = unsigned(row * g.rows.dilation - g.rows.padding);
    const unsigned right = unsigned(column * g.columns.dilation - g.columns.padding);
    place[threadIdx.x] = make_uint4(tap < taps ? down : 0x80000000u, right,
                                    down * unsigned(g.x.row) + right * unsigned(g.x.column), 0);
  }
  __syncthreads();

  float sums[kDepthwiseTaps][kVector] = {};
  if (channel < g.k) {
    const int pixels = g.n * g.plane;
    const unsigned end = min(unsigned(split + 1) * unsigned(p.pixels_per_split), unsigned(pixels));
    const unsigned source = unsigned(g.by_k_per_group.quotient(channel)) * unsigned(g.x.channel);
#pragma unroll 1
    for (unsigned pixel = unsigned(split * p.pixels_per_split + lanes.pixel); pixel < end;
         pixel += unsigned(lanes.pixels)) {
      int image = int(pixel);
      const int column = g.columns.by_out.split(image);
      const int row = g.rows.by_out.split(image);
      float dy[kVector];
      load<kVector>(
          p.dy +
              (unsigned(image) * unsigned(g.y.image) + unsigned(row) * unsigned(g.y.row) +
               unsigned(column) * unsigned(g.y.column) + unsigned(channel) * unsigned(g.y.channel)),
          dy);
      const unsigned top = unsigned(row * g.rows.stride);
      const unsigned left = unsigned(column * g.columns.stride);
      const unsigned from = unsigned(image) * unsigned(g.x.image) + top * unsigned(g.x.row) +
                            left * unsigned(g.x.column) + source;
#pragma unroll
      for (int t = 0; t < kDepthwiseTaps; ++t) {
        const uint4 tap = place[t];
        if (top + tap.x >= unsigned(g.rows.in) || left + tap.y >= unsigned(g.columns.in)) continue;
        float value[kVector];
        load<kVector>(p.x + (from + tap.z), value);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[t][v] = multiply_add(value[v], dy[v], sums[t][v]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kDepthwiseTaps; ++t) {
    if (first_tap + t >= taps) break;
    sum_over_pixel_lanes<kVector>(sums[t], lanes, p.log_channels, scratch);
    if (lanes.pixel != 0 || channel >= g.k) continue;
    const unsigned at = unsigned(first_tap + t) * unsigned(g.k) + unsigned(channel);
    if (p.partials != nullptr) {
      const std::size_t count = std::size_t(taps) * std::size_t(g.k);
      store<kVector>(p.partials + (std::size_t(split) * count + at), sums[t]);
    } else {
      store<kVector>(p.out + at, sums[t]);
    }
  }
}

}  // namespace fastconv::cuda
