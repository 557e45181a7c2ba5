// Batch normalisation of rows x channels (NHWC), with the sum and the activation behind it: statistics
// and normalisation, which at inference is all, read x once each, the gradient reads what it needs twice.
//
// All are passes over memory that is in a cache at best, so the aim is few passes: a stock graph makes
// some ten of them forward and more backward. Algorithm: Ioffe and Szegedy, Batch Normalization (2015);
// moments of blocks are put together as by Chan, Golub and LeVeque (1979), in double.
#pragma once

#include <cmath>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/activation.hpp"
#include "cpu/kernels.hpp"

namespace fastconv::cpu {
namespace {

// A partition that depends on the problem alone, so that sums have the same bits for any number of
// threads: blocks of rows, each in pieces of neighbouring channels.
struct NormBlocks {
  static constexpr int64_t kChannels = 256;  // of a piece: a KiB of each row
  int64_t total, channels, rows, blocks, pieces;

  explicit NormBlocks(const BatchNormProblem& p) : total(p.rows), channels(p.channels) {
    // Few enough that their sums are short beside x, and long enough that a task is worth its hand-off.
    rows = max64(max64(32, ceil_div(total, 128)), ceil_div(16384, channels));
    blocks = ceil_div(total, rows);
    pieces = ceil_div(channels, kChannels);
  }

  // Calls body(block, its number of rows, first element, first channel, number of channels).
  template <class Body>
  void for_each(const Body& body) const {
    parallel_for(blocks * pieces, [&](int64_t task) {
      const int64_t block = task / pieces, first = task % pieces * kChannels;
      const int64_t begin = block * rows;
      body(block, min64(rows, total - begin), begin * channels + first, first,
           min64(kChannels, channels - first));
    });
  }
  template <class Body>
  void for_each_piece(const Body& body) const {
    parallel_for(pieces, [&](int64_t piece) {
      body(piece * kChannels, min64(channels, (piece + 1) * kChannels));
    });
  }
};

// Calls body.template operator()<Vectors>(first channel, tail) for the channels of a piece: by four
// whole vectors, what is left by single ones.
template <class V, class Body>
void for_each_column(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * V::kWidth <= channels; c += 4 * V::kWidth) {
    body.template operator()<4>(c, V::tail(V::kWidth));
  }
  for (; c < channels; c += V::kWidth) {
    body.template operator()<1>(c, V::tail(static_cast<int>(min64(V::kWidth, channels - c))));
  }
}

template <class V, int Vectors>
typename V::Reg load_column(const float* at, int v, typename V::Tail tail) {
  return Vectors == 1 ? V::load(at, tail) : V::load(at + v * V::kWidth);
}
template <class V, int Vectors>
void store_column(float* at, int v, typename V::Reg value, typename V::Tail tail) {
  if (Vectors == 1) {
    V::store(at, value, tail);
  } else {
    V::store(at + v * V::kWidth, value);
  }
}

// Rows whose sums are taken by themselves before they join a block's: in a long sum of like terms every
// addition is rounded the same way.
constexpr int64_t kRowsAtOnce = 64;

// Of a block's rows: some value near their mean, the mean's distance from it, and the sum of the squares
// of what the rows are apart from the mean. One pass: of kRowsAtOnce rows the sums of x - x0 and of its
// square, x0 being the first of them, so that no digits are lost where the mean is large beside the
// deviation; these are joined as blocks are. Were x0 one row of the whole block, and it unlike all others,
// the square's sum would be mostly what the mean's takes away again.
template <class V, int Vectors>
void moments_of_block(int64_t rows, int64_t channels, const float* x, typename V::Tail tail,
                      float* origins, float* means, float* squares) {
  typename V::Reg near[Vectors], mean[Vectors], square[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) near[v] = mean[v] = square[v] = V::zero();
  for (int64_t before = 0; before < rows; before += kRowsAtOnce) {
    const int64_t some = min64(kRowsAtOnce, rows - before);
    typename V::Reg first[Vectors], sum[Vectors], own[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      first[v] = load_column<V, Vectors>(x, v, tail);
      sum[v] = own[v] = V::zero();
    }
    for (int64_t row = 0; row < some; ++row, x += channels) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const typename V::Reg apart = V::subtract(load_column<V, Vectors>(x, v, tail), first[v]);
        sum[v] = V::add(sum[v], apart);
        own[v] = V::fma(apart, apart, own[v]);
      }
    }
    const auto number = [](double value) {
      const auto rounded = static_cast<float>(value);
      return V::broadcast(&rounded);
    };
    const auto count = static_cast<double>(some), earlier = static_cast<double>(before);
    const typename V::Reg a_row = number(1 / count), share = number(count / (earlier + count));
    const typename V::Reg weight = number(earlier * count / (earlier + count));
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const typename V::Reg moved = V::multiply(sum[v], a_row);
      const typename V::Reg spread = V::subtract(own[v], V::multiply(moved, sum[v]));
      if (before == 0) {
        near[v] = V::add(first[v], moved);
        square[v] = spread;
        continue;
      }
      const typename V::Reg apart =
          V::subtract(V::add(V::subtract(first[v], near[v]), moved), mean[v]);
      mean[v] = V::fma(apart, share, mean[v]);
      square[v] = V::add(square[v], V::fma(V::multiply(apart, apart), weight, spread));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    store_column<V, Vectors>(origins, v, near[v], tail);
    store_column<V, Vectors>(means, v, mean[v], tail);
    store_column<V, Vectors>(squares, v, square[v], tail);
  }
}

template <class V>
void batch_norm_moments(const BatchNormProblem& p, const float* x, float* mean, float* variance) {
  const NormBlocks parts(p);
  const int64_t floats = parts.blocks * p.channels;
  const Workspace workspace(static_cast<std::size_t>(3 * floats) * sizeof(float));
  float* const origins = workspace.floats();
  float* const means = origins + floats;  // less the origins
  float* const squares = means + floats;
  parts.for_each([&](int64_t block, int64_t rows, int64_t at, int64_t first, int64_t channels) {
    const int64_t to = block * p.channels + first;
    for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
      moments_of_block<V, Vectors>(rows, p.channels, x + at + c, tail, origins + to + c,
                                   means + to + c, squares + to + c);
    });
  });
  parts.for_each_piece([&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double average = 0, squared = 0;
      for (int64_t block = 0; block < parts.blocks; ++block) {
        const int64_t before = block * parts.rows;
        const double count = static_cast<double>(min64(parts.rows, p.rows - before));
        const double total = static_cast<double>(before) + count;
        const int64_t at = block * p.channels + c;
        const double apart = double{origins[at]} + double{means[at]} - average;
        average += apart * count / total;
        squared += squares[at] + apart * apart * static_cast<double>(before) * count / total;
      }
      mean[c] = static_cast<float>(average);
      // Rounding may leave a trifle below 0; NaN stays.
      squared /= static_cast<double>(p.rows);
      variance[c] = static_cast<float>(squared < 0 ? 0 : squared);
    }
  });
}

// gamma / sqrt(variance + epsilon), by channels.
template <class V>
void norm_scales(const BatchNormProblem& p, const float* variance, const float* gamma,
                 float* scales) {
  for (int64_t c = 0; c < p.channels; ++c) {
    scales[c] =
        static_cast<float>(gamma[c] / std::sqrt(static_cast<double>(variance[c]) + p.epsilon));
  }
}

template <class V>
void batch_norm_fprop(const BatchNormProblem& p, const float* x, const float* mean,
                      const float* variance, const float* gamma, const float* beta,
                      const float* residual, float* y) {
  const NormBlocks parts(p);
  const Workspace workspace(static_cast<std::size_t>(p.channels) * sizeof(float));
  float* const scales = workspace.floats();
  norm_scales<V>(p, variance, gamma, scales);
  const auto run = [&]<Activation Kind, bool Adds>() {
    parts.for_each([&](int64_t, int64_t rows, int64_t at, int64_t first, int64_t channels) {
      for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
        typename V::Reg middle[Vectors], scale[Vectors], offset[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          middle[v] = load_column<V, Vectors>(mean + first + c, v, tail);
          scale[v] = load_column<V, Vectors>(scales + first + c, v, tail);
          offset[v] = load_column<V, Vectors>(beta + first + c, v, tail);
        }
        for (int64_t row = 0, here = at + c; row < rows; ++row, here += p.channels) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            const typename V::Reg apart =
                V::subtract(load_column<V, Vectors>(x + here, v, tail), middle[v]);
            typename V::Reg value = V::fma(apart, scale[v], offset[v]);
            if constexpr (Adds) {
              value = V::add(value, load_column<V, Vectors>(residual + here, v, tail));
            }
            store_column<V, Vectors>(y + here, v, activated<V, Kind>(value), tail);
          }
        }
      });
    });
  };
  of_activation(p.activation, [&]<Activation Kind>() {
    residual ? run.template operator()<Kind, true>() : run.template operator()<Kind, false>();
  });
}

// What tells where the activation let a value through: nothing, the value, which x gives again with
// the same bits, or y.
enum class NormMask { none, by_x, by_y };

template <class V>
struct BatchNormBprop {
  const BatchNormProblem& p;
  const BatchNormGradOperands& t;
  const NormBlocks parts;
  const float* scales;

  // What the activation let through of dy, and x - mean.
  template <int Vectors, NormMask Mask, Activation Kind>
  struct Column {
    const BatchNormBprop& of;
    typename V::Tail tail;
    typename V::Reg middle[Vectors], scale[Vectors], offset[Vectors];

    Column(const BatchNormBprop& of, int64_t first, typename V::Tail tail) : of(of), tail(tail) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        middle[v] = load_column<V, Vectors>(of.t.mean + first, v, tail);
        scale[v] = load_column<V, Vectors>(of.scales + first, v, tail);
        offset[v] = load_column<V, Vectors>(of.t.beta + first, v, tail);
      }
    }
    typename V::Reg apart(int64_t here, int v) const {
      return V::subtract(load_column<V, Vectors>(of.t.x + here, v, tail), middle[v]);
    }
    typename V::Reg through(int64_t here, int v, typename V::Reg apart) const {
      typename V::Reg dz = load_column<V, Vectors>(of.t.dy + here, v, tail);
      if constexpr (Mask == NormMask::none) return dz;
      const typename V::Reg value = Mask == NormMask::by_y
                                        ? load_column<V, Vectors>(of.t.y + here, v, tail)
                                        : V::fma(apart, scale[v], offset[v]);
      if constexpr (is_gated(Kind)) return V::multiply(dz, slope_of<V, Kind>(value));
      dz = V::where_positive(value, dz);
      if constexpr (Kind == Activation::relu6) {
        dz = V::where_positive(V::subtract(V::set(ceiling_of(Kind)), value), dz);
      }
      return dz;
    }
  };

  template <NormMask Mask, Activation Kind>
  void run() const {
    const int64_t floats = parts.blocks * p.channels;
    const Workspace workspace(static_cast<std::size_t>(2 * floats + 2 * p.channels) *
                              sizeof(float));
    float* const sums = workspace.floats();  // of dz, by blocks
    float* const products = sums + floats;   // of dz * (x - mean)
    float* const slopes =
        products + floats;  // by channels: dx = scale * dz - slope * (x - mean) - shift
    float* const shifts = slopes + p.channels;
    parts.for_each([&](int64_t block, int64_t rows, int64_t at, int64_t first, int64_t channels) {
      const int64_t to = block * p.channels + first;
      for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
        const Column<Vectors, Mask, Kind> column(*this, first + c, tail);
        typename V::Reg sums_of_block[Vectors], products_of_block[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums_of_block[v] = products_of_block[v] = V::zero();
        for (int64_t row = 0, here = at + c; row < rows;) {
          typename V::Reg sum[Vectors], product[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[v] = product[v] = V::zero();
          const int64_t end = min64(rows, row + kRowsAtOnce);
          for (; row < end; ++row, here += p.channels) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
              const typename V::Reg apart = column.apart(here, v);
              const typename V::Reg dz = column.through(here, v, apart);
              if constexpr (Mask == NormMask::by_y) {
                store_column<V, Vectors>(t.dresidual + here, v, dz, tail);
              }
              sum[v] = V::add(sum[v], dz);
              product[v] = V::fma(dz, apart, product[v]);
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            sums_of_block[v] = V::add(sums_of_block[v], sum[v]);
            products_of_block[v] = V::add(products_of_block[v], product[v]);
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          store_column<V, Vectors>(sums + to + c, v, sums_of_block[v], tail);
          store_column<V, Vectors>(products + to + c, v, products_of_block[v], tail);
        }
      });
    });
    parts.for_each_piece([&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0, product = 0;
        for (int64_t block = 0; block < parts.blocks; ++block) {
          sum += sums[block * p.channels + c];
          product += products[block * p.channels + c];
        }
        const double square = static_cast<double>(t.variance[c]) + p.epsilon;
        const double rows = static_cast<double>(p.rows);
        t.dgamma[c] = static_cast<float>(product / std::sqrt(square));
        t.dbeta[c] = static_cast<float>(sum);
        slopes[c] = static_cast<float>(scales[c] * product / square / rows);
        shifts[c] = static_cast<float>(scales[c] * sum / rows);
      }
    });
    parts.for_each([&](int64_t, int64_t rows, int64_t at, int64_t first, int64_t channels) {
      for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
        const Column<Vectors, Mask, Kind> column(*this, first + c, tail);
        typename V::Reg slope[Vectors], shift[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          slope[v] = load_column<V, Vectors>(slopes + first + c, v, tail);
          shift[v] = load_column<V, Vectors>(shifts + first + c, v, tail);
        }
        for (int64_t row = 0, here = at + c; row < rows; ++row, here += p.channels) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            const typename V::Reg apart = column.apart(here, v);
            const typename V::Reg dz = Mask == NormMask::by_y
                                           ? load_column<V, Vectors>(t.dresidual + here, v, tail)
                                           : column.through(here, v, apart);
            const typename V::Reg rest = V::fma(slope[v], apart, shift[v]);
            store_column<V, Vectors>(t.dx + here, v,
                                     V::subtract(V::multiply(column.scale[v], dz), rest), tail);
          }
        }
      });
    });
  }
};

template <class V>
void batch_norm_bprop(const BatchNormProblem& p, const BatchNormGradOperands& t) {
  const Workspace workspace(static_cast<std::size_t>(p.channels) * sizeof(float));
  norm_scales<V>(p, t.variance, t.gamma, workspace.floats());
  const BatchNormBprop<V> bprop{p, t, NormBlocks(p), workspace.floats()};
  of_activation(p.activation, [&]<Activation Kind>() {
    if constexpr (Kind == Activation::linear) {
      bprop.template run<NormMask::none, Kind>();
    } else if constexpr (is_gated(Kind)) {
      bprop.template run<NormMask::by_x, Kind>();
    } else {
      t.y ? bprop.template run<NormMask::by_y, Kind>() : bprop.template run<NormMask::by_x, Kind>();
    }
  });
}

}  // namespace
}  // namespace fastconv::cpu
