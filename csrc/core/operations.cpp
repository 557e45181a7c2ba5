#include "core/operations.hpp"

#include "cpu/reference.hpp"

namespace fastconv {

void conv2d_fprop(const Conv2dProblem& p, const float* x, const float* filter, const float* bias,
                  float* y) {
  reference::conv2d_fprop(p, x, filter, bias, y);
}
void conv2d_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, const float* y,
                  float* dx) {
  reference::conv2d_dgrad(p, dy, filter, y, dx);
}
void conv2d_wgrad(const Conv2dProblem& p, const float* x, const float* dy, const float* y,
                  float* dfilter, float* dbias) {
  reference::conv2d_wgrad(p, x, dy, y, dfilter, dbias);
}
void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  reference::max_pool2d_fprop(p, x, y, argmax);
}
void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  reference::max_pool2d_bprop(p, dy, argmax, dx);
}

}  // namespace fastconv
