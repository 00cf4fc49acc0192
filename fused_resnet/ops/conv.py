"""conv2d in training: torch's, or csrc's kernels where they are faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fused_resnet import buffers, dispatch
from fused_resnet.ops.block_units import as_gradient
from fused_resnet.ops.checks import autocast_dtype, is_traced

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


def conv_backend(requested: str) -> str:
    """The backend to ask for a plain convolution: those that have none leave it to torch."""
    return requested if requested in ("auto", "cpp") else "reference"


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups), all of them pairs.

    Differentiable once where csrc's kernels run it: float32 in channels_last on a CPU with AVX-512; and where 16 bits
    are computed in float32.
    """
    if x.device.type != "cpu" or is_traced(x):
        return F.conv2d(x, weight, bias, *geometry)
    cast = autocast_dtype(x)
    dtype = cast or x.dtype
    emulated = dispatch.in_float32(dtype, "cpu")
    if not (emulated or dtype == torch.float32):
        return F.conv2d(x, weight, bias, *geometry)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    backend = conv_backend(dispatch.requested())
    choice = dispatch.choose("conv_forward", x, weight, bias, *geometry, backend=backend)
    if choice.backend == "reference" and not emulated:
        return F.conv2d(x, weight, bias, *geometry)
    return ConvFunction.apply(x, weight, bias, geometry, choice, backend)


class ConvFunction(torch.autograd.Function):
    """Saves x and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, choice: Any, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.backend, ctx.buffers = geometry, backend, buffers.current()
        return choice.function(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=torch.channels_last)
        with buffers.using(ctx.buffers):
            grad_x, grad_weight = dispatch.call(
                "conv_backward", grad, x, weight, None, *ctx.geometry, needs_x, needs_weight, backend=ctx.backend
            )
        if grad_weight is not None:
            grad_weight = as_gradient(grad_weight, weight)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, None, None, None
