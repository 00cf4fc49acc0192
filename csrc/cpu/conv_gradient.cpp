// The gradient of a convolution's weight: float32, channels_last, AVX-512.
//
//     dw[k, r, s, c] = sum over output pixels of g[k] x[c], x being the pixel that tap (r, s) meets there
//
// is for each tap a matrix product over pixels. A block of it stays in the L2 cache while chunks of pixels pass, those of x
// copied into panels of channels. Blocks too few for the threads are cut into splits of the pixels, added up in a fixed order.
#include "conv.h"

namespace fused_resnet {
namespace {

constexpr int64_t kSums = 64 * 1024;  // floats of a block
constexpr int64_t kColumns = 256;     // of a block, at most: channels of x
constexpr int64_t kItems = 32;        // at least, where there are pixels enough
constexpr int64_t kChunk = 64;        // pixels
constexpr int64_t kLeastChunks = 4;   // of a split

struct Problem {
  int64_t n, c, h, w, k, r, s, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Panel panel;

  int64_t taps() const { return r * s; }
  int64_t pixels() const { return n * out_h * out_w; }
  int64_t panels() const { return ceil_div(c, panel.channels); }
  int64_t panel_blocks() const { return ceil_div(panels() * panel.channels, kColumns); }
  int64_t k_blocks() const { return ceil_div(k, kSums / std::min(kColumns, panels() * panel.channels)); }
  int64_t blocks() const { return taps() * k_blocks() * panel_blocks(); }
  int64_t splits() const {
    return std::clamp<int64_t>(ceil_div(kItems, blocks()), 1, std::max<int64_t>(1, pixels() / (kLeastChunks * kChunk)));
  }
};

// One tap, output channels [k, k_end), panels [panel, panel_end), output pixels [first, last).
struct Block {
  int64_t split, tap, k, k_end, panel, panel_end, first, last;

  Block(const Problem& p, int64_t item) {
    const int64_t across = p.panel_blocks(), down = p.k_blocks(), j = item % across, i = item / across % down;
    tap = item / (across * down) % p.taps(), split = item / p.blocks();
    k = p.k * i / down, k_end = p.k * (i + 1) / down;
    panel = p.panels() * j / across, panel_end = p.panels() * (j + 1) / across;
    first = p.pixels() * split / p.splits(), last = p.pixels() * (split + 1) / p.splits();
  }
};

// The pixels of x that a tap meets at output pixels `first`, first + 1, ...
class Pixels {
 public:
  Pixels(const Problem& p, const float* x, int64_t tap, int64_t first)
      : p_(p), x_(x), top_(tap / p.s * p.dilation_h - p.pad_h), left_(tap % p.s * p.dilation_w - p.pad_w),
        n_(first / (p.out_h * p.out_w)), y_(first / p.out_w % p.out_h), z_(first % p.out_w) {}

  const float* next() {  // nullptr: in the padding
    const int64_t row = y_ * p_.stride_h + top_, column = z_ * p_.stride_w + left_;
    const bool inside = row >= 0 && row < p_.h && column >= 0 && column < p_.w;
    const float* pixel = inside ? x_ + ((n_ * p_.h + row) * p_.w + column) * p_.c : nullptr;
    if (++z_ == p_.out_w) {
      z_ = 0;
      if (++y_ == p_.out_h) y_ = 0, ++n_;
    }
    return pixel;
  }

 private:
  const Problem& p_;
  const float* x_;
  int64_t top_, left_, n_, y_, z_;
};

#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")
// `columns` floats, and zeros up to `wide`.
inline void copy(const float* from, int64_t columns, int64_t wide, float* to) {
  for (int64_t i = 0; i < wide; i += kLine) {
    const __mmask16 mask = __mmask16((1u << std::clamp<int64_t>(columns - i, 0, kLine)) - 1);
    _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(mask, from + i));
  }
}
#pragma GCC pop_options
#else
void copy(const float*, int64_t, int64_t, float*) {}
#endif

void run(const Problem& p, const float* x, const float* g, float* out) {
  const int64_t wide = p.panel.channels, row = p.taps() * p.c, size = p.k * row, splits = p.splits();
  const int64_t most_rows = apart(ceil_div(p.k, p.k_blocks())), most_panels = ceil_div(p.panels(), p.panel_blocks());
  const Buffer<true> sums(splits > 1 ? splits * size : 0);
  parallel_dynamic(splits * p.blocks(), p.pixels() / splits * most_rows * most_panels * wide / 16, [&](const auto& next) {
    const Buffer<> buffer(kChunk * (most_rows + most_panels * wide));
    float *copied_g = buffer.data(), *copied_x = copied_g + kChunk * most_rows;
    for (int64_t item = next(); item >= 0; item = next()) {
      const Block block(p, item);
      float* to = (splits > 1 ? sums.data() + block.split * size : out) + block.k * row + block.tap * p.c;
      const int64_t rows = block.k_end - block.k, step = apart(rows);
      for (int64_t first = block.first; first < block.last; first += kChunk) {
        const int64_t count = std::min(kChunk, block.last - first);
        Pixels pixels(p, x, block.tap, first);
        for (int64_t i = 0; i < count; ++i) {
          copy(g + (first + i) * p.k + block.k, rows, step, copied_g + i * step);
          const float* pixel = pixels.next();
          for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
            const int64_t columns = pixel ? std::min(wide, p.c - panel * wide) : 0;
            copy(columns ? pixel + panel * wide : x, columns, wide, copied_x + ((panel - block.panel) * count + i) * wide);
          }
        }
        for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
          multiply_transposed(p.panel, count, rows, copied_g, step, copied_x + (panel - block.panel) * count * wide,
                              to + panel * wide, row, std::min(wide, p.c - panel * wide), first > block.first);
        }
      }
    }
  });
  if (splits == 1) return;
  parallel_items(p.k, row * splits, false, [&](int64_t k) {
    std::memcpy(out + k * row, sums.data() + k * row, row * sizeof(float));
    for (int64_t split = 1; split < splits; ++split) add_to(row, sums.data() + split * size + k * row, out + k * row);
  });
}

// x: what the conv read, grad: of its output; out: (K, C, R, S), channels_last.
void conv_gradient(const Tensor& x, const Tensor& grad, const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h,
                   int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  STD_TORCH_CHECK(conv_available(), "this CPU has no AVX-512");
  check_nhwc(x, "x");
  check_nhwc(grad, "grad");
  check_nhwc(out, "out");
  const int64_t c = x.size(1);
  const Problem p{x.size(0), c,        x.size(2), x.size(3), grad.size(1), out.size(2), out.size(3), grad.size(2), grad.size(3),
                  stride_h,  stride_w, pad_h,     pad_w,     dilation_h,   dilation_w,  panel_of(c % 64 ? 32 : 64)};
  check_geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(grad.size(0) == p.n && out.size(0) == p.k && out.size(1) == c &&
                      p.out_h == conv_extent(p.h, pad_h, dilation_h, p.r, stride_h) &&
                      p.out_w == conv_extent(p.w, pad_w, dilation_w, p.s, stride_w),
                  "grad and out must have the sizes of a convolution of x and of its weight");
  if (out.numel() == 0) return;
  if (grad.numel() == 0) {
    std::memset(write<float>(out), 0, out.numel() * sizeof(float));
    return;
  }
  run(p, read<float>(x), read<float>(grad), write<float>(out));
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("conv_gradient", TORCH_BOX(&fused_resnet::conv_gradient));
}
