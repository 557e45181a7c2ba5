// The C door: fastconv/fastconv.h on the core's operations. Exceptions end here, as a status and a
// message; null pointers and structs of another size are refused before anything is read through.
#include "fastconv/fastconv.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "core/cpu_features.hpp"
#include "core/error.hpp"
#include "core/operations.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"
#include "core/thread_pool.hpp"

namespace {

using std::int64_t;

// Of a fixed size: to report that memory is short takes none.
thread_local std::array<char, 1024> t_error{};

fastconv_status failed(fastconv_status status, const char* message) noexcept {
  std::size_t at = 0;
  for (; message[at] != '\0' && at + 1 < t_error.size(); ++at) t_error[at] = message[at];
  t_error[at] = '\0';
  return status;
}

template <class Body>
fastconv_status guarded(const Body& body) noexcept {
  try {
    body();
    return FASTCONV_OK;
  } catch (const fastconv::InvalidArgument& error) {
    return failed(FASTCONV_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return failed(FASTCONV_OUT_OF_MEMORY, "Out of memory.");
  } catch (const std::exception& error) {
    return failed(FASTCONV_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(FASTCONV_INTERNAL_ERROR, "An exception of an unknown type.");
  }
}

[[noreturn]] void refuse(const std::string& message) { throw fastconv::InvalidArgument(message); }

void require(const void* pointer, const char* name) {
  if (!pointer) refuse(std::string("`") + name + "` must not be null. Received: NULL");
}

// Of a tensor: an empty one needs no address.
void require(const void* pointer, int64_t elements, const char* name) {
  if (elements > 0) require(pointer, name);
}

template <class Struct>
void require_struct(const Struct* problem, const char* initializer) {
  require(problem, "problem");
  if (problem->struct_size != sizeof(Struct)) {
    refuse("`struct_size` must be " + std::to_string(sizeof(Struct)) + ", as " + initializer +
           " sets it. Received: struct_size=" + std::to_string(problem->struct_size));
  }
}

template <class Enum>
Enum choice(const char* name, std::int32_t value, std::int32_t most) {
  if (value < 0 || value > most) {
    refuse(std::string("`") + name + "` must be one of its enumeration, 0 to " +
           std::to_string(most) + ". Received: " + name + "=" + std::to_string(value));
  }
  return static_cast<Enum>(value);  // NOLINT
}

template <class Struct>
fastconv::Padding padding_of(const Struct& p) {
  return {choice<fastconv::Padding::Kind>("padding", p.padding, FASTCONV_EXPLICIT), p.pad_top,
          p.pad_bottom, p.pad_left, p.pad_right};
}

template <class Struct>
std::array<int64_t, 4> x_shape(const Struct& p, fastconv::Layout layout) {
  if (layout == fastconv::Layout::nchw) return {p.n, p.c, p.h, p.w};
  return {p.n, p.h, p.w, p.c};
}

fastconv::Conv2dProblem problem_of(const fastconv_conv2d* problem) {
  require_struct(problem, "FASTCONV_CONV2D_INIT");
  const fastconv_conv2d& p = *problem;
  if (p.reserved != 0) {
    refuse("`reserved` must be 0. Received: reserved=" + std::to_string(p.reserved));
  }
  if (p.groups < 1 || p.c % p.groups != 0) {
    refuse("`groups` must be positive and divide `c`. Received: groups=" +
           std::to_string(p.groups) + ", c=" + std::to_string(p.c));
  }
  const auto layout = choice<fastconv::Layout>("layout", p.layout, FASTCONV_NCHW);
  return fastconv::make_conv2d_problem(
      {.x_shape = x_shape(p, layout),
       .filter_shape = {p.r, p.s, p.c / p.groups, p.k},
       .strides = {p.stride_h, p.stride_w},
       .dilations = {p.dilation_h, p.dilation_w},
       .padding = padding_of(p),
       .groups = p.groups,
       .layout = layout,
       .activation = choice<fastconv::Activation>("activation", p.activation, FASTCONV_RELU)});
}

fastconv::Pool2dProblem problem_of(const fastconv_pool2d* problem) {
  require_struct(problem, "FASTCONV_POOL2D_INIT");
  const fastconv_pool2d& p = *problem;
  const auto layout = choice<fastconv::Layout>("layout", p.layout, FASTCONV_NCHW);
  return fastconv::make_pool2d_problem({.x_shape = x_shape(p, layout),
                                        .pool_size = {p.r, p.s},
                                        .strides = {p.stride_h, p.stride_w},
                                        .padding = padding_of(p),
                                        .layout = layout});
}

// The kernels trust an argmax; a caller's is looked at first.
template <class Index>
void require_taps(const Index* argmax, int64_t count, int64_t taps) {
  const auto outside = [taps](Index tap) {
    return static_cast<int64_t>(tap) < 0 || static_cast<int64_t>(tap) >= taps;
  };
  const Index* const found = std::find_if(argmax, argmax + count, outside);
  if (found != argmax + count) {
    refuse("`argmax` must hold values from 0 to " + std::to_string(taps - 1) +
           ", the taps of the window. Received: argmax with value " + std::to_string(*found));
  }
}

void require_y_of_relu(const fastconv::Conv2dProblem& p, const float* y, int64_t elements) {
  if (p.activation == fastconv::Activation::relu) require(y, elements, "y");
}

}  // namespace

struct fastconv_packed_filter : fastconv::PackedFilter {
  using PackedFilter::PackedFilter;
};

extern "C" {

FASTCONV_API const char* fastconv_last_error(void) { return t_error.data(); }

FASTCONV_API const char* fastconv_version(void) { return FASTCONV_VERSION; }

FASTCONV_API fastconv_status fastconv_get_num_threads(int* threads) {
  return guarded([&] {
    require(threads, "threads");
    *threads = fastconv::num_threads();
  });
}

FASTCONV_API fastconv_status fastconv_set_num_threads(int threads) {
  return guarded([&] { fastconv::set_num_threads(threads); });
}

FASTCONV_API fastconv_status fastconv_get_isa(const char** name) {
  return guarded([&] {
    require(static_cast<const void*>(name), "name");
    *name = fastconv::isa_name(fastconv::current_isa());
  });
}

FASTCONV_API fastconv_status fastconv_set_isa(const char* name) {
  return guarded([&] {
    require(name, "name");
    fastconv::set_isa(name);
  });
}

FASTCONV_API fastconv_status fastconv_set_accuracy(const char* name) {
  return guarded([&] {
    require(name, "name");
    fastconv::set_accuracy(name);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_output_shape(const fastconv_conv2d* problem,
                                                          int64_t shape[4]) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(shape, "shape");
    std::ranges::copy(p.y_shape(), shape);
  });
}

FASTCONV_API fastconv_status fastconv_pool2d_output_shape(const fastconv_pool2d* problem,
                                                          int64_t shape[4]) {
  return guarded([&] {
    const fastconv::Pool2dProblem p = problem_of(problem);
    require(shape, "shape");
    std::ranges::copy(p.y_shape(), shape);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_fprop(const fastconv_conv2d* problem, const float* x,
                                                   const float* filter, const float* bias,
                                                   float* y) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(x, p.x_size(), "x");
    require(filter, "filter");
    require(y, p.y_size(), "y");
    fastconv::conv2d_fprop(p, x, filter, bias, y);
  });
}

FASTCONV_API fastconv_status fastconv_packed_filter_create(const fastconv_conv2d* problem,
                                                           const float* values,
                                                           fastconv_packed_filter** filter) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(values, "values");
    require(static_cast<const void*>(filter), "filter");
    *filter = new fastconv_packed_filter(p.filter_shape(), values);
  });
}

FASTCONV_API void fastconv_packed_filter_destroy(fastconv_packed_filter* filter) { delete filter; }

FASTCONV_API fastconv_status fastconv_conv2d_packed_fprop(const fastconv_conv2d* problem,
                                                          const float* x,
                                                          const fastconv_packed_filter* filter,
                                                          const float* bias, float* y) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(x, p.x_size(), "x");
    require(static_cast<const void*>(filter), "filter");
    require(y, p.y_size(), "y");
    fastconv::conv2d_packed_fprop(p, x, *filter, bias, y);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_dgrad(const fastconv_conv2d* problem, const float* dy,
                                                   const float* filter, const float* y, float* dx) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(dy, p.y_size(), "dy");
    require(filter, "filter");
    require_y_of_relu(p, y, p.y_size());
    require(dx, p.x_size(), "dx");
    fastconv::conv2d_dgrad(p, dy, filter, y, dx);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_packed_dgrad(const fastconv_conv2d* problem,
                                                          const float* dy,
                                                          const fastconv_packed_filter* filter,
                                                          const float* y, float* dx) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    require(dy, p.y_size(), "dy");
    require(static_cast<const void*>(filter), "filter");
    require_y_of_relu(p, y, p.y_size());
    require(dx, p.x_size(), "dx");
    fastconv::conv2d_packed_dgrad(p, dy, *filter, y, dx);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_wgrad(const fastconv_conv2d* problem, const float* x,
                                                   const float* dy, const float* y, float* dfilter,
                                                   float* dbias) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    if (!dfilter && !dbias) {
      refuse("One of `dfilter` and `dbias` must not be null. Received: NULL and NULL");
    }
    if (dfilter) require(x, p.x_size(), "x");
    require(dy, p.y_size(), "dy");
    require_y_of_relu(p, y, p.y_size());
    fastconv::conv2d_wgrad(p, x, dy, y, dfilter, dbias);
  });
}

FASTCONV_API size_t fastconv_max_pool2d_argmax_bytes(const fastconv_pool2d* problem) {
  return problem && problem->r > 0 && problem->s > 0 && problem->r <= 256 / problem->s ? 1 : 4;
}

FASTCONV_API fastconv_status fastconv_max_pool2d_fprop(const fastconv_pool2d* problem,
                                                       const float* x, float* y, void* argmax) {
  return guarded([&] {
    const fastconv::Pool2dProblem p = problem_of(problem);
    require(x, p.x_size(), "x");
    require(y, p.y_size(), "y");
    fastconv::max_pool2d_fprop(p, x, y, argmax);
  });
}

FASTCONV_API fastconv_status fastconv_max_pool2d_bprop(const fastconv_pool2d* problem,
                                                       const float* dy, const void* argmax,
                                                       float* dx) {
  return guarded([&] {
    const fastconv::Pool2dProblem p = problem_of(problem);
    require(dy, p.y_size(), "dy");
    require(argmax, p.y_size(), "argmax");
    require(dx, p.x_size(), "dx");
    if (p.argmax_fits_byte()) {
      require_taps(static_cast<const std::uint8_t*>(argmax), p.y_size(), p.r * p.s);
    } else {
      require_taps(static_cast<const std::int32_t*>(argmax), p.y_size(), p.r * p.s);
    }
    fastconv::max_pool2d_bprop(p, dy, argmax, dx);
  });
}

FASTCONV_API fastconv_status fastconv_avg_pool2d_fprop(const fastconv_pool2d* problem,
                                                       const float* x, float* y) {
  return guarded([&] {
    const fastconv::Pool2dProblem p = problem_of(problem);
    require(x, p.x_size(), "x");
    require(y, p.y_size(), "y");
    fastconv::avg_pool2d_fprop(p, x, y);
  });
}

FASTCONV_API fastconv_status fastconv_avg_pool2d_bprop(const fastconv_pool2d* problem,
                                                       const float* dy, float* dx) {
  return guarded([&] {
    const fastconv::Pool2dProblem p = problem_of(problem);
    require(dy, p.y_size(), "dy");
    require(dx, p.x_size(), "dx");
    fastconv::avg_pool2d_bprop(p, dy, dx);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_max_pool2d_output_shape(const fastconv_conv2d* problem,
                                                                     int64_t shape[4]) {
  return guarded([&] {
    const fastconv::Pool2dProblem pool = fastconv::pool_behind(problem_of(problem));
    require(shape, "shape");
    std::ranges::copy(pool.y_shape(), shape);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_max_pool2d_fprop(const fastconv_conv2d* problem,
                                                              const float* x, const float* filter,
                                                              const float* bias, float* y,
                                                              uint8_t* argmax) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    const int64_t pooled = fastconv::pool_behind(p).y_size();
    require(x, p.x_size(), "x");
    require(filter, "filter");
    require(y, pooled, "y");
    fastconv::conv2d_pool_fprop(p, x, filter, bias, y, argmax);
  });
}

FASTCONV_API fastconv_status fastconv_conv2d_max_pool2d_bprop(const fastconv_conv2d* problem,
                                                              const float* x, const float* filter,
                                                              const float* dy, const float* y,
                                                              const uint8_t* argmax, float* dx,
                                                              float* dfilter, float* dbias) {
  return guarded([&] {
    const fastconv::Conv2dProblem p = problem_of(problem);
    const int64_t pooled = fastconv::pool_behind(p).y_size();
    require(x, p.x_size(), "x");
    if (dx) require(filter, "filter");
    require(dy, pooled, "dy");
    require_y_of_relu(p, y, pooled);
    require(argmax, pooled, "argmax");
    require(dfilter, "dfilter");
    require_taps(argmax, pooled, 4);
    fastconv::conv2d_pool_bprop(p, x, filter, dy, y, argmax, dx, dfilter, dbias);
  });
}

}  // extern "C"
