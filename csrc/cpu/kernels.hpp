// What one instruction set offers. Each isa/*.cpp instantiates the algorithm headers for its vector
// type and exports one table; select.cpp hands out the table of the ISA in use.
//
// All work on NHWC problems and hand their tasks to the thread pool.
#pragma once

#include "core/cpu_features.hpp"
#include "core/problem.hpp"

namespace fastconv::cpu {

struct Kernels {
  void (*conv2d_fprop)(const Conv2dProblem&, const float* x, const float* filter,
                       const float* bias, float* y);
  // dy has passed the activation already.
  void (*conv2d_dgrad)(const Conv2dProblem&, const float* dy, const float* filter, float* dx);
  void (*conv2d_wgrad)(const Conv2dProblem&, const float* x, const float* dy, float* dfilter);
  // One pass over dy: dz = dy where y > 0 (dz and y null: no activation), and the bias gradient,
  // summed over pixels in a fixed order (dbias may be null).
  void (*activation_grad)(std::int64_t pixels, std::int64_t channels, const float* dy,
                          const float* y, float* dz, float* dbias);
  void (*max_pool2d_fprop)(const Pool2dProblem&, const float* x, float* y, void* argmax);
  void (*max_pool2d_bprop)(const Pool2dProblem&, const float* dy, const void* argmax, float* dx);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

const Kernels& kernels(Isa isa);

}  // namespace fastconv::cpu
