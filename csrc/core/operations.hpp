// What the doors call: every operation of the library on plain pointers. Pointers address dense
// tensors of the shapes and the data type that the problem names (those of batch normalisation are of
// float32); outputs never overlap inputs. Whatever the data type, sums are of float32; results of 16 bits
// are rounded once. All run on the process's thread pool and are bit-identical for any number of threads.
//
// `algorithm` names one of the convolution algorithms (selection.hpp) instead of the selector's
// choice; they throw InvalidArgument where it does not serve the problem.
#pragma once

#include "core/export.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"

namespace fastconv {

// y = activation(conv(x, filter) + bias). `bias` holds K values or is null.
FASTCONV_API void conv2d_fprop(const Conv2dProblem& problem, const void* x, const void* filter,
                               const void* bias, void* y, const char* algorithm = nullptr);

// y = activation(conv(x, filter * scale) + bias + residual): a convolution with what stands behind it in
// a network at inference, batch normalisation (scale, bias), a shortcut and an activation. `scale` and
// `bias` hold K values, `residual` has y's shape; each may be null. `forms`, where they are not null, are
// those of this very filter times this very scale, of float32: they are used, and made where there are none.
FASTCONV_API void conv2d_scaled_fprop(const Conv2dProblem& problem, const void* x,
                                      const void* filter, const void* scale, const void* bias,
                                      const void* residual, void* y,
                                      const char* algorithm = nullptr,
                                      const FilterForms* forms = nullptr);

// dx = the gradient of fprop by x. With activation relu, `y` is fprop's output and dy counts only
// where y > 0; with linear, `y` is not read and may be null.
FASTCONV_API void conv2d_dgrad(const Conv2dProblem& problem, const void* dy, const void* filter,
                               const void* y, void* dx, const char* algorithm = nullptr);

// The same, with `forms` as of conv2d_scaled_fprop.
FASTCONV_API void conv2d_kept_dgrad(const Conv2dProblem& problem, const void* dy,
                                    const void* filter, const void* y, void* dx,
                                    const FilterForms* forms, const char* algorithm = nullptr);

// dfilter = the gradient of fprop by the filter and, where dbias is not null, dbias that by the
// bias; `y` as for dgrad. dfilter may be null when only dbias is wanted.
FASTCONV_API void conv2d_wgrad(const Conv2dProblem& problem, const void* x, const void* dy,
                               const void* y, void* dfilter, void* dbias,
                               const char* algorithm = nullptr);

// y = the maximum of each window. The first maximum in row-major order wins a tie; a NaN in the
// window makes the result NaN (the first one is the argmax). `argmax` may be null; else it is
// uint8 or int32 by problem.argmax_fits_byte(), of y's shape, and holds row * S + column of the
// maximum within its window.
FASTCONV_API void max_pool2d_fprop(const Pool2dProblem& problem, const void* x, void* y,
                                   void* argmax);

// dx = dy sent to the pixel each window's argmax names, summed where windows overlap.
FASTCONV_API void max_pool2d_bprop(const Pool2dProblem& problem, const void* dy, const void* argmax,
                                   void* dx);

// y = the sum of each window's pixels inside x over their number: padding is not counted.
FASTCONV_API void avg_pool2d_fprop(const Pool2dProblem& problem, const void* x, void* y);

// dx = dy over the number of its window's pixels inside x, summed over the windows of a pixel.
FASTCONV_API void avg_pool2d_bprop(const Pool2dProblem& problem, const void* dy, void* dx);

// y = 2 x 2 max-pooling (pool_behind) of what conv2d_fprop computes, which is not kept. `argmax`, one
// byte a result as of max_pool2d_fprop, may be null.
FASTCONV_API void conv2d_pool_fprop(const Conv2dProblem& problem, const void* x, const void* filter,
                                    const void* bias, void* y, std::uint8_t* argmax,
                                    const char* algorithm = nullptr);

// The same, with `forms` as of conv2d_scaled_fprop.
FASTCONV_API void conv2d_kept_pool_fprop(const Conv2dProblem& problem, const void* x,
                                         const void* filter, const void* bias, void* y,
                                         std::uint8_t* argmax, const FilterForms* forms,
                                         const char* algorithm = nullptr);

// Its gradients by x, the filter and the bias; dx and dbias may be null. With activation relu, `y`
// is conv2d_pool_fprop's output; with linear, it is not read.
FASTCONV_API void conv2d_pool_bprop(const Conv2dProblem& problem, const void* x, const void* filter,
                                    const void* dy, const void* y, const std::uint8_t* argmax,
                                    void* dx, void* dfilter, void* dbias,
                                    const char* algorithm = nullptr);

// The conversions that all these make of tensors of 16 bits: exactly to float32, and rounded to nearest,
// ties to even, from it.
FASTCONV_API void to_float32(DataType type, std::int64_t count, const void* values, float* out);
FASTCONV_API void from_float32(DataType type, std::int64_t count, const float* values, void* out);

// Batch normalisation in training. mean and variance (not of a sample: over their number) of each
// channel, over all rows; NaN where there are none.
FASTCONV_API void batch_norm_moments(const BatchNormProblem& problem, const float* x, float* mean,
                                     float* variance);

// y = activation((x - mean) / sqrt(variance + epsilon) * gamma + beta + residual). `residual`, of x's
// shape, may be null.
FASTCONV_API void batch_norm_fprop(const BatchNormProblem& problem, const float* x,
                                   const float* mean, const float* variance, const float* gamma,
                                   const float* beta, const float* residual, float* y);

// What that is of x + bias (null for none), without an activation and a residual: x * scale + offset, by channels.
FASTCONV_API void batch_norm_affine(const BatchNormProblem& problem, const float* mean,
                                    const float* variance, const float* gamma, const float* beta,
                                    const float* bias, float* scale, float* offset);

// The gradients of batch_norm_fprop by x, gamma and beta, of which that by x counts that mean and variance are x's
// own.
// Where a residual was added before an activation, `y` is batch_norm_fprop's output and `dresidual`
// gets the residual's gradient; else both are null (without an activation that gradient is dy). A gated
// activation of a sum has no gradient here: y does not tell it.
FASTCONV_API void batch_norm_bprop(const BatchNormProblem& problem, const float* x,
                                   const float* mean, const float* variance, const float* gamma,
                                   const float* beta, const float* dy, const float* y, float* dx,
                                   float* dgamma, float* dbeta, float* dresidual);

// A convolution of int8, for inference, of float32 tensors: y = activation(conv(q(x), filter) / (filter_scale * scale) + bias).
// Of each image, q(x) = round(x * scale), half to even, where scale = 127 / (largest |x| + 1e-7): the filter
// is to have been quantised likewise, each of its K output channels by a scale of its own. Sums are of
// int32, exact; an image with NaN or infinity gives NaN. Throws InvalidArgument where a sum could leave int32:
// R * S * C / groups must be at most 2**17. `algorithm` is one of cpu/int8_kernels.hpp.
FASTCONV_API void conv2d_int8(const Conv2dProblem& problem, const float* x,
                              const std::int8_t* filter, const float* filter_scale,
                              const float* bias, float* y, const char* algorithm = nullptr);

}  // namespace fastconv
