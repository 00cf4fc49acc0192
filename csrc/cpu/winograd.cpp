// out = act(conv(x) + bias + residual) of 3x3 convs with stride 1, by Winograd's F(2x2, 3x3): float32, channels_last, AVX-512.
//
// Four outputs of a 4x4 patch take 16 products a channel instead of 36. A block of patches is transformed into a buffer of 16
// matrices (patches x C), each is multiplied by its own matrix of transformed weights (C x a panel of channels), and the 16
// products of a panel are transformed back, where they meet bias, residual and ReLU. All that lies between x and out stays in
// the L2 cache.
#include "conv.h"

namespace fused_resnet {
namespace {

constexpr int64_t kPoints = 16;              // of a 4x4 patch
constexpr int64_t kScratch = 64 * 1024;      // floats of a block's patches and of the products of one panel
constexpr int64_t kLeast = 28;               // patches of a block, so that weights in the L1 cache are read often
constexpr int64_t kChannelsAtOnce = 64;      // of an item: enough to make up for transforming its patches

struct Winograd {
  int64_t n, c, h, w, k, out_h, out_w, pad_h, pad_w;
  Panel panel;

  int64_t panels() const { return ceil_div(k, panel.channels); }
  int64_t panel_size() const { return kPoints * c * panel.channels; }
  int64_t across() const { return ceil_div(out_w, 2); }
  int64_t per_image() const { return ceil_div(out_h, 2) * across(); }
  int64_t patches() const { return n * per_image(); }
};

#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")

// B' d B of one patch, 16 channels at a time; pixel[i][j] points to one of its pixels, matrices stand `step` apart.
void transform_patch(const float* const (&pixel)[4][4], int64_t channels, float* to, int64_t step) {
  for (int64_t c = 0; c < channels; c += 16) {
    __m512 t[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 d0 = _mm512_loadu_ps(pixel[0][j] + c), d1 = _mm512_loadu_ps(pixel[1][j] + c);
      const __m512 d2 = _mm512_loadu_ps(pixel[2][j] + c), d3 = _mm512_loadu_ps(pixel[3][j] + c);
      t[0][j] = _mm512_sub_ps(d0, d2), t[1][j] = _mm512_add_ps(d1, d2);
      t[2][j] = _mm512_sub_ps(d2, d1), t[3][j] = _mm512_sub_ps(d1, d3);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = to + 4 * i * step + c;
      _mm512_storeu_ps(row, _mm512_sub_ps(t[i][0], t[i][2]));
      _mm512_storeu_ps(row + step, _mm512_add_ps(t[i][1], t[i][2]));
      _mm512_storeu_ps(row + 2 * step, _mm512_sub_ps(t[i][2], t[i][1]));
      _mm512_storeu_ps(row + 3 * step, _mm512_sub_ps(t[i][1], t[i][3]));
    }
  }
}

// A' m A of the products of one patch and panel, which stand `step` apart, into `height` x `width` pixels of out.
void transform_back(const float* m, int64_t step, const Target& to, int64_t line, int64_t height, int64_t width) {
  for (int64_t first = 0; first < to.columns; first += 16) {
    const int64_t columns = std::min<int64_t>(to.columns - first, 16);
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    __m512 t[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* from = m + j * step + first;
      const __m512 m0 = _mm512_loadu_ps(from), m1 = _mm512_loadu_ps(from + 4 * step);
      const __m512 m2 = _mm512_loadu_ps(from + 8 * step), m3 = _mm512_loadu_ps(from + 12 * step);
      t[0][j] = _mm512_add_ps(m0, _mm512_add_ps(m1, m2)), t[1][j] = _mm512_sub_ps(_mm512_sub_ps(m1, m2), m3);
    }
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(mask, to.bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (i == height) break;
      const __m512 y[2] = {_mm512_add_ps(t[i][0], _mm512_add_ps(t[i][1], t[i][2])),
                           _mm512_sub_ps(_mm512_sub_ps(t[i][1], t[i][2]), t[i][3])};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (j == width) break;
        const int64_t at = i * line + j * to.stride + first;
        __m512 v = _mm512_add_ps(y[j], bias);
        if (to.sum) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to.sum + at));
        if (to.relu) v = relu(v);
        _mm512_mask_storeu_ps(to.out + at, mask, v);
      }
    }
  }
}

#pragma GCC pop_options
#else
void transform_patch(const float* const (&)[4][4], int64_t, float*, int64_t) {}
void transform_back(const float*, int64_t, const Target&, int64_t, int64_t, int64_t) {}
#endif

// Patches [first, last) as 16 matrices (patches x C); `zeros` are C of them.
void transform_in(const Winograd& conv, const float* x, int64_t first, int64_t last, const float* zeros, float* to) {
  const int64_t step = (last - first) * conv.c;
  for (int64_t patch = first; patch < last; ++patch, to += conv.c) {
    const int64_t n = patch / conv.per_image(), at = patch % conv.per_image();
    const int64_t top = 2 * (at / conv.across()) - conv.pad_h, left = 2 * (at % conv.across()) - conv.pad_w;
    const float* pixel[4][4];
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t y = top + i, z = left + j;
        const bool inside = y >= 0 && y < conv.h && z >= 0 && z < conv.w;
        pixel[i][j] = inside ? x + ((n * conv.h + y) * conv.w + z) * conv.c : zeros;
      }
    }
    transform_patch(pixel, conv.c, to, step);
  }
}

void transform_out(const Winograd& conv, const Operands& op, int64_t first, int64_t last, int64_t panel, const float* m) {
  const int64_t wide = conv.panel.channels, step = (last - first) * wide, channel = panel * wide;
  const int64_t columns = std::min(wide, conv.k - channel), line = conv.out_w * conv.k;
  for (int64_t patch = first; patch < last; ++patch, m += wide) {
    const int64_t n = patch / conv.per_image(), at = patch % conv.per_image();
    const int64_t y = 2 * (at / conv.across()), z = 2 * (at % conv.across());
    const int64_t to = ((n * conv.out_h + y) * conv.out_w + z) * conv.k + channel;
    transform_back(m, step,
                   {op.bias ? op.bias + channel : nullptr, op.residual ? op.residual + to : nullptr, op.out + to, conv.k,
                    columns, op.relu, nullptr},
                   line, std::min<int64_t>(2, conv.out_h - y), std::min<int64_t>(2, conv.out_w - z));
  }
}

// The 16 products of `rows` patches and a panel.
void multiply(const Winograd& conv, int64_t rows, const float* v, const float* weight, float* m) {
  const Reduction sum{1, 1, conv.c, 0, 0, conv.c, 0};
  const int64_t wide = conv.panel.channels, tiles = ceil_div(rows, conv.panel.pixels), lines = wide / kLine;
  for (int64_t point = 0; point < kPoints; ++point, v += rows * conv.c, weight += conv.c * wide, m += rows * wide) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles, pixels = rows * (t + 1) / tiles - begin;
      const float* ahead = weight + conv.c * (wide + std::min<int64_t>(t, lines - 1) * kLine);  // a part each
      conv.panel.tiles[pixels - 1](sum, v + begin * conv.c, weight,
                                   {nullptr, nullptr, m + begin * wide, wide, wide, false, ahead});
    }
  }
}

void run(const Winograd& conv, const Operands& op) {
  const int64_t wide = conv.panel.channels, most = std::max(kLeast, kScratch / (kPoints * (conv.c + wide)));
  const int64_t blocks = ceil_div(conv.patches(), most);
  const int64_t groups = ceil_div(conv.panels(), kChannelsAtOnce / wide);
  const int64_t largest = ceil_div(conv.patches(), blocks);
  const int64_t work = largest * kPoints * conv.c * kChannelsAtOnce / 16;
  parallel_dynamic(blocks * groups, work, [&](const auto& next) {
    const Buffer<> buffer(kPoints * largest * (conv.c + wide) + conv.c);
    float *v = buffer.data(), *m = v + kPoints * largest * conv.c, *zeros = m + kPoints * largest * wide;
    std::memset(zeros, 0, conv.c * sizeof(float));
    int64_t held = -1;  // the block whose patches are in v
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t block = item / groups, group = item % groups;
      const int64_t first = conv.patches() * block / blocks, last = conv.patches() * (block + 1) / blocks;
      if (block != held) transform_in(conv, op.x, first, last, zeros, v), held = block;
      for (int64_t p = conv.panels() * group / groups; p < conv.panels() * (group + 1) / groups; ++p) {
        multiply(conv, last - first, v, op.weight + p * conv.panel_size(), m);
        transform_out(conv, op, first, last, p, m);
      }
    }
  });
}

// ---- operators --------------------------------------------------------------------------------------------------------

// G w G' of `wide` output channels, whose taps stand kMostWide apart, in double, rounded once; points stand `step` apart.
constexpr int64_t kMostWide = 64;
FR_CLONES void transform_weight(int64_t wide, const float* __restrict w, float* __restrict to, int64_t step) {
#pragma GCC ivdep
  for (int64_t j = 0; j < wide; ++j) {
    double half[4][3];
    for (int s = 0; s < 3; ++s) {
      const double top = w[s * kMostWide + j], middle = w[(3 + s) * kMostWide + j], bottom = w[(6 + s) * kMostWide + j];
      const double sum = top + bottom;
      half[0][s] = top, half[1][s] = 0.5 * (sum + middle), half[2][s] = 0.5 * (sum - middle), half[3][s] = bottom;
    }
    for (int a = 0; a < 4; ++a) {
      const double *h = half[a], sum = h[0] + h[2];
      float* row = to + 4 * a * step + j;
      row[0] = float(h[0]), row[step] = float(0.5 * (sum + h[1])), row[2 * step] = float(0.5 * (sum - h[1]));
      row[3 * step] = float(h[2]);
    }
  }
}

// (K, C, 3, 3) -> (panels, 4, 4, 1, C, wide): G w G', the last panel filled up with zeros.
Tensor winograd_pack(const Tensor& weight, int64_t wide, bool backward) {
  panel_of(wide);
  const WeightView from(weight, backward);
  STD_TORCH_CHECK(from.r == 3 && from.s == 3, "weight must be (K, C, 3, 3)");
  const int64_t c = from.c, panels = ceil_div(from.k, wide), matrix = c * wide, lines = ceil_div(c, kLine);
  const int64_t sizes[] = {panels, 4, 4, 1, c, wide};
  const int64_t strides[] = {kPoints * matrix, 4 * matrix, matrix, matrix, wide, 1};
  Tensor packed = new_large(weight, 6, sizes, strides, dtype_code(weight));
  float* to = write<float>(packed);
  parallel_items(panels * lines, kPoints * kLine * wide, false, [=](int64_t item) {
    const int64_t p = item / lines, first = item % lines * kLine, count = std::min(kLine, c - first);
    float taps[kLine][9][kMostWide];
    from.panels(p * wide, wide, first, count, taps[0][0], kMostWide, 9 * kMostWide);
    float points[kPoints][kLine * kMostWide];  // for long runs of stores
    for (int64_t i = 0; i < count; ++i) transform_weight(wide, taps[i][0], points[0] + i * wide, kLine * kMostWide);
    for (int64_t point = 0; point < kPoints; ++point) {
      std::memcpy(to + p * strides[0] + point * matrix + first * wide, points[point], count * wide * sizeof(float));
    }
  });
  return packed;
}

}  // namespace

void winograd(const Tensor& x, const Tensor& packed, const Tensor& out, int64_t pad_h, int64_t pad_w, const Operands& op) {
  STD_TORCH_CHECK(packed.size(1) == 4 && packed.size(2) == 4 && x.size(1) % 16 == 0,
                  "weight must be packed as 4x4 matrices, for a multiple of 16 channels");
  const Winograd conv{x.size(0), x.size(1), x.size(2), x.size(3), out.size(1), out.size(2), out.size(3), pad_h, pad_w,
                      panel_of(packed.size(5))};
  run(conv, op);
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&fused_resnet::winograd_pack));
}
