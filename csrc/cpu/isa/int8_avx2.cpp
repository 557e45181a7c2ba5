// int8 convolution on AVX2 without VNNI.
#include "cpu/isa/int8_avx2.hpp"

namespace fastconv::cpu {

constinit const Int8Algorithm kInt8Avx2Madd =
    int8_algorithm<Int8Avx2Madd>("madd", [] { return true; });

}  // namespace fastconv::cpu
