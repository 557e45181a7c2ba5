// Grouped convolutions with several input channels a group. What computes them is in lanes.hpp;
// here is when.
#pragma once

#include "cpu/kernels.hpp"
#include "cpu/lanes.hpp"

namespace fastconv::cpu {
namespace {

template <class V>
struct Grouped {
  static bool serves(const Conv2dProblem& p, Direction direction) {
    return p.groups > 1 && p.c_per_group() > 1 &&
           (direction != Direction::dgrad || LaneConvolution<V>::fits(p));
  }

  static void run(const Conv2dProblem& p, Direction direction, const Conv2dOperands& t) {
    run_lanes<V>(p, direction, t);
  }

  static Estimate estimate(const Conv2dProblem& p, Direction direction) {
    return estimate_lanes<V>(p, direction);
  }

  static std::string blocking(const Conv2dProblem& p, Direction direction) {
    return describe_lanes<V>(p, direction);
  }

  static constexpr Conv2dAlgorithm kAlgorithm{.name = "grouped",
                                              .masks_dgrad = true,
                                              .masks_wgrad = true,
                                              .serves = serves,
                                              .estimate = estimate,
                                              .blocking = blocking,
                                              .run = run};
};

}  // namespace
}  // namespace fastconv::cpu
