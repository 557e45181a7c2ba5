#include "core/cpu_features.hpp"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core/environment.hpp"
#include "core/error.hpp"

namespace fastconv {
namespace {

constexpr int kUndecided = -1;
std::atomic<int> g_isa{kUndecided};

#if defined(__x86_64__) && !defined(FASTCONV_SCALAR_ONLY)
// Which not every compiler's __builtin_cpu_supports knows by name.
bool cpu_supports_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool cpu_supports(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(__x86_64__) && !defined(FASTCONV_SCALAR_ONLY)
    // libgcc and compiler-rt also ask XGETBV whether the system saves the registers.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_supports_f16c();
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             cpu_supports(Isa::avx2);
#else
    case Isa::avx2:
    case Isa::avx512: return false;
#endif
  }
  return false;
}

std::string names(const std::vector<Isa>& isas) {
  std::string out;
  for (Isa isa : isas) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
  return out;
}

Isa parse(const std::string& name, const char* source) {
  const std::vector<Isa> available = available_isas();
  for (Isa isa : available) {
    if (name == isa_name(isa)) return isa;
  }
  throw InvalidArgument(std::string(source) +
                        " must name an instruction set that this CPU and this build have: " +
                        names(available) + ". Received: " + source + "=" + name);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::scalar}) {
    if (cpu_supports(isa)) out.push_back(isa);
  }
  return out;
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa == kUndecided) {
    const std::string forced = from_environment("FASTCONV_ISA");
    const Isa initial = forced.empty() ? available_isas().front() : parse(forced, "FASTCONV_ISA");
    // Unless set_isa came first.
    if (g_isa.compare_exchange_strong(isa, static_cast<int>(initial))) return initial;
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  g_isa.store(static_cast<int>(parse(name, "isa")), std::memory_order_relaxed);
}

}  // namespace fastconv
