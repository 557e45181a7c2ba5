// Convolution as a matrix product on tensor cores, the matrices of patches never formed (implicit
// GEMM: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014).
//
//   direction   rows (M)              columns (N)   summed over (K)
//   fprop       output pixels         filters       taps x channels
//   dgrad       input pixels          channels      taps x filters
//   wgrad       taps x channels       filters       output pixels
//
// per group. A block of 4 warps makes one tile of the result, each warp a quarter of it, from slices
// of both operands in shared memory, fragments by ldmatrix, sums in float32 registers.
//
// Everything is moved in chunks of 16 bytes: V = 8 (float16, bfloat16) or 4 (TF32) neighbouring
// channels of one pixel or one filter tap. A slice of an operand is a matrix of chunks, in one of two
// forms, after what is contiguous in memory:
//
//   sum-major   a row for each of the tile's rows or columns, 4 chunks along K: dy and x of fprop
//               and dgrad, the filter of dgrad
//   tile-major  a row for each of 4 V steps of K, tile / V chunks: the filter of fprop, both
//               operands of wgrad. ldmatrix transposes elements of 16 bits; those of 32 it cannot,
//               and TF32 is turned on its way to shared memory, where it is sum-major: a thread
//               fetches 4 x 4 or 2 x 4 elements and stores columns of them
//
// Shared memory: chunk c of row r lies at chunk c ^ swizzle(r) of its row, such that the 8 rows of
// one matrix of ldmatrix and the 8 chunks that a quarter of a warp writes each meet all 32 banks
// once (the emulator's profile of bank conflicts is a test):
//
//   rows of 64 bytes        c ^ (r / 2) % 4: two rows make a line of all banks
//   rows of 128 and more    c ^ r % 8
//   turned, rows of 64      see TurnedSlice
//
// Copies, the template's second axis:
//
//   async      cp.async of whole chunks, 3 slices in flight (sm_80 and newer). TF32's filter passes
//              through registers all the same, where it is turned and rounded, once for all warps
//   registers  whole chunks through registers, 2 slices (sm_75; wgrad of TF32)
//   gather     element by element through registers, 2 slices: channels that are no multiple of V,
//              N,C,H,W, misaligned tensors. Channels are padded to chunks with zeros
//
// Strided dgrad: input pixels whose coordinates leave the same remainder by the strides see the same
// taps. Each such class is a convolution of its own, of stride 1 (blockIdx.z); no product is with a
// zero that a stride put there.
//
// A sum can be split into parts of fixed size (blockIdx.z), so that few tiles fill the device: that of
// wgrad over pixels, those of fprop and dgrad over taps and channels. Parts are float32; split_k.cu
// adds them up in order.
//
// Result tiles pass through shared memory, 16 rows of a warp at a time, and are written in 16-byte
// stores. Bias and ReLU are applied to the float32 sums (a NaN passes ReLU).
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/selection.hpp"
#include "cuda/device.cuh"
#include "cuda/element.cuh"
#include "cuda/geometry.cuh"
#include "cuda/mma.cuh"

namespace fastconv::cuda::tensor_core {

enum class Copies { async, registers, gather };

constexpr int kThreads = 128;
constexpr int kChunksAlongSum = 4;  // of a slice

// T: __half, __nv_bfloat16 or Tf32.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(Stored<T>));
template <class T>
constexpr int kSliceSum = kChunksAlongSum * kVector<T>;  // 32 or 16 products a slice
template <class T>
constexpr int kStepSum = 2 * kVector<T>;  // 16 or 8 products an instruction

struct Parameters {
  ConvGeometry g;
  const void* image = nullptr;   // x (fprop, wgrad) or dy (dgrad): what taps move over
  const void* second = nullptr;  // the filter (fprop, dgrad) or dy (wgrad)
  const void* bias = nullptr;    // fprop; or null
  void* out = nullptr;
  int sum_channels = 0;     // per tap and group, of the sum (fprop, dgrad) or of the rows (wgrad)
  int padded_channels = 0;  // to whole chunks
  int columns = 0;          // of the result, per group
  int column_tiles = 0;
  int classes = 1;        // of dgrad's pixels
  bool by_parts = false;  // out: the float32 results of each part, for split_k.cu to add up
  int slices_a_part = 0, part_elements = 0;  // of the sum, of one part's result
  bool relu = false, channels_first = false;
  FastDivisor by_padded_channels{};
};

// --- where chunks lie in shared memory ------------------------------------------------------------

// Chunk c of row r of rows of kChunks, in chunks. kFloats: rows of float32 results, of which a lane
// stores two at a time in row g or g + 8.
template <int kChunks, bool kFloats = false>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  const int turn = kFloats ? row % 4 * 2 : kChunks == 4 ? row / 2 % 4 : row % 8;
  return row * kChunks + (chunk ^ turn);
}

// kRows x kChunks chunks, and which of them a thread copies: those of column `column` and rows
// first_row + i * kRowsApart.
template <int kRowsGiven, int kChunksGiven>
struct Slice {
  static constexpr bool kTurned = false;
  static constexpr int kRows = kRowsGiven, kChunks = kChunksGiven;
  static constexpr int kRowsApart = kThreads / kChunks;
  static constexpr int kPasses = kRows / kRowsApart;
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kRows % kRowsApart == 0 && (kRowsApart % 4 == 0));

  int first_row, column, offset;  // offset: bytes from the slice's start, of pass 0

  // Neighbouring threads take neighbouring chunks of a row or, where those are far apart in memory
  // (N,C,H,W), neighbouring rows.
  __device__ __forceinline__ explicit Slice(bool along_rows) {
    const int thread = static_cast<int>(threadIdx.x);
    first_row = along_rows ? thread % kRowsApart : thread / kChunks;
    column = along_rows ? thread / kRowsApart : thread % kChunks;
    offset = swizzled<kChunks>(first_row, column) * 16;
  }
  __device__ __forceinline__ int row(int pass) const { return first_row + pass * kRowsApart; }
  __device__ __forceinline__ int offset_of(int pass) const {
    return offset + pass * (kRowsApart * kChunks * 16);
  }

  // Of what lies along the sum: the byte at which chunk c of row r begins, and what is added (by ^
  // and +) for the rows that follow by 16.
  __device__ __forceinline__ static int place(int row, int chunk) {
    return swizzled<kChunks>(row, chunk) * 16;
  }
  static constexpr int kOddTile = 0;
};

// A slice of float32, kTile columns by 16 steps of the sum in memory, turned for shared memory: a
// row of 4 chunks for each column of the tile. A thread copies kPasses neighbouring steps of 4
// neighbouring columns, and stores kPasses steps of one column at a time.
//
// A line of 128 bytes is two rows. Of line l, chunk c of row h lies at (4 h + c) ^ turn(l), and
// turn's bits are those of l: l0 ^ l2, l1, l3. Rows of 4 lines one after the other, which ldmatrix
// reads, differ in the lower two (and in h); those of every other of 16 lines, which 8 threads
// write, in all three.
template <int kTile>
struct TurnedSlice {
  static constexpr bool kTurned = true;
  static constexpr int kRows = 16, kChunks = kTile / 4;
  static constexpr int kRowsApart = 1;
  static constexpr int kPasses = kRows * kChunks / kThreads;
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kPasses == 2 || kPasses == 4);

  int first_row, column, offset;  // offset: bytes from the slice's start, of column 0 of the chunk

  __device__ __forceinline__ explicit TurnedSlice(bool along_rows) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kPasses == 4) {
      column = thread % 32;
      first_row = thread / 32 * 4;
    } else if (along_rows) {  // 16 threads have all steps of columns whose lines differ in l3
      first_row = thread % 8 * 2;
      column = thread / 8 % 2 * 4 + thread / 16 % 4 + thread / 64 * 8;
    } else {  // 16 threads have both halves of one chunk of 8 columns
      first_row = (thread / 8 % 2 + thread / 32 * 2) * 2;
      column = thread % 8 + thread / 16 % 2 * 8;
    }
    offset = place(column * 4, first_row / 4) + first_row % 4 * 4;
  }
  __device__ __forceinline__ int row(int pass) const { return first_row + pass; }
  // Of column e of the chunk: its row is e further.
  __device__ __forceinline__ int offset_of(int e) const {
    return (offset ^ (e / 2 * 16 + e % 2 * 64)) + e / 2 * 128;
  }

  __device__ __forceinline__ static int place(int row, int chunk) {
    const int line = row / 2;
    const int turn = ((line ^ line / 4) % 2) + line / 2 % 2 * 2 + line / 8 % 2 * 4;
    return line * 128 + ((row % 2 * 4 + chunk) ^ turn) * 16;
  }
  static constexpr int kOddTile = 64;  // 16 rows are 8 lines: l3
};

// Of an operand: kTile rows or columns of a tile, which lie along the sum in memory or across it.
template <class T, bool kSumMajor, int kTile>
using SliceOf = std::conditional_t<kSumMajor, Slice<kTile, kChunksAlongSum>,
                                   std::conditional_t<std::is_same_v<T, Tf32>, TurnedSlice<kTile>,
                                                      Slice<kSliceSum<T>, kTile / kVector<T>>>>;

// --- where chunks come from -----------------------------------------------------------------------

// `count` elements `stride` apart, the rest of a chunk zeros. Whole chunks: count 0 or V, stride 1.
template <class E>
struct Source {
  const E* at;
  int count, stride;
};

// The tap and channel of one column of chunks, slice after slice.
struct Taps {
  int r, s, channel;
  int advance_r, advance_s, advance_channel, taps_h, taps_w, channels;

  __device__ __forceinline__ Taps(int at, int slice, int padded_channels, const Window& h,
                                  const Window& w)
      : taps_h(h.taps), taps_w(w.taps), channels(padded_channels) {
    const int tap = at / channels;
    channel = at - tap * channels;
    r = tap / taps_w;
    s = tap - r * taps_w;
    const int advance_taps = slice / channels;
    advance_channel = slice - advance_taps * channels;
    advance_r = advance_taps / taps_w;
    advance_s = advance_taps - advance_r * taps_w;
  }
  __device__ __forceinline__ void advance() {
    channel += advance_channel;
    s += advance_s;
    r += advance_r;
    if (channel >= channels) {
      channel -= channels;
      ++s;
    }
    if (s >= taps_w) {
      s -= taps_w;
      ++r;
    }
  }
  __device__ __forceinline__ bool inside() const { return r < taps_h; }
};

// What a direction reads under its taps and, of fprop and dgrad, writes.
template <Direction kDirection>
__device__ __forceinline__ const Strides& image_strides(const ConvGeometry& g) {
  return kDirection == Direction::dgrad ? g.y : g.x;
}
template <Direction kDirection>
__device__ __forceinline__ const Strides& out_strides(const ConvGeometry& g) {
  return kDirection == Direction::dgrad ? g.x : g.y;
}
// Pixels of an axis that are rows of the product; of dgrad, of the largest class.
template <Direction kDirection>
__device__ __forceinline__ int row_pixels(const ConvAxis& axis) {
  return kDirection == Direction::dgrad ? axis.class_pixels : axis.out;
}
// Splits a row of the product into image, i and j.
template <Direction kDirection>
__device__ __forceinline__ void split_row(const ConvGeometry& g, int row, int& n, int& i, int& j) {
  n = row;
  j = (kDirection == Direction::dgrad ? g.columns.by_class_pixels : g.columns.by_out).split(n);
  i = (kDirection == Direction::dgrad ? g.rows.by_class_pixels : g.rows.by_out).split(n);
}

// fprop, dgrad: rows are pixels. Sum-major.
template <class T, Direction kDirection, Copies kCopies, class S>
struct PixelRows : S {
  using E = Stored<T>;
  const E* image;
  int h0[S::kPasses], w0[S::kPasses], base[S::kPasses];
  int dilation_h, dilation_w;

  __device__ __forceinline__ PixelRows(const Parameters& p, int first, int rows, const Window& h,
                                       const Window& w, int group)
      : S(kCopies == Copies::gather && p.channels_first), dilation_h(h.dilation),
        dilation_w(w.dilation) {
    const Strides& strides = image_strides<kDirection>(p.g);
    image = static_cast<const E*>(p.image) + group * p.sum_channels * strides.channel;
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int row = first + this->row(pass);
      h0[pass] = -(1 << 30);  // outside whatever the tap
      w0[pass] = base[pass] = 0;
      if (row < rows) {
        int n, i, j;
        split_row<kDirection>(p.g, row, n, i, j);
        if (kDirection == Direction::fprop || (i < h.count && j < w.count)) {
          h0[pass] = h.origin + i * h.stride;
          w0[pass] = w.origin + j * w.stride;
          // Far outside, beyond what an int holds.
          base[pass] = int(unsigned(n) * unsigned(strides.image) +
                           unsigned(h0[pass]) * unsigned(strides.row) +
                           unsigned(w0[pass]) * unsigned(strides.column));
        }
      }
    }
  }

  // What all rows add to their own at the tap and channel of this slice.
  struct Step {
    int h, w, offset, count;
  };
  __device__ __forceinline__ Step step(const Parameters& p, const Taps& taps) const {
    const Strides& strides = image_strides<kDirection>(p.g);
    Step step;
    step.h = taps.r * dilation_h;
    step.w = taps.s * dilation_w;
    step.offset =
        int(unsigned(step.h) * unsigned(strides.row) + unsigned(step.w) * unsigned(strides.column) +
            unsigned(taps.channel) * unsigned(strides.channel));
    step.count = taps.inside() ? p.sum_channels - taps.channel : 0;
    return step;
  }
  __device__ __forceinline__ Source<E> source(const Parameters& p, const Step& step,
                                              int pass) const {
    const int height = kDirection == Direction::dgrad ? p.g.rows.out : p.g.rows.in;
    const int width = kDirection == Direction::dgrad ? p.g.columns.out : p.g.columns.in;
    const bool inside = static_cast<unsigned>(h0[pass] + step.h) < static_cast<unsigned>(height) &&
                        static_cast<unsigned>(w0[pass] + step.w) < static_cast<unsigned>(width) &&
                        step.count > 0;
    const int offset = int(unsigned(base[pass]) + unsigned(step.offset));
    return {inside ? image + offset : image, inside ? step.count : 0,
            image_strides<kDirection>(p.g).channel};
  }
};

// fprop: the filter, a row for each tap and channel. Tile-major.
template <class T, Copies kCopies, class S>
struct FilterRows : S {
  using E = Stored<T>;
  const E* filter;
  int at, rows, count;

  __device__ __forceinline__ FilterRows(const Parameters& p, int first_column, int begin, int group)
      : S(false) {
    const int column = first_column + this->column * kVector<T>;
    filter = static_cast<const E*>(p.second) + group * p.columns;
    if (column < p.columns) filter += column;
    count = max(0, p.columns - column);
    at = begin + this->first_row;
    rows = p.g.rows.taps * p.g.columns.taps * p.padded_channels;
  }
  __device__ __forceinline__ void advance() { at += S::kRows; }
  __device__ __forceinline__ Source<E> source(const Parameters& p, int pass) const {
    int row = at + pass * S::kRowsApart;
    bool inside = row < rows && count > 0;
    if constexpr (kCopies == Copies::gather) {
      const int tap = p.by_padded_channels.quotient(row), channel = row - tap * p.padded_channels;
      inside = inside && channel < p.sum_channels;
      row = tap * p.sum_channels + channel;
    }
    return {inside ? filter + row * p.g.k : filter, inside ? count : 0, 1};
  }
};

// dgrad: the filter, a row for each channel. Sum-major.
template <class T, Copies kCopies, class S>
struct FilterColumns : S {
  using E = Stored<T>;
  const E* filter;
  int base, channels_left;
  Window h, w;

  __device__ __forceinline__ FilterColumns(const Parameters& p, int first_channel, const Window& h,
                                           const Window& w, int group)
      : S(false), h(h), w(w) {
    filter = static_cast<const E*>(p.second) + group * p.sum_channels;
    base = (first_channel + this->first_row) * p.g.k;
    channels_left = p.columns - first_channel - this->first_row;
  }
  struct Step {
    int offset, count;
  };
  __device__ __forceinline__ Step step(const Parameters& p, const Taps& taps) const {
    const int tap = (h.tap + taps.r * h.tap_step) * p.g.columns.taps + w.tap + taps.s * w.tap_step;
    return {tap * p.g.c_per_group * p.g.k + taps.channel,
            taps.inside() ? p.sum_channels - taps.channel : 0};
  }
  __device__ __forceinline__ Source<E> source(const Parameters& p, const Step& step,
                                              int pass) const {
    const bool inside = step.count > 0 && pass * S::kRowsApart < channels_left;
    return {inside ? filter + (base + pass * S::kRowsApart * p.g.k + step.offset) : filter,
            inside ? step.count : 0, 1};
  }
};

// wgrad: a row for each pixel of the sum, a chunk for each tap and some channels. Tile-major.
template <class T, Copies kCopies, class S>
struct Patches : S {
  using E = Stored<T>;
  const E* image;
  int at, end, tap_h, tap_w, count;

  __device__ __forceinline__ Patches(const Parameters& p, int first, int begin, int end, int group)
      : S(kCopies == Copies::gather && p.channels_first), at(begin + this->first_row), end(end) {
    const int row = first + this->column * kVector<T>;
    const int tap = p.by_padded_channels.quotient(row), channel = row - tap * p.padded_channels;
    const int r = p.g.by_column_taps.quotient(tap), s = tap - r * p.g.columns.taps;
    const bool inside = r < p.g.rows.taps;
    image = static_cast<const E*>(p.image) +
            (group * p.sum_channels + (inside ? channel : 0)) * p.g.x.channel;
    count = inside ? p.sum_channels - channel : 0;
    tap_h = r * p.g.rows.dilation - p.g.rows.padding;
    tap_w = s * p.g.columns.dilation - p.g.columns.padding;
  }
  __device__ __forceinline__ void advance() { at += S::kRows; }
  __device__ __forceinline__ Source<E> source(const Parameters& p, int pass) const {
    const int pixel = at + pass * S::kRowsApart;
    int n, i, j;
    split_row<Direction::wgrad>(p.g, pixel, n, i, j);
    const int h = i * p.g.rows.stride + tap_h, w = j * p.g.columns.stride + tap_w;
    const bool inside = pixel < end && count > 0 &&
                        static_cast<unsigned>(h) < static_cast<unsigned>(p.g.rows.in) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(p.g.columns.in);
    return {inside ? image + (n * p.g.x.image + h * p.g.x.row + w * p.g.x.column) : image,
            inside ? count : 0, p.g.x.channel};
  }
};

// wgrad: dy, a row for each pixel of the sum. Tile-major.
template <class T, Copies kCopies, class S>
struct GradientRows : S {
  using E = Stored<T>;
  const E* dy;
  int at, end, count;

  __device__ __forceinline__ GradientRows(const Parameters& p, int first_column, int begin, int end,
                                          int group)
      : S(kCopies == Copies::gather && p.channels_first), at(begin + this->first_row), end(end) {
    const int column = first_column + this->column * kVector<T>;
    dy = static_cast<const E*>(p.second) +
         (group * p.columns + min(column, p.columns - 1)) * p.g.y.channel;
    count = max(0, p.columns - column);
  }
  __device__ __forceinline__ void advance() { at += S::kRows; }
  __device__ __forceinline__ Source<E> source(const Parameters& p, int pass) const {
    const int pixel = at + pass * S::kRowsApart;
    const bool inside = pixel < end && count > 0;
    int offset = 0;
    if constexpr (kCopies == Copies::gather) {
      int n = pixel;
      const int in_plane = p.g.by_plane.split(n);
      offset = n * p.g.y.image + in_plane * p.g.y.column;
    } else {
      offset = pixel * p.g.k;
    }
    return {inside ? dy + offset : dy, inside ? count : 0, p.g.y.channel};
  }
};

// --- from there to here ---------------------------------------------------------------------------

template <class E>
__device__ __forceinline__ uint4 gathered(const Source<E>& source) {
  std::uint32_t words[4];
  if constexpr (sizeof(E) == 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      words[e] = e < source.count
                     ? __ldg(reinterpret_cast<const unsigned*>(source.at) + e * source.stride)
                     : 0u;
    }
  } else {
    const auto* const at = reinterpret_cast<const unsigned short*>(source.at);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const std::uint32_t low = 2 * e < source.count ? __ldg(at + 2 * e * source.stride) : 0u;
      const std::uint32_t high =
          2 * e + 1 < source.count ? __ldg(at + (2 * e + 1) * source.stride) : 0u;
      words[e] = low | high << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <Copies kCopies, int kPasses, class GetSource>
__device__ __forceinline__ void fetch(uint4 (&staged)[kPasses], const GetSource& source_of) {
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const auto source = source_of(i);
    if constexpr (kCopies == Copies::gather) {
      staged[i] = gathered(source);
    } else {
      staged[i] = source.count > 0 ? __ldg(reinterpret_cast<const uint4*>(source.at))
                                   : make_uint4(0, 0, 0, 0);
    }
  }
}

template <class T, class S>
__device__ __forceinline__ void store_slice(unsigned char* slice, const S& map,
                                            uint4 (&staged)[S::kPasses]) {
  if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
    for (int i = 0; i < S::kPasses; ++i) {
      staged[i] = make_uint4(round_to_tf32(staged[i].x), round_to_tf32(staged[i].y),
                             round_to_tf32(staged[i].z), round_to_tf32(staged[i].w));
    }
  }
  if constexpr (!S::kTurned) {
#pragma unroll
    for (int i = 0; i < S::kPasses; ++i) {
      *reinterpret_cast<uint4*>(slice + map.offset_of(i)) = staged[i];
    }
  } else if constexpr (S::kPasses == 4) {
    const auto column = [&](int e, unsigned x, unsigned y, unsigned z, unsigned w) {
      *reinterpret_cast<uint4*>(slice + map.offset_of(e)) = make_uint4(x, y, z, w);
    };
    column(0, staged[0].x, staged[1].x, staged[2].x, staged[3].x);
    column(1, staged[0].y, staged[1].y, staged[2].y, staged[3].y);
    column(2, staged[0].z, staged[1].z, staged[2].z, staged[3].z);
    column(3, staged[0].w, staged[1].w, staged[2].w, staged[3].w);
  } else {
    const auto column = [&](int e, unsigned x, unsigned y) {
      *reinterpret_cast<uint2*>(slice + map.offset_of(e)) = make_uint2(x, y);
    };
    column(0, staged[0].x, staged[1].x);
    column(1, staged[0].y, staged[1].y);
    column(2, staged[0].z, staged[1].z);
    column(3, staged[0].w, staged[1].w);
  }
}

template <class S, class GetSource>
__device__ __forceinline__ void copy_slice(unsigned char* slice, const S& map,
                                           const GetSource& source_of) {
#pragma unroll
  for (int i = 0; i < S::kPasses; ++i) {
    const auto source = source_of(i);
    copy_async<16>(slice + map.offset_of(i), source.at, source.count > 0);
  }
}

// --- fragments ------------------------------------------------------------------------------------

// The A fragments of kTiles x 16 rows, from a slice's row (or column, tile-major) `first` on, which
// is a multiple of 32. kAlongSum: a row of shared memory lies along the sum. kRound: to TF32.
template <class S, bool kAlongSum, bool kRound, int kTiles>
struct FragmentsA {
  int offset;

  __device__ __forceinline__ explicit FragmentsA(int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    offset = kAlongSum ? S::place(first + lane % 16, lane / 16)
                       : S::place(lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2);
  }
  __device__ __forceinline__ void load(std::uint32_t (&a)[kTiles][4], const unsigned char* slice,
                                       int step) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kAlongSum) {
        load_matrices<false>(a[i],
                             slice + ((offset ^ (step * 32 + i % 2 * S::kOddTile)) + i * 16 * 64));
      } else {
        load_matrices<true>(a[i], slice + ((offset ^ i * 32) + step * 16 * S::kChunks * 16));
      }
      if constexpr (kRound) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = round_to_tf32(a[i][e]);
      }
    }
  }
};

// The B fragments of kTiles x 8 columns.
template <class S, bool kAlongSum, bool kRound, int kTiles>
struct FragmentsB {
  static_assert(kTiles % 2 == 0);
  int offset;

  __device__ __forceinline__ explicit FragmentsB(int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    offset = kAlongSum ? S::place(first + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                       : S::place(lane % 16, first / 8 + lane / 16);
  }
  __device__ __forceinline__ void load(std::uint32_t (&b)[kTiles][2], const unsigned char* slice,
                                       int step) const {
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      std::uint32_t pair[4];
      if constexpr (kAlongSum) {
        load_matrices<false>(pair,
                             slice + ((offset ^ (step * 32 + j % 2 * S::kOddTile)) + j * 16 * 64));
      } else {
        load_matrices<true>(pair, slice + ((offset ^ j * 32) + step * 16 * S::kChunks * 16));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        b[2 * j + e / 2][e % 2] = kRound ? round_to_tf32(pair[e]) : pair[e];
      }
    }
  }
};

// --- results --------------------------------------------------------------------------------------

__device__ __forceinline__ void store_pair(float* at, float x, float y) {
  *reinterpret_cast<float2*>(at) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(__half* at, float x, float y) {
  *reinterpret_cast<__half2*>(at) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* at, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(at) = __floats2bfloat162_rn(x, y);
}

// --- the kernel -----------------------------------------------------------------------------------

template <int kRowsGiven, int kColumnsGiven, int kBlocksGiven>
struct Tile {
  static constexpr int kRows = kRowsGiven, kColumns = kColumnsGiven;
  static constexpr int kBlocks = kBlocksGiven;  // that a multiprocessor should hold
  static constexpr int kTilesA = kRows / 2 / 16, kTilesB = kColumns / 2 / 8;
};
using Large = Tile<128, 128, 2>;
using Narrow = Tile<128, 64, 3>;
using Small = Tile<64, 64, 4>;

// TF32's wgrad turns both operands, for which they pass through registers.
template <class T, Direction kDirection>
constexpr bool kTurnsBoth = std::is_same_v<T, Tf32> && kDirection == Direction::wgrad;

// Whether the code of a kernel exists for the architecture being compiled.
template <class T, Direction kDirection, Copies kCopies>
__host__ __device__ constexpr bool compiled_here() {
#ifdef FASTCONV_CUDA_EMULATE
  return true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return std::is_same_v<T, __half> && kCopies != Copies::async;
#else
  return kCopies == Copies::gather || (kCopies == Copies::registers) == kTurnsBoth<T, kDirection>;
#endif
}

template <Direction kDirection>
__device__ __forceinline__ int part_of_block(const Parameters& p) {
  const int layer = static_cast<int>(blockIdx.z);
  return kDirection == Direction::dgrad ? layer / p.classes : layer;
}

// Writes the sums `d` of this thread by way of shared memory. `rows`: of the matrix; `h`, `w`: the
// taps of dgrad's class. Where there are two types to write, everything is derived anew from what late()
// hides: the compiler would keep it in registers through the main loop, and compute the loop's
// addresses again in each pass instead.
template <class T, Direction kDirection, Copies kCopies, class Block>
__device__ __forceinline__ void write_results(const Parameters& p, unsigned char* shared,
                                              const float (&d)[Block::kTilesA][Block::kTilesB][4],
                                              int rows, const Window& h, const Window& w) {
  using E = Stored<T>;
  constexpr bool kWgrad = kDirection == Direction::wgrad;
  constexpr int kWarpRows = Block::kRows / 2, kWarpColumns = Block::kColumns / 2;
  constexpr bool kAlwaysParts = kWgrad || std::is_same_v<T, Tf32>;  // of float32
  int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if constexpr (!kAlwaysParts) {
    thread = late(thread);
    block = late(block);
  }
  const int lane = thread % 32, warp = thread / 32, row_tile = block / p.column_tiles;
  const int first_row = row_tile * Block::kRows;
  const int first_column = (block - row_tile * p.column_tiles) * Block::kColumns;
  const int group = static_cast<int>(blockIdx.y);
  const int warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;

  // Where row `row` of the result begins in `out`, or -1.
  const auto row_offset = [&](int row) -> int {
    if (row >= rows) return -1;
    if constexpr (kWgrad && kCopies == Copies::gather) {
      const int tap = p.by_padded_channels.quotient(row), channel = row - tap * p.padded_channels;
      return channel < p.sum_channels ? (tap * p.sum_channels + channel) * p.g.k : -1;
    } else if constexpr (kDirection != Direction::dgrad && kCopies != Copies::gather) {
      return row * p.g.k;
    } else {
      const Strides& strides = out_strides<kDirection>(p.g);
      int n, i, j;
      split_row<kDirection>(p.g, row, n, i, j);
      if (kDirection == Direction::dgrad && (i >= h.count || j >= w.count)) return -1;
      return n * strides.image + (h.first + i * h.step) * strides.row +
             (w.first + j * w.step) * strides.column;
    }
  };
  const int first_channel = group * p.columns + first_column + warp_column;
  const int columns = p.columns - first_column - warp_column;  // that are left

  float bias[Block::kTilesB][2];
#pragma unroll
  for (int j = 0; j < Block::kTilesB; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = j * 8 + lane % 4 * 2 + e;
      bias[j][e] = 0.0f;
      if constexpr (kDirection == Direction::fprop) {
        if (p.bias && column < columns) {
          bias[j][e] = to_float(__ldg(static_cast<const E*>(p.bias) + first_channel + column));
        }
      }
    }
  const auto finished = [&](float sum, float bias_of_column) {
    if constexpr (kDirection != Direction::fprop) return sum;
    sum += bias_of_column;
    return p.relu ? relu(sum) : sum;
  };

  __syncthreads();  // the last slice has been read
  const auto write = [&]<class Out>(Out* out) {
    constexpr int kOutVector = 16 / static_cast<int>(sizeof(Out));
    constexpr int kOutChunks = kWarpColumns / kOutVector;
    Out* const staged = reinterpret_cast<Out*>(shared) + warp * 16 * kWarpColumns;
    const auto staged_at = [&](int row, int column) {
      return staged +
             swizzled<kOutChunks, sizeof(Out) == 4>(row, column / kOutVector) * kOutVector +
             column % kOutVector;
    };
#pragma unroll
    for (int i = 0; i < Block::kTilesA; ++i) {
#pragma unroll
      for (int j = 0; j < Block::kTilesB; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          store_pair(staged_at(lane / 4 + e * 8, j * 8 + lane % 4 * 2),
                     finished(d[i][j][2 * e], bias[j][0]),
                     finished(d[i][j][2 * e + 1], bias[j][1]));
        }
      __syncwarp();
      const int first = first_row + warp_row + i * 16;
      if constexpr (kCopies != Copies::gather) {
#pragma unroll
        for (int q = 0; q < 16 * kOutChunks / 32; ++q) {
          const int at = lane + q * 32, row = at / kOutChunks,
                    column = at % kOutChunks * kOutVector;
          const int offset = row_offset(first + row);
          if (offset >= 0 && column < columns) {
            *reinterpret_cast<uint4*>(out + (offset + first_channel + column)) =
                *reinterpret_cast<const uint4*>(staged_at(row, column));
          }
        }
      } else {
        const bool along_rows = p.channels_first && !kWgrad;
#pragma unroll 1
        for (int q = 0; q < 16 * kWarpColumns / 32; ++q) {
          const int at = lane + q * 32;
          const int row = along_rows ? at % 16 : at / kWarpColumns;
          const int column = along_rows ? at / 16 : at % kWarpColumns;
          const int offset = row_offset(first + row);
          if (offset >= 0 && column < columns) {
            out[offset +
                (first_channel + column) * (kWgrad ? 1 : out_strides<kDirection>(p.g).channel)] =
                *staged_at(row, column);
          }
        }
      }
      __syncwarp();
    }
  };
  float* const parts = static_cast<float*>(p.out) +
                       static_cast<std::size_t>(part_of_block<kDirection>(p)) * p.part_elements;
  if constexpr (kAlwaysParts) {
    write(parts);
  } else if (p.by_parts) {
    write(parts);
  } else {
    write(static_cast<E*>(p.out));
  }
}

template <class T, Direction kDirection, Copies kCopies, class Block>
__device__ __forceinline__ void tensor_core_gemm_body(const Parameters& p) {
  constexpr bool kWgrad = kDirection == Direction::wgrad;
  constexpr bool kSumMajorA = !kWgrad, kSumMajorB = kDirection == Direction::dgrad;
  constexpr bool kTf32 = std::is_same_v<T, Tf32>;
  using SliceA = SliceOf<T, kSumMajorA, Block::kRows>;
  using SliceB = SliceOf<T, kSumMajorB, Block::kColumns>;
  constexpr int kSliceBytes = SliceA::kBytes + SliceB::kBytes;
  constexpr bool kAsync = kCopies == Copies::async;
  constexpr int kSlices = kAsync ? 3 : 2;
  // What passes through registers. TF32 is rounded there, once; else when fragments are read, which
  // each of two warps does.
  constexpr bool kStagedA = !kAsync;
  constexpr bool kStagedB = !kAsync || SliceB::kTurned || (kTf32 && Block::kRows > 64);
  static_assert((kStagedA || !SliceA::kTurned) && (kStagedB || !SliceB::kTurned));
  constexpr int kWarpRows = Block::kRows / 2, kWarpColumns = Block::kColumns / 2;
  static_assert(4 * 16 * kWarpColumns * sizeof(float) <= kSlices * kSliceBytes);

  FASTCONV_SHARED(shared, unsigned char[kSlices * kSliceBytes]);

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row_tile = static_cast<int>(blockIdx.x) / p.column_tiles;
  const int first_row = row_tile * Block::kRows;
  const int first_column =
      (static_cast<int>(blockIdx.x) - row_tile * p.column_tiles) * Block::kColumns;
  const int group = static_cast<int>(blockIdx.y), part = part_of_block<kDirection>(p);
  const int warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;

  Window h{}, w{};
  int rows, slices, begin = part * p.slices_a_part * kSliceSum<T>, end = 0;
  if constexpr (kWgrad) {
    rows = p.g.rows.taps * p.g.columns.taps * p.padded_channels;
    end = min(p.g.n * p.g.plane, begin + p.slices_a_part * kSliceSum<T>);
    slices = (end - begin + kSliceSum<T> - 1) / kSliceSum<T>;
  } else {
    // Classes of dgrad are numbered by their first taps.
    int class_h = 0, class_w = 0;
    if constexpr (kDirection == Direction::dgrad) {
      const int class_of_both = static_cast<int>(blockIdx.z) - part * p.classes;
      class_h = p.g.by_column_classes.quotient(class_of_both);
      class_w = class_of_both - class_h * p.g.columns.classes;
    }
    h = p.g.rows.window<kDirection>(class_h);
    w = p.g.columns.window<kDirection>(class_w);
    rows = p.g.n * row_pixels<kDirection>(p.g.rows) * row_pixels<kDirection>(p.g.columns);
    slices = (h.taps * w.taps * p.padded_channels + kSliceSum<T> - 1) / kSliceSum<T>;
    slices = min(slices - part * p.slices_a_part, p.slices_a_part);
  }

  float d[Block::kTilesA][Block::kTilesB][4];
#pragma unroll
  for (int i = 0; i < Block::kTilesA; ++i)
#pragma unroll
    for (int j = 0; j < Block::kTilesB; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[i][j][e] = 0.0f;

  const FragmentsA<SliceA, kSumMajorA || SliceA::kTurned, kTf32 && !kStagedA, Block::kTilesA>
      fragments_a(warp_row);
  const FragmentsB<SliceB, kSumMajorB || SliceB::kTurned, kTf32 && !kStagedB, Block::kTilesB>
      fragments_b(warp_column);
  const auto multiply = [&](const unsigned char* slice) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      std::uint32_t a[Block::kTilesA][4], b[Block::kTilesB][2];
      fragments_a.load(a, slice, step);
      fragments_b.load(b, slice + SliceA::kBytes, step);
#pragma unroll
      for (int i = 0; i < Block::kTilesA; ++i)
#pragma unroll
        for (int j = 0; j < Block::kTilesB; ++j) multiply_accumulate<T>(d[i][j], a[i], b[j]);
    }
  };

  // Calls copy(a, b) with what gives the sources of the next slice of either operand.
  const auto run = [&](const auto& map_a, const auto& map_b, const auto& next) {
    [[maybe_unused]] uint4 staged_a[SliceA::kPasses], staged_b[SliceB::kPasses];
    const auto begin_copy = [&](int slice) {
      next([&](const auto& source_a, const auto& source_b) {
        if constexpr (kStagedA) {
          fetch<kCopies>(staged_a, source_a);
        } else {
          copy_slice(shared + slice, map_a, source_a);
        }
        if constexpr (kStagedB) {
          fetch<kCopies>(staged_b, source_b);
        } else {
          copy_slice(shared + slice + SliceA::kBytes, map_b, source_b);
        }
      });
    };
    const auto end_copy = [&](int slice) {
      if constexpr (kStagedA) store_slice<T, SliceA>(shared + slice, map_a, staged_a);
      if constexpr (kStagedB) {
        store_slice<T, SliceB>(shared + slice + SliceA::kBytes, map_b, staged_b);
      }
    };
    if constexpr (kAsync) {
      int filled = 0;
#pragma unroll
      for (; filled < kSlices - 1; ++filled) {
        if (filled < slices) {
          begin_copy(filled * kSliceBytes);
          end_copy(filled * kSliceBytes);
        }
        copy_async_commit();
      }
      int read = 0, write = (kSlices - 1) * kSliceBytes;
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        copy_async_wait<kSlices - 2>();
        __syncthreads();
        const bool more = slice + kSlices - 1 < slices;
        if (more) begin_copy(write);
        copy_async_commit();
        multiply(shared + read);
        if (more) end_copy(write);
        write = read;
        read = read + kSliceBytes == kSlices * kSliceBytes ? 0 : read + kSliceBytes;
      }
      copy_async_wait<0>();
    } else {
      if (slices > 0) {
        begin_copy(0);
        end_copy(0);
      }
      __syncthreads();
      int read = 0;
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        const bool more = slice + 1 < slices;
        if (more) begin_copy(0);
        multiply(shared + read);
        read ^= kSliceBytes;
        if (more) end_copy(read);
        __syncthreads();
      }
    }
  };

  if constexpr (kDirection == Direction::fprop) {
    const PixelRows<T, kDirection, kCopies, SliceA> a(p, first_row, rows, h, w, group);
    FilterRows<T, kCopies, SliceB> b(p, first_column, begin, group);
    Taps taps(begin + a.column * kVector<T>, kSliceSum<T>, p.padded_channels, h, w);
    run(a, b, [&](const auto& copy) {
      const auto step = a.step(p, taps);
      copy([&](int pass) { return a.source(p, step, pass); },
           [&](int pass) { return b.source(p, pass); });
      taps.advance();
      b.advance();
    });
  } else if constexpr (kDirection == Direction::dgrad) {
    const PixelRows<T, kDirection, kCopies, SliceA> a(p, first_row, rows, h, w, group);
    const FilterColumns<T, kCopies, SliceB> b(p, first_column, h, w, group);
    Taps taps(begin + a.column * kVector<T>, kSliceSum<T>, p.padded_channels, h, w);
    Taps taps_b(begin + b.column * kVector<T>, kSliceSum<T>, p.padded_channels, h, w);
    run(a, b, [&](const auto& copy) {
      const auto step = a.step(p, taps);
      // Of whole chunks, a thread copies the same column of either.
      const auto step_b = b.step(p, kCopies == Copies::gather ? taps_b : taps);
      copy([&](int pass) { return a.source(p, step, pass); },
           [&](int pass) { return b.source(p, step_b, pass); });
      taps.advance();
      if constexpr (kCopies == Copies::gather) taps_b.advance();
    });
  } else {
    Patches<T, kCopies, SliceA> a(p, first_row, begin, end, group);
    GradientRows<T, kCopies, SliceB> b(p, first_column, begin, end, group);
    run(a, b, [&](const auto& copy) {
      copy([&](int pass) { return a.source(p, pass); },
           [&](int pass) { return b.source(p, pass); });
      a.advance();
      b.advance();
    });
  }

  write_results<T, kDirection, kCopies, Block>(p, shared, d, rows, h, w);
}

template <class T, Direction kDirection, Copies kCopies, class Block>
__global__ void __launch_bounds__(kThreads, Block::kBlocks) tensor_core_gemm(const Parameters p) {
  if constexpr (compiled_here<T, kDirection, kCopies>()) {
    tensor_core_gemm_body<T, kDirection, kCopies, Block>(p);
  }
}

}  // namespace fastconv::cuda::tensor_core
