// What the compiled functions have in common whatever arrays they take: the options, which arrive
// normalised by fastconv/_arguments.py and whose values are checked by core/problem.hpp, the names of
// their arguments, and the GIL.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"

namespace fastconv::python {

namespace py = pybind11;

// Lets other Python threads run while it lives. A daemon thread may come back to an interpreter that
// is shutting down, or be waiting for the GIL when that begins. CPython before 3.14 then ends it by
// pthread_exit, which glibc does by unwinding its stack, through destructors that abort, as
// pybind11's own does, or touch Python objects without the GIL. Here such a thread waits for the
// process's end instead, as Python 3.14 has all threads do.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
#if defined(__GLIBCXX__)
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

using std::int64_t;

using Pair = std::array<int64_t, 2>;
using Shape = std::array<int64_t, 4>;
using PaddingOption = std::pair<std::string, std::array<int64_t, 4>>;  // kind; top .. right

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string python_text(py::handle object) { return py::str(object); }

// --- options --------------------------------------------------------------------------------------

template <class Value, std::size_t Count>
Value parse(const char* name, const std::string& given,
            const std::array<std::pair<const char*, Value>, Count>& choices) {
  std::string allowed;
  for (const auto& [choice, value] : choices) {
    if (given == choice) return value;
    allowed += text(allowed.empty() ? "'" : ", '", choice, "'");
  }
  throw fastconv::InvalidArgument(
      text("`", name, "` must be one of ", allowed, ". Received: ", name, "='", given, "'"));
}

inline fastconv::Layout parse_data_format(const std::string& given) {
  using fastconv::Layout;
  return parse<Layout, 2>("data_format", given,
                          {{{"channels_last", Layout::nhwc}, {"channels_first", Layout::nchw}}});
}

inline fastconv::Activation parse_activation(const std::string& given) {
  using fastconv::Activation;
  return parse<Activation, 2>("activation", given,
                              {{{"linear", Activation::linear}, {"relu", Activation::relu}}});
}

inline fastconv::Padding parse_padding(const PaddingOption& given) {
  using Kind = fastconv::Padding::Kind;
  const auto& [kind, sides] = given;
  return {parse<Kind, 3>(
              "padding", kind,
              {{{"valid", Kind::valid}, {"same", Kind::same}, {"explicit", Kind::explicit_sides}}}),
          sides[0], sides[1], sides[2], sides[3]};
}

inline fastconv::Direction parse_direction(const std::string& given) {
  using fastconv::Direction;
  return parse<Direction, 3>(
      "direction", given,
      {{{"fprop", Direction::fprop}, {"dgrad", Direction::dgrad}, {"wgrad", Direction::wgrad}}});
}

inline fastconv::DataType parse_dtype(const std::string& given) {
  using fastconv::DataType;
  return parse<DataType, 3>("dtype", given,
                            {{{"float32", DataType::float32},
                              {"float16", DataType::float16},
                              {"bfloat16", DataType::bfloat16}}});
}

struct Conv2dOptions {
  Pair strides;
  PaddingOption padding;
  Pair dilation_rate;
  int64_t groups;
  std::string activation;
  std::string data_format;
  std::optional<std::string> algorithm;

  const char* algorithm_name() const { return algorithm ? algorithm->c_str() : nullptr; }

  // Messages name the shapes as the caller gave them: an array's, or an argument.
  fastconv::Conv2dProblem problem(const Shape& x, const Shape& w, const char* x_name = "x.shape",
                                  const char* w_name = "w.shape") const {
    return fastconv::make_conv2d_problem({.x_shape = x,
                                          .filter_shape = w,
                                          .strides = strides,
                                          .dilations = dilation_rate,
                                          .padding = parse_padding(padding),
                                          .groups = groups,
                                          .layout = parse_data_format(data_format),
                                          .activation = parse_activation(activation),
                                          .x_shape_name = x_name,
                                          .filter_shape_name = w_name});
  }
};

struct Pool2dOptions {
  Pair pool_size;
  Pair strides;
  PaddingOption padding;
  std::string data_format;

  fastconv::Pool2dProblem problem(const Shape& x, const char* x_name = "x.shape") const {
    return fastconv::make_pool2d_problem({.x_shape = x,
                                          .pool_size = pool_size,
                                          .strides = strides,
                                          .padding = parse_padding(padding),
                                          .layout = parse_data_format(data_format),
                                          .x_shape_name = x_name});
  }
};

// --- names -----------------------------------------------------------------------------------------

// Defines the operations of `Backend`, whose static functions take the arrays and the options.
template <class Backend>
void define_operations(py::module_& m) {
  m.def(
      "conv2d",
      [](const py::object& x, const py::object& w, const py::object& bias, Pair strides,
         PaddingOption padding, Pair dilation_rate, int64_t groups, std::string activation,
         std::string data_format, std::optional<std::string> algorithm, const py::object& out) {
        return Backend::conv2d(
            x, w, bias,
            {strides, std::move(padding), dilation_rate, groups, std::move(activation),
             std::move(data_format), std::move(algorithm)},
            out);
      },
      py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("strides"), py::arg("padding"),
      py::arg("dilation_rate"), py::arg("groups"), py::arg("activation"), py::arg("data_format"),
      py::arg("algorithm") = py::none(), py::arg("out") = py::none());
  m.def(
      "conv2d_grad_input",
      [](const py::object& dy, const py::object& w, const Shape& input_shape,
         const py::object& output, Pair strides, PaddingOption padding, Pair dilation_rate,
         int64_t groups, std::string activation, std::string data_format,
         std::optional<std::string> algorithm, const py::object& out) {
        return Backend::conv2d_grad_input(
            dy, w, input_shape, output,
            {strides, std::move(padding), dilation_rate, groups, std::move(activation),
             std::move(data_format), std::move(algorithm)},
            out);
      },
      py::arg("dy"), py::arg("w"), py::arg("input_shape"), py::arg("output"), py::arg("strides"),
      py::arg("padding"), py::arg("dilation_rate"), py::arg("groups"), py::arg("activation"),
      py::arg("data_format"), py::arg("algorithm") = py::none(), py::arg("out") = py::none());
  m.def(
      "conv2d_grad_filter",
      [](const py::object& x, const py::object& dy, const Shape& filter_shape,
         const py::object& output, bool return_bias_grad, Pair strides, PaddingOption padding,
         Pair dilation_rate, int64_t groups, std::string activation, std::string data_format,
         std::optional<std::string> algorithm, const py::object& out) {
        return Backend::conv2d_grad_filter(
            x, dy, filter_shape, output, return_bias_grad,
            {strides, std::move(padding), dilation_rate, groups, std::move(activation),
             std::move(data_format), std::move(algorithm)},
            out);
      },
      py::arg("x"), py::arg("dy"), py::arg("filter_shape"), py::arg("output"),
      py::arg("return_bias_grad"), py::arg("strides"), py::arg("padding"), py::arg("dilation_rate"),
      py::arg("groups"), py::arg("activation"), py::arg("data_format"),
      py::arg("algorithm") = py::none(), py::arg("out") = py::none());
  m.def(
      "max_pool2d",
      [](const py::object& x, bool return_argmax, Pair pool_size, Pair strides,
         PaddingOption padding, std::string data_format, const py::object& out) {
        return Backend::max_pool2d(x, return_argmax,
                                   {pool_size, strides, std::move(padding), std::move(data_format)},
                                   out);
      },
      py::arg("x"), py::arg("return_argmax"), py::arg("pool_size"), py::arg("strides"),
      py::arg("padding"), py::arg("data_format"), py::arg("out") = py::none());
  m.def(
      "max_pool2d_grad",
      [](const py::object& dy, const py::object& argmax, const Shape& input_shape, Pair pool_size,
         Pair strides, PaddingOption padding, std::string data_format, const py::object& out) {
        return Backend::max_pool2d_grad(
            dy, argmax, input_shape,
            {pool_size, strides, std::move(padding), std::move(data_format)}, out);
      },
      py::arg("dy"), py::arg("argmax"), py::arg("input_shape"), py::arg("pool_size"),
      py::arg("strides"), py::arg("padding"), py::arg("data_format"), py::arg("out") = py::none());
  m.def(
      "avg_pool2d",
      [](const py::object& x, Pair pool_size, Pair strides, PaddingOption padding,
         std::string data_format, const py::object& out) {
        return Backend::avg_pool2d(
            x, {pool_size, strides, std::move(padding), std::move(data_format)}, out);
      },
      py::arg("x"), py::arg("pool_size"), py::arg("strides"), py::arg("padding"),
      py::arg("data_format"), py::arg("out") = py::none());
  m.def(
      "avg_pool2d_grad",
      [](const py::object& dy, const Shape& input_shape, Pair pool_size, Pair strides,
         PaddingOption padding, std::string data_format, const py::object& out) {
        return Backend::avg_pool2d_grad(
            dy, input_shape, {pool_size, strides, std::move(padding), std::move(data_format)}, out);
      },
      py::arg("dy"), py::arg("input_shape"), py::arg("pool_size"), py::arg("strides"),
      py::arg("padding"), py::arg("data_format"), py::arg("out") = py::none());
  m.def(
      "conv2d_max_pool2d",
      [](const py::object& x, const py::object& w, const py::object& bias, bool return_argmax,
         Pair strides, PaddingOption padding, Pair dilation_rate, int64_t groups,
         std::string activation, std::string data_format, std::optional<std::string> algorithm,
         const py::object& out) {
        return Backend::conv2d_max_pool2d(
            x, w, bias, return_argmax,
            {strides, std::move(padding), dilation_rate, groups, std::move(activation),
             std::move(data_format), std::move(algorithm)},
            out);
      },
      py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("return_argmax"), py::arg("strides"),
      py::arg("padding"), py::arg("dilation_rate"), py::arg("groups"), py::arg("activation"),
      py::arg("data_format"), py::arg("algorithm") = py::none(), py::arg("out") = py::none());
  m.def(
      "conv2d_max_pool2d_grad",
      [](const py::object& x, const py::object& w, const py::object& dy, const py::object& output,
         const py::object& argmax, bool with_input_grad, Pair strides, PaddingOption padding,
         Pair dilation_rate, int64_t groups, std::string activation, std::string data_format,
         std::optional<std::string> algorithm) {
        return Backend::conv2d_max_pool2d_grad(
            x, w, dy, output, argmax, with_input_grad,
            {strides, std::move(padding), dilation_rate, groups, std::move(activation),
             std::move(data_format), std::move(algorithm)});
      },
      py::arg("x"), py::arg("w"), py::arg("dy"), py::arg("output"), py::arg("argmax"),
      py::arg("with_input_grad"), py::arg("strides"), py::arg("padding"), py::arg("dilation_rate"),
      py::arg("groups"), py::arg("activation"), py::arg("data_format"),
      py::arg("algorithm") = py::none());
}

}  // namespace fastconv::python
