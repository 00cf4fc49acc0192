"""act(batch_norm(x) + residual): Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1, with the end of a residual
block (He et al. 2015, fig. 2). The backward formulas stand in `fused_resnet.backends.reference.bn_act_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_resnet import buffers, dispatch
from fused_resnet.folding import update_running_stats
from fused_resnet.ops.add_relu import add_relu
from fused_resnet.ops.checks import (
    as_layout,
    check_activation,
    check_batch_statistics,
    check_channels,
    check_input,
    check_momentum,
    check_shape,
    dense,
    is_autocast,
    is_traced,
    needs_grad,
)


def bn_act(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """activation(batch_norm(x) + residual), with batch statistics in training, else with the running ones.

    Training normalises with the biased batch variance and updates the running statistics in place (the variance
    unbiased), as torch.nn.BatchNorm2d does; accumulation is in float32 (float64 for float64).

    Args:
        x: (N, C, ...), at least 2-d; float16, bfloat16, float32 or float64; NCHW or channels_last, any strides.
        gamma, beta: (C,) or None (1 and 0). Note the order: not F.batch_norm's.
        running_mean, running_var: (C,) or None (in training: not kept). Without training both are needed.
            All four vectors have x's dtype, or float32 beside a 16-bit x.
        residual: x's shape, dtype and device, any strides; it may be x itself. No broadcasting.
        momentum: a float, or a 0-d tensor on x's device.
        eps: added to the variance; positive in training.
        activation: "relu" or None.

    Returns:
        A tensor of x's shape and dtype, channels_last where x is. NaN stays NaN. Differentiable once with respect to
        x, gamma, beta and residual.

    Raises:
        ValueError: a shape, a device or an option is wrong, or training sees one value per channel only.
        TypeError: dtypes differ (outside autocast) or are not floating point.
    """
    check_activation("bn_act", activation)
    check_input("bn_act", "x", x)
    if x.dim() < 2:
        raise ValueError(f"bn_act: x must be (N, C, ...), at least 2-d, got shape {tuple(x.shape)}")
    vectors = (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var))
    check_channels("bn_act", x, x.shape[1], vectors)
    if residual is not None:
        if isinstance(residual, Tensor) and residual.dtype != x.dtype and is_autocast(x):
            # Eager's promotion under autocast: a float32 residual gives a float32 result.
            y = bn_act(
                x,
                gamma,
                beta,
                running_mean,
                running_var,
                training=training,
                momentum=momentum,
                eps=eps,
                activation=None,
            )
            return add_relu(y, residual) if activation == "relu" else y + residual
        check_input("bn_act", "residual", residual, like=x)
        check_shape("bn_act", "residual", residual, x.shape)
    if training:
        check_momentum("bn_act", momentum, x)
        check_batch_statistics(x.shape, eps)
    elif running_mean is None or running_var is None:
        raise ValueError("bn_act: without training, running_mean and running_var are needed, got None")

    backend = dispatch.requested()
    if is_traced(x):
        return _registered(
            x, gamma, beta, running_mean, running_var, residual, training, momentum, eps, activation, backend
        )
    args = (x, gamma, beta, residual, running_mean, running_var, training, momentum, eps, activation, backend)
    if needs_grad(x, gamma, beta, residual):
        return BNActFunction.apply(*args)
    return _forward(*args)[0]


def _forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dense x, mean, var), the statistics being those that x was normalised with."""
    x = dense(x)
    if residual is not None:
        residual = as_layout(residual, x)
    if training:
        args = (gamma, beta, running_mean, running_var, residual, momentum, eps, activation)
        out, mean, var = dispatch.call("bn_act_train_forward", x, *args, backend=backend)
        return out, x, mean, var
    given = (gamma, beta, running_mean, running_var, residual, eps, activation)
    out = dispatch.call("bn_act_eval_forward", x, *given, backend=backend)
    return out, x, running_mean, running_var  # type: ignore[return-value]


class BNActFunction(torch.autograd.Function):
    """Saves x, per-channel vectors, and the output only where a residual came before the ReLU.

    Without a residual the ReLU's mask is recomputed from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        activation: str | None,
        backend: str,
    ) -> Tensor:
        out, x, mean, var = _forward(
            x, gamma, beta, residual, running_mean, running_var, training, momentum, eps, activation, backend
        )
        keep = out if activation == "relu" and residual is not None else None
        ctx.save_for_backward(x, keep, gamma, beta, mean, var)
        ctx.options = (eps, activation, training, residual is not None)
        ctx.backend, ctx.buffers = backend, buffers.current()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, gamma, beta, mean, var = ctx.saved_tensors
        known = (x, out, gamma, beta, mean, var, *ctx.options)
        with buffers.using(ctx.buffers):
            grad_x, grad_gamma, grad_beta, grad_residual = dispatch.call(
                "bn_act_backward", as_layout(grad, x), *known, backend=ctx.backend
            )
        return (
            grad_x,
            None if gamma is None else grad_gamma.to(gamma.dtype),
            None if beta is None else grad_beta.to(beta.dtype),
            grad_residual,
            *(None,) * 7,
        )


def _registered(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    backend: str,
) -> Tensor:
    """The same through the functional ops of `schemas`; the running statistics are updated outside them."""
    ops = torch.ops.fused_resnet
    if not training:
        return ops.bn_act_eval.default(x, gamma, beta, running_mean, running_var, residual, eps, activation, backend)
    out, mean, var = ops.bn_act_train.default(x, gamma, beta, residual, eps, activation, backend)
    with torch.no_grad():
        if x.numel():
            count = x.numel() // x.shape[1]
            update_running_stats(running_mean, running_var, mean.detach(), var.detach(), momentum, count)
    return out
