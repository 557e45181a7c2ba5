// Errors that a caller can cause. Doors translate them: InvalidArgument -> ValueError (Python),
// INVALID_ARGUMENT (TensorFlow). Nothing in this library aborts the process.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/export.hpp"

namespace fastconv {

// The message states the rule that was broken and ends in "Received: <what was given>".
class FASTCONV_API InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
  ~InvalidArgument() override;
};

// (1, 2, 3), as messages have shapes.
template <std::size_t Rank>
std::string shape_text(const std::array<std::int64_t, Rank>& shape) {
  std::string text = "(";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text.append(", ");
    text.append(std::to_string(extent));
  }
  return text.append(")");
}

}  // namespace fastconv
