#include <string>

#include "core/error.hpp"
#include "cpu/int8_kernels.hpp"

namespace fastconv::cpu {

std::span<const Int8Algorithm* const> int8_algorithms(Isa isa) {
  static constexpr const Int8Algorithm* kScalar[] = {&kInt8ScalarMadd, &kInt8Plain};
#if defined(__x86_64__) && !defined(FASTCONV_SCALAR_ONLY)
  static constexpr const Int8Algorithm* kAvx2[] = {
#if defined(FASTCONV_AVX_VNNI)
      &kInt8AvxVnni,
#endif
      &kInt8Avx2Madd, &kInt8Plain};
  static constexpr const Int8Algorithm* kAvx512[] = {&kInt8Avx512Vnni, &kInt8Avx512Madd,
                                                     &kInt8Plain};
  if (isa == Isa::avx512) return kAvx512;
  if (isa == Isa::avx2) return kAvx2;
#endif
  (void)isa;
  return kScalar;
}

const Int8Algorithm& choose_int8(const Conv2dProblem& problem, const char* name) {
  std::string serving;
  for (const Int8Algorithm* algorithm : int8_algorithms(current_isa())) {
    if (!algorithm->on_this_cpu() || !algorithm->serves(problem)) continue;
    if (!name || std::string(name) == algorithm->name) return *algorithm;
    serving += (serving.empty() ? "'" : ", '") + std::string(algorithm->name) + "'";
  }
  throw InvalidArgument("`algorithm` must be one that serves this convolution of int8: " + serving +
                        ". Received: algorithm='" + std::string(name) + "'");
}

}  // namespace fastconv::cpu
