// fastconv's operations as the ops of a tensor framework, written once for all of them. A kernel
// class reads its attributes, checks its inputs' shapes, has its outputs allocated and calls
// core/operations.hpp. A door (TensorFlow's C API, XLA's FFI) brings
//
//   Attributes   integers<N>(name), text(name); where ops ask for it, integer(name), real(name)
//   Tensor       type(), rank(), dim(axis), data(); values(type), the data of a
//                tensor of the op's type T, which is `type`
//   Context      num_inputs(), num_outputs(), output_type(i), input(i), output(i, shape);
//                operations(), unless they are those of the host;
//                kHeldTensorsStay, if kept_filter.hpp may hold a filter
//
// The gradient ops take the forward op's input itself rather than its shape: a shape tensor would
// cost one or two more ops a step, and the input lives until then anyway (the filter's gradient, or
// the ReLU mask of the layer below, reads it).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bindings/kept_filter.hpp"
#include "core/error.hpp"
#include "core/operations.hpp"
#include "core/problem.hpp"

namespace fastconv::framework {

using std::int64_t;
using Shape4 = std::array<int64_t, 4>;

enum class ElementType { float32, float16, bfloat16, int32, uint8, int8, other };

// The op's type T, which all of its tensors have but an argmax.
DataType data_type_of(const auto& tensor) {
  switch (tensor.type()) {
    case ElementType::float16: return DataType::float16;
    case ElementType::bfloat16: return DataType::bfloat16;
    default: return DataType::float32;
  }
}

// --- attributes -------------------------------------------------------------------------------

Padding padding_attribute(const auto& attributes) {
  Padding padding;
  const std::string kind = attributes.text("padding");
  if (kind == "SAME") padding.kind = Padding::Kind::same;
  if (kind == "EXPLICIT") {
    padding.kind = Padding::Kind::explicit_sides;
    const Shape4 sides = attributes.template integers<4>("explicit_paddings");
    padding.top = sides[0];
    padding.bottom = sides[1];
    padding.left = sides[2];
    padding.right = sides[3];
  }
  return padding;
}

Layout layout_attribute(const auto& attributes) {
  return attributes.text("data_format") == "NCHW" ? Layout::nchw : Layout::nhwc;
}

Activation activation_attribute(const auto& attributes) {
  return attributes.text("activation") == "RELU" ? Activation::relu : Activation::linear;
}

// Of an op that knows all of them.
Activation wide_activation_attribute(const auto& attributes) {
  const std::string name = attributes.text("activation");
  return name == "RELU6"       ? Activation::relu6
         : name == "SILU"      ? Activation::silu
         : name == "HARD_SILU" ? Activation::hard_silu
                               : activation_attribute(attributes);
}

// Attributes of every convolution and pooling, in the notation of TensorFlow's op definitions.
inline constexpr std::array kGeometryAttributes{
    "strides: list(int) = [1, 1]",
    "padding: {'SAME', 'VALID', 'EXPLICIT'} = 'VALID'",
    "explicit_paddings: list(int) = [0, 0, 0, 0]",  // top, bottom, left, right
    "data_format: {'NHWC', 'NCHW'} = 'NHWC'",
};

inline constexpr const char* kWideActivation =
    "activation: {'LINEAR', 'RELU', 'RELU6', 'SILU', 'HARD_SILU'} = 'LINEAR'";

// --- checks -----------------------------------------------------------------------------------

std::string shape_text(const auto& tensor) {
  std::string text = "(";
  for (int axis = 0; axis < tensor.rank(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.dim(axis));
  }
  return text + (tensor.rank() == 1 ? ",)" : ")");
}

Shape4 rank4_shape(const auto& tensor, const char* name) {
  if (tensor.rank() != 4) {
    throw InvalidArgument("`" + std::string(name) + "` must have 4 dimensions. Received: " + name +
                          ".shape=" + shape_text(tensor));
  }
  return {tensor.dim(0), tensor.dim(1), tensor.dim(2), tensor.dim(3)};
}

void check_shape(const auto& tensor, const char* name, std::span<const int64_t> expected) {
  bool equal = tensor.rank() == static_cast<int>(expected.size());
  for (int axis = 0; equal && axis < tensor.rank(); ++axis) {
    equal = tensor.dim(axis) == expected[axis];
  }
  if (equal) return;
  std::string text;
  for (int64_t extent : expected) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  throw InvalidArgument("`" + std::string(name) + "` must have the shape (" + text +
                        (expected.size() == 1 ? ",)" : ")") + ". Received: " + name +
                        ".shape=" + shape_text(tensor));
}

// The last input of an op, a list of none or one.
template <class Context>
std::optional<typename Context::Tensor> optional_input(const Context& context, int index) {
  if (context.num_inputs() > index + 1) {
    throw InvalidArgument("There must be at most " + std::to_string(index + 1) +
                          " inputs. Received: " + std::to_string(context.num_inputs()));
  }
  if (context.num_inputs() == index) return std::nullopt;
  return context.input(index);
}

// --- where a kernel computes ------------------------------------------------------------------

// What a window takes from its argmax's pixel: the transpose of max_pool2d_bprop. It serves second
// derivatives alone, so it is plain.
template <class Element, class Tap>
void gather_at_argmax(const Pool2dProblem& p, const Element* x, const Tap* argmax, Element* y) {
  const bool channels_first = p.layout == Layout::nchw;
  const int64_t channel_step = channels_first ? p.h * p.w : 1;
  const int64_t pixel_step = channels_first ? 1 : p.c;
  const Shape4 shape = p.y_shape();
  int64_t at = 0;
  for (int64_t n = 0; n < shape[0]; ++n) {
    for (int64_t a = 0; a < shape[1]; ++a) {
      for (int64_t b = 0; b < shape[2]; ++b) {
        for (int64_t d = 0; d < shape[3]; ++d, ++at) {
          const int64_t i = channels_first ? b : a, j = channels_first ? d : b;
          const int64_t c = channels_first ? a : d;
          const int64_t row = i * p.stride_h - p.pad_top + argmax[at] / p.s;
          const int64_t column = j * p.stride_w - p.pad_left + argmax[at] % p.s;
          // An argmax is data: one that names no pixel must not make us read outside.
          const bool inside = row >= 0 && row < p.h && column >= 0 && column < p.w;
          y[at] =
              inside ? x[n * p.h * p.w * p.c + (row * p.w + column) * pixel_step + c * channel_step]
                     : Element{};
        }
      }
    }
  }
}

struct HostOperations {
  void conv2d_fprop(const Conv2dProblem& p, const void* x, const void* filter, const void* bias,
                    void* y) const {
    fastconv::conv2d_fprop(p, x, filter, bias, y);
  }
  void conv2d_scaled_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                           const void* scale, const void* bias, const void* residual, void* y,
                           const FilterForms* forms) const {
    fastconv::conv2d_scaled_fprop(p, x, filter, scale, bias, residual, y, nullptr, forms);
  }
  void conv2d_dgrad(const Conv2dProblem& p, const void* dy, const void* filter, const void* y,
                    void* dx) const {
    fastconv::conv2d_dgrad(p, dy, filter, y, dx);
  }
  void conv2d_kept_dgrad(const Conv2dProblem& p, const void* dy, const void* filter, const void* y,
                         void* dx, const FilterForms* forms) const {
    fastconv::conv2d_kept_dgrad(p, dy, filter, y, dx, forms);
  }
  void conv2d_wgrad(const Conv2dProblem& p, const void* x, const void* dy, const void* y,
                    void* dfilter, void* dbias) const {
    fastconv::conv2d_wgrad(p, x, dy, y, dfilter, dbias);
  }
  void max_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y, void* argmax) const {
    fastconv::max_pool2d_fprop(p, x, y, argmax);
  }
  void max_pool2d_bprop(const Pool2dProblem& p, const void* dy, const void* argmax,
                        void* dx) const {
    fastconv::max_pool2d_bprop(p, dy, argmax, dx);
  }
  template <class Tap>
  void gather_at_argmax(const Pool2dProblem& p, const void* x, const Tap* argmax, void* y) const {
    if (p.dtype == DataType::float32) {
      gather<float>(p, x, argmax, y);
    } else {
      gather<std::uint16_t>(p, x, argmax, y);  // whose bits travel as they are
    }
  }
  void avg_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y) const {
    fastconv::avg_pool2d_fprop(p, x, y);
  }
  void avg_pool2d_bprop(const Pool2dProblem& p, const void* dy, void* dx) const {
    fastconv::avg_pool2d_bprop(p, dy, dx);
  }
  void batch_norm_moments(const BatchNormProblem& p, const float* x, float* mean,
                          float* variance) const {
    fastconv::batch_norm_moments(p, x, mean, variance);
  }
  void batch_norm_fprop(const BatchNormProblem& p, const float* x, const float* mean,
                        const float* variance, const float* gamma, const float* beta,
                        const float* residual, float* y) const {
    fastconv::batch_norm_fprop(p, x, mean, variance, gamma, beta, residual, y);
  }
  void batch_norm_bprop(const BatchNormProblem& p, const float* x, const float* mean,
                        const float* variance, const float* gamma, const float* beta,
                        const float* dy, const float* y, float* dx, float* dgamma, float* dbeta,
                        float* dresidual) const {
    fastconv::batch_norm_bprop(p, x, mean, variance, gamma, beta, dy, y, dx, dgamma, dbeta,
                               dresidual);
  }
  void conv2d_int8(const Conv2dProblem& p, const float* x, const std::int8_t* filter,
                   const float* filter_scale, const float* bias, float* y) const {
    fastconv::conv2d_int8(p, x, filter, filter_scale, bias, y);
  }
  void conv2d_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                         const void* bias, void* y, std::uint8_t* argmax) const {
    fastconv::conv2d_pool_fprop(p, x, filter, bias, y, argmax);
  }
  void conv2d_kept_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                              const void* bias, void* y, std::uint8_t* argmax,
                              const FilterForms* forms) const {
    fastconv::conv2d_kept_pool_fprop(p, x, filter, bias, y, argmax, forms);
  }
  void conv2d_pool_bprop(const Conv2dProblem& p, const void* x, const void* filter, const void* dy,
                         const void* y, const std::uint8_t* argmax, void* dx, void* dfilter,
                         void* dbias) const {
    fastconv::conv2d_pool_bprop(p, x, filter, dy, y, argmax, dx, dfilter, dbias);
  }

 private:
  template <class Element, class Tap>
  static void gather(const Pool2dProblem& p, const void* x, const Tap* argmax, void* y) {
    framework::gather_at_argmax(p, static_cast<const Element*>(x), argmax,
                                static_cast<Element*>(y));
  }
};

auto operations_of(const auto& context) {
  if constexpr (requires { context.operations(); }) {
    return context.operations();
  } else {
    return HostOperations{};
  }
}

// --- convolution ------------------------------------------------------------------------------
//
// A kernel class names its op, its attributes, inputs and outputs, and the input that has the shape
// of its first output (-1: none).

class Conv2dKernel {
 public:
  template <class Attributes>
  explicit Conv2dKernel(const Attributes& attributes)
      : Conv2dKernel(attributes, activation_attribute(attributes)) {}

  template <class Attributes>
  Conv2dKernel(const Attributes& attributes, Activation activation) {
    arguments_.strides = attributes.template integers<2>("strides");
    arguments_.dilations = attributes.template integers<2>("dilations");
    arguments_.padding = padding_attribute(attributes);
    arguments_.layout = layout_attribute(attributes);
    arguments_.activation = activation;
  }

  static constexpr std::span<const char* const> kGeometry = kGeometryAttributes;
  static constexpr bool kOfFloat32Alone = false;
  static constexpr std::array kAttributes{
      "dilations: list(int) = [1, 1]",
      "activation: {'LINEAR', 'RELU'} = 'LINEAR'",
  };

 protected:
  Conv2dProblem problem(const Shape4& x_shape, const auto& filter) const {
    Conv2dArguments arguments = arguments_;
    arguments.dtype = data_type_of(filter);
    arguments.x_shape = x_shape;
    arguments.filter_shape = rank4_shape(filter, "w");
    // Implied by the shapes. Where they do not fit, 1 leads to the error that says so.
    const int64_t channels = arguments.x_shape[arguments.layout == Layout::nchw ? 1 : 3];
    const int64_t per_group = arguments.filter_shape[2];
    const bool divides = per_group > 0 && channels > 0 && channels % per_group == 0;
    arguments.groups = divides ? channels / per_group : 1;
    return make_conv2d_problem(arguments);
  }

  // The forward op's output, whose sign is the ReLU mask, is an input of the gradient ops where the
  // activation is ReLU.
  static const void* checked_mask(const Conv2dProblem& problem, const auto& context,
                                  const auto& output) {
    if (problem.activation == Activation::linear) return nullptr;
    if (!output) {
      throw InvalidArgument("With activation 'RELU', `output` must be given. Received: " +
                            std::to_string(context.num_inputs()) + " inputs");
    }
    check_shape(*output, "output", problem.y_shape());
    return output->values(problem.dtype);
  }

 private:
  Conv2dArguments arguments_;
};

class Conv2d : public Conv2dKernel {
 public:
  template <class Attributes>
  explicit Conv2d(const Attributes& attributes) : Conv2dKernel(attributes), kept_(attributes) {}
  static constexpr const char* kName = "FastconvConv2D";
  static constexpr std::array kOwnAttributes{"num_bias: int >= 0 = 0", kKeepFilterAttribute};
  static constexpr std::array kInputs{"x: T", "filter: T", "bias: num_bias * T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1);
    const std::optional bias = optional_input(context, 2);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    if (bias) check_shape(*bias, "bias", std::array{p.k});
    const auto forms = kept_.forms(context, 1, p, nullptr);
    const auto y = context.output(0, p.y_shape());
    const void* const bias_data = bias ? bias->values(p.dtype) : nullptr;
    if (forms) {
      return HostOperations{}.conv2d_scaled_fprop(p, x.values(p.dtype), filter.values(p.dtype),
                                                  nullptr, bias_data, nullptr, y.values(p.dtype),
                                                  forms.get());
    }
    operations_of(context).conv2d_fprop(p, x.values(p.dtype), filter.values(p.dtype), bias_data,
                                        y.values(p.dtype));
  }

 private:
  mutable KeptFilter kept_;
};

// With what stands behind a convolution at inference: y = activation(conv(x, filter * scale) + offset +
// residual). `coefficients`, a value a filter each, are scale and offset; or a batch normalisation's mean,
// variance, gamma and beta, perhaps with the convolution's bias, of which scale and offset are made here:
// TensorFlow's own ops would be five to seven a layer, and an op takes a microsecond or two of itself.
class Conv2dScaled : public Conv2dKernel {
 public:
  template <class Attributes>
  explicit Conv2dScaled(const Attributes& attributes)
      : Conv2dKernel(attributes, wide_activation_attribute(attributes)),
        count_(static_cast<int>(attributes.integer("num_coefficients"))),
        epsilon_(attributes.real("epsilon")), kept_(attributes) {
    if (count_ != kOwn && count_ != kOfNormalization && count_ != kWithBias) {
      throw InvalidArgument("There must be 2, 4 or 5 `coefficients`. Received: " +
                            std::to_string(count_));
    }
  }
  static constexpr const char* kName = "FastconvConv2DScaled";
  static constexpr std::array kAttributes{"dilations: list(int) = [1, 1]", kWideActivation};
  static constexpr std::array kOwnAttributes{"num_coefficients: int >= 2 = 2",
                                             "num_residual: int >= 0 = 0", "epsilon: float = 0.0",
                                             kKeepFilterAttribute};
  static constexpr std::array kInputs{"x: T", "filter: T", "coefficients: num_coefficients * T",
                                      "residual: num_residual * T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    constexpr std::array kNames{"scale", "offset"};
    constexpr std::array kNormalizationNames{"mean", "variance", "gamma", "beta", "bias"};
    const auto x = context.input(0), filter = context.input(1);
    const std::optional residual = optional_input(context, 2 + count_);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    if (residual) check_shape(*residual, "residual", p.y_shape());
    const bool normalizes = count_ > kOwn;
    if (normalizes && p.dtype != DataType::float32) {
      throw InvalidArgument("With a batch normalisation `x` must be of float32. Received: another");
    }
    std::array<const void*, kWithBias> values{};
    for (int i = 0; i < count_; ++i) {
      const auto own = context.input(2 + i);  // the context's tensor outlives it
      check_shape(own, normalizes ? kNormalizationNames[i] : kNames[i], std::array{p.k});
      values[i] = own.values(p.dtype);
    }
    std::vector<float> made;
    if (normalizes) {
      const auto floats = [&](int i) { return static_cast<const float*>(values[i]); };
      made.resize(static_cast<std::size_t>(2 * p.k));
      float* const scale = made.data();
      float* const offset = scale + p.k;
      batch_norm_affine({.channels = p.k, .epsilon = epsilon_}, floats(0), floats(1), floats(2),
                        floats(3), floats(4), scale, offset);
      values = {scale, offset};
    }
    const void *const scale = values[0], *const offset = values[1];
    const auto forms = kept_.forms(context, 1, p, scale);
    const auto y = context.output(0, p.y_shape());
    operations_of(context).conv2d_scaled_fprop(
        p, x.values(p.dtype), filter.values(p.dtype), scale, offset,
        residual ? residual->values(p.dtype) : nullptr, y.values(p.dtype), forms.get());
  }

 private:
  static constexpr int kOwn = 2, kOfNormalization = 4, kWithBias = 5;

  int count_;  // of coefficients
  float epsilon_;
  mutable KeptFilter kept_;
};

// What computes dx, and keeps what it made of the filter: the op's input 1.
class Conv2dDgradKernel : public Conv2dKernel {
 protected:
  template <class Attributes>
  explicit Conv2dDgradKernel(const Attributes& attributes)
      : Conv2dKernel(attributes), kept_(attributes) {}

  void dgrad(const auto& context, const Conv2dProblem& p, const auto& dy, const auto& filter,
             const void* mask, const auto& dx) const {
    if (const auto forms = kept_.forms(context, 1, p, nullptr)) {
      return HostOperations{}.conv2d_kept_dgrad(p, dy.values(p.dtype), filter.values(p.dtype), mask,
                                                dx.values(p.dtype), forms.get());
    }
    operations_of(context).conv2d_dgrad(p, dy.values(p.dtype), filter.values(p.dtype), mask,
                                        dx.values(p.dtype));
  }

 private:
  mutable KeptFilter kept_;
};

class Conv2dGradInput : public Conv2dDgradKernel {
 public:
  template <class Attributes>
  explicit Conv2dGradInput(const Attributes& attributes) : Conv2dDgradKernel(attributes) {}
  static constexpr const char* kName = "FastconvConv2DGradInput";
  static constexpr std::array kOwnAttributes{"num_output: int >= 0 = 0", kKeepFilterAttribute};
  static constexpr std::array kInputs{"x: T", "filter: T", "dy: T", "output: num_output * T"};
  static constexpr std::array kOutputs{"dx: T"};
  static constexpr int kOutputLikeInput = 0;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1), dy = context.input(2);
    const std::optional output = optional_input(context, 3);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    check_shape(dy, "dy", p.y_shape());
    const void* mask = checked_mask(p, context, output);
    const auto dx = context.output(0, p.x_shape());
    dgrad(context, p, dy, filter, mask, dx);
  }
};

class Conv2dGradFilter : public Conv2dKernel {
 public:
  using Conv2dKernel::Conv2dKernel;
  static constexpr const char* kName = "FastconvConv2DGradFilter";
  static constexpr std::array kOwnAttributes{"num_output: int >= 0 = 0", "num_bias: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T", "filter: T", "dy: T", "output: num_output * T"};
  static constexpr std::array kOutputs{"dfilter: T", "dbias: num_bias * T"};
  static constexpr int kOutputLikeInput = 1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1), dy = context.input(2);
    const std::optional output = optional_input(context, 3);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    check_shape(dy, "dy", p.y_shape());
    const void* mask = checked_mask(p, context, output);
    const auto dfilter = context.output(0, p.filter_shape());
    if (context.num_outputs() == 1) {
      operations_of(context).conv2d_wgrad(p, x.values(p.dtype), dy.values(p.dtype), mask,
                                          dfilter.values(p.dtype), nullptr);
      return;
    }
    if (context.num_outputs() > 2) {
      throw InvalidArgument("`num_bias` must be 0 or 1. Received: num_bias=" +
                            std::to_string(context.num_outputs() - 1));
    }
    const auto dbias = context.output(1, std::array{p.k});
    operations_of(context).conv2d_wgrad(p, x.values(p.dtype), dy.values(p.dtype), mask,
                                        dfilter.values(p.dtype), dbias.values(p.dtype));
  }
};

// A transposed convolution: y is to x what the input's gradient is to the output's. y's height and
// width are x's times the stride plus `output_offset`, out of which the convolution of the same
// strides, padding and dilation must make x's again.
class Conv2dTranspose : public Conv2dDgradKernel {
 public:
  template <class Attributes>
  explicit Conv2dTranspose(const Attributes& attributes)
      : Conv2dDgradKernel(attributes), strides_(attributes.template integers<2>("strides")),
        offset_(attributes.template integers<2>("output_offset")),
        channel_axis_(layout_attribute(attributes) == Layout::nchw ? 1 : 3) {
    if (activation_attribute(attributes) != Activation::linear) {
      throw InvalidArgument("`activation` must be 'LINEAR'. Received: activation='RELU'");
    }
  }
  static constexpr const char* kName = "FastconvConv2DTranspose";
  static constexpr std::array kOwnAttributes{"output_offset: list(int) = [0, 0]",
                                             kKeepFilterAttribute};
  static constexpr std::array kInputs{"x: T", "filter: T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1);
    const Shape4 x_shape = rank4_shape(x, "x");
    Shape4 y_shape = x_shape;
    y_shape[channel_axis_] = rank4_shape(filter, "w")[2];
    for (int axis = 0; axis < 2; ++axis) {
      int64_t& extent = y_shape[(channel_axis_ == 1 ? 2 : 1) + axis];
      if (__builtin_mul_overflow(extent, strides_[axis], &extent) ||
          __builtin_add_overflow(extent, offset_[axis], &extent)) {
        throw InvalidArgument(
            "The output's height and width must fit 64 bits. Received: x.shape=" + shape_text(x) +
            ", strides=(" + std::to_string(strides_[0]) + ", " + std::to_string(strides_[1]) + ")");
      }
    }
    const Conv2dProblem p = problem(y_shape, filter);
    check_shape(x, "x", p.y_shape());  // the stride and the offset may not fit each other
    const auto y = context.output(0, y_shape);
    dgrad(context, p, x, filter, nullptr, y);
  }

 private:
  std::array<int64_t, 2> strides_, offset_;
  int channel_axis_;
};

// For inference, of int8 (see core/operations.hpp).
class Conv2dInt8 : public Conv2dKernel {
 public:
  using Conv2dKernel::Conv2dKernel;
  static constexpr const char* kName = "FastconvConv2DInt8";
  static constexpr bool kOfFloat32Alone = true;
  static constexpr std::array kOwnAttributes{"num_bias: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T", "filter: int8", "filter_scale: T",
                                      "bias: num_bias * T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1), scale = context.input(2);
    const std::optional bias = optional_input(context, 3);
    if (filter.type() != ElementType::int8) {
      throw InvalidArgument("`filter` must be int8. Received: another data type");
    }
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    check_shape(scale, "filter_scale", std::array{p.k});
    if (bias) check_shape(*bias, "bias", std::array{p.k});
    const auto y = context.output(0, p.y_shape());
    operations_of(context).conv2d_int8(p, x.floats(),
                                       static_cast<const std::int8_t*>(filter.data()),
                                       scale.floats(), bias ? bias->floats() : nullptr, y.floats());
  }
};

// --- pooling ----------------------------------------------------------------------------------

class Pool2dKernel {
 public:
  template <class Attributes>
  explicit Pool2dKernel(const Attributes& attributes) {
    arguments_.pool_size = attributes.template integers<2>("pool_size");
    arguments_.strides = attributes.template integers<2>("strides");
    arguments_.padding = padding_attribute(attributes);
    arguments_.layout = layout_attribute(attributes);
  }

  static constexpr std::span<const char* const> kGeometry = kGeometryAttributes;
  static constexpr bool kOfFloat32Alone = false;
  // 0, 0: the height and width of the input, whatever they are.
  static constexpr std::array kAttributes{"pool_size: list(int)"};

 protected:
  Pool2dProblem problem(const auto& x) const {
    Pool2dArguments arguments = arguments_;
    arguments.dtype = data_type_of(x);
    arguments.x_shape = rank4_shape(x, "x");
    if (arguments.pool_size == kWholeImage) {
      const int first = arguments.layout == Layout::nchw ? 2 : 1;
      for (int axis : {0, 1}) {
        arguments.pool_size[axis] = std::max<int64_t>(1, arguments.x_shape[first + axis]);
      }
    }
    return make_pool2d_problem(arguments);
  }

  static void check_argmax_type(const Pool2dProblem& problem, ElementType type) {
    const ElementType expected =
        problem.argmax_fits_byte() ? ElementType::uint8 : ElementType::int32;
    if (type == expected) return;
    throw InvalidArgument(
        "`argmax` must be uint8 for windows of up to 256 taps and int32 beyond. Received: " +
        std::string(type == ElementType::uint8 ? "uint8" : "int32") + " for pool_size=(" +
        std::to_string(problem.r) + ", " + std::to_string(problem.s) + ")");
  }

 private:
  static constexpr std::array<int64_t, 2> kWholeImage{0, 0};
  Pool2dArguments arguments_;
};

inline constexpr std::array kArgmaxAttributes{"Targmax: {uint8, int32} = DT_UINT8"};

class MaxPool2d : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2D";
  static constexpr std::array<const char*, 0> kOwnAttributes{};
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0);
    const Pool2dProblem p = problem(x);
    const auto y = context.output(0, p.y_shape());
    operations_of(context).max_pool2d_fprop(p, x.values(p.dtype), y.values(p.dtype), nullptr);
  }
};

// argmax: each window's maximum as its place row * S + column in the window.
class MaxPool2dWithArgmax : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DWithArgmax";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"y: T", "argmax: Targmax"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0);
    const Pool2dProblem p = problem(x);
    check_argmax_type(p, context.output_type(1));
    const auto y = context.output(0, p.y_shape());
    const auto argmax = context.output(1, p.y_shape());
    operations_of(context).max_pool2d_fprop(p, x.values(p.dtype), y.values(p.dtype), argmax.data());
  }
};

class MaxPool2dGrad : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DGrad";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"x: T", "argmax: Targmax", "dy: T"};
  static constexpr std::array kOutputs{"dx: T"};
  static constexpr int kOutputLikeInput = 0;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), argmax = context.input(1), dy = context.input(2);
    const Pool2dProblem p = problem(x);
    check_argmax_type(p, argmax.type());
    check_shape(argmax, "argmax", p.y_shape());
    check_shape(dy, "dy", p.y_shape());
    const auto dx = context.output(0, p.x_shape());
    operations_of(context).max_pool2d_bprop(p, dy.values(p.dtype), argmax.data(),
                                            dx.values(p.dtype));
  }
};

class MaxPool2dGradGrad : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DGradGrad";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"ddx: T", "argmax: Targmax"};
  static constexpr std::array kOutputs{"ddy: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto ddx = context.input(0), argmax = context.input(1);
    const Pool2dProblem p = problem(ddx);
    check_argmax_type(p, argmax.type());
    check_shape(argmax, "argmax", p.y_shape());
    const auto ddy = context.output(0, p.y_shape());
    if (p.argmax_fits_byte()) {
      operations_of(context).gather_at_argmax(p, ddx.values(p.dtype),
                                              static_cast<const std::uint8_t*>(argmax.data()),
                                              ddy.values(p.dtype));
    } else {
      operations_of(context).gather_at_argmax(p, ddx.values(p.dtype),
                                              static_cast<const std::int32_t*>(argmax.data()),
                                              ddy.values(p.dtype));
    }
  }
};

class AveragePool2d : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvAveragePool2D";
  static constexpr std::array<const char*, 0> kOwnAttributes{};
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0);
    const Pool2dProblem p = problem(x);
    const auto y = context.output(0, p.y_shape());
    operations_of(context).avg_pool2d_fprop(p, x.values(p.dtype), y.values(p.dtype));
  }
};

class AveragePool2dGrad : public Pool2dKernel {
 public:
  using Pool2dKernel::Pool2dKernel;
  static constexpr const char* kName = "FastconvAveragePool2DGrad";
  static constexpr std::array<const char*, 0> kOwnAttributes{};
  static constexpr std::array kInputs{"x: T", "dy: T"};
  static constexpr std::array kOutputs{"dx: T"};
  static constexpr int kOutputLikeInput = 0;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), dy = context.input(1);
    const Pool2dProblem p = problem(x);
    check_shape(dy, "dy", p.y_shape());
    const auto dx = context.output(0, p.x_shape());
    operations_of(context).avg_pool2d_bprop(p, dy.values(p.dtype), dx.values(p.dtype));
  }
};

// --- convolution and pooling in one -----------------------------------------------------------

// argmax as of MaxPool2dWithArgmax, where it is asked for.
class Conv2dMaxPool2d : public Conv2dKernel {
 public:
  template <class Attributes>
  explicit Conv2dMaxPool2d(const Attributes& attributes)
      : Conv2dKernel(attributes), kept_(attributes) {}
  static constexpr const char* kName = "FastconvConv2DMaxPool2D";
  static constexpr std::array kOwnAttributes{"num_bias: int >= 0 = 0", "num_argmax: int >= 0 = 0",
                                             kKeepFilterAttribute};
  static constexpr std::array kInputs{"x: T", "filter: T", "bias: num_bias * T"};
  static constexpr std::array kOutputs{"y: T", "argmax: num_argmax * uint8"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1);
    const std::optional bias = optional_input(context, 2);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    const Pool2dProblem pool = pool_behind(p);
    if (bias) check_shape(*bias, "bias", std::array{p.k});
    if (context.num_outputs() > 2) {
      throw InvalidArgument("`num_argmax` must be 0 or 1. Received: num_argmax=" +
                            std::to_string(context.num_outputs() - 1));
    }
    const bool is_inference = context.num_outputs() == 1;
    const auto forms = is_inference ? kept_.forms(context, 1, p, nullptr) : nullptr;
    const auto y = context.output(0, pool.y_shape());
    const void* const bias_data = bias ? bias->values(p.dtype) : nullptr;
    if (forms) {
      return HostOperations{}.conv2d_kept_pool_fprop(p, x.values(p.dtype), filter.values(p.dtype),
                                                     bias_data, y.values(p.dtype), nullptr,
                                                     forms.get());
    }
    if (is_inference) {
      operations_of(context).conv2d_pool_fprop(p, x.values(p.dtype), filter.values(p.dtype),
                                               bias_data, y.values(p.dtype), nullptr);
      return;
    }
    const auto argmax = context.output(1, pool.y_shape());
    operations_of(context).conv2d_pool_fprop(p, x.values(p.dtype), filter.values(p.dtype),
                                             bias_data, y.values(p.dtype),
                                             static_cast<std::uint8_t*>(argmax.data()));
  }

 private:
  mutable KeptFilter kept_;
};

class Conv2dMaxPool2dGrad : public Conv2dKernel {
 public:
  template <class Attributes>
  explicit Conv2dMaxPool2dGrad(const Attributes& attributes)
      : Conv2dKernel(attributes), wanted_(attributes.template integers<2>("wanted")) {}
  static constexpr const char* kName = "FastconvConv2DMaxPool2DGrad";
  // wanted: the gradients of how many inputs x and biases, 0 or 1 each.
  static constexpr std::array kOwnAttributes{"wanted: list(int)", "num_dx: int >= 0 = 0",
                                             "num_bias: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T", "filter: T", "dy: T", "y: T", "argmax: uint8"};
  static constexpr std::array kOutputs{"dfilter: T", "dx: num_dx * T", "dbias: num_bias * T"};
  static constexpr int kOutputLikeInput = 1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), filter = context.input(1), dy = context.input(2);
    const auto y = context.input(3), argmax = context.input(4);
    const Conv2dProblem p = problem(rank4_shape(x, "x"), filter);
    const Pool2dProblem pool = pool_behind(p);
    check_shape(dy, "dy", pool.y_shape());
    check_shape(y, "y", pool.y_shape());
    check_shape(argmax, "argmax", pool.y_shape());
    if (argmax.type() != ElementType::uint8) {
      throw InvalidArgument("`argmax` must be uint8. Received: another data type");
    }
    const auto [num_dx, num_bias] = wanted_;
    if (num_dx < 0 || num_dx > 1 || num_bias < 0 || num_bias > 1 ||
        context.num_outputs() != 1 + num_dx + num_bias) {
      throw InvalidArgument(
          "`wanted` must hold numbers of 0 or 1, as many outputs as there are. "
          "Received: wanted=[" +
          std::to_string(num_dx) + ", " + std::to_string(num_bias) + "] for " +
          std::to_string(context.num_outputs()) + " outputs");
    }
    using Tensor = typename Context::Tensor;
    const auto dfilter = context.output(0, p.filter_shape());
    std::optional<Tensor> dx, dbias;
    if (num_dx) dx.emplace(context.output(1, p.x_shape()));
    if (num_bias) dbias.emplace(context.output(static_cast<int>(1 + num_dx), std::array{p.k}));
    operations_of(context).conv2d_pool_bprop(
        p, x.values(p.dtype), filter.values(p.dtype), dy.values(p.dtype), y.values(p.dtype),
        static_cast<const std::uint8_t*>(argmax.data()), dx ? dx->values(p.dtype) : nullptr,
        dfilter.values(p.dtype), dbias ? dbias->values(p.dtype) : nullptr);
  }

 private:
  std::array<int64_t, 2> wanted_;
};

// --- batch normalisation ----------------------------------------------------------------------
//
// NHWC. In training two ops forward, so that the moments, which moving averages read as well, are
// computed once where the second is replaced by one that adds and activates too.

class BatchNormKernel {
 public:
  static constexpr std::span<const char* const> kGeometry{};
  static constexpr bool kOfFloat32Alone = true;

 protected:
  static BatchNormProblem problem(const auto& x, float epsilon = 0,
                                  Activation activation = Activation::linear) {
    const Shape4 shape = rank4_shape(x, "x");
    return {.rows = shape[0] * shape[1] * shape[2],
            .channels = shape[3],
            .epsilon = epsilon,
            .activation = activation};
  }

  // The inputs of a value a channel: mean, variance, gamma, beta from the second on.
  static void check_channels(const auto& context, int64_t channels) {
    constexpr std::array kNames{"mean", "variance", "gamma", "beta"};
    for (int i = 0; i < 4; ++i) {
      check_shape(context.input(i + 1), kNames[i], std::array{channels});
    }
  }
};

class BatchNormMoments : public BatchNormKernel {
 public:
  explicit BatchNormMoments(const auto&) {}
  static constexpr const char* kName = "FastconvBatchNormMoments";
  static constexpr std::array<const char*, 0> kAttributes{}, kOwnAttributes{};
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"mean: T", "variance: T"};
  static constexpr int kOutputLikeInput = -1;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0);
    const BatchNormProblem p = problem(x);
    const auto mean = context.output(0, std::array{p.channels});
    const auto variance = context.output(1, std::array{p.channels});
    operations_of(context).batch_norm_moments(p, x.floats(), mean.floats(), variance.floats());
  }
};

class ActivatedBatchNormKernel : public BatchNormKernel {
 public:
  explicit ActivatedBatchNormKernel(const auto& attributes)
      : epsilon_(attributes.real("epsilon")), activation_(wide_activation_attribute(attributes)) {}
  static constexpr std::array kAttributes{"epsilon: float", kWideActivation};

 protected:
  BatchNormProblem problem(const auto& x) const {
    return BatchNormKernel::problem(x, epsilon_, activation_);
  }

 private:
  float epsilon_;
  Activation activation_;
};

class BatchNorm : public ActivatedBatchNormKernel {
 public:
  using ActivatedBatchNormKernel::ActivatedBatchNormKernel;
  static constexpr const char* kName = "FastconvBatchNorm";
  static constexpr std::array kOwnAttributes{"num_residual: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T",     "mean: T", "variance: T",
                                      "gamma: T", "beta: T", "residual: num_residual * T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = 0;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0);
    const std::optional residual = optional_input(context, 5);
    const BatchNormProblem p = problem(x);
    check_channels(context, p.channels);
    const Shape4 shape = rank4_shape(x, "x");
    if (residual) check_shape(*residual, "residual", shape);
    const auto y = context.output(0, shape);
    operations_of(context).batch_norm_fprop(p, x.floats(), context.input(1).floats(),
                                            context.input(2).floats(), context.input(3).floats(),
                                            context.input(4).floats(),
                                            residual ? residual->floats() : nullptr, y.floats());
  }
};

// By moments that are not x's own, which makes the gradient another.
class BatchNormInference : public BatchNorm {
 public:
  using BatchNorm::BatchNorm;
  static constexpr const char* kName = "FastconvBatchNormInference";
};

// `output`, what BatchNorm gave, is for where a residual was added before an activation, and so is
// dresidual; there are as many of one as of the other.
class BatchNormGrad : public ActivatedBatchNormKernel {
 public:
  using ActivatedBatchNormKernel::ActivatedBatchNormKernel;
  static constexpr const char* kName = "FastconvBatchNormGrad";
  static constexpr std::array kOwnAttributes{"num_output: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T",    "mean: T", "variance: T",           "gamma: T",
                                      "beta: T", "dy: T",   "output: num_output * T"};
  static constexpr std::array kOutputs{"dx: T", "dgamma: T", "dbeta: T",
                                       "dresidual: num_output * T"};
  static constexpr int kOutputLikeInput = 0;

  template <class Context>
  void operator()(const Context& context) const {
    const auto x = context.input(0), dy = context.input(5);
    const std::optional output = optional_input(context, 6);
    const BatchNormProblem p = problem(x);
    check_channels(context, p.channels);
    const Shape4 shape = rank4_shape(x, "x");
    check_shape(dy, "dy", shape);
    if (output) {
      if (p.activation == Activation::linear) {
        throw InvalidArgument("Without an activation there must be no `output`. Received: one");
      }
      if (is_gated(p.activation)) {
        throw InvalidArgument(
            "With an `output`, which must tell the derivative, `activation` must be 'RELU' or "
            "'RELU6'. Received: a gated one");
      }
      check_shape(*output, "output", shape);
    }
    using Tensor = typename Context::Tensor;
    const auto dx = context.output(0, shape);
    const auto dgamma = context.output(1, std::array{p.channels});
    const auto dbeta = context.output(2, std::array{p.channels});
    std::optional<Tensor> dresidual;
    if (output) dresidual.emplace(context.output(3, shape));
    operations_of(context).batch_norm_bprop(
        p, x.floats(), context.input(1).floats(), context.input(2).floats(),
        context.input(3).floats(), context.input(4).floats(), dy.floats(),
        output ? output->floats() : nullptr, dx.floats(), dgamma.floats(), dbeta.floats(),
        dresidual ? dresidual->floats() : nullptr);
  }
};

// --- all of them ------------------------------------------------------------------------------

template <class Kernel>
inline std::atomic<std::uint64_t> g_executions{0};

template <class... Kernels>
struct OpList {
  template <class... More>
  using With = OpList<Kernels..., More...>;
  // Calls action.operator()<Kernel>() for each.
  static void for_each(const auto& action) { (action.template operator()<Kernels>(), ...); }
  static constexpr std::array kNames{Kernels::kName...};
  // How often the op's kernel ran to its end since the door, a library of its own, was loaded.
  static std::uint64_t executions(std::size_t index) {
    const std::array counters{&g_executions<Kernels>...};
    return counters[index]->load(std::memory_order_relaxed);
  }
};

using Ops = OpList<Conv2d, Conv2dGradInput, Conv2dGradFilter, Conv2dTranspose, MaxPool2d,
                   MaxPool2dWithArgmax, MaxPool2dGrad, MaxPool2dGradGrad, AveragePool2d,
                   AveragePool2dGrad, Conv2dMaxPool2d, Conv2dMaxPool2dGrad, Conv2dInt8>;

// XLA makes loops of its own of what stands behind a convolution.
using OpsOutsideXla =
    Ops::With<Conv2dScaled, BatchNormMoments, BatchNorm, BatchNormInference, BatchNormGrad>;

}  // namespace fastconv::framework
