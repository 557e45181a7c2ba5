// What one instruction set offers. Files of isa/ instantiate the algorithm headers for its vector type,
// and one of them exports the table; select.cpp hands out the table of the ISA in use and chooses among
// its algorithms.
//
// All hand their tasks to the thread pool.
#pragma once

#include <span>
#include <string>

#include "core/cpu_features.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"

namespace fastconv::cpu {

// The tensors of one convolution; a direction reads those that it needs.
struct Conv2dOperands {
  const float* x = nullptr;       // fprop, wgrad
  const float* filter = nullptr;  // fprop, dgrad
  const float* bias = nullptr;    // fprop; may be null
  // fprop, dgrad: where forms of the filter, times its scale, are kept between calls; may be null.
  const FilterForms* packed = nullptr;
  // fprop, of an algorithm that takes them: y = activation(conv(x, filter * scale) + bias + residual).
  const float* scale = nullptr;     // K values; may be null
  const float* residual = nullptr;  // of y's shape; may be null
  const float* dy = nullptr;        // dgrad, wgrad
  const float* y = nullptr;         // dgrad, wgrad that mask: dy counts where y > 0; may be null
  float* out = nullptr;             // y, dx or dfilter
  float* dbias = nullptr;           // wgrad that masks: also the sum of the masked dy; may be null
  // With a 2 x 2 max-pooling behind the convolution, of an algorithm that fuses it. The problem's
  // output has even height and width.
  bool pooled = false;                        // fprop: `out` is pooled
  std::uint8_t* argmax = nullptr;             // fprop, pooled; may be null
  const std::uint8_t* argmax_of_y = nullptr;  // wgrad: not null where dy and y are pooled
};

// The tensors of a batch normalisation's gradient.
struct BatchNormGradOperands {
  const float *x, *mean, *variance, *gamma, *beta, *dy;
  const float* y;  // null, unless something was added before an activation
  float *dx, *dgamma, *dbeta;
  float* dresidual;  // where y is not null
};

struct Estimate {
  // Time on one core, in multiply-adds of the direct sum at full speed: those a perfect direct
  // convolution would do in that time.
  double multiply_adds = 0;
  std::int64_t workspace_bytes = 0;
  // Largest error added to that of the direct sum, over the largest result; 0 for sums of products.
  double relative_error = 0;
};

struct Conv2dAlgorithm {
  const char* name;
  // Whether dgrad and wgrad apply the ReLU mask of `y` themselves, wgrad with the bias gradient;
  // else dy has passed it already.
  bool masks_dgrad, masks_wgrad;
  bool (*serves)(const Conv2dProblem&, Direction);
  Estimate (*estimate)(const Conv2dProblem&, Direction);
  std::string (*blocking)(const Conv2dProblem&, Direction);
  void (*run)(const Conv2dProblem&, Direction, const Conv2dOperands&);
  // Whether its fprop takes `scale`, and `residual`.
  bool scales_filter = false, adds_residual = false;
  // Whether it takes operands of a convolution with a pooling behind it.
  bool (*fuses_pool)(const Conv2dProblem&, Direction) = [](const Conv2dProblem&, Direction) {
    return false;
  };
};

// The tensors of the gradients of a convolution with a 2 x 2 max-pooling behind it.
struct PoolGradientOperands {
  const float *x, *filter;
  const float* dy;  // pooled
  const float* y;   // pooled: dy counts where it is positive; null for everywhere
  const std::uint8_t* argmax;
  float* dx;  // may be null
  float* dfilter;
  float* dbias;  // may be null
};

// Both gradients at once, from the pooled one.
struct PoolGradientKernel {
  const char* name;
  // The problem's output has even height and width.
  bool (*serves)(const Conv2dProblem&);
  double (*estimate)(const Conv2dProblem&, bool with_dx);  // Estimate::multiply_adds
  void (*run)(const Conv2dProblem&, const PoolGradientOperands&);
};

struct Kernels {
  // In order of preference where estimates are equal.
  std::span<const Conv2dAlgorithm* const> conv2d;
  PoolGradientKernel pool_gradient;
  // One pass over dy: dz = dy where y > 0 (dz and y null: no activation), and the bias gradient,
  // summed over pixels in a fixed order (dbias may be null).
  void (*activation_grad)(std::int64_t pixels, std::int64_t channels, const float* dy,
                          const float* y, float* dz, float* dbias);
  // y = activation(y + from); `from` may be null.
  void (*add_and_activate)(Activation, std::int64_t count, const float* from, float* y);
  // From and to a data type of 16 bits: see convert.hpp.
  void (*widen)(DataType, std::int64_t count, const void* in, float* out);
  void (*narrow)(DataType, std::int64_t count, const float* in, void* out);
  // out[n][j][i] = in[n][i][j] for `matrices` of rows x columns, from and to any data type.
  void (*transpose_in)(DataType, std::int64_t matrices, std::int64_t rows, std::int64_t columns,
                       const void* in, float* out);
  void (*transpose_out)(DataType, std::int64_t matrices, std::int64_t rows, std::int64_t columns,
                        const float* in, void* out);
  void (*transpose_bytes)(std::int64_t matrices, std::int64_t rows, std::int64_t columns,
                          const std::uint8_t* in, std::uint8_t* out);
  void (*max_pool2d_fprop)(const Pool2dProblem&, const float* x, float* y, void* argmax);
  // dy counts only where y > 0, unless y is null.
  void (*max_pool2d_bprop)(const Pool2dProblem&, const float* dy, const float* y,
                           const void* argmax, float* dx);
  void (*avg_pool2d_fprop)(const Pool2dProblem&, const float* x, float* y);
  void (*avg_pool2d_bprop)(const Pool2dProblem&, const float* dy, float* dx);
  // See core/operations.hpp. There is at least one row.
  void (*batch_norm_moments)(const BatchNormProblem&, const float* x, float* mean, float* variance);
  void (*batch_norm_fprop)(const BatchNormProblem&, const float* x, const float* mean,
                           const float* variance, const float* gamma, const float* beta,
                           const float* residual, float* y);
  void (*batch_norm_bprop)(const BatchNormProblem&, const BatchNormGradOperands&);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

const Kernels& kernels(Isa isa);

// The algorithm for this problem and direction; the named one if `name` is not null. Throws
// InvalidArgument if the named one does not exist or does not serve the problem.
const Conv2dAlgorithm& choose(const Conv2dProblem& problem, Direction direction,
                              const char* name = nullptr);

// For the gradients of a convolution with a pooling behind it: whether pool_gradient takes less time than
// the pooling's gradient and then the convolution's, for both or for the filter's alone, or is the one
// named.
enum class PoolGradientUse : std::uint8_t { none, wgrad, both };
PoolGradientUse use_of_pool_gradient(const Conv2dProblem& problem, bool with_dx,
                                     const char* name = nullptr);

}  // namespace fastconv::cpu
