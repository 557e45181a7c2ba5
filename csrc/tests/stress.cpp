// Random problems through every algorithm and instruction set, compared with the reference: what
// the sanitizers run. No Python, so that they need no preloading. Data are small integers, whose
// sums of products are exact in any order.
//
//   stress [--problems N] [--seed S] [--callers C] [--guard-pages] [--fail-allocations] [--prove]
//          [--no-guards]
//
// With --callers, C threads run problems at once while the number of threads changes. With
// --fail-allocations, every call is repeated with its first, second, ... allocation refused until
// it goes through: each must throw std::bad_alloc and leave all as it was. With --prove, it commits
// the faults that it is there to find, each in a process of its own, which must not survive it.
//
// Tensors lie against a page that cannot be touched, behind or before them by turns, and with
// --guard-pages scratch memory does too; under AddressSanitizer, all in memory of its exact size.
// --no-guards leaves those pages accessible: QEMU 7.2 touches what a masked AVX2 load leaves out.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/cpu_features.hpp"
#include "core/error.hpp"
#include "core/operations.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"
#include "core/selection.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/reference.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FASTCONV_SANITIZED 1
#else
#define FASTCONV_SANITIZED 0
#endif

using namespace fastconv;
using std::int64_t;

// --- refused allocations --------------------------------------------------------------------------

namespace {

// The calls left until one is refused; negative: none is. Of the thread that set it alone.
thread_local int64_t t_refuse = -1;
thread_local bool t_refused = false;
std::atomic<int64_t> g_blocks{0};

[[maybe_unused]] bool refuse() {
  if (t_refuse < 0) return false;
  if (t_refuse-- > 0) return false;
  t_refused = true;
  return true;
}

}  // namespace

#if !FASTCONV_SANITIZED
// The library's own calls come here too.
void* operator new(std::size_t bytes) {
  if (!refuse()) {
    if (void* block = std::malloc(bytes ? bytes : 1)) {
      ++g_blocks;
      return block;
    }
  }
  throw std::bad_alloc();
}
void operator delete(void* block) noexcept {
  if (block) --g_blocks;
  std::free(block);
}
void operator delete(void* block, std::size_t) noexcept { operator delete(block); }

extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  void* block = nullptr;
  return refuse() || posix_memalign(&block, alignment, bytes) != 0 ? nullptr : block;
}

#if defined(__GLIBC__)
// Scratch memory between guard pages.
extern "C" void* mmap(void* address, std::size_t bytes, int protection, int flags, int file,
                      off_t offset) noexcept {
  if (refuse()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  const long at = syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
  return reinterpret_cast<void*>(at);
}
#endif
#endif

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

bool g_guards = true;

// --- memory ---------------------------------------------------------------------------------------

template <class T>
class Tensor {
 public:
  Tensor(int64_t count, bool against_end) : count_(count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
#if FASTCONV_SANITIZED
    (void)against_end;
    map_ = std::malloc(bytes);
    data_ = static_cast<T*>(map_);
#else
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inner = (bytes + page - 1) / page * page;
    map_bytes_ = inner + 2 * page;
    map_ = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) fail("mmap");
    char* const first = static_cast<char*>(map_) + page;
    if (!g_guards && mprotect(map_, map_bytes_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    if (inner && mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    data_ = reinterpret_cast<T*>(against_end ? first + inner - bytes : first);
#endif
    std::memset(static_cast<void*>(data_), 0xA5, bytes);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
#if FASTCONV_SANITIZED
    std::free(map_);
#else
    munmap(map_, map_bytes_);
#endif
  }
  T* data() { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  int64_t size() const { return count_; }
  T operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t count_;
  void* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  T* data_ = nullptr;
};

// --- problems -------------------------------------------------------------------------------------

using Random = std::mt19937_64;

int64_t up_to(Random& random, int64_t most, int64_t least = 1) {
  return least + static_cast<int64_t>(random() % static_cast<std::uint64_t>(most - least + 1));
}

Conv2dProblem draw_conv(Random& random) {
  for (;;) {
    Conv2dArguments a;
    static constexpr int64_t kChannels[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 65};
    int64_t c = kChannels[random() % 14], k = kChannels[random() % 14];
    const int kind = static_cast<int>(random() % 5);
    int64_t r = up_to(random, 5), s = up_to(random, 5), most_w = 18;
    a.groups = up_to(random, 3);
    a.strides = {up_to(random, 4), up_to(random, 4)};
    a.dilations = {up_to(random, 3), up_to(random, 3)};
    if (kind == 0) {  // Winograd's
      r = s = 3 + 2 * (up_to(random, 3) / 3);
      if (random() % 3 == 0) (random() % 2 ? r : s) = 1;
      a.groups = 1;
      a.strides = {1, 1};
      if (random() % 2) a.dilations = {1, 1};
    } else if (kind == 1) {  // depthwise
      // Of some, a tile has whole lines of channels.
      if (random() % 4 == 0) c = int64_t{128} << random() % 3;
      a.groups = c;
      k = c * up_to(random, 3);
      if (random() % 3 == 0) {  // of rows that are cut into pieces
        r = up_to(random, 2), s = up_to(random, 19);
        most_w = 70;
      } else if (random() % 2 == 0) {
        r = s = 3 + 2 * up_to(random, 2, 0);
      }
      if (random() % 2 == 0) a.strides = {1, 1};
    } else if (kind == 2) {  // pointwise
      r = s = 1;
    } else if (kind == 3) {
      a.dilations = {1, 1};
      c = up_to(random, 4);
    }
    if (kind != 1) c *= a.groups, k *= a.groups;
    const int64_t n = up_to(random, 4, 0), h = up_to(random, 12), w = up_to(random, most_w);
    a.layout = random() % 2 ? Layout::nhwc : Layout::nchw;
    a.x_shape = a.layout == Layout::nhwc ? std::array{n, h, w, c} : std::array{n, c, h, w};
    a.filter_shape = {r, s, c / a.groups, k};
    a.activation = random() % 2 ? Activation::relu : Activation::linear;
    const int64_t most = up_to(random, 9, 0);
    a.padding = {random() % 2 ? Padding::Kind::same : Padding::Kind::explicit_sides,
                 up_to(random, most, 0), up_to(random, most, 0), up_to(random, most, 0),
                 up_to(random, most, 0)};
    try {
      const Conv2dProblem p = make_conv2d_problem(a);
      if (p.y_size() * p.r * p.s * p.c_per_group() < 400000) return p;
    } catch (const std::invalid_argument&) {
    }
  }
}

Pool2dProblem draw_pool(Random& random) {
  for (;;) {
    Pool2dArguments a;
    const int64_t n = up_to(random, 3, 0), h = up_to(random, 20), w = up_to(random, 40);
    const int64_t c = up_to(random, 40);
    a.layout = random() % 2 ? Layout::nhwc : Layout::nchw;
    a.x_shape = a.layout == Layout::nhwc ? std::array{n, h, w, c} : std::array{n, c, h, w};
    a.pool_size = {up_to(random, 4), up_to(random, 4)};
    if (random() % 8 == 0) a.pool_size = {h, w};
    a.strides = {up_to(random, 4), up_to(random, 4)};
    a.padding = {random() % 2 ? Padding::Kind::same : Padding::Kind::explicit_sides,
                 up_to(random, a.pool_size[0] - 1, 0), up_to(random, a.pool_size[0] - 1, 0),
                 up_to(random, a.pool_size[1] - 1, 0), up_to(random, a.pool_size[1] - 1, 0)};
    try {
      return make_pool2d_problem(a);
    } catch (const std::invalid_argument&) {
    }
  }
}

std::string text(const Conv2dProblem& p) {
  char line[320];
  std::snprintf(
      line, sizeof line,
      "mb%ldg%ldic%ldih%ldiw%ldoc%ldkh%ldkw%ldsh%ldsw%ldph%ldpb%ldpw%ldpr%lddh%lddw%ld%s%s",
      long(p.n), long(p.groups), long(p.c), long(p.h), long(p.w), long(p.k), long(p.r), long(p.s),
      long(p.stride_h), long(p.stride_w), long(p.pad_top), long(p.pad_bottom), long(p.pad_left),
      long(p.pad_right), long(p.dilation_h - 1), long(p.dilation_w - 1),
      p.layout == Layout::nchw ? " nchw" : "", p.activation == Activation::relu ? " relu" : "");
  return line;
}

std::string text(const Pool2dProblem& p) {
  char line[320];
  std::snprintf(line, sizeof line,
                "pool mb%ldic%ldih%ldiw%ldkh%ldkw%ldsh%ldsw%ldph%ldpb%ldpw%ldpr%ld%s", long(p.n),
                long(p.c), long(p.h), long(p.w), long(p.r), long(p.s), long(p.stride_h),
                long(p.stride_w), long(p.pad_top), long(p.pad_bottom), long(p.pad_left),
                long(p.pad_right), p.layout == Layout::nchw ? " nchw" : "");
  return line;
}

void fill(Tensor<float>& tensor, Random& random) {
  for (float& value : tensor) value = static_cast<float>(up_to(random, 4, -4));
}

// --- checks ---------------------------------------------------------------------------------------

bool g_fail_allocations = false;
std::atomic<int64_t> g_calls{0}, g_refusals{0};

template <class T>
void check(const Tensor<T>& result, const Tensor<T>& expected, double tolerance,
           const std::string& what) {
  for (int64_t i = 0; i < result.size(); ++i) {
    const double got = static_cast<double>(result[i]), right = static_cast<double>(expected[i]);
    if (!(std::fabs(got - right) <= tolerance)) {
      fail(what + ": result " + std::to_string(i) + " is " + std::to_string(got) + " instead of " +
           std::to_string(right));
    }
  }
}

// Once, or with allocation after allocation refused until it goes through.
template <class Call>
void run(const std::string& what, const Call& call) {
  if (g_fail_allocations) {
    for (int64_t refused = 0;; ++refused) {
      // What is kept between calls (scratch memory, choices) is no leak: only what a failed call
      // leaves behind grows with every one of them.
      const int64_t before = g_blocks.load();
      t_refused = false;
      t_refuse = refused;
      bool threw = false;
      try {
        call();
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      t_refuse = -1;
      if (!t_refused) break;
      ++g_refusals;
      if (threw && g_blocks.load() > before + 2) fail(what + ": a refused allocation leaks");
      if (refused > 1000) fail(what + ": asks for memory without end");
    }
  }
  call();
  ++g_calls;
}

double largest(const Tensor<float>& tensor) {
  double most = 0;
  for (int64_t i = 0; i < tensor.size(); ++i) most = std::max(most, std::fabs(double(tensor[i])));
  return most;
}

std::vector<std::string> algorithms(const Conv2dProblem& p, Direction direction) {
  std::vector<std::string> names;
  for (const auto& candidate : explain(p, direction).candidates)
    names.push_back(candidate.algorithm);
  return names;
}

// The same with a gated activation.
Conv2dProblem gated(Conv2dProblem p) {
  p.activation = p.k % 2 ? Activation::silu : Activation::hard_silu;
  return p;
}

struct ConvData {
  Tensor<float> x, w, bias, dy, output;
  Tensor<float> scale;
  Tensor<float> y, y_scaled, y_scaled_added, y_gated, dx, dw, dbias;  // by the reference
  ConvData(const Conv2dProblem& p, Random& random, bool end)
      : x(p.x_size(), end), w(p.filter_size(), end), bias(p.k, end), dy(p.y_size(), end),
        output(p.y_size(), end), scale(p.k, end), y(p.y_size(), end), y_scaled(p.y_size(), end),
        y_scaled_added(p.y_size(), end), y_gated(p.y_size(), end), dx(p.x_size(), end),
        dw(p.filter_size(), end), dbias(p.k, end) {
    for (auto* tensor : {&x, &w, &bias, &dy, &output, &scale}) fill(*tensor, random);
    reference::conv2d_fprop(p, x.data(), w.data(), bias.data(), y.data());
    reference::conv2d_scaled_fprop(p, x.data(), w.data(), scale.data(), bias.data(), nullptr,
                                   y_scaled.data());
    reference::conv2d_scaled_fprop(p, x.data(), w.data(), scale.data(), bias.data(), dy.data(),
                                   y_scaled_added.data());
    reference::conv2d_scaled_fprop(gated(p), x.data(), w.data(), scale.data(), bias.data(),
                                   dy.data(), y_gated.data());
    reference::conv2d_dgrad(p, dy.data(), w.data(), output.data(), dx.data());
    reference::conv2d_wgrad(p, x.data(), dy.data(), output.data(), dw.data(), dbias.data());
  }
};

void run_conv(const Conv2dProblem& p, ConvData& d, bool end, const std::string& label) {
  const PackedFilter packed(p.filter_shape(), d.w.data());
  for (Direction direction : {Direction::fprop, Direction::dgrad, Direction::wgrad}) {
    for (const std::string& name : algorithms(p, direction)) {
      const char* algorithm = name.c_str();
      const std::string what = text(p) + " " + label + " " + name + " " + direction_name(direction);
      const bool exact = name.rfind("winograd", 0) != 0;
      if (direction == Direction::fprop) {
        Tensor<float> y(p.y_size(), end);
        run(what,
            [&] { conv2d_fprop(p, d.x.data(), d.w.data(), d.bias.data(), y.data(), algorithm); });
        check(y, d.y, exact ? 0 : 1e-2 + 1e-4 * largest(d.y), what);
        // The first call packs, the second finds it packed.
        for (const char* call : {" packing", " packed"}) {
          Tensor<float> again(p.y_size(), end);
          run(what + call, [&] {
            conv2d_packed_fprop(p, d.x.data(), packed, d.bias.data(), again.data(), algorithm);
          });
          check(again, y, 0, what + call);
        }
        // dy serves as a residual.
        for (const float* residual : {d.dy.data(), static_cast<float*>(nullptr)}) {
          run(what, [&] {
            conv2d_scaled_fprop(p, d.x.data(), d.w.data(), d.scale.data(), d.bias.data(), residual,
                                y.data(), algorithm);
          });
          const Tensor<float>& wanted = residual ? d.y_scaled_added : d.y_scaled;
          check(y, wanted, exact ? 0 : 1e-2 + 1e-4 * largest(wanted), what + " scaled");
        }
        run(what, [&] {
          conv2d_scaled_fprop(gated(p), d.x.data(), d.w.data(), d.scale.data(), d.bias.data(),
                              d.dy.data(), y.data(), algorithm);
        });
        check(y, d.y_gated, (exact ? 1e-6 : 1e-2) + (exact ? 1e-6 : 2e-4) * largest(d.y_gated),
              what + " gated");
      } else if (direction == Direction::dgrad) {
        Tensor<float> dx(p.x_size(), end);
        run(what, [&] {
          conv2d_dgrad(p, d.dy.data(), d.w.data(), d.output.data(), dx.data(), algorithm);
        });
        check(dx, d.dx, exact ? 0 : 1e-2 + 1e-4 * largest(d.dx), what);
        for (const char* call : {" packing", " packed"}) {
          Tensor<float> again(p.x_size(), end);
          run(what + call, [&] {
            conv2d_packed_dgrad(p, d.dy.data(), packed, d.output.data(), again.data(), algorithm);
          });
          check(again, dx, 0, what + call);
        }
      } else {
        Tensor<float> dw(p.filter_size(), end), dbias(p.k, end), alone(p.k, end);
        run(what, [&] {
          conv2d_wgrad(p, d.x.data(), d.dy.data(), d.output.data(), dw.data(), dbias.data(),
                       algorithm);
        });
        const double off = exact ? 0 : 1e-2 + 1e-4 * largest(d.dw);
        check(dw, d.dw, off, what);
        check(dbias, d.dbias, 0, what + " dbias");
        run(what, [&] {
          conv2d_wgrad(p, d.x.data(), d.dy.data(), d.output.data(), nullptr, alone.data());
        });
        check(alone, d.dbias, 0, what + " dbias alone");
        run(what, [&] {
          conv2d_wgrad(p, d.x.data(), d.dy.data(), d.output.data(), dw.data(), nullptr, algorithm);
        });
        check(dw, d.dw, off, what + " alone");
      }
    }
  }
}

// All algorithms of int8 give the same bits: those of the plain sum on the portable instruction set.
void run_int8(const Conv2dProblem& p, ConvData& d, Random& random, bool end,
              const std::string& label) {
  Tensor<std::int8_t> w(p.filter_size(), end);
  for (std::int8_t& value : w) value = static_cast<std::int8_t>(random() % 256);
  Tensor<float> scale(p.k, end), right(p.y_size(), end), y(p.y_size(), end);
  for (float& value : scale) value = 1.0f + static_cast<float>(random() % 4);
  conv2d_int8(p, d.x.data(), w.data(), scale.data(), d.bias.data(), right.data(), "plain");
  for (const char* algorithm : {"vnni", "madd", "plain"}) {
    try {
      conv2d_int8(p, d.x.data(), w.data(), scale.data(), d.bias.data(), y.data(), algorithm);
    } catch (const InvalidArgument&) {
      continue;  // not for this problem, or not on this processor
    }
    const std::string what = text(p) + " " + label + " int8 " + algorithm;
    run(what, [&] {
      conv2d_int8(p, d.x.data(), w.data(), scale.data(), d.bias.data(), y.data(), algorithm);
    });
    check(y, right, 0, what);
  }
}

// The nearest, of two the even one. Nothing here is a NaN.
std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// What `fill` gives is exact in bfloat16.
struct Rounded : Tensor<std::uint16_t> {
  Rounded(Tensor<float>& from, bool end) : Tensor(from.size(), end) {
    std::transform(from.begin(), from.end(), begin(), to_bfloat16);
  }
};

void check_rounded(const Tensor<std::uint16_t>& result, const Tensor<float>& expected,
                   const std::string& what) {
  for (int64_t i = 0; i < result.size(); ++i) {
    const float got = from_bfloat16(result[i]), right = from_bfloat16(to_bfloat16(expected[i]));
    if (got != right) {
      fail(what + ": result " + std::to_string(i) + " is " + std::to_string(got) + " instead of " +
           std::to_string(right));
    }
  }
}

// By the direct sum of float32 and by those of bfloat16, all of which are exact, and rounded once.
std::vector<std::string> exact_algorithms(const Conv2dProblem& p, Direction direction) {
  std::vector<std::string> names = algorithms(p, direction);
  std::erase_if(names, [](const std::string& name) {
    return name != "direct" && name.rfind("bf16_", 0) != 0;
  });
  return names;
}

void run_conv_of_bfloat16(Conv2dProblem p, ConvData& d, bool end, const std::string& label) {
  p.dtype = DataType::bfloat16;
  Rounded x(d.x, end), w(d.w, end), bias(d.bias, end), dy(d.dy, end), output(d.output, end);
  Tensor<std::uint16_t> y(p.y_size(), end), dx(p.x_size(), end), dw(p.filter_size(), end),
      dbias(p.k, end);
  const std::string what = text(p) + " " + label + " bfloat16 ";
  for (const std::string& name : exact_algorithms(p, Direction::fprop)) {
    run(what + name,
        [&] { conv2d_fprop(p, x.data(), w.data(), bias.data(), y.data(), name.c_str()); });
    check_rounded(y, d.y, what + name);
  }
  for (const std::string& name : exact_algorithms(p, Direction::dgrad)) {
    run(what + name,
        [&] { conv2d_dgrad(p, dy.data(), w.data(), output.data(), dx.data(), name.c_str()); });
    check_rounded(dx, d.dx, what + name + " dx");
  }
  for (const std::string& name : exact_algorithms(p, Direction::wgrad)) {
    run(what + name, [&] {
      conv2d_wgrad(p, x.data(), dy.data(), output.data(), dw.data(), dbias.data(), name.c_str());
    });
    check_rounded(dw, d.dw, what + name + " dw");
    check_rounded(dbias, d.dbias, what + name + " dbias");
  }
}

struct ConvPoolData {
  Tensor<float> dy, output;
  Tensor<std::uint8_t> taps;
  Tensor<float> y, dx, dw, dbias;  // by the reference
  Tensor<std::uint8_t> argmax;
  ConvPoolData(const Conv2dProblem& p, ConvData& d, Random& random, bool end)
      : dy(size(p), end), output(size(p), end), taps(size(p), end), y(size(p), end),
        dx(p.x_size(), end), dw(p.filter_size(), end), dbias(p.k, end), argmax(size(p), end) {
    fill(dy, random);
    fill(output, random);
    for (std::uint8_t& tap : taps) tap = static_cast<std::uint8_t>(random() % 4);
    reference::conv2d_pool_fprop(p, d.x.data(), d.w.data(), d.bias.data(), y.data(), argmax.data());
    reference::conv2d_pool_bprop(p, d.x.data(), d.w.data(), dy.data(), output.data(), taps.data(),
                                 dx.data(), dw.data(), dbias.data());
  }
  static int64_t size(const Conv2dProblem& p) { return pool_behind(p).y_size(); }
};

// Those of a convolution with a pooling behind it: gradients have one more.
std::vector<std::string> pooled_algorithms(const Conv2dProblem& p, Direction direction) {
  std::vector<std::string> names = algorithms(p, direction);
  const bool sparse = p.layout == Layout::nhwc && p.groups == 1 && (p.s == 3 || p.s == 5) &&
                      p.dilation_h == 1 && p.dilation_w == 1 && p.stride_h <= 2 &&
                      p.stride_w <= 2 && p.n > 0;
  if (sparse && direction != Direction::fprop) names.push_back("sparse");
  return names;
}

void run_conv_pool(const Conv2dProblem& p, ConvData& d, ConvPoolData& pooled, bool end,
                   const std::string& label) {
  for (Direction direction : {Direction::fprop, Direction::dgrad, Direction::wgrad}) {
    for (const std::string& name : pooled_algorithms(p, direction)) {
      const char* algorithm = name.c_str();
      const std::string what =
          text(p) + " " + label + " " + name + " pooled " + direction_name(direction);
      const bool exact = name.rfind("winograd", 0) != 0;
      if (direction == Direction::fprop) {
        const double tolerance = exact ? 0 : 1e-2 + 1e-4 * largest(d.y);
        Tensor<float> y(pooled.y.size(), end);
        Tensor<std::uint8_t> argmax(pooled.y.size(), end);
        run(what, [&] {
          conv2d_pool_fprop(p, d.x.data(), d.w.data(), d.bias.data(), y.data(), argmax.data(),
                            algorithm);
        });
        check(y, pooled.y, tolerance, what);
        check(argmax, pooled.argmax, exact ? 0 : 3, what + " argmax");
        run(what, [&] {
          conv2d_pool_fprop(p, d.x.data(), d.w.data(), d.bias.data(), y.data(), nullptr, algorithm);
        });
        check(y, pooled.y, tolerance, what + " without argmax");
        continue;
      }
      const bool with_dx = direction == Direction::dgrad;
      Tensor<float> dx(p.x_size(), end), dw(p.filter_size(), end), dbias(p.k, end);
      for (float* bias : {dbias.data(), static_cast<float*>(nullptr)}) {
        run(what, [&] {
          conv2d_pool_bprop(p, d.x.data(), d.w.data(), pooled.dy.data(), pooled.output.data(),
                            pooled.taps.data(), with_dx ? dx.data() : nullptr, dw.data(), bias,
                            algorithm);
        });
        if (with_dx) check(dx, pooled.dx, exact ? 0 : 1e-2 + 1e-4 * largest(pooled.dx), what);
        // Beside a dgrad of that name, the selector chooses for wgrad.
        const bool summed = direction == Direction::wgrad && exact;
        check(dw, pooled.dw, summed ? 0 : 1e-2 + 1e-4 * largest(pooled.dw), what + " dw");
        if (bias) check(dbias, pooled.dbias, 0, what + " dbias");
      }
    }
  }
}

template <class Index>
void run_pool(const Pool2dProblem& p, Random& random, bool end, const std::string& label) {
  Tensor<float> x(p.x_size(), end), dy(p.y_size(), end);
  fill(x, random);
  fill(dy, random);
  Tensor<float> right_y(p.y_size(), end), right_dx(p.x_size(), end);
  Tensor<float> y(p.y_size(), end), dx(p.x_size(), end);
  Tensor<Index> right_argmax(p.y_size(), end), argmax(p.y_size(), end);
  const std::string what = text(p) + " " + label;

  reference::max_pool2d_fprop(p, x.data(), right_y.data(), right_argmax.data());
  run(what, [&] { max_pool2d_fprop(p, x.data(), y.data(), argmax.data()); });
  check(y, right_y, 0, what + " max");
  check(argmax, right_argmax, 0, what + " argmax");
  run(what, [&] { max_pool2d_fprop(p, x.data(), y.data(), nullptr); });
  check(y, right_y, 0, what + " max without argmax");
  reference::max_pool2d_bprop(p, dy.data(), right_argmax.data(), right_dx.data());
  run(what, [&] { max_pool2d_bprop(p, dy.data(), right_argmax.data(), dx.data()); });
  check(dx, right_dx, 0, what + " max gradient");
  Pool2dProblem rounded = p;
  rounded.dtype = DataType::bfloat16;
  Rounded x_rounded(x, end), dy_rounded(dy, end);
  Tensor<std::uint16_t> y_rounded(p.y_size(), end), dx_rounded(p.x_size(), end);
  run(what, [&] { max_pool2d_fprop(rounded, x_rounded.data(), y_rounded.data(), argmax.data()); });
  check_rounded(y_rounded, right_y, what + " max of bfloat16");
  check(argmax, right_argmax, 0, what + " argmax of bfloat16");
  run(what, [&] {
    max_pool2d_bprop(rounded, dy_rounded.data(), right_argmax.data(), dx_rounded.data());
  });
  check_rounded(dx_rounded, right_dx, what + " max gradient of bfloat16");

  reference::avg_pool2d_fprop(p, x.data(), right_y.data());
  run(what, [&] { avg_pool2d_fprop(p, x.data(), y.data()); });
  check(y, right_y, 1e-5, what + " average");
  reference::avg_pool2d_bprop(p, dy.data(), right_dx.data());
  run(what, [&] { avg_pool2d_bprop(p, dy.data(), dx.data()); });
  check(dx, right_dx, 1e-4, what + " average gradient");
}

void run_batch_norm(const BatchNormProblem& p, Random& random, const std::vector<Isa>& isas,
                    bool end) {
  const int64_t size = p.rows * p.channels;
  Tensor<float> x(size, end), dy(size, end), residual(size, end), gamma(p.channels, end),
      beta(p.channels, end), mean(p.channels, end), variance(p.channels, end);
  for (auto* tensor : {&x, &dy, &residual, &gamma, &beta}) fill(*tensor, random);
  reference::batch_norm_moments(p, x.data(), mean.data(), variance.data());
  for (const bool adds : {false, true}) {
    const float* const added = adds ? residual.data() : nullptr;
    const bool has_gradient = !adds || !is_gated(p.activation);
    Tensor<float> y(size, end), sums(size, end), dx(size, end), dgamma(p.channels, end),
        dbeta(p.channels, end), dresidual(size, end);
    reference::batch_norm_fprop(p, x.data(), mean.data(), variance.data(), gamma.data(),
                                beta.data(), added, y.data());
    // Which side of an activation's corner a sum is on, rounding decides: nothing comes from there.
    BatchNormProblem linear = p;
    linear.activation = Activation::linear;
    reference::batch_norm_fprop(linear, x.data(), mean.data(), variance.data(), gamma.data(),
                                beta.data(), added, sums.data());
    for (int64_t i = 0; i < size; ++i) {
      for (const float corner : {-3.0f, 0.0f, 3.0f, 6.0f}) {
        if (std::fabs(sums[i] - corner) < 1e-3f) dy.data()[i] = 0;
      }
    }
    const bool by_y = adds && p.activation != Activation::linear;
    if (has_gradient) {
      reference::batch_norm_bprop(p, x.data(), mean.data(), variance.data(), gamma.data(),
                                  beta.data(), dy.data(), by_y ? y.data() : nullptr, dx.data(),
                                  dgamma.data(), dbeta.data(), by_y ? dresidual.data() : nullptr);
    }
    for (Isa isa : isas) {
      if (isas.size() > 1) set_isa(isa_name(isa));
      const std::string what = "batch norm of " + std::to_string(p.rows) + " x " +
                               std::to_string(p.channels) + " activation " +
                               std::to_string(int(p.activation)) + (adds ? " with a sum " : " ") +
                               isa_name(isa);
      Tensor<float> own(size, end), own_mean(p.channels, end), own_variance(p.channels, end);
      run(what, [&] { batch_norm_moments(p, x.data(), own_mean.data(), own_variance.data()); });
      check(own_mean, mean, 1e-5, what + " mean");
      check(own_variance, variance, 1e-4, what + " variance");
      run(what, [&] {
        batch_norm_fprop(p, x.data(), mean.data(), variance.data(), gamma.data(), beta.data(),
                         added, own.data());
      });
      check(own, y, 1e-6 + 1e-5 * largest(y), what);
      if (!has_gradient) continue;
      Tensor<float> own_dgamma(p.channels, end), own_dbeta(p.channels, end),
          own_dresidual(size, end);
      run(what, [&] {
        batch_norm_bprop(p, x.data(), mean.data(), variance.data(), gamma.data(), beta.data(),
                         dy.data(), by_y ? y.data() : nullptr, own.data(), own_dgamma.data(),
                         own_dbeta.data(), by_y ? own_dresidual.data() : nullptr);
      });
      const double steepest = largest(gamma) / std::sqrt(double(p.epsilon));
      check(own, dx, 1e-5 * steepest, what + " dx");
      check(own_dgamma, dgamma, 1e-5 * double(p.rows), what + " dgamma");
      check(own_dbeta, dbeta, 1e-5 * double(p.rows), what + " dbeta");
      if (by_y) check(own_dresidual, dresidual, 0, what + " dresidual");
    }
  }
}

void run_problems(std::uint64_t seed, int64_t problems, const std::vector<Isa>& isas) {
  Random random(seed);
  for (int64_t i = 0; i < problems; ++i) {
    const bool end = random() % 2;
    if (random() % 10 == 0) {
      const BatchNormProblem p{.rows = up_to(random, 1500, 1),
                               .channels = up_to(random, 300, 1),
                               .epsilon = 0.01f,
                               .activation = static_cast<Activation>(random() % 5)};
      run_batch_norm(p, random, isas, end);
      continue;
    }
    if (random() % 4 == 0) {
      const Pool2dProblem p = draw_pool(random);
      for (Isa isa : isas) {
        if (isas.size() > 1) set_isa(isa_name(isa));
        if (p.argmax_fits_byte()) {
          run_pool<std::uint8_t>(p, random, end, isa_name(isa));
        } else {
          run_pool<std::int32_t>(p, random, end, isa_name(isa));
        }
      }
      continue;
    }
    const Conv2dProblem p = draw_conv(random);
    ConvData data(p, random, end);
    const bool pools = p.oh > 1 && p.ow > 1;
    std::optional<ConvPoolData> pooled;
    if (pools) pooled.emplace(p, data, random, end);
    for (Isa isa : isas) {
      if (isas.size() > 1) set_isa(isa_name(isa));
      run_conv(p, data, end, isa_name(isa));
      run_int8(p, data, random, end, isa_name(isa));
      run_conv_of_bfloat16(p, data, end, isa_name(isa));
      if (pools) run_conv_pool(p, data, *pooled, end, isa_name(isa));
    }
  }
}

// Callers at once, on the instruction sets by turns: changing that one is not for many threads.
void run_callers(std::uint64_t seed, int64_t problems, int callers) {
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    std::atomic<int> at_work{callers};
    std::vector<std::thread> threads;
    for (int caller = 0; caller < callers; ++caller) {
      threads.emplace_back([&, caller] {
        run_problems(seed + static_cast<std::uint64_t>(caller), problems / callers, {isa});
        --at_work;
      });
    }
    for (int count = 1; at_work > 0; count = count % 5 + 1) {
      set_num_threads(count);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    for (std::thread& thread : threads) thread.join();
  }
}

// --- the faults that are to be found --------------------------------------------------------------

volatile float g_sink = 0;

// Whether a process that commits `fault` survives it.
template <class Fault>
bool survives(const Fault& fault) {
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    const int silence = open("/dev/null", O_WRONLY);
    if (silence >= 0) dup2(silence, 2);
    fault();
    // ThreadSanitizer tells at an orderly exit.
    std::exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) fail("waitpid");
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void prove() {
  int64_t faults = 0;
  const auto expect = [&](const char* name, const auto& fault) {
    if (survives(fault)) fail(std::string("not found: ") + name);
    ++faults;
  };
#if defined(__SANITIZE_THREAD__)
  expect("two threads that write one variable", [] {
    float shared = 0;
    std::thread other([&] { shared = 1; });
    shared = 2;
    other.join();
    g_sink = shared;
  });
#else
  // A vector that begins inside and ends one element behind.
  for (int64_t count : {1, 7, 64, 4096}) {
    expect("a read behind a tensor", [=] {
      Tensor<float> tensor(count, true);
      g_sink = *(static_cast<volatile float*>(tensor.data()) + count);
    });
    expect("a write behind a tensor", [=] {
      Tensor<float> tensor(count, true);
      *(static_cast<volatile float*>(tensor.data()) + count) = 1;
    });
    expect("a read before a tensor", [=] {
      Tensor<float> tensor(count, false);
      g_sink = *(static_cast<volatile float*>(tensor.data()) - 1);
    });
    expect("a write behind scratch memory", [=] {
      const Workspace workspace(static_cast<std::size_t>(count) * 4);
      *(static_cast<volatile float*>(workspace.floats()) + count) = 1;
    });
    expect("a write before scratch memory", [=] {
      const Workspace workspace(static_cast<std::size_t>(count) * 4);
      *(static_cast<volatile float*>(workspace.floats()) - 1) = 1;
    });
  }
#endif
#if defined(__SANITIZE_ADDRESS__)
  expect("a sum that no int holds", [] {
    volatile int most = 0x7FFFFFFF;
    most = most + 1;
  });
#elif !FASTCONV_SANITIZED
  expect("scratch memory that is read before it is written", [] {
    const Workspace workspace(400);
    if (std::isnan(workspace.floats()[99])) std::exit(1);
  });
#endif
  std::printf("stress: %ld faults of our making, all found\n", long(faults));
}

}  // namespace

int main(int count, char** arguments) {
  int64_t problems = 200;
  std::uint64_t seed = 1;
  int callers = 0;
  bool proves = false;
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "--fail-allocations" && !FASTCONV_SANITIZED) {
      g_fail_allocations = true;
    } else if (option == "--guard-pages" && !FASTCONV_SANITIZED) {
      setenv("FASTCONV_GUARD_PAGES", "1", 1);
    } else if (option == "--no-guards" && !FASTCONV_SANITIZED) {
      g_guards = false;
    } else if (option == "--prove") {
      proves = true;
    } else if (option == "--problems" && i + 1 < count) {
      problems = std::atoll(arguments[++i]);
    } else if (option == "--seed" && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else if (option == "--callers" && i + 1 < count) {
      callers = std::atoi(arguments[++i]);
    } else {
      fail("what is " + option + "?");
    }
  }
  if (proves) {
    if (!FASTCONV_SANITIZED) setenv("FASTCONV_GUARD_PAGES", "1", 1);
    prove();
    return 0;
  }
  std::string isas;
  for (Isa isa : available_isas()) isas += (isas.empty() ? "" : ", ") + std::string(isa_name(isa));
  std::printf("stress: on %s\n", isas.c_str());
  try {
    current_isa();  // FASTCONV_ISA is read
  } catch (const std::invalid_argument& error) {
    fail(error.what());
  }
  set_num_threads(2);
  if (callers > 0) {
    run_callers(seed, problems, callers);
  } else {
    run_problems(seed, problems, available_isas());
  }
  std::printf("stress: %ld problems, %ld calls, %ld refused allocations, none wrong\n",
              long(problems), long(g_calls.load()), long(g_refusals.load()));
  return 0;
}
