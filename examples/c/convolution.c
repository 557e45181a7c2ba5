/* fastconv from C: a convolution with bias and ReLU, its gradients, and max-pooling, each compared
 * with plain loops. Exits with status 1 where one differs. */
#include <fastconv/fastconv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 2, H = 15, W = 14, C = 5, K = 7, R = 3, S = 3, OH = 8, OW = 7 };

static void check(fastconv_status status) {
  if (status == FASTCONV_OK) return;
  fprintf(stderr, "error: %s\n", fastconv_last_error());
  exit(1);
}

static float* random_floats(size_t count) { /* -1 .. 1 */
  float* values = malloc(count * sizeof *values);
  if (!values) exit(1);
  for (size_t i = 0; i < count; ++i) values[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
  return values;
}

static int compare(const char* what, const float* ours, const double* right, size_t count) {
  double largest = 0, difference = 0;
  for (size_t i = 0; i < count; ++i) {
    largest = fmax(largest, fabs(right[i]));
    difference = fmax(difference, fabs(ours[i] - right[i]));
  }
  printf("%-8s differs by %.1e of its largest value\n", what, difference / largest);
  return difference <= 1e-5 * largest;
}

int main(void) {
  printf("fastconv %s\n", fastconv_version());

  fastconv_conv2d conv = FASTCONV_CONV2D_INIT;
  conv.n = N, conv.h = H, conv.w = W, conv.c = C;
  conv.k = K, conv.r = R, conv.s = S;
  conv.stride_h = conv.stride_w = 2;
  conv.padding = FASTCONV_SAME;
  conv.activation = FASTCONV_RELU;

  int64_t shape[4];
  check(fastconv_conv2d_output_shape(&conv, shape));
  if (shape[0] != N || shape[1] != OH || shape[2] != OW || shape[3] != K) return 1;

  float* x = random_floats(N * H * W * C);
  float* filter = random_floats(R * S * C * K);
  float* bias = random_floats(K);
  float* dy = random_floats(N * OH * OW * K);
  float* y = random_floats(N * OH * OW * K);
  float* dx = random_floats(N * H * W * C);
  float* dfilter = random_floats(R * S * C * K);
  float* dbias = random_floats(K);

  check(fastconv_conv2d_fprop(&conv, x, filter, bias, y));
  check(fastconv_conv2d_dgrad(&conv, dy, filter, y, dx));
  check(fastconv_conv2d_wgrad(&conv, x, dy, y, dfilter, dbias));

  static double right_y[N * OH * OW * K], right_dx[N * H * W * C];
  static double right_dfilter[R * S * C * K], right_dbias[K];
  /* "same" padding of 15 x 14 by 3 x 3 with stride 2: a row above and below, a column at the right */
  const int pad_top = 1, pad_left = 0;
  for (int at = 0; at < N * OH * OW; ++at) {
    const int n = at / (OH * OW), top = at / OW % OH * 2 - pad_top, left = at % OW * 2 - pad_left;
    for (int k = 0; k < K; ++k) {
      double* sum = &right_y[at * K + k];
      *sum = bias[k];
      for (int pass = 0; pass < 2; ++pass) { /* the sum, then what its gradient adds */
        const double dz = y[at * K + k] > 0 ? dy[at * K + k] : 0;
        if (pass == 1) right_dbias[k] += dz;
        for (int tap = 0; tap < R * S; ++tap) {
          const int row = top + tap / S, column = left + tap % S;
          if (row < 0 || row >= H || column < 0 || column >= W) continue;
          for (int c = 0; c < C; ++c) {
            const int pixel = ((n * H + row) * W + column) * C + c, weight = (tap * C + c) * K + k;
            if (pass == 0) {
              *sum += (double)x[pixel] * filter[weight];
            } else {
              right_dx[pixel] += dz * filter[weight];
              right_dfilter[weight] += dz * x[pixel];
            }
          }
        }
      }
      if (*sum < 0) *sum = 0;
    }
  }
  int right = compare("fprop", y, right_y, N * OH * OW * K);
  right &= compare("dgrad", dx, right_dx, N * H * W * C);
  right &= compare("wgrad", dfilter, right_dfilter, R * S * C * K);
  right &= compare("dbias", dbias, right_dbias, K);

  fastconv_pool2d pool = FASTCONV_POOL2D_INIT;
  pool.n = N, pool.h = OH, pool.w = OW, pool.c = K;
  pool.r = pool.s = pool.stride_h = pool.stride_w = 2;
  check(fastconv_pool2d_output_shape(&pool, shape));
  float* pooled = random_floats((size_t)(shape[0] * shape[1] * shape[2] * shape[3]));
  check(fastconv_max_pool2d_fprop(&pool, y, pooled, NULL));
  for (int at = 0; at < N * (OH / 2) * (OW / 2) * K; ++at) {
    const int k = at % K, column = at / K % (OW / 2), row = at / K / (OW / 2) % (OH / 2);
    const int n = at / K / (OW / 2) / (OH / 2);
    float most = -INFINITY;
    for (int tap = 0; tap < 4; ++tap) {
      most = fmaxf(most, y[((n * OH + 2 * row + tap / 2) * OW + 2 * column + tap % 2) * K + k]);
    }
    right &= pooled[at] == most;
  }

  conv.stride_h = 0;
  if (fastconv_conv2d_fprop(&conv, x, filter, bias, y) != FASTCONV_INVALID_ARGUMENT) return 1;
  printf("a mistake: %s\n", fastconv_last_error());

  free(x), free(filter), free(bias), free(dy), free(y), free(dx), free(dfilter), free(dbias);
  free(pooled);
  printf(right ? "right\n" : "WRONG\n");
  return !right;
}
