#include "core/cuda_backend.hpp"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <new>
#include <utility>

#include "core/environment.hpp"
#include "core/error.hpp"

namespace fastconv::cuda {

CudaError::~CudaError() = default;

namespace {

#if defined(__APPLE__)
constexpr const char* kModuleName = "libfastconv_cuda.dylib";
#else
constexpr const char* kModuleName = "libfastconv_cuda.so";
#endif

struct Opened {
  const Library* library = nullptr;  // null: cannot be used
  Availability availability;
};

// Of the module that a build with CUDA kernels has.
std::string own_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_path), &info) == 0 || !info.dli_fname)
    return kModuleName;
  const std::string self = info.dli_fname;
  return self.substr(0, self.rfind('/') + 1) + kModuleName;
}

std::string default_path() { return from_environment("FASTCONV_CUDA_LIBRARY", own_path()); }

bool is_file(const std::string& path) {
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (file != nullptr) std::fclose(file);
  return file != nullptr;
}

// The table of the module at `path`; null, with the reason, where it is none of ours.
const Library* open_module(const std::string& path, std::string& reason) {
  if (!is_file(path)) {
    reason = path == own_path() ? "this build has no CUDA kernels" : "there is no file " + path;
    return nullptr;
  }
  void* const module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    const char* const error = dlerror();
    reason = error != nullptr ? error : "the module cannot be opened";
    return nullptr;
  }
  const auto get = reinterpret_cast<LibraryFunction*>(dlsym(module, kLibrarySymbol));
  const Library* const found = get != nullptr ? get() : nullptr;
  if (found == nullptr || found->version != Library::kVersion || found->bytes != sizeof(Library) ||
      found->conv2d_call_bytes != sizeof(Conv2dCall) ||
      found->pool2d_call_bytes != sizeof(Pool2dCall) ||
      found->conv2d_pool_call_bytes != sizeof(Conv2dPoolCall)) {
    reason = path + " belongs to another version of fastconv";
    return nullptr;
  }
  return found;
}

Opened open(const std::string& path) {
  Opened opened;
  Availability& facts = opened.availability;
  const Library* const found = open_module(path, facts.reason);
  if (found == nullptr) return opened;
  facts.library = path;
  const auto succeeds = [&](Status status) {
    if (status == Status::success) return true;
    facts.reason = found->message();
    return false;
  };
  int count = 0;
  if (!succeeds(found->versions(&facts.runtime_version, &facts.driver_version)) ||
      !succeeds(found->device_count(&count)))
    return opened;
  for (int i = 0; i < count; ++i) {
    DeviceDescription description{};
    if (!succeeds(found->describe(i, &description))) return opened;
    facts.devices.push_back(description);
  }
  if (count == 0) {
    facts.reason = "there is no CUDA device";
    return opened;
  }
  facts.available = true;
  opened.library = found;
  return opened;
}

std::mutex mutex;

// Under the mutex.
Opened& current() {
  static Opened* const opened = new Opened(open(default_path()));  // outlives static destructors
  return *opened;
}

}  // namespace

Availability availability() {
  const std::lock_guard lock(mutex);
  return current().availability;
}

const Library& library() {
  const std::lock_guard lock(mutex);
  const Opened& opened = current();
  if (opened.library == nullptr)
    throw CudaError("There is no GPU to compute on: " + opened.availability.reason);
  return *opened.library;
}

void use_library(const std::string& path) {
  Opened opened = open(path.empty() ? default_path() : path);
  if (!path.empty() && opened.library == nullptr)
    throw CudaError("There is no GPU to compute on: " + opened.availability.reason);
  const std::lock_guard lock(mutex);
  current() = std::move(opened);
}

namespace {
std::atomic<Float32Math> math_in_force{Float32Math::ieee};
}

Float32Math float32_math() { return math_in_force.load(); }
void set_float32_math(Float32Math math) { math_in_force = math; }

void check(const Library& library, Status status) {
  switch (status) {
    case Status::success: return;
    case Status::invalid_argument: throw InvalidArgument(library.message());
    case Status::out_of_memory: throw std::bad_alloc();
    default: throw CudaError(library.message());
  }
}

Memory::Memory(const Library& library, int device, void* stream, std::size_t bytes)
    : library_(library), device_(device), stream_(stream) {
  check(library, library.allocate(device, stream, bytes, &data_));
}

Memory::~Memory() {
  // Nobody is there to hear of errors; those of kernels are heard by who waits.
  for (void* point : uses_) {
    library_.order_after(device_, point, stream_);
    library_.forget(device_, point);
  }
  library_.release(device_, stream_, data_);
}

void Memory::note_use(void* stream) {
  if (stream == stream_) return;
  void* point = nullptr;
  check(library_, library_.record(device_, stream, &point));
  uses_.push_back(point);
}

void conv2d(const Library& library, int device, void* stream, const Conv2dCall& call) {
  std::size_t bytes = 0;
  check(library, library.conv2d_workspace(device, &call, &bytes));
  const Memory workspace(library, device, stream, bytes);
  check(library, library.conv2d(device, stream, &call, workspace.data()));
}

void conv2d_pool(const Library& library, int device, void* stream, const Conv2dPoolCall& call) {
  std::size_t bytes = 0;
  check(library, library.conv2d_pool_workspace(device, &call, &bytes));
  const Memory workspace(library, device, stream, bytes);
  check(library, library.conv2d_pool(device, stream, &call, workspace.data()));
}

}  // namespace fastconv::cuda
