#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/kernels.hpp"
#include "cuda/simt_gemm.cuh"
#include "cuda/throughput.hpp"

namespace fastconv::cuda {
namespace {

using std::int64_t;

struct TileShape {
  int rows, columns;
  double efficiency;  // of the multiply-add pipelines: the share of multiply-adds in the main loop
};
constexpr TileShape kTiles[] = {{128, 128, 0.85}, {64, 64, 0.78}, {128, 32, 0.72}};
constexpr double kScalarEfficiency = 0.5;  // reads of one element at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The GEMM of a direction.
struct Shape {
  int64_t rows, columns, depth, batch;  // batch: groups x classes
  int64_t out_count;

  Shape(const Conv2dSpec& spec, const ConvGeometry& g) {
    const Conv2dProblem& p = spec.problem;
    batch = p.groups;
    switch (spec.direction) {
      case Direction::fprop:
        rows = p.n * p.oh * p.ow, columns = p.k_per_group();
        depth = p.r * p.s * p.c_per_group();
        out_count = p.y_size();
        break;
      case Direction::dgrad:
        rows = p.n * g.rows.class_pixels * g.columns.class_pixels, columns = p.c_per_group();
        depth = int64_t((p.r - 1) / g.rows.tap_step + 1) * ((p.s - 1) / g.columns.tap_step + 1) *
                p.k_per_group();
        batch *= g.dgrad_classes();
        out_count = p.x_size();
        break;
      default:
        rows = p.r * p.s * p.c_per_group(), columns = p.k_per_group();
        depth = p.n * p.oh * p.ow;
        out_count = p.filter_size();
    }
  }
};

// Whether operands may be read four at a time, as far as C, K and the planes decide it.
bool is_vector(const Conv2dSpec& spec) {
  const Conv2dProblem& p = spec.problem;
  if (spec.type != DataType::float32 || p.r * p.s > kMostTaps) return false;
  const int64_t c = p.c_per_group(), k = p.k_per_group();
  if (p.layout == Layout::nhwc) {
    if (c % 4 != 0 || k % 4 != 0) return false;
    if (spec.direction == Direction::fprop) return c >= 8;
    return spec.direction == Direction::wgrad || k >= 8;
  }
  switch (spec.direction) {
    case Direction::fprop: return c % 8 == 0 && k % 4 == 0;
    case Direction::dgrad: return k % 8 == 0;
    default: {
      const int64_t taps = std::min(p.r * p.s, ceil_div(kTiles[0].rows - 1, c) + 1);
      return k % 4 == 0 && p.oh * p.ow % 4 == 0 && taps <= kMostTapsOfTile;
    }
  }
}

struct Plan {
  TileShape tile{};
  int splits = 1;
  int64_t depth_per_split = 0;
  int64_t blocks = 0;
  double seconds = std::numeric_limits<double>::infinity();
};

// A block waits for nothing else: a multiprocessor takes its share of the blocks in turn, and its
// pipelines are full with eight warps.
Plan plan(const Conv2dSpec& spec, const Device& device, const Shape& shape, bool vector) {
  constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256};
  constexpr int64_t kMostPartialBytes = int64_t{256} << 20;
  const Throughput speed = throughput(device);
  const int64_t multiprocessors = std::max(device.multiprocessors, 1);
  const double bytes =
      double(size_of(spec.type)) *
      double(spec.problem.x_size() + spec.problem.y_size() + spec.problem.filter_size());
  Plan best;
  for (const TileShape& tile : kTiles) {
    if (!vector && tile.rows != tile.columns) continue;
    if (!vector && tile.rows != 64) continue;
    if (tile.columns == 32 && spec.direction == Direction::wgrad &&
        spec.problem.layout == Layout::nchw) {
      continue;  // too many taps a thread
    }
    const int64_t tiles =
        ceil_div(shape.rows, tile.rows) * ceil_div(shape.columns, tile.columns) * shape.batch;
    const int64_t threads = tile.rows * tile.columns / 64;
    const int64_t chunks = ceil_div(shape.depth, 8);
    for (int splits : kSplits) {
      if (splits > 1 && (splits * 2 > chunks || splits * shape.out_count * 4 > kMostPartialBytes)) {
        break;
      }
      const int64_t chunks_per_split = ceil_div(chunks, splits);
      const int64_t used = ceil_div(chunks, chunks_per_split);
      const int64_t blocks = tiles * used;
      const int64_t blocks_in_turn = ceil_div(blocks, multiprocessors);
      const double warps = double(std::min<int64_t>(blocks_in_turn * threads / 32, 8));
      const double fma = double(chunks_per_split + 4) * 8 * tile.rows * tile.columns;
      double seconds = double(blocks_in_turn) * fma /
                       (speed.fma_per_cycle * speed.cycles_per_second *
                        (vector ? tile.efficiency : kScalarEfficiency) * warps / 8);
      seconds = std::max(seconds, bytes / speed.bytes_per_second) + kLaunchSeconds;
      if (used > 1) {
        seconds +=
            kLaunchSeconds + 8.0 * double(used) * double(shape.out_count) / speed.bytes_per_second;
      }
      if (seconds < best.seconds) {
        best = {tile, int(used), chunks_per_split * 8, blocks, seconds};
      }
    }
  }
  return best;
}

Plan plan(const Conv2dSpec& spec, const Device& device, bool vector) {
  return plan(spec, device, Shape(spec, ConvGeometry(spec.problem)), vector);
}

bool serves(const Conv2dSpec& spec, const Device& device) {
  return ConvGeometry::fits(spec.problem) &&
         plan(spec, device, false).blocks <= std::numeric_limits<int>::max();
}

std::size_t workspace_of(const Plan& plan, int64_t out_count) {
  return plan.splits > 1 ? std::size_t(plan.splits) * std::size_t(out_count) * sizeof(float) : 0;
}

std::size_t workspace_bytes(const Conv2dSpec& spec, const Device& device) {
  const Shape shape(spec, ConvGeometry(spec.problem));
  // A pointer may be aligned to less than vectors need.
  std::size_t bytes = workspace_of(plan(spec, device, shape, false), shape.out_count);
  if (is_vector(spec)) {
    bytes = std::max(bytes, workspace_of(plan(spec, device, shape, true), shape.out_count));
  }
  return bytes;
}

double estimate(const Conv2dSpec& spec, const Device& device) {
  return plan(spec, device, is_vector(spec)).seconds;
}

std::string blocking(const Conv2dSpec& spec, const Device& device) {
  const bool vector = is_vector(spec);
  const Plan chosen = plan(spec, device, vector);
  std::string text = std::to_string(chosen.tile.rows) + "x" + std::to_string(chosen.tile.columns) +
                     "x8 tiles" + (vector ? "" : ", scalar reads");
  if (chosen.splits > 1) text += ", " + std::to_string(chosen.splits) + " splits";
  return text;
}

template <class T, Direction kDirection, Layout kLayout, class Tile, int kVector>
cudaError_t launch_tile(const SimtGemmArguments<T>& a, int64_t blocks, cudaStream_t stream) {
  return launch(simt_gemm_kernel<T, kDirection, kLayout, Tile, kVector>, dim3(unsigned(blocks)),
                dim3(Tile::kThreads), 0, stream, a);
}

template <class T, Direction kDirection, Layout kLayout>
cudaError_t launch_layout(const SimtGemmArguments<T>& a, const Plan& plan, bool vector,
                          cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (vector && plan.tile.rows == 128 && plan.tile.columns == 128) {
      return launch_tile<T, kDirection, kLayout, SimtTile<128, 128>, 4>(a, plan.blocks, stream);
    }
    if constexpr (kDirection != Direction::wgrad || kLayout == Layout::nhwc) {
      if (vector && plan.tile.columns == 32) {
        return launch_tile<T, kDirection, kLayout, SimtTile<128, 32>, 4>(a, plan.blocks, stream);
      }
    }
    if (vector) {
      return launch_tile<T, kDirection, kLayout, SimtTile<64, 64>, 4>(a, plan.blocks, stream);
    }
  }
  return launch_tile<T, kDirection, kLayout, SimtTile<64, 64>, 1>(a, plan.blocks, stream);
}

template <class T, Direction kDirection>
cudaError_t launch_direction(const SimtGemmArguments<T>& a, const Plan& plan, Layout layout,
                             bool vector, cudaStream_t stream) {
  return layout == Layout::nhwc
             ? launch_layout<T, kDirection, Layout::nhwc>(a, plan, vector, stream)
             : launch_layout<T, kDirection, Layout::nchw>(a, plan, vector, stream);
}

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

template <class T>
cudaError_t run(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  const Conv2dProblem& p = spec.problem;
  const ConvGeometry g(p);
  const Shape shape(spec, g);
  const bool forward = spec.direction == Direction::fprop;
  const void* a = spec.direction == Direction::dgrad ? operands.dy : operands.x;
  const void* b = spec.direction == Direction::wgrad ? operands.dy : operands.filter;
  const bool vector = is_vector(spec) && aligned(a, 4 * sizeof(T)) && aligned(b, 4 * sizeof(T)) &&
                      aligned(operands.out, 4 * sizeof(T));
  const Plan chosen = plan(spec, call.device, shape, vector);
  const bool split = chosen.splits > 1;

  SimtGemmArguments<T> arguments{.a = static_cast<const T*>(a),
                                 .b = static_cast<const T*>(b),
                                 .bias = forward ? static_cast<const T*>(operands.bias) : nullptr,
                                 .out = static_cast<T*>(operands.out),
                                 .partials = split ? static_cast<float*>(call.workspace) : nullptr,
                                 .g = g,
                                 .rows = int(shape.rows),
                                 .columns = int(shape.columns),
                                 .depth_per_split = int(chosen.depth_per_split),
                                 .out_count = int(shape.out_count),
                                 .by_column_tiles = {},
                                 .by_row_tiles = {},
                                 .by_splits = FastDivisor(chosen.splits),
                                 .by_classes = FastDivisor(shape.batch / p.groups),
                                 .relu = forward && p.activation == Activation::relu,
                                 .vector_rows = false};
  arguments.by_column_tiles = FastDivisor(ceil_div(shape.columns, chosen.tile.columns));
  arguments.by_row_tiles = FastDivisor(ceil_div(shape.rows, chosen.tile.rows));
  const bool plain = forward || (g.rows.stride == 1 && g.columns.stride == 1);
  const int64_t plane = forward ? p.oh * p.ow : p.h * p.w;
  arguments.vector_rows = p.layout == Layout::nchw && plain && plane % 4 == 0 &&
                          (split || aligned(operands.out, 4 * sizeof(T)));

  if (spec.direction == Direction::dgrad && g.dgrad_leaves_gaps()) {
    void* to = split ? call.workspace : operands.out;
    const std::size_t bytes =
        split ? workspace_of(chosen, shape.out_count) : std::size_t(shape.out_count) * sizeof(T);
    FASTCONV_CUDA_TRY(cudaMemsetAsync(to, 0, bytes, call.stream));
  }
  switch (spec.direction) {
    case Direction::fprop:
      FASTCONV_CUDA_TRY((
          launch_direction<T, Direction::fprop>(arguments, chosen, p.layout, vector, call.stream)));
      break;
    case Direction::dgrad:
      FASTCONV_CUDA_TRY((
          launch_direction<T, Direction::dgrad>(arguments, chosen, p.layout, vector, call.stream)));
      break;
    default:
      FASTCONV_CUDA_TRY((
          launch_direction<T, Direction::wgrad>(arguments, chosen, p.layout, vector, call.stream)));
  }
  if (!split) return cudaSuccess;
  return sum_splits(spec.type,
                    {.out = operands.out,
                     .bias = arguments.bias,
                     .count = shape.out_count,
                     .splits = chosen.splits,
                     .inner = p.layout == Layout::nchw ? plane : 1,
                     .channels = p.k,
                     .relu = arguments.relu},
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

const Conv2dAlgorithm kSimtGemm{.name = "simt_gemm",
                                .serves = serves,
                                .workspace_bytes = workspace_bytes,
                                .estimate = estimate,
                                .blocking = blocking,
                                .run = run_of_type};

}  // namespace fastconv::cuda
