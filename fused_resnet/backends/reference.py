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


def bn_bn_act_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    x2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum2: float | Tensor,
    eps2: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """act(bn(x) + bn2(x2)), the end of a projection block; x2 is like x. Returns (out, mean, var, mean2, var2)."""
    shortcut, mean2, var2 = bn_act_train_forward(
        x2, gamma2, beta2, running_mean2, running_var2, None, momentum2, eps2, None
    )
    out, mean, var = bn_act_train_forward(
        x, gamma, beta, running_mean, running_var, shortcut, momentum, eps, activation
    )
    return out, mean, var, mean2, var2


def bn_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    x2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `bn_bn_act_train_forward`: (grad_x, grad_gamma, grad_beta, grad_x2, grad_gamma2, grad_beta2).

    The ReLU's mask is recomputed from x and x2.
    """
    if activation == "relu":
        shortcut = bn_act_eval_forward(x2, gamma2, beta2, mean2, var2, None, eps2, None)
        grad = add_relu_backward(grad, bn_act_eval_forward(x, gamma, beta, mean, var, shortcut, eps, None))
    first = bn_act_backward(grad, x, None, gamma, beta, mean, var, eps, None, True, False)
    second = bn_act_backward(grad, x2, None, gamma2, beta2, mean2, var2, eps2, None, True, False)
    return *first[:3], *second[:3]


_POOL = ((3, 3), (2, 2), (1, 1), (1, 1), False)  # kernel, stride, padding, dilation, ceil_mode


def _pool(y: Tensor, with_offsets: bool) -> tuple[Tensor, Tensor | None]:
    """3x3/2 max pool with padding 1: (out, offsets). An offset (uint8) is 3 * row + column of the maximum within its
    window; among equals the first counts, a NaN counts as largest and the last NaN wins, as in torch."""
    out, indices = torch.ops.aten.max_pool2d_with_indices(y, *_POOL)
    return out, pool_offsets(indices, y.shape[3]) if with_offsets else None


def pool_offsets(indices: Tensor, width: int) -> Tensor:
    """The offsets within their windows of the positions that torch's max pool gives in images `width` pixels wide."""
    rows = torch.arange(indices.shape[2], device=indices.device).view(-1, 1) * 2 - 1
    columns = torch.arange(indices.shape[3], device=indices.device) * 2 - 1
    return ((indices // width - rows) * 3 + indices % width - columns).to(torch.uint8)


def pool_indices(offsets: Tensor, width: int) -> Tensor:
    """The positions within an image, `width` pixels wide, that the windows' offsets point at, as torch counts them."""
    rows = torch.arange(offsets.shape[2], device=offsets.device).view(-1, 1) * 2 - 1 + offsets.long() // 3
    columns = torch.arange(offsets.shape[3], device=offsets.device) * 2 - 1 + offsets.long() % 3
    return rows * width + columns


def bn_act_pool_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    with_offsets: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """max_pool(act(bn(x))), the window 3x3 with stride 2 and padding 1, for (N, C, H, W): a network's stem.

    Batch statistics; the running ones are updated in place. Returns (out, offsets, mean, var); see `_pool`.
    """
    y, mean, var = bn_act_train_forward(x, gamma, beta, running_mean, running_var, None, momentum, eps, activation)
    return *_pool(y, with_offsets), mean, var


def bn_act_pool_eval_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    with_offsets: bool,
) -> tuple[Tensor, Tensor | None]:
    """max_pool(act(bn(x))) with given statistics: (out, offsets)."""
    return _pool(bn_act_eval_forward(x, gamma, beta, mean, var, None, eps, activation), with_offsets)


def bn_act_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of max_pool(act(bn(x))): (grad_x, grad_gamma, grad_beta). `grad` has the layout of x.

    The gradient of act's output is, at each pixel, the sum over the (up to 4) windows that picked it; the rest as in
    `bn_act_backward`, the ReLU's mask being recomputed from x.
    """
    indices = pool_indices(offsets, x.shape[3])
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *_POOL, indices)
    return bn_act_backward(grad, x, None, gamma, beta, mean, var, eps, activation, training, False)[:3]


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
