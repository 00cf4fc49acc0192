// out = act(conv(x) + bias + residual) for inference: float32, channels_last, packed weights, AVX-512.
//
// An implicit GEMM. In NHWC the values that a kernel row meets are contiguous, so that a 3x3 conv reduces over 3 runs of 3 C
// floats, a 1x1 conv over one of C. A tile of 14 pixels x 32 channels, or 6 x 64, stays in registers: each step broadcasts a
// value of x for each pixel against 2 or 4 vectors of weights. Bias, residual and ReLU meet the tile there. What
// needs zeros around it is copied into a buffer that stays in the L2 cache.
#include "conv.h"

namespace fused_resnet {
namespace {

// ---- how a conv is cut ------------------------------------------------------------------------------------------------

struct Conv {
  int64_t n, c, h, w, k, r, s, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Panel panel;
  // Set by `planned`:
  bool copied = false;
  int64_t pixel = 0;               // from one pixel to the next of what tiles read: x, or its copy with margins
  int64_t step_h = 1, step_w = 1;  // from one pixel of x to the next that is copied
  int64_t line = 0, image = 0;     // floats of a row and of an image of x
  int64_t plane = 0;               // floats from a channel to the next of an x in NCHW, whose copy is NHWC; 0: x is NHWC
  int64_t last_w = 0;              // width of the last row, if it is another

  bool pointwise() const { return r == 1 && s == 1 && !pad_h && !pad_w; }
  int64_t panels() const { return ceil_div(k, panel.channels); }
  int64_t panel_size() const { return r * s * c * panel.channels; }
  int64_t reach() const { return (r - 1) * dilation_h + 1; }  // rows under the kernel
  int64_t row() const { return (w + 2 * pad_w) * pixel; }
  int64_t width(int64_t y) const { return last_w && y == out_h - 1 ? last_w : out_w; }

  Reduction reduction() const {
    const bool joined = dilation_w == 1 && pixel == c;
    return {r, joined ? 1 : s, joined ? s * c : c, dilation_h * row(), dilation_w * pixel, stride_w * pixel,
            stride_h * row()};
  }
};

// Pixels 4 KiB apart share the 8 ways of one set of the L1 cache.
bool crowded(int64_t stride, int64_t pixels) { return stride % 1024 == 0 && pixels > 8; }

Conv planned(Conv conv) {
  const bool crowd = crowded(conv.stride_w * conv.c, conv.panel.pixels);
  conv.line = conv.w * conv.c, conv.image = conv.h * conv.line;
  if (conv.pointwise()) {
    const int64_t panel_pixels = conv.panel.pixels;
    if (conv.stride_h == 1 && conv.stride_w == 1) {  // images do not matter: one of all pixels, cut into rows that suit
      const int64_t pixels = conv.n * conv.h * conv.w, width = std::min(pixels, (panel_pixels > 6 ? 4 : 8) * panel_pixels);
      conv.n = 1, conv.h = conv.out_h = ceil_div(pixels, width), conv.w = conv.out_w = width;
      conv.last_w = pixels - width * (conv.h - 1), conv.line = width * conv.c;
    } else if (crowd) {  // only what is read is copied
      conv.step_h = conv.stride_h, conv.step_w = conv.stride_w, conv.stride_h = conv.stride_w = 1;
      conv.h = conv.out_h, conv.w = conv.out_w;
    }
  }
  if (conv.plane) conv.line = conv.w;
  conv.copied = crowd || conv.pad_h || conv.pad_w || conv.plane;
  conv.pixel = crowd && conv.copied ? conv.c + 16 : conv.c;
  return conv;
}

// Rows of the output by groups of panels by parts of the reduction. A part's weights for a group, and a block's input, fit in
// the L2 cache together.
struct Blocks {
  int64_t rows, per_image, groups, parts;

  explicit Blocks(const Conv& conv) {
    constexpr int64_t kWeights = 64 * 1024, kInput = 48 * 1024, kItems = 32;  // floats, floats, for an even load
    parts = conv.r > 1 ? conv.r : conv.s > 1 ? 1 : ceil_div(conv.panel_size(), kWeights / 2);
    if (conv.panel_size() <= kWeights) parts = 1;
    groups = std::min(conv.panels(), ceil_div(conv.panels() * conv.panel_size(), parts * kWeights));
    while (conv.panels() % groups) ++groups;
    const int64_t most = std::max<int64_t>(1, kInput / (conv.stride_h * conv.row()));
    const int64_t wanted = ceil_div(kItems, groups * conv.n);
    per_image = std::min(conv.out_h, std::max(ceil_div(conv.out_h, most), wanted));
    rows = ceil_div(conv.out_h, per_image);
    per_image = ceil_div(conv.out_h, rows);
  }
};

// Rows [first, first + count) of the zero-padded image.
void copy_rows(const Conv& conv, const float* image, int64_t first, int64_t count, float* to) {
  const int64_t margin = conv.pad_w * conv.pixel;
  for (int64_t i = 0; i < count; ++i, to += conv.row()) {
    const int64_t y = first + i - conv.pad_h;
    if (y < 0 || y >= conv.h) {
      std::memset(to, 0, conv.row() * sizeof(float));
      continue;
    }
    const float* from = image + y * conv.step_h * conv.line;
    const int64_t width = conv.last_w && y == conv.h - 1 ? conv.last_w : conv.w;
    std::memset(to, 0, margin * sizeof(float));
    if (conv.plane) {
      for (int64_t c = 0; c < conv.c; ++c) {
        for (int64_t x = 0; x < width; ++x) to[margin + x * conv.pixel + c] = from[c * conv.plane + x];
      }
    } else if (conv.pixel == conv.c) {
      std::memcpy(to + margin, from, width * conv.c * sizeof(float));
    } else {
      for (int64_t x = 0; x < width; ++x) {
        std::memcpy(to + margin + x * conv.pixel, from + x * conv.step_w * conv.c, conv.c * sizeof(float));
      }
    }
    std::memset(to + margin + conv.w * conv.pixel, 0, margin * sizeof(float));
  }
}

// Output rows [first, last) of image n, panels [begin, end); x points to what row `first` reads.
void run_block(const Conv& conv, const Operands& op, int64_t parts, const float* x, int64_t n, int64_t first, int64_t last,
               int64_t begin, int64_t end) {
  const int64_t wide = conv.panel.channels, tiles = ceil_div(conv.out_w, conv.panel.pixels), lines = wide / kLine;
  const bool foldable = 2 * conv.out_w <= conv.panel.pixels && !conv.last_w;
  Reduction sum = conv.reduction();
  const bool from_memory = conv.pixel == conv.c && conv.pointwise();  // x, not a copy
  for (int64_t part = 0, done = 0, offset = 0; part < parts; ++part) {
    if (conv.r > 1) {
      sum.rows = parts > 1 ? 1 : conv.r, offset = part * sum.row_step;
    } else {
      offset = conv.c * part / parts, sum.length = parts > 1 ? conv.c * (part + 1) / parts - offset : sum.length;
    }
    const int64_t steps = sum.rows * sum.runs * sum.length;
    int64_t seen = 0;  // tiles
    for (int64_t y = first; y < last; ++y) {
      const bool folded = foldable && y + 1 < last;
      const int64_t width = conv.width(y) << folded;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t column = width * t / tiles, pixels = width * (t + 1) / tiles - column;
        if (!pixels) continue;
        const float* from = x + offset + (y - first) * sum.fold + column * sum.x_stride;
        const int64_t to = ((n * conv.out_h + y) * conv.out_w + column) * conv.k;
        const TileFunction function = folded ? conv.panel.folded[pixels / 2 - 1] : conv.panel.tiles[pixels - 1];
        const float* start = part ? op.out : op.residual;
        for (int64_t p = begin; p < end; ++p) {
          const int64_t channel = p * wide;
          const float *weight = op.weight + p * conv.panel_size() + done, *ahead = from + pixels * sum.x_stride;
          if (p > begin || !from_memory) {  // the first tiles ask for a part each of the next part's or group's weights
            ahead = weight + (part + 1 < parts ? steps * wide : (end - begin) * conv.panel_size() - done);
            ahead += std::min(seen, lines - 1) * steps * kLine;
          }
          function(sum, from, weight,
                   {op.bias && !part ? op.bias + channel : nullptr, start ? start + to + channel : nullptr,
                    op.out + to + channel, conv.k, std::min(wide, conv.k - channel), op.relu && part == parts - 1, ahead});
        }
        ++seen;
      }
      y += folded;
    }
    done += steps * wide;
  }
}

// All of x, for convs of many weights and small images: conv then reads it in place.
void copy_images(Conv& conv, const float* x, float* to) {
  const int64_t rows = conv.h + 2 * conv.pad_h;
  parallel_items(conv.n * rows, conv.row(), false,
                 [&](int64_t i) { copy_rows(conv, x + i / rows * conv.image, i % rows, 1, to + i * conv.row()); });
  conv.copied = false, conv.image = rows * conv.row(), conv.line = conv.row();
}

void run(Conv conv, Operands op) {
  const Blocks blocks(conv);
  const bool at_once = conv.copied && blocks.groups > 1;
  const Buffer<true> images(at_once ? conv.n * (conv.h + 2 * conv.pad_h) * conv.row() : 0);
  if (at_once) copy_images(conv, op.x, images.data()), op.x = images.data();
  const int64_t count = conv.n * blocks.per_image, items = count * blocks.groups;
  const int64_t work = conv.n * conv.out_h * conv.out_w * conv.panels() * conv.panel_size() / items / 16;
  parallel_dynamic(items, work, [&](const auto& next) {
    const Buffer<> buffer(conv.copied ? ((blocks.rows - 1) * conv.stride_h + conv.reach()) * conv.row() : 0);
    for (int64_t item = next(); item >= 0; item = next()) {  // a group's weights meet all blocks, then come the next
      const int64_t block = item % count, group = item / count;
      const int64_t n = block / blocks.per_image, first = block % blocks.per_image * blocks.rows;
      const int64_t last = std::min(conv.out_h, first + blocks.rows);
      const float *image = op.x + n * conv.image, *x = image + first * conv.stride_h * conv.line;
      if (conv.copied) {
        const int64_t rows = (last - first - 1) * conv.stride_h + conv.reach();
        copy_rows(conv, image, first * conv.stride_h, rows, buffer.data());
        x = buffer.data();
      }
      run_block(conv, op, blocks.parts, x, n, first, last, conv.panels() * group / blocks.groups,
                conv.panels() * (group + 1) / blocks.groups);
    }
  });
}

// ---- the stem ---------------------------------------------------------------------------------------------------------

// The largest values of windows of 3x3 with stride 2 and padding 1. Of what a ReLU gives the bits order as the values do, and
// NaN is the largest.
#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")
void pool_row(const float* top, int64_t rows, int64_t width, int64_t channels, float* out) {
  for (int64_t q = 0; q < ceil_div(width, 2); ++q, out += channels) {
    const int64_t first = std::max<int64_t>(2 * q - 1, 0), last = std::min(2 * q + 2, width);
    for (int64_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = __mmask16((1u << std::min<int64_t>(channels - c, 16)) - 1);
      __m512i most = _mm512_setzero_si512();
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = first; x < last; ++x) {
          most = _mm512_max_epu32(most, _mm512_maskz_loadu_epi32(mask, top + (y * width + x) * channels + c));
        }
      }
      _mm512_mask_storeu_epi32(out + c, mask, most);
    }
  }
}
#pragma GCC pop_options
#else
void pool_row(const float*, int64_t, int64_t, int64_t, float*) {}
#endif

// Rows of the conv's output stay in the L2 cache until they are pooled.
void run_pooled(const Conv& conv, const Operands& op) {
  constexpr int64_t kOutput = 96 * 1024;  // floats of an item's rows
  const int64_t height = ceil_div(conv.out_h, 2), width = ceil_div(conv.out_w, 2), row = conv.out_w * conv.k;
  const int64_t most = std::max<int64_t>(1, (kOutput / row - 1) / 2), per_image = ceil_div(height, most);
  const int64_t steps = conv.panels() * conv.panel_size();
  parallel_dynamic(conv.n * per_image, conv.out_h * conv.out_w * steps / per_image / 16, [&](const auto& next) {
    const int64_t rows = 2 * ceil_div(height, per_image) + 1;
    const int64_t copied = conv.copied ? ((rows - 1) * conv.stride_h + conv.reach()) * conv.row() : 0;
    const Buffer<> buffer(copied + rows * row);
    float* y = buffer.data() + copied;
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t n = item / per_image, part = item % per_image;
      const int64_t begin = height * part / per_image, end = height * (part + 1) / per_image;
      const int64_t first = std::max<int64_t>(2 * begin - 1, 0), last = std::min(2 * end, conv.out_h);
      const float *image = op.x + n * conv.image, *x = image + first * conv.stride_h * conv.line;
      if (conv.copied) {
        copy_rows(conv, image, first * conv.stride_h, (last - first - 1) * conv.stride_h + conv.reach(), buffer.data());
        x = buffer.data();
      }
      run_block(conv, {x, op.weight, op.bias, nullptr, y, true}, 1, x, 0, 0, last - first, 0, conv.panels());
      for (int64_t p = begin; p < end; ++p) {
        const int64_t top = std::max<int64_t>(2 * p - 1, 0);
        pool_row(y + (top - first) * row, std::min(2 * p + 2, conv.out_h) - top, conv.out_w, conv.k,
                 op.out + (n * height + p) * width * conv.k);
      }
    }
  });
}

// ---- operators --------------------------------------------------------------------------------------------------------

// (K, C, R, S) -> (panels, R, S, C, wide), the last panel filled up with zeros.
Tensor conv_pack(const Tensor& weight, int64_t wide, bool backward) {
  panel_of(wide);
  const WeightView from(weight, backward);
  const int64_t r = from.r, s = from.s, c = from.c, panels = ceil_div(from.k, wide);
  const int64_t sizes[] = {panels, r, s, c, wide};
  const int64_t strides[] = {r * s * c * wide, s * c * wide, c * wide, wide, 1};
  Tensor packed = new_large(weight, 5, sizes, strides, dtype_code(weight));
  float* to = write<float>(packed);
  const int64_t lines = ceil_div(c, kLine);
  parallel_items(panels * lines, r * s * kLine * wide, false, [=](int64_t item) {
    const int64_t p = item / lines, first = item % lines * kLine, count = std::min(kLine, c - first);
    from.panels(p * wide, wide, first, count, to + p * strides[0] + first * wide, strides[2], wide);
  });
  return packed;
}

// (N, C, H, W) in channels_last -> out, contiguous.
void nhwc_to_nchw(const Tensor& x, const Tensor& out) {
  check_nhwc(x, "x");
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == ScalarType::Float && out.sizes().equals(x.sizes()),
                  "out must be contiguous, float32, of x's shape");
  const int64_t c = x.size(1), pixels = x.size(2) * x.size(3);
  const float* from = read<float>(x);
  float* to = write<float>(out);
  parallel_items(x.size(0), c * pixels, false, [=](int64_t n) {
    const float* rows = from + n * c * pixels;
    float* planes = to + n * c * pixels;
#ifdef FR_CONV
    if (conv_available()) {
      for (int64_t pixel = 0; pixel < pixels; pixel += kLine) {
        for (int64_t i = 0; i < c; i += kLine) {
          const int64_t down = std::min(kLine, pixels - pixel), across = std::min(kLine, c - i);
          transpose<true>(rows + pixel * c + i, c, planes + i * pixels + pixel, pixels, down, across);
        }
      }
      return;
    }
#endif
    for (int64_t i = 0; i < c * pixels; ++i) planes[i] = rows[i % pixels * c + i / pixels];
  });
}

void convolve(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& residual,
              const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
              int64_t dilation_w, bool relu, bool pool) {
  STD_TORCH_CHECK(conv_available(), "this CPU has no AVX-512");
  const bool planes = pool && x.dim() == 4 && x.scalar_type() == ScalarType::Float && x.is_contiguous();
  if (!planes) check_nhwc(x, "x");
  check_nhwc(out, "out");
  const int64_t dims = packed.dim();
  const bool by_winograd = dims == 6;
  STD_TORCH_CHECK((dims == 5 || by_winograd) && packed.scalar_type() == ScalarType::Float &&
                      packed.size(dims - 2) == x.size(1),
                  "weight must be packed for x's channels");
  STD_TORCH_CHECK(!by_winograd || (stride_h == 1 && stride_w == 1 && dilation_h == 1 && dilation_w == 1),
                  "a weight packed for Winograd's algorithm serves stride 1 and dilation 1");
  const int64_t r = by_winograd ? 3 : packed.size(1), s = by_winograd ? 3 : packed.size(2);
  check_geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  const int64_t out_h = conv_extent(x.size(2), pad_h, dilation_h, r, stride_h);
  const int64_t out_w = conv_extent(x.size(3), pad_w, dilation_w, s, stride_w);
  Conv conv{x.size(0), x.size(1), x.size(2), x.size(3), out.size(1), r,          s,          out_h,
            out_w,     stride_h,  stride_w,  pad_h,     pad_w,       dilation_h, dilation_w, panel_of(packed.size(dims - 1))};
  STD_TORCH_CHECK(out.size(0) == conv.n && packed.size(0) == conv.panels() &&
                      out.size(2) == (pool ? ceil_div(out_h, 2) : out_h) && out.size(3) == (pool ? ceil_div(out_w, 2) : out_w),
                  "out must have the sizes of the convolution's result");
  STD_TORCH_CHECK(!pool || (!by_winograd && !conv.pointwise()),
                  "what is pooled has a kernel larger than 1x1, not packed for Winograd's algorithm");
  if (residual) check_like(*residual, out, "residual");
  if (out.numel() == 0) return;
  const float* shift = vector_data<const float>(bias, conv.k, ScalarType::Float, "bias");
  const Operands op{read<float>(x),    read<float>(packed), shift, residual ? read<float>(*residual) : nullptr,
                    write<float>(out), relu};
  if (by_winograd) return winograd(x, packed, out, pad_h, pad_w, op);
  if (planes) conv.plane = conv.h * conv.w;
  conv = planned(conv);
  pool ? run_pooled(conv, op) : run(conv, op);
}

// Writes into `out`, which may be the residual. The weight was packed by conv_pack, or by winograd_pack.
void conv_bias_act(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& residual,
                   const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                   int64_t dilation_w, bool relu) {
  convolve(x, packed, bias, residual, out, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, relu, false);
}

// Of relu(conv(x) + bias) the largest values in windows of 3x3 with stride 2 and padding 1, into `out`. x may be NCHW too.
void conv_relu_pool(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const Tensor& out, int64_t stride_h,
                    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  convolve(x, packed, bias, {}, out, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, true, true);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&fused_resnet::conv_pack));
  m.impl("nhwc_to_nchw", TORCH_BOX(&fused_resnet::nhwc_to_nchw));
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
  m.impl("conv_relu_pool", TORCH_BOX(&fused_resnet::conv_relu_pool));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CompositeExplicitAutograd, m) {
  m.impl("conv_available", TORCH_BOX(&fused_resnet::conv_available));
}
