// The door of the module fastconv_cuda: a table of functions behind one C symbol, so that libfastconv
// can open the module by dlopen, on machines that have CUDA, and ask whether the two belong
// together. No CUDA header is needed here, and no exception crosses: functions return a Status, and
// message() says the rest.
//
// Pointers to tensors are the device's; a stream is a cudaStream_t, null being the legacy default
// stream. Nothing waits unless it says so.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/data_type.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"

namespace fastconv::cuda {

// The type of x, filter, bias, y and their gradients, all the same. Products are summed in float32.
using fastconv::DataType;
using fastconv::size_of;

// What float32 products may be computed in: themselves, or TF32 on tensor cores (10 bits of
// mantissa, as by default in cuDNN).
enum class Float32Math : std::uint8_t { ieee, tf32 };

enum class Status : int { success, invalid_argument, out_of_memory, cuda_error, internal_error };

struct DeviceDescription {
  char name[256];
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
  std::uint64_t memory_bytes;
  bool has_kernels;  // the module has code that runs there
};

// One convolution, as conv2d_fprop, conv2d_dgrad and conv2d_wgrad of core/operations.hpp: the same
// tensors, any of them null where it may be null there.
struct Conv2dCall {
  Conv2dProblem problem;
  Direction direction = Direction::fprop;
  DataType type = DataType::float32;
  Float32Math math = Float32Math::ieee;
  const char* algorithm = nullptr;  // null: that of the least estimate
  const void* x = nullptr;
  const void* filter = nullptr;
  const void* bias = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;  // fprop's output, of the backward directions with ReLU
  void* out = nullptr;      // y, dx or dfilter
  void* dbias = nullptr;    // of wgrad
};

enum class Pooling : std::uint8_t { max, average };

struct Pool2dCall {
  Pool2dProblem problem;
  Pooling pooling = Pooling::max;
  bool backward = false;
  bool gather = false;  // max: out is x where argmax says, which is read
  DataType type = DataType::float32;
  const void* in = nullptr;  // x or dy
  void* out = nullptr;       // y or dx
  void* argmax = nullptr;    // of max-pooling: may be null forward, is only read backward
};

// A convolution and the 2 x 2 max-pooling behind it (pool_behind), as conv2d_pool_fprop and
// conv2d_pool_bprop of core/operations.hpp. The convolution's output, or its gradient, is in the
// workspace.
struct Conv2dPoolCall {
  Conv2dProblem problem;
  bool backward = false;
  DataType type = DataType::float32;
  Float32Math math = Float32Math::ieee;
  const char* algorithm = nullptr;  // of fprop; backward of dgrad, without dx of wgrad
  const void* x = nullptr;
  const void* filter = nullptr;
  const void* bias = nullptr;  // forward; may be null
  void* y = nullptr;           // the result forward; backward, with ReLU, it is read
  void* argmax = nullptr;      // may be null forward, is only read backward
  const void* dy = nullptr;
  void* dx = nullptr;  // may be null, as dbias
  void* dfilter = nullptr;
  void* dbias = nullptr;
};

// What is told of each algorithm that serves a convolution, the chosen one first.
using CandidateFunction = void (*)(void* context, const char* name, const char* blocking,
                                   std::uint64_t workspace_bytes, double seconds);

struct Library {
  // What the two sides must agree on before anything else is read.
  static constexpr std::uint32_t kVersion = 4;
  std::uint32_t version = kVersion;
  std::uint32_t bytes = sizeof(Library);
  std::uint32_t conv2d_call_bytes = sizeof(Conv2dCall);
  std::uint32_t pool2d_call_bytes = sizeof(Pool2dCall);
  std::uint32_t conv2d_pool_call_bytes = sizeof(Conv2dPoolCall);

  const char* (*message)();  // of this thread's last call that was no success

  // --- devices
  Status (*versions)(int* runtime, int* driver);  // 1000 * major + 10 * minor; driver 0: none
  Status (*device_count)(int* count);
  Status (*describe)(int device, DeviceDescription* description);
  // The device that memory belongs to; -1 if it is not of a device.
  Status (*device_of)(const void* pointer, int* device);

  // --- memory: given and taken back in the order of the stream
  Status (*allocate)(int device, void* stream, std::size_t bytes, void** pointer);
  Status (*release)(int device, void* stream, void* pointer);
  // What comes from the host has been read when it returns; what goes there has been written.
  Status (*copy_from_host)(int device, void* stream, void* to, const void* from, std::size_t bytes);
  Status (*copy_to_host)(int device, void* stream, void* to, const void* from, std::size_t bytes);
  Status (*fill_zero)(int device, void* stream, void* to, std::size_t bytes);

  // --- streams
  Status (*create_stream)(int device, void** stream);
  Status (*destroy_stream)(int device, void* stream);
  Status (*wait)(int device, void* stream);  // returns the errors of kernels too
  // What `later` is given from now on waits for what `earlier` has been given.
  Status (*order)(int device, void* earlier, void* later);
  // A point of a stream's work: to ask whether it has been reached, or for `later` to wait for it.
  Status (*record)(int device, void* stream, void** point);
  Status (*order_after)(int device, void* point, void* later);
  Status (*has_happened)(int device, void* point, bool* answer);
  Status (*forget)(int device, void* point);

  // --- operations. A workspace is aligned to 256 bytes.
  Status (*conv2d_workspace)(int device, const Conv2dCall* call, std::size_t* bytes);
  Status (*conv2d)(int device, void* stream, const Conv2dCall* call, void* workspace);
  Status (*conv2d_candidates)(int device, const Conv2dCall* call, CandidateFunction function,
                              void* context);
  Status (*pool2d)(int device, void* stream, const Pool2dCall* call);
  Status (*conv2d_pool_workspace)(int device, const Conv2dPoolCall* call, std::size_t* bytes);
  Status (*conv2d_pool)(int device, void* stream, const Conv2dPoolCall* call, void* workspace);
};

using LibraryFunction = const Library*();
inline constexpr const char* kLibrarySymbol = "fastconv_cuda_library";

}  // namespace fastconv::cuda
