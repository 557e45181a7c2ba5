#include "cuda/library.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "cuda/kernels.hpp"

namespace fastconv::cuda {
namespace {

// --- errors ---------------------------------------------------------------------------------------

class Failure : public std::runtime_error {
 public:
  Failure(cudaError_t error, const char* doing)
      : std::runtime_error("CUDA error while " + std::string(doing) + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error)),
        error(error) {}
  cudaError_t error;
};

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  Failure failure(error, doing);
  cudaGetLastError();  // else it would be found again by the next launch
  throw failure;
}

thread_local std::string t_message;

Status failed(Status status, const char* message) {
  try {
    t_message = message;
  } catch (...) {
    t_message.clear();
  }
  return status;
}

template <class Body>
Status guarded(const Body& body) noexcept {
  try {
    body();
    return Status::success;
  } catch (const InvalidArgument& e) {
    return failed(Status::invalid_argument, e.what());
  } catch (const Failure& e) {
    const bool no_memory = e.error == cudaErrorMemoryAllocation;
    return failed(no_memory ? Status::out_of_memory : Status::cuda_error, e.what());
  } catch (const std::bad_alloc&) {
    return failed(Status::out_of_memory, "out of memory");
  } catch (const std::exception& e) {
    return failed(Status::internal_error, e.what());
  } catch (...) {
    return failed(Status::internal_error, "unknown exception");
  }
}

// The device is the current one of this thread within the body, and what was current is after it.
template <class Body>
Status on_device(int device, const Body& body) noexcept {
  return guarded([&] {
    int before = 0;
    check(cudaGetDevice(&before), "asking for the current device");
    if (before != device) check(cudaSetDevice(device), "choosing the device");
    struct Restore {
      int device, other;
      ~Restore() {
        if (device != other) cudaSetDevice(device);
      }
    } const restore{before, device};
    body();
  });
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for a device's properties");
  return value;
}

Device read_device(int index) {
  Device device;
  device.index = index;
  device.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                              attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.shared_memory_per_block =
      static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return device;
}

Device device_at(int index) {
#if defined(FASTCONV_CUDA_EMULATE)
  return read_device(index);  // tests change it
#else
  static const std::vector<Device> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "counting devices");
    std::vector<Device> all;
    for (int i = 0; i < count; ++i) all.push_back(read_device(i));
    return all;
  }();
  if (index < 0 || index >= static_cast<int>(devices.size()))
    throw InvalidArgument("`device` must be below " + std::to_string(devices.size()) +
                          ". Received: device=" + std::to_string(index));
  return devices[static_cast<std::size_t>(index)];
#endif
}

#if defined(FASTCONV_CUDA_EMULATE)
#define FASTCONV_CUDA_CODE 75_80_86_89_90_100_120
#define FASTCONV_CUDA_PTX 120
#endif
#define FASTCONV_TEXT_OF(numbers) #numbers
#define FASTCONV_TEXT(numbers) FASTCONV_TEXT_OF(numbers)

// Whether one of the numbers in a text such as "75_80" is such.
template <class Is>
bool any_number(const char* text, const Is& is_such) {
  int number = 0;
  for (; *text != '\0'; ++text) {
    const bool is_digit = *text >= '0' && *text <= '9';
    number = is_digit ? 10 * number + (*text - '0') : 0;
    const bool ends = text[1] < '0' || text[1] > '9';
    if (is_digit && ends && is_such(number)) return true;
  }
  return false;
}

// Whether the module has machine code for a compute capability, which serves later ones of the same major
// number, or PTX for it or an earlier one. To ask CUDA would make a context on the device.
bool has_kernels_for(int compute_capability) {
  return any_number(FASTCONV_TEXT(FASTCONV_CUDA_CODE),
                    [&](int code) {
                      return code / 10 == compute_capability / 10 && code <= compute_capability;
                    }) ||
         any_number(FASTCONV_TEXT(FASTCONV_CUDA_PTX),
                    [&](int code) { return code <= compute_capability; });
}

// --- devices --------------------------------------------------------------------------------------

const char* message() { return t_message.c_str(); }

Status versions(int* runtime, int* driver) {
  return guarded([&] {
    *runtime = *driver = 0;
    check(cudaRuntimeGetVersion(runtime), "asking for the runtime's version");
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  });
}

Status device_count(int* count) {
  return guarded([&] {
    *count = 0;
    check(cudaGetDeviceCount(count), "counting devices");
  });
}

Status describe(int device, DeviceDescription* description) {
  return guarded([&] {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "asking for a device's properties");
    *description = {};
    std::memcpy(description->name, properties.name, sizeof description->name);
    description->compute_capability = 10 * properties.major + properties.minor;
    description->multiprocessors = properties.multiProcessorCount;
    description->memory_bytes = properties.totalGlobalMem;
    description->has_kernels = has_kernels_for(description->compute_capability);
  });
}

Status device_of(const void* pointer, int* device) {
  return guarded([&] {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, pointer), "asking where memory is");
    const bool is_device = attributes.type == cudaMemoryTypeDevice
#if !defined(FASTCONV_CUDA_EMULATE)
                           || attributes.type == cudaMemoryTypeManaged
#endif
        ;
    *device = is_device ? attributes.device : -1;
  });
}

// --- memory ---------------------------------------------------------------------------------------

#if !defined(FASTCONV_CUDA_EMULATE)
// A pool of our own that keeps what is given back: the device's default pool belongs to the whole
// process, and hands memory back to the system at each synchronisation. Made when the device is first
// asked for memory; null where it has no pools.
cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static auto* const pools = new std::map<int, cudaMemPool_t>;  // outlives static destructors
  const std::lock_guard lock(mutex);
  if (const auto known = pools->find(device); known != pools->end()) return known->second;
  cudaMemPool_t pool = nullptr;
  if (attribute(cudaDevAttrMemoryPoolsSupported, device) != 0) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    check(cudaMemPoolCreate(&pool, &properties), "making a memory pool");
    std::uint64_t keep_all = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all),
          "setting up a memory pool");
  }
  (*pools)[device] = pool;
  return pool;
}
#endif

Status allocate(int device, void* stream, std::size_t bytes, void** pointer) {
  return on_device(device, [&] {
    *pointer = nullptr;
    if (bytes == 0) return;
#if !defined(FASTCONV_CUDA_EMULATE)
    if (cudaMemPool_t pool = pool_of(device); pool != nullptr) {
      check(cudaMallocFromPoolAsync(pointer, bytes, pool, stream_of(stream)), "allocating memory");
      return;
    }
    check(cudaMalloc(pointer, bytes), "allocating memory");
#else
    check(cudaMallocAsync(pointer, bytes, stream_of(stream)), "allocating memory");
#endif
  });
}

Status release(int device, void* stream, void* pointer) {
  return on_device(device, [&] {
    if (pointer == nullptr) return;
#if !defined(FASTCONV_CUDA_EMULATE)
    if (pool_of(device) == nullptr) {
      check(cudaFree(pointer), "freeing memory");
      return;
    }
#endif
    check(cudaFreeAsync(pointer, stream_of(stream)), "freeing memory");
  });
}

Status copy_from_host(int device, void* stream, void* to, const void* from, std::size_t bytes) {
  return on_device(device, [&] {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(stream)),
          "copying to the device");
    // Pageable memory may be read after the call has returned.
    check(cudaStreamSynchronize(stream_of(stream)), "copying to the device");
  });
}

Status copy_to_host(int device, void* stream, void* to, const void* from, std::size_t bytes) {
  return on_device(device, [&] {
    if (bytes > 0)
      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(stream)),
            "copying to the host");
    check(cudaStreamSynchronize(stream_of(stream)), "copying to the host");
  });
}

Status fill_zero(int device, void* stream, void* to, std::size_t bytes) {
  return on_device(device, [&] {
    if (bytes > 0) check(cudaMemsetAsync(to, 0, bytes, stream_of(stream)), "clearing memory");
  });
}

// --- streams --------------------------------------------------------------------------------------

Status create_stream(int device, void** stream) {
  return on_device(device, [&] {
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "making a stream");
    *stream = made;
  });
}

Status destroy_stream(int device, void* stream) {
  return on_device(device,
                   [&] { check(cudaStreamDestroy(stream_of(stream)), "destroying a stream"); });
}

Status wait(int device, void* stream) {
  return on_device(
      device, [&] { check(cudaStreamSynchronize(stream_of(stream)), "waiting for a stream"); });
}

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event"); }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }
  cudaEvent_t give_up() {
    const cudaEvent_t event = event_;
    event_ = nullptr;
    return event;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

Status order(int device, void* earlier, void* later) {
  return on_device(device, [&] {
    if (earlier == later) return;
    const Event event;
    check(cudaEventRecord(event.get(), stream_of(earlier)), "recording an event");
    check(cudaStreamWaitEvent(stream_of(later), event.get(), 0), "making a stream wait");
  });
}

Status record(int device, void* stream, void** point) {
  return on_device(device, [&] {
    Event event;
    check(cudaEventRecord(event.get(), stream_of(stream)), "recording an event");
    *point = event.give_up();
  });
}

Status order_after(int device, void* point, void* later) {
  return on_device(device, [&] {
    check(cudaStreamWaitEvent(stream_of(later), static_cast<cudaEvent_t>(point), 0),
          "making a stream wait");
  });
}

Status has_happened(int device, void* point, bool* answer) {
  return on_device(device, [&] {
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(point));
    *answer = error != cudaErrorNotReady;
    if (*answer) check(error, "asking for an event");
  });
}

Status forget(int device, void* point) {
  return on_device(device, [&] {
    check(cudaEventDestroy(static_cast<cudaEvent_t>(point)), "destroying an event");
  });
}

// --- convolution ----------------------------------------------------------------------------------

void check_size(const char* name, std::int64_t elements) {
  if (elements < std::int64_t{1} << 31) return;
  throw InvalidArgument("On a GPU each tensor must have fewer than 2**31 elements. Received: `" +
                        std::string(name) + "` of " + std::to_string(elements));
}

// Pooling's coordinates are int.
void check_extent(const char* name, std::int64_t size, std::int64_t before, std::int64_t after) {
  if (size + before + after < std::int64_t{1} << 30) return;
  throw InvalidArgument("On a GPU the " + std::string(name) +
                        " of a pooling's input must be below 2**30, padding included. Received: " +
                        std::to_string(size) + " with padding (" + std::to_string(before) + ", " +
                        std::to_string(after) + ")");
}

void check_sizes(const Conv2dProblem& p) {
  check_size("x", p.x_size());
  check_size("w", p.filter_size());
  check_size("y", p.y_size());
}

// A backward direction by way of dz = dy where y > 0, and the workspace of each step one behind the
// other.
struct Conv2dPlan {
  Conv2dSpec spec;
  bool masked = false;                         // dz is needed
  bool reduces = false;                        // activation_grad has something to do
  const Conv2dAlgorithm* algorithm = nullptr;  // null: dbias alone is wanted
  std::size_t dz_bytes = 0, reduction_bytes = 0, algorithm_bytes = 0;

  std::size_t workspace_bytes() const { return dz_bytes + reduction_bytes + algorithm_bytes; }
};

std::size_t rounded_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

Conv2dPlan plan(const Conv2dCall& call, const Device& device) {
  const Conv2dProblem& p = call.problem;
  check_sizes(p);
  Conv2dPlan made;
  made.spec = {p, call.direction, call.type, call.math};
  const bool backward = call.direction != Direction::fprop;
  made.masked = backward && p.activation == Activation::relu;
  made.reduces = made.masked || (call.direction == Direction::wgrad && call.dbias != nullptr);
  if (p.n == 0) return made;
  if (made.masked)
    made.dz_bytes = rounded_up(static_cast<std::size_t>(p.y_size()) * size_of(call.type));
  if (made.reduces && call.dbias != nullptr)
    made.reduction_bytes = rounded_up(activation_grad_workspace_bytes(p, call.type, device));
  if (call.direction != Direction::wgrad || call.out != nullptr) {
    made.algorithm = &choose(made.spec, device, call.algorithm);
    made.algorithm_bytes = rounded_up(made.algorithm->workspace_bytes(made.spec, device));
  }
  return made;
}

void run(const Conv2dCall& call, const Conv2dPlan& made, const Device& device, cudaStream_t stream,
         void* workspace) {
  const Conv2dProblem& p = call.problem;
  if (p.n == 0) {
    if (call.direction != Direction::wgrad) return;
    const std::size_t size = size_of(call.type);
    if (call.out != nullptr)
      check(cudaMemsetAsync(call.out, 0, static_cast<std::size_t>(p.filter_size()) * size, stream),
            "clearing memory");
    if (call.dbias != nullptr)
      check(cudaMemsetAsync(call.dbias, 0, static_cast<std::size_t>(p.k) * size, stream),
            "clearing memory");
    return;
  }
  char* const dz = static_cast<char*>(workspace);
  char* const reduction = dz + made.dz_bytes;
  if (made.reduces)
    check(activation_grad(p, call.type, call.dy, made.masked ? call.y : nullptr,
                          made.masked ? dz : nullptr, call.dbias, {device, stream, reduction}),
          "launching the gradient of the activation");
  if (made.algorithm == nullptr) return;
  Conv2dOperands operands;
  operands.x = call.x;
  operands.filter = call.filter;
  operands.bias = call.bias;
  operands.dy = made.masked ? dz : call.dy;
  operands.out = call.out;
  check(
      made.algorithm->run(made.spec, operands, {device, stream, reduction + made.reduction_bytes}),
      made.algorithm->name);
}

Status conv2d_workspace(int device, const Conv2dCall* call, std::size_t* bytes) {
  return on_device(device, [&] { *bytes = plan(*call, device_at(device)).workspace_bytes(); });
}

Status conv2d(int device, void* stream, const Conv2dCall* call, void* workspace) {
  return on_device(device, [&] {
    const Device where = device_at(device);
    run(*call, plan(*call, where), where, stream_of(stream), workspace);
  });
}

Status conv2d_candidates(int device, const Conv2dCall* call, CandidateFunction function,
                         void* context) {
  return on_device(device, [&] {
    const Device where = device_at(device);
    check_sizes(call->problem);
    const Conv2dSpec spec{call->problem, call->direction, call->type, call->math};
    if (call->problem.n == 0) return;
    const Conv2dAlgorithm& chosen = choose(spec, where, call->algorithm);
    const auto tell = [&](const Conv2dAlgorithm& algorithm) {
      function(context, algorithm.name, algorithm.blocking(spec, where).c_str(),
               algorithm.workspace_bytes(spec, where), algorithm.estimate(spec, where));
    };
    tell(chosen);
    for (const Conv2dAlgorithm* algorithm : algorithms())
      if (algorithm != &chosen && algorithm->serves(spec, where)) tell(*algorithm);
  });
}

// --- pooling --------------------------------------------------------------------------------------

Status pool2d(int device, void* stream, const Pool2dCall* call) {
  return on_device(device, [&] {
    const Pool2dProblem& p = call->problem;
    check_size("x", p.x_size());
    check_size("y", p.y_size());
    check_extent("height", p.h, p.pad_top, p.pad_bottom);
    check_extent("width", p.w, p.pad_left, p.pad_right);
    if (p.n == 0) return;
    const Call where{device_at(device), stream_of(stream), nullptr};
    const bool is_max = call->pooling == Pooling::max;
    cudaError_t error = cudaSuccess;
    if (is_max && call->gather)
      error = max_pool2d_gather(p, call->type, call->in, call->argmax, call->out, where);
    else if (is_max && !call->backward)
      error = max_pool2d_fprop(p, call->type, call->in, call->out, call->argmax, where);
    else if (is_max)
      error = max_pool2d_bprop(p, call->type, call->in, call->argmax, call->out, where);
    else if (!call->backward)
      error = avg_pool2d_fprop(p, call->type, call->in, call->out, where);
    else
      error = avg_pool2d_bprop(p, call->type, call->in, call->out, where);
    check(error, "launching a pooling");
  });
}

// --- convolution and pooling in one ---------------------------------------------------------------

// The kernels of each one after the other. Windows do not overlap, so that the mask of ReLU and the
// sum for dbias are taken of the pooled gradient, a quarter of it, before that goes back to where
// the maxima were.
struct Conv2dPoolPlan {
  Pool2dProblem pool;
  Conv2dProblem pooled;      // with the pooled output in its output's place
  Conv2dCall first, second;  // forward: first alone; backward: wgrad, dgrad
  Conv2dPlan first_plan, second_plan;
  bool masked = false;
  std::size_t whole_bytes = 0, dz_bytes = 0, reduction_bytes = 0;

  std::size_t workspace_bytes() const {
    return whole_bytes + dz_bytes + reduction_bytes +
           std::max(first_plan.workspace_bytes(), second_plan.workspace_bytes());
  }
};

Conv2dPoolPlan plan(const Conv2dPoolCall& call, const Device& device) {
  const Conv2dProblem& p = call.problem;
  check_sizes(p);
  Conv2dPoolPlan made;
  made.pool = pool_behind(p);
  made.pooled = p;
  made.pooled.oh = made.pool.oh;
  made.pooled.ow = made.pool.ow;
  made.first.problem = p;
  made.first.type = call.type;
  made.first.math = call.math;
  if (p.n == 0) return made;
  made.whole_bytes = rounded_up(static_cast<std::size_t>(p.y_size()) * size_of(call.type));
  if (!call.backward) {
    made.first.algorithm = call.algorithm;
    made.first.x = call.x;
    made.first.filter = call.filter;
    made.first.bias = call.bias;
    made.first_plan = plan(made.first, device);
    return made;
  }
  made.masked = p.activation == Activation::relu;
  if (made.masked)
    made.dz_bytes = rounded_up(static_cast<std::size_t>(made.pool.y_size()) * size_of(call.type));
  if (call.dbias != nullptr)
    made.reduction_bytes =
        rounded_up(activation_grad_workspace_bytes(made.pooled, call.type, device));
  made.first.problem.activation = Activation::linear;
  made.second = made.first;
  made.first.direction = Direction::wgrad;
  made.first.x = call.x;
  made.first.out = call.dfilter;
  made.second.direction = Direction::dgrad;
  made.second.filter = call.filter;
  made.second.out = call.dx;
  (call.dx != nullptr ? made.second : made.first).algorithm = call.algorithm;
  made.first_plan = plan(made.first, device);
  if (call.dx != nullptr) made.second_plan = plan(made.second, device);
  return made;
}

void run(const Conv2dPoolCall& call, Conv2dPoolPlan made, const Device& device, cudaStream_t stream,
         void* workspace) {
  if (call.problem.n == 0) {
    if (!call.backward) return;
    made.first.direction = Direction::wgrad;
    made.first.out = call.dfilter;
    made.first.dbias = call.dbias;
    run(made.first, Conv2dPlan(), device, stream, nullptr);
    return;
  }
  char* const whole = static_cast<char*>(workspace);
  char* const dz = whole + made.whole_bytes;
  char* const reduction = dz + made.dz_bytes;
  char* const rest = reduction + made.reduction_bytes;
  if (!call.backward) {
    made.first.out = whole;
    run(made.first, made.first_plan, device, stream, rest);
    check(max_pool2d_fprop(made.pool, call.type, whole, call.y, call.argmax,
                           {device, stream, nullptr}),
          "launching a pooling");
    return;
  }
  if (made.masked || call.dbias != nullptr)
    check(activation_grad(made.pooled, call.type, call.dy, made.masked ? call.y : nullptr,
                          made.masked ? dz : nullptr, call.dbias, {device, stream, reduction}),
          "launching the gradient of the activation");
  check(max_pool2d_bprop(made.pool, call.type, made.masked ? dz : call.dy, call.argmax, whole,
                         {device, stream, nullptr}),
        "launching a pooling");
  made.first.dy = made.second.dy = whole;
  run(made.first, made.first_plan, device, stream, rest);
  if (call.dx != nullptr) run(made.second, made.second_plan, device, stream, rest);
}

Status conv2d_pool_workspace(int device, const Conv2dPoolCall* call, std::size_t* bytes) {
  return on_device(device, [&] { *bytes = plan(*call, device_at(device)).workspace_bytes(); });
}

Status conv2d_pool(int device, void* stream, const Conv2dPoolCall* call, void* workspace) {
  return on_device(device, [&] {
    const Device where = device_at(device);
    run(*call, plan(*call, where), where, stream_of(stream), workspace);
  });
}

Library make_library() {
  Library library;
  library.message = message;
  library.versions = versions;
  library.device_count = device_count;
  library.describe = describe;
  library.device_of = device_of;
  library.allocate = allocate;
  library.release = release;
  library.copy_from_host = copy_from_host;
  library.copy_to_host = copy_to_host;
  library.fill_zero = fill_zero;
  library.create_stream = create_stream;
  library.destroy_stream = destroy_stream;
  library.wait = wait;
  library.order = order;
  library.record = record;
  library.order_after = order_after;
  library.has_happened = has_happened;
  library.forget = forget;
  library.conv2d_workspace = conv2d_workspace;
  library.conv2d = conv2d;
  library.conv2d_candidates = conv2d_candidates;
  library.pool2d = pool2d;
  library.conv2d_pool_workspace = conv2d_pool_workspace;
  library.conv2d_pool = conv2d_pool;
  return library;
}

const Library kLibrary = make_library();

}  // namespace
}  // namespace fastconv::cuda

extern "C" __attribute__((visibility("default"))) const fastconv::cuda::Library*
fastconv_cuda_library() {
  return &fastconv::cuda::kLibrary;
}
