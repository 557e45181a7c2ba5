// Scratch memory for one call, kept between calls: training repeats the same shapes, and a fresh
// mapping a call costs more in page faults than the kernels that use it.
#pragma once

#include <cstddef>

#include "core/export.hpp"

namespace fastconv {

class FASTCONV_API Workspace {
 public:
  static constexpr std::size_t kAlignment = 64;

  // At least `bytes`, so aligned; contents undefined. Throws std::bad_alloc; and InvalidArgument
  // where FASTCONV_GUARD_PAGES makes no sense.
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* floats(std::size_t byte_offset = 0) const {
    return reinterpret_cast<float*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void acquire(std::size_t bytes);
  void release();

  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

// What the process holds of it now: in calls that run, and kept for those to come.
struct WorkspaceBytes {
  std::size_t in_use = 0, kept = 0;
};
FASTCONV_API WorkspaceBytes workspace_bytes();

}  // namespace fastconv
