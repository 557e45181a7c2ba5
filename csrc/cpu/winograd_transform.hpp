// Winograd's one-dimensional transforms of inputs, filters and products, for M outputs of 3 taps; what
// winograd.hpp says of their points holds for winograd_wgrad.hpp as well.
#pragma once

namespace fastconv::cpu {
namespace {

// The one-dimensional transforms, on vectors. `Step` and offsets are chosen by the caller.
template <class V, int M>
struct WinogradTransform;

template <class V>
struct WinogradTransform<V, 2> {
  using Reg = typename V::Reg;
  static void input(const Reg (&d)[4], Reg (&out)[4]) {
    out[0] = V::subtract(d[0], d[2]);
    out[1] = V::add(d[1], d[2]);
    out[2] = V::subtract(d[2], d[1]);
    out[3] = V::subtract(d[3], d[1]);
  }
  static void filter(const Reg (&g)[3], Reg (&out)[4]) {
    const Reg half = V::set(0.5f);
    const Reg even = V::multiply(half, V::add(g[0], g[2]));
    out[0] = g[0];
    out[1] = V::fma(half, g[1], even);
    out[2] = V::subtract(even, V::multiply(half, g[1]));
    out[3] = g[2];
  }
  static void output(const Reg (&m)[4], Reg (&y)[2]) {
    y[0] = V::add(m[0], V::add(m[1], m[2]));
    y[1] = V::add(V::subtract(m[1], m[2]), m[3]);
  }
};

template <class V>
struct WinogradTransform<V, 4> {
  using Reg = typename V::Reg;
  static constexpr float kA = 0.70710678f, kB = 1.41421356f;  // the points
  static void input(const Reg (&d)[6], Reg (&out)[6]) {
    const Reg sum = V::set(-2.5f), a = V::set(kA), b = V::set(kB);
    const Reg even_a = V::fma(V::set(-2.0f), d[2], d[4]), odd_a = V::fma(V::set(-2.0f), d[1], d[3]);
    const Reg even_b = V::fma(V::set(-0.5f), d[2], d[4]), odd_b = V::fma(V::set(-0.5f), d[1], d[3]);
    out[0] = V::fma(sum, d[2], V::add(d[0], d[4]));
    out[1] = V::fma(a, odd_a, even_a);
    out[2] = V::fma(V::set(-kA), odd_a, even_a);
    out[3] = V::fma(b, odd_b, even_b);
    out[4] = V::fma(V::set(-kB), odd_b, even_b);
    out[5] = V::fma(sum, d[3], V::add(d[1], d[5]));
  }
  static void filter(const Reg (&g)[3], Reg (&out)[6]) {
    // 1 / (2 a^2 (a^2 - b^2)) = -2/3 and 1 / (2 b^2 (b^2 - a^2)) = 1/6.
    const Reg over_a = V::set(-2.0f / 3), over_b = V::set(1.0f / 6);
    const Reg even_a = V::multiply(over_a, V::fma(V::set(0.5f), g[2], g[0]));
    const Reg even_b = V::multiply(over_b, V::fma(V::set(2.0f), g[2], g[0]));
    const Reg odd_a = V::multiply(V::set(-2.0f / 3 * kA), g[1]);
    const Reg odd_b = V::multiply(V::set(1.0f / 6 * kB), g[1]);
    out[0] = g[0];
    out[1] = V::add(even_a, odd_a);
    out[2] = V::subtract(even_a, odd_a);
    out[3] = V::add(even_b, odd_b);
    out[4] = V::subtract(even_b, odd_b);
    out[5] = g[2];
  }
  static void output(const Reg (&m)[6], Reg (&y)[4]) {
    const Reg sum_a = V::add(m[1], m[2]), difference_a = V::subtract(m[1], m[2]);
    const Reg sum_b = V::add(m[3], m[4]), difference_b = V::subtract(m[3], m[4]);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::fma(V::set(kA), difference_a, V::multiply(V::set(kB), difference_b));
    y[2] = V::fma(V::set(0.5f), sum_a, V::add(sum_b, sum_b));
    y[3] = V::fma(V::set(kA / 2), difference_a, V::fma(V::set(2 * kB), difference_b, m[5]));
  }
};

}  // namespace
}  // namespace fastconv::cpu
