// What the cost models take a device to do, by its compute capability: enough to rank algorithms
// and tiles. Of the best known card of each; the number of multiprocessors is the device's own.
#pragma once

#include "cuda/kernels.hpp"

namespace fastconv::cuda {

struct Throughput {
  double fma_per_cycle;  // float32, of a multiprocessor
  // float16 or bfloat16 by mma.sync, summed in float32; TF32 takes twice as long. 9.0 and 10.0 do
  // more by instructions of their own (wgmma, tcgen05) than the guess given here.
  double tensor_fma_per_cycle;
  double cycles_per_second;
  double bytes_per_second;  // from device memory
};

inline Throughput throughput(const Device& device) {
  switch (device.compute_capability) {
    case 75: return {64, 512, 1.6e9, 0.32e12};   // T4
    case 80: return {64, 1024, 1.4e9, 1.55e12};  // A100
    case 86: return {128, 256, 1.7e9, 0.9e12};   // RTX 3090
    case 89: return {128, 256, 2.5e9, 1.0e12};   // RTX 4090
    case 90: return {128, 1200, 1.7e9, 3.3e12};  // H100
    case 100: return {128, 1200, 1.8e9, 8e12};   // B200
    case 120: return {128, 256, 2.4e9, 1.8e12};  // RTX 5090
    default: return {128, 256, 1.7e9, 1e12};
  }
}

// Of one kernel more.
inline constexpr double kLaunchSeconds = 3e-6;

}  // namespace fastconv::cuda
