"""max_pool(act(bn(x))), a network's stem, with a 3x3 window, stride 2 and padding 1; act's output is never stored.

Forward, a program normalises what the windows of its output pixels see. Backward, it owns quads of input pixels,
(2a, 2b) to (2a + 1, 2b + 1): only the windows (a, b), (a, b + 1), (a + 1, b) and (a + 1, b + 1) can have picked one of
them, so the gradient is gathered, without atomics. Statistics, merges and row order are those of `bn_act`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.triton import bn_act, configs
from fused_resnet.backends.triton.bn_act import (
    at,
    channels,
    contiguous,
    finish_backward,
    gradient,
    plan,
    share,
    slopes,
    statistics,
    workspace,
)
from fused_resnet.backends.triton.common import load, relu, relu_grad, store
from fused_resnet.backends.triton.runtime import launch


@triton.jit
def bn_pool_apply_kernel(
    x,  # (N, C, H, W)
    out,  # (N, C, P, Q)
    offsets,
    mean,
    var,
    gamma,
    beta,
    eps,
    M,  # N * P * Q
    C,
    L,  # pixels of a channel that lie side by side in x: H * W in NCHW, 1 in NHWC
    LP,  # and in out
    S,  # elements from a pixel of a channel to the next: 1 in NCHW, C in NHWC
    H,
    W,
    P,
    Q,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out and, where wanted, the offsets of the maxima within their windows. Rows backward."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    for tile in range(part, tiles, parts):
        rows = (tiles - 1 - tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        n, p, q = rows // (P * Q), rows // Q % P, rows % Q
        best = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
        first = tl.where(p == 0, 3, 0) + tl.where(q == 0, 1, 0)  # the window's first tap that is not padding
        which = tl.broadcast_to(first[:, None], [BLOCK_R, BLOCK_C])
        middle = at((n * H + 2 * p) * W + 2 * q, cols, C, L)  # the window's, which always exists
        for tap in tl.static_range(9):
            h = 2 * p - 1 + tap // 3
            w = 2 * q - 1 + tap % 3
            there = ((rows < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            here = middle + ((tap // 3 - 1) * W + tap % 3 - 1) * S
            y = s * (load(x + here, there & inside[None, :]) - m) + b
            if RELU:
                y = relu(y)
            y = y.to(x.dtype.element_ty).to(tl.float32)  # so that ties are those of stored values
            larger = there & ((y > best) | (y != y))
            best = tl.where(larger, y, best)
            which = tl.where(larger, tap, which)
        valid = (rows < M)[:, None] & inside[None, :]
        here = at(rows, cols, C, LP)
        store(out + here, best, valid)
        if offsets is not None:
            tl.store(offsets + here, which.to(tl.uint8), mask=valid)


@triton.jit
def window(grad, offsets, here, valid):
    """Gradients and offsets [R, C] of windows; 0 where there is none."""
    return load(grad + here, valid), tl.load(offsets + here, mask=valid, other=0)


@triton.jit
def picked(g, offsets, tap: tl.constexpr):
    return tl.where(offsets == tap, g, 0.0)


@triton.jit
def quads(grad, offsets, n, a, b, P, Q, cols, exists, C, LP, S):
    """The gradient of act's output at the pixels (2a, 2b), (2a, 2b + 1), (2a + 1, 2b), (2a + 1, 2b + 1)."""
    here = at((n * P + a) * Q + b, cols, C, LP)
    on_right, on_below = exists & (b + 1 < Q)[:, None], exists & (a + 1 < P)[:, None]
    g, at_g = window(grad, offsets, here, exists)
    right, at_right = window(grad, offsets, here + S, on_right)
    below, at_below = window(grad, offsets, here + Q * S, on_below)
    last, at_last = window(grad, offsets, here + (Q + 1) * S, on_right & on_below)
    return (
        picked(g, at_g, 4),
        picked(g, at_g, 5) + picked(right, at_right, 3),
        picked(g, at_g, 7) + picked(below, at_below, 1),
        picked(g, at_g, 8) + picked(right, at_right, 6) + picked(below, at_below, 2) + picked(last, at_last, 0),
    )


@triton.jit
def pixel(x, g, here, valid, m, s, b, RELU: tl.constexpr):
    """(x - mean, masked g) of the pixels at `here`."""
    centred = load(x + here, valid) - m
    if RELU:
        g = relu_grad(g, (s * centred + b).to(x.dtype.element_ty).to(tl.float32))
    return centred, g


@triton.jit
def bn_pool_backward_reduce_kernel(
    grad,
    offsets,
    x,
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_x,
    partials,
    M,  # quads: N * P * Q
    C,
    L,
    LP,
    S,
    H,
    W,
    P,
    Q,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials (2, P, C) = sums of g and g * (x - mean); with given statistics grad_x = scale * g as well."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(part, tiles, parts):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        i, j, k = rows // (P * Q), rows // Q % P, rows % Q
        exists = (rows < M)[:, None] & inside[None, :]
        four = quads(grad, offsets, i, j, k, P, Q, cols, exists, C, LP, S)
        first = at((i * H + 2 * j) * W + 2 * k, cols, C, L)
        for corner in tl.static_range(4):
            valid = exists & ((2 * j + corner // 2 < H) & (2 * k + corner % 2 < W))[:, None]
            here = first + (corner // 2 * W + corner % 2) * S
            centred, g = pixel(x, four[corner], here, valid, m, s, b, RELU)
            if grad_x is not None:
                store(grad_x + here, s * g, valid)
            sum_g += g  # 0 where there is no pixel: no window picks one
            sum_gx += g * centred
    to = partials + part * C + cols
    tl.store(to, tl.sum(sum_g, 0), mask=inside)
    tl.store(to + parts * C, tl.sum(sum_gx, 0), mask=inside)


@triton.jit
def bn_pool_backward_apply_kernel(
    grad,
    offsets,
    x,
    grad_x,
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    count,  # N * H * W
    M,  # quads: N * P * Q
    C,
    L,
    LP,
    S,
    H,
    W,
    P,
    Q,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x in training. Rows backward."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    mean_g = load(grad_beta + cols, inside)[None, :] / count
    slope = slopes(grad_gamma, var, eps, count, cols, inside)
    for tile in range(part, tiles, parts):
        rows = (tiles - 1 - tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        i, j, k = rows // (P * Q), rows // Q % P, rows % Q
        exists = (rows < M)[:, None] & inside[None, :]
        four = quads(grad, offsets, i, j, k, P, Q, cols, exists, C, LP, S)
        first = at((i * H + 2 * j) * W + 2 * k, cols, C, L)
        for corner in tl.static_range(4):
            valid = exists & ((2 * j + corner // 2 < H) & (2 * k + corner % 2 < W))[:, None]
            here = first + (corner // 2 * W + corner % 2) * S
            centred, g = pixel(x, four[corner], here, valid, m, s, b, RELU)
            store(grad_x + here, gradient(g, centred, s, mean_g, slope), valid)


# Host side


def _tile(key: configs.Key, block_c: int, warps: int, programs: int) -> configs.Config:
    """4 values per thread in NCHW, whose windows are not loaded by vectors: addresses take the registers."""
    nhwc, itemsize, channels = key
    return bn_act.tile((nhwc, itemsize if nhwc else 4, channels), block_c, 1, warps, programs)


def _default(target: configs.Target, key: configs.Key) -> configs.Config:
    return _tile(key, 64, 8, bn_act.PROGRAMS) if key[0] else _tile(key, 8, 4, bn_act.PROGRAMS)


def _candidates(target: configs.Target, key: configs.Key) -> list[configs.Config]:
    shapes = ((64, 8, 4), (64, 4, 4), (32, 4, 4)) if key[0] else ((8, 8, 4), (1, 4, 4))
    return [_tile(key, *shape) for shape in shapes]


_SPACE = configs.Space(_default, _candidates)
APPLY = configs.register("bn_pool_apply", _SPACE)
BACKWARD_REDUCE = configs.register("bn_pool_backward_reduce", _SPACE)
BACKWARD_APPLY = configs.register("bn_pool_backward_apply", _SPACE)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """(M, C, L, LP, S, H, W, P, Q) of a dense (N, C, H, W) tensor, M being the number of windows."""
    n, c, h, w = x.shape
    p, q = (h + 1) // 2, (w + 1) // 2
    return n * p * q, c, *((h * w, p * q, 1) if x.is_contiguous() else (1, 1, c)), h, w, p, q


def supports(primitive: str, x: Tensor, *args: Any) -> str | None:
    if primitive == "bn_act_pool_backward":
        x = args[1]
    return bn_act.supports(primitive, x)


def _apply(
    x: Tensor, bn: tuple[Tensor | float | None, ...], activation: str | None, with_offsets: bool
) -> tuple[Tensor, Tensor | None]:
    sizes = _sizes(x)
    form = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (x.shape[0], x.shape[1], *sizes[-2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    offsets = torch.empty_like(out, dtype=torch.uint8) if with_offsets else None
    grid, config = plan(APPLY, x, sizes[0], sizes[2])
    launch(bn_pool_apply_kernel, grid, x, out, offsets, *bn, *sizes, RELU=activation == "relu", **config)
    return out, offsets


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
    if not x.numel():
        return reference.bn_act_pool_train_forward(
            x, gamma, beta, running_mean, running_var, momentum, eps, activation, with_offsets
        )
    mean, var = statistics(x, running_mean, running_var, momentum)
    return *_apply(x, (mean, var, *contiguous(gamma, beta), eps), activation, with_offsets), mean, var


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
    if not x.numel():
        return reference.bn_act_pool_eval_forward(x, gamma, beta, mean, var, eps, activation, with_offsets)
    return _apply(x, (*contiguous(mean, var, gamma, beta), eps), activation, with_offsets)


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
    if not x.numel():
        return reference.bn_act_pool_backward(grad, offsets, x, gamma, beta, mean, var, eps, activation, training)
    relu, sizes = activation == "relu", _sizes(x)
    bn = (*contiguous(mean, var, gamma, beta), eps)
    grad_x = torch.empty_like(x)
    grid, config = plan(BACKWARD_REDUCE, x, sizes[0], sizes[2])
    partials = workspace(x, 2, grid[0])
    stored = None if training else grad_x
    launch(bn_pool_backward_reduce_kernel, grid, grad, offsets, x, *bn, stored, partials, *sizes, RELU=relu, **config)
    grad_gamma, grad_beta = finish_backward(partials, var, eps)
    if training:
        grid, config = plan(BACKWARD_APPLY, x, sizes[0], sizes[2])
        count = x.numel() // x.shape[1]
        sums = (grad_gamma, grad_beta, count)
        launch(bn_pool_backward_apply_kernel, grid, grad, offsets, x, grad_x, *bn, *sums, *sizes, RELU=relu, **config)
    return grad_x, grad_gamma, grad_beta
