// The Python door: NumPy arrays in, NumPy arrays out. It checks that the arrays are what the
// problem asks for, makes strided or misaligned ones dense, releases the GIL and calls the
// operation. Options arrive normalised by fastconv/_arguments.py; their values are checked by
// core/problem.hpp. std::invalid_argument, the base of InvalidArgument, becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/python/cuda.hpp"
#include "bindings/python/signatures.hpp"
#include "core/cpu_features.hpp"
#include "core/cpu_limits.hpp"
#include "core/error.hpp"
#include "core/operations.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/probe.hpp"
#include "cpu/reference.hpp"

namespace py = pybind11;

namespace {

using namespace fastconv::python;
using std::int64_t;

// The arrays that kernels read. Constructing one from an array of the same type copies only where
// strides or alignment ask for it.
constexpr int kDense = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
template <class T>
using Dense = py::array_t<T, kDense>;

// --- arrays ---------------------------------------------------------------------------------------

py::array require_array(py::handle object, const char* name) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(text("`", name, "` must be a NumPy array. Received: ", name, " of type ",
                              python_text(py::type::handle_of(object).attr("__name__"))));
  }
  return py::reinterpret_borrow<py::array>(object);
}

py::array require_floats(py::handle object, const char* name) {
  py::array array = require_array(object, name);
  if (!py::isinstance<py::array_t<float>>(array)) {
    throw py::type_error(text("`", name, "` must have dtype float32 in native byte order. ",
                              "Received: ", name, ".dtype=", python_text(array.dtype())));
  }
  return array;
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

template <std::size_t Rank>
py::array require_floats(py::handle object, const char* name,
                         const std::array<int64_t, Rank>& shape) {
  py::array array = require_floats(object, name);
  require_shape(array, name, shape);
  return array;
}

// An optional input: None gives an empty holder, whose data() is null.
class OptionalFloats {
 public:
  template <std::size_t Rank>
  OptionalFloats(const py::object& object, const char* name,
                 const std::array<int64_t, Rank>& shape) {
    if (!object.is_none()) array_.emplace(require_floats(object, name, shape));
  }
  const float* data() const { return array_ ? array_->data() : nullptr; }
  // The array, or an empty one.
  py::array array() const { return array_ ? *array_ : Dense<float>(0); }

 private:
  std::optional<Dense<float>> array_;
};

// fprop's output, which the backward passes need where ReLU has zeroed part of it.
OptionalFloats require_output(const fastconv::Conv2dProblem& problem, const py::object& output) {
  if (problem.activation == fastconv::Activation::relu && output.is_none()) {
    throw fastconv::InvalidArgument(
        "`output`, the result of conv2d, is required with activation='relu'. "
        "Received: output=None");
  }
  return {output, "output", problem.y_shape()};
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
py::array_t<float> result_array(const py::object& out, const Shape& shape,
                                const Inputs&... inputs) {
  if (out.is_none()) return py::array_t<float>(shape);
  py::array array = require_floats(out, "out", shape);
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
  return py::reinterpret_borrow<py::array_t<float>>(array);
}

// --- convolution ----------------------------------------------------------------------------------

// The functions behind one set of Python names: the kernels, the kernels timed, or the reference
// that tests compare them with.
struct Operations {
  decltype(&fastconv::conv2d_fprop) conv2d_fprop;
  decltype(&fastconv::conv2d_dgrad) conv2d_dgrad;
  decltype(&fastconv::conv2d_wgrad) conv2d_wgrad;
  decltype(&fastconv::max_pool2d_fprop) max_pool2d_fprop;
  decltype(&fastconv::max_pool2d_bprop) max_pool2d_bprop;
  decltype(&fastconv::avg_pool2d_fprop) avg_pool2d_fprop;
  decltype(&fastconv::avg_pool2d_bprop) avg_pool2d_bprop;
  decltype(&fastconv::conv2d_pool_fprop) conv2d_pool_fprop;
  decltype(&fastconv::conv2d_pool_bprop) conv2d_pool_bprop;
};

constexpr Operations kKernels{
    fastconv::conv2d_fprop,     fastconv::conv2d_dgrad,      fastconv::conv2d_wgrad,
    fastconv::max_pool2d_fprop, fastconv::max_pool2d_bprop,  fastconv::avg_pool2d_fprop,
    fastconv::avg_pool2d_bprop, fastconv::conv2d_pool_fprop, fastconv::conv2d_pool_bprop};

// The reference is one algorithm: a name that the caller gives is not looked at.
template <auto function>
struct WithoutAlgorithm;
template <class... Parameters, void (*function)(Parameters...)>
struct WithoutAlgorithm<function> {
  static void call(Parameters... parameters, const char*) { function(parameters...); }
};

constexpr Operations kReference{WithoutAlgorithm<fastconv::reference::conv2d_fprop>::call,
                                WithoutAlgorithm<fastconv::reference::conv2d_dgrad>::call,
                                WithoutAlgorithm<fastconv::reference::conv2d_wgrad>::call,
                                fastconv::reference::max_pool2d_fprop,
                                fastconv::reference::max_pool2d_bprop,
                                fastconv::reference::avg_pool2d_fprop,
                                fastconv::reference::avg_pool2d_bprop,
                                WithoutAlgorithm<fastconv::reference::conv2d_pool_fprop>::call,
                                WithoutAlgorithm<fastconv::reference::conv2d_pool_bprop>::call};

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

constexpr Operations kTimed{
    Timed<fastconv::conv2d_fprop>::run,     Timed<fastconv::conv2d_dgrad>::run,
    Timed<fastconv::conv2d_wgrad>::run,     Timed<fastconv::max_pool2d_fprop>::run,
    Timed<fastconv::max_pool2d_bprop>::run, Timed<fastconv::avg_pool2d_fprop>::run,
    Timed<fastconv::avg_pool2d_bprop>::run, Timed<fastconv::conv2d_pool_fprop>::run,
    Timed<fastconv::conv2d_pool_bprop>::run};

template <const Operations& operations>
py::array_t<float> conv2d(const py::object& x_object, const py::object& w_object,
                          const py::object& bias_object, const Conv2dOptions& options,
                          const py::object& out) {
  const py::array x_array = require_floats(x_object, "x");
  const py::array w_array = require_floats(w_object, "w");
  const auto problem = options.problem(shape_of(x_array, "x"), shape_of(w_array, "w"));
  const OptionalFloats bias(bias_object, "bias", std::array{problem.k});

  py::array_t<float> y = result_array(out, problem.y_shape(), x_array, w_array, bias.array());
  const Dense<float> x(x_array), w(w_array);
  float* const y_data = y.mutable_data();
  const GilReleased unlocked;
  operations.conv2d_fprop(problem, x.data(), w.data(), bias.data(), y_data,
                          options.algorithm_name());
  return y;
}

template <const Operations& operations>
py::array_t<float> conv2d_grad_input(const py::object& dy_object, const py::object& w_object,
                                     const Shape& input_shape, const py::object& output_object,
                                     const Conv2dOptions& options, const py::object& out) {
  const py::array w_array = require_floats(w_object, "w");
  const auto problem = options.problem(input_shape, shape_of(w_array, "w"), "input_shape");
  const py::array dy_array = require_floats(dy_object, "dy", problem.y_shape());
  const OptionalFloats output = require_output(problem, output_object);

  py::array_t<float> dx = result_array(out, problem.x_shape(), dy_array, w_array, output.array());
  const Dense<float> dy(dy_array), w(w_array);
  float* const dx_data = dx.mutable_data();
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
  const py::array x_array = require_floats(x_object, "x");
  const auto problem =
      options.problem(shape_of(x_array, "x"), filter_shape, "x.shape", "filter_shape");
  const py::array dy_array = require_floats(dy_object, "dy", problem.y_shape());
  const OptionalFloats output = require_output(problem, output_object);

  py::array_t<float> dw =
      result_array(out, problem.filter_shape(), x_array, dy_array, output.array());
  std::optional<py::array_t<float>> dbias;
  if (return_bias_grad) dbias.emplace(problem.k);
  const Dense<float> x(x_array), dy(dy_array);
  float* const dw_data = dw.mutable_data();
  float* const dbias_data = dbias ? dbias->mutable_data() : nullptr;
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
  const py::array x_array = require_floats(x_object, "x");
  const auto problem = options.problem(shape_of(x_array, "x"));

  py::array_t<float> y = result_array(out, problem.y_shape(), x_array);
  std::optional<py::array> argmax;
  if (return_argmax) {
    argmax.emplace(
        problem.argmax_fits_byte() ? py::dtype::of<std::uint8_t>() : py::dtype::of<std::int32_t>(),
        problem.y_shape());
  }
  const Dense<float> x(x_array);
  float* const y_data = y.mutable_data();
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
  T least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, argmax[i]);
    most = std::max(most, argmax[i]);
  }
  const int64_t taps = problem.r * problem.s;
  if (least >= 0 && most < taps) return;
  throw fastconv::InvalidArgument(text("`argmax` must hold values from 0 to ", taps - 1,
                                       ", the taps of the window. Received: argmax with value ",
                                       static_cast<int64_t>(least < 0 ? least : most)));
}

template <const Operations& operations, class T>
py::array_t<float> scatter(const fastconv::Pool2dProblem& problem, const py::array& dy_array,
                           const py::array& argmax_array, const py::object& out) {
  py::array_t<float> dx = result_array(out, problem.x_shape(), dy_array, argmax_array);
  const Dense<float> dy(dy_array);
  const Dense<T> argmax(argmax_array);
  float* const dx_data = dx.mutable_data();
  const GilReleased unlocked;
  require_taps(argmax.data(), problem.y_size(), problem);
  operations.max_pool2d_bprop(problem, dy.data(), argmax.data(), dx_data);
  return dx;
}

template <const Operations& operations>
py::array_t<float> max_pool2d_grad(const py::object& dy_object, const py::object& argmax_object,
                                   const Shape& input_shape, const Pool2dOptions& options,
                                   const py::object& out) {
  const auto problem = options.problem(input_shape, "input_shape");
  const py::array dy = require_floats(dy_object, "dy", problem.y_shape());
  const py::array argmax = require_array(argmax_object, "argmax");
  const bool is_byte = problem.argmax_fits_byte();
  if (!(is_byte ? py::isinstance<py::array_t<std::uint8_t>>(argmax)
                : py::isinstance<py::array_t<std::int32_t>>(argmax))) {
    throw py::type_error(text("`argmax` must have dtype ", is_byte ? "uint8" : "int32",
                              " with a window of ", problem.r, " x ", problem.s,
                              ". Received: argmax.dtype=", python_text(argmax.dtype())));
  }
  require_shape(argmax, "argmax", problem.y_shape());
  return is_byte ? scatter<operations, std::uint8_t>(problem, dy, argmax, out)
                 : scatter<operations, std::int32_t>(problem, dy, argmax, out);
}

template <const Operations& operations>
py::array_t<float> avg_pool2d(const py::object& x_object, const Pool2dOptions& options,
                              const py::object& out) {
  const py::array x_array = require_floats(x_object, "x");
  const auto problem = options.problem(shape_of(x_array, "x"));
  py::array_t<float> y = result_array(out, problem.y_shape(), x_array);
  const Dense<float> x(x_array);
  float* const y_data = y.mutable_data();
  const GilReleased unlocked;
  operations.avg_pool2d_fprop(problem, x.data(), y_data);
  return y;
}

template <const Operations& operations>
py::array_t<float> avg_pool2d_grad(const py::object& dy_object, const Shape& input_shape,
                                   const Pool2dOptions& options, const py::object& out) {
  const auto problem = options.problem(input_shape, "input_shape");
  const py::array dy_array = require_floats(dy_object, "dy", problem.y_shape());
  py::array_t<float> dx = result_array(out, problem.x_shape(), dy_array);
  const Dense<float> dy(dy_array);
  float* const dx_data = dx.mutable_data();
  const GilReleased unlocked;
  operations.avg_pool2d_bprop(problem, dy.data(), dx_data);
  return dx;
}

// --- convolution and pooling in one ---------------------------------------------------------------

template <const Operations& operations>
py::object conv2d_max_pool2d(const py::object& x_object, const py::object& w_object,
                             const py::object& bias_object, bool return_argmax,
                             const Conv2dOptions& options, const py::object& out) {
  const py::array x_array = require_floats(x_object, "x");
  const py::array w_array = require_floats(w_object, "w");
  const auto problem = options.problem(shape_of(x_array, "x"), shape_of(w_array, "w"));
  const auto pool = fastconv::pool_behind(problem);
  const OptionalFloats bias(bias_object, "bias", std::array{problem.k});

  py::array_t<float> y = result_array(out, pool.y_shape(), x_array, w_array, bias.array());
  std::optional<py::array_t<std::uint8_t>> argmax;
  if (return_argmax) argmax.emplace(pool.y_shape());
  const Dense<float> x(x_array), w(w_array);
  float* const y_data = y.mutable_data();
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
  const py::array x_array = require_floats(x_object, "x");
  const py::array w_array = require_floats(w_object, "w");
  const auto problem = options.problem(shape_of(x_array, "x"), shape_of(w_array, "w"));
  const auto pool = fastconv::pool_behind(problem);
  const py::array dy_array = require_floats(dy_object, "dy", pool.y_shape());
  const Dense<float> output(require_floats(output_object, "output", pool.y_shape()));
  const py::array argmax_array = require_array(argmax_object, "argmax");
  if (!py::isinstance<py::array_t<std::uint8_t>>(argmax_array)) {
    throw py::type_error(text("`argmax` must have dtype uint8. Received: argmax.dtype=",
                              python_text(argmax_array.dtype())));
  }
  require_shape(argmax_array, "argmax", pool.y_shape());

  std::optional<py::array_t<float>> dx;
  if (with_input_grad) dx.emplace(problem.x_shape());
  py::array_t<float> dw(problem.filter_shape());
  py::array_t<float> dbias(std::array{problem.k});
  const Dense<float> x(x_array), w(w_array), dy(dy_array);
  const Dense<std::uint8_t> argmax(argmax_array);
  float* const dx_data = dx ? dx->mutable_data() : nullptr;
  float* const dw_data = dw.mutable_data();
  float* const dbias_data = dbias.mutable_data();
  {
    const GilReleased unlocked;
    require_taps(argmax.data(), pool.y_size(), pool);
    operations.conv2d_pool_bprop(problem, x.data(), w.data(), dy.data(), output.data(),
                                 argmax.data(), dx_data, dw_data, dbias_data,
                                 options.algorithm_name());
  }
  return py::make_tuple(dx ? py::object(*dx) : py::object(py::none()), dw, dbias);
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

void set_num_threads(int64_t threads) {
  // What no int holds would reach the core as another number.
  if (threads != static_cast<int>(threads)) {
    throw fastconv::InvalidArgument(
        text("num_threads must be an integer from 1 to 1024. Received: num_threads=", threads));
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
                 std::string activation, std::string data_format) {
  const Conv2dOptions options{strides, std::move(padding),    dilation_rate,
                              groups,  std::move(activation), std::move(data_format),
                              {}};
  const auto problem = options.problem(input_shape, filter_shape, "input_shape", "filter_shape");
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
  define_operations<OnHost<kKernels>>(m);
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
        py::arg("activation"), py::arg("data_format"));
}
