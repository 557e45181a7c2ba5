// Scratch memory for one call, kept between calls: training repeats the same shapes, and a fresh
// mapping a call costs more in page faults than the kernels that use it.
#pragma once

#include <cstddef>

namespace fastconv {

class Workspace {
 public:
  // At least `bytes`, aligned to 64; contents undefined. Throws std::bad_alloc.
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* floats(std::size_t byte_offset = 0) const {
    return reinterpret_cast<float*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace fastconv
