"""max_pool(act(batch_norm(x))), the stem of a residual network after its conv: He et al. 2015, table 1. The formulas
stand in `fused_resnet.backends.reference`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_resnet import buffers, dispatch
from fused_resnet.folding import update_running_stats
from fused_resnet.ops.checks import (
    as_layout,
    check_activation,
    check_channels,
    check_input,
    check_momentum,
    dense,
    is_traced,
    needs_grad,
)


def bn_act_pool(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """F.max_pool2d(activation(batch_norm(x)), kernel_size=3, stride=2, padding=1), the only window it knows.

    Backends that fuse it never store the activation's output; for backward they keep x and one byte per output element
    (which of the 9 values was the largest).

    Args:
        x: (N, C, H, W); float16, bfloat16, float32 or float64; NCHW or channels_last, any strides.
        gamma, beta, running_mean, running_var, training, momentum, eps, activation: as in `bn_act`.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)) of x's dtype, channels_last where x is. NaN counts as largest, as in torch.
        Differentiable once with respect to x, gamma and beta.

    Raises:
        ValueError: a shape, a device or an option is wrong, or training sees one value per channel only.
        TypeError: dtypes differ or are not floating point.
    """
    check_activation("bn_act_pool", activation)
    check_input("bn_act_pool", "x", x)
    if x.dim() != 4:
        raise ValueError(f"bn_act_pool: x must be (N, C, H, W), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"bn_act_pool: x must have channels and pixels, got shape {tuple(x.shape)}")
    vectors = (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var))
    check_channels("bn_act_pool", x, x.shape[1], vectors)
    if training:
        check_momentum("bn_act_pool", momentum, x)
        # torch's own sentences
        if x.shape[0] * math.prod(x.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif running_mean is None or running_var is None:
        raise ValueError("bn_act_pool: without training, running_mean and running_var are needed, got None")

    backend = dispatch.requested()
    backward = needs_grad(x, gamma, beta)
    args = (x, gamma, beta, running_mean, running_var, training, momentum, eps, activation, backend)
    if is_traced(x):
        return _registered(*args, backward)
    if backward:
        return BNActPoolFunction.apply(*args)
    return _forward(*args, False)[0]


def _forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    backend: str,
    backward: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """(out, offsets, dense x, mean, var), the statistics being those that x was normalised with."""
    x = dense(x)
    bn = (gamma, beta, running_mean, running_var)
    if training:
        args = (*bn, momentum, eps, activation, backward)
        out, offsets, mean, var = dispatch.call("bn_act_pool_train_forward", x, *args, backend=backend)
        return out, offsets, x, mean, var
    out, offsets = dispatch.call("bn_act_pool_eval_forward", x, *bn, eps, activation, backward, backend=backend)
    return out, offsets, x, running_mean, running_var  # type: ignore[return-value]


class BNActPoolFunction(torch.autograd.Function):
    """Saves x, per-channel vectors and the offsets of the maxima in their windows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        activation: str | None,
        backend: str,
    ) -> Tensor:
        out, offsets, x, mean, var = _forward(
            x, gamma, beta, running_mean, running_var, training, momentum, eps, activation, backend, True
        )
        ctx.save_for_backward(offsets, x, gamma, beta, mean, var)
        ctx.options = (eps, activation, training)
        ctx.backend, ctx.buffers = backend, buffers.current()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, x, gamma, beta, mean, var = ctx.saved_tensors
        args = (offsets, x, gamma, beta, mean, var, *ctx.options)
        with buffers.using(ctx.buffers):
            grad_x, grad_gamma, grad_beta = dispatch.call(
                "bn_act_pool_backward", as_layout(grad, offsets), *args, backend=ctx.backend
            )
        return (
            grad_x,
            None if gamma is None else grad_gamma.to(gamma.dtype),
            None if beta is None else grad_beta.to(beta.dtype),
            *(None,) * 7,
        )


def _registered(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    backend: str,
    backward: bool,
) -> Tensor:
    """The same through the functional ops of `schemas`; the running statistics are updated outside them."""
    ops = torch.ops.fused_resnet
    options = (eps, activation, backward, backend)
    if not training:
        return ops.bn_act_pool_eval.default(x, gamma, beta, running_mean, running_var, *options)[0]
    out, _, mean, var = ops.bn_act_pool_train.default(x, gamma, beta, *options)
    with torch.no_grad():
        if x.numel():
            count = x.numel() // x.shape[1]
            update_running_stats(running_mean, running_var, mean.detach(), var.detach(), momentum, count)
    return out
