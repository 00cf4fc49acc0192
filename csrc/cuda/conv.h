// Convolutions of NHWC tensors with a fused end: what is computed, on what, and which tile suits. Host and device; neither
// CUDA nor CUTLASS in here, so that it can be tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math.h"

namespace fused_resnet {

// ---- the fused end ------------------------------------------------------------------------------------------------------

// A per-channel vector in float32 (wide) or in the tensors' 16-bit type; no data stands for a constant.
struct ChannelVector {
  const void* data;
  bool wide;

  template <typename T>
  FR_HD float at(int32_t c, float absent) const {
    if (!data) return absent;
    return wide ? static_cast<const float*>(data)[c] : load(static_cast<const T*>(data)[c]);
  }
};

// out = act(scale * (conv(x) - center) + shift + residual)
struct alignas(16) Channel {
  float center, scale, shift;
};

// A conv's bias and the batch norm after it, which is there if it has a mean.
struct Channels {
  ChannelVector bias, mean, var, gamma, beta;
  float eps;

  template <typename T>
  FR_HD Channel at(int32_t c) const {
    if (!mean.data) return {0.0f, 1.0f, bias.at<T>(c, 0.0f)};
    return {mean.at<T>(c, 0.0f) - bias.at<T>(c, 0.0f), gamma.at<T>(c, 1.0f) * bn_rstd_fast(var.at<T>(c, 1.0f), eps),
            beta.at<T>(c, 0.0f)};
  }
};

FR_HD float finished(float sum, const Channel& channel, float residual, bool with_relu) {
  const float y = bn(sum, channel.center, channel.scale, channel.shift) + residual;
  return with_relu ? relu(y) : y;
}

// ---- what is convolved --------------------------------------------------------------------------------------------------

// x (n, h, w, c), weight (k, r, s, c), out (n, p, q, k), all dense.
struct Conv {
  int64_t n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t p = 0, q = 0;  // set by with_output

  int64_t rows() const { return n * p * q; }
  int64_t input() const { return n * h * w * c; }
  int64_t weights() const { return k * r * s * c; }
  int64_t output() const { return rows() * k; }
};

inline Conv with_output(Conv conv) {
  conv.p = conv_extent(conv.h, conv.pad_h, conv.dilation_h, conv.r, conv.stride_h);
  conv.q = conv_extent(conv.w, conv.pad_w, conv.dilation_w, conv.s, conv.stride_w);
  return conv;
}

// ---- which kernels serve it ---------------------------------------------------------------------------------------------

enum class ConvKernels { none, sm80, sm90 };  // by the GPU they are compiled for; sm80 serves up to sm_89

inline ConvKernels conv_kernels(int32_t major, int32_t minor) {
  return major == 8 ? ConvKernels::sm80 : major == 9 && minor == 0 ? ConvKernels::sm90 : ConvKernels::none;
}

constexpr int64_t kConvChannels = 8;                // 16 bytes of them are accessed at once
constexpr int64_t kConvElements = int64_t(1) << 31;  // offsets of CUTLASS have 32 bits

// Why the kernels do not take a convolution, or nullptr.
inline const char* conv_refusal(const Conv& conv, ConvKernels kernels) {
  if (conv.c % kConvChannels || conv.k % kConvChannels) return "input and output channels must be multiples of 8";
  if (std::max({conv.input(), conv.weights(), conv.output()}) >= kConvElements) {
    return "a tensor has 2**31 elements or more";
  }
  if (kernels == ConvKernels::sm80) {  // a tap is a bit of a mask
    return std::max(conv.r, conv.s) > 32 ? "the kernel is larger than 32" : nullptr;
  }
  // What a tensor map of im2col mode can say: the corners of the pixels that the first tap reads, offsets of taps, steps.
  const auto outside = [](int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t reach = dilation * (kernel - 1), upper = pad - reach;
    return pad > 128 || upper < -128 || upper > 127 || reach >= 255 || stride > 8;
  };
  return outside(conv.pad_h, conv.dilation_h, conv.r, conv.stride_h) || outside(conv.pad_w, conv.dilation_w, conv.s, conv.stride_w)
             ? "the padding, dilation or stride is larger than the GPU's tensor maps allow"
             : nullptr;
}

// ---- tiles --------------------------------------------------------------------------------------------------------------

constexpr int32_t kConvTileRows = 128;  // pixels of the output; its channels, by 64 or 128
enum class ConvTile { narrow = 64, wide = 128 };

inline int64_t conv_tiles(const Conv& conv, ConvTile tile) {
  return ceil_div(conv.rows(), kConvTileRows) * ceil_div(conv.k, int64_t(tile));
}

// Wide tiles read x half as often. Narrow ones where channels would be wasted, or multiprocessors.
inline ConvTile conv_tile(const Conv& conv, int32_t multiprocessors) {
  const int64_t rest = conv.k % int64_t(ConvTile::wide);
  const bool wasteful = 0 < rest && rest <= int64_t(ConvTile::narrow) && conv.k < 4 * int64_t(ConvTile::wide);
  return wasteful || conv_tiles(conv, ConvTile::wide) < multiprocessors ? ConvTile::narrow : ConvTile::wide;
}

}  // namespace fused_resnet
