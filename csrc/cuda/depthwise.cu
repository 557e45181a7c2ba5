#include <algorithm>
#include <limits>

#include "cuda/depthwise.cuh"
#include "cuda/kernels.hpp"
#include "cuda/throughput.hpp"

namespace fastconv::cuda {
namespace {

using std::int64_t;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_vector(const Conv2dProblem& p) {
  return p.layout == Layout::nhwc && p.k == p.c && p.c % 4 == 0;
}

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// --- fprop and dgrad -----------------------------------------------------------------------------

// The threads of a class, and the blocks of all classes.
struct Shape {
  int64_t channels, row_blocks, threads, class_blocks, blocks;

  Shape(const Conv2dSpec& spec, const ConvGeometry& g, bool vector) {
    const Conv2dProblem& p = spec.problem;
    const bool forward = spec.direction == Direction::fprop;
    channels = (forward ? p.k : p.c) / (vector ? 4 : 1);
    row_blocks = ceil_div(forward ? p.oh : g.rows.class_pixels, kDepthwiseRows);
    threads = p.n * row_blocks * (forward ? p.ow : g.columns.class_pixels) * channels;
    class_blocks = ceil_div(threads, kDepthwiseThreads);
    blocks = class_blocks * (forward ? 1 : g.dgrad_classes());
  }
};

template <class T, Direction kDirection>
cudaError_t run_gather(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  const Conv2dProblem& p = spec.problem;
  constexpr bool kForward = kDirection == Direction::fprop;
  constexpr std::size_t kBytes = 4 * sizeof(T);
  const void* a = kForward ? operands.x : operands.dy;
  const bool vector = is_vector(p) && aligned(a, kBytes) && aligned(operands.filter, kBytes) &&
                      aligned(operands.out, kBytes) && aligned(operands.bias, kBytes);
  const ConvGeometry g(p);
  const Shape shape(spec, g, vector);
  if (!kForward && g.dgrad_leaves_gaps()) {
    FASTCONV_CUDA_TRY(
        cudaMemsetAsync(operands.out, 0, std::size_t(p.x_size()) * sizeof(T), call.stream));
  }
  const DepthwiseArguments<T> arguments{
      .a = static_cast<const T*>(a),
      .filter = static_cast<const T*>(operands.filter),
      .bias = kForward ? static_cast<const T*>(operands.bias) : nullptr,
      .out = static_cast<T*>(operands.out),
      .g = g,
      .threads = int(shape.threads),
      .by_class_blocks = FastDivisor(shape.class_blocks),
      .by_row_blocks = FastDivisor(shape.row_blocks),
      .by_channels = FastDivisor(shape.channels),
      .relu = kForward && p.activation == Activation::relu};
  const auto kernel = p.layout == Layout::nchw ? depthwise_kernel<T, kDirection, Layout::nchw, 1>
                      : vector                 ? depthwise_kernel<T, kDirection, Layout::nhwc, 4>
                                               : depthwise_kernel<T, kDirection, Layout::nhwc, 1>;
  return launch(kernel, dim3(unsigned(shape.blocks)), dim3(kDepthwiseThreads), 0, call.stream,
                arguments);
}

// --- wgrad ---------------------------------------------------------------------------------------

int64_t tap_blocks(const Conv2dProblem& p) { return ceil_div(p.r * p.s, kDepthwiseTaps); }

SumPlan plan_wgrad(const Conv2dProblem& p, bool vector, const Device& device) {
  return {p.n * p.oh * p.ow, vector ? p.k / 4 : p.k, p.layout == Layout::nhwc,
          device.multiprocessors, tap_blocks(p)};
}

std::size_t workspace_of(const Conv2dProblem& p, bool vector, const Device& device) {
  const int64_t splits = plan_wgrad(p, vector, device).splits;
  return splits > 1 ? std::size_t(splits) * std::size_t(p.filter_size()) * sizeof(float) : 0;
}

template <class T>
cudaError_t run_wgrad(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  const Conv2dProblem& p = spec.problem;
  constexpr std::size_t kBytes = 4 * sizeof(T);
  const bool vector = is_vector(p) && aligned(operands.x, kBytes) && aligned(operands.dy, kBytes) &&
                      aligned(operands.out, kBytes);
  const SumPlan cut = plan_wgrad(p, vector, call.device);
  const bool split = cut.splits > 1;
  const DepthwiseWgradArguments<T> arguments{
      .x = static_cast<const T*>(operands.x),
      .dy = static_cast<const T*>(operands.dy),
      .out = static_cast<T*>(operands.out),
      .partials = split ? static_cast<float*>(call.workspace) : nullptr,
      .g = ConvGeometry(p),
      .pixels_per_split = int(cut.pixels_per_split),
      .log_channels = cut.log_channels,
      .by_channel_blocks = FastDivisor(cut.channel_blocks),
      .by_tap_blocks = FastDivisor(tap_blocks(p))};
  const auto kernel = p.layout == Layout::nchw ? depthwise_wgrad_kernel<T, Layout::nchw, 1>
                      : vector                 ? depthwise_wgrad_kernel<T, Layout::nhwc, 4>
                                               : depthwise_wgrad_kernel<T, Layout::nhwc, 1>;
  FASTCONV_CUDA_TRY(launch(kernel, dim3(unsigned(cut.channel_blocks * tap_blocks(p) * cut.splits)),
                           dim3(kSumThreads), 0, call.stream, arguments));
  if (!split) return cudaSuccess;
  return sum_splits(
      spec.type, {.out = operands.out, .count = p.filter_size(), .splits = int(cut.splits)}, call);
}

// --- the entry of the table ----------------------------------------------------------------------

bool serves(const Conv2dSpec& spec, const Device&) {
  const Conv2dProblem& p = spec.problem;
  if (p.c_per_group() != 1 || !ConvGeometry::fits(p)) return false;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (spec.direction == Direction::wgrad) return p.k * tap_blocks(p) <= kMost / 1024;
  const Shape shape(spec, ConvGeometry(p), false);
  return shape.threads <= kMost && shape.blocks <= kMost;
}

std::size_t workspace_bytes(const Conv2dSpec& spec, const Device& device) {
  if (spec.direction != Direction::wgrad) return 0;
  // A pointer may be aligned to less than vectors need.
  const Conv2dProblem& p = spec.problem;
  return std::max(workspace_of(p, is_vector(p), device), workspace_of(p, false, device));
}

// By instructions or by memory. wgrad by blocks of taps reads x and dy again, from the L2 cache
// mostly: at three times the speed.
double estimate(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  const Throughput speed = throughput(device);
  const bool wgrad = spec.direction == Direction::wgrad;
  const double products = double(p.y_size()) * double(p.r * p.s);
  const double instructions = products * (is_vector(p) ? 2.0 : wgrad ? 7.0 : 4.5);
  const double bytes = double(size_of(spec.type)) * double(p.x_size() + p.y_size());
  const double rounds = wgrad ? 1 + double(tap_blocks(p) - 1) / 3 : 1;
  // Of a grid that fills no multiprocessor, memory and pipelines see a part.
  const double threads = wgrad ? double(kSumThreads) *
                                     double(plan_wgrad(p, is_vector(p), device).splits) *
                                     double(tap_blocks(p))
                               : double(Shape(spec, ConvGeometry(p), is_vector(p)).threads);
  const double multiprocessors = std::max(device.multiprocessors, 1);
  const double fill = std::min(1.0, threads / (512 * multiprocessors));
  const double busy = std::max(instructions / (128 * multiprocessors * speed.cycles_per_second),
                               bytes * rounds / speed.bytes_per_second);
  return kLaunchSeconds * (wgrad ? 2 : 1) + busy / fill;
}

std::string blocking(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  const std::string reads = is_vector(p) ? "4 channels" : "1 channel";
  if (spec.direction != Direction::wgrad) {
    return reads + " x " + std::to_string(kDepthwiseRows) + " rows a thread";
  }
  const SumPlan cut = plan_wgrad(p, is_vector(p), device);
  std::string text = reads + " x " + std::to_string(kDepthwiseTaps) + " taps a thread";
  if (cut.splits > 1) text += ", " + std::to_string(cut.splits) + " splits";
  return text;
}

template <class T>
cudaError_t run_direction(const Conv2dSpec& spec, const Conv2dOperands& operands,
                          const Call& call) {
  switch (spec.direction) {
    case Direction::fprop: return run_gather<T, Direction::fprop>(spec, operands, call);
    case Direction::dgrad: return run_gather<T, Direction::dgrad>(spec, operands, call);
    default: return run_wgrad<T>(spec, operands, call);
  }
}

cudaError_t run(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  switch (spec.type) {
    case DataType::float32: return run_direction<float>(spec, operands, call);
    case DataType::float16: return run_direction<__half>(spec, operands, call);
    default: return run_direction<__nv_bfloat16>(spec, operands, call);
  }
}

}  // namespace

const Conv2dAlgorithm kDepthwise{.name = "depthwise",
                                 .serves = serves,
                                 .workspace_bytes = workspace_bytes,
                                 .estimate = estimate,
                                 .blocking = blocking,
                                 .run = run};

}  // namespace fastconv::cuda
