// What a convolution or a pooling IS: the descriptor that every layer below reads, made and
// validated once per call. Nothing further down derives geometry again.
//
// Names are the field's: N images of H x W pixels with C channels, K filters of R x S taps,
// an output of OH x OW pixels. Activations are N,H,W,C or N,C,H,W; filters are R,S,C/groups,K.
#pragma once

#include <array>
#include <cstdint>

#include "core/data_type.hpp"
#include "core/export.hpp"

namespace fastconv {

enum class Layout : std::uint8_t { nhwc, nchw };
// Those behind relu are known to conv2d_scaled_fprop and batch_norm alone: relu6, min(max(x, 0), 6), and
// the gated silu, x / (1 + exp(-x)), and hard_silu, x * clip(x / 6 + 1/2, 0, 1).
enum class Activation : std::uint8_t { linear, relu, relu6, silu, hard_silu };
// Whether the value before it must be known for its derivative: the output does not tell it.
constexpr bool is_gated(Activation activation) {
  return activation == Activation::silu || activation == Activation::hard_silu;
}

struct Padding {
  enum class Kind : std::uint8_t { valid, same, explicit_sides };
  Kind kind = Kind::valid;
  // Used by explicit_sides alone.
  std::int64_t top = 0, bottom = 0, left = 0, right = 0;
};

struct Conv2dProblem {
  std::int64_t n = 0, h = 0, w = 0, c = 0;
  std::int64_t k = 0, r = 0, s = 0;
  std::int64_t oh = 0, ow = 0;
  std::int64_t stride_h = 1, stride_w = 1;
  std::int64_t dilation_h = 1, dilation_w = 1;
  std::int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  std::int64_t groups = 1;
  Layout layout = Layout::nhwc;
  Activation activation = Activation::linear;
  DataType dtype = DataType::float32;  // of all tensors

  std::int64_t c_per_group() const { return c / groups; }
  std::int64_t k_per_group() const { return k / groups; }
  std::int64_t x_size() const { return n * h * w * c; }
  std::int64_t y_size() const { return n * oh * ow * k; }
  std::int64_t filter_size() const { return r * s * c_per_group() * k; }
  FASTCONV_API std::array<std::int64_t, 4> x_shape() const;
  FASTCONV_API std::array<std::int64_t, 4> y_shape() const;
  std::array<std::int64_t, 4> filter_shape() const { return {r, s, c_per_group(), k}; }

  // Whether output pixel i meets input pixel i alone.
  bool sees_each_pixel_once() const {
    return r == 1 && s == 1 && stride_h == 1 && stride_w == 1 && oh == h && ow == w &&
           pad_top == 0 && pad_left == 0;
  }

  bool operator==(const Conv2dProblem&) const = default;
};

struct Pool2dProblem {
  std::int64_t n = 0, h = 0, w = 0, c = 0;
  std::int64_t r = 0, s = 0;  // window
  std::int64_t oh = 0, ow = 0;
  std::int64_t stride_h = 1, stride_w = 1;
  std::int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  Layout layout = Layout::nhwc;
  DataType dtype = DataType::float32;  // of all tensors but the argmax

  std::int64_t x_size() const { return n * h * w * c; }
  std::int64_t y_size() const { return n * oh * ow * c; }
  FASTCONV_API std::array<std::int64_t, 4> x_shape() const;
  FASTCONV_API std::array<std::int64_t, 4> y_shape() const;
  // The position of a window's maximum, row * s + column, fits one byte up to 256 taps; beyond
  // that the argmax is an array of int32.
  bool argmax_fits_byte() const { return r * s <= 256; }

  bool operator==(const Pool2dProblem&) const = default;
};

// The same of float32 tensors.
template <class Problem>
Problem of_float32(Problem problem) {
  problem.dtype = DataType::float32;
  return problem;
}

// Batch normalisation of rows x channels, NHWC: each channel by its own mean and variance.
struct BatchNormProblem {
  std::int64_t rows = 0, channels = 0;
  float epsilon = 0;
  Activation activation = Activation::linear;
};

struct Conv2dArguments {
  std::array<std::int64_t, 4> x_shape{};       // in `layout`
  std::array<std::int64_t, 4> filter_shape{};  // R, S, C/groups, K
  std::array<std::int64_t, 2> strides{1, 1};
  std::array<std::int64_t, 2> dilations{1, 1};
  Padding padding;
  std::int64_t groups = 1;
  Layout layout = Layout::nhwc;
  Activation activation = Activation::linear;
  DataType dtype = DataType::float32;
  // What messages call the two shapes.
  const char* x_shape_name = "x.shape";
  const char* filter_shape_name = "w.shape";
};

struct Pool2dArguments {
  std::array<std::int64_t, 4> x_shape{};
  std::array<std::int64_t, 2> pool_size{1, 1};
  std::array<std::int64_t, 2> strides{1, 1};
  Padding padding;
  Layout layout = Layout::nhwc;
  DataType dtype = DataType::float32;
  const char* x_shape_name = "x.shape";
};

// Validate and derive the output geometry. "same" is TensorFlow's: OH = ceil(H / stride), the odd
// pixel of padding at the bottom and right. Throw InvalidArgument.
FASTCONV_API Conv2dProblem make_conv2d_problem(const Conv2dArguments& arguments);
FASTCONV_API Pool2dProblem make_pool2d_problem(const Pool2dArguments& arguments);

// The 2 x 2 max-pooling of stride 2 behind a convolution, an odd last row or column left out. Throws
// InvalidArgument where its output has no such window.
FASTCONV_API Pool2dProblem pool_behind(const Conv2dProblem& problem);

}  // namespace fastconv
