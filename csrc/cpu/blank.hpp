// Outputs whose source is zero throughout, as in blank parts of an image. Winograd's algorithms make these exactly the
// bias: rounding errors there would pass for activity that ReLU lets gradients through for.
#pragma once

#include <cstdint>

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// Whether `taps` of a row's pixels are zero one after the other, and if so, at each pixel how many are up to it.
template <class IsZero>
bool count_zeros(int64_t pixels, int64_t taps, const IsZero& is_zero, std::int32_t* zeros) {
  // Every such run holds one of these pixels.
  const auto may_have_run = [&] {
    for (int64_t j = taps - 1; j < pixels; j += taps) {
      if (!is_zero(j)) continue;
      int64_t begin = j, end = j + 1;
      while (begin > 0 && is_zero(begin - 1)) --begin;
      while (end < pixels && is_zero(end)) ++end;
      if (end - begin >= taps) return true;
    }
    return false;
  };
  if (!may_have_run()) return false;
  std::int32_t run = 0;
  for (int64_t j = 0; j < pixels; ++j) zeros[j] = run = is_zero(j) ? run + 1 : 0;
  return true;
}

// A pixel of K channels without a source: what the activation makes of the bias, which may be null.
inline void write_blank(Activation activation, const float* bias, int64_t k, float* y) {
  const bool relu = activation != Activation::linear;
  const float ceiling = ceiling_of(activation);
  for (int64_t i = 0; i < k; ++i) {
    const float value = bias ? bias[i] : 0;
    y[i] = relu && value < 0 ? 0 : relu && value > ceiling ? ceiling : value;
  }
}

}  // namespace
}  // namespace fastconv::cpu
