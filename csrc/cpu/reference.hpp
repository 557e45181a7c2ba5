// The obvious implementations, one loop a dimension, sums in double: what the tests compare every
// kernel with. NHWC and NCHW.
#pragma once

#include "core/export.hpp"
#include "core/problem.hpp"

namespace fastconv::reference {

FASTCONV_API void conv2d_fprop(const Conv2dProblem& problem, const float* x, const float* filter,
                               const float* bias, float* y);
FASTCONV_API void conv2d_scaled_fprop(const Conv2dProblem& problem, const float* x,
                                      const float* filter, const float* scale, const float* bias,
                                      const float* residual, float* y);
FASTCONV_API void conv2d_dgrad(const Conv2dProblem& problem, const float* dy, const float* filter,
                               const float* y, float* dx);
FASTCONV_API void conv2d_wgrad(const Conv2dProblem& problem, const float* x, const float* dy,
                               const float* y, float* dfilter, float* dbias);
FASTCONV_API void max_pool2d_fprop(const Pool2dProblem& problem, const float* x, float* y,
                                   void* argmax);
FASTCONV_API void max_pool2d_bprop(const Pool2dProblem& problem, const float* dy,
                                   const void* argmax, float* dx);
FASTCONV_API void avg_pool2d_fprop(const Pool2dProblem& problem, const float* x, float* y);
FASTCONV_API void avg_pool2d_bprop(const Pool2dProblem& problem, const float* dy, float* dx);
FASTCONV_API void conv2d_pool_fprop(const Conv2dProblem& problem, const float* x,
                                    const float* filter, const float* bias, float* y,
                                    std::uint8_t* argmax);
FASTCONV_API void conv2d_pool_bprop(const Conv2dProblem& problem, const float* x,
                                    const float* filter, const float* dy, const float* y,
                                    const std::uint8_t* argmax, float* dx, float* dfilter,
                                    float* dbias);

FASTCONV_API void batch_norm_moments(const BatchNormProblem& problem, const float* x, float* mean,
                                     float* variance);
FASTCONV_API void batch_norm_fprop(const BatchNormProblem& problem, const float* x,
                                   const float* mean, const float* variance, const float* gamma,
                                   const float* beta, const float* residual, float* y);
FASTCONV_API void batch_norm_bprop(const BatchNormProblem& problem, const float* x,
                                   const float* mean, const float* variance, const float* gamma,
                                   const float* beta, const float* dy, const float* y, float* dx,
                                   float* dgamma, float* dbeta, float* dresidual);

}  // namespace fastconv::reference
