// The one include of kernels: CUDA under nvcc; emulator/ under the C++ compiler with
// -DFASTCONV_CUDA_EMULATE.
//
// FASTCONV_SHARED(name, type)  a shared variable; of static size, at most 48 KiB in all in a kernel:
//                              FASTCONV_SHARED(tile, float[2][kDepth][kWidth + 4]);
// FASTCONV_DYNAMIC_SHARED(type, name)  name points to the launch's dynamic shared memory
// launch(kernel, grid, block, dynamic shared bytes, stream, arguments...)
// copy_async<bytes>(shared, global, valid), copy_async_commit(), copy_async_wait<pending>()
#pragma once

#include <cstddef>

#if defined(FASTCONV_CUDA_EMULATE)
#include "cuda/emulator/cuda_runtime.hpp"
#include "cuda/emulator/device_functions.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(FASTCONV_CUDA_EMULATE)
#define FASTCONV_SHARED(name, ...)                \
  using name##_shared_type = __VA_ARGS__;         \
  static const char name##_identity = 0;          \
  auto& name = *static_cast<name##_shared_type*>( \
      ::fastconv::emulator::static_shared(&name##_identity, sizeof(name##_shared_type), 128))
#define FASTCONV_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::fastconv::emulator::dynamic_shared())
#else
#define FASTCONV_SHARED(name, ...)        \
  using name##_shared_type = __VA_ARGS__; \
  __shared__ __align__(128) name##_shared_type name
#define FASTCONV_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char fastconv_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastconv_dynamic_shared)
#endif

// Returns from a function that returns cudaError_t where `call` fails.
#define FASTCONV_CUDA_TRY(call)                                                  \
  do {                                                                           \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) return error_; \
  } while (false)

namespace fastconv::cuda {

inline constexpr std::size_t kSharedWithoutOptIn = 48 << 10;

// Enqueues a kernel, with permission for its dynamic shared memory where it needs one. The error is
// that of the launch alone; one of the kernel comes from the call that waits for it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (dynamic_shared_bytes > kSharedWithoutOptIn)
    FASTCONV_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(dynamic_shared_bytes)));
#if defined(FASTCONV_CUDA_EMULATE)
  return emulator::launch(
      {grid, block, dynamic_shared_bytes},
      std::make_unique<emulator::KernelCallOf<Parameters...>>(kernel, arguments...), stream);
#else
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#endif
}

// The value, of which the compiler no longer knows what it is: what is computed from it stays behind
// this point, as all that is volatile does.
__device__ __forceinline__ int late(int value) {
#if !defined(FASTCONV_CUDA_EMULATE)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// --- asynchronous copies from global to shared memory -------------------------------------------
// Both addresses are multiples of kBytes (4, 8 or 16). Where `valid` is false, zeros are written and
// nothing is read. The data are there for this thread after copy_async_wait, for the others after a
// barrier behind that. Below compute capability 8.0: a plain load and store, at once.

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true
#if defined(FASTCONV_CUDA_EMULATE)
                                           ,
                                           emulator::Location where = emulator::Location::current()
#endif
) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(FASTCONV_CUDA_EMULATE)
  emulator::copy_async(shared, global, kBytes, valid ? kBytes : 0, where);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes_read = valid ? kBytes : 0;
  if constexpr (kBytes == 16)  // past L1, where nobody would read it again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(bytes_read));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(bytes_read));
#elif defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16)
    *static_cast<uint4*>(shared) =
        valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
  else if constexpr (kBytes == 8)
    *static_cast<uint2*>(shared) =
        valid ? __ldg(static_cast<const uint2*>(global)) : make_uint2(0, 0);
  else
    *static_cast<unsigned*>(shared) = valid ? __ldg(static_cast<const unsigned*>(global)) : 0u;
#endif
}

// Closes the group of the copies since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#if defined(FASTCONV_CUDA_EMULATE)
  emulator::copy_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most kPending of this thread's groups, the last ones, are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(FASTCONV_CUDA_EMULATE)
  emulator::copy_async_wait(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastconv::cuda
