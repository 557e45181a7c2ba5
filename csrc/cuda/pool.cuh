// Max- and average-pooling, forward and backward. Bound by memory: a thread makes the results of
// kVector neighbouring channels of one pixel, 16 bytes, and reads its windows from the caches, where
// neighbouring threads have brought them. Of N,C,H,W each plane is an image of one channel
// (kVector 1), neighbouring threads its neighbouring columns. No shared memory.
//
// Backward gathers: a thread owns pixels of dx and sums what the windows above them send, row after
// row, so nothing is added atomically and results are the same bits run to run.
//
// Max: the first maximum in row-major order wins, the first NaN beats all. Average: the sum of the
// window's rows, each summed by itself, over the number of its pixels inside the input.
// All in float32, rounded once at the end.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/geometry.cuh"

namespace fastconv::cuda {

// 1 / n, at most an ulp off. A division proper calls a subroutine, around which registers spill.
__device__ __forceinline__ float reciprocal(int n) {
  const auto value = static_cast<float>(n);
  const float guess = __fdividef(1.0f, value);
  return __fmaf_rn(guess, __fmaf_rn(-value, guess, 1.0f), guess);
}
// sum / n, rounded to the nearest: what is left over corrects the quotient (unless it is infinite).
__device__ __forceinline__ float divided(float sum, int n, float reciprocal_of_n) {
  const float quotient = sum * reciprocal_of_n;
  const float left = __fmaf_rn(-static_cast<float>(n), quotient, sum);
  const float corrected = __fmaf_rn(left, reciprocal_of_n, quotient);
  return quotient - quotient == 0.0f ? corrected : quotient;
}

// One axis of a pooling.
struct PoolAxis {
  int in = 0, out = 0, window = 0, stride = 1, padding = 0;
  FastDivisor by_in, by_out, by_stride;

  PoolAxis(std::int64_t in, std::int64_t out, std::int64_t window, std::int64_t stride,
           std::int64_t padding)
      : in(int(in)), out(int(out)), window(int(window)), stride(int(out == 1 ? 1 : stride)),
        padding(int(padding)), by_in(in), by_out(out), by_stride(this->stride) {}

  // Taps begin .. end - 1 of window `i`, or the windows over input position `i`.
  struct Span {
    int begin, end;
    __device__ int size() const { return end - begin; }
  };
  __device__ int origin(int i) const { return i * stride - padding; }
  __device__ Span taps_inside(int origin) const {
    return {max(0, -origin), min(window, in - origin)};
  }
  __device__ Span windows_over(int i) const {
    const int at = i + padding;
    return {at < window ? 0 : by_stride.quotient(at - window) + 1,
            min(out, by_stride.quotient(at) + 1)};
  }
};

struct PoolGeometry {
  PoolAxis rows, columns;
  int channels;           // of an image
  unsigned results;       // threads
  FastDivisor by_chunks;  // chunks of kVector channels a pixel
  FastDivisor by_window;  // columns of the window
};

// kVector elements, 16 bytes or one.
template <class T, int kVector>
__device__ __forceinline__ void load_chunk(const T* from, float (&to)[kVector]) {
  if constexpr (kVector == 8) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto bits = static_cast<unsigned short>(pairs[i / 2] >> (i % 2 * 16));
      if constexpr (std::is_same_v<T, __half>) {
        to[i] = to_float(__ushort_as_half(bits));
      } else {
        to[i] = to_float(__ushort_as_bfloat16(bits));
      }
    }
  } else {
    load<kVector>(from, to);
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store_chunk(T* to, const float (&from)[kVector]) {
  if constexpr (kVector == 8) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned low, high;
      if constexpr (std::is_same_v<T, __half>) {
        low = __half_as_ushort(from_float<T>(from[2 * i]));
        high = __half_as_ushort(from_float<T>(from[2 * i + 1]));
      } else {
        low = __bfloat16_as_ushort(from_float<T>(from[2 * i]));
        high = __bfloat16_as_ushort(from_float<T>(from[2 * i + 1]));
      }
      pairs[i] = low | high << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
    store<kVector>(to, from);
  }
}

// Taps of kVector results, one byte each or int32.
template <int kVector>
__device__ __forceinline__ void store_taps(std::uint8_t* to, const int (&taps)[kVector]) {
  if constexpr (kVector == 1) {
    *to = static_cast<std::uint8_t>(taps[0]);
  } else {
    unsigned words[kVector / 4];
#pragma unroll
    for (int i = 0; i < kVector / 4; ++i) {
      words[i] = static_cast<unsigned>(taps[4 * i] | taps[4 * i + 1] << 8 | taps[4 * i + 2] << 16) |
                 static_cast<unsigned>(taps[4 * i + 3]) << 24;
    }
    if constexpr (kVector == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<unsigned*>(to) = words[0];
    }
  }
}
template <int kVector>
__device__ __forceinline__ void store_taps(std::int32_t* to, const int (&taps)[kVector]) {
  if constexpr (kVector == 1) {
    *to = taps[0];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      *reinterpret_cast<int4*>(to + i) = make_int4(taps[i], taps[i + 1], taps[i + 2], taps[i + 3]);
    }
  }
}
template <int kVector>
__device__ __forceinline__ void load_taps(const std::uint8_t* from, int (&taps)[kVector]) {
  if constexpr (kVector == 1) {
    taps[0] = __ldg(from);
  } else {
    unsigned words[kVector / 4];
    if constexpr (kVector == 8) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = two.x;
      words[1] = two.y;
    } else {
      words[0] = __ldg(reinterpret_cast<const unsigned*>(from));
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      taps[i] = static_cast<int>(words[i / 4] >> (i % 4 * 8) & 255u);
  }
}
template <int kVector>
__device__ __forceinline__ void load_taps(const std::int32_t* from, int (&taps)[kVector]) {
  if constexpr (kVector == 1) {
    taps[0] = __ldg(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(from + i));
      taps[i] = four.x;
      taps[i + 1] = four.y;
      taps[i + 2] = four.z;
      taps[i + 3] = four.w;
    }
  }
}

// What a thread makes: channels from `channel` on of pixel (i, j) of an image.
struct PoolPlace {
  int image, i, j, channel;
};
template <int kVector>
__device__ __forceinline__ PoolPlace pool_place(const PoolGeometry& g, unsigned thread,
                                                const FastDivisor& by_height,
                                                const FastDivisor& by_width) {
  PoolPlace place;
  place.image = static_cast<int>(thread);
  place.channel = g.by_chunks.split(place.image) * kVector;
  place.j = by_width.split(place.image);
  place.i = by_height.split(place.image);
  return place;
}

constexpr int kPoolThreads = 256;

template <class T, int kVector>
__global__ __launch_bounds__(kPoolThreads, 4) void max_pool_fprop(PoolGeometry g, const T* x, T* y,
                                                                  std::uint8_t* bytes,
                                                                  std::int32_t* integers) {
  const unsigned thread = blockIdx.x * kPoolThreads + threadIdx.x;
  if (thread >= g.results) return;
  const PoolPlace place = pool_place<kVector>(g, thread, g.rows.by_out, g.columns.by_out);
  const int top = g.rows.origin(place.i), left = g.columns.origin(place.j);
  const auto rows = g.rows.taps_inside(top), columns = g.columns.taps_inside(left);
  float best[kVector];
  int taps[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    best[v] = -INFINITY;
    taps[v] = rows.begin * g.columns.window + columns.begin;
  }
  for (int r = rows.begin; r < rows.end; ++r) {
    const T* from =
        x +
        (((place.image * g.rows.in + top + r) * g.columns.in + left + columns.begin) * g.channels +
         place.channel);
    for (int s = columns.begin; s < columns.end; ++s, from += g.channels) {
      float value[kVector];
      load_chunk<T, kVector>(from, value);
      const int tap = r * g.columns.window + s;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (!(value[v] <= best[v]) && best[v] == best[v]) {
          best[v] = value[v];
          taps[v] = tap;
        }
      }
    }
  }
  const int at = static_cast<int>(thread) * kVector;
  store_chunk<T, kVector>(y + at, best);
  if (bytes != nullptr) {
    store_taps<kVector>(bytes + at, taps);
  } else if (integers != nullptr) {
    store_taps<kVector>(integers + at, taps);
  }
}

template <class T, int kVector>
__global__ __launch_bounds__(kPoolThreads, 4) void max_pool_bprop(PoolGeometry g, const T* dy,
                                                                  const std::uint8_t* bytes,
                                                                  const std::int32_t* integers,
                                                                  T* dx) {
  const unsigned thread = blockIdx.x * kPoolThreads + threadIdx.x;
  if (thread >= g.results) return;
  const PoolPlace place = pool_place<kVector>(g, thread, g.rows.by_in, g.columns.by_in);
  const auto rows = g.rows.windows_over(place.i), columns = g.columns.windows_over(place.j);
  float sum[kVector] = {};
  for (int i = rows.begin; i < rows.end; ++i) {
    const int r = place.i - g.rows.origin(i);
    for (int j = columns.begin; j < columns.end; ++j) {
      const int at =
          ((place.image * g.rows.out + i) * g.columns.out + j) * g.channels + place.channel;
      const int tap = r * g.columns.window + place.j - g.columns.origin(j);
      float value[kVector];
      int taps[kVector];
      load_chunk<T, kVector>(dy + at, value);
      if (bytes != nullptr) {
        load_taps<kVector>(bytes + at, taps);
      } else {
        load_taps<kVector>(integers + at, taps);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += taps[v] == tap ? value[v] : 0.0f;
    }
  }
  store_chunk<T, kVector>(dx + static_cast<int>(thread) * kVector, sum);
}

// The neighbouring channels of a chunk come from pixels of their own. What names no pixel gives 0.
template <class T, int kVector>
__global__ __launch_bounds__(kPoolThreads, 4) void max_pool_gather(PoolGeometry g, const T* x,
                                                                   const std::uint8_t* bytes,
                                                                   const std::int32_t* integers,
                                                                   T* y) {
  const unsigned thread = blockIdx.x * kPoolThreads + threadIdx.x;
  if (thread >= g.results) return;
  const PoolPlace place = pool_place<kVector>(g, thread, g.rows.by_out, g.columns.by_out);
  const int top = g.rows.origin(place.i), left = g.columns.origin(place.j);
  const int at = static_cast<int>(thread) * kVector;
  int taps[kVector];
  if (bytes != nullptr) {
    load_taps<kVector>(bytes + at, taps);
  } else {
    load_taps<kVector>(integers + at, taps);
  }
  float value[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    int row = taps[v];
    const int column = left + g.by_window.split(row);
    row += top;
    const bool inside =
        taps[v] >= 0 && row >= 0 && row < g.rows.in && column >= 0 && column < g.columns.in;
    const int from =
        ((place.image * g.rows.in + row) * g.columns.in + column) * g.channels + place.channel + v;
    value[v] = inside ? to_float(__ldg(x + from)) : 0.0f;
  }
  store_chunk<T, kVector>(y + at, value);
}

template <class T, int kVector>
__global__ __launch_bounds__(kPoolThreads, 4) void avg_pool_fprop(PoolGeometry g, const T* x,
                                                                  T* y) {
  const unsigned thread = blockIdx.x * kPoolThreads + threadIdx.x;
  if (thread >= g.results) return;
  const PoolPlace place = pool_place<kVector>(g, thread, g.rows.by_out, g.columns.by_out);
  const int top = g.rows.origin(place.i), left = g.columns.origin(place.j);
  const auto rows = g.rows.taps_inside(top), columns = g.columns.taps_inside(left);
  float sum[kVector] = {};
  for (int r = rows.begin; r < rows.end; ++r) {
    const T* from =
        x +
        (((place.image * g.rows.in + top + r) * g.columns.in + left + columns.begin) * g.channels +
         place.channel);
    float of_row[kVector] = {};
    for (int s = columns.begin; s < columns.end; ++s, from += g.channels) {
      float value[kVector];
      load_chunk<T, kVector>(from, value);
#pragma unroll
      for (int v = 0; v < kVector; ++v) of_row[v] += value[v];
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += of_row[v];
  }
  const int pixels = rows.size() * columns.size();
  const float share = reciprocal(pixels);
#pragma unroll
  for (int v = 0; v < kVector; ++v) sum[v] = divided(sum[v], pixels, share);
  store_chunk<T, kVector>(y + static_cast<int>(thread) * kVector, sum);
}

template <class T, int kVector>
__global__ __launch_bounds__(kPoolThreads, 4) void avg_pool_bprop(PoolGeometry g, const T* dy,
                                                                  T* dx) {
  const unsigned thread = blockIdx.x * kPoolThreads + threadIdx.x;
  if (thread >= g.results) return;
  const PoolPlace place = pool_place<kVector>(g, thread, g.rows.by_in, g.columns.by_in);
  const auto rows = g.rows.windows_over(place.i), columns = g.columns.windows_over(place.j);
  float sum[kVector] = {};
  for (int i = rows.begin; i < rows.end; ++i) {
    const int height = g.rows.taps_inside(g.rows.origin(i)).size();
    for (int j = columns.begin; j < columns.end; ++j) {
      const int width = g.columns.taps_inside(g.columns.origin(j)).size();
      const float share = reciprocal(height * width);
      float value[kVector];
      load_chunk<T, kVector>(
          dy + (((place.image * g.rows.out + i) * g.columns.out + j) * g.channels + place.channel),
          value);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] = multiply_add(value[v], share, sum[v]);
    }
  }
  store_chunk<T, kVector>(dx + static_cast<int>(thread) * kVector, sum);
}

}  // namespace fastconv::cuda
