// XLA's door: the ops of framework_ops.hpp as handlers of custom calls, on the host and on NVIDIA GPUs,
// which is how they run inside a computation that XLA compiled (jit_compile=True, JAX). Nothing of
// XLA's is linked: the interface is found in the TensorFlow that this process has loaded, or comes
// with the call.
#include <dlfcn.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

#include "bindings/framework_ops.hpp"
#include "bindings/xla/device_operations.hpp"
#include "bindings/xla/ffi_api.hpp"
#include "core/cuda_backend.hpp"
#include "core/error.hpp"
#include "core/export.hpp"

namespace fastconv::xla {
namespace {

using framework::ElementType;
using framework::Ops;
using std::int64_t;

// --- what a kernel sees -----------------------------------------------------------------------

class Attributes {
 public:
  explicit Attributes(const AttributeList& list) : list_(list) {}

  template <std::size_t Size>
  std::array<int64_t, Size> integers(const char* name) const {
    const Array& array = *static_cast<const Array*>(find(name, AttributeType::array));
    if (array.type != DataType::int64 || array.size != Size) {
      throw InvalidArgument("`" + std::string(name) + "` must be a list of " +
                            std::to_string(Size) + " 64-bit integers. Received: a list of " +
                            std::to_string(array.size));
    }
    std::array<int64_t, Size> values{};
    std::memcpy(values.data(), array.data, sizeof values);
    return values;
  }

  std::string text(const char* name) const {
    const Text& text = *static_cast<const Text*>(find(name, AttributeType::string));
    return {text.data, text.size};
  }

 private:
  const void* find(std::string_view name, AttributeType type) const {
    for (int64_t i = 0; i < list_.size; ++i) {
      if (std::string_view(list_.names[i]->data, list_.names[i]->size) != name) continue;
      if (list_.types[i] == type) return list_.items[i];
    }
    throw InvalidArgument("The call must have the attribute `" + std::string(name) +
                          "`. Received: none of that name and kind");
  }

  const AttributeList& list_;
};

class Tensor {
 public:
  explicit Tensor(const Buffer& buffer) : buffer_(&buffer) {}
  ElementType type() const {
    switch (buffer_->type) {
      case DataType::float32: return ElementType::float32;
      case DataType::float16: return ElementType::float16;
      case DataType::bfloat16: return ElementType::bfloat16;
      case DataType::int32: return ElementType::int32;
      case DataType::uint8: return ElementType::uint8;
      case DataType::int8: return ElementType::int8;
      default: return ElementType::other;
    }
  }
  int rank() const { return static_cast<int>(buffer_->rank); }
  int64_t dim(int axis) const { return buffer_->dims[axis]; }
  void* data() const { return buffer_->data; }
  void* values(fastconv::DataType expected) const {
    const bool is_float = type() != ElementType::other && type() != ElementType::int32 &&
                          type() != ElementType::uint8 && type() != ElementType::int8;
    if (!is_float || framework::data_type_of(*this) != expected) {
      throw InvalidArgument(
          "Tensors must be of float32, float16 or bfloat16, all of one. Received: the data type " +
          std::to_string(static_cast<int>(buffer_->type)) + " of XLA's");
    }
    return data();
  }
  float* floats() const { return static_cast<float*>(values(fastconv::DataType::float32)); }

 private:
  const Buffer* buffer_;
};

class Context {
 public:
  using Tensor = xla::Tensor;

  explicit Context(const CallFrame& frame)
      : frame_(frame),
        // Behind the op's inputs there may be an operand that tells XLA the shape of the results.
        num_inputs_(Attributes(frame.attributes).integers<1>("num_inputs")[0]) {}

  int num_inputs() const { return static_cast<int>(num_inputs_); }
  int num_outputs() const { return static_cast<int>(frame_.results.size); }
  ElementType output_type(int index) const { return buffer(frame_.results, index).type(); }
  Tensor input(int index) const { return buffer(frame_.arguments, index); }

  // XLA has allocated it, of the shape that the call's text declares.
  Tensor output(int index, std::span<const int64_t> shape) const {
    const Tensor tensor = buffer(frame_.results, index);
    framework::check_shape(tensor, "output", shape);
    return tensor;
  }

 protected:
  const CallFrame& frame() const { return frame_; }

 private:
  static Tensor buffer(const Buffers& buffers, int index) {
    if (index >= buffers.size || buffers.types[index] != ArgumentType::buffer) {
      throw InvalidArgument("Argument " + std::to_string(index) + " must be a tensor. Received: " +
                            std::to_string(buffers.size) + " arguments");
    }
    return Tensor(*static_cast<const Buffer*>(buffers.items[index]));
  }

  const CallFrame& frame_;
  int64_t num_inputs_;
};

// Of a call on a GPU: all of its buffers are on one.
class DeviceContext : public Context {
 public:
  explicit DeviceContext(const CallFrame& frame) : Context(frame) {}

  DeviceOperations operations() const {
    const cuda::Library& library = cuda::library();
    StreamArguments arguments{sizeof(StreamArguments), nullptr, frame().context, nullptr};
    if (Error* failure = frame().api->get_stream(&arguments)) {
      ErrorDestroyArguments destroy{sizeof(ErrorDestroyArguments), nullptr, failure};
      frame().api->destroy_error(&destroy);
      throw std::runtime_error("fastconv: XLA gives no stream");
    }
    // The interface tells the device's number in later versions only; memory does in all. A call
    // without memory has nothing to do, wherever that is.
    int device = -1;
    for (const Buffers* buffers : {&frame().results, &frame().arguments}) {
      for (int64_t i = 0; i < buffers->size && device < 0; ++i) {
        const void* data = static_cast<const Buffer*>(buffers->items[i])->data;
        if (data != nullptr) cuda::check(library, library.device_of(data, &device));
      }
    }
    return {library, device < 0 ? 0 : device, arguments.stream};
  }
};

// --- from kernels to handlers -----------------------------------------------------------------

Error* error(const Api* api, ErrorCode code, const char* message) {
  ErrorCreateArguments arguments{sizeof(ErrorCreateArguments), nullptr, message, code};
  return api->create_error(&arguments);
}

// Whether XLA only asked which version of the interface the handler was written for.
bool answer_metadata(CallFrame& frame) {
  if (!frame.extensions || frame.extensions->type != ExtensionType::metadata) return false;
  Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame.extensions)->metadata;
  metadata.version = {sizeof(Version), nullptr, kMajorVersion, kMinorVersion};
  metadata.traits = 0;
  return true;
}

template <class Kernel, class ContextOfPlatform>
Error* handle(CallFrame* frame) noexcept {
  if (answer_metadata(*frame)) return nullptr;
  try {
    Kernel{Attributes(frame->attributes)}(ContextOfPlatform(*frame));
    framework::g_executions<Kernel>.fetch_add(1, std::memory_order_relaxed);
    return nullptr;
  } catch (const InvalidArgument& e) {
    return error(frame->api, ErrorCode::invalid_argument, e.what());
  } catch (const std::bad_alloc&) {
    return error(frame->api, ErrorCode::resource_exhausted, "fastconv: out of memory");
  } catch (const std::exception& e) {
    return error(frame->api, ErrorCode::internal, e.what());
  } catch (...) {
    return error(frame->api, ErrorCode::internal, "fastconv: unknown exception");
  }
}

Text text(std::string_view view) { return {view.data(), view.size()}; }

template <class Kernel>
void register_handler(const Api* api, const char* platform, Handler* handler) {
  RegisterArguments arguments{};
  arguments.struct_size = sizeof(RegisterArguments);
  arguments.name = text(Kernel::kName);
  arguments.platform = text(platform);
  arguments.stages.execute = handler;
  Error* failure = api->register_handler(&arguments);
  if (!failure) return;
  ErrorMessageArguments message{sizeof(ErrorMessageArguments), nullptr, failure, nullptr};
  api->get_error_message(&message);
  const std::string reason = message.message ? message.message : "unknown error";
  ErrorDestroyArguments destroy{sizeof(ErrorDestroyArguments), nullptr, failure};
  api->destroy_error(&destroy);
  throw std::runtime_error("XLA refuses the handler of " + std::string(Kernel::kName) + ": " +
                           reason);
}

#if defined(__APPLE__)
constexpr const char* kTensorFlowLibrary = "libtensorflow_cc.2.dylib";
#else
constexpr const char* kTensorFlowLibrary = "libtensorflow_cc.so.2";
#endif
constexpr const char* kGetApi = "_ZN3xla3ffi12GetXlaFfiApiEv";  // xla::ffi::GetXlaFfiApi()

const Api* find_api() {
  // NOLOAD: handlers must reach the XLA that runs, not a second one.
  void* library = dlopen(kTensorFlowLibrary, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) {
    throw std::runtime_error(std::string("this process has not loaded ") + kTensorFlowLibrary);
  }
  // No part of a public API: another TensorFlow may have none, or a different one.
  const auto get_api = reinterpret_cast<const Api* (*)()>(dlsym(library, kGetApi));
  if (!get_api) throw std::runtime_error("TensorFlow does not offer XLA's interface");
  const Api* api = get_api();
  if (!api || api->struct_size < offsetof(Api, get_stream) ||
      api->version.major_version != kMajorVersion || api->version.minor_version < kMinorVersion) {
    throw std::runtime_error("XLA's interface is of another version than 0.1 or later");
  }
  return api;
}

template <class ContextOfPlatform>
void register_all(const char* platform) {
  const Api* const api = find_api();
  Ops::for_each([&]<class Kernel>() {
    register_handler<Kernel>(api, platform, handle<Kernel, ContextOfPlatform>);
  });
}

template <class Register>
const char* reason_of_failure(std::string& reason, const Register& attempt) {
  try {
    attempt();
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
  } catch (...) {
    reason = "unknown exception";
  }
  return reason.c_str();
}

}  // namespace
}  // namespace fastconv::xla

// Read by fastconv.adapters.xla through ctypes.
extern "C" {

// Registers the handlers. Null when all is well, else why they cannot be. To be called once.
FASTCONV_API const char* fastconv_xla_register() {
  static std::string reason;
  return fastconv::xla::reason_of_failure(
      reason, [] { fastconv::xla::register_all<fastconv::xla::Context>("Host"); });
}

// The same for GPUs, where there is one.
FASTCONV_API const char* fastconv_xla_register_cuda() {
  static std::string reason;
  return fastconv::xla::reason_of_failure(reason, [] {
    fastconv::cuda::library();
    if (fastconv::xla::find_api()->struct_size <= offsetof(fastconv::xla::Api, get_stream))
      throw std::runtime_error("XLA's interface gives no stream");
    fastconv::xla::register_all<fastconv::xla::DeviceContext>("CUDA");
  });
}

// The handler of an op, for those who register it themselves, as jax.ffi does: on a GPU or the host.
// Null beyond the last op.
FASTCONV_API void* fastconv_xla_handler(std::size_t index, int on_gpu) {
  using namespace fastconv::xla;
  void* found = nullptr;
  std::size_t at = 0;
  Ops::for_each([&]<class Kernel>() {
    if (at++ != index) return;
    found = on_gpu ? reinterpret_cast<void*>(&handle<Kernel, DeviceContext>)
                   : reinterpret_cast<void*>(&handle<Kernel, Context>);
  });
  return found;
}

// Null beyond the last op.
FASTCONV_API const char* fastconv_xla_op_name(std::size_t index) {
  using fastconv::framework::Ops;
  return index < Ops::kNames.size() ? Ops::kNames[index] : nullptr;
}

// How often the op's kernel ran to its end inside XLA since the library was loaded.
FASTCONV_API std::uint64_t fastconv_xla_op_executions(std::size_t index) {
  using fastconv::framework::Ops;
  return index < Ops::kNames.size() ? Ops::executions(index) : 0;
}

}  // extern "C"
