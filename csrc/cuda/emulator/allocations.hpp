// The device's memory: what cudaMalloc gave and nobody freed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconv::emulator {

struct Allocation {
  std::uintptr_t address;
  std::size_t bytes;
};

// The allocation that holds all of [address, address + bytes); null if none does.
const Allocation* find_allocation(std::uintptr_t address, std::size_t bytes);

}  // namespace fastconv::emulator
