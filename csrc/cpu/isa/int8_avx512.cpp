// int8 convolution on AVX-512 without VNNI.
#include "cpu/isa/int8_avx512.hpp"

namespace fastconv::cpu {

constinit const Int8Algorithm kInt8Avx512Madd =
    int8_algorithm<Int8Avx512Madd>("madd", [] { return true; });

}  // namespace fastconv::cpu
