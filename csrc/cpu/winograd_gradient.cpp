// The gradient of the weight of 3x3 convs with stride 1, by Winograd's F(2x2, 3x3): float32, channels_last, AVX-512.
//
// With the 4x4 patches d of x and the 2x2 pixels g of the output's gradient, dw = G' (sum over patches of (A g A') (B' d B)) G:
// 16 products a patch and pair of channels instead of 36. For each of the 16 points the sum is a matrix product over patches.
// A block of these matrices stays in the L2 cache while chunks of patches pass. Blocks too few for the threads are cut into
// splits of the patches, which are added up in a fixed order.
#include "conv.h"

namespace fused_resnet {
namespace {

constexpr int64_t kPatch = 4, kPoints = 16;
constexpr int64_t kSums = 64 * 1024;  // floats of a block
constexpr int64_t kItems = 32;        // at least, where there are patches enough
constexpr int64_t kChunk = 192;       // patches
constexpr int64_t kLeastChunks = 2;   // of a split

struct Problem {
  int64_t n, c, h, w, k, out_h, out_w, pad_h, pad_w;
  Panel panel;
  // Set by the constructor: rows of points of a block, and how many blocks and splits there are.
  int64_t together, k_blocks, panel_blocks, splits;

  Problem(const Tensor& x, const Tensor& grad, int64_t pad_h, int64_t pad_w)
      : n(x.size(0)), c(x.size(1)), h(x.size(2)), w(x.size(3)), k(grad.size(1)), out_h(grad.size(2)), out_w(grad.size(3)),
        pad_h(pad_h), pad_w(pad_w), panel(panel_of(c % 64 ? 32 : 64)) {
    together = kPoints * k * c <= kSums ? kPatch : 1;
    int64_t side = 2 * panel.channels;  // about as many rows as columns
    while (side > panel.channels && side * side * kPatch * together > kSums) side /= 2;
    panel_blocks = ceil_div(c, side), k_blocks = ceil_div(k, side);
    const int64_t blocks = kPatch / together * k_blocks * panel_blocks;
    splits = std::clamp<int64_t>(ceil_div(kItems, blocks), 1, std::max<int64_t>(1, patches() / (kLeastChunks * kChunk)));
  }
  int64_t panels() const { return ceil_div(c, panel.channels); }
  int64_t across() const { return ceil_div(out_w, 2); }
  int64_t per_image() const { return ceil_div(out_h, 2) * across(); }
  int64_t patches() const { return n * per_image(); }
  int64_t items() const { return splits * (kPatch / together) * k_blocks * panel_blocks; }
  int64_t most_rows() const { return ceil_div(k / kLine, k_blocks) * kLine; }
  int64_t most_columns() const { return ceil_div(panels(), panel_blocks) * panel.channels; }
};

// Rows [point, point_end) of points, output channels [k, k_end), panels [panel, panel_end), patches [first, last).
struct Block {
  int64_t split, point, point_end, k, k_end, panel, panel_end, first, last;

  Block(const Problem& p, int64_t item) {
    const int64_t j = item % p.panel_blocks, i = item / p.panel_blocks % p.k_blocks, rest = item / (p.panel_blocks * p.k_blocks);
    const int64_t groups = kPatch / p.together, lines = p.k / kLine;
    point = rest % groups * p.together, point_end = point + p.together, split = rest / groups;
    k = lines * i / p.k_blocks * kLine, k_end = lines * (i + 1) / p.k_blocks * kLine;
    panel = p.panels() * j / p.panel_blocks, panel_end = p.panels() * (j + 1) / p.panel_blocks;
    first = p.patches() * split / p.splits, last = p.patches() * (split + 1) / p.splits;
  }
};

#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")

// One row of B' d B, first + sign * second being the row of B' d: 4 points, `step` apart.
inline void transform_input(const float* const (&first)[kPatch], const float* const (&second)[kPatch], float sign, int64_t c,
                            float* to, int64_t step) {
  const __m512 by = _mm512_set1_ps(sign);
  __m512 t[kPatch];
#pragma GCC unroll 4
  for (int j = 0; j < kPatch; ++j) t[j] = _mm512_fmadd_ps(by, _mm512_loadu_ps(second[j] + c), _mm512_loadu_ps(first[j] + c));
  _mm512_storeu_ps(to, _mm512_sub_ps(t[0], t[2]));
  _mm512_storeu_ps(to + step, _mm512_add_ps(t[1], t[2]));
  _mm512_storeu_ps(to + 2 * step, _mm512_sub_ps(t[2], t[1]));
  _mm512_storeu_ps(to + 3 * step, _mm512_sub_ps(t[1], t[3]));
}

// One row of A g A', top + sign * bottom being the row of A g: 4 points, `step` apart.
inline void transform_gradient(const float* const (&top)[2], const float* const (&bottom)[2], float sign, int64_t k, float* to,
                               int64_t step) {
  const __m512 by = _mm512_set1_ps(sign);
  const __m512 left = _mm512_fmadd_ps(by, _mm512_loadu_ps(bottom[0] + k), _mm512_loadu_ps(top[0] + k));
  const __m512 right = _mm512_fmadd_ps(by, _mm512_loadu_ps(bottom[1] + k), _mm512_loadu_ps(top[1] + k));
  _mm512_storeu_ps(to, left);
  _mm512_storeu_ps(to + step, _mm512_add_ps(left, right));
  _mm512_storeu_ps(to + 2 * step, _mm512_sub_ps(left, right));
  _mm512_storeu_ps(to + 3 * step, _mm512_sub_ps(_mm512_setzero_ps(), right));
}

#pragma GCC pop_options
#else
void transform_input(const float* const (&)[kPatch], const float* const (&)[kPatch], float, int64_t, float*, int64_t) {}
void transform_gradient(const float* const (&)[2], const float* const (&)[2], float, int64_t, float*, int64_t) {}
#endif

// Row `point` of points of the patches [first, first + count): of x, panel by panel, into v, and of g into u.
void transform(const Problem& p, const Block& block, int64_t point, const float* x, const float* g, const float* zeros,
               int64_t first, int64_t count, float* v, int64_t v_step, float* u, int64_t u_step) {
  constexpr int64_t kFirst[] = {0, 1, 2, 1}, kSecond[] = {2, 2, 1, 3};
  constexpr float kSign[] = {-1, 1, -1, -1};
  const int64_t wide = p.panel.channels, rows = block.k_end - block.k, end = std::min(block.panel_end * wide, p.c);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = (first + i) / p.per_image(), at = (first + i) % p.per_image();
    const int64_t y = at / p.across() * 2, z = at % p.across() * 2;
    const auto pixel = [=](const float* from, int64_t h, int64_t w, int64_t channels, int64_t row, int64_t column) {
      const bool inside = row >= 0 && row < h && column >= 0 && column < w;
      return inside ? from + ((n * h + row) * w + column) * channels : zeros;
    };
    const float *upper[kPatch], *lower[kPatch], *top[2], *bottom[2];
    for (int64_t j = 0; j < kPatch; ++j) {
      upper[j] = pixel(x, p.h, p.w, p.c, y - p.pad_h + kFirst[point], z - p.pad_w + j);
      lower[j] = pixel(x, p.h, p.w, p.c, y - p.pad_h + kSecond[point], z - p.pad_w + j);
    }
    for (int64_t j = 0; j < 2; ++j) {
      top[j] = point < 3 ? pixel(g, p.out_h, p.out_w, p.k, y, z + j) : zeros;
      bottom[j] = point > 0 ? pixel(g, p.out_h, p.out_w, p.k, y + 1, z + j) : zeros;
    }
    for (int64_t c = block.panel * wide; c < end; c += kLine) {
      const int64_t panel = c / wide - block.panel;
      transform_input(upper, lower, kSign[point], c, v + (panel * count + i) * wide + c % wide, v_step);
    }
    for (int64_t k = 0; k < rows; k += kLine) {
      transform_gradient(top, bottom, point == 1 ? 1.0f : -1.0f, block.k + k, u + i * apart(rows) + k, u_step);
    }
  }
}

// G' m G of a row of c channels, (3, 3, c); points of m stand `step` apart.
FR_CLONES void transform_back(int64_t c, const float* __restrict m, int64_t step, float* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < c; ++i) {
    float half[3][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      const float m0 = m[j * step + i], m1 = m[(4 + j) * step + i], m2 = m[(8 + j) * step + i], m3 = m[(12 + j) * step + i];
      half[0][j] = m0 + 0.5f * (m1 + m2), half[1][j] = 0.5f * (m1 - m2), half[2][j] = 0.5f * (m1 + m2) + m3;
    }
    for (int r = 0; r < 3; ++r) {
      const float *t = half[r], sum = 0.5f * (t[1] + t[2]);
      out[3 * r * c + i] = t[0] + sum, out[(3 * r + 1) * c + i] = 0.5f * (t[1] - t[2]), out[(3 * r + 2) * c + i] = sum + t[3];
    }
  }
}

void run(const Problem& p, const float* x, const float* g, float* out) {
  const int64_t wide = p.panel.channels, plane = p.k * p.c, size = kPoints * plane;
  const int64_t most_v = kChunk * p.most_columns(), most_u = kChunk * apart(p.most_rows()), most = std::max(p.c, p.k);
  const Buffer<true> sums(p.splits * size);
  parallel_dynamic(p.items(), p.patches() / p.splits * p.most_rows() * p.most_columns() / 4, [&](const auto& next) {
    const Buffer<> buffer(kPatch * (most_v + most_u) + most);
    float *v = buffer.data(), *u = v + kPatch * most_v, *zeros = u + kPatch * most_u;
    std::memset(zeros, 0, most * sizeof(float));
    for (int64_t item = next(); item >= 0; item = next()) {
      const Block block(p, item);
      const int64_t rows = block.k_end - block.k, panels = block.panel_end - block.panel;
      for (int64_t first = block.first; first < block.last; first += kChunk) {
        const int64_t count = std::min(kChunk, block.last - first), u_step = count * apart(rows);
        for (int64_t point = block.point; point < block.point_end; ++point) {
          transform(p, block, point, x, g, zeros, first, count, v, count * panels * wide, u, u_step);
          float* to = sums.data() + block.split * size + point * kPatch * plane + block.k * p.c;
          for (int64_t j = 0; j < kPatch * panels; ++j) {
            const int64_t channel = (block.panel + j % panels) * wide;
            multiply_transposed(p.panel, count, rows, u + j / panels * u_step, apart(rows), v + j * count * wide,
                                to + j / panels * plane + channel, p.c, std::min(wide, p.c - channel), first > block.first);
          }
        }
      }
    }
  });
  parallel_items(p.k, size / p.k * p.splits, false, [&](int64_t k) {
    float* m = sums.data() + k * p.c;
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t split = 1; split < p.splits; ++split) add_to(p.c, m + split * size + point * plane, m + point * plane);
    }
    transform_back(p.c, m, plane, out + k * 9 * p.c);
  });
}

// x: what the conv read, grad: of its output; out: (K, C, 3, 3), channels_last; channels in multiples of 16.
void winograd_gradient(const Tensor& x, const Tensor& grad, const Tensor& out, int64_t pad_h, int64_t pad_w) {
  STD_TORCH_CHECK(conv_available(), "this CPU has no AVX-512");
  check_nhwc(x, "x");
  check_nhwc(grad, "grad");
  check_nhwc(out, "out");
  STD_TORCH_CHECK(out.size(0) == grad.size(1) && out.size(1) == x.size(1) && out.size(2) == 3 && out.size(3) == 3,
                  "out must be (K, C, 3, 3)");
  STD_TORCH_CHECK(pad_h >= 0 && pad_w >= 0 && grad.size(0) == x.size(0) &&
                      grad.size(2) == conv_extent(x.size(2), pad_h, 1, 3, 1) &&
                      grad.size(3) == conv_extent(x.size(3), pad_w, 1, 3, 1),
                  "grad must have the sizes of a 3x3 convolution of x");
  STD_TORCH_CHECK(x.size(1) % kLine == 0 && grad.size(1) % kLine == 0, "channels must be multiples of 16");
  if (out.numel() == 0) return;
  if (grad.numel() == 0) {
    std::memset(write<float>(out), 0, out.numel() * sizeof(float));
    return;
  }
  run(Problem(x, grad, pad_h, pad_w), read<float>(x), read<float>(grad), write<float>(out));
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("winograd_gradient", TORCH_BOX(&fused_resnet::winograd_gradient));
}
