// The device that is emulated. FASTCONV_EMULATOR_COMPUTE_CAPABILITY (75, 80, 86, 89, 90, 100 or 120;
// default 80) and FASTCONV_EMULATOR_MULTIPROCESSORS (default 8) choose it, read at each use: tests
// reach every branch that depends on them.
#pragma once

#include <cstddef>

namespace fastconv::emulator {

struct DeviceProperties {
  int compute_capability;
  int multiprocessors;
  std::size_t shared_memory_opt_in;  // bytes a block may have
};

DeviceProperties device_properties();

inline constexpr std::size_t kMostStaticShared = 48 << 10;  // and dynamic without opting in
inline constexpr unsigned kMostThreads = 1024;

}  // namespace fastconv::emulator
