// bfloat16 convolution on any processor: what the units of AVX512-BF16 and AMX are compared with. As long as
// it takes, nothing chooses it that does not name it.
#include "cpu/bf16_dot.hpp"
#include "cpu/bf16_tiles.hpp"

namespace fastconv::cpu {
namespace {

struct Bf16PortableDot {
  // Never weighed against anything: it is taken by its name.
  static Bf16Costs costs() { return {.product = 50, .wgrad_product = 50, .moved = 40}; }

  struct Sums {
    float lanes[kBf16Width];
  };
  struct Pairs {
    Bits bits[2 * kBf16Width];
  };
  static Sums zero() { return {}; }
  static Pairs load(const Bits* p) {
    Pairs out;
    std::copy_n(p, 2 * kBf16Width, out.bits);
    return out;
  }
  static Pairs broadcast(const Bits* p) {
    Pairs out;
    for (int64_t i = 0; i < 2 * kBf16Width; ++i) out.bits[i] = p[i % 2];
    return out;
  }
  static Sums dot(Sums sum, const Pairs& a, const Pairs& b) {
    for (int64_t i = 0; i < kBf16Width; ++i) {
      for (int64_t j = 2 * i; j < 2 * i + 2; ++j) {
        sum.lanes[i] += bf16_to_float(a.bits[j]) * bf16_to_float(b.bits[j]);
      }
    }
    return sum;
  }
  static void store(float* p, const Sums& sum) { std::copy_n(sum.lanes, kBf16Width, p); }
};

// What the instructions do, for one thread. Products of shapes that do not match, which a processor
// refuses, are NaN.
class EmulatedTiles {
 public:
  static void load_shapes(const TileShapes& shapes) {
    t_state = {};
    t_state.shapes = shapes;
  }
  static void store_shapes(TileShapes& shapes) { shapes = t_state.shapes; }
  template <int Tile>
  static void zero() {
    std::memset(t_state.bytes[Tile], 0, sizeof t_state.bytes[Tile]);
  }
  template <int Tile>
  static void load(const void* from, int64_t step) {
    zero<Tile>();
    for (int i = 0; i < t_state.shapes.rows[Tile]; ++i) {
      std::memcpy(t_state.bytes[Tile][i], static_cast<const char*>(from) + i * step,
                  t_state.shapes.row_bytes[Tile]);
    }
  }
  template <int Tile>
  static void store(void* to, int64_t step) {
    for (int i = 0; i < t_state.shapes.rows[Tile]; ++i) {
      std::memcpy(static_cast<char*>(to) + i * step, t_state.bytes[Tile][i],
                  t_state.shapes.row_bytes[Tile]);
    }
  }
  template <int Sums, int A, int B>
  static void multiply() {
    const TileShapes& shapes = t_state.shapes;
    const bool match = shapes.palette == 1 && shapes.rows[Sums] == shapes.rows[A] &&
                       shapes.row_bytes[A] == 4 * shapes.rows[B] &&
                       shapes.row_bytes[Sums] == shapes.row_bytes[B] && shapes.rows[A] > 0;
    for (int i = 0; i < shapes.rows[Sums]; ++i) {
      for (int j = 0; j < shapes.row_bytes[Sums] / 4; ++j) {
        float even = 0, odd = 0, sum = 0;
        for (int pair = 0; pair < shapes.rows[B]; ++pair) {
          even += element<A>(i, 2 * pair) * element<B>(pair, 2 * j);
          odd += element<A>(i, 2 * pair + 1) * element<B>(pair, 2 * j + 1);
        }
        std::memcpy(&sum, t_state.bytes[Sums][i] + 4 * j, sizeof sum);
        sum = match ? sum + (even + odd) : std::numeric_limits<float>::quiet_NaN();
        std::memcpy(t_state.bytes[Sums][i] + 4 * j, &sum, sizeof sum);
      }
    }
  }

 private:
  template <int Tile>
  static float element(int row, int column) {
    Bits bits = 0;
    std::memcpy(&bits, t_state.bytes[Tile][row] + 2 * column, sizeof bits);
    return bf16_to_float(bits);
  }
  struct State {
    TileShapes shapes;
    std::uint8_t bytes[8][16][64];
  };
  static inline thread_local State t_state{};
};

}  // namespace

constinit const Bf16Algorithm kBf16Portable = bf16_algorithm<Bf16DotUnit<Bf16PortableDot>>(
    "bf16_portable", Isa::scalar, true, [] { return true; });
constinit const Bf16Algorithm kBf16EmulatedTiles = bf16_algorithm<Bf16TileUnit<EmulatedTiles>>(
    "bf16_emulated_tiles", Isa::scalar, true, [] { return true; });

}  // namespace fastconv::cpu
