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

// Whether a pixel is zero in all channels, but for those where `mask`, which may be null, is not positive. A live one
// mostly shows in its first vector.
template <class V>
bool is_zero(const float* x, const float* mask, int64_t channels) {
  for (int64_t c = 0; c < channels; c += V::kWidth) {
    const auto tail = V::tail(static_cast<int>(min64(V::kWidth, channels - c)));
    typename V::Reg value = V::load(x + c, tail);
    if (mask) value = V::where_positive(V::load(mask + c, tail), value);
    if (V::any_nonzero(value)) return false;
  }
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
