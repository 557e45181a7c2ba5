#include "core/operations.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/kernels.hpp"

namespace fastconv {
namespace {

using std::int64_t;

const cpu::Kernels& kernels() { return cpu::kernels(current_isa()); }

std::size_t bytes(int64_t elements) { return static_cast<std::size_t>(elements) * sizeof(float); }

// The convolutions speak NHWC. An NCHW tensor is brought to it and back through scratch memory.
class NhwcInput {
 public:
  NhwcInput(const Conv2dProblem& p, const float* data, int64_t pixels, int64_t channels)
      : scratch_(needs_copy(p, data) ? bytes(p.n * pixels * channels) : 0), data_(data) {
    if (!needs_copy(p, data)) return;
    kernels().transpose(p.n, channels, pixels, data, scratch_.floats());
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
      : scratch_(p.layout == Layout::nchw ? bytes(p.n * pixels * channels) : 0), data_(data),
        n_(p.n), pixels_(pixels), channels_(channels), copied_(p.layout == Layout::nchw) {}
  float* data() const { return copied_ ? scratch_.floats() : data_; }
  void finish() const {
    if (copied_) kernels().transpose(n_, pixels_, channels_, scratch_.floats(), data_);
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

// NCHW images are turned so many at a time that they stay in the caches between that and the kernels;
// of NHWC, all are taken at once. `fixed_bytes` is what each part costs besides.
int64_t images_a_part(const Conv2dProblem& p, int64_t fixed_bytes) {
  if (p.layout == Layout::nhwc) return p.n;
  const int64_t image_bytes = 4 * (p.h * p.w * p.c + p.oh * p.ow * p.k);
  const int64_t budget = std::max(int64_t{6} << 20, 4 * fixed_bytes);
  const int64_t most = std::clamp<int64_t>(budget / image_bytes, 1, p.n);
  const int64_t parts = (p.n + most - 1) / most;
  return (p.n + parts - 1) / parts;
}

// Calls body(part of the problem, its first image).
template <class Body>
void for_each_part(const Conv2dProblem& p, int64_t images, const Body& body) {
  Conv2dProblem part = p;
  for (int64_t n = 0; n < p.n; n += images) {
    part.n = std::min(images, p.n - n);
    body(part, n);
  }
}

// The gradient of some images by the filter and the bias.
void wgrad_of_images(const Conv2dProblem& p, const cpu::Conv2dAlgorithm& chosen, const float* x,
                     const float* dy, const float* y, float* dfilter, float* dbias) {
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

// out[row][column] = in[row][column] * scale[column].
void multiply_columns(const float* in, const float* scale, int64_t rows, int64_t columns,
                      float* out) {
  const int64_t rows_a_task = std::max<int64_t>(1, 16384 / columns);
  parallel_for((rows + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
    for (int64_t row = task * rows_a_task; row < std::min(rows, (task + 1) * rows_a_task); ++row) {
      for (int64_t j = 0; j < columns; ++j)
        out[row * columns + j] = in[row * columns + j] * scale[j];
    }
  });
}

// y = activation(y + from).
void add_and_activate(const float* from, int64_t count, Activation activation, float* y) {
  constexpr int64_t kATask = 16384;
  const bool relu = activation != Activation::linear;
  const float most = activation == Activation::relu6 ? 6 : std::numeric_limits<float>::infinity();
  parallel_for((count + kATask - 1) / kATask, [&](int64_t task) {
    for (int64_t i = task * kATask; i < std::min(count, (task + 1) * kATask); ++i) {
      const float sum = y[i] + from[i];
      y[i] = relu && sum < 0 ? 0 : relu && sum > most ? most : sum;  // NaN stays
    }
  });
}

void add(const float* from, int64_t count, float* to) {
  constexpr int64_t kATask = 16384;
  parallel_for((count + kATask - 1) / kATask, [&](int64_t task) {
    for (int64_t i = task * kATask; i < std::min(count, (task + 1) * kATask); ++i) to[i] += from[i];
  });
}

}  // namespace

void conv2d_fprop(const Conv2dProblem& p, const float* x, const float* filter, const float* bias,
                  float* y, const char* algorithm) {
  conv2d_scaled_fprop(p, x, filter, nullptr, bias, nullptr, y, algorithm);
}

void conv2d_scaled_fprop(const Conv2dProblem& p, const float* x, const float* filter,
                         const float* scale, const float* bias, const float* residual, float* y,
                         const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::fprop, algorithm);
  if (p.n == 0) return;
  const bool scaled_before = scale && !chosen.scales_filter;
  const bool added_behind = residual && !chosen.adds_residual;
  const Workspace scaled(scaled_before ? bytes(p.filter_size()) : 0);
  if (scaled_before) {
    multiply_columns(filter, scale, p.filter_size() / p.k, p.k, scaled.floats());
    filter = scaled.floats();
    scale = nullptr;
  }
  Conv2dProblem computed = as_nhwc(p);
  if (added_behind) computed.activation = Activation::linear;
  for_each_part(
      p, images_a_part(p, bytes(p.filter_size())), [&](const Conv2dProblem& part, int64_t n) {
        const int64_t at_y = n * p.oh * p.ow * p.k;
        const NhwcInput x_nhwc(part, x + n * p.h * p.w * p.c, p.h * p.w, p.c);
        const NhwcInput residual_nhwc(part, residual ? residual + at_y : nullptr, p.oh * p.ow, p.k);
        const NhwcOutput y_nhwc(part, y + at_y, p.oh * p.ow, p.k);
        computed.n = part.n;
        chosen.run(computed, Direction::fprop,
                   {.x = x_nhwc.data(),
                    .filter = filter,
                    .bias = bias,
                    .scale = scale,
                    .residual = added_behind ? nullptr : residual_nhwc.data(),
                    .out = y_nhwc.data()});
        if (added_behind) {
          add_and_activate(residual_nhwc.data(), part.y_size(), p.activation, y_nhwc.data());
        }
        y_nhwc.finish();
      });
}

void conv2d_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, const float* y,
                  float* dx, const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::dgrad, algorithm);
  if (p.n == 0) return;
  const bool relu = p.activation == Activation::relu;
  const bool apart = relu && !chosen.masks_dgrad;  // the mask is a pass of its own
  for_each_part(p, images_a_part(p, bytes(p.filter_size())),
                [&](const Conv2dProblem& part, int64_t n) {
                  const int64_t at_y = n * p.oh * p.ow * p.k;
                  const NhwcInput dy_nhwc(part, dy + at_y, p.oh * p.ow, p.k);
                  const NhwcInput y_nhwc(part, relu ? y + at_y : nullptr, p.oh * p.ow, p.k);
                  const NhwcOutput dx_nhwc(part, dx + n * p.h * p.w * p.c, p.h * p.w, p.c);
                  const Workspace dz(apart ? bytes(part.y_size()) : 0);
                  if (apart) {
                    kernels().activation_grad(part.n * p.oh * p.ow, p.k, dy_nhwc.data(),
                                              y_nhwc.data(), dz.floats(), nullptr);
                  }
                  chosen.run(as_nhwc(part), Direction::dgrad,
                             {.filter = filter,
                              .dy = apart ? dz.floats() : dy_nhwc.data(),
                              .y = relu && !apart ? y_nhwc.data() : nullptr,
                              .out = dx_nhwc.data()});
                  dx_nhwc.finish();
                });
}

void conv2d_wgrad(const Conv2dProblem& p, const float* x, const float* dy, const float* y,
                  float* dfilter, float* dbias, const char* algorithm) {
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_nhwc(p), Direction::wgrad, algorithm);
  if (p.n == 0) {
    if (dfilter) std::memset(dfilter, 0, bytes(p.filter_size()));
    if (dbias) std::memset(dbias, 0, bytes(p.k));
    return;
  }
  const int64_t images = images_a_part(p, 2 * bytes(p.filter_size()));
  const bool in_parts = images < p.n;  // whose gradients are added up in order
  const Workspace sums(in_parts ? bytes(p.filter_size()) + bytes(p.k) : 0);
  for_each_part(p, images, [&](const Conv2dProblem& part, int64_t n) {
    float* const own_dfilter = n > 0 && dfilter ? sums.floats(bytes(p.k)) : dfilter;
    float* const own_dbias = n > 0 && dbias ? sums.floats() : dbias;
    const int64_t at_y = n * p.oh * p.ow * p.k;
    wgrad_of_images(part, chosen, x ? x + n * p.h * p.w * p.c : nullptr, dy + at_y,
                    y ? y + at_y : nullptr, own_dfilter, own_dbias);
    if (n == 0) return;
    if (dfilter) add(own_dfilter, p.filter_size(), dfilter);
    if (dbias) add(own_dbias, p.k, dbias);
  });
}

void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  if (p.n > 0) kernels().max_pool2d_fprop(p, x, y, argmax);
}

void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  if (p.n > 0) kernels().max_pool2d_bprop(p, dy, nullptr, argmax, dx);
}

void avg_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y) {
  if (p.n > 0) kernels().avg_pool2d_fprop(p, x, y);
}

void avg_pool2d_bprop(const Pool2dProblem& p, const float* dy, float* dx) {
  if (p.n > 0) kernels().avg_pool2d_bprop(p, dy, dx);
}

namespace {

// Rows of the convolution's output that are computed at a time where an algorithm does not pool: whole
// images, or a part of one.
struct PoolStrips {
  int64_t images, rows;

  explicit PoolStrips(const Conv2dProblem& p) {
    constexpr int64_t kBytes = int64_t{2} << 20;  // what stays in the caches of a few cores
    const int64_t row_bytes = std::max<int64_t>(4 * p.ow * p.k, 1);
    images = std::clamp<int64_t>(kBytes / (row_bytes * p.oh), 1, p.n);
    rows = images > 1 ? p.oh : std::clamp<int64_t>(kBytes / row_bytes / 2 * 2, 2, p.oh);
  }
};

// The convolution that computes output rows begin .. end - 1 of `images` images. `first_row` is the
// first input row it reads.
Conv2dProblem rows_of(const Conv2dProblem& p, int64_t images, int64_t begin, int64_t end,
                      int64_t& first_row) {
  Conv2dProblem part = p;
  part.n = images;
  first_row = 0;
  if (begin == 0 && end == p.oh) return part;  // of several images, none may be cut
  const int64_t top = begin * p.stride_h - p.pad_top;
  const int64_t bottom = (end - 1) * p.stride_h - p.pad_top + (p.r - 1) * p.dilation_h + 1;
  first_row = std::clamp<int64_t>(top, 0, p.h - 1);
  part.h = std::max<int64_t>(1, std::min(p.h, bottom) - first_row);
  part.oh = end - begin;
  part.pad_top = first_row - top;
  part.pad_bottom = std::max<int64_t>(0, bottom - (first_row + part.h));
  return part;
}

// NHWC, of which the output's height and width are even.
void pool_by_strips(const Conv2dProblem& p, const cpu::Conv2dAlgorithm& chosen, const float* x,
                    const float* filter, const float* bias, float* y, std::uint8_t* argmax) {
  const PoolStrips strips(p);
  const Workspace scratch(bytes(strips.images * strips.rows * p.ow * p.k));
  for (int64_t n = 0; n < p.n; n += strips.images) {
    const int64_t images = std::min(strips.images, p.n - n);
    for (int64_t row = 0; row < p.oh; row += strips.rows) {
      const int64_t end = std::min(p.oh, row + strips.rows);
      int64_t first_row = 0;
      const Conv2dProblem part = rows_of(p, images, row, end, first_row);
      chosen.run(part, Direction::fprop,
                 {.x = x + (n * p.h + first_row) * p.w * p.c,
                  .filter = filter,
                  .bias = bias,
                  .out = scratch.floats()});
      const int64_t at = (n * p.oh + row) / 2 * (p.ow / 2) * p.k;
      kernels().max_pool2d_fprop(pool_behind(part), scratch.floats(), y + at,
                                 argmax ? argmax + at : nullptr);
    }
  }
}

// The convolution without the last row or column that no window sees.
Conv2dProblem seen_by_windows(const Conv2dProblem& p) {
  Conv2dProblem seen = as_nhwc(p);
  seen.oh -= seen.oh % 2;
  seen.ow -= seen.ow % 2;
  return seen;
}

}  // namespace

void conv2d_pool_fprop(const Conv2dProblem& p, const float* x, const float* filter,
                       const float* bias, float* y, std::uint8_t* argmax, const char* algorithm) {
  const Pool2dProblem pool = pool_behind(p);
  const Conv2dProblem seen = seen_by_windows(p);
  // That of the convolution alone, so that both have the same bits.
  const cpu::Conv2dAlgorithm& alone = cpu::choose(as_nhwc(p), Direction::fprop, algorithm);
  const cpu::Conv2dAlgorithm& chosen =
      alone.serves(seen, Direction::fprop) ? alone : cpu::choose(seen, Direction::fprop, algorithm);
  if (p.n == 0) return;
  const int64_t pixels = pool.oh * pool.ow;
  const bool turned = argmax && p.layout == Layout::nchw;
  for_each_part(
      p, images_a_part(p, bytes(p.filter_size())), [&](const Conv2dProblem& part, int64_t n) {
        const Conv2dProblem seen_part = seen_by_windows(part);
        const NhwcInput x_nhwc(part, x + n * p.h * p.w * p.c, p.h * p.w, p.c);
        const NhwcOutput y_nhwc(part, y + n * pixels * p.k, pixels, p.k);
        std::uint8_t* const own_argmax = argmax ? argmax + n * pixels * p.k : nullptr;
        const Workspace scratch(turned ? static_cast<std::size_t>(part.n * pixels * p.k) : 0);
        std::uint8_t* const taps =
            turned ? reinterpret_cast<std::uint8_t*>(scratch.floats()) : own_argmax;
        if (chosen.fuses_pool(seen, Direction::fprop)) {
          chosen.run(seen_part, Direction::fprop,
                     {.x = x_nhwc.data(),
                      .filter = filter,
                      .bias = bias,
                      .out = y_nhwc.data(),
                      .pooled = true,
                      .argmax = taps});
        } else {
          pool_by_strips(seen_part, chosen, x_nhwc.data(), filter, bias, y_nhwc.data(), taps);
        }
        y_nhwc.finish();
        if (turned) kernels().transpose_bytes(part.n, pixels, p.k, taps, own_argmax);
      });
}

void conv2d_pool_bprop(const Conv2dProblem& p, const float* x, const float* filter, const float* dy,
                       const float* y, const std::uint8_t* argmax, float* dx, float* dfilter,
                       float* dbias, const char* algorithm) {
  const Pool2dProblem pool = pool_behind(p);
  const Conv2dProblem seen = seen_by_windows(p);
  const bool relu = p.activation == Activation::relu;
  if (p.n == 0) {
    if (dx) cpu::choose(as_nhwc(p), Direction::dgrad, algorithm);  // for its refusal
    return conv2d_wgrad(p, x, dy, y, dfilter, dbias, dx ? nullptr : algorithm);
  }
  if (!dx && p.layout == Layout::nhwc) {
    const cpu::Conv2dAlgorithm& chosen = cpu::choose(seen, Direction::wgrad, algorithm);
    if (chosen.fuses_pool(seen, Direction::wgrad)) {
      chosen.run(seen, Direction::wgrad,
                 {.x = x,
                  .dy = dy,
                  .y = relu ? y : nullptr,
                  .out = dfilter,
                  .dbias = dbias,
                  .argmax_of_y = argmax});
      return;
    }
  }
  // The gradient of the convolution's output, once for both directions.
  const Workspace dz(bytes(p.y_size()));
  kernels().max_pool2d_bprop(pool, dy, relu ? y : nullptr, argmax, dz.floats());
  Conv2dProblem linear = p;
  linear.activation = Activation::linear;
  if (dx) conv2d_dgrad(linear, dz.floats(), filter, nullptr, dx, algorithm);
  conv2d_wgrad(linear, x, dz.floats(), nullptr, dfilter, dbias, dx ? nullptr : algorithm);
}

void batch_norm_moments(const BatchNormProblem& p, const float* x, float* mean, float* variance) {
  if (p.rows > 0) return kernels().batch_norm_moments(p, x, mean, variance);
  std::fill_n(mean, p.channels, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(variance, p.channels, std::numeric_limits<float>::quiet_NaN());
}

void batch_norm_fprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta,
                      const float* residual, float* y) {
  if (p.rows == 0) return;
  kernels().batch_norm_fprop(p, x, mean, variance, gamma, beta, residual, y);
}

void batch_norm_bprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta, const float* dy,
                      const float* y, float* dx, float* dgamma, float* dbeta, float* dresidual) {
  if (p.rows == 0) {
    std::fill_n(dgamma, p.channels, 0.0f);
    std::fill_n(dbeta, p.channels, 0.0f);
    return;
  }
  kernels().batch_norm_bprop(p, {.x = x,
                                 .mean = mean,
                                 .variance = variance,
                                 .gamma = gamma,
                                 .beta = beta,
                                 .dy = dy,
                                 .y = y,
                                 .dx = dx,
                                 .dgamma = dgamma,
                                 .dbeta = dbeta,
                                 .dresidual = dresidual});
}

}  // namespace fastconv
