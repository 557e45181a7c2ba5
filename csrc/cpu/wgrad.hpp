// Convolution wgrad: dfilter[q, k] = sum over output pixels of x[pixel + offset(q)] * dy[pixel, k],
// q running over (r, s, c). A register tile of V::kRows q's x V::kVectors vectors of k stays in
// registers while pixels stream by.
//
// The pixels are cut into `parts`, each with a sum of its own, added up in order at the end. The
// cut depends on the problem alone and there are no atomics: the same bits for any thread count.
#pragma once

#include "cpu/implicit_gemm.hpp"

namespace fastconv::cpu {
namespace {

struct WgradTile {
  const float* x;  // of the first row of pixels
  const int64_t* offsets;
  const float* dy;
  int64_t row, row_end, rows_an_image;      // output rows, counted over all images
  int64_t x_image, x_row, x_column;         // floats from image, row, pixel to the next
  int64_t columns, dy_pixel;
  float* sum;
  int64_t sum_row;
  int valid;  // columns of the last vector
  bool first;
};

template <class V, int Rows, int Vectors>
void wgrad_tile(const WgradTile& t) {
  const auto tail = V::tail(t.valid);
  typename V::Reg sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const float* at = t.sum + i * t.sum_row + v * V::kWidth;
      sum[i][v] = t.first ? V::zero() : v == Vectors - 1 ? V::load(at, tail) : V::load(at);
    }
  int64_t offset[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) offset[i] = t.offsets[i];
  const float* dy = t.dy;
  for (int64_t row = t.row; row < t.row_end; ++row) {
    const float* x = t.x + row / t.rows_an_image * t.x_image + row % t.rows_an_image * t.x_row;
    for (int64_t j = 0; j < t.columns; ++j, x += t.x_column, dy += t.dy_pixel) {
      typename V::Reg b[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors - 1; ++v) b[v] = V::load(dy + v * V::kWidth);
      b[Vectors - 1] = V::load(dy + (Vectors - 1) * V::kWidth, tail);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const typename V::Reg a = V::broadcast(x + offset[i]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = V::fma(a, b[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* at = t.sum + i * t.sum_row + v * V::kWidth;
      if (v == Vectors - 1) {
        V::store(at, sum[i][v], tail);
      } else {
        V::store(at, sum[i][v]);
      }
    }
}

using WgradTileFunction = void (*)(const WgradTile&);

template <class V, int Rows = V::kRows>
WgradTileFunction wgrad_tile_function(int rows, int vectors) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return wgrad_tile_function<V, Rows - 1>(rows, vectors);
  }
  return vectors == 1 ? wgrad_tile<V, Rows, 1> : wgrad_tile<V, Rows, 2>;
}

// The cut of one wgrad: input copies, partial sums and tasks.
template <class V>
struct WgradPlan {
  static constexpr int64_t kPanel = V::kVectors * V::kWidth;
  int64_t floats, source_h, source_w, image_floats, chunk, parts;
  int64_t rows_q, q_tiles, panels, q_groups;
  int64_t offsets_bytes, sums_bytes, copy_bytes;
  bool padded;

  explicit WgradPlan(const Conv2dProblem& p) {
    floats = p.filter_size();
    // The input rows and columns that the taps reach, with their padding.
    const int64_t reach_h = (p.oh - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    const int64_t reach_w = (p.ow - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1;
    padded = p.pad_top || p.pad_left || reach_h - p.pad_top > p.h || reach_w - p.pad_left > p.w;
    source_h = padded ? reach_h : p.h;
    source_w = padded ? reach_w : p.w;

    // Padded copies of as many images at a time as 32 MiB hold; all of them where none is copied.
    image_floats = source_h * source_w * p.c;
    chunk = padded ? max64(1, min64(p.n, (int64_t{32} << 20) / max64(image_floats * 4, 1))) : p.n;

    // Partial sums pay where there are many pixels and the filter is small; 1 MiB of them at most.
    const int64_t pixels = p.n * p.oh * p.ow;
    parts = max64(1, min64(min64(pixels / 80, chunk * p.oh),
                           min64(16, (int64_t{1} << 20) / max64(floats * 4, 1))));
    rows_q = p.r * p.s * p.c_per_group();
    q_tiles = ceil_div(rows_q, V::kRows);
    panels = ceil_div(p.k_per_group(), kPanel);
    q_groups = min64(q_tiles, ceil_div(int64_t{64}, max64(1, parts * panels * p.groups)));

    offsets_bytes = ceil_div(rows_q * 8, 64) * 64;
    sums_bytes = parts == 1 ? 0 : ceil_div(parts * floats * 4, 64) * 64;
    copy_bytes = padded ? chunk * image_floats * 4 : 0;
  }

  int64_t workspace_bytes() const { return offsets_bytes + sums_bytes + copy_bytes; }
};

template <class V>
void implicit_gemm_wgrad(const Conv2dProblem& p, const float* x, const float* dy, float* dfilter) {
  if (p.n * p.oh * p.ow == 0) {
    std::memset(dfilter, 0, static_cast<std::size_t>(p.filter_size()) * 4);
    return;
  }
  const WgradPlan<V> plan(p);
  constexpr int64_t kPanel = WgradPlan<V>::kPanel;
  const int64_t cg = p.c_per_group(), kg = p.k_per_group();
  const int64_t rows_a_block = max64(1, 128 / p.ow);
  const Workspace workspace(static_cast<std::size_t>(plan.workspace_bytes()));
  int64_t* offsets = reinterpret_cast<int64_t*>(workspace.floats());
  float* sums = plan.parts == 1 ? dfilter : workspace.floats(plan.offsets_bytes);
  float* copy = plan.padded ? workspace.floats(plan.offsets_bytes + plan.sums_bytes) : nullptr;
  for (int64_t r = 0, q = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      for (int64_t c = 0; c < cg; ++c, ++q) {
        offsets[q] = (r * p.dilation_h * plan.source_w + s * p.dilation_w) * p.c + c;
      }

  for (int64_t image = 0; image < p.n; image += plan.chunk) {
    const int64_t images = min64(plan.chunk, p.n - image);
    const float* source = x + image * p.h * p.w * p.c;
    if (plan.padded) {
      const float* unpadded = source;
      parallel_for(images * plan.source_h, [&](int64_t task) {
        const int64_t n = task / plan.source_h, i = task % plan.source_h - p.pad_top;
        float* out = copy + task * plan.source_w * p.c;
        if (i < 0 || i >= p.h) {
          std::memset(out, 0, static_cast<std::size_t>(plan.source_w * p.c) * 4);
          return;
        }
        const int64_t left = min64(p.pad_left, plan.source_w);
        const int64_t middle = max64(0, min64(p.w, plan.source_w - left));
        std::memset(out, 0, static_cast<std::size_t>(left * p.c) * 4);
        std::memcpy(out + left * p.c, unpadded + (n * p.h + i) * p.w * p.c,
                    static_cast<std::size_t>(middle * p.c) * 4);
        std::memset(out + (left + middle) * p.c, 0,
                    static_cast<std::size_t>((plan.source_w - left - middle) * p.c) * 4);
      });
      source = copy;
    }
    const float* chunk_dy = dy + image * p.oh * p.ow * p.k;
    parallel_for(plan.parts * p.groups * plan.panels * plan.q_groups, [&](int64_t task) {
      const int64_t q_group = task % plan.q_groups;
      const int64_t panel = task / plan.q_groups % plan.panels;
      const int64_t group = task / plan.q_groups / plan.panels % p.groups;
      const int64_t part = task / plan.q_groups / plan.panels / p.groups;
      const int64_t row_begin = images * p.oh * part / plan.parts;
      const int64_t row_end = images * p.oh * (part + 1) / plan.parts;
      const int64_t column = group * kg + panel * kPanel;
      const int64_t width = min64(kg - panel * kPanel, kPanel);
      const int vectors = static_cast<int>(ceil_div(width, V::kWidth));
      WgradTile t{};
      t.x = source + group * cg;
      t.rows_an_image = p.oh;
      t.x_image = plan.image_floats;
      t.x_row = p.stride_h * plan.source_w * p.c;
      t.x_column = p.stride_w * p.c;
      t.columns = p.ow;
      t.dy_pixel = p.k;
      t.sum_row = p.k;
      t.valid = static_cast<int>(width - (vectors - 1) * V::kWidth);
      // `first` must zero the sums even where a part has no rows in this chunk.
      for (int64_t row = row_begin; row == row_begin || row < row_end; row += rows_a_block) {
        t.row = row;
        t.row_end = min64(row + rows_a_block, row_end);
        t.dy = chunk_dy + row * p.ow * p.k + column;
        t.first = image == 0 && row == row_begin;
        for (int64_t tile = plan.q_tiles * q_group / plan.q_groups;
             tile < plan.q_tiles * (q_group + 1) / plan.q_groups; ++tile) {
          const int64_t q = plan.rows_q * tile / plan.q_tiles;
          const int64_t q_end = plan.rows_q * (tile + 1) / plan.q_tiles;
          t.offsets = offsets + q;
          t.sum = sums + part * plan.floats + q * p.k + column;
          wgrad_tile_function<V>(static_cast<int>(q_end - q), vectors)(t);
        }
      }
    });
  }

  if (plan.parts == 1) return;
  constexpr int64_t kFloatsATask = 4096;
  parallel_for(ceil_div(plan.floats, kFloatsATask), [&](int64_t task) {
    const int64_t end = min64(plan.floats, (task + 1) * kFloatsATask);
    for (int64_t i = task * kFloatsATask; i < end; i += V::kWidth) {
      const auto tail = V::tail(static_cast<int>(min64(V::kWidth, end - i)));
      typename V::Reg sum = V::load(sums + i, tail);
      for (int64_t part = 1; part < plan.parts; ++part) {
        sum = V::add(sum, V::load(sums + part * plan.floats + i, tail));
      }
      V::store(dfilter + i, sum, tail);
    }
  });
}

// `Vectors` neighbouring vectors of channels through a block of pixels, every line read once.
template <class V, int Vectors, bool Relu>
void activation_grad_block(int64_t pixels, int64_t channels, int valid, const float* dy,
                           const float* y, float* dz, float* sums) {
  const auto tail = V::tail(valid);
  typename V::Reg sum[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) sum[v] = V::zero();
  for (int64_t at = 0; at < pixels * channels; at += channels) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const bool last = v == Vectors - 1;
      const int64_t here = at + v * V::kWidth;
      typename V::Reg value = last ? V::load(dy + here, tail) : V::load(dy + here);
      if constexpr (Relu) {
        value = V::where_positive(last ? V::load(y + here, tail) : V::load(y + here), value);
        if (last) {
          V::store(dz + here, value, tail);
        } else {
          V::store(dz + here, value);
        }
      }
      sum[v] = V::add(sum[v], value);
    }
  }
  if (!sums) return;
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    if (v == Vectors - 1) {
      V::store(sums + v * V::kWidth, sum[v], tail);
    } else {
      V::store(sums + v * V::kWidth, sum[v]);
    }
  }
}

template <class V, bool Relu>
auto activation_grad_function(int64_t vectors) {
  return vectors == 1   ? activation_grad_block<V, 1, Relu>
         : vectors == 2 ? activation_grad_block<V, 2, Relu>
         : vectors == 3 ? activation_grad_block<V, 3, Relu>
                        : activation_grad_block<V, 4, Relu>;
}

// dz = dy where y > 0; dbias = the sum of dz over pixels, by blocks of a fixed size in order.
template <class V>
void activation_grad(int64_t pixels, int64_t channels, const float* dy, const float* y, float* dz,
                     float* dbias) {
  // Blocks grow with the problem so that their sums stay few.
  const int64_t pixels_a_block = max64(64, ceil_div(pixels, 64));
  const int64_t blocks = ceil_div(pixels, pixels_a_block);
  const Workspace workspace(static_cast<std::size_t>(dbias ? blocks * channels * 4 : 0));
  float* sums = dbias ? workspace.floats() : nullptr;
  parallel_for(blocks, [&](int64_t block) {
    const int64_t begin = block * pixels_a_block, end = min64(pixels, begin + pixels_a_block);
    constexpr int64_t kChannels = 4 * V::kWidth;
    for (int64_t c = 0; c < channels; c += kChannels) {
      const int64_t width = min64(kChannels, channels - c);
      const int64_t vectors = ceil_div(width, V::kWidth);
      const auto block_of = y ? activation_grad_function<V, true>(vectors)
                              : activation_grad_function<V, false>(vectors);
      const int64_t at = begin * channels + c;
      block_of(end - begin, channels, static_cast<int>(width - (vectors - 1) * V::kWidth),
               dy + at, y ? y + at : nullptr, y ? dz + at : nullptr,
               sums ? sums + block * channels + c : nullptr);
    }
  });
  if (!dbias) return;
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[block * channels + c];
    dbias[c] = sum;
  }
}

}  // namespace
}  // namespace fastconv::cpu
