"""Plain torch on any device: the specification of every primitive and the fallback, as fast as eager torch.

Conventions shared by all backends (the ops establish them, see `fused_resnet.ops`):
- `x` is dense, NCHW-contiguous or channels_last; `residual`, `out` and `grad` have x's shape, dtype and strides.
- Per-channel vectors have shape (C,) and x's dtype or float32; each may be None where the signature says so.
- Statistics (`mean`, biased `var`) and the gradients of gamma and beta are in the accumulation type: float64 for
  float64, else float32.
- `activation` is "relu" or None.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.folding import accumulate_dtype, update_running_stats


def unavailable(device_type: str) -> str | None:
    return None


def supports(primitive: str, *args: Any) -> str | None:
    return None


def _finish_(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        y += residual
    return y.relu_() if activation == "relu" else y


def add_relu_forward(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual)."""
    return (x + residual).relu_()


def add_relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of both summands: grad where out is positive or NaN, else 0."""
    return torch.where(out <= 0, 0, grad)


@overload
def _wide(vector: Tensor, x: Tensor) -> Tensor: ...
@overload
def _wide(vector: None, x: Tensor) -> None: ...
def _wide(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(accumulate_dtype(x.dtype))


def bn_act_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(bn(x) + residual) with batch statistics; updates the running statistics in place.

    Returns (out, mean, var), var being the biased batch variance.
    """
    mean = x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype))
    var = torch.zeros_like(mean)
    if x.numel() == 0:
        return x.clone(), mean, var
    # With no gamma aten keeps statistics in x's dtype. Momentum 1 gives the batch's own mean and unbiased variance.
    gamma = torch.ones_like(mean) if gamma is None else _wide(gamma, x)
    out = torch.native_batch_norm(x, gamma, _wide(beta, x), mean, var, True, 1.0, eps)[0]
    count = x.numel() // x.shape[1]
    var *= (count - 1) / count
    update_running_stats(running_mean, running_var, mean, var, momentum, count)
    return _finish_(out, residual, activation), mean, var


def bn_act_eval_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """act(bn(x) + residual) with given statistics."""
    out = F.batch_norm(x, _wide(mean, x), _wide(var, x), _wide(gamma, x), _wide(beta, x), False, 0.0, eps)
    return _finish_(out, residual, activation)


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    training: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of act(bn(x) + residual): (grad_x, grad_gamma, grad_beta, grad_residual).

    With g = grad * (out > 0 or out is NaN), S1 = sum(g), S2 = sum(g * xhat), s = gamma / sqrt(var + eps):
    grad_x = s * (g - S1/M - xhat * S2/M) in training, s * g with given statistics; grad_gamma = S2, grad_beta = S1,
    grad_residual = g (None without a residual). `out` is given exactly where relu follows a residual; without a
    residual the mask is recomputed from x.
    """
    gamma, beta, mean, var = _wide(gamma, x), _wide(beta, x), _wide(mean, x), _wide(var, x)
    if x.numel() == 0:
        vector = torch.zeros_like(mean)
        return torch.empty_like(grad), vector, vector.clone(), torch.empty_like(grad) if has_residual else None
    g = grad
    if activation == "relu":
        if out is None:
            out = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)
        g = add_relu_backward(grad, out)
    # With no gamma aten gives no sums, so ones stand in for it.
    gamma = torch.ones_like(mean) if gamma is None else gamma
    grad_x, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, mean, var, mean, torch.rsqrt(var + eps), training, eps, [True, True, True]
    )
    return grad_x, grad_gamma, grad_beta, g if has_residual else None


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
    """act(conv(x) + bias + residual); inference only."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _finish_(y, residual, activation)


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
    """act(bn(conv(x) + bias) + residual) with given statistics; inference only."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return bn_act_eval_forward(y, gamma, beta, mean, var, residual, eps, activation)


def second_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of (row - mean)(row - mean)^T) of (M, w) rows, in the accumulation type: (w,) and (w, w)."""
    wide = rows.to(accumulate_dtype(rows.dtype))
    mean = wide.mean(0)
    centred = wide - mean
    return mean, centred.t() @ centred
