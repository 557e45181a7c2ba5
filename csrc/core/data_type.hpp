// What the elements of a tensor are in memory. Sums are of float32, whatever that is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconv {

enum class DataType : std::uint8_t { float32, float16, bfloat16 };

inline std::size_t size_of(DataType type) { return type == DataType::float32 ? 4 : 2; }

// IEEE 754's binary16, and the upper half of a float32.
struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

}  // namespace fastconv
