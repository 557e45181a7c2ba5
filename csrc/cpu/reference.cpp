#include "cpu/reference.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastconv::reference {
namespace {

using std::int64_t;

// Offset of (image, row, column, channel) in a tensor of `rows` x `columns` x `channels` images.
struct Indexer {
  Layout layout;
  int64_t rows, columns, channels;
  int64_t operator()(int64_t n, int64_t i, int64_t j, int64_t c) const {
    if (layout == Layout::nchw) return ((n * channels + c) * rows + i) * columns + j;
    return ((n * rows + i) * columns + j) * channels + c;
  }
};

// Calls body(x offset, filter offset, y offset) for every product that makes up a convolution.
template <class Body>
void for_each_product(const Conv2dProblem& p, const Body& body) {
  const Indexer x_at{p.layout, p.h, p.w, p.c};
  const Indexer y_at{p.layout, p.oh, p.ow, p.k};
  const int64_t cg = p.c_per_group(), kg = p.k_per_group();
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t i = 0; i < p.oh; ++i)
      for (int64_t j = 0; j < p.ow; ++j)
        for (int64_t k = 0; k < p.k; ++k)
          for (int64_t r = 0; r < p.r; ++r)
            for (int64_t s = 0; s < p.s; ++s) {
              const int64_t row = i * p.stride_h - p.pad_top + r * p.dilation_h;
              const int64_t column = j * p.stride_w - p.pad_left + s * p.dilation_w;
              if (row < 0 || row >= p.h || column < 0 || column >= p.w) continue;
              for (int64_t c = 0; c < cg; ++c) {
                body(x_at(n, row, column, (k / kg) * cg + c), ((r * p.s + s) * cg + c) * p.k + k,
                     y_at(n, i, j, k));
              }
            }
}

// What the activation makes of a sum, and where it let it through.
double gate_of(Activation activation, double sum) {
  if (activation == Activation::silu) return 1 / (1 + std::exp(-sum));
  return std::clamp(sum / 6 + 0.5, 0.0, 1.0);
}
double activated(Activation activation, double sum) {
  if (is_gated(activation)) return sum * gate_of(activation, sum);
  if (activation != Activation::linear && sum < 0) return 0;
  return activation == Activation::relu6 && sum > 6 ? 6 : sum;
}
bool lets_through(Activation activation, double value) {
  return activation == Activation::linear ||
         (value > 0 && (activation == Activation::relu || value < 6));
}

// dy where the activation let the value through, else zero.
double through_activation(const Conv2dProblem& p, const float* y, const float* dy, int64_t at) {
  return p.activation != Activation::linear && !lets_through(p.activation, y[at]) ? 0.0 : dy[at];
}

void store(const std::vector<double>& sums, float* out) {
  for (std::size_t i = 0; i < sums.size(); ++i) out[i] = static_cast<float>(sums[i]);
}

// Calls body(row * s + column, x offset) for the taps of one window that lie inside the input, in
// row-major order.
template <class Body>
void for_each_tap(const Pool2dProblem& p, int64_t n, int64_t i, int64_t j, int64_t c,
                  const Body& body) {
  const Indexer x_at{p.layout, p.h, p.w, p.c};
  // Of a window's up to 2**31 taps few may be inside.
  const int64_t top = i * p.stride_h - p.pad_top, left = j * p.stride_w - p.pad_left;
  for (int64_t row = std::max<int64_t>(top, 0); row < std::min(top + p.r, p.h); ++row)
    for (int64_t column = std::max<int64_t>(left, 0); column < std::min(left + p.s, p.w); ++column)
      body((row - top) * p.s + column - left, x_at(n, row, column, c));
}

template <class Body>
void for_each_window(const Pool2dProblem& p, const Body& body) {
  const Indexer y_at{p.layout, p.oh, p.ow, p.c};
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t i = 0; i < p.oh; ++i)
      for (int64_t j = 0; j < p.ow; ++j)
        for (int64_t c = 0; c < p.c; ++c) body(n, i, j, c, y_at(n, i, j, c));
}

}  // namespace

void conv2d_fprop(const Conv2dProblem& p, const float* x, const float* filter, const float* bias,
                  float* y) {
  conv2d_scaled_fprop(p, x, filter, nullptr, bias, nullptr, y);
}

void conv2d_scaled_fprop(const Conv2dProblem& p, const float* x, const float* filter,
                         const float* scale, const float* bias, const float* residual, float* y) {
  std::vector<double> sums(p.y_size());
  for_each_product(p, [&](int64_t at_x, int64_t at_filter, int64_t at_y) {
    sums[at_y] += static_cast<double>(x[at_x]) * filter[at_filter];
  });
  const Indexer y_at{p.layout, p.oh, p.ow, p.k};
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t i = 0; i < p.oh; ++i)
      for (int64_t j = 0; j < p.ow; ++j)
        for (int64_t k = 0; k < p.k; ++k) {
          double& sum = sums[y_at(n, i, j, k)];
          if (scale) sum *= scale[k];
          if (bias) sum += bias[k];
          if (residual) sum += residual[y_at(n, i, j, k)];
          sum = activated(p.activation, sum);
        }
  store(sums, y);
}

void conv2d_dgrad(const Conv2dProblem& p, const float* dy, const float* filter, const float* y,
                  float* dx) {
  std::vector<double> sums(p.x_size());
  for_each_product(p, [&](int64_t at_x, int64_t at_filter, int64_t at_y) {
    sums[at_x] += through_activation(p, y, dy, at_y) * filter[at_filter];
  });
  store(sums, dx);
}

void conv2d_wgrad(const Conv2dProblem& p, const float* x, const float* dy, const float* y,
                  float* dfilter, float* dbias) {
  if (dfilter) {
    std::vector<double> sums(p.filter_size());
    for_each_product(p, [&](int64_t at_x, int64_t at_filter, int64_t at_y) {
      sums[at_filter] += x[at_x] * through_activation(p, y, dy, at_y);
    });
    store(sums, dfilter);
  }
  if (dbias) {
    std::vector<double> sums(p.k);
    const Indexer y_at{p.layout, p.oh, p.ow, p.k};
    for (int64_t n = 0; n < p.n; ++n)
      for (int64_t i = 0; i < p.oh; ++i)
        for (int64_t j = 0; j < p.ow; ++j)
          for (int64_t k = 0; k < p.k; ++k)
            sums[k] += through_activation(p, y, dy, y_at(n, i, j, k));
    store(sums, dbias);
  }
}

void max_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y, void* argmax) {
  for_each_window(p, [&](int64_t n, int64_t i, int64_t j, int64_t c, int64_t at_y) {
    int64_t best_tap = -1;
    float best = 0;
    for_each_tap(p, n, i, j, c, [&](int64_t tap, int64_t at_x) {
      const float value = x[at_x];
      if (best_tap < 0 || value > best || (std::isnan(value) && !std::isnan(best))) {
        best = value;
        best_tap = tap;
      }
    });
    y[at_y] = best;
    if (!argmax) return;
    if (p.argmax_fits_byte()) {
      static_cast<std::uint8_t*>(argmax)[at_y] = static_cast<std::uint8_t>(best_tap);
    } else {
      static_cast<std::int32_t*>(argmax)[at_y] = static_cast<std::int32_t>(best_tap);
    }
  });
}

void max_pool2d_bprop(const Pool2dProblem& p, const float* dy, const void* argmax, float* dx) {
  std::vector<double> sums(p.x_size());
  for_each_window(p, [&](int64_t n, int64_t i, int64_t j, int64_t c, int64_t at_y) {
    const int64_t best_tap = p.argmax_fits_byte() ? static_cast<const std::uint8_t*>(argmax)[at_y]
                                                  : static_cast<const std::int32_t*>(argmax)[at_y];
    for_each_tap(p, n, i, j, c, [&](int64_t tap, int64_t at_x) {
      if (tap == best_tap) sums[at_x] += dy[at_y];
    });
  });
  store(sums, dx);
}

void avg_pool2d_fprop(const Pool2dProblem& p, const float* x, float* y) {
  for_each_window(p, [&](int64_t n, int64_t i, int64_t j, int64_t c, int64_t at_y) {
    double sum = 0;
    int64_t taps = 0;
    for_each_tap(p, n, i, j, c, [&](int64_t, int64_t at_x) {
      sum += x[at_x];
      ++taps;
    });
    y[at_y] = static_cast<float>(sum / static_cast<double>(taps));
  });
}

void avg_pool2d_bprop(const Pool2dProblem& p, const float* dy, float* dx) {
  std::vector<double> sums(p.x_size());
  for_each_window(p, [&](int64_t n, int64_t i, int64_t j, int64_t c, int64_t at_y) {
    int64_t taps = 0;
    for_each_tap(p, n, i, j, c, [&](int64_t, int64_t) { ++taps; });
    for_each_tap(p, n, i, j, c, [&](int64_t, int64_t at_x) {
      sums[at_x] += static_cast<double>(dy[at_y]) / static_cast<double>(taps);
    });
  });
  store(sums, dx);
}

void conv2d_pool_fprop(const Conv2dProblem& p, const float* x, const float* filter,
                       const float* bias, float* y, std::uint8_t* argmax) {
  std::vector<float> whole(p.y_size());
  conv2d_fprop(p, x, filter, bias, whole.data());
  max_pool2d_fprop(pool_behind(p), whole.data(), y, argmax);
}

void conv2d_pool_bprop(const Conv2dProblem& p, const float* x, const float* filter, const float* dy,
                       const float* y, const std::uint8_t* argmax, float* dx, float* dfilter,
                       float* dbias) {
  const Pool2dProblem pool = pool_behind(p);
  std::vector<float> through(pool.y_size()), dz(p.y_size());
  for (int64_t at = 0; at < pool.y_size(); ++at) {
    through[at] = static_cast<float>(through_activation(p, y, dy, at));
  }
  max_pool2d_bprop(pool, through.data(), argmax, dz.data());
  Conv2dProblem linear = p;
  linear.activation = Activation::linear;
  if (dx) conv2d_dgrad(linear, dz.data(), filter, nullptr, dx);
  conv2d_wgrad(linear, x, dz.data(), nullptr, dfilter, dbias);
}

namespace {

double slope_of_gated(Activation activation, double value) {
  const double gate = gate_of(activation, value);
  if (activation == Activation::silu) return gate * (1 + value * (1 - gate));
  return gate + (std::fabs(value) <= 3 ? value / 6 : 0);
}

double normalized(const BatchNormProblem& p, double x, double mean, double variance) {
  return (x - mean) / std::sqrt(variance + p.epsilon);
}

}  // namespace

void batch_norm_moments(const BatchNormProblem& p, const float* x, float* mean, float* variance) {
  const double rows = static_cast<double>(p.rows);
  for (int64_t c = 0; c < p.channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t row = 0; row < p.rows; ++row) sum += x[row * p.channels + c];
    for (int64_t row = 0; row < p.rows; ++row) {
      const double apart = x[row * p.channels + c] - sum / rows;
      squares += apart * apart;
    }
    mean[c] = static_cast<float>(sum / rows);
    variance[c] = static_cast<float>(squares / rows);
  }
}

void batch_norm_fprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta,
                      const float* residual, float* y) {
  for (int64_t at = 0; at < p.rows * p.channels; ++at) {
    const int64_t c = at % p.channels;
    double sum = normalized(p, x[at], mean[c], variance[c]) * gamma[c] + beta[c];
    if (residual) sum += residual[at];
    y[at] = static_cast<float>(activated(p.activation, sum));
  }
}

void batch_norm_bprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta, const float* dy,
                      const float* y, float* dx, float* dgamma, float* dbeta, float* dresidual) {
  const double rows = static_cast<double>(p.rows);
  for (int64_t c = 0; c < p.channels; ++c) {
    const auto x_at = [&](int64_t at) { return normalized(p, x[at], mean[c], variance[c]); };
    const auto dz_at = [&](int64_t at) {
      const double value = y ? y[at] : x_at(at) * gamma[c] + beta[c];
      if (is_gated(p.activation)) return slope_of_gated(p.activation, value) * dy[at];
      return lets_through(p.activation, value) ? dy[at] : 0.0;
    };
    double sum = 0, product = 0;
    for (int64_t at = c; at < p.rows * p.channels; at += p.channels) {
      sum += dz_at(at);
      product += dz_at(at) * x_at(at);
      if (dresidual) dresidual[at] = static_cast<float>(dz_at(at));
    }
    dgamma[c] = static_cast<float>(product);
    dbeta[c] = static_cast<float>(sum);
    for (int64_t at = c; at < p.rows * p.channels; at += p.channels) {
      dx[at] = static_cast<float>(gamma[c] / std::sqrt(variance[c] + double{p.epsilon}) *
                                  (dz_at(at) - sum / rows - x_at(at) * product / rows));
    }
  }
}

}  // namespace fastconv::reference
