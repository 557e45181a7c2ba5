// An op's filter, for as long as its calls are given the same: what algorithms make of it before they can
// use it is made once, which is a good part of the work where a call has few pixels.
//
// A framework that lets an op hold on to a tensor says so by Context::kHeldTensorsStay, and by the attribute
// keep_filter where nobody writes to the filter while it is held: in TensorFlow, where it is the value of a
// resource variable, which makes a new tensor of what it is assigned to or by wherever the old one is
// shared. So a filter at the address of the one that is held is that one. Of other tensors that is not so:
// memory that DLPack shares, or that a session is fed, may be written to by its owner. A variable may have been
// assigned such memory without a copy: so some of the values are compared too, which any scaling or step of
// an optimizer changes.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "core/environment.hpp"
#include "core/packed_filter.hpp"
#include "core/problem.hpp"

namespace fastconv::framework {

// Calls that found their filter's forms kept.
inline std::atomic<std::uint64_t> g_kept_filters{0};

inline constexpr const char* kKeepFilterAttribute = "keep_filter: bool = false";

class KeptFilter {
 public:
  template <class Attributes>
  explicit KeptFilter(const Attributes& attributes) {
    if constexpr (requires { attributes.flag("keep_filter"); }) {
      stays_ = attributes.flag("keep_filter");
    }
  }

  // The forms of an op's input `index` times `scale` (null, or K values), or null where none are to be kept.
  template <class Context>
  std::shared_ptr<const FilterForms> forms(const Context& context, int index,
                                           const Conv2dProblem& p, const void* scale) {
    if constexpr (requires { Context::kHeldTensorsStay; }) {
      if (!is_worth_it(p) || !is_allowed() || !stays_) return nullptr;
      auto filter = context.input(index);
      const void* const address = filter.values(p.dtype);
      const std::size_t scale_bytes = scale ? static_cast<std::size_t>(p.k) * sizeof(float) : 0;
      const std::string scales(static_cast<const char*>(scale), scale_bytes);
      const Sample sample = sample_of(address, p.filter_size());
      const std::lock_guard lock(mutex_);
      if (held_ && address == address_ && scales == scales_ && p.filter_shape() == shape_ &&
          sample == sample_) {
        g_kept_filters.fetch_add(1, std::memory_order_relaxed);
        ++uses_;
        return forms_;
      }
      if (held_) {
        // What is held costs the next assignment a copy: in training, that is each step's.
        held_ = nullptr;
        forms_ = nullptr;
        pause_ = uses_ >= kUsesEnough ? 0 : std::min(2 * pause_ + 1, kLongestPause);
        waiting_ = pause_;
        uses_ = 0;
      }
      const bool seen_before = std::exchange(address_, address) == address;
      if (waiting_ > 0) {
        --waiting_;
      } else if (seen_before) {
        held_ = std::make_shared<decltype(filter)>(std::move(filter));
        forms_ = std::make_shared<FilterForms>();
        scales_ = scales;
        shape_ = p.filter_shape();
        sample_ = sample;
      }
      return forms_;
    } else {
      return nullptr;
    }
  }

 private:
  static constexpr int kLongestPause = 1000, kUsesEnough = 4;  // calls

  // Against the convolution itself, what is made of the filter counts for less the more pixels there are.
  // The algorithms of few channels, and of channels by themselves, make next to nothing.
  static bool is_worth_it(const Conv2dProblem& p) {
    constexpr std::int64_t kMostPixels = 4096, kLeastFloats = 4096, kMostOfFew = 4;
    return p.dtype == DataType::float32 && p.n * p.oh * p.ow <= kMostPixels &&
           p.filter_size() >= kLeastFloats && p.c_per_group() > kMostOfFew &&
           p.k_per_group() > kMostOfFew;
  }
  using Sample = std::array<std::uint32_t, 64>;
  // The bits of floats spread evenly over a filter, the last one among them.
  static Sample sample_of(const void* filter, std::int64_t floats) {
    Sample sample;
    const auto count = static_cast<std::int64_t>(sample.size());
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = (i + 1) * floats / count - 1;
      std::memcpy(&sample[static_cast<std::size_t>(i)], static_cast<const float*>(filter) + at, 4);
    }
    return sample;
  }
  static bool is_allowed() {
    static const bool allowed = flag_from_environment("FASTCONV_KEEP_FILTERS", true);
    return allowed;
  }

  bool stays_ = false;  // while it is held
  std::mutex mutex_;
  const void* address_ = nullptr;  // of the last call's filter
  std::shared_ptr<void> held_;     // the tensor at that address
  std::string scales_;             // their bytes
  std::array<std::int64_t, 4> shape_{};
  Sample sample_{};
  std::shared_ptr<const FilterForms> forms_;  // of what is held
  std::int64_t uses_ = 0;                     // calls that found it
  int pause_ = 0, waiting_ = 0;               // calls without holding
};

}  // namespace fastconv::framework
