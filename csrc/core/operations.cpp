#include "core/operations.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "core/error.hpp"
#include "core/packed_filter.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/bf16_kernels.hpp"
#include "cpu/int8_kernels.hpp"
#include "cpu/kernels.hpp"

namespace fastconv {
namespace {

using std::int64_t;

const cpu::Kernels& kernels() { return cpu::kernels(current_isa()); }

std::size_t bytes(int64_t elements) { return static_cast<std::size_t>(elements) * sizeof(float); }

// `elements` of a tensor further on; null stays null.
const void* from(DataType type, const void* data, int64_t elements) {
  if (!data) return nullptr;
  return static_cast<const char*>(data) + static_cast<std::size_t>(elements) * size_of(type);
}
void* from(DataType type, void* data, int64_t elements) {
  return const_cast<void*>(from(type, static_cast<const void*>(data), elements));
}

// The kernels speak float32, and those of convolution NHWC. What is of another type or layout is
// brought to it and back through scratch memory. Null stays null.
class Input {
 public:
  // A tensor of which the layout does not matter.
  Input(DataType type, const void* data, int64_t count)
      : Input(data && type != DataType::float32, data, count) {
    if (copied_) kernels().widen(type, count, data, scratch_.floats());
  }
  // Images.
  Input(const Conv2dProblem& p, const void* data, int64_t pixels, int64_t channels)
      : Input(data && !is_computed_on(p), data, p.n * pixels * channels) {
    if (!copied_) return;
    if (p.layout == Layout::nchw) {
      kernels().transpose_in(p.dtype, p.n, channels, pixels, data, scratch_.floats());
    } else {
      kernels().widen(p.dtype, p.n * pixels * channels, data, scratch_.floats());
    }
  }
  const float* data() const { return data_; }

  static bool is_computed_on(const Conv2dProblem& p) {
    return p.layout == Layout::nhwc && p.dtype == DataType::float32;
  }

 private:
  Input(bool copied, const void* data, int64_t count)
      : copied_(copied), scratch_(copied ? bytes(count) : 0),
        data_(copied ? scratch_.floats() : static_cast<const float*>(data)) {}
  bool copied_;
  Workspace scratch_;
  const float* data_;
};

class Output {
 public:
  Output(DataType type, void* data, int64_t count)
      : Output(data && type != DataType::float32, type, data, 1, count, 1, Layout::nhwc) {}
  Output(const Conv2dProblem& p, void* data, int64_t pixels, int64_t channels)
      : Output(data && !Input::is_computed_on(p), p.dtype, data, p.n, pixels, channels, p.layout) {}
  float* data() const { return copied_ ? scratch_.floats() : static_cast<float*>(data_); }
  void finish() const {
    if (!copied_) return;
    if (layout_ == Layout::nchw) {
      kernels().transpose_out(type_, images_, pixels_, channels_, scratch_.floats(), data_);
    } else {
      kernels().narrow(type_, images_ * pixels_ * channels_, scratch_.floats(), data_);
    }
  }

 private:
  Output(bool copied, DataType type, void* data, int64_t images, int64_t pixels, int64_t channels,
         Layout layout)
      : copied_(copied), scratch_(copied ? bytes(images * pixels * channels) : 0), type_(type),
        data_(data), images_(images), pixels_(pixels), channels_(channels), layout_(layout) {}
  bool copied_;
  Workspace scratch_;
  DataType type_;
  void* data_;
  int64_t images_, pixels_, channels_;
  Layout layout_;
};

Conv2dProblem as_computed(Conv2dProblem p) {
  p.layout = Layout::nhwc;
  return of_float32(p);
}

// As many images of so many floats as fill the budget, in parts of about equal size.
int64_t images_within(int64_t budget_bytes, int64_t image_floats, int64_t images) {
  const int64_t most =
      std::clamp<int64_t>(budget_bytes / (4 * std::max<int64_t>(image_floats, 1)), 1, images);
  const int64_t parts = (images + most - 1) / most;
  return (images + parts - 1) / parts;
}

// To a convolution by 1 x 1 filters that sees every pixel once, a pixel is an image, so that the parts of a
// batch that is converted can be as small as the caches would have them. Not where few channels, or each
// by itself, have kernels that go along a row.
Conv2dProblem of_single_pixels(const Conv2dProblem& p) {
  const bool is_converted = p.dtype != DataType::float32 && p.layout == Layout::nhwc;
  if (!p.sees_each_pixel_once() || !is_converted || p.groups > 1 || p.c <= 4) return p;
  Conv2dProblem small = p;
  small.n = p.n * p.h * p.w;
  small.h = small.w = small.oh = small.ow = 1;
  return small;
}

// Images that are copied are taken so many at a time that they stay in the caches between that and the
// kernels; of others, all at once. `fixed_bytes` is what each part costs besides.
int64_t images_a_part(const Conv2dProblem& p, int64_t fixed_bytes) {
  if (Input::is_computed_on(p)) return p.n;
  // Of single pixels, as many as fit into a core's own cache.
  const int64_t least = p.h * p.w == 1 ? int64_t{1} << 20 : int64_t{6} << 20;
  const int64_t budget = std::max(least, 4 * fixed_bytes);
  return images_within(budget, p.h * p.w * p.c + p.oh * p.ow * p.k, p.n);
}

int64_t images_a_part(const Pool2dProblem& p) {
  if (p.dtype == DataType::float32) return p.n;
  return images_within(int64_t{2} << 20, (p.h * p.w + p.oh * p.ow) * p.c, p.n);
}

// Calls body(part of the problem, its first image).
template <class Problem, class Body>
void for_each_part(const Problem& p, int64_t images, const Body& body) {
  Problem part = p;
  for (int64_t n = 0; n < p.n; n += images) {
    part.n = std::min(images, p.n - n);
    body(part, n);
  }
}

// The gradient of some images by the filter and the bias.
void wgrad_of_images(const Conv2dProblem& p, const cpu::Conv2dAlgorithm& chosen, const void* x,
                     const void* dy, const void* y, float* dfilter, float* dbias) {
  const bool relu = p.activation == Activation::relu;
  const bool fused = chosen.masks_wgrad && dfilter;
  const bool apart = relu && !fused;
  const Input dy_nhwc(p, dy, p.oh * p.ow, p.k);
  const Input y_nhwc(p, relu ? y : nullptr, p.oh * p.ow, p.k);
  const Workspace dz(apart ? bytes(p.y_size()) : 0);
  if (!fused && (relu || dbias)) {
    kernels().activation_grad(p.n * p.oh * p.ow, p.k, dy_nhwc.data(), y_nhwc.data(), dz.floats(),
                              dbias);
  }
  if (!dfilter) return;
  const Input x_nhwc(p, x, p.h * p.w, p.c);
  chosen.run(as_computed(p), Direction::wgrad,
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

void add(const float* from, int64_t count, float* to) {
  constexpr int64_t kATask = 16384;
  parallel_for((count + kATask - 1) / kATask, [&](int64_t task) {
    for (int64_t i = task * kATask; i < std::min(count, (task + 1) * kATask); ++i) to[i] += from[i];
  });
}

// The gradients by filter and bias of parts of the batch, added up in order. Calls body(part, its first
// image, where its gradients go); null stays null.
template <class Body>
void sum_over_parts(const Conv2dProblem& p, int64_t images, void* dfilter, void* dbias,
                    const Body& body) {
  const Output own_dfilter(p.dtype, dfilter, p.filter_size()), own_dbias(p.dtype, dbias, p.k);
  const Workspace sums(images < p.n ? bytes(p.filter_size()) + bytes(p.k) : 0);
  for_each_part(p, images, [&](const Conv2dProblem& part, int64_t n) {
    float* const part_dfilter = n > 0 && dfilter ? sums.floats(bytes(p.k)) : own_dfilter.data();
    float* const part_dbias = n > 0 && dbias ? sums.floats() : own_dbias.data();
    body(part, n, part_dfilter, part_dbias);
    if (n == 0) return;
    if (dfilter) add(part_dfilter, p.filter_size(), own_dfilter.data());
    if (dbias) add(part_dbias, p.k, own_dbias.data());
  });
  own_dfilter.finish();
  own_dbias.finish();
}

// By kernels of float32. `packed` has the forms of the filter, times the scale, where they are kept, or is null.
void fprop_by_float32(const Conv2dProblem& problem, const void* x, const void* filter,
                      const FilterForms* packed, const void* scale, const void* bias,
                      const void* residual, void* y, const char* algorithm) {
  const Conv2dProblem p = of_single_pixels(problem);
  Conv2dProblem computed = as_computed(p);
  if (is_gated(p.activation)) computed.activation = Activation::linear;
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(computed, Direction::fprop, algorithm);
  if (p.n == 0) return;
  const Input own_filter(p.dtype, filter, p.filter_size());
  const Input own_scale(p.dtype, scale, p.k), own_bias(p.dtype, bias, p.k);
  const bool scaled_before = scale && !chosen.scales_filter;
  const bool added_behind = residual && !chosen.adds_residual;
  const Workspace scaled(scaled_before ? bytes(p.filter_size()) : 0);
  if (scaled_before) {
    multiply_columns(own_filter.data(), own_scale.data(), p.filter_size() / p.k, p.k,
                     scaled.floats());
  }
  if (added_behind) computed.activation = Activation::linear;
  for_each_part(
      p, images_a_part(p, bytes(p.filter_size())), [&](const Conv2dProblem& part, int64_t n) {
        const int64_t at_x = n * p.h * p.w * p.c, at_y = n * p.oh * p.ow * p.k;
        const Input own_x(part, from(p.dtype, x, at_x), p.h * p.w, p.c);
        const Input own_residual(part, from(p.dtype, residual, at_y), p.oh * p.ow, p.k);
        const Output own_y(part, from(p.dtype, y, at_y), p.oh * p.ow, p.k);
        computed.n = part.n;
        chosen.run(computed, Direction::fprop,
                   {.x = own_x.data(),
                    .filter = scaled_before ? scaled.floats() : own_filter.data(),
                    .bias = own_bias.data(),
                    .packed = packed,
                    .scale = scaled_before ? nullptr : own_scale.data(),
                    .residual = added_behind ? nullptr : own_residual.data(),
                    .out = own_y.data()});
        if (added_behind || is_gated(p.activation)) {
          kernels().add_and_activate(p.activation, part.y_size(),
                                     added_behind ? own_residual.data() : nullptr, own_y.data());
        }
        own_y.finish();
      });
}

// --- by units of bfloat16 ---

const Bfloat16* brains(const void* data, int64_t elements) {
  return static_cast<const Bfloat16*>(from(DataType::bfloat16, data, elements));
}
Bfloat16* brains(void* data, int64_t elements) {
  return static_cast<Bfloat16*>(from(DataType::bfloat16, data, elements));
}

// Images at a time whose copies stay in the caches of a few cores.
int64_t images_a_part_of_bf16(const Conv2dProblem& p) {
  return images_within(int64_t{6} << 20, (p.h * p.w * p.c + p.oh * p.ow * p.k) / 2, p.n);
}

void fprop_of_bf16(const Conv2dProblem& p, const cpu::Bf16Algorithm& algorithm, const void* x,
                   const void* filter, const void* scale, const void* bias, const void* residual,
                   void* y) {
  if (p.n == 0) return;
  const Input own_scale(p.dtype, scale, p.k), own_bias(p.dtype, bias, p.k);
  for_each_part(p, images_a_part_of_bf16(p), [&](const Conv2dProblem& part, int64_t n) {
    const int64_t at_y = n * p.oh * p.ow * p.k;
    algorithm.run(part, Direction::fprop,
                  {.x = brains(x, n * p.h * p.w * p.c),
                   .filter = brains(filter, 0),
                   .residual = brains(residual, at_y),
                   .out = brains(y, at_y),
                   .scale = own_scale.data(),
                   .bias = own_bias.data()});
  });
}

void dgrad_of_bf16(const Conv2dProblem& p, const cpu::Bf16Algorithm& algorithm, const void* dy,
                   const void* filter, const void* y, void* dx) {
  if (p.n == 0) return;
  const bool relu = p.activation == Activation::relu;
  for_each_part(p, images_a_part_of_bf16(p), [&](const Conv2dProblem& part, int64_t n) {
    const int64_t at_y = n * p.oh * p.ow * p.k;
    algorithm.run(part, Direction::dgrad,
                  {.filter = brains(filter, 0),
                   .dy = brains(dy, at_y),
                   .y = relu ? brains(y, at_y) : nullptr,
                   .out = brains(dx, n * p.h * p.w * p.c)});
  });
}

void wgrad_of_bf16(const Conv2dProblem& p, const cpu::Bf16Algorithm& algorithm, const void* x,
                   const void* dy, const void* y, void* dfilter, void* dbias) {
  const bool relu = p.activation == Activation::relu;
  sum_over_parts(p, images_a_part_of_bf16(p), dfilter, dbias,
                 [&](const Conv2dProblem& part, int64_t n, float* part_dfilter, float* part_dbias) {
                   const int64_t at_y = n * p.oh * p.ow * p.k;
                   algorithm.run(part, Direction::wgrad,
                                 {.x = brains(x, n * p.h * p.w * p.c),
                                  .dy = brains(dy, at_y),
                                  .y = relu ? brains(y, at_y) : nullptr,
                                  .dfilter = part_dfilter,
                                  .dbias = part_dbias});
                 });
}

}  // namespace

void conv2d_fprop(const Conv2dProblem& p, const void* x, const void* filter, const void* bias,
                  void* y, const char* algorithm) {
  conv2d_scaled_fprop(p, x, filter, nullptr, bias, nullptr, y, algorithm);
}

void conv2d_scaled_fprop(const Conv2dProblem& problem, const void* x, const void* filter,
                         const void* scale, const void* bias, const void* residual, void* y,
                         const char* algorithm, const FilterForms* forms) {
  // Which round what they store: a gated activation would be of a rounded value.
  const auto* const of_bf16 = is_gated(problem.activation)
                                  ? nullptr
                                  : cpu::choose_bf16(problem, Direction::fprop, algorithm);
  if (of_bf16) return fprop_of_bf16(problem, *of_bf16, x, filter, scale, bias, residual, y);
  fprop_by_float32(problem, x, filter, forms, scale, bias, residual, y, algorithm);
}

namespace {

void check_shape(const Conv2dProblem& problem, const PackedFilter& filter) {
  if (problem.filter_shape() == filter.shape()) return;
  throw InvalidArgument("The problem's filter must be of the packed one's shape, " +
                        shape_text(filter.shape()) + ". Received: filter of shape " +
                        shape_text(problem.filter_shape()));
}

}  // namespace

void conv2d_packed_fprop(const Conv2dProblem& problem, const float* x, const PackedFilter& filter,
                         const float* bias, float* y, const char* algorithm) {
  check_shape(problem, filter);
  fprop_by_float32(of_float32(problem), x, filter.values(), &filter, nullptr, bias, nullptr, y,
                   algorithm);
}

void conv2d_packed_dgrad(const Conv2dProblem& problem, const float* dy, const PackedFilter& filter,
                         const float* y, float* dx, const char* algorithm) {
  check_shape(problem, filter);
  conv2d_kept_dgrad(of_float32(problem), dy, filter.values(), y, dx, &filter, algorithm);
}

void conv2d_dgrad(const Conv2dProblem& problem, const void* dy, const void* filter, const void* y,
                  void* dx, const char* algorithm) {
  conv2d_kept_dgrad(problem, dy, filter, y, dx, nullptr, algorithm);
}

void conv2d_kept_dgrad(const Conv2dProblem& problem, const void* dy, const void* filter,
                       const void* y, void* dx, const FilterForms* forms, const char* algorithm) {
  if (const auto* const of_bf16 = cpu::choose_bf16(problem, Direction::dgrad, algorithm)) {
    return dgrad_of_bf16(problem, *of_bf16, dy, filter, y, dx);
  }
  const Conv2dProblem p = of_single_pixels(problem);
  const cpu::Conv2dAlgorithm& chosen = cpu::choose(as_computed(p), Direction::dgrad, algorithm);
  if (p.n == 0) return;
  const Input own_filter(p.dtype, filter, p.filter_size());
  const bool relu = p.activation == Activation::relu;
  const bool apart = relu && !chosen.masks_dgrad;  // the mask is a pass of its own
  for_each_part(
      p, images_a_part(p, bytes(p.filter_size())), [&](const Conv2dProblem& part, int64_t n) {
        const int64_t at_x = n * p.h * p.w * p.c, at_y = n * p.oh * p.ow * p.k;
        const Input own_dy(part, from(p.dtype, dy, at_y), p.oh * p.ow, p.k);
        const Input own_y(part, relu ? from(p.dtype, y, at_y) : nullptr, p.oh * p.ow, p.k);
        const Output own_dx(part, from(p.dtype, dx, at_x), p.h * p.w, p.c);
        const Workspace dz(apart ? bytes(part.y_size()) : 0);
        if (apart) {
          kernels().activation_grad(part.n * p.oh * p.ow, p.k, own_dy.data(), own_y.data(),
                                    dz.floats(), nullptr);
        }
        chosen.run(as_computed(part), Direction::dgrad,
                   {.filter = own_filter.data(),
                    .packed = forms,
                    .dy = apart ? dz.floats() : own_dy.data(),
                    .y = relu && !apart ? own_y.data() : nullptr,
                    .out = own_dx.data()});
        own_dx.finish();
      });
}

void conv2d_wgrad(const Conv2dProblem& problem, const void* x, const void* dy, const void* y,
                  void* dfilter, void* dbias, const char* algorithm) {
  const cpu::Bf16Algorithm* const of_bf16 = cpu::choose_bf16(problem, Direction::wgrad, algorithm);
  if (of_bf16 && problem.n > 0) {
    return wgrad_of_bf16(problem, *of_bf16, x, dy, y, dfilter, dbias);
  }
  const Conv2dProblem p = of_single_pixels(problem);
  const cpu::Conv2dAlgorithm& chosen =
      cpu::choose(as_computed(p), Direction::wgrad, of_bf16 ? nullptr : algorithm);
  if (p.n == 0) {  // zeros are zero bytes in every data type
    if (dfilter)
      std::memset(dfilter, 0, static_cast<std::size_t>(p.filter_size()) * size_of(p.dtype));
    if (dbias) std::memset(dbias, 0, static_cast<std::size_t>(p.k) * size_of(p.dtype));
    return;
  }
  sum_over_parts(p, images_a_part(p, 2 * bytes(p.filter_size())), dfilter, dbias,
                 [&](const Conv2dProblem& part, int64_t n, float* part_dfilter, float* part_dbias) {
                   const int64_t at_x = n * p.h * p.w * p.c, at_y = n * p.oh * p.ow * p.k;
                   wgrad_of_images(part, chosen, from(p.dtype, x, at_x), from(p.dtype, dy, at_y),
                                   from(p.dtype, y, at_y), part_dfilter, part_dbias);
                 });
}

namespace {

void* argmax_of(const Pool2dProblem& p, const void* argmax, int64_t elements) {
  if (!argmax) return nullptr;
  const int64_t size = p.argmax_fits_byte() ? 1 : 4;
  return const_cast<char*>(static_cast<const char*>(argmax)) + elements * size;
}

// Calls body(part of float32, the first elements of its x and y).
template <class Body>
void for_each_pooled_part(const Pool2dProblem& p, const Body& body) {
  if (p.n == 0) return;
  for_each_part(p, images_a_part(p), [&](const Pool2dProblem& part, int64_t n) {
    body(of_float32(part), n * p.h * p.w * p.c, n * p.oh * p.ow * p.c);
  });
}

}  // namespace

void max_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y, void* argmax) {
  for_each_pooled_part(p, [&](const Pool2dProblem& part, int64_t at_x, int64_t at_y) {
    const Input own_x(p.dtype, from(p.dtype, x, at_x), part.x_size());
    const Output own_y(p.dtype, from(p.dtype, y, at_y), part.y_size());
    kernels().max_pool2d_fprop(part, own_x.data(), own_y.data(), argmax_of(p, argmax, at_y));
    own_y.finish();
  });
}

void max_pool2d_bprop(const Pool2dProblem& p, const void* dy, const void* argmax, void* dx) {
  for_each_pooled_part(p, [&](const Pool2dProblem& part, int64_t at_x, int64_t at_y) {
    const Input own_dy(p.dtype, from(p.dtype, dy, at_y), part.y_size());
    const Output own_dx(p.dtype, from(p.dtype, dx, at_x), part.x_size());
    kernels().max_pool2d_bprop(part, own_dy.data(), nullptr, argmax_of(p, argmax, at_y),
                               own_dx.data());
    own_dx.finish();
  });
}

void avg_pool2d_fprop(const Pool2dProblem& p, const void* x, void* y) {
  for_each_pooled_part(p, [&](const Pool2dProblem& part, int64_t at_x, int64_t at_y) {
    const Input own_x(p.dtype, from(p.dtype, x, at_x), part.x_size());
    const Output own_y(p.dtype, from(p.dtype, y, at_y), part.y_size());
    kernels().avg_pool2d_fprop(part, own_x.data(), own_y.data());
    own_y.finish();
  });
}

void avg_pool2d_bprop(const Pool2dProblem& p, const void* dy, void* dx) {
  for_each_pooled_part(p, [&](const Pool2dProblem& part, int64_t at_x, int64_t at_y) {
    const Input own_dy(p.dtype, from(p.dtype, dy, at_y), part.y_size());
    const Output own_dx(p.dtype, from(p.dtype, dx, at_x), part.x_size());
    kernels().avg_pool2d_bprop(part, own_dy.data(), own_dx.data());
    own_dx.finish();
  });
}

namespace {

// Rows of the convolution's output that are computed at a time where an algorithm does not pool: whole
// images, or a part of one. Where a part begins a tile of Winograd's does, of up to four rows: elsewhere it
// would round otherwise than in the whole.
struct PoolStrips {
  int64_t images, rows;

  explicit PoolStrips(const Conv2dProblem& p) {
    constexpr int64_t kBytes = int64_t{2} << 20;  // what stays in the caches of a few cores
    const int64_t row_bytes = std::max<int64_t>(4 * p.ow * p.k, 1);
    images = std::clamp<int64_t>(kBytes / (row_bytes * p.oh), 1, p.n);
    const int64_t tile = 4 * p.dilation_h;
    rows = images > 1 ? p.oh : std::min(p.oh, std::max(tile, kBytes / row_bytes / tile * tile));
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
                    const float* filter, const FilterForms* forms, const float* bias, float* y,
                    std::uint8_t* argmax) {
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
                  .packed = forms,
                  .out = scratch.floats()});
      const int64_t at = (n * p.oh + row) / 2 * (p.ow / 2) * p.k;
      kernels().max_pool2d_fprop(pool_behind(part), scratch.floats(), y + at,
                                 argmax ? argmax + at : nullptr);
    }
  }
}

// The convolution without the last row or column that no window sees.
Conv2dProblem seen_by_windows(const Conv2dProblem& p) {
  Conv2dProblem seen = as_computed(p);
  seen.oh -= seen.oh % 2;
  seen.ow -= seen.ow % 2;
  return seen;
}

}  // namespace

void conv2d_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter, const void* bias,
                       void* y, std::uint8_t* argmax, const char* algorithm) {
  conv2d_kept_pool_fprop(p, x, filter, bias, y, argmax, nullptr, algorithm);
}

void conv2d_kept_pool_fprop(const Conv2dProblem& p, const void* x, const void* filter,
                            const void* bias, void* y, std::uint8_t* argmax,
                            const FilterForms* forms, const char* algorithm) {
  const Pool2dProblem pool = pool_behind(p);
  const Conv2dProblem seen = seen_by_windows(p);
  // That of the convolution alone, so that both have the same bits.
  const cpu::Conv2dAlgorithm& alone = cpu::choose(as_computed(p), Direction::fprop, algorithm);
  const cpu::Conv2dAlgorithm& chosen =
      alone.serves(seen, Direction::fprop) ? alone : cpu::choose(seen, Direction::fprop, algorithm);
  if (p.n == 0) return;
  const Input own_filter(p.dtype, filter, p.filter_size()), own_bias(p.dtype, bias, p.k);
  const int64_t pixels = pool.oh * pool.ow;
  const bool turned = argmax && p.layout == Layout::nchw;
  for_each_part(
      p, images_a_part(p, bytes(p.filter_size())), [&](const Conv2dProblem& part, int64_t n) {
        const Conv2dProblem seen_part = seen_by_windows(part);
        const int64_t at_x = n * p.h * p.w * p.c, at_y = n * pixels * p.k;
        const Input own_x(part, from(p.dtype, x, at_x), p.h * p.w, p.c);
        const Output own_y(part, from(p.dtype, y, at_y), pixels, p.k);
        std::uint8_t* const own_argmax = argmax ? argmax + at_y : nullptr;
        const Workspace scratch(turned ? static_cast<std::size_t>(part.n * pixels * p.k) : 0);
        std::uint8_t* const taps =
            turned ? reinterpret_cast<std::uint8_t*>(scratch.floats()) : own_argmax;
        if (chosen.fuses_pool(seen, Direction::fprop)) {
          chosen.run(seen_part, Direction::fprop,
                     {.x = own_x.data(),
                      .filter = own_filter.data(),
                      .bias = own_bias.data(),
                      .packed = forms,
                      .out = own_y.data(),
                      .pooled = true,
                      .argmax = taps});
        } else {
          pool_by_strips(seen_part, chosen, own_x.data(), own_filter.data(), forms, own_bias.data(),
                         own_y.data(), taps);
        }
        own_y.finish();
        if (turned) kernels().transpose_bytes(part.n, pixels, p.k, taps, own_argmax);
      });
}

namespace {

// Of float32 tensors.
void pool_bprop_of_floats(const Conv2dProblem& p, const float* x, const float* filter,
                          const float* dy, const float* y, const std::uint8_t* argmax, float* dx,
                          float* dfilter, float* dbias, const char* algorithm) {
  const Pool2dProblem pool = pool_behind(p);
  const Conv2dProblem seen = seen_by_windows(p);
  const bool relu = p.activation == Activation::relu;
  const bool nhwc = p.layout == Layout::nhwc;
  using Use = cpu::PoolGradientUse;
  const Use use = nhwc ? cpu::use_of_pool_gradient(seen, dx != nullptr, algorithm) : Use::none;
  if (use != Use::none) {
    kernels().pool_gradient.run(seen, {.x = x,
                                       .filter = filter,
                                       .dy = dy,
                                       .y = relu ? y : nullptr,
                                       .argmax = argmax,
                                       .dx = use == Use::both ? dx : nullptr,
                                       .dfilter = dfilter,
                                       .dbias = dbias});
    if (use == Use::both || !dx) return;
  }
  if (!dx && nhwc) {
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
  if (use != Use::none) return;
  conv2d_wgrad(linear, x, dz.floats(), nullptr, dfilter, dbias, dx ? nullptr : algorithm);
}

}  // namespace

void conv2d_pool_bprop(const Conv2dProblem& p, const void* x, const void* filter, const void* dy,
                       const void* y, const std::uint8_t* argmax, void* dx, void* dfilter,
                       void* dbias, const char* algorithm) {
  const Pool2dProblem pool = pool_behind(p);
  if (p.n == 0) {
    if (dx) cpu::choose(as_computed(p), Direction::dgrad, algorithm);  // for its refusal
    return conv2d_wgrad(p, x, dy, y, dfilter, dbias, dx ? nullptr : algorithm);
  }
  // As a whole: the gradient of the convolution's output is one of float32 anyway.
  const bool relu = p.activation == Activation::relu;
  const Input own_x(p.dtype, x, p.x_size()), own_filter(p.dtype, filter, p.filter_size());
  const Input own_dy(p.dtype, dy, pool.y_size());
  const Input own_y(p.dtype, relu ? y : nullptr, pool.y_size());
  const Output own_dx(p.dtype, dx, p.x_size());
  const Output own_dfilter(p.dtype, dfilter, p.filter_size()), own_dbias(p.dtype, dbias, p.k);
  pool_bprop_of_floats(of_float32(p), own_x.data(), own_filter.data(), own_dy.data(), own_y.data(),
                       argmax, own_dx.data(), own_dfilter.data(), own_dbias.data(), algorithm);
  own_dx.finish();
  own_dfilter.finish();
  own_dbias.finish();
}

void to_float32(DataType type, int64_t count, const void* values, float* out) {
  if (type != DataType::float32) return kernels().widen(type, count, values, out);
  std::copy_n(static_cast<const float*>(values), count, out);
}

void from_float32(DataType type, int64_t count, const float* values, void* out) {
  if (type != DataType::float32) return kernels().narrow(type, count, values, out);
  std::copy_n(values, count, static_cast<float*>(out));
}

void batch_norm_moments(const BatchNormProblem& p, const float* x, float* mean, float* variance) {
  if (p.rows > 0 && p.channels > 0) return kernels().batch_norm_moments(p, x, mean, variance);
  std::fill_n(mean, p.channels, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(variance, p.channels, std::numeric_limits<float>::quiet_NaN());
}

void batch_norm_fprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta,
                      const float* residual, float* y) {
  if (p.rows == 0 || p.channels == 0) return;
  kernels().batch_norm_fprop(p, x, mean, variance, gamma, beta, residual, y);
}

void batch_norm_affine(const BatchNormProblem& p, const float* mean, const float* variance,
                       const float* gamma, const float* beta, const float* bias, float* scale,
                       float* offset) {
  // In float32, unlike the kernel's norm_scales: this is for each call of a small layer.
  for (int64_t c = 0; c < p.channels; ++c) {
    scale[c] = gamma[c] / std::sqrt(variance[c] + p.epsilon);
    offset[c] = beta[c] + ((bias ? bias[c] : 0.0f) - mean[c]) * scale[c];
  }
}

void batch_norm_bprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta, const float* dy,
                      const float* y, float* dx, float* dgamma, float* dbeta, float* dresidual) {
  if (p.rows == 0 || p.channels == 0) {
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

void conv2d_int8(const Conv2dProblem& p, const float* x, const std::int8_t* filter,
                 const float* filter_scale, const float* bias, float* y, const char* algorithm) {
  constexpr int64_t kMostProducts = int64_t{1} << 17;
  const int64_t taps = p.r * p.s;  // each below 2**31
  if (taps > kMostProducts || taps * p.c_per_group() > kMostProducts) {
    throw InvalidArgument(
        "A filter of int8 must have at most 2**17 taps times channels, whose sum fits 32 bits. "
        "Received: w.shape=(" +
        std::to_string(p.r) + ", " + std::to_string(p.s) + ", " + std::to_string(p.c_per_group()) +
        ", " + std::to_string(p.k) + ")");
  }
  const cpu::Int8Algorithm& chosen = cpu::choose_int8(as_computed(p), algorithm);
  if (p.n == 0) return;
  for_each_part(p, images_a_part(p, p.filter_size()), [&](const Conv2dProblem& part, int64_t n) {
    const Input x_nhwc(part, x + n * p.h * p.w * p.c, p.h * p.w, p.c);
    const Output y_nhwc(part, y + n * p.oh * p.ow * p.k, p.oh * p.ow, p.k);
    chosen.run(as_computed(part), {.x = x_nhwc.data(),
                                   .filter = filter,
                                   .filter_scale = filter_scale,
                                   .bias = bias,
                                   .y = y_nhwc.data()});
    y_nhwc.finish();
  });
}

}  // namespace fastconv
