// fastconv's operations as TensorFlow ops for float32 on the CPU. Each kernel checks its inputs'
// shapes, allocates its outputs and calls core/operations.hpp.
//
// The gradient ops take the forward op's input itself rather than its shape: a shape tensor would
// cost one or two more ops a step, and the input lives until then anyway (the filter's gradient, or
// the ReLU mask of the layer below, reads it).
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "bindings/tensorflow/c_api.hpp"
#include "core/error.hpp"
#include "core/export.hpp"
#include "core/operations.hpp"
#include "core/problem.hpp"

namespace fastconv::tensorflow {
namespace {

using std::int64_t;
using Shape4 = std::array<int64_t, 4>;

// --- TensorFlow's objects, owned --------------------------------------------------------------

// A status of TensorFlow's that is not OK, on its way up to report_failure.
class TensorFlowError : public std::runtime_error {
 public:
  TensorFlowError(int code, const char* message) : std::runtime_error(message), code(code) {}
  const int code;
};

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  Status(int code, const char* message) : Status() { TF_SetStatus(get(), code, message); }
  TF_Status* get() const { return status_.get(); }
  void check() const {
    const int code = TF_GetCode(get());
    if (code != kOk) throw TensorFlowError(code, TF_Message(get()));
  }

 private:
  struct Delete {
    void operator()(TF_Status* status) const { TF_DeleteStatus(status); }
  };
  std::unique_ptr<TF_Status, Delete> status_;
};

class Tensor {
 public:
  explicit Tensor(TF_Tensor* tensor) : tensor_(tensor) {}
  int type() const { return TF_TensorType(tensor_.get()); }
  int rank() const { return TF_NumDims(tensor_.get()); }
  int64_t dim(int axis) const { return TF_Dim(tensor_.get(), axis); }
  void* data() const { return TF_TensorData(tensor_.get()); }
  float* floats() const { return static_cast<float*>(data()); }

  std::string shape_text() const {
    std::string text = "(";
    for (int axis = 0; axis < rank(); ++axis) {
      text += (axis ? ", " : "") + std::to_string(dim(axis));
    }
    return text + (rank() == 1 ? ",)" : ")");
  }

 private:
  struct Delete {
    void operator()(TF_Tensor* tensor) const { TF_DeleteTensor(tensor); }
  };
  std::unique_ptr<TF_Tensor, Delete> tensor_;
};

// What a kernel sees of one execution.
class Context {
 public:
  explicit Context(TF_OpKernelContext* context) : context_(context) {}

  int num_inputs() const { return TF_NumInputs(context_); }
  int num_outputs() const { return TF_NumOutputs(context_); }
  int output_type(int index) const { return TF_ExpectedOutputDataType(context_, index); }

  Tensor input(int index) const {
    TF_Tensor* tensor = nullptr;
    const Status status;
    TF_GetInput(context_, index, &tensor, status.get());
    Tensor owned(tensor);
    status.check();
    return owned;
  }

  // The element type is the one that the op's definition and attributes give this output.
  Tensor output(int index, std::span<const int64_t> shape) const {
    const int type = output_type(index);
    std::size_t bytes = type == kUint8 ? 1 : 4;
    for (int64_t extent : shape) bytes *= static_cast<std::size_t>(extent);
    const Status status;
    Tensor tensor(TF_AllocateOutput(context_, index, type, shape.data(),
                                    static_cast<int>(shape.size()), bytes, status.get()));
    status.check();
    return tensor;
  }

 private:
  TF_OpKernelContext* context_;
};

// --- attributes -------------------------------------------------------------------------------

template <std::size_t Size>
std::array<int64_t, Size> int_attribute(TF_OpKernelConstruction* construction, const char* name) {
  const Status status;
  std::int32_t size = 0, total = 0;
  TF_OpKernelConstruction_GetAttrSize(construction, name, &size, &total, status.get());
  status.check();
  if (size != static_cast<std::int32_t>(Size)) {
    throw InvalidArgument("`" + std::string(name) + "` must be a list of " + std::to_string(Size) +
                          " integers. Received: a list of " + std::to_string(size));
  }
  std::array<int64_t, Size> values{};
  TF_OpKernelConstruction_GetAttrInt64List(construction, name, values.data(),
                                           static_cast<int>(Size), status.get());
  status.check();
  return values;
}

// The first letters of a string attribute, enough to tell the allowed values from one another
// (TensorFlow has checked that it is one of them).
std::string string_attribute(TF_OpKernelConstruction* construction, const char* name) {
  std::array<char, 16> value{};
  const Status status;
  TF_OpKernelConstruction_GetAttrString(construction, name, value.data(), value.size() - 1,
                                        status.get());
  status.check();
  return value.data();
}

Padding padding_attribute(TF_OpKernelConstruction* construction) {
  Padding padding;
  const std::string kind = string_attribute(construction, "padding");
  if (kind == "SAME") padding.kind = Padding::Kind::same;
  if (kind == "EXPLICIT") {
    padding.kind = Padding::Kind::explicit_sides;
    const Shape4 sides = int_attribute<4>(construction, "explicit_paddings");
    padding.top = sides[0];
    padding.bottom = sides[1];
    padding.left = sides[2];
    padding.right = sides[3];
  }
  return padding;
}

Layout layout_attribute(TF_OpKernelConstruction* construction) {
  return string_attribute(construction, "data_format") == "NCHW" ? Layout::nchw : Layout::nhwc;
}

Activation activation_attribute(TF_OpKernelConstruction* construction) {
  return string_attribute(construction, "activation") == "RELU" ? Activation::relu
                                                                : Activation::linear;
}

constexpr std::array kGeometryAttributes{
    "T: {float} = DT_FLOAT",
    "strides: list(int) = [1, 1]",
    "padding: {'SAME', 'VALID', 'EXPLICIT'} = 'VALID'",
    "explicit_paddings: list(int) = [0, 0, 0, 0]",  // top, bottom, left, right
    "data_format: {'NHWC', 'NCHW'} = 'NHWC'",
};

// --- checks -----------------------------------------------------------------------------------

Shape4 rank4_shape(const Tensor& tensor, const char* name) {
  if (tensor.rank() != 4) {
    throw InvalidArgument("`" + std::string(name) + "` must have 4 dimensions. Received: " + name +
                          ".shape=" + tensor.shape_text());
  }
  return {tensor.dim(0), tensor.dim(1), tensor.dim(2), tensor.dim(3)};
}

void check_shape(const Tensor& tensor, const char* name, std::span<const int64_t> expected) {
  bool equal = tensor.rank() == static_cast<int>(expected.size());
  for (int axis = 0; equal && axis < tensor.rank(); ++axis) {
    equal = tensor.dim(axis) == expected[axis];
  }
  if (equal) return;
  std::string text;
  for (int64_t extent : expected) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  throw InvalidArgument("`" + std::string(name) + "` must have the shape (" + text +
                        (expected.size() == 1 ? ",)" : ")") + ". Received: " + name +
                        ".shape=" + tensor.shape_text());
}

// --- convolution ------------------------------------------------------------------------------
//
// A kernel class names its op, its attributes, inputs and outputs, and the input that has the shape
// of its first output (-1: none).

class Conv2dKernel {
 public:
  explicit Conv2dKernel(TF_OpKernelConstruction* construction) {
    arguments_.strides = int_attribute<2>(construction, "strides");
    arguments_.dilations = int_attribute<2>(construction, "dilations");
    arguments_.padding = padding_attribute(construction);
    arguments_.layout = layout_attribute(construction);
    arguments_.activation = activation_attribute(construction);
  }

  static constexpr std::array kAttributes{
      "dilations: list(int) = [1, 1]",
      "activation: {'LINEAR', 'RELU'} = 'LINEAR'",
  };

 protected:
  Conv2dProblem problem(const Tensor& x, const Tensor& filter) const {
    Conv2dArguments arguments = arguments_;
    arguments.x_shape = rank4_shape(x, "x");
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
  static const float* checked_mask(const Conv2dProblem& problem, const Context& context,
                                   const std::optional<Tensor>& output) {
    if (problem.activation == Activation::linear) return nullptr;
    if (!output) {
      throw InvalidArgument("With activation 'RELU', `output` must be given. Received: " +
                            std::to_string(context.num_inputs()) + " inputs");
    }
    check_shape(*output, "output", problem.y_shape());
    return output->floats();
  }

  // The last input of an op, a list of none or one.
  static std::optional<Tensor> optional_input(const Context& context, int index) {
    if (context.num_inputs() > index + 1) {
      throw InvalidArgument("There must be at most " + std::to_string(index + 1) +
                            " inputs. Received: " + std::to_string(context.num_inputs()));
    }
    if (context.num_inputs() == index) return std::nullopt;
    return context.input(index);
  }

 private:
  Conv2dArguments arguments_;
};

class Conv2d : public Conv2dKernel {
 public:
  using Conv2dKernel::Conv2dKernel;
  static constexpr const char* kName = "FastconvConv2D";
  static constexpr std::array kOwnAttributes{"num_bias: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T", "filter: T", "bias: num_bias * T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  void operator()(const Context& context) const {
    const Tensor x = context.input(0), filter = context.input(1);
    const std::optional<Tensor> bias = optional_input(context, 2);
    const Conv2dProblem p = problem(x, filter);
    if (bias) check_shape(*bias, "bias", std::array{p.k});
    const Tensor y = context.output(0, p.y_shape());
    conv2d_fprop(p, x.floats(), filter.floats(), bias ? bias->floats() : nullptr, y.floats());
  }
};

class Conv2dGradInput : public Conv2dKernel {
 public:
  using Conv2dKernel::Conv2dKernel;
  static constexpr const char* kName = "FastconvConv2DGradInput";
  static constexpr std::array kOwnAttributes{"num_output: int >= 0 = 0"};
  static constexpr std::array kInputs{"x: T", "filter: T", "dy: T", "output: num_output * T"};
  static constexpr std::array kOutputs{"dx: T"};
  static constexpr int kOutputLikeInput = 0;

  void operator()(const Context& context) const {
    const Tensor x = context.input(0), filter = context.input(1), dy = context.input(2);
    const std::optional<Tensor> output = optional_input(context, 3);
    const Conv2dProblem p = problem(x, filter);
    check_shape(dy, "dy", p.y_shape());
    const float* mask = checked_mask(p, context, output);
    const Tensor dx = context.output(0, p.x_shape());
    conv2d_dgrad(p, dy.floats(), filter.floats(), mask, dx.floats());
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

  void operator()(const Context& context) const {
    const Tensor x = context.input(0), filter = context.input(1), dy = context.input(2);
    const std::optional<Tensor> output = optional_input(context, 3);
    const Conv2dProblem p = problem(x, filter);
    check_shape(dy, "dy", p.y_shape());
    const float* mask = checked_mask(p, context, output);
    const Tensor dfilter = context.output(0, p.filter_shape());
    if (context.num_outputs() == 1) {
      conv2d_wgrad(p, x.floats(), dy.floats(), mask, dfilter.floats(), nullptr);
      return;
    }
    if (context.num_outputs() > 2) {
      throw InvalidArgument("`num_bias` must be 0 or 1. Received: num_bias=" +
                            std::to_string(context.num_outputs() - 1));
    }
    const Tensor dbias = context.output(1, std::array{p.k});
    conv2d_wgrad(p, x.floats(), dy.floats(), mask, dfilter.floats(), dbias.floats());
  }
};

// --- max-pooling ------------------------------------------------------------------------------

class MaxPool2dKernel {
 public:
  explicit MaxPool2dKernel(TF_OpKernelConstruction* construction) {
    arguments_.pool_size = int_attribute<2>(construction, "pool_size");
    arguments_.strides = int_attribute<2>(construction, "strides");
    arguments_.padding = padding_attribute(construction);
    arguments_.layout = layout_attribute(construction);
  }

  static constexpr std::array kAttributes{"pool_size: list(int)"};

 protected:
  Pool2dProblem problem(const Tensor& x) const {
    Pool2dArguments arguments = arguments_;
    arguments.x_shape = rank4_shape(x, "x");
    return make_pool2d_problem(arguments);
  }

  static void check_argmax_type(const Pool2dProblem& problem, int type) {
    const int expected = problem.argmax_fits_byte() ? kUint8 : kInt32;
    if (type == expected) return;
    throw InvalidArgument(
        "`argmax` must be uint8 for windows of up to 256 taps and int32 beyond. Received: " +
        std::string(type == kUint8 ? "uint8" : "int32") + " for pool_size=(" +
        std::to_string(problem.r) + ", " + std::to_string(problem.s) + ")");
  }

 private:
  Pool2dArguments arguments_;
};

constexpr std::array kArgmaxAttributes{"Targmax: {uint8, int32} = DT_UINT8"};

class MaxPool2d : public MaxPool2dKernel {
 public:
  using MaxPool2dKernel::MaxPool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2D";
  static constexpr std::array<const char*, 0> kOwnAttributes{};
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"y: T"};
  static constexpr int kOutputLikeInput = -1;

  void operator()(const Context& context) const {
    const Tensor x = context.input(0);
    const Pool2dProblem p = problem(x);
    const Tensor y = context.output(0, p.y_shape());
    max_pool2d_fprop(p, x.floats(), y.floats(), nullptr);
  }
};

// argmax: each window's maximum as its place row * S + column in the window.
class MaxPool2dWithArgmax : public MaxPool2dKernel {
 public:
  using MaxPool2dKernel::MaxPool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DWithArgmax";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"x: T"};
  static constexpr std::array kOutputs{"y: T", "argmax: Targmax"};
  static constexpr int kOutputLikeInput = -1;

  void operator()(const Context& context) const {
    const Tensor x = context.input(0);
    const Pool2dProblem p = problem(x);
    check_argmax_type(p, context.output_type(1));
    const Tensor y = context.output(0, p.y_shape());
    const Tensor argmax = context.output(1, p.y_shape());
    max_pool2d_fprop(p, x.floats(), y.floats(), argmax.data());
  }
};

class MaxPool2dGrad : public MaxPool2dKernel {
 public:
  using MaxPool2dKernel::MaxPool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DGrad";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"x: T", "argmax: Targmax", "dy: T"};
  static constexpr std::array kOutputs{"dx: T"};
  static constexpr int kOutputLikeInput = 0;

  void operator()(const Context& context) const {
    const Tensor x = context.input(0), argmax = context.input(1), dy = context.input(2);
    const Pool2dProblem p = problem(x);
    check_argmax_type(p, argmax.type());
    check_shape(argmax, "argmax", p.y_shape());
    check_shape(dy, "dy", p.y_shape());
    const Tensor dx = context.output(0, p.x_shape());
    max_pool2d_bprop(p, dy.floats(), argmax.data(), dx.floats());
  }
};

// What a window takes from its argmax's pixel: the transpose of max_pool2d_bprop. It serves second
// derivatives alone, so it is plain.
template <class Tap>
void gather_at_argmax(const Pool2dProblem& p, const float* x, const Tap* argmax, float* y) {
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
          y[at] = inside ? x[n * p.h * p.w * p.c + (row * p.w + column) * pixel_step +
                             c * channel_step]
                         : 0.0f;
        }
      }
    }
  }
}

class MaxPool2dGradGrad : public MaxPool2dKernel {
 public:
  using MaxPool2dKernel::MaxPool2dKernel;
  static constexpr const char* kName = "FastconvMaxPool2DGradGrad";
  static constexpr std::array kOwnAttributes = kArgmaxAttributes;
  static constexpr std::array kInputs{"ddx: T", "argmax: Targmax"};
  static constexpr std::array kOutputs{"ddy: T"};
  static constexpr int kOutputLikeInput = -1;

  void operator()(const Context& context) const {
    const Tensor ddx = context.input(0), argmax = context.input(1);
    const Pool2dProblem p = problem(ddx);
    check_argmax_type(p, argmax.type());
    check_shape(argmax, "argmax", p.y_shape());
    const Tensor ddy = context.output(0, p.y_shape());
    if (p.argmax_fits_byte()) {
      gather_at_argmax(p, ddx.floats(), static_cast<const std::uint8_t*>(argmax.data()),
                       ddy.floats());
    } else {
      gather_at_argmax(p, ddx.floats(), static_cast<const std::int32_t*>(argmax.data()),
                       ddy.floats());
    }
  }
};

// --- from kernels to ops ----------------------------------------------------------------------

// Runs `body`; a failure goes to `fail(status)`. Nothing is thrown on into TensorFlow.
template <class Body, class Fail>
void report_failure(const Body& body, const Fail& fail) noexcept {
  try {
    body();
  } catch (const InvalidArgument& error) {
    fail(Status(kInvalidArgument, error.what()).get());
  } catch (const TensorFlowError& error) {
    fail(Status(error.code, error.what()).get());
  } catch (const std::bad_alloc&) {
    fail(Status(kResourceExhausted, "fastconv: out of memory").get());
  } catch (const std::exception& error) {
    fail(Status(kInternal, error.what()).get());
  } catch (...) {
    fail(Status(kInternal, "fastconv: unknown exception").get());
  }
}

template <class Kernel>
inline std::atomic<std::uint64_t> g_executions{0};

template <class Kernel>
void* create(TF_OpKernelConstruction* construction) {
  Kernel* kernel = nullptr;
  report_failure([&] { kernel = new Kernel(construction); },
                 [&](TF_Status* status) { TF_OpKernelConstruction_Failure(construction, status); });
  return kernel;
}

template <class Kernel>
void compute(void* kernel, TF_OpKernelContext* context) {
  report_failure(
      [&] {
        (*static_cast<const Kernel*>(kernel))(Context(context));
        g_executions<Kernel>.fetch_add(1, std::memory_order_relaxed);
      },
      [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
}

template <class Kernel>
void destroy(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

// Outputs of an input's shape get it; the C API gives no access to the attributes that the others
// depend on, so the Python wrapper sets those.
template <class Kernel>
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
  constexpr int input = Kernel::kOutputLikeInput;
  if (input < 0 || TF_GetCode(status) != kOk) return;
  TF_ShapeHandle* shape = TF_NewShapeHandle();
  TF_ShapeInferenceContextGetInput(context, input, shape, status);
  if (TF_GetCode(status) == kOk) TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
  TF_DeleteShapeHandle(shape);
}

template <class Kernel>
void register_op() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(Kernel::kName);
  for (const char* spec : kGeometryAttributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kAttributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kOwnAttributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kInputs) TF_OpDefinitionBuilderAddInput(op, spec);
  for (const char* spec : Kernel::kOutputs) TF_OpDefinitionBuilderAddOutput(op, spec);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes<Kernel>);
  const Status status;
  TF_RegisterOpDefinition(op, status.get());
  status.check();

  TF_KernelBuilder* kernel = TF_NewKernelBuilder(Kernel::kName, "CPU", create<Kernel>,
                                                 compute<Kernel>, destroy<Kernel>);
  TF_RegisterKernelBuilder(Kernel::kName, kernel, status.get());
  status.check();
}

template <class... Kernels>
struct OpList {
  static void register_all() { (register_op<Kernels>(), ...); }
  static constexpr std::array kNames{Kernels::kName...};
  static std::uint64_t executions(std::size_t index) {
    const std::array counters{&g_executions<Kernels>...};
    return counters[index]->load(std::memory_order_relaxed);
  }
};

using Ops = OpList<Conv2d, Conv2dGradInput, Conv2dGradFilter, MaxPool2d, MaxPool2dWithArgmax,
                   MaxPool2dGrad, MaxPool2dGradGrad>;

// Why the ops could not be registered; empty where they are.
std::string& load_error() {
  static std::string text;
  return text;
}

// Runs while TensorFlow loads this library, which is when it collects the ops of a library.
__attribute__((constructor)) void register_ops() {
  try {
    resolve_c_api();
    Ops::register_all();
  } catch (const std::exception& error) {
    load_error() = error.what();
  } catch (...) {
    load_error() = "unknown exception";
  }
}

}  // namespace
}  // namespace fastconv::tensorflow

// Read by fastconv.adapters.tensorflow through ctypes.
extern "C" {

// Null when all is well, else why there are no ops.
FASTCONV_API const char* fastconv_tensorflow_load_error() {
  const std::string& error = fastconv::tensorflow::load_error();
  return error.empty() ? nullptr : error.c_str();
}

// Null beyond the last op.
FASTCONV_API const char* fastconv_tensorflow_op_name(std::size_t index) {
  using fastconv::tensorflow::Ops;
  return index < Ops::kNames.size() ? Ops::kNames[index] : nullptr;
}

// How often the op's kernel ran to its end since the library was loaded.
FASTCONV_API std::uint64_t fastconv_tensorflow_op_executions(std::size_t index) {
  using fastconv::tensorflow::Ops;
  return index < Ops::kNames.size() ? Ops::executions(index) : 0;
}

}  // extern "C"
