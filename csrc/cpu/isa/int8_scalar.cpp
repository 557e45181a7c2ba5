// int8 convolution on any processor: the register tiles with one channel a vector, and a plain sum without
// a copy of the source, for problems that are mostly padding.
#include <algorithm>
#include <cmath>

#include "cpu/int8.hpp"

namespace fastconv::cpu {
namespace {

struct Int8Scalar {
  static constexpr int kWidth = 1, kQuad = 1;
  static constexpr int kRows[] = {0, 4, 4};  // of a register tile, by its vectors
  using Source = std::int8_t;
  using Weight = std::int8_t;
  static constexpr Source kZero = 0;
  using Sums = std::int32_t;
  using Floats = float;
  struct Tail {};
  static Tail tail(int) { return {}; }

  static Sums no_sums() { return 0; }
  static Sums broadcast_zero() { return 0; }
  static Sums load_sums(const std::int32_t* p) { return *p; }
  static void store_sums(std::int32_t* p, Sums v) { *p = v; }
  static Sums negative(Sums v) { return -v; }
  static Sums load_filter(const Weight* p) { return *p; }
  static Sums broadcast(const Source* p) { return *p; }
  static Sums dot(Sums sum, Sums source, Sums filter) { return sum + source * filter; }
  static Floats to_floats(Sums v) { return static_cast<float>(v); }

  static Floats zero() { return 0; }
  static Floats load(const float* p) { return *p; }
  static Floats load(const float* p, Tail) { return *p; }
  static void store(float* p, Floats v) { *p = v; }
  static void store(float* p, Floats v, Tail) { *p = v; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  static Floats relu(Floats v) { return v < 0 ? 0 : v; }

  static void interleave(const std::int8_t* const* rows, int vectors, Weight* out) {
    std::copy_n(rows[0], vectors, out);
  }
  static std::uint32_t abs_max_bits(const float* x, std::int64_t count) {
    std::uint32_t most = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, x + i, sizeof bits);
      most = std::max(most, bits & 0x7FFFFFFFu);
    }
    return most;
  }
  static void quantize(const float* x, std::int64_t count, float scale, Source* out) {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<Source>(std::lrint(x[i] * scale));
    }
  }
};

void plain(const Conv2dProblem& p, const Int8Operands& t) {
  const int64_t size = p.h * p.w * p.c;
  const int64_t multipliers = round_up(p.n * size, 64);
  const Workspace workspace(static_cast<std::size_t>(multipliers + p.n * p.k * 4));
  auto* const source = reinterpret_cast<std::int8_t*>(workspace.floats());
  float* const multiplier = workspace.floats(static_cast<std::size_t>(multipliers));
  parallel_for(p.n, [&](int64_t n) {
    const float* const x = t.x + n * size;
    const float scale = scale_of_abs_max(Int8Scalar::abs_max_bits(x, size));
    for (int64_t k = 0; k < p.k; ++k) multiplier[n * p.k + k] = 1 / (t.filter_scale[k] * scale);
    if (std::isnan(scale)) {
      std::fill_n(source + n * size, size, std::int8_t{0});
    } else {
      Int8Scalar::quantize(x, size, scale, source + n * size);
    }
  });
  constexpr int64_t kColumns = 64;
  parallel_for(p.n * p.oh, [&](int64_t task) {
    const int64_t n = task / p.oh, i = task % p.oh;
    for (int64_t j = 0; j < p.ow; ++j) {
      for (int64_t group = 0; group < p.groups; ++group) {
        for (int64_t first = 0; first < p.k_per_group(); first += kColumns) {
          const int64_t columns = min64(kColumns, p.k_per_group() - first);
          const int64_t k0 = group * p.k_per_group() + first;
          std::int32_t sum[kColumns] = {};
          for (int64_t r = 0; r < p.r; ++r) {
            const int64_t row = i * p.stride_h - p.pad_top + r * p.dilation_h;
            if (row < 0 || row >= p.h) continue;
            for (int64_t s = 0; s < p.s; ++s) {
              const int64_t column = j * p.stride_w - p.pad_left + s * p.dilation_w;
              if (column < 0 || column >= p.w) continue;
              for (int64_t c = 0; c < p.c_per_group(); ++c) {
                const std::int8_t value =
                    source[n * size + (row * p.w + column) * p.c + group * p.c_per_group() + c];
                const std::int8_t* const filter =
                    t.filter + ((r * p.s + s) * p.c_per_group() + c) * p.k + k0;
                for (int64_t k = 0; k < columns; ++k) sum[k] += value * filter[k];
              }
            }
          }
          float* const y = t.y + ((n * p.oh + i) * p.ow + j) * p.k + k0;
          for (int64_t k = 0; k < columns; ++k) {
            const float bias = t.bias ? t.bias[k0 + k] : 0;
            const float out = static_cast<float>(sum[k]) * multiplier[n * p.k + k0 + k] + bias;
            y[k] = p.activation == Activation::relu ? Int8Scalar::relu(out) : out;
          }
        }
      }
    }
  });
}

}  // namespace

constinit const Int8Algorithm kInt8ScalarMadd =
    int8_algorithm<Int8Scalar>("madd", [] { return true; });
constinit const Int8Algorithm kInt8Plain = {"plain", [] { return true; },
                                            [](const Conv2dProblem&) { return true; }, plain};

}  // namespace fastconv::cpu
