// The AVX2 + FMA instances of what multiplies matrices: implicit GEMM and Winograd's, which share its tiles.
#include "cpu/direct.hpp"
#include "cpu/isa/avx2.hpp"
#include "cpu/winograd.hpp"
#include "cpu/winograd_strided.hpp"

namespace fastconv::cpu {

constinit const Conv2dAlgorithm kAvx2Direct = Direct<Avx2>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2Winograd2 = Winograd<Avx2, 2>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2Winograd3 = Winograd<Avx2, 3>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2Winograd4 = Winograd<Avx2, 4>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2Winograd5 = Winograd<Avx2, 5>::kAlgorithm;
constinit const Conv2dAlgorithm kAvx2WinogradStrided = WinogradStrided<Avx2>::kAlgorithm;

}  // namespace fastconv::cpu
