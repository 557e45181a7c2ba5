// Convolution of bfloat16 as an implicit GEMM of pairs. A unit, a class that the algorithm is made of,
// multiplies rows of its source by vectors of 16 packed columns:
//
//   sums[row][column] = sum over taps and elements of source[row][tap][element] * packed[tap][element][column]
//
// It takes neighbouring elements of a row two at a time, so that packed columns have these two side by side
// ([element / 2][column][element % 2]), as VDPBF16PS and TDPBF16PS read them.
//
// fprop, dgrad: a row is an output pixel, its elements are the channels under a tap. The source is x or dy
// itself where every tap meets all pixels; else a copy with its padding laid out. For a stride (a, b), the
// copy of x has a plane for each residue class of rows and columns that a tap meets, in which pixels that are
// neighbours to the filter are neighbours in memory; dx has such classes of pixels, each computed by the
// taps that reach it. Pixels are then rows at like distances, which tiles of AMX want.
//
// wgrad: a row is an input channel, its elements are pixels, and the columns are output channels: x is
// transposed, dy packed as a filter is. Both lie on one grid of pixels, that of x's copy, on which a tap
// is a distance. Where dy has no pixel it is zero; so an infinity or NaN of x may reach other taps of its channel.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/bf16_kernels.hpp"
#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

using Bits = std::uint16_t;  // of a Bfloat16

inline const Bits* bits_of(const Bfloat16* p) { return reinterpret_cast<const Bits*>(p); }
inline float bf16_to_float(Bits bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
inline bool bf16_is_positive(Bits bits) { return bits - 1u < 0x7F80; }  // of NaN it is not

// --- units ------------------------------------------------------------------------------------------

constexpr int64_t kBf16Width = 16;  // columns of a vector
// Elements copied or turned in a run: fewer cost as much.
constexpr int64_t kLeastBf16Run = 32;
constexpr int kMostBf16Rows = 32, kMostBf16Vectors = 4;

// What a unit's work costs, in multiply-adds of float32: a product, one of wgrad, and an element that is read,
// copied, packed or written around them.
struct Bf16Costs {
  double product, wgrad_product, moved;
};

// What a unit multiplies in one go, of at most Unit::kRows[vectors] rows.
struct Bf16Product {
  int rows, vectors;
  const Bits* source[kMostBf16Rows];  // of each row, without the taps' offsets
  int64_t row_step;                   // from a row to the next, for a unit of kEvenRows
  const int64_t* tap_offsets;
  int64_t taps;
  int64_t slices, slice;  // a tap is so many times so many elements: even, at most Unit::kSlice
  const Bits* packed;     // of the first vector, [tap][element / 2][column][element % 2]
  int64_t vector_step;    // from a vector to the next
  float* sums;            // [row][vector * kBf16Width + column]
};

// The elements of a tap in slices of like, even lengths.
struct Bf16Slices {
  int64_t count, length;
  Bf16Slices(int64_t elements, int64_t most)
      : count(ceil_div(elements, most)), length(round_up(ceil_div(elements, count), 2)) {}
  int64_t elements() const { return count * length; }
};

// How many elements take as long: to a tile, a short slice is no less work.
template <class Unit>
int64_t elements_paid(const Bf16Slices& slices) {
  return Unit::kEvenRows ? slices.count * Unit::kSlice : slices.elements();
}

// 16 bytes of elements of 2 bytes, or of pairs of them, and two such interleaved: of both the first or second
// halves.
template <class T>
struct Bf16Lanes {
  static constexpr int kCount = 16 / sizeof(T);
#if defined(__SSE2__)
  __m128i value;
  static Bf16Lanes low(Bf16Lanes a, Bf16Lanes b) {
    return {sizeof(T) == 2 ? _mm_unpacklo_epi16(a.value, b.value)
                           : _mm_unpacklo_epi32(a.value, b.value)};
  }
  static Bf16Lanes high(Bf16Lanes a, Bf16Lanes b) {
    return {sizeof(T) == 2 ? _mm_unpackhi_epi16(a.value, b.value)
                           : _mm_unpackhi_epi32(a.value, b.value)};
  }
#else
  T value[kCount];
  static Bf16Lanes interleaved(const T* a, const T* b) {
    Bf16Lanes out;
    for (int i = 0; i < kCount; ++i) out.value[i] = (i % 2 == 0 ? a : b)[i / 2];
    return out;
  }
  static Bf16Lanes low(Bf16Lanes a, Bf16Lanes b) { return interleaved(a.value, b.value); }
  static Bf16Lanes high(Bf16Lanes a, Bf16Lanes b) {
    return interleaved(a.value + kCount / 2, b.value + kCount / 2);
  }
#endif
};

// packed[column][i] = row_i[column] of two rows, the columns that there are not zero.
inline void interleave_pair(const Bits* row0, const Bits* row1, int64_t columns, Bits* packed) {
  using Lanes = Bf16Lanes<Bits>;
  Bits narrow[2][kBf16Width] = {};
  if (columns < kBf16Width) {
    row0 = std::copy_n(row0, columns, narrow[0]) - columns;
    row1 = std::copy_n(row1, columns, narrow[1]) - columns;
  }
  for (int64_t j = 0; j < kBf16Width; j += Lanes::kCount, packed += 2 * Lanes::kCount) {
    Lanes a, b;
    std::memcpy(&a, row0 + j, sizeof a);
    std::memcpy(&b, row1 + j, sizeof b);
    const Lanes low = Lanes::low(a, b), high = Lanes::high(a, b);
    std::memcpy(packed, &low, sizeof low);
    std::memcpy(packed + Lanes::kCount, &high, sizeof high);
  }
}

// Column j of `rows` x `columns` elements T of one or two Bits each becomes row j. Steps from row to row are
// in Bits.
template <class T>
void transpose_bits(int64_t rows, int64_t columns, const Bits* in, int64_t in_step, Bits* out,
                    int64_t out_step) {
  using Lanes = Bf16Lanes<T>;
  constexpr int64_t kSize = sizeof(T) / 2, kCount = Lanes::kCount;
  const auto one = [=](int64_t i, int64_t j) {
    std::memcpy(out + j * out_step + i * kSize, in + i * in_step + j * kSize, sizeof(T));
  };
  int64_t i = 0;
  for (; i + kCount <= rows; i += kCount) {
    int64_t j = 0;
    for (; j + kCount <= columns; j += kCount) {
      Lanes a[kCount], b[kCount];
      for (int64_t k = 0; k < kCount; ++k) {
        std::memcpy(&a[k], in + (i + k) * in_step + j * kSize, sizeof a[k]);
      }
      // Each round moves a bit of a row's number to that of the column, and one back.
      for (int64_t round = 1; round < kCount; round *= 2) {
        for (int64_t k = 0; k < kCount / 2; ++k) {
          b[2 * k] = Lanes::low(a[k], a[k + kCount / 2]);
          b[2 * k + 1] = Lanes::high(a[k], a[k + kCount / 2]);
        }
        std::copy_n(b, kCount, a);
      }
      for (int64_t k = 0; k < kCount; ++k) {
        std::memcpy(out + (j + k) * out_step + i * kSize, &a[k], sizeof a[k]);
      }
    }
    for (; j < columns; ++j) {
      for (int64_t k = 0; k < kCount; ++k) one(i + k, j);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) one(i, j);
  }
}

// --- taps along one axis ------------------------------------------------------------------------------

struct Bf16AxisTap {
  int64_t tap, plane, shift;  // the copy's plane, and how far behind the output's position
};

// Outputs first, first + step, ... of an axis, and the taps that reach them.
struct Bf16AxisOutput {
  int64_t first, size;
  std::vector<Bf16AxisTap> taps;
};

// Plane i of the copy has the source's elements firsts[i], firsts[i] + step, ..., `length` of them.
struct Bf16Axis {
  int64_t step = 1, output_step = 1, length = 0;
  std::vector<int64_t> firsts;
  std::vector<Bf16AxisOutput> outputs;

  static Bf16Axis fprop(int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
    Bf16Axis axis;
    axis.step = stride;
    Bf16AxisOutput output{0, out, {}};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t first = tap * dilation % stride - pad, shift = tap * dilation / stride;
      const auto at = std::find(axis.firsts.begin(), axis.firsts.end(), first);
      output.taps.push_back({tap, at - axis.firsts.begin(), shift});
      if (at == axis.firsts.end()) axis.firsts.push_back(first);
      axis.length = max64(axis.length, out + shift);
    }
    axis.outputs.push_back(std::move(output));
    return axis;
  }

  static Bf16Axis dgrad(int64_t in, int64_t taps, int64_t stride, int64_t dilation, int64_t pad) {
    Bf16Axis axis;
    axis.output_step = stride;
    int64_t before = 0;
    for (int64_t first = 0; first < min64(in, stride); ++first) {
      Bf16AxisOutput output{first, ceil_div(in - first, stride), {}};
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t distance = first + pad - tap * dilation;
        if (distance % stride != 0) continue;
        output.taps.push_back({tap, 0, distance / stride});
        before = max64(before, -distance / stride);
      }
      axis.outputs.push_back(std::move(output));
    }
    axis.firsts = {-before};
    for (Bf16AxisOutput& output : axis.outputs) {
      axis.length = max64(axis.length, output.size);  // without taps, too
      for (Bf16AxisTap& tap : output.taps) {
        tap.shift += before;
        axis.length = max64(axis.length, output.size + tap.shift);
      }
    }
    return axis;
  }

  int64_t planes() const { return static_cast<int64_t>(firsts.size()); }
  int64_t most_shift() const {
    int64_t most = 0;
    for (const Bf16AxisOutput& output : outputs) {
      for (const Bf16AxisTap& tap : output.taps) most = max64(most, tap.shift);
    }
    return most;
  }
  // Whether the copy is the source itself, and whether every position of it is an output's.
  bool is_source(int64_t size) const {
    return step == 1 && planes() == 1 && firsts[0] == 0 && length == size;
  }
  bool is_output() const {
    return planes() == 1 && outputs.size() == 1 && outputs[0].size == length;
  }
};

// Both axes of a direction's source and outputs.
struct Bf16Grid {
  Bf16Axis vertical, horizontal;

  static Bf16Grid of(const Conv2dProblem& p, bool is_dgrad) {
    const auto axis = is_dgrad ? Bf16Axis::dgrad : Bf16Axis::fprop;
    return {axis(is_dgrad ? p.h : p.oh, p.r, p.stride_h, p.dilation_h, p.pad_top),
            axis(is_dgrad ? p.w : p.ow, p.s, p.stride_w, p.dilation_w, p.pad_left)};
  }
  int64_t planes() const { return vertical.planes() * horizontal.planes(); }
  int64_t plane_size() const { return vertical.length * horizontal.length; }
  bool is_output() const { return vertical.is_output() && horizontal.is_output(); }
};

// What the source has of a plane's row: columns begin .. end - 1, the first of them `offset` pixels behind
// the image's first, and each `step` pixels further on.
struct Bf16Row {
  int64_t begin = 0, end = 0;
  int64_t offset = 0, step = 0;

  Bf16Row(const Bf16Grid& grid, int64_t h, int64_t w, int64_t plane, int64_t row) {
    const Bf16Axis &down = grid.vertical, &across = grid.horizontal;
    const int64_t i =
        down.firsts[static_cast<std::size_t>(plane / across.planes())] + row * down.step;
    if (i < 0 || i >= h) return;
    const int64_t first = across.firsts[static_cast<std::size_t>(plane % across.planes())];
    step = across.step;
    begin = min64(across.length, first < 0 ? ceil_div(-first, step) : 0);
    end = first < w ? min64(across.length, (w - 1 - first) / step + 1) : 0;
    end = max64(begin, end);
    offset = i * w + first + begin * step;
  }
};

// Copies `columns` elements, those of positive y where y is given, and zeros behind up to `width`.
inline void copy_masked(const Bits* from, const Bits* y, int64_t columns, int64_t width, Bits* to) {
  if (y) {
    for (int64_t j = 0; j < columns; ++j) to[j] = bf16_is_positive(y[j]) ? from[j] : Bits{0};
  } else {
    std::memcpy(to, from, static_cast<std::size_t>(columns) * sizeof(Bits));
  }
  std::fill(to + columns, to + width, Bits{0});
}

// --- fprop, dgrad -------------------------------------------------------------------------------------

template <class Unit>
class Bf16TapConvolution {
 public:
  Bf16TapConvolution(const Conv2dProblem& p, bool is_dgrad)
      : p_(p), is_dgrad_(is_dgrad), grid_(Bf16Grid::of(p, is_dgrad)), h_(is_dgrad ? p.oh : p.h),
        w_(is_dgrad ? p.ow : p.w), in_(is_dgrad ? p.k_per_group() : p.c_per_group()),
        out_(is_dgrad ? p.c_per_group() : p.k_per_group()), slices_(in_, Unit::kSlice),
        channels_(p.groups * slices_.elements()), vectors_(ceil_div(out_, kBf16Width)),
        panels_(ceil_div(vectors_, Unit::kVectors)),
        copied_(slices_.elements() != in_ || !grid_.vertical.is_source(h_) ||
                !grid_.horizontal.is_source(w_) || (is_dgrad && p.activation == Activation::relu)) {
  }

  bool serves() const {
    return !copied_ || !mostly_padding(p_, grid_.planes() * grid_.vertical.length * scale_of_c(),
                                       grid_.horizontal.length);
  }
  double products() const {
    double sum = 0;
    for_each_output([&](const Output& output) {
      const int64_t positions = Unit::kEvenRows
                                    ? (output.rows - 1) * row_positions() + output.columns
                                    : output.rows * output.columns;
      sum += static_cast<double>(p_.n * positions * p_.groups) *
             static_cast<double>(output.taps * elements_paid<Unit>(slices_)) *
             static_cast<double>(vectors_ * kBf16Width);
    });
    return sum;
  }
  int64_t copied_elements() const { return copied_ ? p_.n * image_size() : 0; }
  int64_t source_elements_paid() const {
    if (!copied_) return is_dgrad_ ? p_.y_size() : p_.x_size();
    if (copies_rows(grid_.horizontal.step)) return copied_elements();
    return copied_elements() / slices_.elements() * max64(slices_.elements(), kLeastBf16Run);
  }
  int64_t output_elements() const { return is_dgrad_ ? p_.x_size() : p_.y_size(); }
  int64_t packed_elements() const { return p_.groups * vectors_ * p_.r * p_.s * tap_size(); }
  int64_t workspace_bytes() const {
    return round_up(2 * copied_elements(), 64) + 2 * packed_elements();
  }
  std::string blocking() const {
    const int vectors = static_cast<int>(ceil_div(vectors_, panels_));
    return std::to_string(Unit::kRows[vectors]) + "x" + std::to_string(vectors * kBf16Width) +
           " pixels x channels, slices of " + std::to_string(slices_.length) +
           " source channels, the source " + (copied_ ? "copied with its padding" : "in place");
  }

  void run(const Bf16Operands& t) const {
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    Bits* const copy = reinterpret_cast<Bits*>(workspace.floats());
    Bits* const packed = reinterpret_cast<Bits*>(
        workspace.floats(static_cast<std::size_t>(round_up(2 * copied_elements(), 64))));
    const Bits* const source = bits_of(is_dgrad_ ? t.dy : t.x);
    pack(bits_of(t.filter), packed);
    if (copied_) copy_source(source, is_dgrad_ ? bits_of(t.y) : nullptr, copy);
    for_each_output(
        [&](const Output& output) { multiply(output, copied_ ? copy : source, packed, t); });
  }

 private:
  // Outputs of one residue class, which the same taps reach.
  struct Output {
    const Bf16AxisOutput *vertical, *horizontal;
    int64_t rows, columns, taps;
    int64_t taps_before;  // of other outputs, in the packed filter
  };

  const Conv2dProblem& p_;
  const bool is_dgrad_;
  const Bf16Grid grid_;
  const int64_t h_, w_;      // the source's
  const int64_t in_, out_;   // channels of a group
  const Bf16Slices slices_;  // of in_
  const int64_t channels_;   // of a pixel of the source, with those that fill the slices
  const int64_t vectors_, panels_;
  const bool copied_;

  // mostly_padding() multiplies by the channels of x.
  int64_t scale_of_c() const { return ceil_div(channels_, p_.c); }
  int64_t image_size() const { return grid_.planes() * grid_.plane_size() * channels_; }
  int64_t row_positions() const { return grid_.horizontal.length; }
  int64_t tap_size() const { return slices_.elements() * kBf16Width; }  // of a vector

  bool copies_rows(int64_t step) const { return step == 1 && p_.groups * in_ == channels_; }

  template <class Body>
  void for_each_output(const Body& body) const {
    int64_t before = 0;
    for (const Bf16AxisOutput& down : grid_.vertical.outputs) {
      for (const Bf16AxisOutput& across : grid_.horizontal.outputs) {
        const auto taps = static_cast<int64_t>(down.taps.size() * across.taps.size());
        body(Output{&down, &across, down.size, across.size, taps, before});
        before += taps;
      }
    }
  }
  template <class Body>
  static void for_each_tap(const Output& output, const Body& body) {
    for (const Bf16AxisTap& down : output.vertical->taps) {
      for (const Bf16AxisTap& across : output.horizontal->taps) body(down, across);
    }
  }

  // [group][output][vector][tap][element / 2][column][element % 2]; `packed` is the group's of an output.
  Bits* packed_of(Bits* packed, const Output& output, int64_t group) const {
    return packed + (group * p_.r * p_.s + output.taps_before) * vectors_ * tap_size();
  }

  void pack(const Bits* filter, Bits* packed) const {
    for_each_output([&](const Output& output) {
      parallel_by_floats(p_.groups * vectors_, output.taps * tap_size() / 2, [&](int64_t i) {
        const int64_t group = i / vectors_, vector = i % vectors_;
        Bits* to = packed_of(packed, output, group) + vector * output.taps * tap_size();
        for_each_tap(output, [&](const Bf16AxisTap& down, const Bf16AxisTap& across) {
          const int64_t tap = down.tap * p_.s + across.tap;
          pack_tap(filter + tap * p_.c_per_group() * p_.k + group * p_.k_per_group(),
                   vector * kBf16Width, to);
          to += tap_size();
        });
      });
    });
  }

  // `filter` is one tap's of a group: [C of the group][K of all].
  void pack_tap(const Bits* filter, int64_t first, Bits* to) const {
    const int64_t columns = min64(kBf16Width, out_ - first);
    const int64_t elements = slices_.elements();
    static constexpr Bits kZeros[kBf16Width] = {};
    if (!is_dgrad_) {
      for (int64_t i = 0; i < elements; i += 2, to += 2 * kBf16Width) {
        const Bits* const row = filter + i * p_.k + first;
        interleave_pair(i < in_ ? row : kZeros, i + 1 < in_ ? row + p_.k : kZeros, columns, to);
      }
      return;
    }
    const Bits* const rows = filter + first * p_.k;
    if (columns < kBf16Width || elements > in_) std::fill_n(to, tap_size(), Bits{0});
    transpose_bits<std::uint32_t>(columns, in_ / 2, rows, p_.k, to, 2 * kBf16Width);
    if (in_ % 2 == 0) return;
    Bits* const last = to + (in_ - 1) * kBf16Width;
    for (int64_t j = 0; j < columns; ++j) last[2 * j] = rows[j * p_.k + in_ - 1];
  }

  void copy_source(const Bits* source, const Bits* y, Bits* copy) const {
    const int64_t rows = grid_.planes() * grid_.vertical.length;
    const int64_t row_size = row_positions() * channels_;
    const int64_t channels = p_.groups * in_;  // of the source
    parallel_by_floats(p_.n * rows, row_size / 2, [&](int64_t i) {
      const int64_t n = i / rows, plane = i % rows / grid_.vertical.length;
      const Bf16Row row(grid_, h_, w_, plane, i % grid_.vertical.length);
      Bits* to = copy + i * row_size;
      Bits* const end = to + row_size;
      to = std::fill_n(to, row.begin * channels_, Bits{0});
      const int64_t from = (n * h_ * w_ + row.offset) * channels;
      const Bits* const mask = y ? y + from : nullptr;
      if (copies_rows(row.step)) {
        const int64_t size = (row.end - row.begin) * channels;
        copy_masked(source + from, mask, size, size, to);
        to += size;
      } else {
        for (int64_t j = 0; j < row.end - row.begin; ++j) {
          for (int64_t group = 0; group < p_.groups; ++group, to += slices_.elements()) {
            const int64_t at = j * row.step * channels + group * in_;
            copy_masked(source + from + at, mask ? mask + at : nullptr, in_, slices_.elements(),
                        to);
          }
        }
      }
      std::fill(to, end, Bits{0});
    });
  }

  // The images of an output as rows of positions. Where the copy has nothing else, all are one row.
  struct Positions {
    int64_t images, columns, row_step;
    int64_t count;  // of an image
    bool all;       // whether positions that are no outputs are among them
  };
  Positions positions_of(const Output& output) const {
    if (grid_.is_output()) {
      const int64_t count = p_.n * output.rows * output.columns;
      return {1, count, count, count, false};
    }
    if (!Unit::kEvenRows) {
      return {p_.n, output.columns, row_positions(), output.rows * output.columns, false};
    }
    return {p_.n, output.columns, row_positions(),
            (output.rows - 1) * row_positions() + output.columns, true};
  }

  void multiply(const Output& output, const Bits* source, Bits* packed,
                const Bf16Operands& t) const {
    const Positions positions = positions_of(output);
    if (positions.count <= 0) return;
    std::vector<int64_t> offsets;
    for_each_tap(output, [&](const Bf16AxisTap& down, const Bf16AxisTap& across) {
      const int64_t plane = down.plane * grid_.horizontal.planes() + across.plane;
      offsets.push_back((plane * grid_.plane_size() + down.shift * row_positions() + across.shift) *
                        channels_);
    });
    // Panels that stay in a second-level cache while tiles pass by.
    constexpr int64_t kCache = int64_t{256} << 10;
    const int64_t panel_bytes =
        2 * ceil_div(vectors_, panels_) * max64(1, output.taps) * tap_size();
    int64_t panels_a_task = std::clamp<int64_t>(kCache / panel_bytes, 1, panels_);
    const int rows = Unit::kRows[ceil_div(vectors_, panels_)];
    const int64_t tiles = ceil_div(positions.count, rows), enough = 4 * int64_t{num_threads()};
    int64_t blocks = ceil_div(tiles, ceil_div(int64_t{128}, rows));
    const auto tasks = [&] {
      return positions.images * blocks * p_.groups * ceil_div(panels_, panels_a_task);
    };
    if (tasks() < enough) panels_a_task = 1;
    if (tasks() < enough) blocks = min64(tiles, ceil_div(enough, positions.images));
    const int64_t panel_groups = ceil_div(panels_, panels_a_task);
    parallel_for(tasks(), [&](int64_t task) {
      const Span block = part_of(tiles, blocks, task % blocks);
      const int64_t image = task / blocks % positions.images;
      const int64_t panel = task / blocks / positions.images % panel_groups * panels_a_task;
      const int64_t group = task / blocks / positions.images / panel_groups;
      const Span panels{panel, min64(panels_, panel + panels_a_task)};
      const Bits* const filter = packed_of(packed, output, group);
      typename Unit::Session session;
      const LikeTiles cut(positions.count, tiles);
      for (int64_t tile = block.begin; tile < block.end; ++tile) {
        multiply_tile(session, output, positions, offsets.data(), image,
                      {cut.begin(tile), cut.begin(tile) + cut.size(tile)}, group, panels, source,
                      filter, t);
      }
    });
  }

  void multiply_tile(typename Unit::Session& session, const Output& output,
                     const Positions& positions, const int64_t* offsets, int64_t image, Span span,
                     int64_t group, Span panels, const Bits* source, const Bits* filter,
                     const Bf16Operands& t) const {
    alignas(64) float sums[kMostBf16Rows * kMostBf16Vectors * kBf16Width];
    Bf16Product product;
    product.rows = static_cast<int>(span.size());
    product.row_step = channels_;
    product.tap_offsets = offsets;
    product.taps = output.taps;
    product.slices = slices_.count;
    product.slice = slices_.length;
    product.vector_step = output.taps * tap_size();
    product.sums = sums;
    int64_t pixels[kMostBf16Rows];  // of the output; -1 for none
    const Bits* const x = source + image * image_size() + group * slices_.elements();
    const int64_t row_step = positions.all ? positions.row_step : positions.columns;
    int64_t row = span.begin / row_step, column = span.begin % row_step;
    for (int i = 0; i < product.rows; ++i) {
      product.source[i] = x + (row * positions.row_step + column) * channels_;
      pixels[i] = column < positions.columns ? pixel_of(output, image, row, column) : -1;
      if (++column < row_step) continue;
      column = 0;
      ++row;
    }
    const LikeTiles cut(vectors_, panels_);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      product.vectors = static_cast<int>(cut.size(panel));
      product.packed = filter + cut.begin(panel) * product.vector_step;
      session.multiply(product);
      const int64_t first = cut.begin(panel) * kBf16Width;
      finish(product, pixels, group * out_ + first,
             min64(product.vectors * kBf16Width, out_ - first), t);
    }
  }

  int64_t pixel_of(const Output& output, int64_t image, int64_t row, int64_t column) const {
    if (grid_.is_output()) return column;  // of one class, all images one row
    const int64_t h = is_dgrad_ ? p_.h : p_.oh, w = is_dgrad_ ? p_.w : p_.ow;
    const int64_t i = output.vertical->first + row * grid_.vertical.output_step;
    const int64_t j = output.horizontal->first + column * grid_.horizontal.output_step;
    return (image * h + i) * w + j;
  }

  // Sums to output pixels, with what stands behind them.
  void finish(const Bf16Product& product, const int64_t* pixels, int64_t first, int64_t columns,
              const Bf16Operands& t) const {
    const Activation activation = is_dgrad_ ? Activation::linear : p_.activation;
    const bool rounds_only = !t.scale && !t.bias && !t.residual && activation == Activation::linear;
    const auto finish_rows = [&](const auto& epilogue) {
      using Epilogue = std::decay_t<decltype(epilogue)>;
      for (int i = 0; i < product.rows; ++i) {
        if (pixels[i] < 0) continue;
        const int64_t at = pixels[i] * p_.groups * out_ + first;
        const float* const sums = product.sums + i * product.vectors * kBf16Width;
        Bits* const out = reinterpret_cast<Bits*>(t.out) + at;
        const Bits* const residual = t.residual ? bits_of(t.residual) + at : nullptr;
        int64_t j = 0;
        for (; j + Epilogue::kLanes <= columns; j += Epilogue::kLanes) {
          epilogue.finish(sums, residual, j, std::integral_constant<int64_t, Epilogue::kLanes>{},
                          out);
        }
        if (j < columns) epilogue.finish(sums, residual, j, columns - j, out);
      }
    };
    if (rounds_only) return finish_rows(Epilogue<true>{});
    finish_rows(Epilogue<false>{
        .scale = t.scale ? t.scale + first : nullptr,
        .bias = t.bias ? t.bias + first : nullptr,
        .least = activation == Activation::linear ? -std::numeric_limits<float>::infinity() : 0,
        .most = ceiling_of(activation)});
  }

  template <bool RoundsOnly>
  struct Epilogue {
    const float *scale = nullptr, *bias = nullptr;  // null for none
    float least = 0, most = 0;

    // In vectors that any compiler knows, for of a loop so short it makes none.
#if defined(__AVX512BW__)
    static constexpr int64_t kLanes = 16;
#else
    static constexpr int64_t kLanes = 8;
#endif

    // Columns begin .. begin + count - 1 of a row, at most kLanes. There are sums behind the last.
    template <class Count>
    [[gnu::always_inline]] void finish(const float* sums, const Bits* residual, int64_t begin,
                                       Count count, Bits* out) const {
      using Floats = float __attribute__((vector_size(4 * kLanes)));
      using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
      using Halves = Bits __attribute__((vector_size(2 * kLanes)));
      const auto load = [&](const auto* from, auto& values) {
        std::memcpy(&values, from + begin, static_cast<std::size_t>(count) * sizeof *from);
      };
      Floats sum;
      std::memcpy(&sum, sums + begin, sizeof sum);
      if constexpr (!RoundsOnly) {
        if (scale) {
          Floats factor = {};
          load(scale, factor);
          sum *= factor;
        }
        if (bias) {
          Floats term = {};
          load(bias, term);
          sum += term;
        }
        if (residual) {
          Halves added = {};
          load(residual, added);
          sum += (Floats)(__builtin_convertvector(added, Words) << 16);
        }
        sum = sum < least ? Floats{} + least : sum;  // NaN stays
        sum = sum > most ? Floats{} + most : sum;
      }
      const Words all = (Words)sum, high = all >> 16;
      // To nearest, ties to even; a NaN stays one.
      const Words rounded = (all + 0x7FFF + (high & 1)) >> 16;
      const Words words = (all & 0x7FFFFFFF) > 0x7F800000 ? high | 0x40 : rounded;
      const Halves halves = __builtin_convertvector(words, Halves);
      std::memcpy(out + begin, &halves, static_cast<std::size_t>(count) * sizeof(Bits));
    }
  };
};

// --- wgrad --------------------------------------------------------------------------------------------

template <class Unit>
class Bf16Wgrad {
 public:
  explicit Bf16Wgrad(const Conv2dProblem& p)
      : p_(p), grid_(Bf16Grid::of(p, false)),
        is_flat_(grid_.is_output() && grid_.vertical.is_source(p.h) &&
                 grid_.horizontal.is_source(p.w)),
        images_(is_flat_ ? ceil_div(p.n * p.oh * p.ow, kFlatPixels) : p.n),
        pixels_(is_flat_ ? min64(kFlatPixels, p.n * p.oh * p.ow)
                         : (p.oh - 1) * grid_.horizontal.length + p.ow),
        slices_(pixels_, Unit::kSlice), channels_(p.c_per_group()),
        vectors_(ceil_div(p.k_per_group(), kBf16Width)),
        panels_(ceil_div(vectors_, Unit::kVectors)), row_size_(row_size()),
        image_size_(grid_.planes() * p.c * row_size_),
        packed_image_(slices_.elements() * kBf16Width),
        rows_(Unit::kRows[ceil_div(vectors_, panels_)]),
        tiles_(p.groups * p.r * p.s * ceil_div(channels_, rows_) * panels_),
        parts_(std::clamp<int64_t>(kEnoughTasks / tiles_, 1, images_)) {}

  bool serves() const {
    return !mostly_padding(p_, grid_.planes() * grid_.vertical.length, grid_.horizontal.length);
  }
  // Whether every result is a sum of products of its own.
  bool is_exact() const { return is_flat_; }
  double products() const {
    return static_cast<double>(p_.r * p_.s * p_.c) * static_cast<double>(vectors_ * kBf16Width) *
           static_cast<double>(images_ * elements_paid<Unit>(slices_));
  }
  int64_t copied_elements() const {
    return images_ * (image_size_ + p_.groups * vectors_ * packed_image_);
  }
  int64_t elements_paid_for_copies() const {
    return images_ *
           (image_size_ / p_.c * max64(p_.c, kLeastBf16Run) + p_.groups * vectors_ * packed_image_);
  }
  int64_t workspace_bytes() const { return 2 * copied_elements() + sums_bytes() + 192; }
  std::string blocking() const {
    return std::to_string(rows_) + "x" + std::to_string(ceil_div(vectors_, panels_) * kBf16Width) +
           " input x output channels, slices of " + std::to_string(slices_.length) +
           " pixels, x transposed and dy packed, " + std::to_string(parts_) +
           (parts_ == 1 ? " part" : " parts");
  }

  void run(const Bf16Operands& t) const {
    const Workspace workspace(static_cast<std::size_t>(workspace_bytes()));
    const int64_t x_bytes = round_up(2 * images_ * image_size_, 64);
    const int64_t dy_bytes = round_up(2 * images_ * p_.groups * vectors_ * packed_image_, 64);
    Bits* const x = reinterpret_cast<Bits*>(workspace.floats());
    Bits* const dy = reinterpret_cast<Bits*>(workspace.floats(static_cast<std::size_t>(x_bytes)));
    float* const parts = workspace.floats(static_cast<std::size_t>(x_bytes + dy_bytes));
    pack_dy(bits_of(t.dy), bits_of(t.y), dy);
    if (t.dbias) sum_dy(dy, t.dbias);
    if (!t.dfilter) return;
    transpose_x(bits_of(t.x), x);
    multiply(x, dy, parts_ > 1 ? parts : t.dfilter);
    if (parts_ > 1) add_parts(parts, t.dfilter);
  }

 private:
  // Where the grid has nothing but pixels, all images are one row, which is taken so many at a time.
  static constexpr int64_t kFlatPixels = 512;
  // With fewer tasks than this, images are parted, and sums of parts added in order.
  static constexpr int64_t kEnoughTasks = 64;

  const Conv2dProblem& p_;
  const Bf16Grid grid_;
  const bool is_flat_;
  const int64_t images_, pixels_;  // as they are multiplied
  const Bf16Slices slices_;        // of pixels_
  const int64_t channels_;
  const int64_t vectors_, panels_;  // of a group
  const int64_t row_size_;          // of a channel of a plane of x
  const int64_t image_size_, packed_image_;
  const int rows_;
  const int64_t tiles_, parts_;

  // In whole cache lines, an odd number of them.
  int64_t row_size() const {
    const int64_t most_shift =
        grid_.vertical.most_shift() * grid_.horizontal.length + grid_.horizontal.most_shift();
    const int64_t read =
        is_flat_ ? slices_.elements() : max64(grid_.plane_size(), slices_.elements() + most_shift);
    return 2 * odd_lines(ceil_div(read, 2));
  }
  int64_t sums_bytes() const { return parts_ > 1 ? 4 * parts_ * p_.filter_size() : 0; }
  // Of a flat image.
  int64_t flat_pixels(int64_t image) const {
    return min64(kFlatPixels, p_.n * p_.oh * p_.ow - image * kFlatPixels);
  }

  // [image][plane][channel][position]
  void transpose_x(const Bits* x, Bits* out) const {
    if (is_flat_) {
      return parallel_by_floats(images_, image_size_ / 2, [&](int64_t image) {
        Bits* const to = out + image * image_size_;
        const int64_t pixels = flat_pixels(image);
        for (int64_t c = 0; c < p_.c; ++c) {
          std::fill(to + c * row_size_ + pixels, to + (c + 1) * row_size_, Bits{0});
        }
        transpose_bits<Bits>(pixels, p_.c, x + image * kFlatPixels * p_.c, p_.c, to, row_size_);
      });
    }
    const int64_t planes = grid_.planes();
    parallel_by_floats(images_ * planes, p_.c * row_size_ / 2, [&](int64_t i) {
      const int64_t n = i / planes, width = grid_.horizontal.length;
      Bits* const to = out + i * p_.c * row_size_;
      std::fill_n(to, p_.c * row_size_, Bits{0});
      for (int64_t q = 0; q < grid_.vertical.length; ++q) {
        const Bf16Row row(grid_, p_.h, p_.w, i % planes, q);
        transpose_bits<Bits>(row.end - row.begin, p_.c, x + (n * p_.h * p_.w + row.offset) * p_.c,
                             row.step * p_.c, to + q * width + row.begin, row_size_);
      }
    });
  }

  // [group][vector][image][position / 2][column][position % 2], zero where there is no pixel.
  void pack_dy(const Bits* dy, const Bits* y, Bits* out) const {
    parallel_by_floats(p_.groups * vectors_ * images_, packed_image_ / 2, [&](int64_t i) {
      const int64_t image = i % images_, vector = i / images_ % vectors_;
      const int64_t group = i / images_ / vectors_;
      const int64_t columns = min64(kBf16Width, p_.k_per_group() - vector * kBf16Width);
      const int64_t from = group * p_.k_per_group() + vector * kBf16Width;
      Bits* to = out + i * packed_image_;
      static constexpr Bits kZeros[kBf16Width] = {};
      Bits masked[2][kBf16Width] = {};
      for (int64_t position = 0; position < slices_.elements();
           position += 2, to += 2 * kBf16Width) {
        const Bits* rows[2];
        for (int64_t j = 0; j < 2; ++j) {
          const int64_t pixel = pixel_at(image, position + j);
          rows[j] = pixel < 0 ? kZeros : dy + pixel * p_.k + from;
          if (!y || pixel < 0) continue;
          copy_masked(rows[j], y + pixel * p_.k + from, columns, columns, masked[j]);
          rows[j] = masked[j];
        }
        interleave_pair(rows[0], rows[1], columns, to);
      }
    });
  }

  // dy's pixel at a position of an image; -1 for none.
  int64_t pixel_at(int64_t image, int64_t position) const {
    if (is_flat_) return position < flat_pixels(image) ? image * kFlatPixels + position : -1;
    const int64_t row = position / grid_.horizontal.length;
    const int64_t column = position % grid_.horizontal.length;
    return row < p_.oh && column < p_.ow ? (image * p_.oh + row) * p_.ow + column : -1;
  }

  void sum_dy(const Bits* dy, float* dbias) const {
    parallel_for(p_.groups * vectors_, [&](int64_t i) {
      const int64_t first = i % vectors_ * kBf16Width;
      const Bits* from = dy + i * images_ * packed_image_;
      float sums[2 * kBf16Width] = {};
      for (int64_t image = 0; image < images_; ++image) {
        float of_image[2 * kBf16Width] = {};
        for (const Bits* const end = from + packed_image_; from < end; from += 2 * kBf16Width) {
          for (int64_t j = 0; j < 2 * kBf16Width; ++j) of_image[j] += bf16_to_float(from[j]);
        }
        for (int64_t j = 0; j < 2 * kBf16Width; ++j) sums[j] += of_image[j];
      }
      float* const out = dbias + i / vectors_ * p_.k_per_group() + first;
      for (int64_t j = 0; j < min64(kBf16Width, p_.k_per_group() - first); ++j) {
        out[j] = sums[2 * j] + sums[2 * j + 1];
      }
    });
  }

  void multiply(const Bits* x, const Bits* dy, float* dfilter) const {
    std::vector<int64_t> images(static_cast<std::size_t>(images_));
    for (std::size_t n = 0; n < images.size(); ++n) {
      images[n] = static_cast<int64_t>(n) * image_size_;
    }
    const int64_t row_tiles = ceil_div(channels_, rows_);
    parallel_for(parts_ * tiles_, [&](int64_t task) {
      // Tiles of a part that differ by their panel follow one another: they read one part of x.
      const int64_t panel = task % panels_, tile = task / panels_ % row_tiles;
      const int64_t tap = task / panels_ / row_tiles % (p_.r * p_.s);
      const int64_t group = task / panels_ / row_tiles / (p_.r * p_.s) % p_.groups;
      const Span part = part_of(images_, parts_, task / tiles_);
      const LikeTiles down(channels_, row_tiles), across(vectors_, panels_);
      const int64_t first_row = down.begin(tile), first_vector = across.begin(panel);
      const Bf16AxisTap& v = grid_.vertical.outputs[0].taps[static_cast<std::size_t>(tap / p_.s)];
      const Bf16AxisTap& h = grid_.horizontal.outputs[0].taps[static_cast<std::size_t>(tap % p_.s)];
      const int64_t plane = v.plane * grid_.horizontal.planes() + h.plane;

      alignas(64) float sums[kMostBf16Rows * kMostBf16Vectors * kBf16Width];
      Bf16Product product;
      product.rows = static_cast<int>(down.size(tile));
      product.vectors = static_cast<int>(across.size(panel));
      product.row_step = row_size_;
      for (int i = 0; i < product.rows; ++i) {
        product.source[i] = x + (plane * p_.c + group * channels_ + first_row + i) * row_size_ +
                            v.shift * grid_.horizontal.length + h.shift;
      }
      product.tap_offsets = images.data() + part.begin;
      product.taps = part.size();
      product.slices = slices_.count;
      product.slice = slices_.length;
      product.vector_step = images_ * packed_image_;
      product.packed =
          dy + (group * vectors_ + first_vector) * product.vector_step + part.begin * packed_image_;
      product.sums = sums;
      typename Unit::Session session;
      session.multiply(product);

      const int64_t first = first_vector * kBf16Width;
      const int64_t columns = min64(product.vectors * kBf16Width, p_.k_per_group() - first);
      for (int64_t i = 0; i < product.rows; ++i) {
        std::copy_n(sums + i * product.vectors * kBf16Width, columns,
                    dfilter + task / tiles_ * p_.filter_size() +
                        (tap * channels_ + first_row + i) * p_.k + group * p_.k_per_group() +
                        first);
      }
    });
  }

  void add_parts(const float* parts, float* dfilter) const {
    const int64_t size = p_.filter_size();
    constexpr int64_t kATask = 4096;
    parallel_for(ceil_div(size, kATask), [&](int64_t task) {
      const int64_t begin = task * kATask, end = min64(size, begin + kATask);
      std::copy(parts + begin, parts + end, dfilter + begin);
      for (int64_t part = 1; part < parts_; ++part) {
        const float* const from = parts + part * size;
        for (int64_t i = begin; i < end; ++i) dfilter[i] += from[i];
      }
    });
  }
};

// --- the algorithm ------------------------------------------------------------------------------------

template <class Unit>
struct Bf16Convolution {
  // What is said of an empty batch is said of one image.
  static Conv2dProblem of_an_image(Conv2dProblem p) {
    p.n = max64(p.n, 1);
    return p;
  }

  static bool serves(const Conv2dProblem& batch, Direction direction) {
    const Conv2dProblem p = of_an_image(batch);
    if (p.layout != Layout::nhwc || p.dtype != DataType::bfloat16) return false;
    if (p.x_size() == 0 || p.y_size() == 0) return false;
    // Lists of taps and of residue classes are made in every call.
    constexpr int64_t kMostTaps = 64, kMostStride = 16;
    if (max64(p.r, p.s) > kMostTaps || max64(p.stride_h, p.stride_w) > kMostStride) return false;
    if (direction == Direction::wgrad) return Bf16Wgrad<Unit>(p).serves();
    return Bf16TapConvolution<Unit>(p, direction == Direction::dgrad).serves();
  }

  static Estimate estimate(const Conv2dProblem& batch, Direction direction) {
    const Conv2dProblem p = of_an_image(batch);
    const Bf16Costs costs = Unit::costs();
    Estimate out;
    if (direction == Direction::wgrad) {
      const Bf16Wgrad<Unit> wgrad(p);
      out.multiply_adds = costs.wgrad_product * wgrad.products() +
                          costs.moved * static_cast<double>(wgrad.elements_paid_for_copies());
      out.workspace_bytes = wgrad.workspace_bytes();
      if (!wgrad.is_exact()) out.relative_error = 1e-7;
      return out;
    }
    const Bf16TapConvolution<Unit> convolution(p, direction == Direction::dgrad);
    out.multiply_adds = costs.product * convolution.products() +
                        costs.moved * static_cast<double>(convolution.source_elements_paid() +
                                                          convolution.packed_elements() +
                                                          convolution.output_elements());
    out.workspace_bytes = convolution.workspace_bytes();
    return out;
  }

  static std::string blocking(const Conv2dProblem& batch, Direction direction) {
    const Conv2dProblem p = of_an_image(batch);
    if (direction == Direction::wgrad) return Bf16Wgrad<Unit>(p).blocking();
    return Bf16TapConvolution<Unit>(p, direction == Direction::dgrad).blocking();
  }

  static void run(const Conv2dProblem& p, Direction direction, const Bf16Operands& t) {
    if (direction == Direction::wgrad) return Bf16Wgrad<Unit>(p).run(t);
    Bf16TapConvolution<Unit>(p, direction == Direction::dgrad).run(t);
  }
};

template <class Unit>
constexpr Bf16Algorithm bf16_algorithm(const char* name, Isa isa, bool is_for_its_name,
                                       bool (*on_this_cpu)()) {
  using Of = Bf16Convolution<Unit>;
  return {name, isa, is_for_its_name, on_this_cpu, Of::serves, Of::estimate, Of::blocking, Of::run};
}

}  // namespace
}  // namespace fastconv::cpu
