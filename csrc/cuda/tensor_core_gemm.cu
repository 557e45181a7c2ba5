#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <limits>

#include "cuda/kernels.hpp"
#include "cuda/tensor_core_gemm.cuh"
#include "cuda/throughput.hpp"

namespace fastconv::cuda {
namespace {

using namespace tensor_core;

enum class Shape { large, narrow, small };

struct Plan {
  Copies copies = Copies::gather;
  Shape shape = Shape::small;
  int vector = 8;  // elements of a chunk
  std::int64_t padded_channels = 0, sum_channels = 0, columns = 0;
  std::int64_t row_tiles = 0, column_tiles = 0;
  std::int64_t classes = 1;                   // of dgrad's pixels
  std::int64_t parts = 1, slices_a_part = 0;  // of the sum; of wgrad, a slice is of pixels
  double seconds = 0;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int rows_of(Shape shape) { return shape == Shape::small ? Small::kRows : Large::kRows; }
int columns_of(Shape shape) { return shape == Shape::large ? Large::kColumns : Small::kColumns; }
int blocks_of(Shape shape) {
  return shape == Shape::large    ? Large::kBlocks
         : shape == Shape::narrow ? Narrow::kBlocks
                                  : Small::kBlocks;
}

// The share of the peak that the main loop can reach, by what shared memory must deliver a product.
double efficiency(Shape shape, Copies copies) {
  if (copies == Copies::gather) return 0.15;
  return shape == Shape::large ? 0.75 : shape == Shape::narrow ? 0.65 : 0.5;
}

// The sizes of the matrices; M per layer.
struct Matrices {
  std::int64_t rows, columns, sum;
  std::int64_t longest_sum;  // of dgrad, whose classes have more or fewer taps
};

Matrices matrices(const Conv2dSpec& spec, const ConvGeometry& g, std::int64_t padded_channels) {
  const Conv2dProblem& p = spec.problem;
  const std::int64_t taps = p.r * p.s;
  switch (spec.direction) {
    case Direction::fprop: {
      const std::int64_t sum = taps * padded_channels;
      return {p.n * p.oh * p.ow, p.k_per_group(), sum, sum};
    }
    case Direction::dgrad:
      return {p.n * g.rows.class_pixels * g.columns.class_pixels, p.c_per_group(),
              ceil_div(taps, g.dgrad_classes()) * padded_channels,
              ceil_div(p.r, g.rows.tap_step) * ceil_div(p.s, g.columns.tap_step) * padded_channels};
    default: {
      const std::int64_t sum = p.n * p.oh * p.ow;
      return {taps * padded_channels, p.k_per_group(), sum, sum};
    }
  }
}

std::int64_t out_size(const Conv2dSpec& spec) {
  const Conv2dProblem& p = spec.problem;
  return spec.direction == Direction::fprop   ? p.y_size()
         : spec.direction == Direction::dgrad ? p.x_size()
                                              : p.filter_size();
}

// Whether the kernel writes parts that a second pass adds up: those are float32.
bool second_pass(const Conv2dSpec& spec, const Plan& plan) {
  return plan.parts > 1 || (spec.direction == Direction::wgrad && spec.type != DataType::float32);
}

// What a sum that is split into parts may take of the device's memory, unless one part takes more.
constexpr std::int64_t kMostPartBytes = std::int64_t{64} << 20;
constexpr std::int64_t kLeastSlicesAPart = 8;

Plan plan_for(const Conv2dSpec& spec, const Device& device, Copies copies, Shape shape,
              std::int64_t most_parts, const ConvGeometry& g) {
  const Conv2dProblem& p = spec.problem;
  Plan plan;
  plan.copies = copies;
  plan.shape = shape;
  plan.vector = spec.type == DataType::float32 ? 4 : 8;
  plan.sum_channels = spec.direction == Direction::dgrad ? p.k_per_group() : p.c_per_group();
  plan.padded_channels = ceil_div(plan.sum_channels, plan.vector) * plan.vector;
  const Matrices m = matrices(spec, g, plan.padded_channels);
  plan.columns = m.columns;
  plan.row_tiles = ceil_div(m.rows, rows_of(shape));
  plan.column_tiles = ceil_div(m.columns, columns_of(shape));
  if (spec.direction == Direction::dgrad) plan.classes = g.dgrad_classes();
  const std::int64_t slice = kChunksAlongSum * plan.vector, slices = ceil_div(m.sum, slice);
  const std::int64_t tiles = plan.row_tiles * plan.column_tiles * p.groups * plan.classes;
  const std::int64_t at_once = std::int64_t{device.multiprocessors} * blocks_of(shape);
  const std::int64_t longest = std::max<std::int64_t>(1, ceil_div(m.longest_sum, slice));
  // Pixels of dgrad that no tap reaches would have no part.
  const bool gaps = spec.direction == Direction::dgrad && g.dgrad_leaves_gaps();
  const std::int64_t limits[] = {gaps ? 1 : most_parts, kMostPartBytes / (4 * out_size(spec)),
                                 longest / kLeastSlicesAPart, at_once / tiles};
  const std::int64_t parts = std::max<std::int64_t>(1, std::ranges::min(limits));
  plan.slices_a_part = ceil_div(longest, parts);
  plan.parts = ceil_div(longest, plan.slices_a_part);
  const std::int64_t slices_a_block = std::min(slices, plan.slices_a_part);

  // A multiprocessor's share of the blocks, one alone not hiding its latencies; or memory.
  const double share = static_cast<double>(ceil_div(tiles * plan.parts, device.multiprocessors));
  const bool hides_little = copies != Copies::async && share < std::min(3, blocks_of(shape));
  const double hidden = share < 2 ? 0.6 : hides_little ? 0.8 : 1.0;
  const Throughput speed = throughput(device);
  // TF32 has half the products of float16 an instruction, and is rounded or turned on its way.
  const double fma_per_cycle = speed.tensor_fma_per_cycle *
                               (spec.type == DataType::float32 ? 0.35 : 1.0) *
                               efficiency(shape, copies) * hidden;
  const double fma_a_block =
      static_cast<double>(slices_a_block * slice) * rows_of(shape) * columns_of(shape);
  constexpr double kCyclesToStart = 2000;
  const double bytes = static_cast<double>(p.x_size() + p.y_size() + p.filter_size()) *
                       static_cast<double>(size_of(spec.type));
  const double of_products =
      (share * fma_a_block / fma_per_cycle + kCyclesToStart) / speed.cycles_per_second;
  const double of_memory = bytes / speed.bytes_per_second;
  // The two overlap, but not wholly: of tiles that memory holds back alike, those with less work.
  plan.seconds =
      std::max(of_products, of_memory) + 0.25 * std::min(of_products, of_memory) + kLaunchSeconds;
  if (second_pass(spec, plan)) {
    const double part_bytes = 8.0 * static_cast<double>(plan.parts * out_size(spec));
    plan.seconds += part_bytes / speed.bytes_per_second + kLaunchSeconds;
  }
  return plan;
}

bool whole_chunks(const Conv2dSpec& spec) {
  const Conv2dProblem& p = spec.problem;
  const std::int64_t vector = spec.type == DataType::float32 ? 4 : 8;
  return p.layout == Layout::nhwc && p.c_per_group() % vector == 0 && p.k_per_group() % vector == 0;
}

Plan plan(const Conv2dSpec& spec, const Device& device) {
  constexpr std::int64_t kAny = 65535;
  const ConvGeometry g(spec.problem);
  Plan best;
  best.seconds = std::numeric_limits<double>::infinity();
  const auto consider = [&](Copies copies, Shape shape) {
    for (const std::int64_t most_parts :
         {std::int64_t{1}, std::int64_t{2}, std::int64_t{4}, kAny}) {
      const Plan other = plan_for(spec, device, copies, shape, most_parts, g);
      if (other.seconds < best.seconds) best = other;
      if (other.parts < most_parts) break;
    }
  };
  if (!whole_chunks(spec)) {
    consider(Copies::gather, Shape::small);
    return best;
  }
  const bool turned = spec.direction == Direction::wgrad && spec.type == DataType::float32;
  const bool old = device.compute_capability < 80;
  const Copies copies = turned || old ? Copies::registers : Copies::async;
  consider(copies, Shape::large);
  if (!old) consider(copies, Shape::narrow);
  consider(copies, Shape::small);
  return best;
}

bool serves(const Conv2dSpec& spec, const Device& device) {
  const Conv2dProblem& p = spec.problem;
  if (spec.type == DataType::float32 && spec.math != Float32Math::tf32) return false;
  if (device.compute_capability < (spec.type == DataType::float16 ? 75 : 80)) return false;
  if (!ConvGeometry::fits(p)) return false;
  constexpr std::int64_t kLimit = (std::int64_t{1} << 31) - (1 << 16);
  const Plan made = plan(spec, device);
  const Matrices m = matrices(spec, ConvGeometry(p), made.padded_channels);
  return m.rows < kLimit && p.r * p.s * made.padded_channels < kLimit &&
         made.row_tiles * made.column_tiles < kLimit && p.groups <= 65535 &&
         made.classes * made.parts <= 65535;
}

std::size_t workspace_bytes(const Conv2dSpec& spec, const Device& device) {
  const Plan made = plan(spec, device);
  if (!second_pass(spec, made)) return 0;
  return static_cast<std::size_t>(made.parts * out_size(spec)) * 4;
}

double estimate(const Conv2dSpec& spec, const Device& device) { return plan(spec, device).seconds; }

std::string blocking(const Conv2dSpec& spec, const Device& device) {
  const Plan made = plan(spec, device);
  std::string text = std::to_string(rows_of(made.shape)) + "x" +
                     std::to_string(columns_of(made.shape)) + "x" +
                     std::to_string(kChunksAlongSum * made.vector) + " tiles of ";
  text += spec.type == DataType::float16    ? "float16"
          : spec.type == DataType::bfloat16 ? "bfloat16"
                                            : "tf32";
  text += made.copies == Copies::async       ? ", 3 slices by cp.async"
          : made.copies == Copies::registers ? ", 2 slices through registers"
                                             : ", 2 slices element by element";
  const std::int64_t slice = kChunksAlongSum * made.vector;
  if (spec.direction == Direction::dgrad && made.classes > 1) {
    text += ", classes of pixels: " + std::to_string(made.classes);
  }
  if (spec.direction == Direction::wgrad || made.parts > 1) {
    text += ", parts of " + std::to_string(made.slices_a_part * slice) +
            (spec.direction == Direction::wgrad ? " pixels: " : " products: ") +
            std::to_string(made.parts);
  }
  return text;
}

// --- launch ---------------------------------------------------------------------------------------

using Kernel = void (*)(Parameters);

template <class T, Direction kDirection, Copies kCopies>
Kernel kernel(Shape shape) {
  switch (shape) {
    case Shape::large: return tensor_core_gemm<T, kDirection, kCopies, Large>;
    case Shape::narrow: return tensor_core_gemm<T, kDirection, kCopies, Narrow>;
    default: return tensor_core_gemm<T, kDirection, kCopies, Small>;
  }
}

template <class T, Direction kDirection>
Kernel kernel(Copies copies, Shape shape) {
  if (copies == Copies::gather) return tensor_core_gemm<T, kDirection, Copies::gather, Small>;
  if constexpr (kTurnsBoth<T, kDirection>) {
    return kernel<T, kDirection, Copies::registers>(shape);
  } else {
    if constexpr (std::is_same_v<T, __half>) {
      if (copies == Copies::registers) {
        return shape == Shape::large ? tensor_core_gemm<T, kDirection, Copies::registers, Large>
                                     : tensor_core_gemm<T, kDirection, Copies::registers, Small>;
      }
    }
    return kernel<T, kDirection, Copies::async>(shape);
  }
}

template <class T>
Kernel kernel(Direction direction, const Plan& plan) {
  switch (direction) {
    case Direction::fprop: return kernel<T, Direction::fprop>(plan.copies, plan.shape);
    case Direction::dgrad: return kernel<T, Direction::dgrad>(plan.copies, plan.shape);
    default: return kernel<T, Direction::wgrad>(plan.copies, plan.shape);
  }
}

Kernel kernel(const Conv2dSpec& spec, const Plan& plan) {
  switch (spec.type) {
    case DataType::float16: return kernel<__half>(spec.direction, plan);
    case DataType::bfloat16: return kernel<__nv_bfloat16>(spec.direction, plan);
    default: return kernel<Tf32>(spec.direction, plan);
  }
}

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  });
}

cudaError_t run(const Conv2dSpec& spec, const Conv2dOperands& operands, const Call& call) {
  const Conv2dProblem& p = spec.problem;
  Plan made = plan(spec, call.device);
  const bool by_parts = second_pass(spec, made);
  Parameters a{ConvGeometry(p)};
  a.image = spec.direction == Direction::dgrad ? operands.dy : operands.x;
  a.second = spec.direction == Direction::wgrad ? operands.dy : operands.filter;
  a.bias = spec.direction == Direction::fprop ? operands.bias : nullptr;
  a.out = by_parts ? call.workspace : operands.out;
  if (made.copies != Copies::gather && !aligned({a.image, a.second, a.out})) {
    made = plan_for(spec, call.device, Copies::gather, Shape::small, made.parts, a.g);
  }
  a.sum_channels = static_cast<int>(made.sum_channels);
  a.padded_channels = static_cast<int>(made.padded_channels);
  a.columns = static_cast<int>(made.columns);
  a.column_tiles = static_cast<int>(made.column_tiles);
  a.classes = static_cast<int>(made.classes);
  a.by_parts = by_parts;
  a.slices_a_part = static_cast<int>(made.slices_a_part);
  a.part_elements = static_cast<int>(out_size(spec));
  // Bias and ReLU are the second pass's where there is one.
  const void* const bias = a.bias;
  const bool relu = spec.direction == Direction::fprop && p.activation == Activation::relu;
  if (by_parts) a.bias = nullptr;
  a.relu = relu && !by_parts;
  a.channels_first = p.layout == Layout::nchw;
  a.by_padded_channels = FastDivisor(made.padded_channels);
  if (spec.direction == Direction::dgrad && a.g.dgrad_leaves_gaps()) {
    FASTCONV_CUDA_TRY(cudaMemsetAsync(
        operands.out, 0, static_cast<std::size_t>(p.x_size()) * size_of(spec.type), call.stream));
  }
  const dim3 grid(static_cast<unsigned>(made.row_tiles * made.column_tiles),
                  static_cast<unsigned>(p.groups),
                  static_cast<unsigned>(made.classes * made.parts));
  FASTCONV_CUDA_TRY(launch(kernel(spec, made), grid, dim3(kThreads), 0, call.stream, a));
  if (!by_parts) return cudaSuccess;
  SplitKSum sum;
  sum.out = operands.out;
  sum.bias = bias;
  sum.count = out_size(spec);
  sum.splits = static_cast<int>(made.parts);
  sum.inner = p.layout == Layout::nchw ? p.oh * p.ow : 1;
  sum.channels = p.k;
  sum.relu = relu;
  return sum_splits(spec.type, sum, call);
}

}  // namespace

const Conv2dAlgorithm kTensorCoreGemm{"tensor_core_gemm", serves,   workspace_bytes,
                                      estimate,           blocking, run};

}  // namespace fastconv::cuda
