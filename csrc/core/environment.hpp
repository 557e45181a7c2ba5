// Environment variables. One that is set to nothing counts as not set.
#pragma once

#include <cstdlib>
#include <string>

#include "core/error.hpp"

namespace fastconv {

inline std::string from_environment(const char* name, const std::string& otherwise = "") {
  const char* const value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Throws InvalidArgument unless it is 0 or 1.
inline bool flag_from_environment(const char* name, bool otherwise) {
  const std::string text = from_environment(name, otherwise ? "1" : "0");
  if (text != "0" && text != "1") {
    throw InvalidArgument(std::string(name) + " must be 0 or 1. Received: " + name + "=" + text);
  }
  return text == "1";
}

}  // namespace fastconv
