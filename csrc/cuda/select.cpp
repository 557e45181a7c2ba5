// Which algorithm computes a convolution on the device.
#include <array>

#include "core/error.hpp"
#include "cuda/kernels.hpp"

namespace fastconv::cuda {
namespace {

const std::array kAlgorithms{&kDepthwise, &kSmallChannel, &kTensorCoreGemm, &kSimtGemm};

const char* type_name(DataType type) {
  switch (type) {
    case DataType::float16: return "float16";
    case DataType::bfloat16: return "bfloat16";
    default: return "float32";
  }
}

std::string text_of(const Conv2dSpec& spec, const Device& device) {
  const char* direction = spec.direction == Direction::fprop   ? "fprop"
                          : spec.direction == Direction::dgrad ? "dgrad"
                                                               : "wgrad";
  return std::string(direction) + " of " + type_name(spec.type) +
         (spec.math == Float32Math::tf32 ? " (TF32)" : "") + ", compute capability " +
         std::to_string(device.compute_capability / 10) + "." +
         std::to_string(device.compute_capability % 10);
}

}  // namespace

std::span<const Conv2dAlgorithm* const> algorithms() { return kAlgorithms; }

const Conv2dAlgorithm& choose(const Conv2dSpec& spec, const Device& device, const char* name) {
  if (name != nullptr) {
    std::string names;
    for (const Conv2dAlgorithm* algorithm : kAlgorithms) {
      names += std::string(names.empty() ? "'" : ", '") + algorithm->name + "'";
      if (std::string(algorithm->name) != name) continue;
      if (algorithm->serves(spec, device)) return *algorithm;
      throw InvalidArgument("The algorithm must serve the problem. Received: algorithm='" +
                            std::string(name) + "' for " + text_of(spec, device));
    }
    throw InvalidArgument("`algorithm` on a GPU must be one of " + names +
                          ". Received: algorithm='" + name + "'");
  }
  const Conv2dAlgorithm* best = nullptr;
  double least = 0;
  for (const Conv2dAlgorithm* algorithm : kAlgorithms) {
    if (!algorithm->serves(spec, device)) continue;
    const double seconds = algorithm->estimate(spec, device);
    if (best == nullptr || seconds < least) {
      best = algorithm;
      least = seconds;
    }
  }
  if (best == nullptr)
    throw InvalidArgument("No algorithm on the GPU serves this problem. Received: " +
                          text_of(spec, device));
  return *best;
}

}  // namespace fastconv::cuda
