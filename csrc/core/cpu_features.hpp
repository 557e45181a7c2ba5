// Which instruction set the kernels run on: the best the CPU has, unless FASTCONV_ISA names one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/export.hpp"

namespace fastconv {

enum class Isa : std::uint8_t { scalar, avx2, avx512 };

FASTCONV_API const char* isa_name(Isa isa);

// Compiled into this binary and supported by this CPU, best first; never empty.
FASTCONV_API std::vector<Isa> available_isas();

// The one in use. Read from FASTCONV_ISA at the first call (unset or empty means the best).
// Throws InvalidArgument where the variable names none, or one that is not available.
FASTCONV_API Isa current_isa();

// Overrides the choice for the whole process; throws InvalidArgument like current_isa.
FASTCONV_API void set_isa(const std::string& name);

}  // namespace fastconv
