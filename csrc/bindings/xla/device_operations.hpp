// The operations of framework_ops.hpp on the device and the stream of an XLA computation. Scratch
// memory is of the library's own pool, in the order of the stream.
#pragma once

#include <cstdint>

#include "core/cuda_backend.hpp"
#include "core/error.hpp"
#include "core/problem.hpp"

namespace fastconv::xla {

class DeviceOperations {
 public:
  DeviceOperations(const cuda::Library& library, int device, void* stream)
      : library_(library), device_(device), stream_(stream) {}

  void conv2d_fprop(const Conv2dProblem& p, const void* x, const void* filter, const void* bias,
                    void* y) const {
    cuda::Conv2dCall call = conv2d_call(p, Direction::fprop);
    call.x = x;
    call.filter = filter;
    call.bias = bias;
    call.out = y;
    run(call);
  }
  void conv2d_dgrad(const Conv2dProblem& p, const void* dy, const void* filter, const void* y,
                    void* dx) const {
    cuda::Conv2dCall call = conv2d_call(p, Direction::dgrad);
    call.dy = dy;
    call.filter = filter;
    call.y = y;
    call.out = dx;
    run(call);
  }
  void conv2d_wgrad(const Conv2dProblem& p, const void* x, const void* dy, const void* y,
                    void* dfilter, void* dbias) const {
    cuda::Conv2dCall call = conv2d_call(p, Direction::wgrad);
    call.x = x;
    call.dy = dy;
    call.y = y;
    call.out = dfilter;
    call.dbias = dbias;
    run(call);
  }
  void conv2d_int8(const Conv2dProblem&, const float*, const std::int8_t*, const float*,
                   const float*, float*) const {
    throw InvalidArgument("Convolutions of int8 must be computed on the CPU. Received: a GPU");
  }
  void max_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y, void* argmax) const {
    run({.problem = p, .in = x, .out = y, .argmax = argmax});
  }
  void max_pool2d_bprop(const Pool2dProblem& p, const void* dy, const void* argmax,
                        void* dx) const {
    // Which is only read.
    run({.problem = p, .backward = true, .in = dy, .out = dx, .argmax = const_cast<void*>(argmax)});
  }
  void avg_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y) const {
    run({.problem = p, .pooling = cuda::Pooling::average, .in = x, .out = y});
  }
  void avg_pool2d_bprop(const Pool2dProblem& p, const void* dy, void* dx) const {
    run({.problem = p, .pooling = cuda::Pooling::average, .backward = true, .in = dy, .out = dx});
  }
  template <class Tap>
  void gather_at_argmax(const Pool2dProblem& p, const void* x, const Tap* argmax, void* y) const {
    run({.problem = p, .gather = true, .in = x, .out = y, .argmax = const_cast<Tap*>(argmax)});
  }

  void conv2d_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                         const void* bias, void* y, std::uint8_t* argmax) const {
    cuda::Conv2dPoolCall call = conv2d_pool_call(p);
    call.x = x;
    call.filter = filter;
    call.bias = bias;
    call.y = y;
    call.argmax = argmax;
    cuda::conv2d_pool(library_, device_, stream_, call);
  }
  void conv2d_pool_bprop(const Conv2dProblem& p, const void* x, const void* filter, const void* dy,
                         const void* y, const std::uint8_t* argmax, void* dx, void* dfilter,
                         void* dbias) const {
    cuda::Conv2dPoolCall call = conv2d_pool_call(p);
    call.backward = true;
    call.x = x;
    call.filter = filter;
    call.dy = dy;
    // Which are only read.
    call.y = const_cast<void*>(y);
    call.argmax = const_cast<std::uint8_t*>(argmax);
    call.dx = dx;
    call.dfilter = dfilter;
    call.dbias = dbias;
    cuda::conv2d_pool(library_, device_, stream_, call);
  }

 private:
  static cuda::Conv2dCall conv2d_call(const Conv2dProblem& p, Direction direction) {
    cuda::Conv2dCall call;
    call.problem = p;
    call.type = p.dtype;
    call.direction = direction;
    call.math = cuda::float32_math();
    return call;
  }
  static cuda::Conv2dPoolCall conv2d_pool_call(const Conv2dProblem& p) {
    cuda::Conv2dPoolCall call;
    call.problem = p;
    call.type = p.dtype;
    call.math = cuda::float32_math();
    return call;
  }
  void run(const cuda::Conv2dCall& call) const { cuda::conv2d(library_, device_, stream_, call); }
  void run(cuda::Pool2dCall call) const {
    call.type = call.problem.dtype;
    cuda::check(library_, library_.pool2d(device_, stream_, &call));
  }

  const cuda::Library& library_;
  int device_;
  void* stream_;
};

}  // namespace fastconv::xla
