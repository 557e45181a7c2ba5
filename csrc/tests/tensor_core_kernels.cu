// One warp that uses the instructions of mma.cuh, for tests/test_cuda_tensor_cores.py: registers in
// and out by lane, so that the tests see which lane holds what.
#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/mma.cuh"

namespace {

using fastconv::cuda::launch;
using fastconv::cuda::load_matrices;
using fastconv::cuda::multiply_accumulate;
using fastconv::cuda::round_to_tf32;
using fastconv::cuda::Tf32;

enum Bug : int { kNone, kMisalignedRow, kNoWarpBarrier, kDivergentWarp };

// registers[lane] = what ldmatrix gives that lane of 32 rows of 8 elements.
template <bool kTranspose>
__global__ void load(const uint4* rows, uint4* registers, int bug) {
  FASTCONV_SHARED(tile, unsigned char[33][16]);
  const int lane = int(threadIdx.x);
  *reinterpret_cast<uint4*>(tile[lane ^ 1]) = rows[lane ^ 1];
  if (bug != kNoWarpBarrier) __syncwarp();
  std::uint32_t r[4] = {};
  if (bug != kDivergentWarp || lane < 31) {
    load_matrices<kTranspose>(r, tile[lane] + (bug == kMisalignedRow ? 4 : 0));
  }
  registers[lane] = make_uint4(r[0], r[1], r[2], r[3]);
}

// d[lane] = d[lane] + a[lane] * b[lane], as fragments.
template <class T>
__global__ void multiply(const std::uint32_t (*a)[4], const std::uint32_t (*b)[2], float (*d)[4]) {
  const int lane = int(threadIdx.x);
  std::uint32_t a_fragment[4], b_fragment[2];
  float d_fragment[4];
  for (int i = 0; i < 4; ++i) {
    a_fragment[i] = a[lane][i];
    d_fragment[i] = d[lane][i];
  }
  for (int i = 0; i < 2; ++i) b_fragment[i] = b[lane][i];
  multiply_accumulate<T>(d_fragment, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[lane][i] = d_fragment[i];
}

__global__ void round_all(const std::uint32_t* in, std::uint32_t* out, int n) {
  const int i = int(threadIdx.x);
  if (i < n) out[i] = round_to_tf32(in[i]);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT test_load_matrices(int transpose, const uint4* rows, uint4* registers, int bug,
                          int threads) {
  return launch(transpose ? load<true> : load<false>, dim3(1), dim3(unsigned(threads)), 0, nullptr,
                rows, registers, bug);
}
// type: 0 float16, 1 bfloat16, 2 TF32.
EXPORT test_multiply(int type, const std::uint32_t (*a)[4], const std::uint32_t (*b)[2],
                     float (*d)[4]) {
  return launch(type == 0   ? multiply<__half>
                : type == 1 ? multiply<__nv_bfloat16>
                            : multiply<Tf32>,
                dim3(1), dim3(32), 0, nullptr, a, b, d);
}
EXPORT test_round_to_tf32(const std::uint32_t* in, std::uint32_t* out, int n) {
  return launch(round_all, dim3(1), dim3(unsigned(n)), 0, nullptr, in, out, n);
}
