#include "cuda/activation_grad.cuh"
#include "cuda/kernels.hpp"

namespace fastconv::cuda {
namespace {

using std::int64_t;

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

SumPlan plan(const Conv2dProblem& p, bool vector, const Device& device) {
  return {p.n * p.oh * p.ow, vector ? p.k / 4 : p.k, p.layout == Layout::nhwc,
          device.multiprocessors, 1};
}

bool is_vector(const Conv2dProblem& p) { return p.layout == Layout::nhwc && p.k % 4 == 0; }

std::size_t workspace_of(const Conv2dProblem& p, bool vector, const Device& device) {
  const int64_t splits = plan(p, vector, device).splits;
  return splits > 1 ? std::size_t(splits) * std::size_t(p.k) * sizeof(float) : 0;
}

template <class T>
cudaError_t run(const Conv2dProblem& p, DataType type, const void* dy, const void* y, void* dz,
                void* dbias, const Call& call) {
  constexpr std::size_t kBytes = 4 * sizeof(T);
  const bool vector = is_vector(p) && aligned(dy, kBytes) && aligned(y, kBytes) &&
                      aligned(dz, kBytes) && aligned(dbias, kBytes);
  const SumPlan cut = plan(p, vector, call.device);
  const bool split = dbias != nullptr && cut.splits > 1;
  const Strides strides = ConvGeometry::strides(p.layout, p.oh, p.ow, p.k);
  const ActivationGradArguments<T> arguments{
      .dy = static_cast<const T*>(dy),
      .y = static_cast<const T*>(y),
      .dz = static_cast<T*>(dz),
      .dbias = static_cast<T*>(dbias),
      .partials = split ? static_cast<float*>(call.workspace) : nullptr,
      .pixels = int(p.n * p.oh * p.ow),
      .channels = int(p.k),
      .pixels_per_split = int(cut.pixels_per_split),
      .log_channels = cut.log_channels,
      .image = strides.image,
      .pixel = strides.column,
      .channel = strides.channel,
      .by_plane = FastDivisor(p.oh * p.ow),
      .by_channel_blocks = FastDivisor(cut.channel_blocks)};
  FASTCONV_CUDA_TRY(launch(vector ? activation_grad_kernel<T, 4> : activation_grad_kernel<T, 1>,
                           dim3(unsigned(cut.channel_blocks * cut.splits)), dim3(kSumThreads), 0,
                           call.stream, arguments));
  if (!split) return cudaSuccess;
  return sum_splits(type, {.out = dbias, .count = p.k, .splits = int(cut.splits)}, call);
}

}  // namespace

std::size_t activation_grad_workspace_bytes(const Conv2dProblem& p, DataType,
                                            const Device& device) {
  // A pointer may be aligned to less than vectors need.
  return std::max(workspace_of(p, is_vector(p), device), workspace_of(p, false, device));
}

cudaError_t activation_grad(const Conv2dProblem& p, DataType type, const void* dy, const void* y,
                            void* dz, void* dbias, const Call& call) {
  switch (type) {
    case DataType::float32: return run<float>(p, type, dy, y, dz, dbias, call);
    case DataType::float16: return run<__half>(p, type, dy, y, dz, dbias, call);
    default: return run<__nv_bfloat16>(p, type, dy, y, dz, dbias, call);
  }
}

}  // namespace fastconv::cuda
