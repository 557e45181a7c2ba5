#pragma once

// Marks what libfastconv.so offers to the doors; all else is hidden. The module fastconv_cuda has what
// it needs of core/ compiled in, for itself.
#if defined(_WIN32)
#error "fastconv supports Linux and macOS."
#elif defined(FASTCONV_CUDA_MODULE)
#define FASTCONV_API
#else
#define FASTCONV_API __attribute__((visibility("default")))
#endif
