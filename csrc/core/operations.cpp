#include "core/operations.hpp"

#include <algorithm>
#include <cstring>

#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/kernels.hpp"

namespace fastconv {
namespace {

using std::int64_t;

const cpu::Kernels& kernels() { return cpu::kernels(current_isa()); }

std::size_t bytes(int64_t elements) {
  return static_cast<std::size_t>(elements) * sizeof(float);
}

// out[n][j][i] = in[n][i][j], by squares that keep both sides' cache lines.
void transpose(int64_t n, int64_t rows, int64_t columns, const float* in, float* out) {
  constexpr int64_t kSquare = 16;
  const int64_t strips = (rows + kSquare - 1) / kSquare;
  parallel_for(n * strips, [&](int64_t task) {
    const float* from = in + task / strips * rows * columns;
    float* to = out + task / strips * rows * columns;
    const int64_t i0 = task % strips * kSquare, i1 = std::min(rows, i0 + kSquare);
    for (int64_t j0 = 0; j0 < columns; j0 += kSquare) {
      const int64_t j1 = std::min(columns, j0 + kSquare);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) to[j * rows + i] = from[i * columns + j];
    }
  });
}

// The convolutions speak NHWC. An NCHW tensor is brought to it and back through scratch memory.
class NhwcInput {
 public:
  NhwcInput(const Conv2dProblem& p, const float* data, int64_t pixels, int64_t channels)
      : scratch_(needs_copy(p, data) ? bytes(p.n * pixels * channels) : 0), data_(data) {
    if (!needs_copy(p, data)) return;
    transpose(p.n, channels, pixels, data, scratch_.floats());
    data_ = scratch_.floats();
  }
  const float* data() const { return data_; }

 private:
  static bool needs_copy(const Conv2dProblem& p, const float* data) {
    return data && p.layout == Layout::nchw;
  }
  Workspace scratch_;
  const float* data_;
};

class NhwcOutput {
 public:
  NhwcOutput(const Conv2dProblem& p, float* data, int64_t pixels, int64_t channels)
      : scratch_(p.layout == Layout::nchw ? bytes(p.n * pixels * channels) : 0),
        data_(data), n_(p.n), pixels_(pixels), channels_(channels),
        copied_(p.layout == Layout::nchw) {}
  float* data() const { return copied_ ? scratch_.floats() : data_; }
  void finish() const {
    if (copied_) transpose(n_, pixels_, channels_, scratch_.floats(), data_);
  }

 private:
  Workspace scratch_;
  float* data_;
  int64_t n_, pixels_, channels_;
  bool copied_;
};

Conv2dProblem as_nhwc(Conv2dProblem p) {
  p.layout = Layout::nhwc;
  return p;
}

}  // namespace

void conv2d_fprop(const Conv2dProblem& p, const float* x, const float* filter, const float* bias,
                  float* y, const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::fprop, algorithm);
  if (p.n == 0) return;
  const NhwcInput x_nhwc(p, x, p.h * p.w, p.c);
  const NhwcOutput y_nhwc(p, y, p.oh * p.ow, p.k);
  chosen.run(as_nhwc(p), Direction::fprop,
             {.x = x_nhwc.data(), .filter = filter, .bias = bias, .out = y_nhwc.data()});
  y_nhwc.finish();
}

void conv2d_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, const float* y,
                  float* dx, const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::dgrad, algorithm);
  if (p.n == 0) return;
  const bool relu = p.activation == Activation::relu;
  const bool apart = relu && !chosen.masks_dgrad;  // the mask is a pass of its own
  const NhwcInput dy_nhwc(p, dy, p.oh * p.ow, p.k);
  const NhwcInput y_nhwc(p, relu ? y : nullptr, p.oh * p.ow, p.k);
  const NhwcOutput dx_nhwc(p, dx, p.h * p.w, p.c);
  const Workspace dz(apart ? bytes(p.y_size()) : 0);
  if (apart) {
    kernels().activation_grad(p.n * p.oh * p.ow, p.k, dy_nhwc.data(), y_nhwc.data(), dz.floats(),
                              nullptr);
  }
  chosen.run(as_nhwc(p), Direction::dgrad,
             {.filter = filter,
              .dy = apart ? dz.floats() : dy_nhwc.data(),
              .y = relu && !apart ? y_nhwc.data() : nullptr,
              .out = dx_nhwc.data()});
  dx_nhwc.finish();
}

void conv2d_wgrad(const Conv2dProblem& p, const float* x, const float* dy, const float* y,
                  float* dfilter, float* dbias, const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::wgrad, algorithm);
  if (p.n == 0) {
    if (dfilter) std::memset(dfilter, 0, bytes(p.filter_size()));
    if (dbias) std::memset(dbias, 0, bytes(p.k));
    return;
  }
  const bool relu = p.activation == Activation::relu;
  const bool fused = chosen.masks_wgrad && dfilter;
  const bool apart = relu && !fused;
  const NhwcInput dy_nhwc(p, dy, p.oh * p.ow, p.k);
  const NhwcInput y_nhwc(p, relu ? y : nullptr, p.oh * p.ow, p.k);
  const Workspace dz(apart ? bytes(p.y_size()) : 0);
  if (!fused && (relu || dbias)) {
    kernels().activation_grad(p.n * p.oh * p.ow, p.k, dy_nhwc.data(), y_nhwc.data(), dz.floats(),
                              dbias);
  }
  if (!dfilter) return;
  const NhwcInput x_nhwc(p, x, p.h * p.w, p.c);
  chosen.run(as_nhwc(p), Direction::wgrad,
             {.x = x_nhwc.data(),
              .dy = apart ? dz.floats() : dy_nhwc.data(),
              .y = relu && fused ? y_nhwc.data() : nullptr,
              .out = dfilter,
              .dbias = fused ? dbias : nullptr});
}

void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  if (p.n > 0) kernels().max_pool2d_fprop(p, x, y, argmax);
}

void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  if (p.n > 0) kernels().max_pool2d_bprop(p, dy, argmax, dx);
}

void avg_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y) {
  if (p.n > 0) kernels().avg_pool2d_fprop(p, x, y);
}

void avg_pool2d_bprop(const Pool2dProblem& p, const float* dy, float* dx) {
  if (p.n > 0) kernels().avg_pool2d_bprop(p, dy, dx);
}

}  // namespace fastconv
