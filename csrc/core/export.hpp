#pragma once

// Marks what libfastconv.so offers to the doors; all else is hidden.
#if defined(_WIN32)
#error "fastconv supports Linux and macOS."
#else
#define FASTCONV_API __attribute__((visibility("default")))
#endif
