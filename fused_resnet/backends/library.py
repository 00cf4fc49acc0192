"""The vendor libraries' own fused calls that torch exposes: oneDNN on the CPU, cuDNN on CUDA. Inference only.

oneDNN's ReLU turns NaN into 0, where torch keeps it. Both libraries take weights with BN folded in.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from fused_resnet.folding import fold

NOTES = dict.fromkeys(("conv_bias_act", "conv_bn_act"), "inference; oneDNN's ReLU turns NaN into 0")

_PACKABLE = platform.machine().lower() in ("x86_64", "amd64")


def unavailable(device_type: str) -> str | None:
    if device_type == "cpu":
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"
    if device_type == "cuda":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    return f"no library for device {device_type}"


def switched_off(device_type: str) -> str | None:
    """The switch of torch that keeps the library from being used, if one does."""
    if device_type == "cpu" and not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is disabled"
    if device_type == "cuda" and not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn is disabled"
    return None


def supports(primitive: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    reason = switched_off(x.device.type)
    if reason is not None:
        return reason
    if x.numel() == 0:
        return "the input is empty"
    if x.device.type == "cpu":
        if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return None
        if x.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return None
        return f"oneDNN has no {x.dtype} convolution on this CPU"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"cuDNN has no fused {x.dtype} convolution"
    return None if args[-1] == "relu" else "cuDNN's fused calls end in a ReLU"


def packs(x: Tensor, weight: Tensor, *args: Any) -> bool:
    """Whether modules had better keep BN folded into the weight, and packed: always."""
    return True


def pack(
    weight: Tensor,
    input_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The weight as an opaque tensor in oneDNN's own layout, which no call has to reorder; elsewhere the weight."""
    if weight.device.type != "cpu" or not _PACKABLE:
        return weight
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, input_shape)


def conv_bias_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """As `reference.conv_bias_act_forward`; the weight may be packed."""
    if x.device.type == "cuda":
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    conv = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return conv(x, weight, bias, padding, stride, dilation, groups, activation or "none", [], "")
    args: tuple[Any, ...] = (weight, bias, padding, stride, dilation, groups, "add", 1.0)
    if x.dtype != torch.float32 and activation is not None:  # torch fuses less here, and its fallback lacks 16 bits
        if x.is_contiguous():
            return conv.binary(x, residual, *args, None, [], None).relu_()
        if groups > 1:
            return torch.ops.mkldnn._convolution_pointwise_.binary(residual.clone(), x, *args, activation, [], None)
    return conv.binary(x, residual, *args, activation, [], None)


def conv_bias_act_onto_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """As `conv_bias_act_forward`, and may write over the residual: the pages of a large new tensor cost as much time as
    the convolution."""
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return conv_bias_act_forward(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    args: tuple[Any, ...] = (weight, bias, padding, stride, dilation, groups, "add", 1.0, activation, [], None)
    return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *args)


def conv_bn_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """As `reference.conv_bn_act_forward`, BN folded into the weight at every call. Modules keep it folded instead."""
    weight, bias = fold(weight, bias, gamma, beta, mean, var, eps)
    return conv_bias_act_forward(x, weight, bias, residual, stride, padding, dilation, groups, activation)
