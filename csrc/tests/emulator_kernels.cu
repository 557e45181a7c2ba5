// Kernels that test the emulator itself (tests/test_cuda_emulator.py): two that are right, and seeded
// bugs, each of which the detector made for it must find.
#include <cstddef>

#include "cuda/device.cuh"

namespace {

using fastconv::cuda::copy_async;
using fastconv::cuda::copy_async_commit;
using fastconv::cuda::copy_async_wait;
using fastconv::cuda::launch;

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffff;

enum Bug : int {
  kNone,
  kNoBarrier,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kDivergentBarrier,
  kNoCopyWait,
  kNoBarrierAfterCopyWait,
  kCopyOverReaders,
  kUninitialisedShared,
  kRaceOfBlocks,
  kMisalignedVector,
  kDivergentWarp,
  kLaneOutsideMask,
  kBarrierAfterReturn,
  kNoWarpBarrier,
  kRaceOfBytes,
  kGlobalOverflowsInt,
  kDynamicSharedOutOfBounds,
  kReadBehindWrite,
  kWriteOfConstant,
};

__global__ void __launch_bounds__(kThreads)
    add(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ sum, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) sum[i] = a[i] + b[i];
}

// sums[block] = the sum of the block's kThreads values: copied asynchronously into shared memory,
// added up in pairs there, then by shuffles.
__global__ void __launch_bounds__(kThreads) reduce(const float* __restrict__ values, float* sums) {
  FASTCONV_SHARED(tile, float[kThreads]);
  const int thread = int(threadIdx.x);
  copy_async<4>(&tile[thread], &values[blockIdx.x * kThreads + thread]);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int half = kThreads / 2; half >= 32; half /= 2) {
    if (thread < half) tile[thread] += tile[thread + half];
    __syncthreads();
  }
  if (thread >= 32) return;
  float sum = tile[thread];
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, unsigned(distance));
  if (thread == 0) sums[blockIdx.x] = sum;
}

// Reads out of `in` and writes to `out` (kThreads values a block) what the block's threads reversed.
template <int kBug>
__global__ void __launch_bounds__(kThreads) reverse(const float* in, float* out, int n) {
  FASTCONV_SHARED(tile, float[kThreads]);
  FASTCONV_SHARED(unused, float[kThreads]);
  FASTCONV_SHARED(bytes, unsigned char[kThreads]);
  FASTCONV_DYNAMIC_SHARED(float, dynamic);
  const int thread = int(threadIdx.x), mirrored = kThreads - 1 - thread;
  const int i = int(blockIdx.x) * kThreads + thread;
  unused[thread] = 1;
  dynamic[kBug == kDynamicSharedOutOfBounds ? thread + 1 : thread] = 1;
  if (kBug == kBarrierAfterReturn && thread == 0) return;
  if (kBug == kMisalignedVector) {
    if (thread == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
    return;
  }
  if (kBug == kDivergentWarp) {
    if (thread % 2 == 0)
      out[i] = __shfl_xor_sync(kAllLanes, in[i], 2);
    else
      out[i] = __shfl_xor_sync(kAllLanes, in[i], 4);
    return;
  }
  if (kBug == kLaneOutsideMask) {
    out[i] = __shfl_xor_sync(0xffff, in[i], 1);
    return;
  }
  if (kBug == kNoCopyWait || kBug == kNoBarrierAfterCopyWait || kBug == kCopyOverReaders) {
    copy_async<4>(&tile[thread], &in[i]);
    copy_async_commit();
    if (kBug != kNoCopyWait) copy_async_wait<0>();
    if (kBug != kNoBarrierAfterCopyWait) __syncthreads();
    out[i] = tile[mirrored];
    if (kBug == kCopyOverReaders) {
      copy_async<4>(&tile[thread], &in[i]);
      copy_async_commit();
      copy_async_wait<0>();
    }
    return;
  }
  if (kBug == kRaceOfBytes) {
    bytes[thread / 2 * 2] = 1;
    out[i] = in[i];
    return;
  }
  if (kBug == kNoWarpBarrier) {
    tile[thread] = in[i];
    out[i] = tile[thread ^ 1];
    return;
  }
  if (kBug == kReadBehindWrite) {  // of global memory, by another thread of the block
    out[i] = in[i];
    if (out[int(blockIdx.x) * kThreads + mirrored] > 1e30f) out[i] = 0;
    return;
  }
  if (kBug != kUninitialisedShared || thread != 5) tile[thread] = in[i];
  bytes[thread] = 1;  // neighbours in one word: no race
  if (kBug == kDivergentBarrier) {
    if (thread < 64)
      __syncthreads();
    else
      __syncthreads();
  } else if (kBug != kNoBarrier) {
    __syncthreads();
  }
  const float value = tile[kBug == kSharedOutOfBounds ? mirrored + 1 : mirrored];
  if (kBug == kGlobalOverflowsInt && n + thread < 0) return;  // signed overflow where n is INT_MAX
  if (kBug == kWriteOfConstant) {
    static const float constant[2] = {1, 2};
    const_cast<volatile float*>(constant)[thread % 2] = value;
  }
  out[kBug == kRaceOfBlocks ? thread : kBug == kGlobalOutOfBounds ? i + 1 : i] = value;
}

template <int kBug>
cudaError_t run_bug(int bug, const float* in, float* out, int blocks, int n) {
  if (bug == kBug)
    return launch(reverse<kBug>, dim3(unsigned(blocks)), dim3(kThreads), kThreads * sizeof(float),
                  nullptr, in, out, n);
  if constexpr (kBug == kWriteOfConstant)
    return cudaErrorInvalidValue;
  else
    return run_bug<kBug + 1>(bug, in, out, blocks, n);
}

// One value of each half of a warp to the other, by the primitive under shuffles and mma.
__global__ void exchange(const int* in, int* out) {
  struct Operand {
    int given, taken;
  } mine{in[threadIdx.x], 0};
#if defined(FASTCONV_CUDA_EMULATE)
  fastconv::emulator::warp_collective(kAllLanes, mine, [](Operand* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->taken = lanes[i ^ 16]->given;
  });
#else
  mine.taken = __shfl_xor_sync(kAllLanes, mine.given, 16);
#endif
  out[threadIdx.x] = mine.taken;
}

// Stores rows of 16 bytes, whose distance decides how many lanes meet in one bank, and loads those of
// the neighbours.
__global__ void load_rows(const float* in, float* out, int distance) {
  FASTCONV_DYNAMIC_SHARED(float, tile);
  const int thread = int(threadIdx.x);
  *reinterpret_cast<float4*>(&tile[thread * distance]) =
      *reinterpret_cast<const float4*>(&in[thread * 4]);
  __syncwarp();
  *reinterpret_cast<float4*>(&out[thread * 4]) =
      *reinterpret_cast<const float4*>(&tile[(thread ^ 1) * distance]);
}

__global__ void convert(const float* in, __half* half_out, __nv_bfloat16* bfloat_out,
                        float* half_back, float* bfloat_back, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half_out[i] = __float2half_rn(in[i]);
  bfloat_out[i] = __float2bfloat16_rn(in[i]);
  half_back[i] = __half2float(half_out[i]);
  bfloat_back[i] = __bfloat162float(bfloat_out[i]);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT test_malloc(void** pointer, std::size_t bytes) { return cudaMalloc(pointer, bytes); }
EXPORT test_free(void* pointer) { return cudaFree(pointer); }
EXPORT test_to_device(void* to, const void* from, std::size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
}
EXPORT test_to_host(void* to, const void* from, std::size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost);
}
EXPORT test_synchronize() { return cudaDeviceSynchronize(); }
extern "C" __attribute__((visibility("default"))) const char* test_error_text(int error) {
  return cudaGetErrorString(cudaError_t(error));
}
EXPORT test_add(const float* a, const float* b, float* sum, int n, cudaStream_t stream) {
  return launch(add, dim3(unsigned(n + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, a, b,
                sum, n);
}
EXPORT test_reduce(const float* values, float* sums, int blocks) {
  return launch(reduce, dim3(unsigned(blocks)), dim3(kThreads), 0, nullptr, values, sums);
}
EXPORT test_reverse(int bug, const float* in, float* out, int blocks, int n) {
  return run_bug<kNone>(bug, in, out, blocks, n);
}
EXPORT test_exchange(const int* in, int* out) {
  return launch(exchange, dim3(1), dim3(32), 0, nullptr, in, out);
}
EXPORT test_load_rows(const float* in, float* out, int distance) {
  return launch(load_rows, dim3(1), dim3(32), std::size_t(32 * distance + 4) * 4, nullptr, in, out,
                distance);
}
EXPORT test_convert(const float* in, __half* half_out, __nv_bfloat16* bfloat_out, float* half_back,
                    float* bfloat_back, int n) {
  return launch(convert, dim3(unsigned(n + 255) / 256), dim3(256), 0, nullptr, in, half_out,
                bfloat_out, half_back, bfloat_back, n);
}
EXPORT test_launch(unsigned grid, unsigned block, std::size_t dynamic_shared) {
  return launch(load_rows, dim3(grid), dim3(block), dynamic_shared, nullptr,
                static_cast<const float*>(nullptr), static_cast<float*>(nullptr), 4);
}
EXPORT test_stream_create(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
}
EXPORT test_stream_synchronize(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
EXPORT test_stream_destroy(cudaStream_t stream) { return cudaStreamDestroy(stream); }
// Makes `later` wait for what `earlier` has been given.
EXPORT test_stream_order(cudaStream_t earlier, cudaStream_t later) {
  cudaEvent_t event = nullptr;
  int error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaEventRecord(event, earlier);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(later, event);
  if (error == cudaSuccess) error = cudaEventDestroy(event);
  return error;
}
