// A filter that its owner keeps, for inference: what algorithms make of it before they can use it is made
// once. Winograd's transformed filter and the panels of a matrix product are a good part of the work where
// a call has few pixels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "core/export.hpp"
#include "core/problem.hpp"

namespace fastconv {

// What algorithms make of one filter, times a scale where it has one; the filter itself is elsewhere.
class FASTCONV_API FilterForms {
 public:
  FilterForms() = default;
  FilterForms(const FilterForms&) = delete;
  FilterForms& operator=(const FilterForms&) = delete;

  using Floats = std::shared_ptr<const float>;  // at a multiple of 64 bytes

  // What the floats of a form depend on, besides the filter itself.
  struct Layout {
    std::string_view algorithm;  // static; of dgrad a name of its own
    std::int64_t vector_width, panels, groups;
    // The strides and dilations, where they say which taps lie together.
    std::array<std::int64_t, 4> steps{};
    bool operator==(const Layout&) const = default;
  };
  // The filter so laid out, in `bytes` that `fill` writes where they are not kept yet. `fill` may use the
  // thread pool; what it throws is thrown, and nothing kept. Threads that want the same at the same time may
  // each fill their own, of which one is kept. A form beyond kMostForms pushes out the one that has not been
  // used for longest.
  Floats in_layout(const Layout& layout, std::size_t bytes,
                   const std::function<void(float*)>& fill) const;

  // Of all forms kept.
  std::size_t form_bytes() const;

  static constexpr std::size_t kMostForms = 4;

 private:
  struct Form {
    Layout layout;
    std::size_t bytes;
    Floats floats;
  };
  mutable std::vector<Form> forms_;  // the one used last at the end
};

// A filter with its forms.
class FASTCONV_API PackedFilter : public FilterForms {
 public:
  // Copies the values, of R x S x C/groups x K. Throws InvalidArgument where they are too many or none,
  // std::bad_alloc.
  PackedFilter(const std::array<std::int64_t, 4>& shape, const float* values);

  const std::array<std::int64_t, 4>& shape() const { return shape_; }
  const float* values() const { return values_.get(); }

  // Of the values and all forms kept.
  std::size_t bytes() const { return bytes_ + form_bytes(); }

 private:
  std::array<std::int64_t, 4> shape_;
  std::size_t bytes_;
  Floats values_;
};

// y = activation(conv(x, filter) + bias), the same bits as of conv2d_fprop. `problem.dtype` is
// not looked at. Throws InvalidArgument where the filter is of another shape than the problem's.
FASTCONV_API void conv2d_packed_fprop(const Conv2dProblem& problem, const float* x,
                                      const PackedFilter& filter, const float* bias, float* y,
                                      const char* algorithm = nullptr);

// dx, likewise the same bits as of conv2d_dgrad. `y` is the mask of ReLU, else null.
FASTCONV_API void conv2d_packed_dgrad(const Conv2dProblem& problem, const float* dy,
                                      const PackedFilter& filter, const float* y, float* dx,
                                      const char* algorithm = nullptr);

}  // namespace fastconv
