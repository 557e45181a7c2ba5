// TensorFlow's door: registers the ops of framework_ops.hpp for the CPU, on the C API.
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>

#include "bindings/framework_ops.hpp"
#include "bindings/tensorflow/c_api.hpp"
#include "core/error.hpp"
#include "core/export.hpp"
#include "core/huge_pages.hpp"

namespace fastconv::tensorflow {
namespace {

using framework::ElementType;
using framework::g_executions;
using Ops = framework::OpsOutsideXla;
using std::int64_t;

ElementType element_type(int type) {
  switch (type) {
    case kFloat: return ElementType::float32;
    case kHalf: return ElementType::float16;
    case kBfloat16: return ElementType::bfloat16;
    case kInt32: return ElementType::int32;
    case kUint8: return ElementType::uint8;
    case kInt8: return ElementType::int8;
    default: return ElementType::other;
  }
}

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
  ElementType type() const { return element_type(TF_TensorType(tensor_.get())); }
  int rank() const { return TF_NumDims(tensor_.get()); }
  int64_t dim(int axis) const { return TF_Dim(tensor_.get(), axis); }
  void* data() const { return TF_TensorData(tensor_.get()); }
  void* values(fastconv::DataType) const { return data(); }      // TensorFlow has checked it
  float* floats() const { return static_cast<float*>(data()); }  // of an op of float32 alone

 private:
  struct Delete {
    void operator()(TF_Tensor* tensor) const { TF_DeleteTensor(tensor); }
  };
  std::unique_ptr<TF_Tensor, Delete> tensor_;
};

// What a kernel sees of one execution.
class Context {
 public:
  using Tensor = tensorflow::Tensor;
  // TensorFlow shares a tensor's memory with the one that we hold, and counts who does.
  static constexpr bool kHeldTensorsStay = true;

  explicit Context(TF_OpKernelContext* context) : context_(context) {}

  int num_inputs() const { return TF_NumInputs(context_); }
  int num_outputs() const { return TF_NumOutputs(context_); }
  ElementType output_type(int index) const {
    return element_type(TF_ExpectedOutputDataType(context_, index));
  }

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
    const int type = TF_ExpectedOutputDataType(context_, index);
    std::size_t bytes = type == kUint8 ? 1 : type == kHalf || type == kBfloat16 ? 2 : 4;
    for (int64_t extent : shape) bytes *= static_cast<std::size_t>(extent);
    const Status status;
    Tensor tensor(TF_AllocateOutput(context_, index, type, shape.data(),
                                    static_cast<int>(shape.size()), bytes, status.get()));
    status.check();
    advise_huge_pages(tensor.data(), bytes);
    return tensor;
  }

 private:
  TF_OpKernelContext* context_;
};

// What a kernel sees of its op's attributes.
class Attributes {
 public:
  explicit Attributes(TF_OpKernelConstruction* construction) : construction_(construction) {}

  template <std::size_t Size>
  std::array<int64_t, Size> integers(const char* name) const {
    const Status status;
    std::int32_t size = 0, total = 0;
    TF_OpKernelConstruction_GetAttrSize(construction_, name, &size, &total, status.get());
    status.check();
    if (size != static_cast<std::int32_t>(Size)) {
      throw InvalidArgument("`" + std::string(name) + "` must be a list of " +
                            std::to_string(Size) + " integers. Received: a list of " +
                            std::to_string(size));
    }
    std::array<int64_t, Size> values{};
    TF_OpKernelConstruction_GetAttrInt64List(construction_, name, values.data(),
                                             static_cast<int>(Size), status.get());
    status.check();
    return values;
  }

  int64_t integer(const char* name) const {
    return value<int64_t>(TF_OpKernelConstruction_GetAttrInt64, name);
  }
  bool flag(const char* name) const {
    return value<unsigned char>(TF_OpKernelConstruction_GetAttrBool, name) != 0;
  }
  float real(const char* name) const {
    return value<float>(TF_OpKernelConstruction_GetAttrFloat, name);
  }

  // The first letters of a string, enough to tell the allowed values from one another (TensorFlow
  // has checked that it is one of them).
  std::string text(const char* name) const {
    std::array<char, 16> value{};
    const Status status;
    TF_OpKernelConstruction_GetAttrString(construction_, name, value.data(), value.size() - 1,
                                          status.get());
    status.check();
    return value.data();
  }

 private:
  template <class Value, class Get>
  Value value(Get get, const char* name) const {
    const Status status;
    Value out{};
    get(construction_, name, &out, status.get());
    status.check();
    return out;
  }

  TF_OpKernelConstruction* construction_;
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
void* create(TF_OpKernelConstruction* construction) {
  Kernel* kernel = nullptr;
  report_failure([&] { kernel = new Kernel(Attributes(construction)); },
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
  constexpr int kInput = Kernel::kOutputLikeInput;
  if (kInput < 0 || TF_GetCode(status) != kOk) return;
  TF_ShapeHandle* shape = TF_NewShapeHandle();
  TF_ShapeInferenceContextGetInput(context, kInput, shape, status);
  if (TF_GetCode(status) == kOk) TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
  TF_DeleteShapeHandle(shape);
}

template <class Kernel>
void register_op() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(Kernel::kName);
  // TensorFlow sees to it that all inputs of an op have its T.
  TF_OpDefinitionBuilderAddAttr(op, Kernel::kOfFloat32Alone
                                        ? "T: {float} = DT_FLOAT"
                                        : "T: {float, half, bfloat16} = DT_FLOAT");
  for (const char* spec : Kernel::kGeometry) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kAttributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kOwnAttributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : Kernel::kInputs) TF_OpDefinitionBuilderAddInput(op, spec);
  for (const char* spec : Kernel::kOutputs) TF_OpDefinitionBuilderAddOutput(op, spec);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes<Kernel>);
  const Status status;
  TF_RegisterOpDefinition(op, status.get());
  status.check();

  TF_KernelBuilder* kernel =
      TF_NewKernelBuilder(Kernel::kName, "CPU", create<Kernel>, compute<Kernel>, destroy<Kernel>);
  TF_RegisterKernelBuilder(Kernel::kName, kernel, status.get());
  status.check();
}

// Why the ops could not be registered; empty where they are.
std::string& load_error() {
  static std::string text;
  return text;
}

// Runs while TensorFlow loads this library, which is when it collects the ops of a library.
__attribute__((constructor)) void register_ops() {
  try {
    resolve_c_api();
    Ops::for_each([]<class Kernel>() { register_op<Kernel>(); });
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
  using Ops = fastconv::framework::OpsOutsideXla;
  return index < Ops::kNames.size() ? Ops::kNames[index] : nullptr;
}

// How often the op's kernel ran to its end since the library was loaded.
FASTCONV_API std::uint64_t fastconv_tensorflow_op_executions(std::size_t index) {
  using Ops = fastconv::framework::OpsOutsideXla;
  return index < Ops::kNames.size() ? Ops::executions(index) : 0;
}

// How many of these runs found the filter laid out by an earlier one.
FASTCONV_API std::uint64_t fastconv_tensorflow_kept_filters() {
  return fastconv::framework::g_kept_filters.load(std::memory_order_relaxed);
}

}  // extern "C"
