#include "cpu/probe.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/cpu_features.hpp"
#include "core/thread_pool.hpp"

namespace fastconv::probe {
namespace {

using std::int64_t;
using Clock = std::chrono::steady_clock;

// What a loop leaves behind goes here, so that no compiler takes the loop away.
std::atomic<float> g_float_sink;
std::atomic<std::uint64_t> g_integer_sink;

// Independent sums: enough to hide a latency of 4 or 5 cycles on two or three units, few enough for
// 16 registers.
constexpr int kChains = 12;

// Each adds to kChains vectors `iterations` times and returns the operations that made.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) double add_products_avx512(int64_t iterations) {
  const __m512 factor = _mm512_set1_ps(0.999999f), term = _mm512_set1_ps(1e-6f);
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_fmadd_ps(sum[i], factor, term);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  g_float_sink.store(_mm512_cvtss_f32(sum[0]), std::memory_order_relaxed);
  return 2.0 * 16 * kChains * static_cast<double>(iterations);
}

__attribute__((target("avx2,fma"))) double add_products_avx2(int64_t iterations) {
  const __m256 factor = _mm256_set1_ps(0.999999f), term = _mm256_set1_ps(1e-6f);
  __m256 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm256_fmadd_ps(sum[i], factor, term);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
  g_float_sink.store(_mm256_cvtss_f32(sum[0]), std::memory_order_relaxed);
  return 2.0 * 8 * kChains * static_cast<double>(iterations);
}
#endif

// The compiler makes of it what it makes of the scalar kernels, vectors included.
double add_products_scalar(int64_t iterations) {
  constexpr int kFloats = 4 * 8;
  float sum[kFloats];
  for (int i = 0; i < kFloats; ++i) sum[i] = static_cast<float>(i);
  for (int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < kFloats; ++i) sum[i] = sum[i] * 0.999999f + 1e-6f;
  }
  float total = 0;
  for (float value : sum) total += value;
  g_float_sink.store(total, std::memory_order_relaxed);
  return 2.0 * kFloats * static_cast<double>(iterations);
}

double add_products(Isa isa, int64_t iterations) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return add_products_avx512(iterations);
  if (isa == Isa::avx2) return add_products_avx2(iterations);
#endif
  (void)isa;
  return add_products_scalar(iterations);
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The largest rate, work a second, of passes repeated for about `seconds`.
template <class Pass>
double best_rate(double seconds, const Pass& pass) {
  double best = 0;
  const Clock::time_point begin = Clock::now();
  do {
    const Clock::time_point start = Clock::now();
    const double work = pass();
    best = std::max(best, work / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  return best;
}

void read(const std::uint64_t* from, int64_t words) {
  std::uint64_t sum[16] = {};
  for (int64_t i = 0; i + 16 <= words; i += 16) {
    for (int j = 0; j < 16; ++j) sum[j] += from[i + j];
  }
  for (int j = 1; j < 16; ++j) sum[0] += sum[j];
  g_integer_sink.store(sum[0], std::memory_order_relaxed);
}

// By loops that the compiler cannot turn into memset or memcpy, whose streaming stores no kernel
// uses.
void write(std::uint64_t* to, int64_t words) {
  for (int64_t i = 0; i < words; ++i) to[i] = static_cast<std::uint64_t>(i);
}

void copy(const std::uint64_t* from, std::uint64_t* to, int64_t words) {
  for (int64_t i = 0; i < words; ++i) to[i] = from[i] + 1;
}

}  // namespace

double flops(double seconds) {
  const Isa isa = current_isa();
  // Many small tasks: a worker that wakes late costs one of them, not its whole share.
  const int64_t tasks = num_threads() == 1 ? 1 : 64 * num_threads();
  constexpr int64_t kIterations = 20000;
  return best_rate(seconds, [&] {
    const double each = add_products(isa, 1);
    parallel_for(tasks, [&](int64_t) { add_products(isa, kIterations); });
    return each * kIterations * static_cast<double>(tasks);
  });
}

double bandwidth(Stream stream, int64_t bytes, double seconds) {
  constexpr int64_t kChunk = 1 << 16;  // words
  const int64_t halves = stream == Stream::copy ? 2 : 1;
  const int64_t chunks =
      std::max<int64_t>(1, bytes / (halves * kChunk * int64_t{sizeof(std::uint64_t)}));
  const auto memory = std::make_unique_for_overwrite<std::uint64_t[]>(
      static_cast<std::size_t>(halves * chunks * kChunk));
  std::uint64_t* const first = memory.get();
  std::uint64_t* const second = first + (halves - 1) * chunks * kChunk;
  // First touched by the threads that will use it.
  parallel_for(halves * chunks, [&](int64_t task) { write(first + task * kChunk, kChunk); });
  return best_rate(seconds, [&] {
    parallel_for(chunks, [&](int64_t task) {
      const int64_t offset = task * kChunk;
      if (stream == Stream::read) read(first + offset, kChunk);
      if (stream == Stream::write) write(first + offset, kChunk);
      if (stream == Stream::copy) copy(first + offset, second + offset, kChunk);
    });
    return static_cast<double>(halves * chunks * kChunk * int64_t{sizeof(std::uint64_t)});
  });
}

}  // namespace fastconv::probe
