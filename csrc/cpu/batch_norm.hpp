// Batch normalisation of rows x channels (NHWC), with the sum and the activation behind it: statistics
// and normalisation, which at inference is all, read x once each, the gradient reads what it needs twice.
//
// All are passes over memory that is in a cache at best, so the aim is few passes: a stock graph makes
// some ten of them forward and more backward. Algorithm: Ioffe and Szegedy, Batch Normalization (2015);
// moments of blocks are put together as by Chan, Golub and LeVeque (1979), in double.
//
// All channels of a few rows come before the next rows, so that memory is read as it lies; results that no
// cache keeps are streamed.
#pragma once

#include <cmath>
#include <cstring>

#include "core/problem.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/activation.hpp"
#include "cpu/kernels.hpp"
#include "cpu/streaming.hpp"

namespace fastconv::cpu {
namespace {

// A partition that depends on the problem alone, so that sums have the same bits for any number of
// threads: blocks of rows, each in pieces of neighbouring channels.
struct NormBlocks {
  static constexpr int64_t kChannels = 1024;  // of a piece: one page of each row
  static constexpr int64_t kJoined = 128;     // whose blocks' sums a task puts together
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
  // Calls body(first channel, number of channels) to put the blocks' sums together.
  template <class Body>
  void for_each_joined(const Body& body) const {
    parallel_for(ceil_div(channels, kJoined), [&](int64_t task) {
      body(task * kJoined, min64(kJoined, channels - task * kJoined));
    });
  }
};

// Calls body.template operator()<Vectors>(first channel, tail) for the channels of a piece: by four or two
// whole vectors, what is left by single ones.
template <class V, class Body>
void for_each_column(int64_t channels, const Body& body) {
  int64_t c = 0;
  const typename V::Tail whole = V::tail(V::kWidth);
  for (; c + 4 * V::kWidth <= channels; c += 4 * V::kWidth) body.template operator()<4>(c, whole);
  for (; c + 2 * V::kWidth <= channels; c += 2 * V::kWidth) body.template operator()<2>(c, whole);
  for (; c < channels; c += V::kWidth) {
    body.template operator()<1>(c, V::tail(static_cast<int>(min64(V::kWidth, channels - c))));
  }
}

template <class V, int Vectors>
typename V::Reg load_column(const float* at, int v, typename V::Tail tail) {
  return Vectors == 1 ? V::load(at, tail) : V::load(at + v * V::kWidth);
}
// `Streams`: whole lines past the caches.
template <class V, int Vectors, bool Streams = false>
void store_column(float* at, int v, typename V::Reg value, typename V::Tail tail) {
  if constexpr (Vectors == 1) {
    V::store(at, value, tail);
  } else if constexpr (Streams) {
    V::stream(at + v * V::kWidth, value);
  } else {
    V::store(at + v * V::kWidth, value);
  }
}

// Rows whose sums are taken by themselves before they join a block's: in a long sum of like terms every
// addition is rounded the same way.
constexpr int64_t kRowsAtOnce = 64;

// Rows all of whose channels come before the next rows'. In a cache these are more, for what a channel needs is
// loaded once for all. From memory they are few, for the hardware to see runs of lines: of 128 channels one, for
// two to four of them were slower than either (a Zen 4). Where registers hold all channels they take no turns.
template <class V>
int64_t rows_in_turn(const BatchNormProblem& p, int64_t channels) {
  constexpr int64_t kFew = 8, kFloats = 8192, kLongRow = 128;
  if (channels <= 4 * V::kWidth) return kRowsAtOnce;
  if (beyond_caches(2 * p.rows * p.channels)) return channels < kLongRow ? kFew : 1;
  int64_t rows = kRowsAtOnce;
  while (rows > kFew && rows * channels > kFloats) rows /= 2;
  return rows;
}

// Calls body(row, its number of rows) for those of a block that are taken in turn.
template <class V, class Body>
void for_each_turn(const BatchNormProblem& p, int64_t rows, int64_t channels, const Body& body) {
  const int64_t step = rows_in_turn<V>(p, channels);
  for (int64_t row = 0; row < rows; row += step) body(row, min64(step, rows - row));
}

// Of a block's rows: some value near their mean, the mean's distance from it, and the sum of the squares
// of what the rows are apart from the mean. One pass: of kRowsAtOnce rows the sums of x - x0 and of its
// square, x0 being the first of them, so that no digits are lost where the mean is large beside the
// deviation; these are joined as blocks are. Were x0 one row of the whole block, and it unlike all others,
// the square's sum would be mostly what the mean's takes away again.
template <class V>
void moments_of_block(const BatchNormProblem& p, int64_t rows, int64_t channels, const float* x,
                      float* origins, float* means, float* squares) {
  alignas(64) float sums[NormBlocks::kChannels], own_squares[NormBlocks::kChannels];
  for_each_turn<V>(p, rows, channels, [&](int64_t row, int64_t count) {
    const int64_t before = row / kRowsAtOnce * kRowsAtOnce;
    const int64_t some = min64(kRowsAtOnce, rows - before);
    const auto number = [](double value) {
      const auto rounded = static_cast<float>(value);
      return V::broadcast(&rounded);
    };
    const auto all = static_cast<double>(some), earlier = static_cast<double>(before);
    const typename V::Reg a_row = number(1 / all), share = number(all / (earlier + all));
    const typename V::Reg weight = number(earlier * all / (earlier + all));
    for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
      typename V::Reg first[Vectors], sum[Vectors], own[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        first[v] = load_column<V, Vectors>(x + before * p.channels + c, v, tail);
        sum[v] = row == before ? V::zero() : load_column<V, Vectors>(sums + c, v, tail);
        own[v] = row == before ? V::zero() : load_column<V, Vectors>(own_squares + c, v, tail);
      }
      const int64_t pitch = p.channels;
      const float* from = x + row * pitch + c;
      for (int64_t i = 0; i < count; ++i, from += pitch) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const typename V::Reg apart =
              V::subtract(load_column<V, Vectors>(from, v, tail), first[v]);
          sum[v] = V::add(sum[v], apart);
          own[v] = V::fma(apart, apart, own[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        if (row + count < before + some) {
          store_column<V, Vectors>(sums + c, v, sum[v], tail);
          store_column<V, Vectors>(own_squares + c, v, own[v], tail);
          continue;
        }
        const typename V::Reg moved = V::multiply(sum[v], a_row);
        typename V::Reg near = V::add(first[v], moved), mean = V::zero();
        typename V::Reg square = V::subtract(own[v], V::multiply(moved, sum[v]));
        if (before > 0) {
          near = load_column<V, Vectors>(origins + c, v, tail);
          mean = load_column<V, Vectors>(means + c, v, tail);
          const typename V::Reg apart =
              V::subtract(V::add(V::subtract(first[v], near), moved), mean);
          mean = V::fma(apart, share, mean);
          square = V::add(load_column<V, Vectors>(squares + c, v, tail),
                          V::fma(V::multiply(apart, apart), weight, square));
        }
        store_column<V, Vectors>(origins + c, v, near, tail);
        store_column<V, Vectors>(means + c, v, mean, tail);
        store_column<V, Vectors>(squares + c, v, square, tail);
      }
    });
  });
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
    moments_of_block<V>(p, rows, channels, x + at, origins + to, means + to, squares + to);
  });
  parts.for_each_joined([&](int64_t begin, int64_t channels) {
    double average[NormBlocks::kJoined] = {}, squared[NormBlocks::kJoined] = {};
    for (int64_t block = 0; block < parts.blocks; ++block) {
      const int64_t before = block * parts.rows;
      const double count = static_cast<double>(min64(parts.rows, p.rows - before));
      const double share = count / (static_cast<double>(before) + count);
      const double weight = static_cast<double>(before) * share;
      const int64_t at = block * p.channels + begin;
      for (int64_t c = 0; c < channels; ++c) {
        const double apart = double{origins[at + c]} + double{means[at + c]} - average[c];
        average[c] += apart * share;
        squared[c] += squares[at + c] + apart * apart * weight;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[begin + c] = static_cast<float>(average[c]);
      // Rounding may leave a trifle below 0; NaN stays.
      const double square = squared[c] / static_cast<double>(p.rows);
      variance[begin + c] = static_cast<float>(square < 0 ? 0 : square);
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
  const auto run = [&]<Activation Kind, bool Adds, bool Streams>() {
    parts.for_each([&](int64_t, int64_t rows, int64_t at, int64_t first, int64_t channels) {
      for_each_turn<V>(p, rows, channels, [&](int64_t row, int64_t count) {
        for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
          typename V::Reg middle[Vectors], scale[Vectors], offset[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            middle[v] = load_column<V, Vectors>(mean + first + c, v, tail);
            scale[v] = load_column<V, Vectors>(scales + first + c, v, tail);
            offset[v] = load_column<V, Vectors>(beta + first + c, v, tail);
          }
          const int64_t begin = at + row * p.channels + c, pitch = p.channels;
          const float *from = x + begin, *other = Adds ? residual + begin : nullptr;
          float* to = y + begin;
          for (int64_t i = 0; i < count;
               ++i, from += pitch, other += Adds ? pitch : 0, to += pitch) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
              const typename V::Reg apart =
                  V::subtract(load_column<V, Vectors>(from, v, tail), middle[v]);
              typename V::Reg value = V::fma(apart, scale[v], offset[v]);
              if constexpr (Adds) {
                value = V::add(value, load_column<V, Vectors>(other, v, tail));
              }
              store_column<V, Vectors, Streams>(to, v, activated<V, Kind>(value), tail);
            }
          }
        });
      });
      if constexpr (Streams) V::drain();
    });
  };
  of_activation(p.activation, [&]<Activation Kind>() {
    as_constant(streams_pixels(y, p.channels, 2 * p.rows * p.channels), [&](auto streams) {
      residual ? run.template operator()<Kind, true, streams>()
               : run.template operator()<Kind, false, streams>();
    });
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
    const float *x, *dy, *y;
    typename V::Tail tail;
    typename V::Reg middle[Vectors], scale[Vectors], offset[Vectors];

    Column(const BatchNormBprop& of, int64_t first, typename V::Tail tail)
        : x(of.t.x), dy(of.t.dy), y(of.t.y), tail(tail) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        middle[v] = load_column<V, Vectors>(of.t.mean + first, v, tail);
        scale[v] = load_column<V, Vectors>(of.scales + first, v, tail);
        offset[v] = load_column<V, Vectors>(of.t.beta + first, v, tail);
      }
    }
    typename V::Reg apart(int64_t here, int v) const {
      return V::subtract(load_column<V, Vectors>(x + here, v, tail), middle[v]);
    }
    typename V::Reg through(int64_t here, int v, typename V::Reg apart) const {
      typename V::Reg dz = load_column<V, Vectors>(dy + here, v, tail);
      if constexpr (Mask == NormMask::none) return dz;
      const typename V::Reg value = Mask == NormMask::by_y
                                        ? load_column<V, Vectors>(y + here, v, tail)
                                        : V::fma(apart, scale[v], offset[v]);
      if constexpr (is_gated(Kind)) return V::multiply(dz, slope_of<V, Kind>(value));
      dz = V::where_positive(value, dz);
      if constexpr (Kind == Activation::relu6) {
        dz = V::where_positive(V::subtract(V::set(ceiling_of(Kind)), value), dz);
      }
      return dz;
    }
  };

  template <NormMask Mask, Activation Kind, bool Streams>
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
      alignas(64) float own_sums[NormBlocks::kChannels], own_products[NormBlocks::kChannels];
      std::memset(sums + to, 0, static_cast<std::size_t>(channels) * sizeof(float));
      std::memset(products + to, 0, static_cast<std::size_t>(channels) * sizeof(float));
      for_each_turn<V>(p, rows, channels, [&](int64_t row, int64_t count) {
        const bool begins = row % kRowsAtOnce == 0;
        const bool ends = row + count == rows || (row + count) % kRowsAtOnce == 0;
        for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
          const Column<Vectors, Mask, Kind> column(*this, first + c, tail);
          typename V::Reg sum[Vectors], product[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            sum[v] = begins ? V::zero() : load_column<V, Vectors>(own_sums + c, v, tail);
            product[v] = begins ? V::zero() : load_column<V, Vectors>(own_products + c, v, tail);
          }
          const int64_t pitch = p.channels;
          float* const masked = t.dresidual;
          int64_t here = at + row * pitch + c;
          for (int64_t i = 0; i < count; ++i, here += pitch) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
              const typename V::Reg apart = column.apart(here, v);
              const typename V::Reg dz = column.through(here, v, apart);
              if constexpr (Mask == NormMask::by_y) {
                store_column<V, Vectors, Streams>(masked + here, v, dz, tail);
              }
              sum[v] = V::add(sum[v], dz);
              product[v] = V::fma(dz, apart, product[v]);
            }
          }
          float* const to_sums = ends ? sums + to : own_sums;
          float* const to_products = ends ? products + to : own_products;
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            if (ends) {
              sum[v] = V::add(load_column<V, Vectors>(to_sums + c, v, tail), sum[v]);
              product[v] = V::add(load_column<V, Vectors>(to_products + c, v, tail), product[v]);
            }
            store_column<V, Vectors>(to_sums + c, v, sum[v], tail);
            store_column<V, Vectors>(to_products + c, v, product[v], tail);
          }
        });
      });
      if constexpr (Streams && Mask == NormMask::by_y) V::drain();
    });
    parts.for_each_joined([&](int64_t begin, int64_t channels) {
      double sum[NormBlocks::kJoined] = {}, product[NormBlocks::kJoined] = {};
      for (int64_t block = 0; block < parts.blocks; ++block) {
        const int64_t at = block * p.channels + begin;
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += sums[at + c];
          product[c] += products[at + c];
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t to = begin + c;
        const double square = static_cast<double>(t.variance[to]) + p.epsilon;
        const double rows = static_cast<double>(p.rows);
        t.dgamma[to] = static_cast<float>(product[c] / std::sqrt(square));
        t.dbeta[to] = static_cast<float>(sum[c]);
        slopes[to] = static_cast<float>(scales[to] * product[c] / square / rows);
        shifts[to] = static_cast<float>(scales[to] * sum[c] / rows);
      }
    });
    parts.for_each([&](int64_t, int64_t rows, int64_t at, int64_t first, int64_t channels) {
      for_each_turn<V>(p, rows, channels, [&](int64_t row, int64_t count) {
        for_each_column<V>(channels, [&]<int Vectors>(int64_t c, typename V::Tail tail) {
          const Column<Vectors, Mask, Kind> column(*this, first + c, tail);
          typename V::Reg slope[Vectors], shift[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            slope[v] = load_column<V, Vectors>(slopes + first + c, v, tail);
            shift[v] = load_column<V, Vectors>(shifts + first + c, v, tail);
          }
          const int64_t pitch = p.channels;
          const float* const masked = t.dresidual;
          float* const dx = t.dx;
          int64_t here = at + row * pitch + c;
          for (int64_t i = 0; i < count; ++i, here += pitch) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
              const typename V::Reg apart = column.apart(here, v);
              const typename V::Reg dz = Mask == NormMask::by_y
                                             ? load_column<V, Vectors>(masked + here, v, tail)
                                             : column.through(here, v, apart);
              const typename V::Reg rest = V::fma(slope[v], apart, shift[v]);
              store_column<V, Vectors, Streams>(
                  dx + here, v, V::subtract(V::multiply(column.scale[v], dz), rest), tail);
            }
          }
        });
      });
      if constexpr (Streams) V::drain();
    });
  }
};

template <class V>
void batch_norm_bprop(const BatchNormProblem& p, const BatchNormGradOperands& t) {
  const Workspace workspace(static_cast<std::size_t>(p.channels) * sizeof(float));
  norm_scales<V>(p, t.variance, t.gamma, workspace.floats());
  const BatchNormBprop<V> bprop{p, t, NormBlocks(p), workspace.floats()};
  const int64_t floats = 2 * p.rows * p.channels;
  const bool all_stream = streams_pixels(t.dx, p.channels, floats) &&
                          (!t.y || streams_pixels(t.dresidual, p.channels, floats));
  of_activation(p.activation, [&]<Activation Kind>() {
    as_constant(all_stream, [&](auto streams) {
      if constexpr (Kind == Activation::linear) {
        bprop.template run<NormMask::none, Kind, streams>();
      } else if constexpr (is_gated(Kind)) {
        bprop.template run<NormMask::by_x, Kind, streams>();
      } else if (t.y) {
        bprop.template run<NormMask::by_y, Kind, streams>();
      } else {
        bprop.template run<NormMask::by_x, Kind, streams>();
      }
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
