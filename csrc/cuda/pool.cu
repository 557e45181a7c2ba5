#include <initializer_list>
#include <utility>

#include "cuda/kernels.hpp"
#include "cuda/pool.cuh"

namespace fastconv::cuda {
namespace {

// Whether each pointer (null ones are) is a multiple of `bytes`.
struct Aligned {
  const void* pointer;
  std::uintptr_t bytes;
};
bool all_aligned(std::initializer_list<Aligned> all) {
  for (const Aligned& one : all) {
    if (reinterpret_cast<std::uintptr_t>(one.pointer) % one.bytes != 0) return false;
  }
  return true;
}

PoolGeometry geometry(const Pool2dProblem& p, int vector, bool of_inputs) {
  const bool nhwc = p.layout == Layout::nhwc;
  const std::int64_t channels = nhwc ? p.c : 1;
  return {PoolAxis(p.h, p.oh, p.r, p.stride_h, p.pad_top),
          PoolAxis(p.w, p.ow, p.s, p.stride_w, p.pad_left),
          static_cast<int>(channels),
          static_cast<unsigned>((of_inputs ? p.x_size() : p.y_size()) / vector),
          FastDivisor(channels / vector),
          FastDivisor(p.s)};
}

// Calls go(T(), vector as a constant) by the data type and by what channels and alignment allow.
template <class T, class Go>
cudaError_t with_vector(const Pool2dProblem& p, bool aligned, const Go& go) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  if (p.layout == Layout::nhwc && p.c % kVector == 0 && aligned) {
    return go(T(), std::integral_constant<int, kVector>());
  }
  return go(T(), std::integral_constant<int, 1>());
}
template <class Go>
cudaError_t with_types(const Pool2dProblem& p, DataType type, bool aligned, const Go& go) {
  switch (type) {
    case DataType::float32: return with_vector<float>(p, aligned, go);
    case DataType::float16: return with_vector<__half>(p, aligned, go);
    default: return with_vector<__nv_bfloat16>(p, aligned, go);
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch_pool(void (*kernel)(PoolGeometry, Parameters...), const PoolGeometry& g,
                        const Call& call, const Arguments&... arguments) {
  const dim3 grid((g.results + kPoolThreads - 1) / kPoolThreads);
  return launch(kernel, grid, dim3(kPoolThreads), 0, call.stream, g, arguments...);
}

// A chunk's taps are read and written at once too: V bytes, or 16 of int32.
Aligned taps_aligned(const Pool2dProblem& p, const void* argmax) {
  return {argmax, p.argmax_fits_byte() ? std::uintptr_t{8} : std::uintptr_t{16}};
}

}  // namespace

cudaError_t max_pool2d_fprop(const Pool2dProblem& p, DataType type, const void* x, void* y,
                             void* argmax, const Call& call) {
  const bool aligned = all_aligned({{x, 16}, {y, 16}, taps_aligned(p, argmax)});
  return with_types(p, type, aligned, [&](auto element, auto vector) {
    using T = decltype(element);
    const bool bytes = p.argmax_fits_byte();
    return launch_pool(max_pool_fprop<T, vector()>, geometry(p, vector(), false), call,
                       static_cast<const T*>(x), static_cast<T*>(y),
                       static_cast<std::uint8_t*>(bytes ? argmax : nullptr),
                       static_cast<std::int32_t*>(bytes ? nullptr : argmax));
  });
}

cudaError_t max_pool2d_bprop(const Pool2dProblem& p, DataType type, const void* dy,
                             const void* argmax, void* dx, const Call& call) {
  const bool aligned = all_aligned({{dy, 16}, {dx, 16}, taps_aligned(p, argmax)});
  return with_types(p, type, aligned, [&](auto element, auto vector) {
    using T = decltype(element);
    const bool bytes = p.argmax_fits_byte();
    return launch_pool(
        max_pool_bprop<T, vector()>, geometry(p, vector(), true), call, static_cast<const T*>(dy),
        static_cast<const std::uint8_t*>(bytes ? argmax : nullptr),
        static_cast<const std::int32_t*>(bytes ? nullptr : argmax), static_cast<T*>(dx));
  });
}

cudaError_t max_pool2d_gather(const Pool2dProblem& p, DataType type, const void* x,
                              const void* argmax, void* y, const Call& call) {
  return with_types(
      p, type, all_aligned({{y, 16}, taps_aligned(p, argmax)}), [&](auto element, auto vector) {
        using T = decltype(element);
        const bool bytes = p.argmax_fits_byte();
        return launch_pool(
            max_pool_gather<T, vector()>, geometry(p, vector(), false), call,
            static_cast<const T*>(x), static_cast<const std::uint8_t*>(bytes ? argmax : nullptr),
            static_cast<const std::int32_t*>(bytes ? nullptr : argmax), static_cast<T*>(y));
      });
}

cudaError_t avg_pool2d_fprop(const Pool2dProblem& p, DataType type, const void* x, void* y,
                             const Call& call) {
  const bool aligned = all_aligned({{x, 16}, {y, 16}});
  return with_types(p, type, aligned, [&](auto element, auto vector) {
    using T = decltype(element);
    return launch_pool(avg_pool_fprop<T, vector()>, geometry(p, vector(), false), call,
                       static_cast<const T*>(x), static_cast<T*>(y));
  });
}

cudaError_t avg_pool2d_bprop(const Pool2dProblem& p, DataType type, const void* dy, void* dx,
                             const Call& call) {
  const bool aligned = all_aligned({{dy, 16}, {dx, 16}});
  return with_types(p, type, aligned, [&](auto element, auto vector) {
    using T = decltype(element);
    return launch_pool(avg_pool_bprop<T, vector()>, geometry(p, vector(), true), call,
                       static_cast<const T*>(dy), static_cast<T*>(dx));
  });
}

}  // namespace fastconv::cuda
