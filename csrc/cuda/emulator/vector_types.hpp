// CUDA's vector types. A copy of one is a single access of its whole size, as on the device: so the
// detectors see a 16-byte access to 16-byte aligned memory, and not four of 4 bytes.
#pragma once

#include <cstdint>
#include <type_traits>

#define __align__(n) __attribute__((aligned(n)))

namespace fastconv::emulator {

// How a vector of kBytes is copied. Where no detector looks, a misaligned address is forgiven: else
// the processor would end the process.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FASTCONV_EMULATOR_ACCESS_ALIGNMENT(bytes) aligned(bytes)
#else
#define FASTCONV_EMULATOR_ACCESS_ALIGNMENT(bytes) aligned(1)
#endif
template <int kBytes>
struct Whole;
template <>
struct Whole<4> {
  typedef std::uint32_t type __attribute__((may_alias, FASTCONV_EMULATOR_ACCESS_ALIGNMENT(4)));
};
template <>
struct Whole<8> {
  typedef std::uint64_t type __attribute__((may_alias, FASTCONV_EMULATOR_ACCESS_ALIGNMENT(8)));
};
template <>
struct Whole<16> {
  typedef std::uint32_t type
      __attribute__((vector_size(16), may_alias, FASTCONV_EMULATOR_ACCESS_ALIGNMENT(16)));
};

template <class Vector>
inline __attribute__((always_inline)) void copy_whole(Vector* to, const Vector* from) {
  using Bits = typename Whole<sizeof(Vector)>::type;
  *reinterpret_cast<Bits*>(to) = *reinterpret_cast<const Bits*>(from);
}

}  // namespace fastconv::emulator

#define FASTCONV_EMULATOR_COPIES(name)                                      \
  name() = default;                                                         \
  name(const name& other) { fastconv::emulator::copy_whole(this, &other); } \
  name& operator=(const name& other) {                                      \
    fastconv::emulator::copy_whole(this, &other);                           \
    return *this;                                                           \
  }

#define FASTCONV_EMULATOR_VECTOR2(name, scalar) \
  struct alignas(2 * sizeof(scalar)) name {     \
    scalar x, y;                                \
    name(scalar x, scalar y) : x(x), y(y) {}    \
    FASTCONV_EMULATOR_COPIES(name)              \
  };                                            \
  inline name make_##name(scalar x, scalar y) { return name(x, y); }

#define FASTCONV_EMULATOR_VECTOR4(name, scalar)                              \
  struct alignas(4 * sizeof(scalar)) name {                                  \
    scalar x, y, z, w;                                                       \
    name(scalar x, scalar y, scalar z, scalar w) : x(x), y(y), z(z), w(w) {} \
    FASTCONV_EMULATOR_COPIES(name)                                           \
  };                                                                         \
  inline name make_##name(scalar x, scalar y, scalar z, scalar w) { return name(x, y, z, w); }

FASTCONV_EMULATOR_VECTOR2(short2, short)
FASTCONV_EMULATOR_VECTOR2(ushort2, unsigned short)
FASTCONV_EMULATOR_VECTOR2(int2, int)
FASTCONV_EMULATOR_VECTOR2(uint2, unsigned)
FASTCONV_EMULATOR_VECTOR2(float2, float)
FASTCONV_EMULATOR_VECTOR2(double2, double)
FASTCONV_EMULATOR_VECTOR4(char4, signed char)
FASTCONV_EMULATOR_VECTOR4(uchar4, unsigned char)
FASTCONV_EMULATOR_VECTOR4(short4, short)
FASTCONV_EMULATOR_VECTOR4(ushort4, unsigned short)
FASTCONV_EMULATOR_VECTOR4(int4, int)
FASTCONV_EMULATOR_VECTOR4(uint4, unsigned)
FASTCONV_EMULATOR_VECTOR4(float4, float)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
