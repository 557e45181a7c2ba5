// The unit of AMX's tile registers, eight of at most 16 rows of 64 bytes: up to two of the source's rows by
// two of packed columns (tmm4 to tmm7) are multiplied into four of sums (tmm0 to tmm3), so that a product
// loads as many tiles as it multiplies. A tile of the source has a slice of a tap, up to 32 elements, of 16
// rows; one of packed columns has 16 pairs of elements. All slices are of one length, for a tile register
// cannot change its shape and keep what it has.
//
// Tiles is the instructions: Amx of isa/bf16_amx.cpp, or EmulatedTiles of isa/bf16_portable.cpp, which says
// in C++ what they do.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/bf16.hpp"

namespace fastconv::cpu {
namespace {

// LDTILECFG's operand.
struct alignas(64) TileShapes {
  std::uint8_t palette = 0, start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

template <class Tiles>
struct Bf16TileUnit {
  static constexpr int kTileRows = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows[] = {0, 2 * kTileRows, 2 * kTileRows};  // of a product, by its vectors
  static constexpr int64_t kSlice = 32;
  static constexpr bool kEvenRows = true;
  // Measured on an Emerald Rapids: 1/16 is the ratio of the units' peaks; the rest feeds them.
  static Bf16Costs costs() { return {.product = 0.2, .wgrad_product = 0.4, .moved = 40}; }

  // Shapes belong to a thread, and other libraries suppose that theirs stay: they are put back.
  class Session {
   public:
    Session() { Tiles::store_shapes(others_); }
    ~Session() { Tiles::load_shapes(others_); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void multiply(const Bf16Product& t) {
      const int low_rows = std::min(t.rows, kTileRows), high_rows = t.rows - low_rows;
      TileShapes shapes;
      shapes.palette = 1;
      for (int v = 0; v < t.vectors; ++v) {
        shapes.set(v, low_rows, kVectorBytes);
        if (high_rows > 0) shapes.set(2 + v, high_rows, kVectorBytes);
        shapes.set(6 + v, t.slice / 2, kVectorBytes);
      }
      shapes.set(4, low_rows, t.slice * 2);
      if (high_rows > 0) shapes.set(5, high_rows, t.slice * 2);
      if (std::memcmp(&shapes, &own_, sizeof shapes) != 0) {
        own_ = shapes;
        Tiles::load_shapes(own_);
      }
      if (t.vectors == 2) return high_rows > 0 ? add_products<2, 2>(t) : add_products<1, 2>(t);
      return high_rows > 0 ? add_products<2, 1>(t) : add_products<1, 1>(t);
    }

   private:
    TileShapes others_, own_;
  };

 private:
  static constexpr int64_t kVectorBytes = 64;

  template <int Down, int Across>
  static void add_products(const Bf16Product& t) {
    Tiles::template zero<0>();
    if constexpr (Across == 2) Tiles::template zero<1>();
    if constexpr (Down == 2) Tiles::template zero<2>();
    if constexpr (Down == 2 && Across == 2) Tiles::template zero<3>();
    const int64_t row_bytes = t.row_step * int64_t{sizeof(Bits)};
    const Bits* packed = t.packed;
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      const Bits* low = t.source[0] + t.tap_offsets[tap];
      for (int64_t slice = 0; slice < t.slices; ++slice) {
        Tiles::template load<6>(packed, kVectorBytes);
        if constexpr (Across == 2) Tiles::template load<7>(packed + t.vector_step, kVectorBytes);
        Tiles::template load<4>(low, row_bytes);
        Tiles::template multiply<0, 4, 6>();
        if constexpr (Across == 2) Tiles::template multiply<1, 4, 7>();
        if constexpr (Down == 2) {
          Tiles::template load<5>(low + kTileRows * t.row_step, row_bytes);
          Tiles::template multiply<2, 5, 6>();
          if constexpr (Across == 2) Tiles::template multiply<3, 5, 7>();
        }
        low += t.slice;
        packed += t.slice * kBf16Width;
      }
    }
    constexpr int64_t kStep = Across * kVectorBytes;
    Tiles::template store<0>(t.sums, kStep);
    if constexpr (Across == 2) Tiles::template store<1>(t.sums + kBf16Width, kStep);
    if constexpr (Down == 2) {
      float* const high = t.sums + int64_t{kTileRows} * Across * kBf16Width;
      Tiles::template store<2>(high, kStep);
      if constexpr (Across == 2) Tiles::template store<3>(high + kBf16Width, kStep);
    }
  }
};

}  // namespace
}  // namespace fastconv::cpu
