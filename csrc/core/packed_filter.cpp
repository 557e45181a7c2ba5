#include "core/packed_filter.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>

#include "core/error.hpp"

namespace fastconv {
namespace {

// Of the lists of all filters, for a moment at a time. Leaked: calls may still run while static objects are
// destroyed. A child forked while another thread holds it would find it locked for ever.
std::mutex& g_mutex = *new std::mutex;
[[maybe_unused]] const int g_registered =
    pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] { g_mutex.unlock(); });

std::shared_ptr<float> allocate(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  void* const memory = std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
  if (memory == nullptr) throw std::bad_alloc();
  return {static_cast<float*>(memory), [](float* floats) { std::free(floats); }};
}

std::size_t bytes_of(const std::array<std::int64_t, 4>& shape) {
  std::size_t bytes = sizeof(float);
  for (const std::int64_t extent : shape) {
    if (extent < 1 || bytes > static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max()) /
                                  static_cast<std::size_t>(extent)) {
      throw InvalidArgument(
          "A filter's dimensions must be positive, and its size one of an array. Received: "
          "w.shape=" +
          shape_text(shape));
    }
    bytes *= static_cast<std::size_t>(extent);
  }
  return bytes;
}

}  // namespace

PackedFilter::PackedFilter(const std::array<std::int64_t, 4>& shape, const float* values)
    : shape_(shape), bytes_(bytes_of(shape)) {
  const std::shared_ptr<float> copy = allocate(bytes_);
  std::memcpy(copy.get(), values, bytes_);
  values_ = copy;
}

FilterForms::Floats FilterForms::in_layout(const Layout& layout, std::size_t bytes,
                                           const std::function<void(float*)>& fill) const {
  // The one that is kept, which is the latest used from now on; null if there is none.
  const auto kept = [&]() -> Floats {
    const auto found = std::ranges::find(forms_, layout, &Form::layout);
    if (found == forms_.end()) return nullptr;
    std::rotate(found, found + 1, forms_.end());
    return forms_.back().floats;
  };
  {
    const std::lock_guard lock(g_mutex);
    if (Floats floats = kept()) return floats;
  }
  const std::shared_ptr<float> made = allocate(bytes);
  fill(made.get());
  const std::lock_guard lock(g_mutex);
  if (Floats floats = kept()) return floats;  // another thread was faster
  forms_.reserve(kMostForms);
  if (forms_.size() == kMostForms) forms_.erase(forms_.begin());
  forms_.push_back({layout, bytes, made});
  return made;
}

std::size_t FilterForms::form_bytes() const {
  const std::lock_guard lock(g_mutex);
  std::size_t sum = 0;
  for (const Form& form : forms_) sum += form.bytes;
  return sum;
}

}  // namespace fastconv
