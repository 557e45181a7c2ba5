// bfloat16 convolution on AMX: TDPBF16PS multiplies 16 rows of 16 pairs by 16 columns of them. Instructions
// in assembly: the intrinsics of some compilers do not say that they read and write memory.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/bf16_tiles.hpp"

namespace fastconv::cpu {
namespace {

// NOLINTBEGIN(portability-no-assembler): see above.
struct Amx {
  static void load_shapes(const TileShapes& shapes) {
    if (shapes.palette == 0) {
      asm volatile("tilerelease" ::: "memory");
    } else {
      asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
    }
  }
  static void store_shapes(TileShapes& shapes) { asm volatile("sttilecfg %0" : "=m"(shapes)); }
  template <int Tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  // No tile is named as clobbered: no compiler that we know keeps anything in one.
  template <int Tile>
  static void load(const void* from, std::int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(Tile) : "memory");
  }
  template <int Tile>
  static void store(void* to, std::int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(Tile) : "memory");
  }
  template <int Sums, int A, int B>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
  }
};

// Whether the processor has it and the system lets this process use it: Linux has to be asked.
bool amx_is_granted() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsXsave)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// NOLINTEND(portability-no-assembler)

}  // namespace

constinit const Bf16Algorithm kBf16Tiles =
    bf16_algorithm<Bf16TileUnit<Amx>>("bf16_tiles", Isa::avx512, false, [] {
      static const bool granted = amx_is_granted();
      return granted;
    });

}  // namespace fastconv::cpu
