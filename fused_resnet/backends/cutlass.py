"""csrc's convolutions for NVIDIA GPUs, made from CUTLASS: conv, bias or batch norm, residual and ReLU in one kernel.

A part of the `cpp` backend that is there where it was asked for when the extension was built. The kernels have been
compiled, and those for sm_80 run on a CPU, emulated, but not yet run on a GPU: `cpp` takes them on request alone, and
only after they have proven equal to `reference` on the device at hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import selfcheck
from fused_resnet.ops.checks import conv_output_shape, is_channels_last

DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes
_ops = torch.ops.fused_resnet_cpp

_Pair = tuple[int, int]
_checked: dict[tuple[Any, ...], str | None] = {}
_tested: dict[selfcheck.Case, str | None] = {}


def refusal(
    op: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    groups: int,
) -> str | None:
    """Why the kernels do not take a call of the op "conv_bias_act" or "conv_bn_act", or None."""
    if groups != 1:
        return "it has no groups"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"it is for bfloat16 and float16, not {x.dtype}"
    if not is_channels_last(x):
        return "the input is not channels_last"
    if any(t.data_ptr() % _ALIGNMENT for t in (x, weight, residual) if t is not None):
        return f"a tensor is not aligned to {_ALIGNMENT} bytes"
    key = (x.shape, weight.shape, x.dtype, x.device, stride, padding, dilation)
    if key not in _checked:
        _checked[key] = _check(x, pack(weight), *stride, *padding, *dilation)
    return _checked[key] or selfcheck.untested(sys.modules[__name__], op, x, _tested)


def _check(x: Tensor, weight: Tensor, *geometry: int) -> str | None:
    """The complaint of the kernels' own checks."""
    try:
        _ops.conv_check.default(x, weight, *geometry)
    except RuntimeError as error:
        return re.sub(r"^.*?[.](cu|h):[0-9]+, ", "", str(error).splitlines()[0])
    return None


def pack(weight: Tensor) -> Tensor:
    """A (K, C, R, S) weight that is (K, R, S, C) in memory: itself where it is so, as every 1x1 is."""
    return weight.contiguous(memory_format=torch.channels_last)


def _convolve(
    function: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    *options: Any,
) -> Tensor:
    size = conv_output_shape(x, weight, stride, padding, dilation)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if residual is not None and residual.stride() != out.stride():
        residual = torch.empty_like(out).copy_(residual)
    vectors = tuple(None if v is None else v.contiguous() for v in vectors)
    function(x, pack(weight), *vectors, residual, out, *stride, *padding, *dilation, *options)
    return out


def conv_bias_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    groups: int,
    activation: str | None,
) -> Tensor:
    """As `reference.conv_bias_act_forward`, where `refusal` gives None; a weight that is not packed is copied."""
    function = _ops.conv_bias_act.default
    return _convolve(function, x, weight, (bias,), residual, stride, padding, dilation, activation == "relu")


def conv_bn_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """As `reference.conv_bn_act_forward`; the kernel reads the batch norm's own vectors."""
    vectors = (bias, gamma, beta, mean, var)
    function = _ops.conv_bn_act.default
    return _convolve(function, x, weight, vectors, residual, stride, padding, dilation, eps, activation == "relu")
