#include "core/problem.hpp"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>

#include "core/error.hpp"

namespace fastconv {

InvalidArgument::~InvalidArgument() = default;

namespace {

using std::int64_t;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidArgument(message.str());
}

// Byte offsets must fit a signed 64-bit integer in every product taken later.
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 64;

void check_element_count(const std::string& name, const std::array<int64_t, 4>& shape) {
  int64_t count = 1;
  for (int64_t extent : shape) {
    if (extent < 0) {
      fail("Dimensions in `", name, "` must not be negative. Received: ", name, "=",
           shape_text(shape));
    }
    if (__builtin_mul_overflow(count, std::max<int64_t>(extent, 1), &count) ||
        count > kMaxElements) {
      fail("`", name, "` must be that of fewer than 2**57 elements. Received: ", name, "=",
           shape_text(shape));
    }
  }
}

void check_positive(const char* what, const std::array<int64_t, 2>& values) {
  constexpr int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  for (int64_t value : values) {
    if (value < 1 || value > kLargest) {
      fail("`", what, "` must be positive integers below 2**31. Received: ", what, "=",
           shape_text(values));
    }
  }
}

// One spatial axis: its padding on both sides and its output extent.
struct Axis {
  int64_t pad_before, pad_after, out;
};

Axis resolve_axis(const Padding& padding, int64_t before, int64_t after, int64_t extent,
                  int64_t window, int64_t stride) {
  if (padding.kind == Padding::Kind::same) {
    const int64_t out = (extent + stride - 1) / stride;
    const int64_t total = std::max<int64_t>((out - 1) * stride + window - extent, 0);
    return {total / 2, total - total / 2, out};
  }
  if (padding.kind == Padding::Kind::valid) before = after = 0;
  const int64_t room = extent + before + after - window;
  return {before, after, room < 0 ? 0 : room / stride + 1};
}

void check_padding(const Padding& padding) {
  if (padding.kind != Padding::Kind::explicit_sides) return;
  const std::array<int64_t, 4> sides{padding.top, padding.bottom, padding.left, padding.right};
  constexpr int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  for (int64_t side : sides) {
    if (side < 0 || side > kLargest) {
      fail("Explicit `padding` must be four integers from 0 to 2**31 - 1. Received: padding=((",
           padding.top, ", ", padding.bottom, "), (", padding.left, ", ", padding.right, "))");
    }
  }
}

std::array<int64_t, 4> activation_shape(Layout layout, int64_t n, int64_t h, int64_t w, int64_t c) {
  if (layout == Layout::nchw) return {n, c, h, w};
  return {n, h, w, c};
}

}  // namespace

std::array<int64_t, 4> Conv2dProblem::x_shape() const {
  return activation_shape(layout, n, h, w, c);
}
std::array<int64_t, 4> Conv2dProblem::y_shape() const {
  return activation_shape(layout, n, oh, ow, k);
}
std::array<int64_t, 4> Pool2dProblem::x_shape() const {
  return activation_shape(layout, n, h, w, c);
}
std::array<int64_t, 4> Pool2dProblem::y_shape() const {
  return activation_shape(layout, n, oh, ow, c);
}

Conv2dProblem make_conv2d_problem(const Conv2dArguments& a) {
  check_element_count(a.x_shape_name, a.x_shape);
  check_element_count(a.filter_shape_name, a.filter_shape);
  const auto x_text = [&] { return std::string(a.x_shape_name) + "=" + shape_text(a.x_shape); };
  const auto w_text = [&] {
    return std::string(a.filter_shape_name) + "=" + shape_text(a.filter_shape);
  };
  check_positive("strides", a.strides);
  check_positive("dilation_rate", a.dilations);
  check_padding(a.padding);

  const bool channels_first = a.layout == Layout::nchw;
  Conv2dProblem p;
  p.n = a.x_shape[0];
  p.h = a.x_shape[channels_first ? 2 : 1];
  p.w = a.x_shape[channels_first ? 3 : 2];
  p.c = a.x_shape[channels_first ? 1 : 3];
  p.r = a.filter_shape[0];
  p.s = a.filter_shape[1];
  p.k = a.filter_shape[3];
  p.stride_h = a.strides[0];
  p.stride_w = a.strides[1];
  p.dilation_h = a.dilations[0];
  p.dilation_w = a.dilations[1];
  p.groups = a.groups;
  p.layout = a.layout;
  p.dtype = a.dtype;
  p.activation = a.activation;

  constexpr int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (p.r < 1 || p.s < 1 || a.filter_shape[2] < 1 || p.k < 1) {
    fail("Every dimension in `", a.filter_shape_name, "` must be at least 1. Received: ", w_text());
  }
  if (p.h < 1 || p.w < 1 || p.c < 1) {
    fail("Height, width and channels in `", a.x_shape_name,
         "` must be at least 1. Received: ", x_text());
  }
  for (int64_t extent : {p.h, p.w, p.c, p.r, p.s, p.k}) {
    if (extent > kLargest) {
      fail("Every dimension but the batch must be below 2**31. Received: ", x_text(), ", ",
           w_text());
    }
  }
  if (p.groups < 1) {
    fail("`groups` must be a positive integer. Received: groups=", p.groups);
  }
  if (p.c % p.groups != 0) {
    fail("The number of input channels must be a multiple of `groups`. Received: ", x_text(),
         ", groups=", p.groups);
  }
  if (p.k % p.groups != 0) {
    fail("The number of filters must be a multiple of `groups`. Received: ", w_text(),
         ", groups=", p.groups);
  }
  if (a.filter_shape[2] != p.c / p.groups) {
    fail("The filter's third dimension must be the number of input channels divided by `groups`, ",
         p.c / p.groups, ". Received: ", x_text(), ", ", w_text(), ", groups=", p.groups);
  }

  // Each factor is below 2**31, so the products below fit 64 bits.
  const int64_t window_h = (p.r - 1) * p.dilation_h + 1;
  const int64_t window_w = (p.s - 1) * p.dilation_w + 1;
  const Axis rows =
      resolve_axis(a.padding, a.padding.top, a.padding.bottom, p.h, window_h, p.stride_h);
  const Axis columns =
      resolve_axis(a.padding, a.padding.left, a.padding.right, p.w, window_w, p.stride_w);
  if (rows.out < 1 || columns.out < 1) {
    fail("The dilated filter, ", window_h, " x ", window_w,
         ", must not be larger than the padded input. Received: ", x_text(), ", ", w_text(),
         ", dilation_rate=", shape_text(a.dilations), ", padding=((", rows.pad_before, ", ",
         rows.pad_after, "), (", columns.pad_before, ", ", columns.pad_after, "))");
  }
  p.oh = rows.out;
  p.ow = columns.out;
  p.pad_top = rows.pad_before;
  p.pad_bottom = rows.pad_after;
  p.pad_left = columns.pad_before;
  p.pad_right = columns.pad_after;
  check_element_count("y.shape", p.y_shape());
  // Kernels may lay the padding out in memory.
  check_element_count("padded " + std::string(a.x_shape_name),
                      activation_shape(p.layout, p.n, p.h + p.pad_top + p.pad_bottom,
                                       p.w + p.pad_left + p.pad_right, p.c));
  return p;
}

Pool2dProblem make_pool2d_problem(const Pool2dArguments& a) {
  check_element_count(a.x_shape_name, a.x_shape);
  const auto x_text = [&] { return std::string(a.x_shape_name) + "=" + shape_text(a.x_shape); };
  check_positive("pool_size", a.pool_size);
  check_positive("strides", a.strides);
  check_padding(a.padding);

  const bool channels_first = a.layout == Layout::nchw;
  Pool2dProblem p;
  p.n = a.x_shape[0];
  p.h = a.x_shape[channels_first ? 2 : 1];
  p.w = a.x_shape[channels_first ? 3 : 2];
  p.c = a.x_shape[channels_first ? 1 : 3];
  p.r = a.pool_size[0];
  p.s = a.pool_size[1];
  p.stride_h = a.strides[0];
  p.stride_w = a.strides[1];
  p.layout = a.layout;
  p.dtype = a.dtype;

  constexpr int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (p.h < 1 || p.w < 1 || p.c < 1) {
    fail("Height, width and channels in `", a.x_shape_name,
         "` must be at least 1. Received: ", x_text());
  }
  if (p.h > kLargest || p.w > kLargest || p.c > kLargest || p.r * p.s > kLargest) {
    fail("Every dimension but the batch, and the window's area, must be below 2**31. Received: ",
         x_text(), ", pool_size=", shape_text(a.pool_size));
  }
  const bool is_explicit = a.padding.kind == Padding::Kind::explicit_sides;
  if (is_explicit && (std::max(a.padding.top, a.padding.bottom) >= p.r ||
                      std::max(a.padding.left, a.padding.right) >= p.s)) {
    // A window of padding alone has no maximum.
    fail("Explicit `padding` must be smaller than `pool_size` on every side. Received: padding=((",
         a.padding.top, ", ", a.padding.bottom, "), (", a.padding.left, ", ", a.padding.right,
         ")), pool_size=", shape_text(a.pool_size));
  }
  const Axis rows = resolve_axis(a.padding, a.padding.top, a.padding.bottom, p.h, p.r, p.stride_h);
  const Axis columns =
      resolve_axis(a.padding, a.padding.left, a.padding.right, p.w, p.s, p.stride_w);
  if (rows.out < 1 || columns.out < 1) {
    fail("`pool_size` must not be larger than the padded input. Received: ", x_text(),
         ", pool_size=", shape_text(a.pool_size));
  }
  p.oh = rows.out;
  p.ow = columns.out;
  p.pad_top = rows.pad_before;
  p.pad_bottom = rows.pad_after;
  p.pad_left = columns.pad_before;
  p.pad_right = columns.pad_after;
  check_element_count("y.shape", p.y_shape());
  return p;
}

Pool2dProblem pool_behind(const Conv2dProblem& p) {
  if (p.oh < 2 || p.ow < 2) {
    fail(
        "The convolution's output must be at least 2 x 2 to be pooled by 2 x 2 windows. Received: "
        "an output of ",
        p.oh, " x ", p.ow);
  }
  Pool2dProblem pool;
  pool.n = p.n;
  pool.h = p.oh;
  pool.w = p.ow;
  pool.c = p.k;
  pool.r = pool.s = pool.stride_h = pool.stride_w = 2;
  pool.oh = p.oh / 2;
  pool.ow = p.ow / 2;
  pool.layout = p.layout;
  pool.dtype = p.dtype;
  return pool;
}

}  // namespace fastconv
