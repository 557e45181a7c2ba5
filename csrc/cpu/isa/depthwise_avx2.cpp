// The AVX2 + FMA instances of convolutions in groups of few channels.
#include "cpu/depthwise.hpp"
#include "cpu/grouped.hpp"
#include "cpu/isa/avx2.hpp"

namespace fastconv::cpu {

constinit const Conv2dAlgorithm kAvx2Depthwise = Depthwise<Avx2>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2Grouped = Grouped<Avx2>::kAlgorithm;

}  // namespace fastconv::cpu
