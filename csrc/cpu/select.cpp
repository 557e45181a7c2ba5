#include <algorithm>
#include <array>
#include <cstring>

#include "core/error.hpp"
#include "cpu/bf16_kernels.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {
namespace {

double allowed_error(Accuracy accuracy) {
  switch (accuracy) {
    case Accuracy::strict: return 0;
    case Accuracy::standard: return 1e-5;
    case Accuracy::fast: return 1;
  }
  return 0;
}

const Conv2dAlgorithm* find(const Kernels& kernels, const std::string& name) {
  for (const Conv2dAlgorithm* algorithm : kernels.conv2d) {
    if (name == algorithm->name) return algorithm;
  }
  return nullptr;
}

// The cheapest of those the accuracy allows. The direct algorithm serves everything.
const Conv2dAlgorithm& cheapest(const Kernels& kernels, const Conv2dProblem& p,
                                Direction direction) {
  const double error = allowed_error(current_accuracy());
  const Conv2dAlgorithm* best = nullptr;
  double best_cost = 0;
  for (const Conv2dAlgorithm* algorithm : kernels.conv2d) {
    if (!algorithm->serves(p, direction)) continue;
    const Estimate estimate = algorithm->estimate(p, direction);
    if (estimate.relative_error > error) continue;
    if (best && estimate.multiply_adds >= best_cost) continue;
    best = algorithm;
    best_cost = estimate.multiply_adds;
  }
  return *best;
}

// Training asks for the same few problems again and again; a decision costs more than a look-up. A
// table of the latest decisions, each thread's own, of one kind: `Wanted` is what is asked of a problem.
template <class Wanted, class Decision>
class Decisions {
 public:
  // decide(), or what it said before of the same problem under the same settings.
  template <class Decide>
  Decision of(const Conv2dProblem& problem, Wanted wanted, const Decide& decide) {
    const Question question{problem, wanted, current_isa(), selection_settings()};
    Entry& entry = entries_[slot_of(problem, wanted)];
    if (!entry.known || !(entry.question == question)) entry = {true, question, decide()};
    return entry.decision;
  }

 private:
  struct Question {
    Conv2dProblem problem;
    Wanted wanted{};
    Isa isa{};
    std::uint64_t settings = 0;
    bool operator==(const Question&) const = default;
  };
  struct Entry {
    bool known = false;
    Question question;
    Decision decision{};
  };

  static std::size_t slot_of(const Conv2dProblem& p, Wanted wanted) {
    std::uint64_t hash = static_cast<std::uint64_t>(wanted);
    for (std::int64_t value :
         {p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.stride_h, p.pad_top, p.groups}) {
      hash = (hash ^ static_cast<std::uint64_t>(value)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return hash % kSlots;
  }

  static constexpr std::size_t kSlots = 64;
  std::array<Entry, kSlots> entries_;
};

// What float32's algorithm takes for a problem of bfloat16, whose tensors are converted on the way.
double cost_by_float32(const Conv2dProblem& problem, Direction direction) {
  constexpr double kConverted = 20;  // an element
  const Conv2dProblem p = of_float32(problem);
  return choose(p, direction).estimate(p, direction).multiply_adds +
         kConverted * static_cast<double>(p.x_size() + p.y_size());
}

const Bf16Algorithm* cheapest_bf16(const Conv2dProblem& p, Direction direction) {
  const double error = allowed_error(current_accuracy());
  const Bf16Algorithm* best = nullptr;
  double best_cost = 0;
  for (const Bf16Algorithm* algorithm : bf16_algorithms()) {
    if (algorithm->is_for_its_name || !algorithm->serves(p, direction)) continue;
    const Estimate estimate = algorithm->estimate(p, direction);
    if (estimate.relative_error > error) continue;
    if (!best) best_cost = cost_by_float32(p, direction);
    if (estimate.multiply_adds >= best_cost) continue;
    best = algorithm;
    best_cost = estimate.multiply_adds;
  }
  return best;
}

PoolGradientUse cheapest_pool_gradient(const PoolGradientKernel& kernel,
                                       const Conv2dProblem& problem, bool with_dx) {
  const auto of = [&](Direction direction) {
    return choose(problem, direction).estimate(problem, direction).multiply_adds;
  };
  // The pooling's gradient writes the convolution's output, mostly zeros, and both read it.
  constexpr double kFloat = 14;
  const double unpooled = kFloat * static_cast<double>(problem.y_size());
  const double wgrad = kernel.estimate(problem, false), dense_wgrad = of(Direction::wgrad);
  if (!with_dx) return wgrad < dense_wgrad ? PoolGradientUse::wgrad : PoolGradientUse::none;
  const double both = kernel.estimate(problem, true), dense_dgrad = of(Direction::dgrad) + unpooled;
  if (both < dense_dgrad + std::min(wgrad, dense_wgrad)) return PoolGradientUse::both;
  return wgrad < dense_wgrad ? PoolGradientUse::wgrad : PoolGradientUse::none;
}

}  // namespace

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__) && !defined(FASTCONV_SCALAR_ONLY)
  if (isa == Isa::avx512) return kAvx512Kernels;
  if (isa == Isa::avx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kScalarKernels;
}

const Conv2dAlgorithm& choose(const Conv2dProblem& problem, Direction direction, const char* name) {
  const Kernels& table = kernels(current_isa());
  if (name) {
    const Conv2dAlgorithm* named = find(table, name);
    if (!named || !named->serves(problem, direction)) {
      std::string serving;
      for (const Conv2dAlgorithm* algorithm : table.conv2d) {
        if (!algorithm->serves(problem, direction)) continue;
        serving += (serving.empty() ? "'" : ", '") + std::string(algorithm->name) + "'";
      }
      throw InvalidArgument("`algorithm` must be one that serves this " +
                            std::string(direction_name(direction)) + ": " + serving +
                            ". Received: algorithm='" + name + "'");
    }
    return *named;
  }

  thread_local Decisions<Direction, const Conv2dAlgorithm*> decisions;
  return *decisions.of(problem, direction, [&] {
    const Conv2dAlgorithm* preferred = find(table, preferred_algorithm());
    const bool serves = preferred && preferred->serves(problem, direction);
    return serves ? preferred : &cheapest(table, problem, direction);
  });
}

std::span<const Bf16Algorithm* const> bf16_algorithms() {
  // The first call settles what the processor has; it does not change.
  struct Present {
    std::array<const Bf16Algorithm*, 4> algorithms{};
    std::size_t count = 0;
    explicit Present(Isa isa) {
      constexpr const Bf16Algorithm* kAll[] = {
#if defined(__x86_64__) && !defined(FASTCONV_SCALAR_ONLY)
          &kBf16Tiles, &kBf16Dot,
#endif
          &kBf16Portable, &kBf16EmulatedTiles};
      for (const Bf16Algorithm* algorithm : kAll) {
        if (algorithm->isa <= isa && algorithm->on_this_cpu()) algorithms[count++] = algorithm;
      }
    }
  };
  static const Present below(Isa::scalar), with_avx512(Isa::avx512);
  const Present& present = current_isa() == Isa::avx512 ? with_avx512 : below;
  return {present.algorithms.data(), present.count};
}

const Bf16Algorithm* choose_bf16(const Conv2dProblem& problem, Direction direction,
                                 const char* name) {
  if (problem.dtype != DataType::bfloat16) return nullptr;
  const auto named = [&](const std::string& wanted) -> const Bf16Algorithm* {
    for (const Bf16Algorithm* algorithm : bf16_algorithms()) {
      if (wanted == algorithm->name) return algorithm;
    }
    return nullptr;
  };
  if (name) {
    const Bf16Algorithm* const algorithm = named(name);
    if (algorithm && !algorithm->serves(problem, direction)) {
      throw InvalidArgument("`algorithm` must be one that serves this " +
                            std::string(direction_name(direction)) + ". Received: algorithm='" +
                            name + "'");
    }
    return algorithm;
  }
  thread_local Decisions<Direction, const Bf16Algorithm*> decisions;
  return decisions.of(problem, direction, [&]() -> const Bf16Algorithm* {
    const std::string preferred = preferred_algorithm();
    if (preferred == "auto") return cheapest_bf16(problem, direction);
    const Bf16Algorithm* const algorithm = named(preferred);
    return algorithm && algorithm->serves(problem, direction) ? algorithm : nullptr;
  });
}

PoolGradientUse use_of_pool_gradient(const Conv2dProblem& problem, bool with_dx, const char* name) {
  const PoolGradientKernel& kernel = kernels(current_isa()).pool_gradient;
  if (!kernel.serves(problem)) return PoolGradientUse::none;
  if (name) {
    return std::strcmp(name, kernel.name) == 0 ? PoolGradientUse::both : PoolGradientUse::none;
  }
  thread_local Decisions<bool, PoolGradientUse> decisions;
  return decisions.of(problem, with_dx, [&] {
    if (preferred_algorithm() != "auto") return PoolGradientUse::none;
    return cheapest_pool_gradient(kernel, problem, with_dx);
  });
}

}  // namespace fastconv::cpu
