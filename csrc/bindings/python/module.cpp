// The Python door: NumPy arrays in, NumPy arrays out. It checks that the arrays are what the
// problem asks for, makes strided or misaligned ones dense, releases the GIL and calls the
// operation. Options arrive normalised by fastconv/_arguments.py; their values are checked by
// core/problem.hpp. std::invalid_argument, the base of InvalidArgument, becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/python/cuda.hpp"
#include "bindings/python/signatures.hpp"
#include "core/cpu_features.hpp"
#include "core/cpu_limits.hpp"
#include "core/error.hpp"
#include "core/operations.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/probe.hpp"
#include "cpu/reference.hpp"

namespace py = pybind11;

namespace {

using namespace fastconv::python;
using fastconv::DataType;
using fastconv::PackedFilter;
using std::int64_t;

// The arrays that kernels read, copied only where strides or alignment ask for it.
constexpr int kDense = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
py::array dense(const py::array& array) {
  py::array out = py::array::ensure(array, kDense);
  if (!out) throw std::bad_alloc();  // there is no other reason
  return out;
}

// --- arrays ---------------------------------------------------------------------------------------

// The functions behind one set of Python names: the kernels, the kernels timed, or the reference
// that tests compare them with.
struct Operations {
  bool of_16_bits;  // or of float32 alone
  decltype(&fastconv::conv2d_fprop) conv2d_fprop;
  decltype(&fastconv::conv2d_dgrad) conv2d_dgrad;
  decltype(&fastconv::conv2d_wgrad) conv2d_wgrad;
  decltype(&fastconv::max_pool2d_fprop) max_pool2d_fprop;
  decltype(&fastconv::max_pool2d_bprop) max_pool2d_bprop;
  decltype(&fastconv::avg_pool2d_fprop) avg_pool2d_fprop;
  decltype(&fastconv::avg_pool2d_bprop) avg_pool2d_bprop;
  decltype(&fastconv::conv2d_pool_fprop) conv2d_pool_fprop;
  decltype(&fastconv::conv2d_pool_bprop) conv2d_pool_bprop;
  decltype(&fastconv::conv2d_packed_fprop) conv2d_packed_fprop;
  decltype(&fastconv::conv2d_packed_dgrad) conv2d_packed_dgrad;
};

py::array require_array(py::handle object, const char* name) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(text("`", name, "` must be a NumPy array. Received: ", name, " of type ",
                              python_text(py::type::handle_of(object).attr("__name__"))));
  }
  return py::reinterpret_borrow<py::array>(object);
}

// None where the kernels take no such arrays. bfloat16, which is not NumPy's own, goes by its name: nothing
// need be imported.
std::optional<DataType> data_type_of(const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return DataType::float32;
  const py::dtype dtype = array.dtype();
  if (dtype.itemsize() != 2 || !dtype.attr("isnative").cast<bool>()) return std::nullopt;
  if (dtype.kind() == 'f') return DataType::float16;
  constexpr int kFirstUserType = 256;
  const bool is_bfloat16 =
      dtype.num() >= kFirstUserType && python_text(dtype.attr("name")) == "bfloat16";
  return is_bfloat16 ? std::optional(DataType::bfloat16) : std::nullopt;
}

Shape shape_of(const py::array& array, const char* name) {
  if (array.ndim() != 4) {
    throw fastconv::InvalidArgument(text("`", name, "` must have 4 dimensions. Received: ", name,
                                         ".shape=", python_text(array.attr("shape"))));
  }
  return {array.shape(0), array.shape(1), array.shape(2), array.shape(3)};
}

template <std::size_t Rank>
void require_shape(const py::array& array, const char* name,
                   const std::array<int64_t, Rank>& expected) {
  if (array.ndim() == Rank && std::equal(expected.begin(), expected.end(), array.shape())) return;
  throw fastconv::InvalidArgument(
      text("`", name, "` must have shape ", python_text(py::tuple(py::cast(expected))),
           ". Received: ", name, ".shape=", python_text(array.attr("shape"))));
}

// A new array. A large one begins at a multiple of 64 bytes: malloc's large blocks begin 16 bytes behind
// one, where each store of a vector of 64 bytes meets two lines of the cache and takes twice the time.
template <std::size_t Rank>
py::array new_array(const py::dtype& dtype, const std::array<int64_t, Rank>& shape) {
  constexpr int64_t kLine = 64, kLarge = 16384;
  int64_t bytes = dtype.itemsize();
  for (const int64_t extent : shape) {
    if (extent == 0 || bytes > std::numeric_limits<int64_t>::max() / extent)
      return {dtype, shape};  // nothing, or more than there is: NumPy says so
    bytes *= extent;
  }
  if (bytes < kLarge || bytes > std::numeric_limits<int64_t>::max() - kLine) return {dtype, shape};
  const py::array memory(py::dtype("uint8"), std::array{bytes + kLine});
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  const auto* const data =
      static_cast<const char*>(memory.data()) + (kLine - begin % kLine) % kLine;
  return {dtype, shape, data, memory};
}

// The dtype of all floating-point arrays of a call: that of the first.
class Dtype {
 public:
  // Throws TypeError where `first` has none of those that `operations` take.
  Dtype(const Operations& operations, const py::array& first, const char* name)
      : dtype_(first.dtype()), name_(name) {
    const std::optional<DataType> type = data_type_of(first);
    if (type == DataType::float32 || (type && operations.of_16_bits)) {
      type_ = *type;
      return;
    }
    throw py::type_error(text("`", name, "` must have dtype float32",
                              operations.of_16_bits ? ", float16 or bfloat16" : "",
                              " in native byte order. Received: ", name,
                              ".dtype=", python_text(dtype_)));
  }
  py::array require(py::handle object, const char* name) const {
    py::array array = require_array(object, name);
    if (data_type_of(array) == type_) return array;
    throw py::type_error(text("`", name, "` must have dtype ", python_text(dtype_),
                              " in native byte order, as `", name_, "` has. Received: ", name,
                              ".dtype=", python_text(array.dtype())));
  }
  template <std::size_t Rank>
  py::array require(py::handle object, const char* name,
                    const std::array<int64_t, Rank>& shape) const {
    py::array array = require(object, name);
    require_shape(array, name, shape);
    return array;
  }
  template <std::size_t Rank>
  py::array make(const std::array<int64_t, Rank>& shape) const {
    return new_array(dtype_, shape);
  }
  DataType type() const { return type_; }
  template <class Problem>
  Problem set_in(Problem problem) const {
    problem.dtype = type_;
    return problem;
  }

 private:
  DataType type_ = DataType::float32;
  py::dtype dtype_;
  const char* name_;
};

// An optional input: None gives an empty holder, whose data() is null.
class OptionalInput {
 public:
  template <std::size_t Rank>
  OptionalInput(const Dtype& dtype, const py::object& object, const char* name,
                const std::array<int64_t, Rank>& shape) {
    if (!object.is_none()) array_.emplace(dense(dtype.require(object, name, shape)));
  }
  const void* data() const { return array_ ? array_->data() : nullptr; }
  // The array, or an empty one.
  py::array array() const { return array_ ? *array_ : py::array(); }

 private:
  std::optional<py::array> array_;
};

// fprop's output, which the backward passes need where ReLU has zeroed part of it.
OptionalInput require_output(const fastconv::Conv2dProblem& problem, const Dtype& dtype,
                             const py::object& output) {
  if (problem.activation == fastconv::Activation::relu && output.is_none()) {
    throw fastconv::InvalidArgument(
        "`output`, the result of conv2d, is required with activation='relu'. "
        "Received: output=None");
  }
  return {dtype, output, "output", problem.y_shape()};
}

// The memory of an array's elements, from the first byte to behind the last one.
std::pair<const char*, const char*> extent(const py::array& array) {
  const char* low = static_cast<const char*>(array.data());
  const char* high = low + array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.shape(i) == 0) return {low, low};
    const py::ssize_t reach = (array.shape(i) - 1) * array.strides(i);
    (reach < 0 ? low : high) += reach;
  }
  return {low, high};
}

// Where a result goes: `out`, checked, or a new array where it is None. Kernels write while they
// read, so that memory shared with an input would spoil the result.
template <class... Inputs>
py::array result_array(const Dtype& dtype, const py::object& out, const Shape& shape,
                       const Inputs&... inputs) {
  if (out.is_none()) return dtype.make(shape);
  py::array array = dtype.require(out, "out", shape);
  constexpr int kFlags = kDense | int{py::detail::npy_api::NPY_ARRAY_WRITEABLE_};
  if ((array.flags() & kFlags) != kFlags) {
    throw fastconv::InvalidArgument(
        text("`out` must be C-contiguous, aligned and writeable. Received: out with strides ",
             python_text(array.attr("strides")), array.writeable() ? "" : ", not writeable"));
  }
  const auto [low, high] = extent(array);
  for (const auto& [input_low, input_high] : {extent(inputs)...}) {
    if (low < input_high && input_low < high) {
      throw fastconv::InvalidArgument(
          "`out` must not share memory with an input. Received: out that does");
    }
  }
  return array;
}

// --- convolution ----------------------------------------------------------------------------------

constexpr Operations kKernels{true,
                              fastconv::conv2d_fprop,
                              fastconv::conv2d_dgrad,
                              fastconv::conv2d_wgrad,
                              fastconv::max_pool2d_fprop,
                              fastconv::max_pool2d_bprop,
                              fastconv::avg_pool2d_fprop,
                              fastconv::avg_pool2d_bprop,
                              fastconv::conv2d_pool_fprop,
                              fastconv::conv2d_pool_bprop,
                              fastconv::conv2d_packed_fprop,
                              fastconv::conv2d_packed_dgrad};

// The reference is one algorithm, of float32: a name that the caller gives is not looked at.
template <class Pointer>
using Untyped = std::conditional_t<
    std::is_same_v<Pointer, float*>, void*,
    std::conditional_t<std::is_same_v<Pointer, const float*>, const void*, Pointer>>;
template <auto function>
struct OfFloats;
template <class Problem, class... Pointers, void (*function)(const Problem&, Pointers...)>
struct OfFloats<function> {
  static void call(const Problem& problem, Untyped<Pointers>... pointers) {
    function(problem, static_cast<Pointers>(pointers)...);
  }
  static void convolve(const Problem& problem, Untyped<Pointers>... pointers, const char*) {
    call(problem, pointers...);
  }
};

void reference_of_packed(const fastconv::Conv2dProblem& problem, const float* x,
                         const PackedFilter& filter, const float* bias, float* y, const char*) {
  fastconv::reference::conv2d_fprop(problem, x, filter.values(), bias, y);
}
void reference_of_packed_dgrad(const fastconv::Conv2dProblem& problem, const float* dy,
                               const PackedFilter& filter, const float* y, float* dx, const char*) {
  fastconv::reference::conv2d_dgrad(problem, dy, filter.values(), y, dx);
}

constexpr Operations kReference{false,
                                OfFloats<fastconv::reference::conv2d_fprop>::convolve,
                                OfFloats<fastconv::reference::conv2d_dgrad>::convolve,
                                OfFloats<fastconv::reference::conv2d_wgrad>::convolve,
                                OfFloats<fastconv::reference::max_pool2d_fprop>::call,
                                OfFloats<fastconv::reference::max_pool2d_bprop>::call,
                                OfFloats<fastconv::reference::avg_pool2d_fprop>::call,
                                OfFloats<fastconv::reference::avg_pool2d_bprop>::call,
                                OfFloats<fastconv::reference::conv2d_pool_fprop>::convolve,
                                OfFloats<fastconv::reference::conv2d_pool_bprop>::convolve,
                                reference_of_packed,
                                reference_of_packed_dgrad};

// For benchmarks: one call from Python runs the kernel `calls` times and notes what each run took,
// so that neither Python nor the checks of this file are in the time.
struct Stopwatch {
  int64_t calls = 1;
  std::vector<int64_t> nanoseconds;
};
thread_local Stopwatch t_stopwatch;

template <auto operation>
struct Timed;
template <class... Arguments, void (*operation)(Arguments...)>
struct Timed<operation> {
  static void run(Arguments... arguments) {
    using Clock = std::chrono::steady_clock;
    t_stopwatch.nanoseconds.clear();
    for (int64_t i = 0; i < t_stopwatch.calls; ++i) {
      const Clock::time_point start = Clock::now();
      operation(arguments...);
      t_stopwatch.nanoseconds.push_back(
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
    }
  }
};

constexpr Operations kTimed{true,
                            Timed<fastconv::conv2d_fprop>::run,
                            Timed<fastconv::conv2d_dgrad>::run,
                            Timed<fastconv::conv2d_wgrad>::run,
                            Timed<fastconv::max_pool2d_fprop>::run,
                            Timed<fastconv::max_pool2d_bprop>::run,
                            Timed<fastconv::avg_pool2d_fprop>::run,
                            Timed<fastconv::avg_pool2d_bprop>::run,
                            Timed<fastconv::conv2d_pool_fprop>::run,
                            Timed<fastconv::conv2d_pool_bprop>::run,
                            Timed<fastconv::conv2d_packed_fprop>::run,
                            Timed<fastconv::conv2d_packed_dgrad>::run};

const float* floats(const void* data) { return static_cast<const float*>(data); }

// What a PackedFilter meets.
void require_float32(const Dtype& dtype, const py::array& array, const char* name) {
  if (dtype.type() == DataType::float32) return;
  throw py::type_error(text("`", name,
                            "` must have dtype float32, as a PackedFilter has. Received: ", name,
                            ".dtype=", python_text(array.dtype())));
}

// The caller has the filter as an argument, so that it outlives the call.
template <const Operations& operations>
py::array conv2d_packed(const py::array& x_array, const Dtype& dtype, const PackedFilter& filter,
                        const py::object& bias_object, const Conv2dOptions& options,
                        const py::object& out) {
  require_float32(dtype, x_array, "x");
  const auto problem = options.problem(shape_of(x_array, "x"), filter.shape());
  const OptionalInput bias(dtype, bias_object, "bias", std::array{problem.k});
  py::array y = result_array(dtype, out, problem.y_shape(), x_array, bias.array());
  const py::array x = dense(x_array);
  float* const y_data = static_cast<float*>(y.mutable_data());
  const GilReleased unlocked;
  operations.conv2d_packed_fprop(problem, floats(x.data()), filter, floats(bias.data()), y_data,
                                 options.algorithm_name());
  return y;
}

template <const Operations& operations>
py::array conv2d(const py::object& x_object, const py::object& w_object,
                 const py::object& bias_object, const Conv2dOptions& options,
                 const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  if (py::isinstance<PackedFilter>(w_object)) {
    return conv2d_packed<operations>(x_array, dtype, w_object.cast<const PackedFilter&>(),
                                     bias_object, options, out);
  }
  const py::array w_array = dtype.require(w_object, "w");
  const auto problem =
      dtype.set_in(options.problem(shape_of(x_array, "x"), shape_of(w_array, "w")));
  const OptionalInput bias(dtype, bias_object, "bias", std::array{problem.k});

  py::array y = result_array(dtype, out, problem.y_shape(), x_array, w_array, bias.array());
  const py::array x = dense(x_array), w = dense(w_array);
  void* const y_data = y.mutable_data();
  const GilReleased unlocked;
  operations.conv2d_fprop(problem, x.data(), w.data(), bias.data(), y_data,
                          options.algorithm_name());
  return y;
}

template <const Operations& operations>
py::array grad_input_packed(const py::object& dy_object, const PackedFilter& filter,
                            const Shape& input_shape, const py::object& output_object,
                            const Conv2dOptions& options, const py::object& out) {
  const py::array any_dy = require_array(dy_object, "dy");
  const Dtype dtype(operations, any_dy, "dy");
  require_float32(dtype, any_dy, "dy");
  const auto problem = options.problem(input_shape, filter.shape(), "input_shape");
  const py::array dy_array = dtype.require(any_dy, "dy", problem.y_shape());
  const OptionalInput output = require_output(problem, dtype, output_object);

  py::array dx = result_array(dtype, out, problem.x_shape(), dy_array, output.array());
  const py::array dy = dense(dy_array);
  float* const dx_data = static_cast<float*>(dx.mutable_data());
  const GilReleased unlocked;
  operations.conv2d_packed_dgrad(problem, floats(dy.data()), filter, floats(output.data()), dx_data,
                                 options.algorithm_name());
  return dx;
}

template <const Operations& operations>
py::array conv2d_grad_input(const py::object& dy_object, const py::object& w_object,
                            const Shape& input_shape, const py::object& output_object,
                            const Conv2dOptions& options, const py::object& out) {
  if (py::isinstance<PackedFilter>(w_object)) {
    return grad_input_packed<operations>(dy_object, w_object.cast<const PackedFilter&>(),
                                         input_shape, output_object, options, out);
  }
  const py::array w_array = require_array(w_object, "w");
  const Dtype dtype(operations, w_array, "w");
  const auto problem =
      dtype.set_in(options.problem(input_shape, shape_of(w_array, "w"), "input_shape"));
  const py::array dy_array = dtype.require(dy_object, "dy", problem.y_shape());
  const OptionalInput output = require_output(problem, dtype, output_object);

  py::array dx = result_array(dtype, out, problem.x_shape(), dy_array, w_array, output.array());
  const py::array dy = dense(dy_array), w = dense(w_array);
  void* const dx_data = dx.mutable_data();
  const GilReleased unlocked;
  operations.conv2d_dgrad(problem, dy.data(), w.data(), output.data(), dx_data,
                          options.algorithm_name());
  return dx;
}

template <const Operations& operations>
py::object conv2d_grad_filter(const py::object& x_object, const py::object& dy_object,
                              const Shape& filter_shape, const py::object& output_object,
                              bool return_bias_grad, const Conv2dOptions& options,
                              const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  const auto problem = dtype.set_in(
      options.problem(shape_of(x_array, "x"), filter_shape, "x.shape", "filter_shape"));
  const py::array dy_array = dtype.require(dy_object, "dy", problem.y_shape());
  const OptionalInput output = require_output(problem, dtype, output_object);

  py::array dw =
      result_array(dtype, out, problem.filter_shape(), x_array, dy_array, output.array());
  std::optional<py::array> dbias;
  if (return_bias_grad) dbias.emplace(dtype.make(std::array{problem.k}));
  const py::array x = dense(x_array), dy = dense(dy_array);
  void* const dw_data = dw.mutable_data();
  void* const dbias_data = dbias ? dbias->mutable_data() : nullptr;
  {
    const GilReleased unlocked;
    operations.conv2d_wgrad(problem, x.data(), dy.data(), output.data(), dw_data, dbias_data,
                            options.algorithm_name());
  }
  if (!dbias) return dw;
  return py::make_tuple(dw, *dbias);
}

// --- pooling --------------------------------------------------------------------------------------

template <const Operations& operations>
py::object max_pool2d(const py::object& x_object, bool return_argmax, const Pool2dOptions& options,
                      const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  const auto problem = dtype.set_in(options.problem(shape_of(x_array, "x")));

  py::array y = result_array(dtype, out, problem.y_shape(), x_array);
  std::optional<py::array> argmax;
  if (return_argmax) {
    argmax.emplace(new_array(
        problem.argmax_fits_byte() ? py::dtype::of<std::uint8_t>() : py::dtype::of<std::int32_t>(),
        problem.y_shape()));
  }
  const py::array x = dense(x_array);
  void* const y_data = y.mutable_data();
  void* const argmax_data = argmax ? argmax->mutable_data() : nullptr;
  {
    const GilReleased unlocked;
    operations.max_pool2d_fprop(problem, x.data(), y_data, argmax_data);
  }
  if (!argmax) return y;
  return py::make_tuple(y, *argmax);
}

// Every value must name a tap of the window: others belong to another pooling, and would be lost
// without a word. A tap in the padding is for the kernels to skip.
template <class T>
void require_taps(const T* argmax, int64_t count, const fastconv::Pool2dProblem& problem) {
  const int64_t taps = problem.r * problem.s;
  constexpr int64_t kTask = int64_t{1} << 16;
  std::atomic<int64_t> wrong{0};  // the value of one that is none, if there is
  fastconv::parallel_for((count + kTask - 1) / kTask, [&](int64_t task) {
    const T* const begin = argmax + task * kTask;
    T least = 0, most = 0;
    const int64_t size = std::min(kTask, count - task * kTask);
    for (int64_t i = 0; i < size; ++i) {
      least = std::min(least, begin[i]);
      most = std::max(most, begin[i]);
    }
    if (least < 0 || most >= taps) wrong = least < 0 ? least : most;
  });
  if (wrong == 0) return;
  throw fastconv::InvalidArgument(text("`argmax` must hold values from 0 to ", taps - 1,
                                       ", the taps of the window. Received: argmax with value ",
                                       wrong.load()));
}

template <const Operations& operations, class T>
py::array scatter(const fastconv::Pool2dProblem& problem, const Dtype& dtype,
                  const py::array& dy_array, const py::array& argmax_array, const py::object& out) {
  py::array dx = result_array(dtype, out, problem.x_shape(), dy_array, argmax_array);
  const py::array dy = dense(dy_array);
  const py::array argmax_values = dense(argmax_array);
  const T* const argmax = static_cast<const T*>(argmax_values.data());
  void* const dx_data = dx.mutable_data();
  const GilReleased unlocked;
  require_taps(argmax, problem.y_size(), problem);
  operations.max_pool2d_bprop(problem, dy.data(), argmax, dx_data);
  return dx;
}

template <const Operations& operations>
py::array max_pool2d_grad(const py::object& dy_object, const py::object& argmax_object,
                          const Shape& input_shape, const Pool2dOptions& options,
                          const py::object& out) {
  const py::array dy = require_array(dy_object, "dy");
  const Dtype dtype(operations, dy, "dy");
  const auto problem = dtype.set_in(options.problem(input_shape, "input_shape"));
  require_shape(dy, "dy", problem.y_shape());
  const py::array argmax = require_array(argmax_object, "argmax");
  const bool is_byte = problem.argmax_fits_byte();
  if (!(is_byte ? py::isinstance<py::array_t<std::uint8_t>>(argmax)
                : py::isinstance<py::array_t<std::int32_t>>(argmax))) {
    throw py::type_error(text("`argmax` must have dtype ", is_byte ? "uint8" : "int32",
                              " with a window of ", problem.r, " x ", problem.s,
                              ". Received: argmax.dtype=", python_text(argmax.dtype())));
  }
  require_shape(argmax, "argmax", problem.y_shape());
  return is_byte ? scatter<operations, std::uint8_t>(problem, dtype, dy, argmax, out)
                 : scatter<operations, std::int32_t>(problem, dtype, dy, argmax, out);
}

template <const Operations& operations>
py::array avg_pool2d(const py::object& x_object, const Pool2dOptions& options,
                     const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  const auto problem = dtype.set_in(options.problem(shape_of(x_array, "x")));
  py::array y = result_array(dtype, out, problem.y_shape(), x_array);
  const py::array x = dense(x_array);
  void* const y_data = y.mutable_data();
  const GilReleased unlocked;
  operations.avg_pool2d_fprop(problem, x.data(), y_data);
  return y;
}

template <const Operations& operations>
py::array avg_pool2d_grad(const py::object& dy_object, const Shape& input_shape,
                          const Pool2dOptions& options, const py::object& out) {
  const py::array dy_array = require_array(dy_object, "dy");
  const Dtype dtype(operations, dy_array, "dy");
  const auto problem = dtype.set_in(options.problem(input_shape, "input_shape"));
  require_shape(dy_array, "dy", problem.y_shape());
  py::array dx = result_array(dtype, out, problem.x_shape(), dy_array);
  const py::array dy = dense(dy_array);
  void* const dx_data = dx.mutable_data();
  const GilReleased unlocked;
  operations.avg_pool2d_bprop(problem, dy.data(), dx_data);
  return dx;
}

// --- convolution and pooling in one ---------------------------------------------------------------

template <const Operations& operations>
py::object conv2d_max_pool2d(const py::object& x_object, const py::object& w_object,
                             const py::object& bias_object, bool return_argmax,
                             const Conv2dOptions& options, const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  const py::array w_array = dtype.require(w_object, "w");
  const auto problem =
      dtype.set_in(options.problem(shape_of(x_array, "x"), shape_of(w_array, "w")));
  const auto pool = fastconv::pool_behind(problem);
  const OptionalInput bias(dtype, bias_object, "bias", std::array{problem.k});

  py::array y = result_array(dtype, out, pool.y_shape(), x_array, w_array, bias.array());
  std::optional<py::array_t<std::uint8_t>> argmax;
  if (return_argmax) argmax.emplace(new_array(py::dtype::of<std::uint8_t>(), pool.y_shape()));
  const py::array x = dense(x_array), w = dense(w_array);
  void* const y_data = y.mutable_data();
  std::uint8_t* const argmax_data = argmax ? argmax->mutable_data() : nullptr;
  {
    const GilReleased unlocked;
    operations.conv2d_pool_fprop(problem, x.data(), w.data(), bias.data(), y_data, argmax_data,
                                 options.algorithm_name());
  }
  if (!argmax) return y;
  return py::make_tuple(y, *argmax);
}

template <const Operations& operations>
py::tuple conv2d_max_pool2d_grad(const py::object& x_object, const py::object& w_object,
                                 const py::object& dy_object, const py::object& output_object,
                                 const py::object& argmax_object, bool with_input_grad,
                                 const Conv2dOptions& options) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(operations, x_array, "x");
  const py::array w_array = dtype.require(w_object, "w");
  const auto problem =
      dtype.set_in(options.problem(shape_of(x_array, "x"), shape_of(w_array, "w")));
  const auto pool = fastconv::pool_behind(problem);
  const py::array dy_array = dtype.require(dy_object, "dy", pool.y_shape());
  const py::array output = dense(dtype.require(output_object, "output", pool.y_shape()));
  const py::array argmax_array = require_array(argmax_object, "argmax");
  if (!py::isinstance<py::array_t<std::uint8_t>>(argmax_array)) {
    throw py::type_error(text("`argmax` must have dtype uint8. Received: argmax.dtype=",
                              python_text(argmax_array.dtype())));
  }
  require_shape(argmax_array, "argmax", pool.y_shape());

  std::optional<py::array> dx;
  if (with_input_grad) dx.emplace(dtype.make(problem.x_shape()));
  py::array dw = dtype.make(problem.filter_shape());
  py::array dbias = dtype.make(std::array{problem.k});
  const py::array x = dense(x_array), w = dense(w_array), dy = dense(dy_array);
  const py::array argmax_values = dense(argmax_array);
  const auto* const argmax = static_cast<const std::uint8_t*>(argmax_values.data());
  void* const dx_data = dx ? dx->mutable_data() : nullptr;
  void* const dw_data = dw.mutable_data();
  void* const dbias_data = dbias.mutable_data();
  {
    const GilReleased unlocked;
    require_taps(argmax, pool.y_size(), pool);
    operations.conv2d_pool_bprop(problem, x.data(), w.data(), dy.data(), output.data(), argmax,
                                 dx_data, dw_data, dbias_data, options.algorithm_name());
  }
  return py::make_tuple(dx ? py::object(*dx) : py::object(py::none()), dw, dbias);
}

// --- conversion -----------------------------------------------------------------------------------

// One-dimensional, for tests.
py::array widened(const py::array& array) {
  const Dtype dtype(kKernels, array, "array");
  py::array_t<float> out(array.size());
  const py::array values = dense(array);
  fastconv::to_float32(dtype.type(), array.size(), values.data(), out.mutable_data());
  return out;
}

py::array narrowed(const py::array& array, const py::dtype& type) {
  const Dtype floats(kReference, array, "array");
  const std::array count{static_cast<int64_t>(array.size())};
  py::array out(type, count);
  const Dtype dtype(kKernels, out, "dtype");
  const py::array values = dense(array);
  fastconv::from_float32(dtype.type(), array.size(), static_cast<const float*>(values.data()),
                         out.mutable_data());
  return out;
}

// --- convolution of int8 --------------------------------------------------------------------------

constexpr Operations kOfFloat32{};  // which types stand beside int8

py::array conv2d_int8(const py::object& x_object, const py::object& w_object,
                      const py::object& w_scale_object, const py::object& bias_object,
                      const Conv2dOptions& options, const py::object& out) {
  const py::array x_array = require_array(x_object, "x");
  const Dtype dtype(kOfFloat32, x_array, "x");
  const py::array w_array = require_array(w_object, "w");
  if (!py::isinstance<py::array_t<std::int8_t>>(w_array)) {
    throw py::type_error(text("`w` must have dtype int8, as quantize_filter returns it. ",
                              "Received: w.dtype=", python_text(w_array.dtype())));
  }
  const auto problem = options.problem(shape_of(x_array, "x"), shape_of(w_array, "w"));
  const py::array w_scale = dense(dtype.require(w_scale_object, "w_scale", std::array{problem.k}));
  const OptionalInput bias(dtype, bias_object, "bias", std::array{problem.k});

  py::array y =
      result_array(dtype, out, problem.y_shape(), x_array, w_array, w_scale, bias.array());
  const py::array x = dense(x_array), w = dense(w_array);
  float* const y_data = static_cast<float*>(y.mutable_data());
  const GilReleased unlocked;
  fastconv::conv2d_int8(problem, floats(x.data()), static_cast<const std::int8_t*>(w.data()),
                        floats(w_scale.data()), floats(bias.data()), y_data,
                        options.algorithm_name());
  return y;
}

void define_int8(py::module_& m) {
  m.def(
      "conv2d_int8",
      [](const py::object& x, const py::object& w, const py::object& w_scale,
         const py::object& bias, Pair strides, PaddingOption padding, Pair dilation_rate,
         int64_t groups, std::string activation, std::string data_format,
         std::optional<std::string> algorithm, const py::object& out) {
        return conv2d_int8(x, w, w_scale, bias,
                           {strides, std::move(padding), dilation_rate, groups,
                            std::move(activation), std::move(data_format), std::move(algorithm)},
                           out);
      },
      py::arg("x"), py::arg("w"), py::arg("w_scale"), py::arg("bias"), py::arg("strides"),
      py::arg("padding"), py::arg("dilation_rate"), py::arg("groups"), py::arg("activation"),
      py::arg("data_format"), py::arg("algorithm") = py::none(), py::arg("out") = py::none());
}

// --- module ---------------------------------------------------------------------------------------

// As define_operations takes them.
template <const Operations& operations>
struct OnHost {
  static constexpr auto conv2d = &::conv2d<operations>;
  static constexpr auto conv2d_grad_input = &::conv2d_grad_input<operations>;
  static constexpr auto conv2d_grad_filter = &::conv2d_grad_filter<operations>;
  static constexpr auto max_pool2d = &::max_pool2d<operations>;
  static constexpr auto max_pool2d_grad = &::max_pool2d_grad<operations>;
  static constexpr auto avg_pool2d = &::avg_pool2d<operations>;
  static constexpr auto avg_pool2d_grad = &::avg_pool2d_grad<operations>;
  static constexpr auto conv2d_max_pool2d = &::conv2d_max_pool2d<operations>;
  static constexpr auto conv2d_max_pool2d_grad = &::conv2d_max_pool2d_grad<operations>;
};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (fastconv::Isa isa : fastconv::available_isas()) names.emplace_back(isa_name(isa));
  return names;
}

void define_packed_filter(py::module_& m) {
  py::class_<PackedFilter>(m, "PackedFilter")
      .def(py::init([](const py::object& w_object) {
             const py::array w_array = require_array(w_object, "w");
             if (data_type_of(w_array) != DataType::float32) {
               throw py::type_error(
                   text("`w` must have dtype float32 in native byte order. Received: "
                        "w.dtype=",
                        python_text(w_array.dtype())));
             }
             const Shape shape = shape_of(w_array, "w");
             const py::array w = dense(w_array);
             return std::make_unique<PackedFilter>(shape, floats(w.data()));
           }),
           py::arg("w"))
      .def_property_readonly(
          "shape", [](const PackedFilter& filter) { return py::tuple(py::cast(filter.shape())); })
      .def_property_readonly("nbytes", [](const PackedFilter& filter) { return filter.bytes(); })
      .def("array", [](const PackedFilter& filter) {
        return py::array_t<float>(filter.shape(), filter.values());  // a copy
      });
}

void set_num_threads(int64_t threads) {
  // What no int holds would reach the core as another number.
  if (threads != static_cast<int>(threads)) {
    throw fastconv::InvalidArgument(
        text("`num_threads` must be an integer from 1 to 1024. Received: num_threads=", threads));
  }
  fastconv::set_num_threads(static_cast<int>(threads));
}

void set_timed_calls(int64_t calls) {
  if (calls < 1) {
    throw fastconv::InvalidArgument(text("calls must be at least 1. Received: calls=", calls));
  }
  t_stopwatch.calls = calls;
}

double measured_flops(double seconds) {
  const GilReleased unlocked;
  return fastconv::probe::flops(seconds);
}

double measured_bandwidth(const std::string& stream, int64_t bytes, double seconds) {
  using fastconv::probe::Stream;
  const Stream parsed = parse<Stream, 3>(
      "stream", stream,
      {{{"read", Stream::read}, {"write", Stream::write}, {"copy", Stream::copy}}});
  const GilReleased unlocked;
  return fastconv::probe::bandwidth(parsed, bytes, seconds);
}

// What explain() returns: plain Python objects.
py::dict explain(const Shape& input_shape, const Shape& filter_shape, const std::string& direction,
                 Pair strides, PaddingOption padding, Pair dilation_rate, int64_t groups,
                 std::string activation, std::string data_format, const std::string& dtype) {
  const Conv2dOptions options{strides, std::move(padding),    dilation_rate,
                              groups,  std::move(activation), std::move(data_format),
                              {}};
  auto problem = options.problem(input_shape, filter_shape, "input_shape", "filter_shape");
  problem.dtype = parse_dtype(dtype);
  const fastconv::Direction parsed = parse_direction(direction);
  fastconv::Explanation explanation;
  {
    const GilReleased unlocked;  // the first call measures the machine
    explanation = fastconv::explain(problem, parsed);
  }
  py::list candidates;
  for (const auto& candidate : explanation.candidates) {
    candidates.append(py::dict(py::arg("algorithm") = candidate.algorithm,
                               py::arg("predicted_seconds") = candidate.predicted_seconds,
                               py::arg("allowed") = candidate.allowed));
  }
  return py::dict(py::arg("algorithm") = explanation.algorithm,
                  py::arg("blocking") = explanation.blocking,
                  py::arg("workspace_bytes") = explanation.workspace_bytes,
                  py::arg("flops") = explanation.flops,
                  py::arg("predicted_seconds") = explanation.predicted_seconds,
                  py::arg("candidates") = candidates);
}

}  // namespace

// What is shared between calls is atomic, locked or a thread's own, here and below (see "Threads" in
// docs/trust.md), so that a free-threaded Python need not bring its GIL back.
PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled part of fastconv; use it through fastconv's own functions.";
  m.attr("__version__") = FASTCONV_VERSION;
  define_packed_filter(m);
  define_operations<OnHost<kKernels>>(m);
  define_int8(m);
  py::module_ reference = m.def_submodule(
      "reference", "The same operations, slow and obvious: what tests compare the kernels with.");
  define_operations<OnHost<kReference>>(reference);
  py::module_ timed = m.def_submodule(
      "timed", "The kernels again, each run `calls` times in one call; for benchmarks.");
  define_operations<OnHost<kTimed>>(timed);
  timed.def("set_calls", &set_timed_calls, py::arg("calls"));
  timed.def("nanoseconds", [] { return t_stopwatch.nanoseconds; });
  timed.def("flops", &measured_flops, py::arg("seconds"));
  timed.def("bandwidth", &measured_bandwidth, py::arg("stream"), py::arg("bytes"),
            py::arg("seconds"));
  py::module_ cuda = m.def_submodule("cuda", "The operations on a GPU, and arrays there.");
  define_cuda(cuda);
  m.def("widened", &widened, py::arg("array"));
  m.def("narrowed", &narrowed, py::arg("array"), py::arg("dtype"));
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  m.def("get_num_threads", &fastconv::num_threads);
  m.def("num_threads_is_default", &fastconv::num_threads_is_default);
  m.def("cgroup_cpus", &fastconv::cgroup_cpus, py::arg("root") = "");
  m.def("isa", [] { return fastconv::isa_name(fastconv::current_isa()); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &fastconv::set_isa, py::arg("name"));
  m.def("set_accuracy", &fastconv::set_accuracy, py::arg("accuracy"));
  m.def("accuracy", [] { return fastconv::accuracy_name(fastconv::current_accuracy()); });
  m.def("set_algorithm", &fastconv::set_preferred_algorithm, py::arg("algorithm"));
  m.def("algorithm", &fastconv::preferred_algorithm);
  m.def("workspace_bytes", [] {
    const fastconv::WorkspaceBytes bytes = fastconv::workspace_bytes();
    return std::pair(bytes.in_use, bytes.kept);
  });
  m.def("explain", &explain, py::arg("input_shape"), py::arg("filter_shape"), py::arg("direction"),
        py::arg("strides"), py::arg("padding"), py::arg("dilation_rate"), py::arg("groups"),
        py::arg("activation"), py::arg("data_format"), py::arg("dtype"));
}
