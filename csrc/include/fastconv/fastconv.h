/* fastconv for C and C++: convolution and pooling on dense float32 tensors, on the CPU.
 *
 * Activations are N,H,W,C or N,C,H,W; filters are R,S,C/groups,K in either layout. Every function
 * that can fail returns a fastconv_status; fastconv_last_error() then says why, in words that end in
 * "Received: ...". No exception leaves the library and nothing in it aborts the process.
 *
 * Pointers address whole tensors of the shapes that the problem names; outputs must not overlap
 * inputs. All functions may be called from several threads at once. A call computes on one thread
 * pool, the process's, and its result is the same bits for any number of threads.
 */
#ifndef FASTCONV_FASTCONV_H_
#define FASTCONV_FASTCONV_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FASTCONV_C_API __attribute__((visibility("default")))
#else
#define FASTCONV_C_API
#endif

typedef enum fastconv_status {
  FASTCONV_OK = 0,
  FASTCONV_INVALID_ARGUMENT = 1, /* a rule was broken; no memory was touched */
  FASTCONV_OUT_OF_MEMORY = 2,
  FASTCONV_INTERNAL_ERROR = 3
} fastconv_status;

/* Of the last call of this thread that failed; "" before that. Valid until the thread's next failing
 * call. */
FASTCONV_C_API const char* fastconv_last_error(void);

/* As of the Python package, such as "0.1.0". */
FASTCONV_C_API const char* fastconv_version(void);

/* Threads of the next call, the caller included: FASTCONV_NUM_THREADS of the environment, else the
 * processors this process may use. 1 .. 1024. */
FASTCONV_C_API fastconv_status fastconv_get_num_threads(int* threads);
FASTCONV_C_API fastconv_status fastconv_set_num_threads(int threads);

/* The instruction set in use: "scalar", "avx2", "avx512". By default the best of this processor, or
 * what FASTCONV_ISA of the environment names. The string is static. */
FASTCONV_C_API fastconv_status fastconv_get_isa(const char** name);
FASTCONV_C_API fastconv_status fastconv_set_isa(const char* name);

/* How much rounding error an algorithm may add: "strict" (none: no Winograd), "default", "fast". */
FASTCONV_C_API fastconv_status fastconv_set_accuracy(const char* name);

typedef enum fastconv_layout { FASTCONV_NHWC = 0, FASTCONV_NCHW = 1 } fastconv_layout;
typedef enum fastconv_activation { FASTCONV_LINEAR = 0, FASTCONV_RELU = 1 } fastconv_activation;
typedef enum fastconv_padding {
  FASTCONV_VALID = 0,
  FASTCONV_SAME = 1,    /* TensorFlow's: OH = ceil(H / stride), an odd pixel at the bottom, right */
  FASTCONV_EXPLICIT = 2 /* pad_top .. pad_right */
} fastconv_padding;

/* Start from FASTCONV_CONV2D_INIT, which fills in the defaults, and set the sizes. */
typedef struct fastconv_conv2d {
  size_t struct_size; /* sizeof(fastconv_conv2d) as the caller was compiled */
  int64_t n, h, w, c; /* images, their rows, columns and channels */
  int64_t k, r, s;    /* filters, their rows and columns */
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right; /* of FASTCONV_EXPLICIT alone */
  int64_t groups;
  int32_t padding;    /* fastconv_padding */
  int32_t layout;     /* fastconv_layout */
  int32_t activation; /* fastconv_activation */
  int32_t reserved;   /* 0 */
} fastconv_conv2d;

#define FASTCONV_CONV2D_INIT \
  {sizeof(fastconv_conv2d), 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0}

/* Start from FASTCONV_POOL2D_INIT; strides are not the window's size unless set so. */
typedef struct fastconv_pool2d {
  size_t struct_size;
  int64_t n, h, w, c;
  int64_t r, s; /* window */
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int32_t padding;
  int32_t layout;
} fastconv_pool2d;

#define FASTCONV_POOL2D_INIT {sizeof(fastconv_pool2d), 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0}

/* shape = the output's, in the problem's layout. Tells as well whether the problem is a valid one. */
FASTCONV_C_API fastconv_status fastconv_conv2d_output_shape(const fastconv_conv2d* problem,
                                                            int64_t shape[4]);
FASTCONV_C_API fastconv_status fastconv_pool2d_output_shape(const fastconv_pool2d* problem,
                                                            int64_t shape[4]);

/* y = activation(conv(x, filter) + bias). bias holds k values or is NULL. */
FASTCONV_C_API fastconv_status fastconv_conv2d_fprop(const fastconv_conv2d* problem, const float* x,
                                                     const float* filter, const float* bias,
                                                     float* y);

/* A filter that does not change, with what the algorithms make of it, made at the first call that needs
 * it. Several threads may use one at once. */
typedef struct fastconv_packed_filter fastconv_packed_filter;

/* Copies `values`, of r, s, c / groups and k of the problem; its other members may be those of any
 * call to come. *filter is to be given to fastconv_packed_filter_destroy, which takes NULL too. */
FASTCONV_C_API fastconv_status fastconv_packed_filter_create(const fastconv_conv2d* problem,
                                                             const float* values,
                                                             fastconv_packed_filter** filter);
FASTCONV_C_API void fastconv_packed_filter_destroy(fastconv_packed_filter* filter);

/* As fastconv_conv2d_fprop, and the same bits. The filter must be of the problem's r, s, c / groups
 * and k. */
FASTCONV_C_API fastconv_status fastconv_conv2d_packed_fprop(const fastconv_conv2d* problem,
                                                            const float* x,
                                                            const fastconv_packed_filter* filter,
                                                            const float* bias, float* y);

/* dx = the gradient by x. With FASTCONV_RELU, y is fprop's output; else it is not read. */
FASTCONV_C_API fastconv_status fastconv_conv2d_dgrad(const fastconv_conv2d* problem,
                                                     const float* dy, const float* filter,
                                                     const float* y, float* dx);

/* As fastconv_conv2d_dgrad, and the same bits. */
FASTCONV_C_API fastconv_status fastconv_conv2d_packed_dgrad(const fastconv_conv2d* problem,
                                                            const float* dy,
                                                            const fastconv_packed_filter* filter,
                                                            const float* y, float* dx);

/* dfilter = the gradient by the filter, dbias that by the bias; one of them may be NULL. y as for
 * dgrad. */
FASTCONV_C_API fastconv_status fastconv_conv2d_wgrad(const fastconv_conv2d* problem, const float* x,
                                                     const float* dy, const float* y,
                                                     float* dfilter, float* dbias);

/* Where the maximum of each window is, row * s + column: elements of y's shape and of this many
 * bytes, 1 (uint8_t) for windows of up to 256 taps, else 4 (int32_t). */
FASTCONV_C_API size_t fastconv_max_pool2d_argmax_bytes(const fastconv_pool2d* problem);

/* y = the maximum of each window. Of equal ones the first in row-major order counts; a NaN makes the
 * result NaN. argmax may be NULL. */
FASTCONV_C_API fastconv_status fastconv_max_pool2d_fprop(const fastconv_pool2d* problem,
                                                         const float* x, float* y, void* argmax);

/* dx = dy sent to the pixel that argmax names. Positions outside the window are an error. */
FASTCONV_C_API fastconv_status fastconv_max_pool2d_bprop(const fastconv_pool2d* problem,
                                                         const float* dy, const void* argmax,
                                                         float* dx);

/* y = the mean of each window's pixels; padding is not counted. */
FASTCONV_C_API fastconv_status fastconv_avg_pool2d_fprop(const fastconv_pool2d* problem,
                                                         const float* x, float* y);
FASTCONV_C_API fastconv_status fastconv_avg_pool2d_bprop(const fastconv_pool2d* problem,
                                                         const float* dy, float* dx);

/* Convolution, bias, activation and 2 x 2 max-pooling of stride 2 in one pass (an odd last row or
 * column of the convolution is left out). shape is that of y and argmax, one byte an element, which
 * may be NULL where no gradient is wanted. */
FASTCONV_C_API fastconv_status
fastconv_conv2d_max_pool2d_output_shape(const fastconv_conv2d* problem, int64_t shape[4]);
FASTCONV_C_API fastconv_status fastconv_conv2d_max_pool2d_fprop(const fastconv_conv2d* problem,
                                                                const float* x, const float* filter,
                                                                const float* bias, float* y,
                                                                uint8_t* argmax);

/* Its gradients; dx and dbias may be NULL. y and argmax are the forward pass's. */
FASTCONV_C_API fastconv_status fastconv_conv2d_max_pool2d_bprop(const fastconv_conv2d* problem,
                                                                const float* x, const float* filter,
                                                                const float* dy, const float* y,
                                                                const uint8_t* argmax, float* dx,
                                                                float* dfilter, float* dbias);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FASTCONV_FASTCONV_H_ */
