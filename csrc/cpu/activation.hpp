// Activations by vectors. Of the gated ones, a value times a gate between 0 and 1 that it opens itself,
// the output does not tell the derivative: silu(x) = x / (1 + exp(-x)), and hard_silu(x) =
// x * clip(x / 6 + 1/2, 0, 1), which follows it in straight lines.
#pragma once

#include <limits>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

// e^x, to 2 units in the last place, for x in [-87, 89], where it is a normal number or infinity:
// 2^n * e^r, |r| <= ln(2) / 2, and e^r by its Taylor series.
template <class V>
typename V::Reg exponential(typename V::Reg x) {
  using Reg = typename V::Reg;
  constexpr float kInverses[] = {1 / 5040.0f, 1 / 720.0f, 1 / 120.0f, 1 / 24.0f,
                                 1 / 6.0f,    1 / 2.0f,   1.0f,       1.0f};  // of factorials
  // To add it rounds to an integer, which the last bits then hold.
  const Reg rounder = V::set(12582912.0f);                       // 1.5 * 2^23
  const Reg shifted = V::fma(x, V::set(1.442695041f), rounder);  // times 1 / ln(2)
  const Reg n = V::subtract(shifted, rounder);
  // ln(2) in two parts: n times the first, of 9 bits, is exact.
  Reg r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  Reg series = V::set(kInverses[0]);
  for (int i = 1; i < 8; ++i) series = V::fma(series, r, V::set(kInverses[i]));
  return V::multiply(series, V::power_of_two(shifted));
}

// What a gated activation multiplies x by. NaN stays.
template <class V, Activation Kind>
typename V::Reg gate_of(typename V::Reg x) {
  using Reg = typename V::Reg;
  const Reg one = V::set(1);
  if constexpr (Kind == Activation::silu) {
    // Up to where the exponential is infinity, and the gate 0.
    const Reg bounded = V::max(V::set(-87.0f), V::min(V::set(89.0f), V::subtract(V::zero(), x)));
    return V::divide(one, V::add(one, exponential<V>(bounded)));
  } else {
    static_assert(Kind == Activation::hard_silu);
    return relu_to<V>(one, V::fma(x, V::set(1 / 6.0f), V::set(0.5f)));
  }
}

template <class V, Activation Kind>
typename V::Reg activated(typename V::Reg x) {
  if constexpr (Kind == Activation::linear) {
    return x;
  } else if constexpr (Kind == Activation::relu) {
    return V::relu(x);
  } else if constexpr (Kind == Activation::relu6) {
    return relu_to<V>(V::set(ceiling_of(Kind)), x);
  } else {
    return V::multiply(x, gate_of<V, Kind>(x));
  }
}

// The derivative of a gated activation at x.
template <class V, Activation Kind>
typename V::Reg slope_of(typename V::Reg x) {
  using Reg = typename V::Reg;
  const Reg one = V::set(1);
  if constexpr (Kind == Activation::silu) {
    const Reg gate = gate_of<V, Kind>(x);
    return V::fma(V::multiply(x, gate), V::subtract(one, gate), gate);
  } else {
    // As TensorFlow has it, the clip passes a gradient at its very ends, too.
    const Reg sixth = V::set(1 / 6.0f);
    const Reg opening = V::fma(x, sixth, V::set(0.5f));
    const Reg outside = V::add(V::where_positive(V::subtract(V::zero(), opening), sixth),
                               V::where_positive(V::subtract(opening, one), sixth));
    return V::fma(x, V::subtract(sixth, outside), gate_of<V, Kind>(x));
  }
}

// Calls body.template operator()<Kind>() for the kind of an activation.
template <class Body>
void of_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::linear: return body.template operator()<Activation::linear>();
    case Activation::relu: return body.template operator()<Activation::relu>();
    case Activation::relu6: return body.template operator()<Activation::relu6>();
    case Activation::silu: return body.template operator()<Activation::silu>();
    case Activation::hard_silu: return body.template operator()<Activation::hard_silu>();
  }
}

// y = activation(y + from); `from` may be null.
template <class V>
void add_and_activate(Activation activation, int64_t count, const float* from, float* y) {
  constexpr int64_t kATask = 16384;
  of_activation(activation, [&]<Activation Kind>() {
    parallel_for(ceil_div(count, kATask), [&](int64_t task) {
      const auto one = [&](int64_t i, auto... tail) {
        typename V::Reg value = V::load(y + i, tail...);
        if (from) value = V::add(value, V::load(from + i, tail...));
        V::store(y + i, activated<V, Kind>(value), tail...);
      };
      const int64_t end = min64(count, (task + 1) * kATask);
      int64_t i = task * kATask;
      for (; i + V::kWidth <= end; i += V::kWidth) one(i);
      if (i < end) one(i, V::tail(static_cast<int>(end - i)));
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
