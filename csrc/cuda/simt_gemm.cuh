// Implicit GEMM on the ordinary (SIMT) pipelines: all three directions, any geometry, both layouts.
//
//            M (rows)                N (columns)   depth
//   fprop    output pixels           K / groups    taps x C / groups
//   dgrad    input pixels of a class C / groups    taps of the class x K / groups
//   wgrad    taps x C / groups       K / groups    output pixels
//
// The matrix of patches is never formed: threads gather from the activations what a tile needs
// (Chetlur et al., "cuDNN: Efficient primitives for deep learning", 2014). dgrad by a stride is one
// GEMM for each class of pixels (geometry.cuh), so that no product with an inserted zero is taken.
// The depth may be split over blocks, each writing float32 partial sums that split_k.cu adds in
// order.
//
// A block computes a tile of M x N, a thread 8 x 8 of it: quarters of 4 x 4, so that the operands
// of one step of the depth are four 128-bit reads from shared memory for 64 multiply-adds (Nath,
// Tomov and Dongarra, "An improved MAGMA GEMM for Fermi GPUs", 2010). The lanes of a warp lie 4 x 8
// (M x N): eight neighbours read 128 neighbouring bytes of B and the same 16 of A, which takes the
// fewest wavefronts.
//
// Shared memory: two buffers of A[8][M + 4] and B[8][N + 4], depth first. What is contiguous along
// the depth in global memory is turned on its way: lanes l hold depths l % 2 * 4 + i (128-bit
// reads) or l % 8, and rows l / 2 or l / 8; rows of 4 (mod 32) words put both on 32 different
// banks. While one buffer is multiplied the next chunk of 8 is on its way to registers, then to the
// other buffer.
//
// wgrad in NCHW reads pixels one by one, and its main loop would spend a fifth of itself on which of
// them there are: that is found out by an outer loop, for all threads and 32 chunks (DescribedNchw).
//
// kVector says that C and K let the operands be read, and results be written, four at a time; else
// everything is read one by one and any C and K will do.
#pragma once

#include "cuda/element.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

template <int kRowsOfTile, int kColumnsOfTile>
struct SimtTile {
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile, kDepth = 8;
  static constexpr int kThreads = kRows * kColumns / 64;
  static constexpr int kLanesN = kColumns >= 64 ? 8 : 4, kLanesM = 32 / kLanesN;
  static constexpr int kWarpsN = kColumns / (8 * kLanesN);
  // 128 registers a thread, or 168.
  static constexpr int kBlocksPerMultiprocessor = kThreads == 256 ? 2 : 6;
};

// The table of taps that vector reads need; and the taps of the rows of one tile of wgrad in NCHW.
inline constexpr int kMostTaps = 128, kMostTapsOfTile = 32;

template <class T>
struct SimtGemmArguments {
  const T* a;     // x; dy for dgrad
  const T* b;     // filter; dy for wgrad
  const T* bias;  // or null
  T* out;
  float* partials;  // or null: the depth is not split
  ConvGeometry g;
  int rows, columns;    // of a GEMM: M (of the largest class) and N
  int depth_per_split;  // a multiple of 8
  int out_count;        // elements of out
  FastDivisor by_column_tiles, by_row_tiles, by_splits, by_classes;
  bool relu;
  bool vector_rows;  // NCHW: four results along M may be written at once
};

// --- where a thread's share of a chunk lies ------------------------------------------------------

// Of a tile's 8 x kExtent elements that are contiguous along the depth: kVector along it a read.
// place() is where the first of a thread lies in [8][kExtent + 4], to which put() adds constants.
template <int kExtent, int kThreads, int kVector>
struct AlongDepth {
  static constexpr int kAcross = 8 / kVector, kStep = kThreads / kAcross, kPasses = kExtent / kStep;
  static __device__ int depth() { return int(threadIdx.x) % kAcross * kVector; }
  static __device__ int row(int pass) { return int(threadIdx.x) / kAcross + pass * kStep; }
  static __device__ int place() { return depth() * (kExtent + 4) + row(0); }

  static __device__ __forceinline__ void put(float* to, const float (&held)[kPasses][kVector]) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j * (kExtent + 4) + i * kStep] = held[i][j];
    }
  }
};

// Contiguous along M or N: kVector along that a read.
template <int kExtent, int kThreads, int kVector>
struct AlongRow {
  static constexpr int kAcross = kExtent / kVector, kStep = kThreads / kAcross;
  static constexpr int kPasses = 8 / kStep;
  static __device__ int row() { return int(threadIdx.x) % kAcross * kVector; }
  static __device__ int depth(int pass) { return int(threadIdx.x) / kAcross + pass * kStep; }
  static __device__ int place() { return depth(0) * (kExtent + 4) + row(); }

  static __device__ __forceinline__ void put(float* to, const float (&held)[kPasses][kVector]) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) store<kVector>(to + i * kStep * (kExtent + 4), held[i]);
  }
};

// --- what is the same for all threads of a block -------------------------------------------------

// Written by one thread to shared memory: each would compute the same, and hold it in registers.
struct BlockPlace {
  int group, split;
  unsigned row, column;  // of the tile in the GEMM
  int depth, end;        // of the block's share of the depth
  // fprop and dgrad
  Window rows, columns;
  unsigned filter_tap_row, filter_tap_column;  // from a tap of the window to the next
  unsigned filter_origin;                      // of the window's first tap and the group

  template <Direction kDirection, class Tile, class T>
  __device__ void find(const SimtGemmArguments<T>& p) {
    const ConvGeometry& g = p.g;
    int block = int(blockIdx.x);
    column = unsigned(p.by_column_tiles.split(block)) * Tile::kColumns;
    row = unsigned(p.by_row_tiles.split(block)) * Tile::kRows;
    split = p.by_splits.split(block);
    depth = split * p.depth_per_split;
    if constexpr (kDirection == Direction::wgrad) {
      group = block;
      end = g.n * g.plane;
    } else {
      int class_row = p.by_classes.split(block);
      const int class_column = g.by_column_classes.split(class_row);
      group = block;
      rows = g.rows.window<kDirection>(class_row);
      columns = g.columns.window<kDirection>(class_column);
      end = rows.taps * columns.taps *
            (kDirection == Direction::fprop ? g.c_per_group : g.k_per_group);
      const unsigned tap = unsigned(g.c_per_group) * unsigned(g.k);
      filter_tap_column = unsigned(columns.tap_step) * tap;
      filter_tap_row = unsigned(rows.tap_step) * unsigned(g.columns.taps) * tap;
      filter_origin =
          (unsigned(rows.tap) * unsigned(g.columns.taps) + unsigned(columns.tap)) * tap +
          unsigned(group) * unsigned(g.k_per_group);
    }
    end = min(end, depth + p.depth_per_split);
  }
};

// --- fprop and dgrad: A is gathered along taps ---------------------------------------------------

template <Direction kDirection>
struct Source {  // of the gather: x or dy
  static constexpr bool kForward = kDirection == Direction::fprop;
  static __device__ int channels(const ConvGeometry& g) {
    return kForward ? g.c_per_group : g.k_per_group;
  }
  static __device__ const Strides& strides(const ConvGeometry& g) { return kForward ? g.x : g.y; }
  static __device__ unsigned rows(const ConvGeometry& g) {
    return unsigned(kForward ? g.rows.in : g.rows.out);
  }
  static __device__ unsigned columns(const ConvGeometry& g) {
    return unsigned(kForward ? g.columns.in : g.columns.out);
  }
};

// What a tap adds to the coordinates and the offset of a pixel, and its place in dgrad's filter.
// Offsets wrap around; their sums are right. A padded axis is shorter than 2^30: no pixel is
// inside at kNoTap.
inline constexpr unsigned kNoTap = 0x40000000u;

template <Direction kDirection>
__device__ __forceinline__ uint4 describe_tap(const ConvGeometry& g, const BlockPlace& place,
                                              int row, int column) {
  const Strides& strides = Source<kDirection>::strides(g);
  const unsigned down = unsigned(row) * unsigned(place.rows.dilation);
  const unsigned right = unsigned(column) * unsigned(place.columns.dilation);
  return make_uint4(down, right, down * unsigned(strides.row) + right * unsigned(strides.column),
                    place.filter_origin + unsigned(row) * place.filter_tap_row +
                        unsigned(column) * place.filter_tap_column);
}

// Where a thread is in the depth, which runs over taps and, fastest, channels. With kVector the
// taps lie in a table in shared memory and have eight channels at least; else they are found by
// division. kAhead: how far this thread's reads lie behind the start of a chunk.
template <Direction kDirection, int kVector>
struct TapWalk {
  int depth, channel;
  uint4 tap;

  // Two more, without a pixel, are for reads beyond the depth.
  static constexpr int kTable = kVector == 4 ? kMostTaps + 2 : 1;

  static __device__ void fill(uint4 (&table)[kTable], const ConvGeometry& g,
                              const BlockPlace& place) {
    if constexpr (kVector == 4) {
      const int taps = place.rows.taps * place.columns.taps;
      for (int i = int(threadIdx.x); i < taps + 2; i += int(blockDim.x)) {
        const int row = i / place.columns.taps;
        table[i] = i < taps ? describe_tap<kDirection>(g, place, row, i - row * place.columns.taps)
                            : make_uint4(kNoTap, 0, 0, 0);
      }
    }
  }

  __device__ TapWalk(const uint4 (&table)[kTable], const ConvGeometry& g, const BlockPlace& place,
                     int ahead)
      : depth(place.depth + ahead) {
    if constexpr (kVector == 4) {
      const int number = depth / Source<kDirection>::channels(g);
      channel = depth - number * Source<kDirection>::channels(g);
      at_ = table + number;
    }
  }

  // To be called before the reads of each chunk.
  __device__ __forceinline__ void look(const ConvGeometry& g, const BlockPlace& place) {
    if constexpr (kVector == 4) {
      tap = *at_;
    } else {
      tap = find(g, place, depth, channel);
    }
  }
  static __device__ __forceinline__ uint4 find(const ConvGeometry& g, const BlockPlace& place,
                                               int depth, int& channel) {
    int number = depth;
    channel = (kDirection == Direction::fprop ? g.by_c_per_group : g.by_k_per_group).split(number);
    const int row = kDirection == Direction::fprop ? g.by_column_taps.quotient(number)
                                                   : number / place.columns.taps;
    return describe_tap<kDirection>(g, place, row, number - row * place.columns.taps);
  }

  // Of the depth; with vectors there is no tap beyond it, and no pixel inside at that.
  __device__ __forceinline__ bool is_inside(int end) const {
    return kVector == 4 ? tap.x != kNoTap : depth < end;
  }

  __device__ __forceinline__ void advance(const ConvGeometry& g) {
    if constexpr (kVector == 1) {
      depth += 8;
    } else {
      channel += 8;
      if (channel >= Source<kDirection>::channels(g)) {
        channel -= Source<kDirection>::channels(g);
        ++at_;
      }
    }
  }

 private:
  const uint4* at_;
};

// The pixel of the source under the first tap of a row of A. Coordinates are compared as unsigned:
// those before the first pixel are large, and kNowhere stays large wherever taps move it.
template <Direction kDirection>
struct Pixel {
  static constexpr unsigned kNowhere = kDirection == Direction::fprop ? 0x80000000u : 0xffffffffu;
  unsigned y = kNowhere, x = 0, offset = 0;

  Pixel() = default;
  template <class T>
  __device__ Pixel(const SimtGemmArguments<T>& p, const BlockPlace& place, unsigned row) {
    const ConvGeometry& g = p.g;
    if (row >= unsigned(p.rows)) return;
    int image = int(row);
    constexpr bool kForward = kDirection == Direction::fprop;
    const int j = (kForward ? g.columns.by_out : g.columns.by_class_pixels).split(image);
    const int i = (kForward ? g.rows.by_out : g.rows.by_class_pixels).split(image);
    if (i >= place.rows.count || j >= place.columns.count) return;
    const Strides& strides = Source<kDirection>::strides(g);
    y = unsigned(place.rows.origin + i * place.rows.stride);
    x = unsigned(place.columns.origin + j * place.columns.stride);
    offset = unsigned(image) * unsigned(strides.image) + y * unsigned(strides.row) +
             x * unsigned(strides.column) +
             unsigned(place.group * Source<kDirection>::channels(g)) * unsigned(strides.channel);
  }

  __device__ __forceinline__ bool inside(const ConvGeometry& g, const uint4& tap) const {
    return y + tap.x < Source<kDirection>::rows(g) && x + tap.y < Source<kDirection>::columns(g);
  }
};

// NHWC: channels, and so the depth, are contiguous.
template <class T, Direction kDirection, int kRows, int kThreads, int kVector>
struct GatherNhwc {
  using Share = AlongDepth<kRows, kThreads, kVector>;
  Pixel<kDirection> pixels[Share::kPasses];
  float held[Share::kPasses][kVector];

  __device__ GatherNhwc(const SimtGemmArguments<T>& p, const BlockPlace& place) {
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
      pixels[i] = Pixel<kDirection>(p, place, place.row + unsigned(Share::row(i)));
    }
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace&,
                                      const TapWalk<kDirection, kVector>& walk, int end) {
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[i][j] = 0.f;
      if ((kVector == 4 || walk.is_inside(end)) && pixels[i].inside(p.g, walk.tap)) {
        load<kVector>(p.a + (pixels[i].offset + walk.tap.z + unsigned(walk.channel)), held[i]);
      }
    }
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// NCHW: lanes read pixels side by side. With kVector a chunk lies in one tap; else each element's
// tap is looked for.
template <class T, Direction kDirection, int kRows, int kThreads, int kVector>
struct GatherNchw {
  static constexpr int kLanes = kThreads < kRows ? kThreads : kRows, kPasses = kRows / kLanes;
  static constexpr int kDepths = 8 * kLanes / kThreads;
  Pixel<kDirection> pixels[kPasses];
  float held[kPasses][kDepths];

  static __device__ int row(int pass) { return int(threadIdx.x) % kLanes + pass * kLanes; }
  static __device__ int depth() { return int(threadIdx.x) / kLanes * kDepths; }

  __device__ GatherNchw(const SimtGemmArguments<T>& p, const BlockPlace& place) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      pixels[i] = Pixel<kDirection>(p, place, place.row + unsigned(row(i)));
      if constexpr (kVector == 4) {
        pixels[i].offset += unsigned(depth()) * unsigned(Source<kDirection>::strides(p.g).channel);
      }
    }
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace& place,
                                      const TapWalk<kDirection, kVector>& walk, int end) {
    const unsigned stride = unsigned(Source<kDirection>::strides(p.g).channel);
    if constexpr (kVector == 4) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool inside = pixels[i].inside(p.g, walk.tap);
        const T* from = p.a + (pixels[i].offset + walk.tap.z + unsigned(walk.channel) * stride);
#pragma unroll
        for (int j = 0; j < kDepths; ++j, from += stride) {
          held[i][j] = 0.f;
          if (inside) held[i][j] = to_float(*from);
        }
      }
    } else {
      const int chunk = walk.depth - AlongDepth<kRows, kThreads, kVector>::depth();
#pragma unroll
      for (int j = 0; j < kDepths; ++j) {
        const int here = chunk + depth() + j;
        int channel;
        const uint4 tap = TapWalk<kDirection, kVector>::find(p.g, place, here, channel);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          held[i][j] = 0.f;
          if (here < end && pixels[i].inside(p.g, tap)) {
            held[i][j] = to_float(p.a[pixels[i].offset + tap.z + unsigned(channel) * stride]);
          }
        }
      }
    }
  }
  static __device__ int place() { return depth() * (kRows + 4) + row(0); }
  __device__ __forceinline__ void put(float* to) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kDepths; ++j) to[j * (kRows + 4) + i * kLanes] = held[i][j];
    }
  }
};

// dgrad's filter: the depth is contiguous, columns lie K apart.
template <class T, int kColumns, int kThreads, int kVector>
struct FilterAlongDepth {
  using Share = AlongDepth<kColumns, kThreads, kVector>;
  unsigned offset[Share::kPasses];
  int columns;  // how many of the passes are inside, of the tile's columns from this thread's on
  float held[Share::kPasses][kVector];

  // `ahead`: of the walk, where the walk is the chunk's and not the thread's.
  __device__ FilterAlongDepth(const SimtGemmArguments<T>& p, const BlockPlace& place,
                              unsigned ahead) {
    const unsigned first = place.column + unsigned(Share::row(0));
    columns = int(unsigned(p.columns) - first);
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
      offset[i] = (place.column + unsigned(Share::row(i))) * unsigned(p.g.k) + ahead;
    }
  }

  template <int kWalkVector>
  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p,
                                      const TapWalk<Direction::dgrad, kWalkVector>& walk, int end) {
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[i][j] = 0.f;
      if (walk.is_inside(end) && i * Share::kStep < columns) {
        load<kVector>(p.b + (offset[i] + walk.tap.w + unsigned(walk.channel)), held[i]);
      }
    }
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// --- fprop's filter, and dy of wgrad in NHWC: a matrix with rows of K ----------------------------

template <class T, int kColumns, int kThreads, int kVector>
struct MatrixRows {
  using Share = AlongRow<kColumns, kThreads, kVector>;
  unsigned offset;
  int rows;  // left from this thread's first row on; none where its column is outside
  float held[Share::kPasses][kVector];

  __device__ MatrixRows(const SimtGemmArguments<T>& p, const BlockPlace& place) {
    const unsigned column = place.column + unsigned(Share::row());
    const int row = place.depth + Share::depth(0);
    rows = column < unsigned(p.columns) ? place.end - row : 0;
    offset = unsigned(row) * unsigned(p.g.k) + unsigned(place.group * p.g.k_per_group) + column;
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p) {
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[i][j] = 0.f;
      if (i * Share::kStep < rows) {
        load<kVector>(p.b + (offset + unsigned(i * Share::kStep) * unsigned(p.g.k)), held[i]);
      }
    }
    rows -= 8, offset += 8u * unsigned(p.g.k);
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// --- wgrad ---------------------------------------------------------------------------------------

// A row of wgrad's A: a tap and a channel.
struct TapRow {
  unsigned down = 0x80000000u, right = 0, offset = 0;  // of no tap, until it is found

  TapRow() = default;
  template <class T>
  __device__ TapRow(const SimtGemmArguments<T>& p, const BlockPlace& place, unsigned row) {
    if (row >= unsigned(p.rows)) return;
    const ConvGeometry& g = p.g;
    int tap_row = int(row);
    const int channel = g.by_c_per_group.split(tap_row);
    const int tap_column = g.by_column_taps.split(tap_row);
    down = unsigned(tap_row * g.rows.dilation - g.rows.padding);
    right = unsigned(tap_column * g.columns.dilation - g.columns.padding);
    offset = down * unsigned(g.x.row) + right * unsigned(g.x.column) +
             unsigned(place.group * g.c_per_group + channel) * unsigned(g.x.channel);
  }
};

// A column of it: an output pixel; beyond the end none, kNoTap rows down.
struct OutPixel {
  unsigned y, x, offset;

  __device__ __forceinline__ OutPixel(const ConvGeometry& g, int pixel, int end) {
    int image = pixel;
    x = unsigned(g.columns.by_out.split(image) * g.columns.stride);
    y = unsigned(g.rows.by_out.split(image) * g.rows.stride);
    offset =
        unsigned(image) * unsigned(g.x.image) + y * unsigned(g.x.row) + x * unsigned(g.x.column);
    if (pixel >= end) y = kNoTap;
  }
  __device__ __forceinline__ bool inside(const ConvGeometry& g, const uint4& tap) const {
    return y + tap.x < unsigned(g.rows.in) && x + tap.y < unsigned(g.columns.in);
  }
};

// NHWC: the rows of a tap are contiguous.
template <class T, int kRows, int kThreads, int kVector>
struct PatchesNhwc {
  using Share = AlongRow<kRows, kThreads, kVector>;
  TapRow tap;
  float held[Share::kPasses][kVector];

  __device__ PatchesNhwc(const SimtGemmArguments<T>& p, const BlockPlace& place)
      : tap(p, place, place.row + unsigned(Share::row())) {}

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, int depth, int end) {
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) held[i][j] = 0.f;
      const OutPixel pixel(p.g, depth + Share::depth(i), end);
      if (pixel.inside(p.g, make_uint4(tap.down, tap.right, 0, 0))) {
        load<kVector>(p.a + (pixel.offset + tap.offset), held[i]);
      }
    }
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// NCHW: eight lanes read neighbouring pixels, contiguous where the stride is 1. The rows of the
// tile, several a thread, lie in shared memory: registers are dear.
template <class T, int kRows, int kThreads>
struct PatchesNchw {
  using Share = AlongDepth<kRows, kThreads, 1>;
  using Table = uint4[kRows];
  const uint4* taps;
  float held[Share::kPasses][1];

  static __device__ void fill(Table& table, const SimtGemmArguments<T>& p,
                              const BlockPlace& place) {
    for (int i = int(threadIdx.x); i < kRows; i += kThreads) {
      const TapRow tap(p, place, place.row + unsigned(i));
      table[i] = make_uint4(tap.down, tap.right, tap.offset, 0);
    }
  }

  __device__ PatchesNchw(const Table& table, const SimtGemmArguments<T>&, const BlockPlace&)
      : taps(table + Share::row(0)) {}

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, int depth, int end) {
    const OutPixel pixel(p.g, depth + Share::depth(), end);
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
      const uint4 tap = taps[i * Share::kStep];
      held[i][0] = 0.f;
      if (pixel.inside(p.g, tap)) load<1>(p.a + (pixel.offset + tap.z), held[i]);
    }
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// dy in NCHW: pixels, the depth, are contiguous.
template <class T, int kColumns, int kThreads>
struct Planes {
  using Share = AlongDepth<kColumns, kThreads, 1>;
  unsigned offset;
  int columns;
  float held[Share::kPasses][1];

  __device__ Planes(const SimtGemmArguments<T>& p, const BlockPlace& place) {
    const unsigned column = place.column + unsigned(Share::row(0));
    columns = int(unsigned(p.columns) - column);
    offset = (unsigned(place.group * p.g.k_per_group) + column) * unsigned(p.g.plane);
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, int depth, int end) {
    const int at = depth + Share::depth();
    int image = at;
    const unsigned pixel = unsigned(p.g.by_plane.split(image));
    const T* from = p.b + (unsigned(image) * unsigned(p.g.y.image) + pixel + offset);
#pragma unroll
    for (int i = 0; i < Share::kPasses; ++i) {
      held[i][0] = 0.f;
      if (at < end && i * Share::kStep < columns) {
        load<1>(from + unsigned(i * Share::kStep) * unsigned(p.g.plane), held[i]);
      }
    }
  }
  static __device__ int place() { return Share::place(); }
  __device__ __forceinline__ void put(float* to) const { Share::put(to, held); }
};

// Both operands in NCHW with kVector: dy is read four pixels at a time, x one by one as above. What
// that takes of divisions and comparisons is done once for each pixel and not by each of the
// threads that share it: kPixels of them are described in shared memory, by the main loop's outer
// loop. Of the taps of the tile's rows (kMostTapsOfTile at most) a word tells, a bit each, which
// find the pixel.
template <class T, class Tile>
struct DescribedNchw {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns, kThreads = Tile::kThreads;
  static constexpr int kPixels = kThreads, kChunks = kPixels / 8;
  static constexpr unsigned kBeyond = 0xffffffffu;
  using ShareA = AlongDepth<kRows, kThreads, 1>;
  using ShareB = AlongDepth<kColumns, kThreads, 4>;

  struct Table {
    uint2 rows[kRows];  // the bit of the tap; what it adds to a pixel's offset in x
    // Bits of the taps inside; offset in x; and, for lane l % 8 of the chunk, the offset in dy of
    // the four pixels that it reads there.
    uint4 pixels[kPixels];
  };

  const uint2* rows;
  const uint4* pixel;
  unsigned columns[ShareB::kPasses];  // of dy; outside of it some other, whose results are dropped

  struct A {
    float held[ShareA::kPasses][1];
    static __device__ int place() { return ShareA::place(); }
    __device__ __forceinline__ void put(float* to) const { ShareA::put(to, held); }
  } a;
  struct B {
    float held[ShareB::kPasses][4];
    static __device__ int place() { return ShareB::place(); }
    __device__ __forceinline__ void put(float* to) const { ShareB::put(to, held); }
  } b;

  static __device__ int first_tap(const SimtGemmArguments<T>& p, const BlockPlace& place) {
    return p.g.by_c_per_group.quotient(int(place.row));
  }

  // How many pixels have no description: those described are the table's last, an even number of
  // chunks.
  static __device__ int left_out(const BlockPlace& place) {
    return max(0, kPixels - (place.end + 23 - place.depth) / 16 * 16);
  }

  // Pixels from place.depth on, a chunk beyond the end or two included.
  static __device__ void describe(Table& table, const SimtGemmArguments<T>& p,
                                  const BlockPlace& place) {
    const ConvGeometry& g = p.g;
    const int pixel = int(threadIdx.x) - left_out(place) + place.depth, end = place.end;
    if (pixel < place.depth) return;
    const OutPixel x(g, pixel, end);
    const int first = first_tap(p, place);
    const int last = g.by_c_per_group.quotient(min(int(place.row) + kRows, p.rows) - 1);
    int tap_row = first;
    int tap_column = g.by_column_taps.split(tap_row);
    unsigned inside = 0;
    for (int tap = first; tap <= last; ++tap) {
      const unsigned down = unsigned(tap_row * g.rows.dilation - g.rows.padding);
      const unsigned right = unsigned(tap_column * g.columns.dilation - g.columns.padding);
      inside |= unsigned(x.inside(g, make_uint4(down, right, 0, 0))) << (tap - first);
      if (++tap_column == g.columns.taps) tap_column = 0, ++tap_row;
    }
    const int four = pixel / 8 * 8 + pixel % 2 * 4;
    int image = four;
    const int in_plane = g.by_plane.split(image);
    table.pixels[threadIdx.x] = make_uint4(
        inside, x.offset,
        four < end ? unsigned(image) * unsigned(g.y.image) + unsigned(in_plane) : kBeyond, 0);
  }

  static __device__ void fill(Table& table, const SimtGemmArguments<T>& p,
                              const BlockPlace& place) {
    const int first = first_tap(p, place);
    for (int i = int(threadIdx.x); i < kRows; i += kThreads) {
      const unsigned row = place.row + unsigned(i);
      const TapRow tap(p, place, row);
      table.rows[i] = make_uint2(
          row < unsigned(p.rows) ? 1u << (p.g.by_c_per_group.quotient(int(row)) - first) : 0u,
          tap.offset);
    }
    describe(table, p, place);
  }

  __device__ DescribedNchw(const Table& table, const SimtGemmArguments<T>& p,
                           const BlockPlace& place)
      : rows(table.rows + ShareA::row(0)) {
    restart(table, place);
#pragma unroll
    for (int i = 0; i < ShareB::kPasses; ++i) {
      const unsigned column = min(place.column + unsigned(ShareB::row(i)), unsigned(p.columns) - 1);
      columns[i] = (unsigned(place.group * p.g.k_per_group) + column) * unsigned(p.g.plane);
    }
  }

  __device__ void restart(const Table& table, const BlockPlace& place) {
    pixel = table.pixels + left_out(place) + ShareA::depth();
  }
  __device__ __forceinline__ bool has_more(const Table& table) const {
    return pixel < table.pixels + kPixels;
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace&, int, int) {
    const uint4 here = *pixel;
    pixel += 8;
#pragma unroll
    for (int i = 0; i < ShareA::kPasses; ++i) {
      const uint2 row = rows[i * ShareA::kStep];
      a.held[i][0] = 0.f;
      if (here.x & row.x) load<1>(p.a + (here.y + row.y), a.held[i]);
    }
#pragma unroll
    for (int i = 0; i < ShareB::kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) b.held[i][j] = 0.f;
      if (here.z != kBeyond) load<4>(p.b + (here.z + columns[i]), b.held[i]);
    }
  }
};

// --- the two operands of a direction -------------------------------------------------------------

template <class T, Direction kDirection, Layout kLayout, class Tile, int kVector>
struct Operands {  // fprop and dgrad
  static constexpr int kThreads = Tile::kThreads;
  static constexpr bool kForward = kDirection == Direction::fprop;
  // Else the walk is the chunk's, the same in all threads.
  static constexpr bool kWalkOfThread = kLayout == Layout::nhwc || kVector == 1;
  using Walk = TapWalk<kDirection, kVector>;
  using A = std::conditional_t<kLayout == Layout::nhwc,
                               GatherNhwc<T, kDirection, Tile::kRows, kThreads, kVector>,
                               GatherNchw<T, kDirection, Tile::kRows, kThreads, kVector>>;
  using B = std::conditional_t<kForward, MatrixRows<T, Tile::kColumns, kThreads, kVector>,
                               FilterAlongDepth<T, Tile::kColumns, kThreads, kVector>>;
  using Table = uint4[Walk::kTable];
  static constexpr int kChunks = 0;
  Walk walk;
  A a;
  B b;

  static __device__ void fill(Table& table, const SimtGemmArguments<T>& p,
                              const BlockPlace& place) {
    Walk::fill(table, p.g, place);
  }

  __device__ Operands(const Table& table, const SimtGemmArguments<T>& p, const BlockPlace& place)
      : walk(table, p.g, place,
             kWalkOfThread ? AlongDepth<Tile::kRows, kThreads, kVector>::depth() : 0),
        a(p, place), b(make_b(p, place)) {}

  static __device__ B make_b(const SimtGemmArguments<T>& p, const BlockPlace& place) {
    if constexpr (kForward) {
      return B(p, place);
    } else {
      return B(
          p, place,
          kWalkOfThread ? 0u : unsigned(AlongDepth<Tile::kColumns, kThreads, kVector>::depth()));
    }
  }

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace& place,
                                      int /*depth*/, int end) {
    walk.look(p.g, place);
    a.get(p, place, walk, end);
    if constexpr (kForward) {
      b.get(p);
    } else {
      b.get(p, walk, end);
    }
    walk.advance(p.g);
  }
};

template <class T, class Tile, int kVector>
struct Operands<T, Direction::wgrad, Layout::nhwc, Tile, kVector> {
  using Table = uint4[1];  // none
  static constexpr int kChunks = 0;
  PatchesNhwc<T, Tile::kRows, Tile::kThreads, kVector> a;
  MatrixRows<T, Tile::kColumns, Tile::kThreads, kVector> b;

  static __device__ void fill(Table&, const SimtGemmArguments<T>&, const BlockPlace&) {}

  __device__ Operands(const Table&, const SimtGemmArguments<T>& p, const BlockPlace& place)
      : a(p, place), b(p, place) {}

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace&, int depth,
                                      int end) {
    a.get(p, depth, end);
    b.get(p);
  }
};

template <class T, class Tile>
struct Operands<T, Direction::wgrad, Layout::nchw, Tile, 1> {
  using A = PatchesNchw<T, Tile::kRows, Tile::kThreads>;
  using Table = typename A::Table;
  static constexpr int kChunks = 0;
  A a;
  Planes<T, Tile::kColumns, Tile::kThreads> b;

  static __device__ void fill(Table& table, const SimtGemmArguments<T>& p,
                              const BlockPlace& place) {
    A::fill(table, p, place);
  }

  __device__ Operands(const Table& table, const SimtGemmArguments<T>& p, const BlockPlace& place)
      : a(table, p, place), b(p, place) {}

  __device__ __forceinline__ void get(const SimtGemmArguments<T>& p, const BlockPlace&, int depth,
                                      int end) {
    a.get(p, depth, end);
    b.get(p, depth, end);
  }
};

template <class T, class Tile>
struct Operands<T, Direction::wgrad, Layout::nchw, Tile, 4> : DescribedNchw<T, Tile> {
  using DescribedNchw<T, Tile>::DescribedNchw;
};

// --- results -------------------------------------------------------------------------------------

// The offset in `out` of row `row` of the GEMM, without its column; false where there is none.
template <Direction kDirection, Layout kLayout, class T>
__device__ __forceinline__ bool row_offset(const SimtGemmArguments<T>& p, const BlockPlace& place,
                                           unsigned row, unsigned& offset) {
  const ConvGeometry& g = p.g;
  if (row >= unsigned(p.rows)) return false;
  if constexpr (kDirection == Direction::wgrad) {
    offset = row * unsigned(g.k);
  } else if constexpr (kDirection == Direction::fprop) {
    if constexpr (kLayout == Layout::nhwc) {
      offset = row * unsigned(g.k);
    } else {
      int image = int(row);
      const int pixel = g.by_plane.split(image);
      offset = unsigned(image) * unsigned(g.y.image) + unsigned(pixel);
    }
  } else {
    int image = int(row);
    const int j = g.columns.by_class_pixels.split(image);
    const int i = g.rows.by_class_pixels.split(image);
    if (i >= place.rows.count || j >= place.columns.count) return false;
    offset = unsigned(image) * unsigned(g.x.image) +
             unsigned(place.rows.first + i * place.rows.step) * unsigned(g.x.row) +
             unsigned(place.columns.first + j * place.columns.step) * unsigned(g.x.column);
  }
  return true;
}

template <Direction kDirection, Layout kLayout, class Tile, int kVector, class T, class Out>
__device__ __forceinline__ void put_results(const SimtGemmArguments<T>& p, const BlockPlace& place,
                                            unsigned row, unsigned column,
                                            const float (&sums)[8][8], Out* out) {
  constexpr bool kColumnsContiguous = kDirection == Direction::wgrad || kLayout == Layout::nhwc;
  const unsigned per_group = unsigned(p.columns);
  if constexpr (kColumnsContiguous) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      unsigned offset;
      if (!row_offset<kDirection, kLayout>(p, place, row + i / 4 * 4 * Tile::kLanesM + i % 4,
                                           offset)) {
        continue;
      }
      Out* to = out + (offset + unsigned(place.group) * per_group);
#pragma unroll
      for (int j = 0; j < 8; j += kVector) {
        const unsigned at = column + j / 4 * 4 * Tile::kLanesN + j % 4;
        if (at >= per_group) continue;
        float values[kVector];
#pragma unroll
        for (int l = 0; l < kVector; ++l) values[l] = sums[i][j + l];
        store<kVector>(to + at, values);
      }
    }
  } else {
    const unsigned channel =
        unsigned(kDirection == Direction::fprop ? p.g.y.channel : p.g.x.channel);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned offsets[4];
      unsigned valid = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        valid |= unsigned(row_offset<kDirection, kLayout>(
                     p, place, row + half * 4 * Tile::kLanesM + i, offsets[i]))
                 << i;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned at = column + j / 4 * 4 * Tile::kLanesN + j % 4;
        if (at >= per_group) continue;
        Out* to = out + (unsigned(place.group) * per_group + at) * channel;
        if (p.vector_rows) {
          float values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) values[i] = sums[half * 4 + i][j];
          if (valid & 1) store<4>(to + offsets[0], values);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (valid >> i & 1) to[offsets[i]] = from_float<Out>(sums[half * 4 + i][j]);
          }
        }
      }
    }
  }
}

// sums += A * B of one chunk, from where this thread reads.
template <class Tile>
__device__ __forceinline__ void multiply_chunk(const float* a_at, const float* b_at,
                                               float (&sums)[8][8]) {
  constexpr int kPitchA = Tile::kRows + 4, kPitchB = Tile::kColumns + 4;
#pragma unroll
  for (int depth = 0; depth < 8; ++depth) {
    float a[8], b[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 a4 =
          *reinterpret_cast<const float4*>(a_at + depth * kPitchA + half * 4 * Tile::kLanesM);
      const float4 b4 =
          *reinterpret_cast<const float4*>(b_at + depth * kPitchB + half * 4 * Tile::kLanesN);
      a[half * 4] = a4.x, a[half * 4 + 1] = a4.y, a[half * 4 + 2] = a4.z, a[half * 4 + 3] = a4.w;
      b[half * 4] = b4.x, b[half * 4 + 1] = b4.y, b[half * 4 + 2] = b4.z, b[half * 4 + 3] = b4.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = multiply_add(a[i], b[j], sums[i][j]);
    }
  }
}

template <class T, Direction kDirection, Layout kLayout, class Tile, int kVector>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocksPerMultiprocessor) void simt_gemm_kernel(
    const SimtGemmArguments<T> p) {
  using Pair = Operands<T, kDirection, kLayout, Tile, kVector>;
  constexpr int kPitchA = Tile::kRows + 4, kPitchB = Tile::kColumns + 4;
  constexpr int kBuffer = 8 * (kPitchA + kPitchB);
  FASTCONV_SHARED(tiles, float[2 * kBuffer]);
  FASTCONV_SHARED(table, typename Pair::Table);
  FASTCONV_SHARED(place, BlockPlace);

  if (threadIdx.x == 0) place.template find<kDirection, Tile>(p);
  __syncthreads();
  Pair::fill(table, p, place);
  __syncthreads();

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = warp / Tile::kWarpsN * 8 * Tile::kLanesM + lane / Tile::kLanesN * 4;
  const int column = warp % Tile::kWarpsN * 8 * Tile::kLanesN + lane % Tile::kLanesN * 4;
  float sums[8][8] = {};

  Pair operands(table, p, place);
  // Where this thread reads and writes: in the buffers, which change places after each chunk.
  const float* a_from = tiles + row;
  const float* b_from = tiles + 8 * kPitchA + column;
  float* a_to = tiles + operands.a.place();
  float* b_to = tiles + 8 * kPitchA + operands.b.place();
  // A step multiplies one chunk and gets the next; beyond the end nothing is read.
  if constexpr (Pair::kChunks == 0) {
    int swap = kBuffer;
    const int end = place.end;
    int start = place.depth, chunks = (end - start + 7) / 8;
    if (chunks > 0) {  // else a small class of dgrad has nothing left for this split
      operands.get(p, place, start, end);
      operands.a.put(a_to);
      operands.b.put(b_to);
      a_to += swap, b_to += swap;
      __syncthreads();
    }
#pragma unroll 1
    for (; chunks > 0; --chunks) {
      start += 8;
      operands.get(p, place, start, end);
      // Written out once more: what the compiler has inlined takes a register more.
#pragma unroll
      for (int depth = 0; depth < 8; ++depth) {
        float a[8], b[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 a4 =
              *reinterpret_cast<const float4*>(a_from + depth * kPitchA + half * 4 * Tile::kLanesM);
          const float4 b4 =
              *reinterpret_cast<const float4*>(b_from + depth * kPitchB + half * 4 * Tile::kLanesN);
          a[half * 4] = a4.x, a[half * 4 + 1] = a4.y, a[half * 4 + 2] = a4.z,
                   a[half * 4 + 3] = a4.w;
          b[half * 4] = b4.x, b[half * 4 + 1] = b4.y, b[half * 4 + 2] = b4.z,
                   b[half * 4 + 3] = b4.w;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j] = multiply_add(a[i], b[j], sums[i][j]);
        }
      }
      operands.a.put(a_to);
      operands.b.put(b_to);
      a_from += swap, b_from += swap, a_to -= swap, b_to -= swap;
      swap = -swap;
      __syncthreads();
    }
  } else {
    // Two steps at a time, an even number of them for each description. Where this is lies in shared
    // memory: registers are dear.
    operands.get(p, place, 0, 0);
    operands.a.put(a_to);
    operands.b.put(b_to);
    __syncthreads();
    if (threadIdx.x == 0) place.depth += 8;
    __syncthreads();
#pragma unroll 1
    while (place.depth < place.end + 8) {
      operands.describe(table, p, place);
      operands.restart(table, place);
      __syncthreads();
#pragma unroll 1
      while (operands.has_more(table)) {
#pragma unroll
        for (int from = 0; from < 2; ++from) {
          operands.get(p, place, 0, 0);
          multiply_chunk<Tile>(a_from + from * kBuffer, b_from + from * kBuffer, sums);
          operands.a.put(a_to + (1 - from) * kBuffer);
          operands.b.put(b_to + (1 - from) * kBuffer);
          __syncthreads();
        }
      }
      if (threadIdx.x == 0) place.depth += Pair::kPixels;
      __syncthreads();
    }
  }

  const unsigned first_row = place.row + unsigned(row);
  const unsigned first_column = place.column + unsigned(column);
  if (p.partials != nullptr) {
    put_results<kDirection, kLayout, Tile, kVector>(
        p, place, first_row, first_column, sums,
        p.partials + std::size_t(place.split) * std::size_t(p.out_count));
    return;
  }
  if constexpr (kDirection == Direction::fprop) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const unsigned at = first_column + j / 4 * 4 * Tile::kLanesN + j % 4;
      const float bias = p.bias != nullptr && at < unsigned(p.columns)
                             ? to_float(p.bias[unsigned(place.group) * unsigned(p.columns) + at])
                             : 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i][j] += bias;
        if (p.relu) sums[i][j] = relu(sums[i][j]);
      }
    }
  }
  put_results<kDirection, kLayout, Tile, kVector>(p, place, first_row, first_column, sums, p.out);
}

}  // namespace fastconv::cuda
