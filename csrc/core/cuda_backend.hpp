// The GPU as the doors see it: the module fastconv_cuda, opened when somebody first asks for it, and
// its functions with exceptions for errors. A machine without a GPU, without a driver, or with a build
// that has no such module, is one whose availability() says so: nothing else changes.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/export.hpp"
#include "cuda/library.hpp"

namespace fastconv::cuda {

// Of CUDA, in its own words.
class FASTCONV_API CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  ~CudaError() override;
};

struct Availability {
  bool available = false;
  std::string reason;       // why not
  std::string library;      // path of the module; empty if there is none
  int runtime_version = 0;  // 1000 * major + 10 * minor
  int driver_version = 0;   // 0: no driver
  std::vector<DeviceDescription> devices;
};

// Opens the module that FASTCONV_CUDA_LIBRARY names, or else the one beside libfastconv. Never throws
// for what it finds: whatever fails means that there is no GPU.
FASTCONV_API Availability availability();

// The module's functions. Throws CudaError with the reason where there is no GPU to use.
FASTCONV_API const Library& library();

// Opens another module for the calls from now on; memory stays with the module that gave it. Tests
// run the builds of the emulator side by side. Throws CudaError where it cannot be used.
FASTCONV_API void use_library(const std::string& path);

// What float32 products are computed in, in the whole process; ieee until it is set.
FASTCONV_API Float32Math float32_math();
FASTCONV_API void set_float32_math(Float32Math math);

// Throws InvalidArgument, std::bad_alloc or CudaError for what is no success.
FASTCONV_API void check(const Library& library, Status status);

// Memory of a device, given and taken back in the order of a stream.
class FASTCONV_API Memory {
 public:
  Memory(const Library& library, int device, void* stream, std::size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }
  int device() const { return device_; }
  void* stream() const { return stream_; }
  // It has been used in the order of another stream: who gets it next must wait for that. Of any thread.
  void note_use(void* stream);

 private:
  const Library& library_;
  int device_;
  void* stream_;
  void* data_ = nullptr;
  struct Use {
    void* stream;
    void* point;  // behind all uses in that stream's order
  };
  std::mutex mutex_;
  std::vector<Use> uses_;  // of other streams
};

// A convolution with the workspace that it needs; and one with pooling behind it.
FASTCONV_API void conv2d(const Library& library, int device, void* stream, const Conv2dCall& call);
FASTCONV_API void conv2d_pool(const Library& library, int device, void* stream,
                              const Conv2dPoolCall& call);

}  // namespace fastconv::cuda
