// The instructions that tensor-core kernels lean on, one function each:
//
//   instruction                     from    what it does                                       shape
//   ldmatrix.x4 (.trans)            sm_75   4 matrices of 8 rows of 16 bytes from shared       warp
//                                           memory to registers; lane l names row l % 8 of
//                                           matrix l / 8
//   mma.m16n8k16 f16/bf16 -> f32    sm_80   D = A * B + D; on sm_75 two m16n8k8 (f16 only)     warp
//   mma.m16n8k8 tf32 -> f32         sm_80   the same, of float32 with 10 bits of mantissa      warp
//   cvt.rna.tf32.f32                sm_80   to nearest, ties away from zero                    thread
//
// Which lane holds which element (PTX ISA, "Matrix fragments for mma.m16n8k16/m16n8k8"), with
// g = lane / 4 and t = lane % 4:
//
//             16-bit types, k of 16                       tf32, k of 8
//   a[0..3]   rows g, g + 8, g, g + 8;                    the same rows; k = t, t, t + 4, t + 4
//             k = 2t, 2t + 1 (+ 8 in a[2], a[3])
//   b[0..1]   column g; k = 2t, 2t + 1 (+ 8 in b[1])      column g; k = t, t + 4
//   d[0..3]   row g: columns 2t, 2t + 1; row g + 8: columns 2t, 2t + 1
//
// So a[i] of either is what ldmatrix gives of 8 rows of 16 bytes of A stored row by row, and b[i]
// that of B stored column by column; 16-bit operands stored the other way come by .trans.
//
// On the emulator the same functions are those of emulator/tensor_core.hpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#ifdef FASTCONV_CUDA_EMULATE
#include "cuda/emulator/tensor_core.hpp"
#endif

namespace fastconv::cuda {

// float32 operands rounded to TF32.
struct Tf32 {};

// The four registers of a lane, from the row (16 bytes, aligned to them) that it names.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
#ifdef FASTCONV_CUDA_EMULATE
  emulator::load_matrices(r, row, kTranspose);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// The bits of a float32 rounded to TF32.
__device__ __forceinline__ std::uint32_t round_to_tf32(std::uint32_t bits) {
#ifdef FASTCONV_CUDA_EMULATE
  return emulator::round_to_tf32(bits);
#elif __CUDA_ARCH__ >= 800
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return bits;
#endif
}

// d += a * b for a tile of 16 x 8, over 16 (Tf32: 8) products each.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                                    const std::uint32_t (&b)[2]);

#ifdef FASTCONV_CUDA_EMULATE

template <class T>
inline void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
  emulator::multiply_accumulate(std::is_same_v<T, Tf32>     ? emulator::MmaType::tf32
                                : std::is_same_v<T, __half> ? emulator::MmaType::float16
                                                            : emulator::MmaType::bfloat16,
                                d, a, b);
}

#else

#if __CUDA_ARCH__ >= 800

template <>
__device__ __forceinline__ void multiply_accumulate<__half>(float (&d)[4],
                                                            const std::uint32_t (&a)[4],
                                                            const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_accumulate<__nv_bfloat16>(float (&d)[4],
                                                                   const std::uint32_t (&a)[4],
                                                                   const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_accumulate<Tf32>(float (&d)[4],
                                                          const std::uint32_t (&a)[4],
                                                          const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#elif defined(__CUDA_ARCH__)

// sm_75: halves of the same fragments.
template <>
__device__ __forceinline__ void multiply_accumulate<__half>(float (&d)[4],
                                                            const std::uint32_t (&a)[4],
                                                            const std::uint32_t (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
}

#endif
#endif

}  // namespace fastconv::cuda
