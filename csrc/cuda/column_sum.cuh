// Sums over pixels, a channel each: how the threads of a block share them. 2^log_channels lanes lie
// along channels (in NCHW one: neighbours read neighbouring pixels), the others along pixels. Each
// adds up its pixels in order; lanes of a channel are added as a tree, blocks by split_k.cu: in the
// same order whatever the device does when.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/element.cuh"

namespace fastconv::cuda {

inline constexpr int kSumThreads = 256;

struct SumLanes {
  int channel, pixel, pixels;  // this thread's place, and how many threads share a channel

  __device__ explicit SumLanes(int log_channels)
      : channel(int(threadIdx.x) & ((1 << log_channels) - 1)),
        pixel(int(threadIdx.x) >> log_channels), pixels(kSumThreads >> log_channels) {}
};

// For the lanes of pixel 0: the sum of `values` over the lanes of their channel. All threads of the
// block call it. Lanes read and write neighbouring words: no bank conflicts.
template <int kVector>
__device__ __forceinline__ void sum_over_pixel_lanes(float (&values)[kVector],
                                                     const SumLanes& lanes, int log_channels,
                                                     float (&scratch)[kSumThreads * kVector]) {
  float* const mine = scratch + threadIdx.x * kVector;
  store<kVector>(mine, values);
  __syncthreads();
#pragma unroll 1
  for (int step = lanes.pixels / 2; step > 0; step /= 2) {
    if (lanes.pixel < step) {
      const float* const other = mine + (step << log_channels) * kVector;
      if constexpr (kVector == 4) {  // one read, for neighbouring lanes neighbouring 16 bytes
        const float4 four = *reinterpret_cast<const float4*>(other);
        values[0] += four.x, values[1] += four.y, values[2] += four.z, values[3] += four.w;
      } else {
        values[0] += *other;
      }
      store<kVector>(mine, values);
    }
    __syncthreads();
  }
}

// How a sum of `pixels` x `channels` (of vectors) is cut into blocks, for the problem and the
// device alone.
struct SumPlan {
  int log_channels = 0;
  std::int64_t channel_blocks = 1, splits = 1, pixels_per_split = 1;

  // `waves`: blocks of the kernel that are wanted for each multiprocessor; a thread has eight
  // pixels at least.
  SumPlan(std::int64_t pixels, std::int64_t channels, bool channels_contiguous,
          std::int64_t multiprocessors, std::int64_t other_blocks) {
    while (channels_contiguous && log_channels < 5 && (1 << log_channels) < channels) {
      ++log_channels;
    }
    channel_blocks = ((channels - 1) >> log_channels) + 1;
    const std::int64_t lanes = kSumThreads >> log_channels;
    const std::int64_t blocks = channel_blocks * other_blocks;
    const std::int64_t wanted = (8 * multiprocessors + blocks - 1) / blocks;
    const std::int64_t most = std::max<std::int64_t>(pixels / (8 * lanes), 1);
    splits = std::clamp<std::int64_t>(wanted, 1, std::min<std::int64_t>(most, 1024));
    pixels_per_split = (pixels + splits - 1) / splits;
    splits = (pixels + pixels_per_split - 1) / pixels_per_split;
  }
};

}  // namespace fastconv::cuda
