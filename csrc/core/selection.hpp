// Which algorithm computes a convolution. The choice rests on the problem, the instruction set and
// the accuracy asked for, never on the number of threads: results are the same bits for any.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/export.hpp"
#include "core/problem.hpp"

namespace fastconv {

enum class Direction : std::uint8_t { fprop, dgrad, wgrad };

// How much rounding error an algorithm may add to that of the plain sum of products.
enum class Accuracy : std::uint8_t {
  strict,    // none: every result is a sum of float32 products
  standard,  // algorithms whose largest error stays below 1e-5 of the largest result: Winograd
  fast,      // any
};

FASTCONV_API const char* direction_name(Direction direction);
FASTCONV_API const char* accuracy_name(Accuracy accuracy);

// For the whole process. The first reading takes FASTCONV_ACCURACY (strict, default or fast;
// unset means default). Throw InvalidArgument for any other name.
FASTCONV_API Accuracy current_accuracy();
FASTCONV_API void set_accuracy(const std::string& name);

// The algorithm preferred over the selector's choice wherever it serves the problem, whatever the
// accuracy; "auto" for none. The first reading takes FASTCONV_ALGORITHM. Throw InvalidArgument for
// a name that no algorithm has.
FASTCONV_API std::string preferred_algorithm();
FASTCONV_API void set_preferred_algorithm(const std::string& name);

// Changes with every change of the two settings above: what a cached choice must match.
std::uint64_t selection_settings();

struct Explanation {
  std::string algorithm;  // "none" for an empty result
  std::string blocking;   // register tile and cache blocks, in words
  std::int64_t workspace_bytes = 0;
  double flops = 0;              // multiplications and additions of the direct sum
  double predicted_seconds = 0;  // on current_isa() and num_threads(), from a measured FMA peak
  // Every algorithm that serves the problem, with its predicted time; the chosen one is among them.
  struct Candidate {
    std::string algorithm;
    double predicted_seconds = 0;
    bool allowed = true;  // by the accuracy in force, and not there for comparison alone
  };
  std::vector<Candidate> candidates;
};

// What fprop, dgrad or wgrad of `problem` would do now.
FASTCONV_API Explanation explain(const Conv2dProblem& problem, Direction direction);

}  // namespace fastconv
