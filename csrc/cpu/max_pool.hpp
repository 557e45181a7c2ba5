// Max-pooling on NHWC, vectors along channels. Forward: one pass over the window's taps, the first
// maximum wins, NaN propagates. Backward gathers: each input pixel asks the windows that cover it
// whether their argmax names it, so overlapping windows need no atomics and no zeroing pass. Windows
// that do not overlap scatter instead: each reads its argmax and dy once.
#pragma once

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

template <class V, class Index, bool WithArgmax>
void max_pool_row(const Pool2dProblem& p, const float* x, float* y, Index* argmax, int64_t n,
                  int64_t i) {
  const int64_t top = i * p.stride_h - p.pad_top;
  const int64_t r0 = max64(0, -top), r1 = min64(p.r, p.h - top);
  for (int64_t j = 0; j < p.ow; ++j) {
    const int64_t left = j * p.stride_w - p.pad_left;
    const int64_t s0 = max64(0, -left), s1 = min64(p.s, p.w - left);
    const float* corner = x + ((n * p.h + top) * p.w + left) * p.c;
    const int64_t at_y = ((n * p.oh + i) * p.ow + j) * p.c;
    for (int64_t c = 0; c < p.c; c += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, p.c - c)));
      typename V::Reg best = V::load(corner + (r0 * p.w + s0) * p.c + c, tail);
      typename V::Int best_tap = V::int_broadcast(static_cast<int>(r0 * p.s + s0));
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t s = s0; s < s1; ++s) {
          const typename V::Reg value = V::load(corner + (r * p.w + s) * p.c + c, tail);
          const auto better = V::greater_or_first_nan(value, best);
          best = V::select(better, value, best);
          if constexpr (WithArgmax) {
            best_tap =
                V::int_select(better, V::int_broadcast(static_cast<int>(r * p.s + s)), best_tap);
          }
        }
      V::store(y + at_y + c, best, tail);
      if constexpr (WithArgmax) V::store_index(argmax + at_y + c, best_tap, tail);
    }
  }
}

template <class V, class Index>
void max_pool_grad_row(const Pool2dProblem& p, const float* dy, const Index* argmax, float* dx,
                       int64_t n, int64_t h) {
  // Windows i with i * stride - pad <= h < i * stride - pad + r.
  const int64_t from_h = h + p.pad_top;
  const int64_t i0 = max64(0, from_h < p.r ? 0 : (from_h - p.r) / p.stride_h + 1);
  const int64_t i1 = min64(p.oh, from_h / p.stride_h + 1);
  for (int64_t w = 0; w < p.w; ++w) {
    const int64_t from_w = w + p.pad_left;
    const int64_t j0 = max64(0, from_w < p.s ? 0 : (from_w - p.s) / p.stride_w + 1);
    const int64_t j1 = min64(p.ow, from_w / p.stride_w + 1);
    float* out = dx + ((n * p.h + h) * p.w + w) * p.c;
    for (int64_t c = 0; c < p.c; c += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, p.c - c)));
      typename V::Reg sum = V::zero();
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) {
          const int64_t tap =
              (from_h - i * p.stride_h) * p.s + from_w - j * p.stride_w;
          const int64_t at = ((n * p.oh + i) * p.ow + j) * p.c + c;
          const auto chosen = V::int_equal(V::load_index(argmax + at, tail),
                                           V::int_broadcast(static_cast<int>(tap)));
          sum = V::add(sum, V::select(chosen, V::load(dy + at, tail), V::zero()));
        }
      V::store(out + c, sum, tail);
    }
  }
}

// The input rows from window row i to the next one's, for windows that neither overlap nor meet
// padding.
template <class V, class Index>
void max_pool_grad_apart(const Pool2dProblem& p, const float* dy, const Index* argmax, float* dx,
                         int64_t n, int64_t i) {
  const int64_t begin = i * p.stride_h, end = i + 1 == p.oh ? p.h : begin + p.stride_h;
  float* rows = dx + (n * p.h + begin) * p.w * p.c;
  const int64_t row_floats = p.w * p.c, window_floats = p.s * p.c, step = p.stride_w * p.c;
  const auto clear = [](float* at, int64_t floats) {
    std::memset(at, 0, static_cast<std::size_t>(floats) * 4);
  };
  if (end - begin > p.r) clear(rows + p.r * row_floats, (end - begin - p.r) * row_floats);
  for (int64_t j = 0; j < p.ow; ++j) {
    float* window = rows + j * step;
    const int64_t at = ((n * p.oh + i) * p.ow + j) * p.c;
    for (int64_t c = 0; c < p.c; c += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, p.c - c)));
      const typename V::Reg value = V::load(dy + at + c, tail);
      const typename V::Int chosen = V::load_index(argmax + at + c, tail);
      int tap = 0;
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s, ++tap) {
          V::store(window + r * row_floats + s * p.c + c,
                   V::select(V::int_equal(chosen, V::int_broadcast(tap)), value, V::zero()),
                   tail);
        }
    }
    const int64_t next = j + 1 == p.ow ? row_floats - j * step : step;
    if (next == window_floats) continue;
    for (int64_t r = 0; r < p.r; ++r) {
      clear(window + r * row_floats + window_floats, next - window_floats);
    }
  }
}

template <class V, class Index>
void max_pool2d_rows(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  parallel_for(p.n * p.oh, [&](int64_t row) {
    if (argmax) {
      max_pool_row<V, Index, true>(p, x, y, static_cast<Index*>(argmax), row / p.oh, row % p.oh);
    } else {
      max_pool_row<V, Index, false>(p, x, y, nullptr, row / p.oh, row % p.oh);
    }
  });
}

template <class V>
void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  if (p.argmax_fits_byte()) {
    max_pool2d_rows<V, std::uint8_t>(p, x, y, argmax);
  } else {
    max_pool2d_rows<V, std::int32_t>(p, x, y, argmax);
  }
}

template <class V>
void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  const bool apart = p.stride_h >= p.r && p.stride_w >= p.s && p.pad_top == 0 &&
                     p.pad_left == 0 && p.pad_bottom == 0 && p.pad_right == 0;
  const auto rows = [&]<class Index>(const Index* index) {
    if (apart) {
      parallel_for(p.n * p.oh, [&](int64_t row) {
        max_pool_grad_apart<V, Index>(p, dy, index, dx, row / p.oh, row % p.oh);
      });
      return;
    }
    parallel_for(p.n * p.h, [&](int64_t row) {
      max_pool_grad_row<V, Index>(p, dy, index, dx, row / p.h, row % p.h);
    });
  };
  if (p.argmax_fits_byte()) {
    rows(static_cast<const std::uint8_t*>(argmax));
  } else {
    rows(static_cast<const std::int32_t*>(argmax));
  }
}

}  // namespace
}  // namespace fastconv::cpu
