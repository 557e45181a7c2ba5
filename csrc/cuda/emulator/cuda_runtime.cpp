#include "cuda/emulator/cuda_runtime.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulator/allocations.hpp"

using fastconv::emulator::Allocation;

struct CUstream_st {
  std::deque<std::function<void()>> work;
  unsigned long enqueued = 0, done = 0;
  bool blocking = true;  // the legacy default stream waits for it
};

struct CUevent_st {
  cudaStream_t stream = nullptr;  // of the last record; null: none, or the default stream
  unsigned long position = 0;     // `done` of that stream once the event has happened
  std::chrono::steady_clock::time_point time;
};

namespace fastconv::emulator {
namespace {

// Every call holds it from beginning to end: one kernel runs at a time. Recursive, since work that a
// call does may be a call.
std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Runtime {
  std::map<std::uintptr_t, Allocation> allocations;
  std::set<cudaStream_t> streams;
  CUstream_st per_thread;
  std::map<const void*, int> most_dynamic_shared;  // by kernel, where it asked for more
  cudaError_t last_error = cudaSuccess;
  cudaError_t kernel_error = cudaSuccess;  // for the next call that waits
  std::string error_text;
};

Runtime& runtime() {
  static Runtime* const instance = [] {
    auto* made = new Runtime;
    made->streams.insert(&made->per_thread);
    return made;
  }();
  return *instance;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) runtime().last_error = error;
  return error;
}

int number_in_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && std::atoi(text) > 0 ? std::atoi(text) : otherwise;
}

bool is_eager() {
  const char* text = std::getenv("FASTCONV_EMULATOR_STREAMS");
  return text != nullptr && std::strcmp(text, "eager") == 0;
}

bool is_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

// The stream behind a handle; null for the legacy default stream and for none.
cudaStream_t stream_of(cudaStream_t handle) {
  return handle == cudaStreamPerThread ? &runtime().per_thread : handle;
}

bool is_known(cudaStream_t handle) {
  return is_default(handle) || runtime().streams.count(stream_of(handle)) > 0;
}

void work_until(cudaStream_t stream, unsigned long position) {
  if (runtime().streams.count(stream) == 0) return;
  while (stream->done < position && !stream->work.empty()) {
    const std::function<void()> work = std::move(stream->work.front());
    stream->work.pop_front();
    work();
    ++stream->done;
  }
}

void work_all(bool blocking_only) {
  const std::vector<cudaStream_t> streams(runtime().streams.begin(), runtime().streams.end());
  for (const cudaStream_t stream : streams)
    if (stream->blocking || !blocking_only) work_until(stream, stream->enqueued);
}

cudaError_t take_kernel_error() {
  return result(std::exchange(runtime().kernel_error, cudaSuccess));
}

void enqueue(cudaStream_t handle, std::function<void()> work) {
  if (is_default(handle)) {
    work_all(true);
    work();
    return;
  }
  const cudaStream_t stream = stream_of(handle);
  stream->work.push_back(std::move(work));
  ++stream->enqueued;
  if (is_eager()) work_until(stream, stream->enqueued);
}

cudaError_t wait(cudaStream_t handle) {
  if (is_default(handle))
    work_all(true);
  else
    work_until(stream_of(handle), stream_of(handle)->enqueued);
  return take_kernel_error();
}

void free_now(void* pointer) {
  runtime().allocations.erase(reinterpret_cast<std::uintptr_t>(pointer));
  std::free(pointer);
}

bool in_device_memory(const void* pointer, std::size_t bytes) {
  return find_allocation(reinterpret_cast<std::uintptr_t>(pointer), bytes) != nullptr;
}

// Whether `kind` agrees with where the memory is.
bool is_valid_copy(const void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0 || kind == cudaMemcpyDefault) return true;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  return in_device_memory(to, bytes) == to_device && in_device_memory(from, bytes) == from_device;
}

}  // namespace

DeviceProperties device_properties() {
  const int capability = number_in_environment("FASTCONV_EMULATOR_COMPUTE_CAPABILITY", 80);
  std::size_t shared = 99 << 10;  // 86, 89, 120
  if (capability == 75) shared = 64 << 10;
  if (capability == 80) shared = 163 << 10;
  if (capability == 90 || capability == 100) shared = 227 << 10;
  return {capability, number_in_environment("FASTCONV_EMULATOR_MULTIPROCESSORS", 8), shared};
}

const Allocation* find_allocation(std::uintptr_t address, std::size_t bytes) {
  const auto& allocations = runtime().allocations;
  const auto next = allocations.upper_bound(address);
  if (next == allocations.begin()) return nullptr;
  const Allocation& found = std::prev(next)->second;
  return address + bytes <= found.address + found.bytes ? &found : nullptr;
}

cudaError_t set_most_dynamic_shared(const void* kernel, int bytes) {
  const Lock lock(mutex);
  if (bytes < 0 || std::size_t(bytes) > device_properties().shared_memory_opt_in)
    return result(cudaErrorInvalidValue);
  runtime().most_dynamic_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const LaunchShape& shape, std::unique_ptr<KernelCall> call,
                   cudaStream_t stream) {
  const Lock lock(mutex);
  if (!is_known(stream)) return result(cudaErrorInvalidResourceHandle);
  const dim3 grid = shape.grid, block = shape.block;
  const auto allowed = runtime().most_dynamic_shared.find(call->kernel);
  const std::size_t most_dynamic = allowed != runtime().most_dynamic_shared.end()
                                       ? std::size_t(allowed->second)
                                       : kMostStaticShared;
  if (std::uint64_t(block.x) * block.y * block.z - 1 >= kMostThreads || block.z > 64 ||
      grid.x - 1 >= 0x7fffffff || grid.y - 1 >= 65535 || grid.z - 1 >= 65535)
    return result(cudaErrorInvalidConfiguration);
  if (shape.dynamic_shared_bytes > most_dynamic) return result(cudaErrorInvalidValue);
  enqueue(stream, [shape, call = std::shared_ptr<KernelCall>(std::move(call))] {
    execute(shape, *call);
    if (!has_findings()) return;
    runtime().kernel_error = cudaErrorLaunchFailure;
    runtime().error_text = "unspecified launch failure" + take_findings();
  });
  return cudaSuccess;
}

}  // namespace fastconv::emulator

using namespace fastconv::emulator;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Lock lock(mutex);
  return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Lock lock(mutex);
  if (device != 0) return result(cudaErrorInvalidDevice);
  const DeviceProperties properties = device_properties();
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(kMostStaticShared); return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(properties.shared_memory_opt_in);
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  const Lock lock(mutex);
  if (device != 0) return result(cudaErrorInvalidDevice);
  const DeviceProperties properties = device_properties();
  *out = cudaDeviceProp{};
  std::snprintf(out->name, sizeof out->name, "emulated device");
  out->totalGlobalMem = std::size_t(1) << 30;
  out->major = properties.compute_capability / 10;
  out->minor = properties.compute_capability % 10;
  out->multiProcessorCount = properties.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex);
  work_all(false);
  return take_kernel_error();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const Lock lock(mutex);
  return std::exchange(runtime().last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const Lock lock(mutex);
  return runtime().last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorLaunchFailure: {
      const Lock lock(mutex);
      return runtime().error_text.c_str();
    }
  }
  return "unrecognized error code";
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Lock lock(mutex);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > std::size_t(1) << 30 || posix_memalign(pointer, 256, bytes) != 0) {
    *pointer = nullptr;
    return result(cudaErrorMemoryAllocation);
  }
  std::memset(*pointer, 0xff, bytes);  // NaN, and not the zero that a kernel may wrongly count on
  const auto address = reinterpret_cast<std::uintptr_t>(*pointer);
  runtime().allocations[address] = {address, bytes};
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  const Lock lock(mutex);
  work_all(false);
  if (pointer == nullptr) return take_kernel_error();
  if (runtime().allocations.count(reinterpret_cast<std::uintptr_t>(pointer)) == 0)
    return result(cudaErrorInvalidValue);
  free_now(pointer);
  return take_kernel_error();
}

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const Lock lock(mutex);
  if (pointer == nullptr) return cudaSuccess;
  if (!is_known(stream)) return result(cudaErrorInvalidResourceHandle);
  if (runtime().allocations.count(reinterpret_cast<std::uintptr_t>(pointer)) == 0)
    return result(cudaErrorInvalidValue);
  enqueue(stream, [pointer] { free_now(pointer); });
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  *free_bytes = *total_bytes = std::size_t(1) << 30;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex);
  const bool on_device = in_device_memory(pointer, 1);
  *attributes = {};
  attributes->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = on_device ? 0 : -2;
  attributes->devicePointer = on_device ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const Lock lock(mutex);
  work_all(true);
  if (!is_valid_copy(to, from, bytes, kind)) return result(cudaErrorInvalidValue);
  if (bytes > 0) std::memcpy(to, from, bytes);
  return take_kernel_error();
}

// As the device copies pageable memory: what comes from the host is taken at once, what goes there is
// waited for.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Lock lock(mutex);
  if (!is_known(stream)) return result(cudaErrorInvalidResourceHandle);
  if (!is_valid_copy(to, from, bytes, kind)) return result(cudaErrorInvalidValue);
  if (bytes == 0) return cudaSuccess;
  if (!in_device_memory(from, bytes)) {
    const char* host = static_cast<const char*>(from);
    enqueue(stream, [to, taken = std::vector<char>(host, host + bytes)] {
      std::memcpy(to, taken.data(), taken.size());
    });
    return cudaSuccess;
  }
  enqueue(stream, [to, from, bytes] { std::memcpy(to, from, bytes); });
  return in_device_memory(to, bytes) ? cudaSuccess : wait(stream);
}

cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Lock lock(mutex);
  if (bytes == 0) return cudaSuccess;
  if (!is_known(stream)) return result(cudaErrorInvalidResourceHandle);
  if (!in_device_memory(to, bytes)) return result(cudaErrorInvalidValue);
  enqueue(stream, [to, value, bytes] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const Lock lock(mutex);
  *stream = new CUstream_st;
  (*stream)->blocking = flags != cudaStreamNonBlocking;
  runtime().streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(mutex);
  if (is_default(stream) || stream == cudaStreamPerThread || !is_known(stream))
    return result(cudaErrorInvalidResourceHandle);
  work_until(stream, stream->enqueued);
  runtime().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(mutex);
  return is_known(stream) ? wait(stream) : result(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(mutex);
  if (!is_known(stream)) return result(cudaErrorInvalidResourceHandle);
  enqueue(stream, [source = event->stream, position = event->position] {
    if (source != nullptr) work_until(source, position);
  });
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const Lock lock(mutex);
  if (!is_known(handle)) return result(cudaErrorInvalidResourceHandle);
  event->stream = is_default(handle) ? nullptr : stream_of(handle);
  if (is_default(handle)) work_all(true);
  event->position = event->stream != nullptr ? event->stream->enqueued : 0;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(mutex);
  if (event->stream != nullptr) work_until(event->stream, event->position);
  return take_kernel_error();
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
