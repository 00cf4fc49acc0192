"""relu(x + residual), the end of a residual block: He et al. 2015, "Deep Residual Learning", eq. 1 and fig. 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_resnet import buffers, dispatch
from fused_resnet.ops.checks import as_layout, check_input, check_shape, dense, is_autocast, is_traced, needs_grad


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual) in one pass; the backward pass is one pass as well.

    Args:
        x: any shape; float16, bfloat16, float32 or float64; any strides.
        residual: x's shape, dtype (also under autocast, where a float32 operand promotes the other) and device.
            It may be x itself. There is no broadcasting.

    Returns:
        A tensor of x's shape and dtype, channels_last where x is. NaN stays NaN.

    Raises:
        ValueError: shapes or devices differ. TypeError: dtypes differ or are not floating point.
    """
    check_input("add_relu", "x", x)
    if isinstance(residual, Tensor) and residual.dtype != x.dtype and is_autocast(x):
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check_input("add_relu", "residual", residual, like=x)
    check_shape("add_relu", "residual", residual, x.shape)
    backend = dispatch.requested()
    if is_traced(x):
        return torch.ops.fused_resnet.add_relu.default(x, residual, backend)
    if needs_grad(x, residual):
        return AddReLUFunction.apply(x, residual, backend)
    return _forward(x, residual, backend)


def _forward(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    x = dense(x)
    return dispatch.call("add_relu_forward", x, as_layout(residual, x), backend=backend)


class AddReLUFunction(torch.autograd.Function):
    """Saves the output alone: the gradient of both summands is grad * (out > 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        out = _forward(x, residual, backend)
        ctx.save_for_backward(out)
        ctx.backend, ctx.buffers = backend, buffers.current()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        with buffers.using(ctx.buffers):
            grad = dispatch.call("add_relu_backward", as_layout(grad, out), out, backend=ctx.backend)
        return grad, grad, None
