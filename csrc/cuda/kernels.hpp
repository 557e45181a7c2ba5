// What the files of this folder offer one another, and the operations that they make together. Each
// algorithm is a .cu file (its launches) over a .cuh file (its kernels) and exports one entry of the
// tables below; select.cpp chooses among them; library.cpp is the door.
//
// The same sources are compiled twice: by nvcc, and by the C++ compiler against emulator/, where
// every thread of a block is a fiber. device.cuh is the one include by which kernels see either.
//
// All memory is the device's. Everything is enqueued on the call's stream and nothing waits for it.
// Results are the same bits run to run: no atomics; sums that are split are added up in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/problem.hpp"
#include "core/selection.hpp"
#include "cuda/device.cuh"
#include "cuda/library.hpp"

namespace fastconv::cuda {

struct Device {
  int index = 0;
  int compute_capability = 0;  // 75, 80, 86, 89, 90, 100, 120
  int multiprocessors = 0;
  std::size_t shared_memory_per_block = 0;  // with opting in
};

struct Call {
  Device device;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;  // of workspace_bytes() bytes at least, aligned to 256
};

struct Conv2dSpec {
  Conv2dProblem problem;  // each tensor below 2^31 elements; not empty; in either layout
  Direction direction = Direction::fprop;
  DataType type = DataType::float32;
  Float32Math math = Float32Math::ieee;
};

// The tensors of one convolution; a direction reads those that it needs. The ReLU mask of the
// backward directions has been applied to dy before (ActivationGrad), and the bias gradient taken.
struct Conv2dOperands {
  const void* x = nullptr;       // fprop, wgrad
  const void* filter = nullptr;  // fprop, dgrad
  const void* bias = nullptr;    // fprop; may be null. problem.activation is fprop's epilogue
  const void* dy = nullptr;      // dgrad, wgrad
  void* out = nullptr;           // y, dx or dfilter
};

struct Conv2dAlgorithm {
  const char* name;
  bool (*serves)(const Conv2dSpec&, const Device&);
  std::size_t (*workspace_bytes)(const Conv2dSpec&, const Device&);
  // Estimated seconds on the device: the least one is chosen.
  double (*estimate)(const Conv2dSpec&, const Device&);
  std::string (*blocking)(const Conv2dSpec&, const Device&);  // tiles, stages and splits, in words
  cudaError_t (*run)(const Conv2dSpec&, const Conv2dOperands&, const Call&);
};

extern const Conv2dAlgorithm kSimtGemm;        // simt_gemm.cu: float32, all directions, any problem
extern const Conv2dAlgorithm kSmallChannel;    // small_channel.cu: C / groups of 1 to 4
extern const Conv2dAlgorithm kDepthwise;       // depthwise.cu: C / groups = 1, with a multiplier
extern const Conv2dAlgorithm kTensorCoreGemm;  // tensor_core_gemm.cu: float16, bfloat16, TF32

// The second pass of a sum over `splits` blocks: results i < count are the sums of
// workspace[split * count + i] (float32) in the order of the splits, plus bias[i / inner % channels]
// (bias may be null), then ReLU if asked for. split_k.cu.
struct SplitKSum {
  void* out = nullptr;
  const void* bias = nullptr;
  std::int64_t count = 0;
  int splits = 1;
  std::int64_t inner = 1, channels = 1;
  bool relu = false;
};
cudaError_t sum_splits(DataType, const SplitKSum&, const Call&);

// dz = dy where y > 0 (dz and y null: no activation), and, where dbias is not null, the sum of that
// over pixels, in a fixed order. activation_grad.cu.
std::size_t activation_grad_workspace_bytes(const Conv2dProblem&, DataType, const Device&);
cudaError_t activation_grad(const Conv2dProblem&, DataType, const void* dy, const void* y, void* dz,
                            void* dbias, const Call&);

// As core/operations.hpp says, in each data type; argmax is uint8 or int32. pool.cu.
cudaError_t max_pool2d_fprop(const Pool2dProblem&, DataType, const void* x, void* y, void* argmax,
                             const Call&);
cudaError_t max_pool2d_bprop(const Pool2dProblem&, DataType, const void* dy, const void* argmax,
                             void* dx, const Call&);
// y = x where each window's maximum was: how a change of dx changes dy.
cudaError_t max_pool2d_gather(const Pool2dProblem&, DataType, const void* x, const void* argmax,
                              void* y, const Call&);
cudaError_t avg_pool2d_fprop(const Pool2dProblem&, DataType, const void* x, void* y, const Call&);
cudaError_t avg_pool2d_bprop(const Pool2dProblem&, DataType, const void* dy, void* dx, const Call&);

// All that have been compiled in; select.cpp.
std::span<const Conv2dAlgorithm* const> algorithms();

// The algorithm of the least estimate; the named one if `name` is not null. Throws InvalidArgument if
// the named one does not exist or does not serve the problem. select.cpp.
const Conv2dAlgorithm& choose(const Conv2dSpec& spec, const Device& device,
                              const char* name = nullptr);

}  // namespace fastconv::cuda
