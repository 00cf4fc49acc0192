// In place of the convolution for sm_90a, whose instructions nothing emulates: plain loops over the same operands.
#include "cuda/conv_run.h"

namespace fused_resnet {

template <typename T>
const char* run_conv_sm90(const Conv& conv, const ConvOperands& operands, ConvTile, cudaStream_t) {
  const T *x = static_cast<const T*>(operands.x), *weight = static_cast<const T*>(operands.weight);
  const T* residual = static_cast<const T*>(operands.residual);
  for (int64_t row = 0; row < conv.rows(); ++row) {
    const int64_t image = row / (conv.p * conv.q), y = row / conv.q % conv.p, z = row % conv.q;
    for (int64_t k = 0; k < conv.k; ++k) {
      float sum = 0;
      for (int64_t r = 0; r < conv.r; ++r) {
        for (int64_t s = 0; s < conv.s; ++s) {
          const int64_t h = y * conv.stride_h - conv.pad_h + r * conv.dilation_h;
          const int64_t w = z * conv.stride_w - conv.pad_w + s * conv.dilation_w;
          if (h < 0 || h >= conv.h || w < 0 || w >= conv.w) continue;
          const T *from = x + ((image * conv.h + h) * conv.w + w) * conv.c, *by = weight + ((k * conv.r + r) * conv.s + s) * conv.c;
          for (int64_t c = 0; c < conv.c; ++c) sum += load(from[c]) * load(by[c]);
        }
      }
      const float add = residual ? load(residual[row * conv.k + k]) : 0.0f;
      static_cast<T*>(operands.out)[row * conv.k + k] =
          store<T>(finished(sum, operands.channels.at<T>(int32_t(k)), add, operands.with_relu));
    }
  }
  return nullptr;
}

template const char* run_conv_sm90<bf16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);
template const char* run_conv_sm90<fp16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);

}  // namespace fused_resnet
