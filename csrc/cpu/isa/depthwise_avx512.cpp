// The AVX-512 instances of convolutions in groups of few channels.
#include "cpu/depthwise.hpp"
#include "cpu/grouped.hpp"
#include "cpu/isa/avx512.hpp"

namespace fastconv::cpu {

constinit const Conv2dAlgorithm kAvx512Depthwise = Depthwise<Avx512>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512Grouped = Grouped<Avx512>::kAlgorithm;

}  // namespace fastconv::cpu
