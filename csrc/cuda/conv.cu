// act(conv(x) + bias + residual) and act(bn(conv(x) + bias) + residual) of NHWC tensors in 16 bits: one kernel each. Host code;
// FR_CONV_SM80 and FR_CONV_SM90 tell which of the kernels are compiled beside it.
#include <torch/csrc/stable/library.h>

#include "conv_run.h"
#include "device.h"

namespace fused_resnet {
namespace {

// ---- checks -------------------------------------------------------------------------------------------------------------

ConvKernels kernels_of(const Device& device) {
  const ConvKernels kernels = conv_kernels(device.major_capability(), device.minor_capability());
  bool compiled = false;
#ifdef FR_CONV_SM80
  compiled |= kernels == ConvKernels::sm80;
#endif
#ifdef FR_CONV_SM90
  compiled |= kernels == ConvKernels::sm90;
#endif
  STD_TORCH_CHECK(compiled, "no convolution was compiled for GPUs of compute capability ", device.major_capability(), ".", device.minor_capability());
  return kernels;
}

void check_tensor(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == dtype, name, " must have 4 dimensions and the dtype of x");
  STD_TORCH_CHECK(is_rows(shape_of(t)), name, " must be channels_last");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, " must be aligned to 16 bytes");
}

Conv conv_of(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
             int64_t dilation_h, int64_t dilation_w) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x must be bfloat16 or float16");
  check_tensor(x, dtype, "x");
  check_tensor(weight, dtype, "weight");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "x and weight must have the same channels: there are no groups");
  STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && pad_h >= 0 && pad_w >= 0 && dilation_h > 0 && dilation_w > 0,
                  "strides and dilations must be positive, paddings not negative");
  const Conv conv = with_output({x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(2), weight.size(3),
                                 stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w});
  STD_TORCH_CHECK(conv.p > 0 && conv.q > 0 && conv.output() > 0 && conv.weights() > 0, "x, weight and the output must not be empty");
  return conv;
}

void check_served(const Conv& conv, ConvKernels kernels) {
  const char* refusal = conv_refusal(conv, kernels);
  STD_TORCH_CHECK(!refusal, refusal ? refusal : "");
}

ChannelVector channel_vector(const OptionalTensor& t, const Conv& conv, ScalarType dtype, const char* name) {
  if (!t) return {nullptr, false};
  const bool wide = t->scalar_type() == ScalarType::Float;
  check_vector(*t, conv.k, wide ? ScalarType::Float : dtype, name);
  return {t->const_data_ptr(), wide};
}

// ---- launch -------------------------------------------------------------------------------------------------------------

template <typename T>
const char* run(const Conv& conv, const ConvOperands& operands, ConvKernels kernels, ConvTile tile, cudaStream_t stream) {
#ifdef FR_CONV_SM80
  if (kernels == ConvKernels::sm80) return run_conv_sm80<T>(conv, operands, tile, stream);
#endif
#ifdef FR_CONV_SM90
  if (kernels == ConvKernels::sm90) return run_conv_sm90<T>(conv, operands, tile, stream);
#endif
  return "it was not compiled";
}

void convolve(const Tensor& x, const Tensor& weight, const Conv& conv, const Channels& channels, const OptionalTensor& residual,
              const Tensor& out, bool relu) {
  check_tensor(out, x.scalar_type(), "out");
  STD_TORCH_CHECK(out.size(0) == conv.n && out.size(1) == conv.k && out.size(2) == conv.p && out.size(3) == conv.q,
                  "out must have the sizes of the convolution's result");
  if (residual) {
    check_like(*residual, out, "residual");
    check_tensor(*residual, x.scalar_type(), "residual");
  }
  const Device device(x);
  const ConvKernels kernels = kernels_of(device);
  check_served(conv, kernels);
  const ConvOperands operands{x.const_data_ptr(),     weight.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr,
                              out.mutable_data_ptr(), channels,                relu};
  const ConvTile tile = conv_tile(conv, device.multiprocessors());
  const auto function = x.scalar_type() == ScalarType::Half ? run<fp16> : run<bf16>;
  const char* error = function(conv, operands, kernels, tile, device.stream());
  STD_TORCH_CHECK(!error, "convolution: ", error ? error : "");
}

// ---- operators ----------------------------------------------------------------------------------------------------------

// Raises the reason why the kernels do not take a call.
void conv_check(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                int64_t dilation_h, int64_t dilation_w) {
  const Conv conv = conv_of(x, weight, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  check_served(conv, kernels_of(Device(x)));
}

void conv_bias_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                   const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                   int64_t dilation_w, bool relu) {
  const Conv conv = conv_of(x, weight, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  Channels channels{};
  channels.bias = channel_vector(bias, conv, x.scalar_type(), "bias");
  convolve(x, weight, conv, channels, residual, out, relu);
}

void conv_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gamma,
                 const OptionalTensor& beta, const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
                 const Tensor& out, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                 int64_t dilation_w, double eps, bool relu) {
  const Conv conv = conv_of(x, weight, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  const auto vector = [&](const OptionalTensor& t, const char* name) { return channel_vector(t, conv, x.scalar_type(), name); };
  const Channels channels{vector(bias, "bias"),   vector(mean, "mean"), vector(var, "var"),
                          vector(gamma, "gamma"), vector(beta, "beta"), float(eps)};
  convolve(x, weight, conv, channels, residual, out, relu);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FR_DEVICE_LIBRARY, FR_DEVICE_KEY, m) {
  m.impl("conv_check", TORCH_BOX(&fused_resnet::conv_check));
  m.impl("conv_bias_act", TORCH_BOX(&fused_resnet::conv_bias_act));
  m.impl("conv_bn_act", TORCH_BOX(&fused_resnet::conv_bn_act));
}
