// out = act(conv(x) + bias + residual) for inference: float32, channels_last, packed weights, AVX-512.
//
// An implicit GEMM. In NHWC the values that a kernel row meets are contiguous, so that a 3x3 conv reduces over 3 runs of 3 C
// floats, a 1x1 conv over one of C. A tile of 14 pixels x 32 channels stays in registers: each step broadcasts 14 values
// of x against two vectors of weights, 28 multiply-adds for 16 loads. Bias, residual and ReLU meet the tile there. What
// needs zeros around it is copied into a buffer that stays in the L2 cache.
#include <torch/csrc/stable/library.h>

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "../checks.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FR_CONV 1
#include <immintrin.h>
#endif

namespace fused_resnet {
namespace {

constexpr int64_t kPanel = 32;          // output channels of a tile, and of a panel of packed weights
constexpr int64_t kTilePixels = 14;     // at most
constexpr int64_t kChain = 256;         // products that are added up one after the other
constexpr int64_t kLine = 16;           // floats of a cache line
constexpr int64_t kAhead = 8 * kPanel;  // of the weights asked for

// ---- the tile ---------------------------------------------------------------------------------------------------------

// `rows` x `runs` runs of `length` floats of x, `row_step` and `run_step` apart; pixels of x are `x_stride` apart, and the
// second half of a tile of two output rows stands `fold` after the first.
struct Reduction { int64_t rows, runs, length, row_step, run_step, x_stride, fold; };

struct Target {
  const float *bias, *sum;  // what the tile starts from; nullptr: 0
  float* out;
  int64_t stride, columns;  // of out and sum from pixel to pixel; channels that there are of the panel's
  bool relu;
  const float* ahead;  // what is read later; each step asks for a cache line of it
};

using TileFunction = void (*)(const Reduction&, const float* x, const float* weight, const Target&);

#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // `total`, which is read only where it was written
template <int M, bool Folded>
void tile(const Reduction& sum, const float* x, const float* w, const Target& to) {
  __m512 y[M][2];
  __mmask16 mask[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int64_t first = 16 * half, columns = std::clamp<int64_t>(to.columns - first, 0, 16);
    mask[half] = __mmask16((1u << columns) - 1);
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(mask[half], to.bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      y[i][half] = bias;
      if (to.sum) y[i][half] = _mm512_add_ps(bias, _mm512_maskz_loadu_ps(mask[half], to.sum + i * to.stride + first));
    }
  }
  const int64_t stride = sum.x_stride, fold = Folded ? sum.fold - M / 2 * stride : 0;
  __m512 total[M][2];  // rounding errors grow with the length of a chain of additions, so that none is long
  bool chained = false;
  const auto add_up = [&] {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        total[i][half] = chained ? _mm512_add_ps(total[i][half], y[i][half]) : y[i][half];
        y[i][half] = _mm512_setzero_ps();
      }
    }
    chained = true;
  };
  int64_t left = kChain;
  const float* ahead = to.ahead;
  for (int64_t row = 0; row < sum.rows; ++row) {
    for (int64_t run = 0; run < sum.runs; ++run) {
      const float* v = x + row * sum.row_step + run * sum.run_step;
      for (int64_t begin = 0; begin < sum.length; begin += kChain) {
        const int64_t length = std::min(kChain, sum.length - begin);
        if (length > left) add_up(), left = kChain;
        left -= length;
        for (int64_t k = 0; k < length; ++k, ++v, w += kPanel, ahead += kLine) {
          const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + 16), _MM_HINT_T0);
#pragma GCC unroll 14
          for (int i = 0; i < M; ++i) {
            const __m512 a = _mm512_set1_ps(v[i * stride + (Folded && i >= M / 2 ? fold : 0)]);
            y[i][0] = _mm512_fmadd_ps(a, w0, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(a, w1, y[i][1]);
          }
        }
      }
    }
  }
  if (chained) add_up();
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      __m512 v = chained ? total[i][half] : y[i][half];
      if (to.relu) v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), v);  // keeps NaN
      _mm512_mask_storeu_ps(to.out + i * to.stride + 16 * half, mask[half], v);
    }
  }
}

#pragma GCC pop_options

template <bool Folded, int... I>
constexpr std::array<TileFunction, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {tile<Folded ? 2 * (I + 1) : I + 1, Folded>...};
}
constexpr auto kTiles = tiles<false>(std::make_integer_sequence<int, kTilePixels>{});           // of 1 to 14 pixels
constexpr auto kFoldedTiles = tiles<true>(std::make_integer_sequence<int, kTilePixels / 2>{});  // of 2, 4, ... 14
#else
constexpr TileFunction kTiles[kTilePixels] = {}, kFoldedTiles[kTilePixels / 2] = {};
#endif

// ---- how a conv is cut ------------------------------------------------------------------------------------------------

struct Conv {
  int64_t n, c, h, w, k, r, s, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // Set by `planned`:
  bool copied = false;
  int64_t pixel = 0;               // from one pixel to the next of what tiles read: x, or its copy with margins
  int64_t step_h = 1, step_w = 1;  // from one pixel of x to the next that is copied
  int64_t line = 0, image = 0;     // floats of a row and of an image of x
  int64_t last_w = 0;              // width of the last row, if it is another

  bool pointwise() const { return r == 1 && s == 1 && !pad_h && !pad_w; }
  int64_t panels() const { return ceil_div(k, kPanel); }
  int64_t panel_size() const { return r * s * c * kPanel; }
  int64_t reach() const { return (r - 1) * dilation_h + 1; }  // rows under the kernel
  int64_t row() const { return (w + 2 * pad_w) * pixel; }
  int64_t width(int64_t y) const { return last_w && y == out_h - 1 ? last_w : out_w; }

  Reduction reduction() const {
    const bool joined = dilation_w == 1 && pixel == c;
    return {r, joined ? 1 : s, joined ? s * c : c, dilation_h * row(), dilation_w * pixel, stride_w * pixel,
            stride_h * row()};
  }
};

// Pixels 4 KiB apart share the 8 ways of one set of the L1 cache: too few for a tile.
bool crowded(int64_t stride) { return stride % 1024 == 0; }

Conv planned(Conv conv) {
  const bool crowd = crowded(conv.stride_w * conv.c);
  conv.line = conv.w * conv.c, conv.image = conv.h * conv.line;
  if (conv.pointwise()) {
    if (conv.stride_h == 1 && conv.stride_w == 1) {  // images do not matter: one of all pixels, cut into rows that suit
      const int64_t pixels = conv.n * conv.h * conv.w, width = std::min(pixels, 4 * kTilePixels);
      conv.n = 1, conv.h = conv.out_h = ceil_div(pixels, width), conv.w = conv.out_w = width;
      conv.last_w = pixels - width * (conv.h - 1), conv.line = width * conv.c;
    } else if (crowd) {  // only what is read is copied
      conv.step_h = conv.stride_h, conv.step_w = conv.stride_w, conv.stride_h = conv.stride_w = 1;
      conv.h = conv.out_h, conv.w = conv.out_w;
    }
  }
  conv.copied = crowd || conv.pad_h || conv.pad_w;
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
    if (conv.pixel == conv.c) {
      std::memcpy(to + margin, from, width * conv.c * sizeof(float));
    } else {
      for (int64_t x = 0; x < width; ++x) {
        std::memcpy(to + margin + x * conv.pixel, from + x * conv.step_w * conv.c, conv.c * sizeof(float));
      }
    }
    std::memset(to + margin + conv.w * conv.pixel, 0, margin * sizeof(float));
  }
}

struct Operands {
  const float *x, *weight, *bias, *residual;
  float* out;
  bool relu;
};

// Output rows [first, last) of image n, panels [begin, end); x points to what row `first` reads.
void run_block(const Conv& conv, const Operands& op, int64_t parts, const float* x, int64_t n, int64_t first, int64_t last,
               int64_t begin, int64_t end) {
  const int64_t tiles = ceil_div(conv.out_w, kTilePixels);
  const bool foldable = 2 * conv.out_w <= kTilePixels && !conv.last_w;
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
        const TileFunction function = folded ? kFoldedTiles[pixels / 2 - 1] : kTiles[pixels - 1];
        const float* start = part ? op.out : op.residual;
        for (int64_t p = begin; p < end; ++p) {
          const int64_t channel = p * kPanel;
          const float *weight = op.weight + p * conv.panel_size() + done, *ahead = from + pixels * sum.x_stride;
          if (p > begin || !from_memory) {  // the first tiles ask for half each of the next part's or group's weights
            ahead = weight + (part + 1 < parts ? steps * kPanel : (end - begin) * conv.panel_size() - done);
            ahead += std::min<int64_t>(seen, 1) * steps * kLine;
          }
          function(sum, from, weight,
                   {op.bias && !part ? op.bias + channel : nullptr, start ? start + to + channel : nullptr,
                    op.out + to + channel, conv.k, std::min(kPanel, conv.k - channel), op.relu && part == parts - 1, ahead});
        }
        ++seen;
      }
      y += folded;
    }
    done += steps * kPanel;
  }
}

// Memory that a thread keeps, for the pages of a new buffer cost as much as what is done with them.
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    constexpr int64_t kMost = 4 << 20;  // 16 MiB
    thread_local std::vector<float> kept;
    if (size > kMost) own_.reset(new float[size]);
    else if (size > int64_t(kept.size())) kept = std::vector<float>(size);
    data_ = own_ ? own_.get() : kept.data();
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> own_;
  float* data_;
};

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
  const Buffer images(at_once ? conv.n * (conv.h + 2 * conv.pad_h) * conv.row() : 0);
  if (at_once) copy_images(conv, op.x, images.data()), op.x = images.data();
  const int64_t count = conv.n * blocks.per_image, items = count * blocks.groups;
  const int64_t work = conv.n * conv.out_h * conv.out_w * conv.panels() * conv.panel_size() / items / 16;
  parallel_dynamic(items, work, [&](const auto& next) {
    const Buffer buffer(conv.copied ? ((blocks.rows - 1) * conv.stride_h + conv.reach()) * conv.row() : 0);
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

// ---- operators --------------------------------------------------------------------------------------------------------

bool conv_available() {
#ifdef FR_CONV
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

void check_nhwc(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, name, " must be (N, C, H, W), float32");
  STD_TORCH_CHECK(is_rows(shape_of(t)), name, " must be channels_last");
}

// (K, C, R, S) -> (panels, R, S, C, 32), the last panel filled up with zeros.
Tensor conv_pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, "weight must be (K, C, R, S), float32");
  const auto size = weight.sizes(), stride = weight.strides();
  const int64_t k = size[0], c = size[1], r = size[2], s = size[3], panels = ceil_div(k, kPanel);
  const int64_t sizes[] = {panels, r, s, c, kPanel};
  const int64_t strides[] = {r * s * c * kPanel, s * c * kPanel, c * kPanel, kPanel, 1};
  Tensor packed = new_strided(weight, 5, sizes, strides, dtype_code(weight));
  const float* from = read<float>(weight);
  float* to = write<float>(packed);
  const int64_t sk = stride[0], sc = stride[1], sr = stride[2], ss = stride[3];
  parallel_items(panels, strides[0], false, [=](int64_t p) {
    float* out = to + p * strides[0];
    const int64_t columns = std::min(kPanel, k - p * kPanel);
    for (int64_t y = 0; y < r; ++y) {
      for (int64_t x = 0; x < s; ++x) {
        for (int64_t i = 0; i < c; ++i, out += kPanel) {
          const float* column = from + p * kPanel * sk + i * sc + y * sr + x * ss;
          for (int64_t j = 0; j < kPanel; ++j) out[j] = j < columns ? column[j * sk] : 0.0f;
        }
      }
    }
  });
  return packed;
}

// Writes into `out`, which may be the residual.
void conv_bias_act(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& residual,
                   const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                   int64_t dilation_w, bool relu) {
  STD_TORCH_CHECK(conv_available(), "this CPU has no AVX-512");
  check_nhwc(x, "x");
  check_nhwc(out, "out");
  STD_TORCH_CHECK(packed.dim() == 5 && packed.scalar_type() == ScalarType::Float && packed.size(4) == kPanel &&
                      packed.size(3) == x.size(1),
                  "weight must be packed for x's channels");
  Conv conv{x.size(0), x.size(1), x.size(2), x.size(3), out.size(1), packed.size(1), packed.size(2), out.size(2), out.size(3),
            stride_h,  stride_w,  pad_h,     pad_w,     dilation_h,  dilation_w};
  STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && pad_h >= 0 && pad_w >= 0 && dilation_h > 0 && dilation_w > 0,
                  "strides and dilations must be positive, paddings not negative");
  STD_TORCH_CHECK(out.size(0) == conv.n && packed.size(0) == conv.panels() &&
                      conv.out_h == conv_extent(conv.h, pad_h, dilation_h, conv.r, stride_h) &&
                      conv.out_w == conv_extent(conv.w, pad_w, dilation_w, conv.s, stride_w),
                  "out must have the sizes of the convolution's result");
  if (residual) check_like(*residual, out, "residual");
  if (out.numel() == 0) return;
  run(planned(conv), {read<float>(x), read<float>(packed), vector_data<const float>(bias, conv.k, ScalarType::Float, "bias"),
                   residual ? read<float>(*residual) : nullptr, write<float>(out), relu});
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&fused_resnet::conv_pack));
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CompositeExplicitAutograd, m) {
  m.impl("conv_available", TORCH_BOX(&fused_resnet::conv_available));
}
