#include "cuda/kernels.hpp"
#include "cuda/split_k.cuh"

namespace fastconv::cuda {
namespace {

template <class T>
cudaError_t run(const SplitKSum& sum, const Call& call) {
  SplitKArguments<T> a{};
  a.partials = static_cast<const float*>(call.workspace);
  a.out = static_cast<T*>(sum.out);
  a.bias = static_cast<const T*>(sum.bias);
  a.count = int(sum.count);
  a.splits = sum.splits;
  a.by_inner = FastDivisor(sum.inner);
  a.by_channels = FastDivisor(sum.channels);
  a.relu = sum.relu;
  const bool vector =
      sum.count % 4 == 0 && reinterpret_cast<std::uintptr_t>(sum.out) % (4 * sizeof(T)) == 0;
  const std::int64_t per_block = 256 * (vector ? 4 : 1);
  const dim3 grid(unsigned((sum.count + per_block - 1) / per_block));
  return launch(vector ? sum_splits_kernel<T, 4> : sum_splits_kernel<T, 1>, grid, dim3(256), 0,
                call.stream, a);
}

}  // namespace

cudaError_t sum_splits(DataType type, const SplitKSum& sum, const Call& call) {
  switch (type) {
    case DataType::float32: return run<float>(sum, call);
    case DataType::float16: return run<__half>(sum, call);
    default: return run<__nv_bfloat16>(sum, call);
  }
}

}  // namespace fastconv::cuda
