"""act(conv2d(x) + bias + residual): the conv of a residual block whose BN is folded or absent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet import dispatch
from fused_resnet.ops.add_relu import add_relu
from fused_resnet.ops.checks import (
    autocast_dtype,
    check_activation,
    check_input,
    check_shape,
    conv_output_shape,
    dense,
    is_traced,
    needs_grad,
    pair,
    suggests_channels_last,
)
from fused_resnet.ops.conv import conv2d


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
) -> Tensor:
    """activation(conv2d(x, weight) + bias + residual); one kernel when no gradient is asked for.

    With gradients the conv is torch's and the rest one fused pass (only the output is kept for its backward).

    Args:
        x: (N, C, H, W); float16, bfloat16, float32 or float64; NCHW or channels_last, any strides.
        weight: (K, C / groups, R, S), x's dtype (under autocast any; see `torch.autocast`) and device.
        bias: (K,) of the weight's dtype and device, or None.
        residual: the output's shape, dtype and device, any strides. No broadcasting.
        stride, padding, dilation: an int or a pair (height, width); zero padding.
        groups: as torch.nn.functional.conv2d.
        activation: "relu" or None.

    Returns:
        (N, K, H', W'), channels_last where x or weight is. Without gradients on the CPU, oneDNN's fused ReLU turns
        NaN into 0; every other path keeps NaN.

    Raises:
        ValueError: a shape, a device or an option is wrong. TypeError: dtypes differ (outside autocast) or are not
        floating point.
    """
    check_activation("conv_bias_act", activation)
    conv, out_shape = check_conv("conv_bias_act", x, weight, bias, stride, padding, dilation, groups)
    dtype = autocast_dtype(x)
    if residual is not None:
        check_input("conv_bias_act", "residual", residual, like=x, any_dtype=dtype is not None)
        check_shape("conv_bias_act", "residual", residual, out_shape)
    if needs_grad(x, weight, bias, residual) or (residual is not None and dtype not in (None, residual.dtype)):
        y = conv2d(x, weight, bias, *conv)
        if residual is None:
            return F.relu(y, inplace=True) if activation == "relu" else y
        return add_relu(y, residual) if activation == "relu" else y + residual
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    backend = dispatch.requested()
    if is_traced(x):
        return torch.ops.fused_resnet.conv_bias_act.default(x, weight, bias, residual, *conv, activation, backend)
    x, residual = conv_layout(x, weight, residual)
    return dispatch.call("conv_bias_act_forward", x, weight, bias, residual, *conv, activation, backend=backend)


def check_conv(
    op: str, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], tuple[int, int, int, int]]:
    """((stride, padding, dilation, groups), output shape) of a 2-d convolution, its tensors and options checked."""
    check_input(op, "x", x)
    any_dtype = autocast_dtype(x) is not None
    check_input(op, "weight", weight, like=x, any_dtype=any_dtype)
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"{op}: x must be (N, C, H, W) and weight (K, C / groups, R, S), "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight is empty, got shape {tuple(weight.shape)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups must be a positive int, got {groups!r}")
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: with groups={groups} and weight {tuple(weight.shape)} x needs {weight.shape[1] * groups} channels "
            f"and the weight's first size must divide by groups, got x {tuple(x.shape)}"
        )
    if bias is not None:
        check_input(op, "bias", bias, like=x, any_dtype=any_dtype)
        check_shape(op, "bias", bias, (weight.shape[0],))
    strides, pads, dils = (
        pair(op, "stride", stride, 1),
        pair(op, "padding", padding, 0),
        pair(op, "dilation", dilation, 1),
    )
    out_shape = conv_output_shape(x, weight, strides, pads, dils)
    if min(out_shape[2:]) < 1:
        raise ValueError(
            f"{op}: a {weight.shape[2]}x{weight.shape[3]} kernel (dilation {dils}, padding {pads}) "
            f"does not fit an input of {x.shape[2]}x{x.shape[3]}"
        )
    return (strides, pads, dils, groups), out_shape


def conv_layout(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and the residual in the layout of the output: channels_last where torch sees x or the weight so, else NCHW."""
    x = dense(x)
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    return x, residual
