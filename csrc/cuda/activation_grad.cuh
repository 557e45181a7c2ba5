// The backward epilogue, in one pass over dy: dz = dy where y > 0, and the sum of that over pixels,
// the gradient of the bias. Bound by memory: each element is read once, four at a time where
// channels allow it. column_sum.cuh says how sums are shared.
#pragma once

#include "cuda/column_sum.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

template <class T>
struct ActivationGradArguments {
  const T* dy;
  const T* y;  // both or neither
  T* dz;
  T* dbias;         // may be null
  float* partials;  // not null: dbias is split over blocks
  int pixels, channels, pixels_per_split;
  int log_channels;
  int image, pixel, channel;  // strides
  FastDivisor by_plane, by_channel_blocks;
};

template <class T, int kVector>
__global__ __launch_bounds__(kSumThreads) void activation_grad_kernel(
    const ActivationGradArguments<T> p) {
  FASTCONV_SHARED(scratch, float[kSumThreads * kVector]);
  const SumLanes lanes(p.log_channels);
  int split = int(blockIdx.x);
  const int channel =
      ((p.by_channel_blocks.split(split) << p.log_channels) + lanes.channel) * kVector;
  const unsigned end = min(unsigned(split + 1) * unsigned(p.pixels_per_split), unsigned(p.pixels));

  float sums[kVector] = {};
  if (channel < p.channels) {
#pragma unroll 4
    for (unsigned i = unsigned(split * p.pixels_per_split + lanes.pixel); i < end;
         i += unsigned(lanes.pixels)) {
      int image = int(i);
      const int pixel = p.by_plane.split(image);
      const unsigned at = unsigned(image) * unsigned(p.image) +
                          unsigned(pixel) * unsigned(p.pixel) +
                          unsigned(channel) * unsigned(p.channel);
      float dz[kVector];
      load<kVector>(p.dy + at, dz);
      if (p.y != nullptr) {
        float y[kVector];
        load<kVector>(p.y + at, y);
#pragma unroll
        for (int j = 0; j < kVector; ++j) dz[j] = y[j] > 0.f ? dz[j] : 0.f;
        store<kVector>(p.dz + at, dz);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += dz[j];
    }
  }
  if (p.dbias == nullptr) return;
  sum_over_pixel_lanes<kVector>(sums, lanes, p.log_channels, scratch);
  if (lanes.pixel != 0 || channel >= p.channels) return;
  if (p.partials != nullptr) {
    store<kVector>(p.partials + (std::size_t(split) * std::size_t(p.channels) + channel), sums);
  } else {
    store<kVector>(p.dbias + channel, sums);
  }
}

}  // namespace fastconv::cuda
