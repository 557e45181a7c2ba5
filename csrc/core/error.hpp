// Errors that a caller can cause. Doors translate them: InvalidArgument -> ValueError (Python),
// INVALID_ARGUMENT (TensorFlow). Nothing in this library aborts the process.
#pragma once

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

}  // namespace fastconv
