// Large results in huge pages.
#pragma once

#include <cstddef>

#include "core/export.hpp"

namespace fastconv {

// Asks Linux to back what of a large block of memory it has not backed yet with pages of 2 MiB in place of
// 4 KiB: five hundred faults less, each of which takes as long as to write the page, and runs of lines that
// the processor's prefetchers follow. Advice alone, as NumPy gives it for its arrays: no contents change, and
// where the system takes none (transparent_hugepage `never`; not Linux; less than 4 MiB) nothing happens.
FASTCONV_API void advise_huge_pages(void* data, std::size_t bytes) noexcept;

}  // namespace fastconv
