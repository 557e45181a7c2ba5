// The AVX-512 instances of what multiplies matrices: implicit GEMM and Winograd's, which share its tiles.
#include "cpu/direct.hpp"
#include "cpu/isa/avx512.hpp"
#include "cpu/winograd.hpp"
#include "cpu/winograd_strided.hpp"

namespace fastconv::cpu {

constinit const Conv2dAlgorithm kAvx512Direct = Direct<Avx512>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512Winograd2 = Winograd<Avx512, 2>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512Winograd3 = Winograd<Avx512, 3>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512Winograd4 = Winograd<Avx512, 4>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512Winograd5 = Winograd<Avx512, 5>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx512WinogradStrided = WinogradStrided<Avx512>::kAlgorithm;

}  // namespace fastconv::cpu
