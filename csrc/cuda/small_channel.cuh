// Convolutions of 1 to 4 channels a group: first layers. Their windows overlap in almost all that a
// GEMM would gather, and a depth of a few products leaves it little to work with: so a block copies
// the patch of x under its tile of outputs to shared memory once, and multiplies from there (direct
// convolution; the register tile is that of simt_gemm.cuh).
//
// The patch, in shared memory and float32: [channel][row][column mod stride][column / stride], so
// that neighbouring outputs read neighbouring words whatever the stride. A table holds what each
// tap and channel adds to the place of an output.
//
// fprop: 128 threads make a tile of 8 or 16 rows x 16 columns x 64 or 32 filters; a warp 4 x 16
// outputs x 32 filters, a thread 8 x 8 of that: outputs lane % 8 and + 8 of four rows. The 8 lanes
// read 8 neighbouring words of the patch (no conflicts), those of a filter the same 16 bytes. The
// filter comes in chunks of 32 products.
//
// wgrad: a thread owns 8 x 8 (or 4 x 8) weights, a warp 32 (or 16) taps and channels x 64 filters;
// the warps of a block take a row each of tiles of 4 x 16 outputs, whose dy lies in shared memory
// as [output][64 + 4] (rows of 4 mod 32 words: 8 outputs x 4 filters meet all banks when NCHW is
// turned), and are added in order; blocks by split_k.cu. Its lanes read four neighbours among taps
// and channels at once: rows and channels of the patch are padded until those lie in different banks.
//
// dgrad is left to simt_gemm.cuh: nothing asks for the gradient of a first layer's input in
// training, and a tile of 32 columns computes it all the same.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/element.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

inline constexpr int kPatchThreads = 128;
inline constexpr int kPatchColumns = 16;  // of a tile of outputs
inline constexpr int kFilterChunk = 32;   // products of fprop between two barriers
inline constexpr int kWgradTileRows = 4;  // a warp each
inline constexpr int kWgradFilters = 64;
inline constexpr int kDyPitch = kWgradFilters + 4;

// The patch under a tile of outputs.
struct Patch {
  int rows, columns;        // pixels
  int pitch, row, channel;  // words: of a column class, a row, a channel
  FastDivisor by_rows, by_columns, by_channels;

  Patch(const Conv2dProblem& p, const ConvGeometry& g, int tile_rows)
      : rows((tile_rows - 1) * g.rows.stride + (g.rows.taps - 1) * g.rows.dilation + 1),
        columns((kPatchColumns - 1) * g.columns.stride + (g.columns.taps - 1) * g.columns.dilation +
                1),
        pitch((columns - 1) / g.columns.stride + 1), row(pitch * g.columns.stride),
        channel(rows * row), by_rows(rows), by_columns(columns), by_channels(p.c_per_group()) {
    const int least = row;
    int best = row, fewest = INT_MAX;
    for (int padding = 0; padding < 8 && fewest > 0; ++padding) {
      pad(g, least + padding);
      const int found = conflicts(g);
      if (found < fewest) best = row, fewest = found;
    }
    pad(g, best);
  }

  int words(int channels) const { return channels * channel; }

  // What tap and channel `i` add to the place of an output's first tap.
  __host__ __device__ int place(const ConvGeometry& g, int i) const {
    int tap_row = i;
    const int channel_of_group = g.by_c_per_group.split(tap_row);
    int column = g.by_column_taps.split(tap_row) * g.columns.dilation;
    const int column_class = g.columns.by_stride.split(column);
    return channel_of_group * channel + tap_row * g.rows.dilation * row + column_class * pitch +
           column;
  }

 private:
  // Rows of so many words; channels such that 32 neighbours of NHWC are stored to different banks.
  void pad(const ConvGeometry& g, int words_of_row) {
    row = words_of_row;
    channel = rows * row;
    if (g.c_per_group > 1) {
      const int wanted = (32 + g.c_per_group - 1) / g.c_per_group;
      channel += (wanted - channel % 32 + 32) % 32;
    }
  }

  // Among the four places that a warp of wgrad reads at a time: pairs in one bank.
  int conflicts(const ConvGeometry& g) const {
    const int depth = std::min(g.rows.taps * g.columns.taps * g.c_per_group, 256);  // soon told
    int found = 0;
    for (int first = 0; first < depth; first += 4) {
      int places[4];
      for (int i = 0; i < 4; ++i) {
        places[i] = place(g, std::min(first + i, depth - 1));
        for (int j = 0; j < i; ++j) {
          found += places[i] != places[j] && (places[i] - places[j]) % 32 == 0;
        }
      }
    }
    return found;
  }
};

template <class T>
struct SmallChannelArguments {
  const T* x;
  const T* filter;  // fprop
  const T* bias;    // or null
  const T* dy;      // wgrad
  T* out;
  float* partials;  // wgrad; or null: the outputs are not split
  ConvGeometry g;
  Patch patch;
  int depth;          // taps x channels of a group
  int tiles, splits;  // of wgrad: spatial tiles of all images
  FastDivisor by_filter_tiles, by_depth_tiles, by_tile_columns, by_tile_rows, by_splits;
  bool relu, channels_last, vector;  // vector: K allows filters and dy in fours
};

// Copies the patch whose first pixel is (top, left), which may lie outside: zeros.
template <class T>
__device__ __forceinline__ void copy_patch(const SmallChannelArguments<T>& p, int image, int group,
                                           int top, int left, float* to) {
  const ConvGeometry& g = p.g;
  const Patch& patch = p.patch;
  const unsigned from = unsigned(image) * unsigned(g.x.image) +
                        unsigned(group * g.c_per_group) * unsigned(g.x.channel);
  const int count = g.c_per_group * patch.rows * patch.columns;
  for (int i = int(threadIdx.x); i < count; i += kPatchThreads) {
    int rest = i, row, column, channel;
    if (p.channels_last) {
      channel = patch.by_channels.split(rest);
      column = patch.by_columns.split(rest);
      row = rest;
    } else {
      column = patch.by_columns.split(rest);
      row = patch.by_rows.split(rest);
      channel = rest;
    }
    const unsigned y = unsigned(top + row), x = unsigned(left + column);
    float value = 0.f;
    if (y < unsigned(g.rows.in) && x < unsigned(g.columns.in)) {
      value = to_float(p.x[from + y * unsigned(g.x.row) + x * unsigned(g.x.column) +
                           unsigned(channel) * unsigned(g.x.channel)]);
    }
    const int column_class = g.columns.by_stride.split(column);
    to[channel * patch.channel + row * patch.row + column_class * patch.pitch + column] = value;
  }
}

template <class T, int kFilters>
__global__ __launch_bounds__(kPatchThreads,
                             4) void small_channel_fprop_kernel(const SmallChannelArguments<T> p) {
  constexpr int kWarpsAcross = kFilters / 32, kTileRows = 4 * (4 / kWarpsAcross);
  FASTCONV_DYNAMIC_SHARED(float, shared);
  float* const filter = shared;  // [kFilterChunk][kFilters]
  float* const patch = filter + kFilterChunk * kFilters;
  int* const places = reinterpret_cast<int*>(patch + p.g.c_per_group * p.patch.channel);
  const ConvGeometry& g = p.g;

  int image = int(blockIdx.x);
  const int filter_tile = p.by_filter_tiles.split(image) * kFilters;
  const int column_tile = p.by_tile_columns.split(image) * kPatchColumns;
  const int row_tile = p.by_tile_rows.split(image) * kTileRows;
  int group = image;
  image = p.by_splits.split(group);  // here: images

  for (int i = int(threadIdx.x); i < p.depth; i += kPatchThreads) {
    places[i] = p.patch.place(g, i);
  }
  copy_patch(p, image, group, row_tile * g.rows.stride - g.rows.padding,
             column_tile * g.columns.stride - g.columns.padding, patch);

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = warp / kWarpsAcross * 4, column = lane % 8;
  const int first_filter = warp % kWarpsAcross * 32 + lane / 8 * 4;
  int at[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) at[i] = (row + i) * g.rows.stride * p.patch.row + column;

  float sums[8][8] = {};
  for (int start = 0; start < p.depth; start += kFilterChunk) {
    const int count = min(kFilterChunk, p.depth - start);
    __syncthreads();
    for (int i = int(threadIdx.x); i < count * kFilters; i += kPatchThreads) {
      const int k = filter_tile + i % kFilters;
      filter[i] = k < g.k_per_group
                      ? to_float(p.filter[unsigned(start + i / kFilters) * unsigned(g.k) +
                                          unsigned(group * g.k_per_group + k)])
                      : 0.f;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const int place = places[start + i];
      float a[8], b[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const from = patch + (place + at[j]);
        a[2 * j] = from[0], a[2 * j + 1] = from[8];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 b4 =
            *reinterpret_cast<const float4*>(filter + i * kFilters + first_filter + half * 16);
        b[half * 4] = b4.x, b[half * 4 + 1] = b4.y, b[half * 4 + 2] = b4.z, b[half * 4 + 3] = b4.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[j][k] = multiply_add(a[j], b[k], sums[j][k]);
      }
    }
  }

  const int k0 = filter_tile + first_filter;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int filter_of_group = k0 + k / 4 * 16 + k % 4;
    const float bias = p.bias != nullptr && filter_of_group < g.k_per_group
                           ? to_float(p.bias[group * g.k_per_group + filter_of_group])
                           : 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[j][k] += bias;
      if (p.relu) sums[j][k] = relu(sums[j][k]);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int oh = row_tile + row + j / 2, ow = column_tile + column + j % 2 * 8;
    if (oh >= g.rows.out || ow >= g.columns.out) continue;
    T* const to = p.out + (unsigned(image) * unsigned(g.y.image) +
                           unsigned(oh) * unsigned(g.y.row) + unsigned(ow) * unsigned(g.y.column) +
                           unsigned(group * g.k_per_group) * unsigned(g.y.channel));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = k0 + half * 16;
      if (p.vector) {
        float four[4];
#pragma unroll
        for (int l = 0; l < 4; ++l) four[l] = sums[j][half * 4 + l];
        if (k < g.k_per_group) store<4>(to + k, four);
      } else {
#pragma unroll
        for (int l = 0; l < 4; ++l) {
          if (k + l < g.k_per_group) {
            to[unsigned(k + l) * unsigned(g.y.channel)] = from_float<T>(sums[j][half * 4 + l]);
          }
        }
      }
    }
  }
}

// dy of a tile: [output][kDyPitch], zeros beyond K. Outputs beyond the image are not read.
template <class T>
__device__ __forceinline__ void copy_dy(const SmallChannelArguments<T>& p, int image, int row,
                                        int column, int first_filter, int group, float* to) {
  const ConvGeometry& g = p.g;
  constexpr int kOutputs = kWgradTileRows * kPatchColumns;
  const T* const from = p.dy + (unsigned(image) * unsigned(g.y.image) +
                                unsigned(group * g.k_per_group) * unsigned(g.y.channel));
  if (p.vector) {
    for (int i = int(threadIdx.x); i < kOutputs * kWgradFilters / 4; i += kPatchThreads) {
      const int output = i / (kWgradFilters / 4), filter = i % (kWgradFilters / 4) * 4;
      const int oh = row + output / kPatchColumns, ow = column + output % kPatchColumns;
      const int k = first_filter + filter;
      float four[4] = {};
      if (oh < g.rows.out && ow < g.columns.out && k < g.k_per_group) {
        load<4>(from + (unsigned(oh) * unsigned(g.y.row) + unsigned(ow) * unsigned(g.y.column) +
                        unsigned(k)),
                four);
      }
      store<4>(to + output * kDyPitch + filter, four);
    }
    return;
  }
  for (int i = int(threadIdx.x); i < kOutputs * kWgradFilters; i += kPatchThreads) {
    // NCHW: lanes are 8 neighbouring outputs of 4 filters.
    const int eighth = i / 32 % (kOutputs / 8), four = i / (4 * kOutputs);
    const int output = p.channels_last ? i / kWgradFilters : eighth * 8 + i % 8;
    const int filter = p.channels_last ? i % kWgradFilters : four * 4 + i / 8 % 4;
    const int oh = row + output / kPatchColumns, ow = column + output % kPatchColumns;
    const int k = first_filter + filter;
    to[output * kDyPitch + filter] =
        oh < g.rows.out && ow < g.columns.out && k < g.k_per_group
            ? to_float(from[unsigned(oh) * unsigned(g.y.row) + unsigned(ow) * unsigned(g.y.column) +
                            unsigned(k) * unsigned(g.y.channel)])
            : 0.f;
  }
}

template <int kTaps>
__device__ __forceinline__ void multiply_output(const float* const (&from)[kTaps], int column,
                                                const float* dy, float (&sums)[kTaps][8]) {
  float b[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 b4 = *reinterpret_cast<const float4*>(dy + column * kDyPitch + half * 32);
    b[half * 4] = b4.x, b[half * 4 + 1] = b4.y, b[half * 4 + 2] = b4.z, b[half * 4 + 3] = b4.w;
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const float a = from[j][column];
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[j][k] = multiply_add(a, b[k], sums[j][k]);
  }
}

template <class T, int kTaps>
__global__ __launch_bounds__(kPatchThreads,
                             4) void small_channel_wgrad_kernel(const SmallChannelArguments<T> p) {
  constexpr int kTapsOfTile = 4 * kTaps;
  FASTCONV_DYNAMIC_SHARED(float, shared);
  float* const dy = shared;  // at the end the sums: [kTapsOfTile][kWgradFilters]
  float* const patch = dy + kWgradTileRows * kPatchColumns * kDyPitch;
  const ConvGeometry& g = p.g;

  int split = int(blockIdx.x);
  const int first_filter = p.by_filter_tiles.split(split) * kWgradFilters;
  const int first_tap = p.by_depth_tiles.split(split) * kTapsOfTile;
  int group = split;
  split = p.by_splits.split(group);

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int tap = lane / 8, filter = lane % 8 * 4;  // and every fourth tap from there
  const float* base[kTaps];
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const int number = min(first_tap + tap + 4 * j, p.depth - 1);  // beyond the last: not written
    base[j] = patch + (p.patch.place(g, number) + warp * g.rows.stride * p.patch.row);
  }

  float sums[kTaps][8] = {};
  for (int tile = split; tile < p.tiles; tile += p.splits) {
    int image = tile;
    const int column = p.by_tile_columns.split(image) * kPatchColumns;
    const int row = p.by_tile_rows.split(image) * kWgradTileRows;
    __syncthreads();
    copy_patch(p, image, group, row * g.rows.stride - g.rows.padding,
               column * g.columns.stride - g.columns.padding, patch);
    copy_dy(p, image, row, column, first_filter, group, dy);
    __syncthreads();
    if (row + warp >= g.rows.out) continue;
    // Outputs beyond the image take no part: 0 times what x holds there might be NaN.
    const int columns = min(kPatchColumns, g.columns.out - column);
    const float* from[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) from[j] = base[j];
    const float* dy_of_row = dy + warp * kPatchColumns * kDyPitch + filter;
    int done = 0;
#pragma unroll 1
    for (; done + 4 <= columns; done += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_output<kTaps>(from, i, dy_of_row, sums);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) from[j] += 4;
      dy_of_row += 4 * kDyPitch;
    }
#pragma unroll 1
    for (; done < columns; ++done) {
      multiply_output<kTaps>(from, 0, dy_of_row, sums);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) ++from[j];
      dy_of_row += kDyPitch;
    }
  }

  // The warps add their sums one after the other.
#pragma unroll 1
  for (int turn = 0; turn < 4; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = dy + (tap + 4 * j) * kWgradFilters + filter + half * 32;
        float4 sum = make_float4(sums[j][half * 4], sums[j][half * 4 + 1], sums[j][half * 4 + 2],
                                 sums[j][half * 4 + 3]);
        if (turn > 0) {
          const float4 before = *reinterpret_cast<const float4*>(to);
          sum = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
        }
        *reinterpret_cast<float4*>(to) = sum;
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTapsOfTile * kWgradFilters; i += kPatchThreads) {
    const int row = first_tap + i / kWgradFilters, k = first_filter + i % kWgradFilters;
    if (row >= p.depth || k >= g.k_per_group) continue;
    const unsigned at = unsigned(row) * unsigned(g.k) + unsigned(group * g.k_per_group + k);
    if (p.partials != nullptr) {
      const std::size_t count = std::size_t(p.depth) * std::size_t(g.k);
      p.partials[std::size_t(split) * count + at] = dy[i];
    } else {
      p.out[at] = from_float<T>(dy[i]);
    }
  }
}

}  // namespace fastconv::cuda
