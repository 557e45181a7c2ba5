#include <algorithm>
#include <limits>
#include <optional>

#include "cuda/kernels.hpp"
#include "cuda/small_channel.cuh"
#include "cuda/throughput.hpp"

namespace fastconv::cuda {
namespace {

using std::int64_t;

constexpr int64_t kMostShared = kSharedWithoutOptIn;
// Of the multiply-add pipelines, by the instructions of the inner loops.
constexpr double kEfficiency = 0.7;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// What a launch of either direction consists of.
struct Plan {
  std::optional<Patch> patch;
  int filters = 0, tile_rows = 0;  // of a tile
  int taps = 0;                    // wgrad: of a thread
  int64_t filter_tiles = 0, depth_tiles = 1, tile_rows_count = 0, tile_columns_count = 0;
  int64_t tiles = 0, splits = 1, blocks = 0, shared_bytes = 0;
  double products = 0;  // of all blocks, idle lanes and all
};

Plan make_plan(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  const ConvGeometry g(p);
  const int64_t depth = p.r * p.s * p.c_per_group(), k = p.k_per_group();
  Plan plan;
  plan.tile_columns_count = ceil_div(p.ow, kPatchColumns);
  if (spec.direction == Direction::fprop) {
    plan.filters = k > 32 ? 64 : 32;
    plan.tile_rows = plan.filters == 64 ? 8 : 16;
  } else {
    plan.filters = kWgradFilters;
    plan.tile_rows = kWgradTileRows;
    // The fewer rows of idle threads, the better; of as many, the larger tiles.
    plan.taps = ceil_div(depth, 16) * 16 < ceil_div(depth, 32) * 32 ? 4 : 8;
    plan.depth_tiles = ceil_div(depth, 4 * plan.taps);
  }
  plan.filter_tiles = ceil_div(k, plan.filters);
  plan.tile_rows_count = ceil_div(p.oh, plan.tile_rows);
  plan.tiles = p.n * plan.tile_rows_count * plan.tile_columns_count;
  const int64_t patch = plan.patch.emplace(p, g, plan.tile_rows).words(g.c_per_group);
  const int64_t outputs = plan.tiles * plan.tile_rows * kPatchColumns;
  plan.products = double(p.groups * plan.filter_tiles * plan.filters) * double(outputs);
  if (spec.direction == Direction::fprop) {
    plan.products *= double(depth);
    plan.blocks = plan.tiles * plan.filter_tiles * p.groups;
    plan.shared_bytes = 4 * (kFilterChunk * plan.filters + patch + depth);
  } else {
    plan.products *= double(plan.depth_tiles * 4 * plan.taps);
    const int64_t blocks = plan.depth_tiles * plan.filter_tiles * p.groups;
    const int64_t wanted = ceil_div(4 * std::max(device.multiprocessors, 1), blocks);
    plan.splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(plan.tiles, 1024));
    plan.splits = ceil_div(plan.tiles, ceil_div(plan.tiles, plan.splits));
    plan.blocks = blocks * plan.splits;
    plan.shared_bytes = 4 * (kWgradTileRows * kPatchColumns * kDyPitch + patch);
  }
  return plan;
}

// A call asks for its plan several times, and the patch takes microseconds to lay out: each thread keeps
// those that it used last.
const Plan& plan(const Conv2dSpec& spec, const Device& device) {
  struct Made {
    Conv2dProblem problem;
    int multiprocessors = 0;
    std::optional<Plan> plan;
  };
  thread_local Made latest[3];
  Made& made = latest[static_cast<std::size_t>(spec.direction)];
  if (!made.plan || made.multiprocessors != device.multiprocessors ||
      !(made.problem == spec.problem)) {
    made = {spec.problem, device.multiprocessors, make_plan(spec, device)};
  }
  return *made.plan;
}

// Whether the patch is small, before its size is taken for an int.
bool patch_fits(const Conv2dProblem& p) {
  const int64_t rows = 15 * p.stride_h + (p.r - 1) * p.dilation_h + 1;
  const int64_t columns = 15 * p.stride_w + (p.s - 1) * p.dilation_w + 1;
  return rows < kMostShared && columns < kMostShared && rows * columns < kMostShared;
}

bool serves(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  if (spec.direction == Direction::dgrad || p.c_per_group() > 4 || !ConvGeometry::fits(p) ||
      !patch_fits(p)) {
    return false;
  }
  const Plan& chosen = plan(spec, device);
  return chosen.shared_bytes <= kMostShared && chosen.blocks <= std::numeric_limits<int>::max() &&
         chosen.tiles <= std::numeric_limits<int>::max();
}

std::size_t workspace_bytes(const Conv2dSpec& spec, const Device& device) {
  const Plan& chosen = plan(spec, device);
  return chosen.splits > 1
             ? std::size_t(chosen.splits) * std::size_t(spec.problem.filter_size()) * sizeof(float)
             : 0;
}

double estimate(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  const Throughput speed = throughput(device);
  const Plan& chosen = plan(spec, device);
  const double multiprocessors = std::max(device.multiprocessors, 1);
  // Whole rounds of blocks; two of four warps fill a multiprocessor.
  const double in_turn = double(ceil_div(chosen.blocks, int64_t(multiprocessors)));
  const double fill = std::min(1.0, in_turn / 2);
  const double rate = speed.fma_per_cycle * speed.cycles_per_second * kEfficiency * multiprocessors;
  const double balance = in_turn * multiprocessors / double(chosen.blocks);
  const double bytes = double(size_of(spec.type)) * double(p.x_size() + p.y_size());
  return std::max(chosen.products * balance / (rate * fill), bytes / speed.bytes_per_second) +
         kLaunchSeconds * (chosen.splits > 1 ? 2 : 1);
}

std::string blocking(const Conv2dSpec& spec, const Device& device) {
  const Plan& chosen = plan(spec, device);
  std::string text = std::to_string(chosen.tile_rows) + "x" + std::to_string(kPatchColumns) +
                     " outputs x " + std::to_string(chosen.filters) + " filters";
  if (chosen.taps > 0) text += ", " + std::to_string(chosen.taps) + "x8 weights a thread";
  if (chosen.splits > 1) text += ", " + std::to_string(chosen.splits) + " splits";
  return text;
}

template <class T>
cudaError_t run(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  const Conv2dProblem& p = spec.problem;
  const Plan& chosen = plan(spec, call.device);
  const bool forward = spec.direction == Direction::fprop, split = chosen.splits > 1;
  const void* vectors = forward ? operands.out : operands.dy;  // read or written in fours
  const SmallChannelArguments<T> arguments{
      .x = static_cast<const T*>(operands.x),
      .filter = static_cast<const T*>(operands.filter),
      .bias = static_cast<const T*>(operands.bias),
      .dy = static_cast<const T*>(operands.dy),
      .out = static_cast<T*>(operands.out),
      .partials = split ? static_cast<float*>(call.workspace) : nullptr,
      .g = ConvGeometry(p),
      .patch = *chosen.patch,
      .depth = int(p.r * p.s * p.c_per_group()),
      .tiles = int(chosen.tiles),
      .splits = int(chosen.splits),
      .by_filter_tiles = FastDivisor(chosen.filter_tiles),
      .by_depth_tiles = FastDivisor(chosen.depth_tiles),
      .by_tile_columns = FastDivisor(chosen.tile_columns_count),
      .by_tile_rows = FastDivisor(chosen.tile_rows_count),
      .by_splits = FastDivisor(forward ? p.n : chosen.splits),
      .relu = p.activation == Activation::relu,
      .channels_last = p.layout == Layout::nhwc,
      .vector =
          p.layout == Layout::nhwc && p.k_per_group() % 4 == 0 && aligned(vectors, 4 * sizeof(T))};
  const auto kernel = forward ? (chosen.filters == 64 ? small_channel_fprop_kernel<T, 64>
                                                      : small_channel_fprop_kernel<T, 32>)
                      : chosen.taps == 8 ? small_channel_wgrad_kernel<T, 8>
                                         : small_channel_wgrad_kernel<T, 4>;
  FASTCONV_CUDA_TRY(launch(kernel, dim3(unsigned(chosen.blocks)), dim3(kPatchThreads),
                           std::size_t(chosen.shared_bytes), call.stream, arguments));
  if (!split) return cudaSuccess;
  return sum_splits(spec.type,
                    {.out = operands.out, .count = p.filter_size(), .splits = int(chosen.splits)},
                    call);
}

cudaError_t run_of_type(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  switch (spec.type) {
    case DataType::float32: return run<float>(spec, operands, call);
    case DataType::float16: return run<__half>(spec, operands, call);
    default: return run<__nv_bfloat16>(spec, operands, call);
  }
}

}  // namespace

const Conv2dAlgorithm kSmallChannel{.name = "small_channel",
                                    .serves = serves,
                                    .workspace_bytes = workspace_bytes,
                                    .estimate = estimate,
                                    .blocking = blocking,
                                    .run = run_of_type};

}  // namespace fastconv::cuda
