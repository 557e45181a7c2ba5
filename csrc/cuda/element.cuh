// Elements in memory are float32, float16 or bfloat16; kernels compute in float32. Reads and writes
// of one element, or of four neighbours at once (16 or 8 bytes, aligned to as many).
#pragma once

#include "cuda/device.cuh"

namespace fastconv::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <int kCount>
__device__ __forceinline__ void load(const float* from, float (&to)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    to[0] = __ldg(from);
  }
}
template <int kCount>
__device__ __forceinline__ void load(const __half* from, float (&to)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    const ushort4 v = __ldg(reinterpret_cast<const ushort4*>(from));
    to[0] = to_float(__ushort_as_half(v.x)), to[1] = to_float(__ushort_as_half(v.y));
    to[2] = to_float(__ushort_as_half(v.z)), to[3] = to_float(__ushort_as_half(v.w));
  } else {
    to[0] = to_float(*from);
  }
}
template <int kCount>
__device__ __forceinline__ void load(const __nv_bfloat16* from, float (&to)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    const ushort4 v = __ldg(reinterpret_cast<const ushort4*>(from));
    to[0] = to_float(__ushort_as_bfloat16(v.x)), to[1] = to_float(__ushort_as_bfloat16(v.y));
    to[2] = to_float(__ushort_as_bfloat16(v.z)), to[3] = to_float(__ushort_as_bfloat16(v.w));
  } else {
    to[0] = to_float(*from);
  }
}

template <int kCount>
__device__ __forceinline__ void store(float* to, const float (&from)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *to = from[0];
  }
}
template <int kCount>
__device__ __forceinline__ void store(__half* to, const float (&from)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    *reinterpret_cast<ushort4*>(to) = make_ushort4(__half_as_ushort(from_float<__half>(from[0])),
                                                   __half_as_ushort(from_float<__half>(from[1])),
                                                   __half_as_ushort(from_float<__half>(from[2])),
                                                   __half_as_ushort(from_float<__half>(from[3])));
  } else {
    *to = from_float<__half>(from[0]);
  }
}
template <int kCount>
__device__ __forceinline__ void store(__nv_bfloat16* to, const float (&from)[kCount]) {
  static_assert(kCount == 1 || kCount == 4);
  if constexpr (kCount == 4) {
    *reinterpret_cast<ushort4*>(to) =
        make_ushort4(__bfloat16_as_ushort(from_float<__nv_bfloat16>(from[0])),
                     __bfloat16_as_ushort(from_float<__nv_bfloat16>(from[1])),
                     __bfloat16_as_ushort(from_float<__nv_bfloat16>(from[2])),
                     __bfloat16_as_ushort(from_float<__nv_bfloat16>(from[3])));
  } else {
    *to = from_float<__nv_bfloat16>(from[0]);
  }
}

// a * b + c. On the emulator not fused: its processor may have to call a function for that.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#if defined(FASTCONV_CUDA_EMULATE)
  return a * b + c;
#else
  return __fmaf_rn(a, b, c);
#endif
}

// NaN passes through.
__device__ __forceinline__ float relu(float value) { return value < 0.f ? 0.f : value; }

}  // namespace fastconv::cuda
