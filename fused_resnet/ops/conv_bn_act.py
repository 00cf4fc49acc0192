"""act(batch_norm(conv2d(x)) + residual): the unit that residual networks are made of (He et al. 2015, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import dispatch
from fused_resnet.ops.bn_act import bn_act
from fused_resnet.ops.checks import (
    autocast_dtype,
    check_activation,
    check_channels,
    check_input,
    check_shape,
    is_traced,
    needs_grad,
)
from fused_resnet.ops.conv import conv2d
from fused_resnet.ops.conv_bias_act import check_conv, conv_layout


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """activation(batch_norm(conv2d(x, weight, bias)) + residual).

    One kernel where neither training nor gradients are asked for. In training the batch statistics of the conv's
    output are a barrier: the conv is torch's, BN + residual + activation one fused op (`bn_act`).

    Args:
        x: (N, C, H, W); float16, bfloat16, float32 or float64; NCHW or channels_last, any strides.
        weight: (K, C / groups, R, S), x's dtype and device (under autocast any).
        gamma, beta, running_mean, running_var: (K,) or None, as in `bn_act`. Note the order: not F.batch_norm's.
        residual: the output's shape, dtype and device, any strides. No broadcasting.
        bias: the conv's bias, (K,) or None.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d, zero padding.
        training, momentum, eps, activation: as in `bn_act`.

    Returns:
        (N, K, H', W'), channels_last where x or weight is. Without gradients on the CPU, oneDNN's fused ReLU turns
        NaN into 0; every other path keeps NaN.

    Raises:
        ValueError: a shape, a device or an option is wrong. TypeError: dtypes differ (outside autocast) or are not
        floating point.
    """
    check_activation("conv_bn_act", activation)
    conv, out_shape = check_conv("conv_bn_act", x, weight, bias, stride, padding, dilation, groups)
    dtype = autocast_dtype(x)
    vectors = (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var))
    if dtype is None:
        check_channels("conv_bn_act", x, weight.shape[0], vectors)
    if residual is not None:
        check_input("conv_bn_act", "residual", residual, like=x, any_dtype=dtype is not None)
        check_shape("conv_bn_act", "residual", residual, out_shape)
    if (
        training
        or needs_grad(x, weight, gamma, beta, residual, bias)
        or (residual is not None and dtype not in (None, residual.dtype))
        or running_mean is None
        or running_var is None
    ):
        y = conv2d(x, weight, bias, *conv)
        options = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
        return bn_act(y, gamma, beta, running_mean, running_var, residual, **options)  # type: ignore[arg-type]
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        check_channels("conv_bn_act", x, weight.shape[0], vectors)
    backend = dispatch.requested()
    args = (weight, bias, gamma, beta, running_mean, running_var, residual, *conv, eps, activation)
    if is_traced(x):
        return torch.ops.fused_resnet.conv_bn_act.default(x, *args, backend)
    x, residual = conv_layout(x, weight, residual)
    args = (weight, bias, gamma, beta, running_mean, running_var, residual, *conv, eps, activation)
    return dispatch.call("conv_bn_act_forward", x, *args, backend=backend)
