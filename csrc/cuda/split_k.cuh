// The second pass of sums that were split over blocks: out[i] = epilogue(partials[0][i] +
// partials[1][i] + ...), added in that order whatever the device does when. A thread owns four
// neighbouring results, or one where their number is no multiple of four.
#pragma once

#include "cuda/element.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

// bias[channel], where a result's channel is i / inner mod channels; none where bias is null.
template <class T>
struct SplitKArguments {
  const float* partials;
  T* out;
  const T* bias;
  int count, splits;
  FastDivisor by_inner, by_channels;
  bool relu;
};

template <class T, int kVector>
__global__ __launch_bounds__(256) void sum_splits_kernel(SplitKArguments<T> a) {
  const unsigned at = (blockIdx.x * 256u + threadIdx.x) * kVector;
  if (at >= unsigned(a.count)) return;
  float sum[kVector] = {};
  const float* from = a.partials + at;
  for (int split = 0; split < a.splits; ++split, from += a.count) {
    float part[kVector];
    load<kVector>(from, part);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (a.bias != nullptr) {
      int channel = a.by_inner.quotient(int(at) + i);
      channel = a.by_channels.split(channel);
      sum[i] += to_float(a.bias[channel]);
    }
    if (a.relu) sum[i] = relu(sum[i]);
  }
  store<kVector>(a.out + at, sum);
}

}  // namespace fastconv::cuda
