// From the operators of conv.cu to the kernels of conv_sm80.cu and conv_sm90.cu.
#pragma once

#include "conv.h"

using cudaStream_t = struct CUstream_st*;  // as in cuda_runtime.h

namespace fused_resnet {

struct ConvOperands {
  const void *x, *weight, *residual;  // the residual may be nullptr
  void* out;
  Channels channels;
  bool with_relu;
};

// Launch on `stream` of the current device. T: bf16 or fp16. Return what went wrong, or nullptr.
template <typename T>
const char* run_conv_sm80(const Conv& conv, const ConvOperands& operands, ConvTile tile, cudaStream_t stream);
template <typename T>
const char* run_conv_sm90(const Conv& conv, const ConvOperands& operands, ConvTile tile, cudaStream_t stream);

}  // namespace fused_resnet
