// A convolution and its storage types in CUTLASS's words.
#pragma once

#include <cute/tensor.hpp>  // before what needs it

#include <cutlass/bfloat16.h>
#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/half.h>

#include "conv.h"

namespace fused_resnet {

template <typename T> struct Element;
template <> struct Element<bf16> { using type = cutlass::bfloat16_t; };
template <> struct Element<fp16> { using type = cutlass::half_t; };

inline cutlass::conv::Conv2dProblemSize problem_sm80(const Conv& conv) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {i(conv.n),          i(conv.h),          i(conv.w),     i(conv.c),     i(conv.k),        i(conv.r),
          i(conv.s),          i(conv.p),          i(conv.q),     i(conv.pad_h), i(conv.pad_w),    i(conv.stride_h),
          i(conv.stride_w),   i(conv.dilation_h), i(conv.dilation_w), cutlass::conv::Mode::kCrossCorrelation};
}

using ProblemSm90 = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

inline ProblemSm90 problem_sm90(const Conv& conv) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {cutlass::conv::Mode::kCrossCorrelation,
          {i(conv.n), i(conv.h), i(conv.w), i(conv.c)},
          {i(conv.k), i(conv.r), i(conv.s), i(conv.c)},
          {i(conv.pad_h), i(conv.pad_w)},
          {i(conv.pad_h), i(conv.pad_w)},
          {i(conv.stride_h), i(conv.stride_w)},
          {i(conv.dilation_h), i(conv.dilation_w)},
          1};
}

}  // namespace fused_resnet
