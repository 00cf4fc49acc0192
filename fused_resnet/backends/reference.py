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
from torch.nn.grad import conv2d_input, conv2d_weight

from fused_resnet.folding import accumulate_dtype, update_running_stats

Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]  # mean, var, gamma, beta, eps
Sums = tuple[Tensor, Tensor]  # grad_gamma, grad_beta


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


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """conv2d(x, weight, bias)."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    onto: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of conv2d(x, weight): (grad_x, grad_weight), each None where it is not needed.

    grad_x is added to `onto`, of x's shape and layout, which may be written over.
    """
    mask = [needs_x, needs_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    if onto is not None and needs_x:
        grad_x = onto.add_(grad_x)
    return grad_x, grad_weight


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


def masked_sums(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(g, sum of g per channel, in the accumulation type) with g = grad * (out > 0 or out is NaN)."""
    g = add_relu_backward(grad, out)
    return g, g.sum((0, 2, 3), dtype=accumulate_dtype(g.dtype))


def second_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of (row - mean)(row - mean)^T) of (M, w) rows, in the accumulation type: (w,) and (w, w)."""
    wide = rows.to(accumulate_dtype(rows.dtype))
    mean = wide.mean(0)
    centred = wide - mean
    return mean, centred.t() @ centred


# Convolutions that read a raw conv output through its BN and ReLU (a *prologue*). `bn` is (mean, var, gamma, beta,
# eps); None: the input is read as it is. Nothing here has groups, and an input is never empty.


def _read(y: Tensor, bn: Norm | None) -> Tensor:
    if bn is None:
        return y
    mean, var, gamma, beta, eps = bn
    return bn_act_eval_forward(y, gamma, beta, mean, var, None, eps, "relu")


def _rows(x: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """The pixels that a 1x1 conv reads, as (rows, C)."""
    x = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
    return x.reshape(-1, x.shape[3])


def _raw_gradient(g: Tensor, y: Tensor, bn: Norm, sums: Sums | None) -> Tensor:
    """The gradient of y from g, that of bn(y); `sums` (grad_gamma, grad_beta) where bn took its statistics from y."""
    mean, var, gamma, _, eps = bn
    acc = accumulate_dtype(y.dtype)
    rstd = torch.rsqrt(var.to(acc) + eps)
    scale = rstd if gamma is None else rstd * gamma.to(acc)
    column = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
    dy = g.to(acc)
    if sums is not None:
        grad_gamma, grad_beta = (s.to(acc) / (y.numel() // y.shape[1]) for s in sums)
        dy = dy - column(grad_beta) - (y.to(acc) - column(mean.to(acc))) * column(rstd * grad_gamma)
    return (dy * column(scale)).to(y.dtype)


def _masked(da: Tensor, y: Tensor, bn: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(g, grad_gamma, grad_beta): da where relu(bn(y)) is positive, and bn's own gradients."""
    mean, var, _, _, eps = bn
    return bn_mask_backward(da, _read(y, bn), y, mean, var, eps)


def bn_mask_backward(
    grad: Tensor, out: Tensor | None, y: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, grad_gamma, grad_beta) of a BN of y whose output, perhaps after an addition, went through a ReLU to `out`.

    g = grad * (out > 0 or out is NaN), grad without `out`; grad_gamma = sum(g * xhat), grad_beta = sum(g).
    """
    g = grad if out is None else add_relu_backward(grad, out)
    acc = accumulate_dtype(y.dtype)
    rows, centred = _rows(g).to(acc), _rows(y).to(acc) - mean.to(acc)
    return g, (rows * centred).sum(0) * torch.rsqrt(var.to(acc) + eps), rows.sum(0)


def prologue_conv_forward(
    x: Tensor,
    bn: Norm | None,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    statistics: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) of y = conv(relu(bn(x))); without `statistics` (y, None, None), else running ones are updated."""
    y = F.conv2d(_read(x, bn), weight, None, stride, padding, dilation)
    if not statistics:
        return y, None, None
    acc = accumulate_dtype(y.dtype)
    wide = _rows(y).to(acc)
    mean = wide.mean(0)
    var = (wide - mean).square_().mean(0)
    update_running_stats(running_mean, running_var, mean, var, momentum, wide.shape[0])
    return y, mean, var


def prologue_conv_grad_input(
    g: Tensor,
    y: Tensor,
    bn: Norm,
    sums: Sums | None,
    weight: Tensor,
    x: Tensor,
    x_bn: Norm | None,
    add: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of x through y = conv(relu(x_bn(x))) from g, that of bn(y); `sums` as in bn's backward.

    With x_bn (gradient of x_bn(x), grad_gamma, grad_beta), else (gradient of x, None, None). `add` is a further
    gradient of x, or of the pixels of x that a 1x1 conv of some stride reads; only without x_bn.
    """
    dy = _raw_gradient(g, y, bn, sums)
    da = conv2d_input(list(x.shape), weight, dy, stride, padding, dilation)
    if x_bn is not None:
        return _masked(da, x, x_bn)
    if add is not None:
        steps = (-(-x.shape[2] // add.shape[2]), -(-x.shape[3] // add.shape[3]))
        da[:, :, :: steps[0], :: steps[1]] += add
    return da, None, None


def prologue_conv_grad_weight(
    g: Tensor,
    y: Tensor,
    bn: Norm,
    sums: Sums | None,
    x: Tensor,
    x_bn: Norm | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The gradient of the weight, (K, C, *kernel) in y's dtype, of y = conv(relu(x_bn(x))) from g, that of bn(y)."""
    shape = (y.shape[1], x.shape[1], *kernel)
    a = _read(x, x_bn)
    return conv2d_weight(a, list(shape), _raw_gradient(g, y, bn, sums), stride, padding, dilation)


def prologue_moments(x: Tensor, bn: Norm | None, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`second_moments` of the pixels of relu(bn(x)) that a 1x1 conv reads."""
    return second_moments(_rows(_read(x, bn), stride))


def prologue_end_forward(
    x: Tensor,
    bn: Norm | None,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: tuple[int, int],
    stride2: tuple[int, int],
    activation: str | None,
) -> Tensor:
    """act(conv(relu(bn(x))) + conv2(x2) + shift + residual), both convs 1x1."""
    y = F.conv2d(_read(x, bn), weight, shift.to(x.dtype), stride)
    if x2 is not None and weight2 is not None:
        y += F.conv2d(x2, weight2, None, stride2)
    return _finish_(y, residual, activation)


def prologue_products(g: Tensor, x: Tensor, bn: Norm | None, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(g^T a, sum(g)) over the rows in the accumulation type, a the pixels of relu(bn(x)) that a 1x1 conv reads."""
    acc = accumulate_dtype(x.dtype)
    rows = _rows(g).to(acc)
    return rows.t() @ _rows(_read(x, bn), stride).to(acc), rows.sum(0)


def prologue_end_backward(
    g: Tensor,
    weight: Tensor,
    x: Tensor,
    bn: Norm | None,
    square: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g weight + a square + shift per pixel, a those of relu(bn(x)) that a 1x1 conv reads; weight (K, C).

    With bn as `prologue_conv_grad_input`: (the gradient of bn(x), grad_gamma, grad_beta), else (that of a, None, None).
    """
    n, _, h, w = g.shape
    da = _rows(g) @ weight
    if square is not None:
        da = da.addmm_(_rows(_read(x, bn), stride), square)
    if shift is not None:
        da += shift.to(da.dtype)
    da = da.view(n, h, w, -1).permute(0, 3, 1, 2)
    return (da, None, None) if bn is None else _masked(da, x, bn)
