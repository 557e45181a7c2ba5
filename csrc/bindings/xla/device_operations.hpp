// The operations of framework_ops.hpp on the device and the stream of an XLA computation. Scratch
// memory is of the library's own pool, in the order of the stream.
#pragma once

#include <cstdint>
#include <optional>

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
  void gather_at_argmax(const Pool2dProblem&, const void*, const Tap*, void*) const {
    throw InvalidArgument(
        "Second derivatives of max-pooling are computed on the host alone. Received: one on a GPU");
  }

  // In two passes: the convolution's output is scratch.
  void conv2d_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                         const void* bias, void* y, std::uint8_t* argmax) const {
    const cuda::Memory whole = floats(p.y_size());
    void* const unpooled = whole.data();
    conv2d_fprop(p, x, filter, bias, unpooled);
    max_pool2d_fprop(pool_behind(p), unpooled, y, argmax);
  }
  // Windows do not overlap: dy, and y for the ReLU mask, go back to where the maxima were.
  void conv2d_pool_bprop(const Conv2dProblem& p, const void* x, const void* filter, const void* dy,
                         const void* y, const std::uint8_t* argmax, void* dx, void* dfilter,
                         void* dbias) const {
    const Pool2dProblem pool = pool_behind(p);
    const cuda::Memory gradient = floats(p.y_size());
    void* const dy_unpooled = gradient.data();
    max_pool2d_bprop(pool, dy, argmax, dy_unpooled);
    std::optional<cuda::Memory> output;
    void* y_unpooled = nullptr;
    if (p.activation == Activation::relu) {
      output.emplace(library_, device_, stream_, bytes(p.y_size()));
      y_unpooled = output->data();
      max_pool2d_bprop(pool, y, argmax, y_unpooled);
    }
    conv2d_wgrad(p, x, dy_unpooled, y_unpooled, dfilter, dbias);
    if (dx != nullptr) conv2d_dgrad(p, dy_unpooled, filter, y_unpooled, dx);
  }

 private:
  static std::size_t bytes(std::int64_t floats) { return static_cast<std::size_t>(floats) * 4; }
  cuda::Memory floats(std::int64_t count) const {
    return cuda::Memory(library_, device_, stream_, bytes(count));
  }
  static cuda::Conv2dCall conv2d_call(const Conv2dProblem& p, Direction direction) {
    cuda::Conv2dCall call;
    call.problem = p;
    call.direction = direction;
    call.math = cuda::float32_math();
    return call;
  }
  void run(const cuda::Conv2dCall& call) const { cuda::conv2d(library_, device_, stream_, call); }
  void run(const cuda::Pool2dCall& call) const {
    cuda::check(library_, library_.pool2d(device_, stream_, &call));
  }

  const cuda::Library& library_;
  int device_;
  void* stream_;
};

}  // namespace fastconv::xla
