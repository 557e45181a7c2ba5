// Tensors of 16 bits from and to float32: exactly on their way in, rounded to nearest, ties to even, on
// their way out. NaN stays NaN (its payload as far as there is room), infinities and the subnormal numbers
// of 16 bits stay what they are, and what is too large for float16 becomes infinity. Tasks run with float32's
// subnormals flushed to zero, which the conversions do not see.
#pragma once

#include "core/data_type.hpp"
#include "cpu/transpose.hpp"

namespace fastconv::cpu {
namespace {

template <class V, class From, class To>
void convert(int64_t count, const From* in, To* out) {
  constexpr int64_t kATask = 16384;
  parallel_for(ceil_div(count, kATask), [&](int64_t task) {
    const int64_t end = min64(count, (task + 1) * kATask);
    int64_t i = task * kATask;
    for (; i + V::kWidth <= end; i += V::kWidth) {
      store_elements<V>(out + i, load_elements<V>(in + i));
    }
    if (i == end) return;
    const auto rest = V::tail(static_cast<int>(end - i));
    store_elements<V>(out + i, load_elements<V>(in + i, rest), rest);
  });
}

template <class V>
void widen(DataType type, int64_t count, const void* in, float* out) {
  if (type == DataType::float16) return convert<V>(count, static_cast<const Float16*>(in), out);
  convert<V>(count, static_cast<const Bfloat16*>(in), out);
}

template <class V>
void narrow(DataType type, int64_t count, const float* in, void* out) {
  if (type == DataType::float16) return convert<V>(count, in, static_cast<Float16*>(out));
  convert<V>(count, in, static_cast<Bfloat16*>(out));
}

template <class V>
void transpose_in(DataType type, int64_t matrices, int64_t rows, int64_t columns, const void* in,
                  float* out) {
  const auto run = [&]<class T>(const T* from) {
    transpose<V>(matrices, rows, columns, from, out);
  };
  switch (type) {
    case DataType::float32: return run(static_cast<const float*>(in));
    case DataType::float16: return run(static_cast<const Float16*>(in));
    case DataType::bfloat16: return run(static_cast<const Bfloat16*>(in));
  }
}

template <class V>
void transpose_out(DataType type, int64_t matrices, int64_t rows, int64_t columns, const float* in,
                   void* out) {
  const auto run = [&]<class T>(T* to) { transpose<V>(matrices, rows, columns, in, to); };
  switch (type) {
    case DataType::float32: return run(static_cast<float*>(out));
    case DataType::float16: return run(static_cast<Float16*>(out));
    case DataType::bfloat16: return run(static_cast<Bfloat16*>(out));
  }
}

}  // namespace
}  // namespace fastconv::cpu
