#include "core/cuda_backend.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
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
  const auto has_kernels = [](const DeviceDescription& device) { return device.has_kernels; };
  if (std::none_of(facts.devices.begin(), facts.devices.end(), has_kernels)) {
    const DeviceDescription& first = facts.devices.front();
    facts.reason = "this build has no kernels for the compute capability of ";
    facts.reason.append(first.name).append(", ");
    facts.reason.append(std::to_string(first.compute_capability / 10)).append(".");
    facts.reason.append(std::to_string(first.compute_capability % 10));
    return opened;
  }
  facts.available = true;
  opened.library = found;
  return opened;
}

// Leaked, as is what it guards: calls may still run while static objects are destroyed.
std::mutex& mutex = *new std::mutex;
Opened* current = nullptr;  // null: nobody has asked yet

// A child forked while another thread holds it would find it locked for ever.
[[maybe_unused]] const int registered =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });

// What is open, for as long as `lock`. Opening takes long, and a fork waits for who holds the mutex: it is
// done without, perhaps by two threads, of which one is listened to.
const Opened& opened_under(std::unique_lock<std::mutex>& lock) {
  lock = std::unique_lock(mutex);
  if (current != nullptr) return *current;
  lock.unlock();
  auto made = std::make_unique<Opened>(open(default_path()));
  lock.lock();
  if (current == nullptr) current = made.release();
  return *current;
}

}  // namespace

Availability availability() {
  std::unique_lock<std::mutex> lock;
  return opened_under(lock).availability;
}

const Library& library() {
  std::unique_lock<std::mutex> lock;
  const Opened& opened = opened_under(lock);
  if (opened.library == nullptr)
    throw CudaError("There is no GPU to compute on: " + opened.availability.reason);
  return *opened.library;
}

void use_library(const std::string& path) {
  Opened opened = open(path.empty() ? default_path() : path);
  if (!path.empty() && opened.library == nullptr)
    throw CudaError("There is no GPU to compute on: " + opened.availability.reason);
  auto made = std::make_unique<Opened>(std::move(opened));
  const std::lock_guard lock(mutex);
  delete std::exchange(current, made.release());
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
  for (const Use& use : uses_) {
    library_.order_after(device_, use.point, stream_);
    library_.forget(device_, use.point);
  }
  library_.release(device_, stream_, data_);
}

void Memory::note_use(void* stream) {
  if (stream == stream_) return;
  const std::lock_guard lock(mutex_);
  uses_.reserve(uses_.size() + 1);
  const auto known = std::find_if(uses_.begin(), uses_.end(),
                                  [&](const Use& use) { return use.stream == stream; });
  // The new point stands for the old one too, even if another stream has got the handle since.
  if (known != uses_.end()) check(library_, library_.order_after(device_, known->point, stream));
  void* point = nullptr;
  check(library_, library_.record(device_, stream, &point));
  if (known == uses_.end()) {
    uses_.push_back({stream, point});
    return;
  }
  library_.forget(device_, known->point);
  known->point = point;
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
