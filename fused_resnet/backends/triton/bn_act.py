"""act(bn(x) + shortcut), the shortcut being a tensor or a second batch norm; training and eval, forward and backward.

A tensor is a matrix of M rows (n, pixel) and C channels, see `at`. Reductions over rows split rows and channels: a
program takes every P-th tile of rows of its block of channels and leaves its share in float32; a small second kernel
merges the P shares in a fixed order, so results do not depend on timing. First passes walk the rows forward, second
passes backward: what the first read last is still in the L2 cache.

The formulas stand in `fused_resnet.backends.reference`; BN is applied as scale * (x - mean) + beta, which does not
cancel where |mean| is much larger than the standard deviation.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends.triton import configs
from fused_resnet.backends.triton.common import load, relu, relu_grad, store
from fused_resnet.backends.triton.runtime import ceil_div, launch
from fused_resnet.folding import update_running_stats


@triton.jit
def at(rows, cols, C, L):
    """Offsets [R, C] of elements (row, channel), L pixels of a channel lying side by side: H * W in NCHW, 1 in NHWC."""
    start = (rows // L).to(tl.int64) * C * L + rows % L
    return start[:, None] + cols[None, :].to(tl.int64) * L


@triton.jit
def channels(mean, var, gamma, beta, eps, cols, inside):
    """(mean, scale, beta), each [1, C]: bn(x) = scale * (x - mean) + beta."""
    scale = tl.rsqrt(load(var + cols, inside) + eps)
    if gamma is not None:
        scale *= load(gamma + cols, inside)
    shift = tl.zeros_like(scale)
    if beta is not None:
        shift = load(beta + cols, inside)
    return load(mean + cols, inside)[None, :], scale[None, :], shift[None, :]


@triton.jit
def share(rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, C):
    """What a program works on: (first tile of rows, step, number of tiles, channels [BLOCK_C], which of them exist)."""
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0), tl.num_programs(0), tl.cdiv(rows, BLOCK_R), cols, cols < C


@triton.jit
def merge_rows(count, mean, m2):
    """(count, mean, M2) of parts along axis 0 as one; the mean is corrected once for its own rounding."""
    total = tl.sum(count, 0)
    divisor = tl.maximum(total, 1.0)
    rough = tl.sum(count * mean, 0) / divisor
    exact = rough + tl.sum(count * (mean - rough[None, :]), 0) / divisor
    deviation = mean - exact[None, :]
    return total, exact, tl.sum(m2 + count * deviation * deviation, 0)


@triton.jit
def bn_statistics_kernel(x, partials, M, C, L, STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials (3, P, C) = count, mean and M2 of each program's rows: Welford per element, then Chan over the tile."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    count = tl.zeros([BLOCK_R, 1], tl.float32)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = (rows < M)[:, None]
        value = load(x + at(rows, cols, C, L), valid & inside[None, :])
        count += valid.to(tl.float32)
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (value - mean)
    total, mean, m2 = merge_rows(tl.broadcast_to(count, [BLOCK_R, BLOCK_C]), mean, m2)
    here = partials + part * C + cols
    plane = parts * C
    tl.store(here, total, mask=inside)
    tl.store(here + plane, mean, mask=inside)
    tl.store(here + 2 * plane, m2, mask=inside)


@triton.jit
def update_running(running, batch, momentum, cols, inside):
    if running is not None:
        old = load(running + cols, inside)
        store(running + cols, old + momentum * (batch - old), inside)


@triton.jit
def bn_statistics_finish_kernel(
    partials,
    mean,
    var,
    running_mean,
    running_var,
    momentum,
    P,
    C,
    LOAD_MOMENTUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and biased var of (3, P, C) partials (Chan, Golub, LeVeque 1983); updates the running statistics."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    plane = P * C
    n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        valid = (parts < P)[:, None] & inside[None, :]
        here = partials + parts[:, None] * C + cols[None, :]
        n_b = load(here, valid)
        delta = load(here + plane, valid) - m
        weight = n_b / tl.maximum(n + n_b, 1.0)
        m2 += tl.where(valid, load(here + 2 * plane, valid) + delta * delta * n * weight, 0.0)
        m += tl.where(valid, delta * weight, 0.0)
        n += n_b
    total, batch_mean, m2 = merge_rows(n, m, m2)
    tl.store(mean + cols, batch_mean, mask=inside)
    tl.store(var + cols, m2 / tl.maximum(total, 1.0), mask=inside)
    if running_mean is not None or running_var is not None:
        weight = momentum
        if LOAD_MOMENTUM:
            weight = tl.load(momentum).to(tl.float32)
        update_running(running_mean, batch_mean, weight, cols, inside)
        update_running(running_var, m2 / tl.maximum(total - 1.0, 1.0), weight, cols, inside)


@triton.jit
def bn_apply_kernel(
    x,
    shortcut,
    out,
    mean,
    var,
    gamma,
    beta,
    eps,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    M,
    C,
    L,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = act(bn(x) + shortcut), where mean2 is given act(bn(x) + bn2(shortcut)). Rows backward."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    if mean2 is not None:
        m2, s2, b2 = channels(mean2, var2, gamma2, beta2, eps2, cols, inside)
    for tile in range(part, tiles, parts):
        rows = (tiles - 1 - tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        here = at(rows, cols, C, L)
        valid = (rows < M)[:, None] & inside[None, :]
        y = s * (load(x + here, valid) - m) + b
        if shortcut is not None:
            add = load(shortcut + here, valid)
            if mean2 is not None:
                add = s2 * (add - m2) + b2
            y += add
        if RELU:
            y = relu(y)
        store(out + here, y, valid)


@triton.jit
def bn_backward_reduce_kernel(
    grad,
    x,
    out,
    x2,
    mean,
    var,
    gamma,
    beta,
    eps,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    grad_shortcut,
    grad_x,
    partials,
    M,
    C,
    L,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials (2 or 3, P, C) = sums of g, g * (x - mean) and, with a second BN, g * (x2 - mean2); g is grad masked.

    The mask comes from `out` where that is given, else from act's input computed anew. On the way grad_shortcut = g
    and, with given statistics, grad_x = scale * g are stored where they are wanted.
    """
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if x2 is not None:
        m2, s2, b2 = channels(mean2, var2, gamma2, beta2, eps2, cols, inside)
        sum_gx2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(part, tiles, parts):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        here = at(rows, cols, C, L)
        valid = (rows < M)[:, None] & inside[None, :]
        g = load(grad + here, valid)
        centred = load(x + here, valid) - m
        if x2 is not None:
            centred2 = load(x2 + here, valid) - m2
        if RELU:
            if out is not None:
                g = relu_grad(g, load(out + here, valid))
            else:
                y = s * centred + b
                if x2 is not None:
                    y += s2 * centred2 + b2
                g = relu_grad(g, y.to(x.dtype.element_ty).to(tl.float32))
        if grad_shortcut is not None:
            store(grad_shortcut + here, g, valid)
        if grad_x is not None:
            store(grad_x + here, s * g, valid)
        g = tl.where(valid, g, 0.0)
        sum_g += g
        sum_gx += tl.where(valid, g * centred, 0.0)
        if x2 is not None:
            sum_gx2 += tl.where(valid, g * centred2, 0.0)
    to = partials + part * C + cols
    plane = parts * C
    tl.store(to, tl.sum(sum_g, 0), mask=inside)
    tl.store(to + plane, tl.sum(sum_gx, 0), mask=inside)
    if x2 is not None:
        tl.store(to + 2 * plane, tl.sum(sum_gx2, 0), mask=inside)


@triton.jit
def sum_parts(partials, P, C, cols, inside, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums over P of (P, C) partials."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        valid = (parts < P)[:, None] & inside[None, :]
        total += load(partials + parts[:, None] * C + cols[None, :], valid)
    return tl.sum(total, 0)


@triton.jit
def bn_backward_finish_kernel(
    partials,
    var,
    eps,
    grad_gamma,
    grad_beta,
    var2,
    eps2,
    grad_gamma2,
    grad_beta2,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_beta = S1 = sum(g), grad_gamma = S2 = sum(g * xhat), of one BN or of two that are added."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    plane = P * C
    sum_g = sum_parts(partials, P, C, cols, inside, BLOCK_P, BLOCK_C)
    sum_gx = sum_parts(partials + plane, P, C, cols, inside, BLOCK_P, BLOCK_C)
    tl.store(grad_beta + cols, sum_g, mask=inside)
    tl.store(grad_gamma + cols, sum_gx * tl.rsqrt(load(var + cols, inside) + eps), mask=inside)
    if var2 is not None:
        sum_gx2 = sum_parts(partials + 2 * plane, P, C, cols, inside, BLOCK_P, BLOCK_C)
        tl.store(grad_beta2 + cols, sum_g, mask=inside)
        tl.store(grad_gamma2 + cols, sum_gx2 * tl.rsqrt(load(var2 + cols, inside) + eps2), mask=inside)


@triton.jit
def gradient(g, centred, scale, mean_g, slope):
    """grad_x = scale * (g - S1/M - xhat * S2/M), with mean_g = S1/M and slope = S2/M * rstd."""
    return scale * ((g - mean_g) - centred * slope)


@triton.jit
def slopes(grad_gamma, var, eps, M, cols, inside):
    """[1, C]: S2/M * rstd."""
    return (load(grad_gamma + cols, inside) / M * tl.rsqrt(load(var + cols, inside) + eps))[None, :]


@triton.jit
def bn_backward_apply_kernel(
    grad,
    x,
    x2,
    grad_x,
    grad_x2,
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    grad_gamma2,
    M,
    C,
    L,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x, and grad_x2 of a second BN, in training. RELU: `grad` is not masked yet. Rows backward."""
    part, parts, tiles, cols, inside = share(M, BLOCK_R, BLOCK_C, C)
    m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
    mean_g = load(grad_beta + cols, inside)[None, :] / M
    slope = slopes(grad_gamma, var, eps, M, cols, inside)
    if x2 is not None:
        m2, s2, b2 = channels(mean2, var2, gamma2, beta2, eps2, cols, inside)
        slope2 = slopes(grad_gamma2, var2, eps2, M, cols, inside)
    for tile in range(part, tiles, parts):
        rows = (tiles - 1 - tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        here = at(rows, cols, C, L)
        valid = (rows < M)[:, None] & inside[None, :]
        g = load(grad + here, valid)
        centred = load(x + here, valid) - m
        if x2 is not None:
            centred2 = load(x2 + here, valid) - m2
        if RELU:
            y = s * centred + b
            if x2 is not None:
                y += s2 * centred2 + b2
            g = relu_grad(g, y.to(x.dtype.element_ty).to(tl.float32))
        store(grad_x + here, gradient(g, centred, s, mean_g, slope), valid)
        if x2 is not None:
            store(grad_x2 + here, gradient(g, centred2, s2, mean_g, slope2), valid)


# Host side


PROGRAMS = 2  # per multiprocessor: as many as always fit, by registers
STAGES = 4  # tiles in flight, where a loop waits for one tensor only
FINISH = {"BLOCK_P": 64, "BLOCK_C": 8, "num_warps": 4}  # 32 bytes of a row of partials per program
LIMIT = 2**31 - 2**16  # rows, so that the index of a row just beyond the last tile still has 32 bits


def tile(key: configs.Key, block_c: int, vectors: int, warps: int, programs: int = PROGRAMS) -> configs.Config:
    """A tile of `vectors` vectors of 16 bytes per thread, at most `block_c` channels wide."""
    _, itemsize, channels = key
    block_c = min(block_c, triton.next_power_of_2(int(channels)))
    rows = vectors * warps * 32 * 16 // int(itemsize) // block_c
    return {"BLOCK_R": min(max(rows, 1), 1024), "BLOCK_C": block_c, "PROGRAMS": programs, "num_warps": warps}


def _default(target: configs.Target, key: configs.Key) -> configs.Config:
    # One where addresses take more registers: without 16-byte loads, or in NCHW.
    vectors = 2 if key[0] and int(key[2]) % 8 == 0 else 1
    return tile(key, 64 if key[0] else 8, vectors, 8)


def _candidates(target: configs.Target, key: configs.Key) -> list[configs.Config]:
    nhwc = ((64, 2, 8, 4), (64, 1, 8, 4), (64, 1, 4, 4), (128, 2, 8, 2))
    nchw = ((8, 1, 4, 4), (1, 1, 4, 4))
    return [tile(key, *shape) for shape in (nhwc if key[0] else nchw)]


def _staged(target: configs.Target, key: configs.Key) -> configs.Config:
    return _default(target, key) | {"STAGES": STAGES}


def _staged_candidates(target: configs.Target, key: configs.Key) -> list[configs.Config]:
    unstaged = _default(target, key) | {"STAGES": 1}
    return [unstaged, *(config | {"STAGES": STAGES} for config in _candidates(target, key))]


_SPACE = configs.Space(_default, _candidates)
STATISTICS = configs.register("bn_statistics", configs.Space(_staged, _staged_candidates))
APPLY = configs.register("bn_apply", _SPACE)
BACKWARD_REDUCE = configs.register("bn_backward_reduce", _SPACE)
BACKWARD_APPLY = configs.register("bn_backward_apply", _SPACE)


def geometry(x: Tensor) -> tuple[int, int, int]:
    """(M, C, L) of a dense tensor, see `at`."""
    shape = x.shape
    rows = x.numel() // shape[1]
    return rows, shape[1], rows // shape[0] if x.is_contiguous() else 1


def plan(kernel: str, x: Tensor, rows: int, pixels: int) -> tuple[tuple[int, int], configs.Config]:
    """(grid, options): parts of the rows and blocks of channels, in all up to PROGRAMS programs per multiprocessor."""
    channels = x.shape[1]
    config = dict(configs.pick(kernel, (pixels == 1, x.element_size(), channels), x))
    blocks = ceil_div(channels, config["BLOCK_C"])
    parts = max(config.pop("PROGRAMS") * configs.target(x).multiprocessors // blocks, 1)
    return (min(ceil_div(rows, config["BLOCK_R"]), parts), blocks), config


def vector(x: Tensor) -> Tensor:
    """An uninitialised float32 value for each channel of x."""
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def workspace(x: Tensor, numbers: int, parts: int) -> Tensor:
    """Uninitialised (numbers, parts, C) partial results."""
    return torch.empty((numbers, parts, x.shape[1]), dtype=torch.float32, device=x.device)


def supports(primitive: str, x: Tensor, *args: Any) -> str | None:
    return None if x.numel() < LIMIT * x.shape[1] or not x.numel() else f"{LIMIT} values per channel or more"


def contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(v if v is None or v.is_contiguous() else v.contiguous() for v in vectors)


def finish_statistics(
    partials: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
) -> None:
    """Fill mean and biased var from (3, P, C) partials and update the running statistics."""
    _, parts, channels = partials.shape
    on_device = isinstance(momentum, Tensor)
    launch(
        bn_statistics_finish_kernel,
        (ceil_div(channels, FINISH["BLOCK_C"]),),
        partials,
        mean,
        var,
        running_mean,
        running_var,
        momentum if on_device else float(momentum),
        parts,
        channels,
        LOAD_MOMENTUM=on_device,
        **FINISH,
    )


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, biased var) of each channel; updates the running statistics in place."""
    size = geometry(x)
    grid, config = plan(STATISTICS, x, size[0], size[2])
    partials = workspace(x, 3, grid[0])
    launch(bn_statistics_kernel, grid, x, partials, *size, **config)
    return merged_statistics(partials, running_mean, running_var, momentum, size[0])


def merged_statistics(
    partials: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """(mean, biased var) from the (3, P, C) partials of `count` rows; updates the running statistics in place."""
    mean, var = partials.new_empty(partials.shape[2]), partials.new_empty(partials.shape[2])
    running = [r for r in (running_mean, running_var) if r is not None]
    if all(r.is_contiguous() for r in running):
        finish_statistics(partials, mean, var, running_mean, running_var, momentum)
        for r in running:
            if not r.is_inference():  # torch does not see the kernel's writes
                torch.autograd.graph.increment_version(r)
    else:
        finish_statistics(partials, mean, var, None, None, 0.0)
        update_running_stats(running_mean, running_var, mean, var, momentum, count)
    return mean, var


def _apply(
    x: Tensor,
    shortcut: Tensor | None,
    first: tuple[Tensor | float | None, ...],
    second: tuple[Tensor | float | None, ...],
    activation: str | None,
) -> Tensor:
    out = torch.empty_like(x)
    size = geometry(x)
    grid, config = plan(APPLY, x, size[0], size[2])
    relu = activation == "relu"
    launch(bn_apply_kernel, grid, x, shortcut, out, *first, *second, *size, RELU=relu, **config)
    return out


_NO_SECOND = (None, None, None, None, 0.0)


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
    if not x.numel():
        return reference.bn_act_train_forward(
            x, gamma, beta, running_mean, running_var, residual, momentum, eps, activation
        )
    mean, var = statistics(x, running_mean, running_var, momentum)
    return _apply(x, residual, (mean, var, *contiguous(gamma, beta), eps), _NO_SECOND, activation), mean, var


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
    if not x.numel():
        return reference.bn_act_eval_forward(x, gamma, beta, mean, var, residual, eps, activation)
    return _apply(x, residual, (*contiguous(mean, var, gamma, beta), eps), _NO_SECOND, activation)


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
    if not x.numel():
        first = (gamma, beta, running_mean, running_var, momentum, eps)
        second = (gamma2, beta2, running_mean2, running_var2, momentum2, eps2)
        return reference.bn_bn_act_train_forward(x, *first, x2, *second, activation)
    mean, var = statistics(x, running_mean, running_var, momentum)
    mean2, var2 = statistics(x2, running_mean2, running_var2, momentum2)
    bn, bn2 = (mean, var, *contiguous(gamma, beta), eps), (mean2, var2, *contiguous(gamma2, beta2), eps2)
    return _apply(x, x2, bn, bn2, activation), mean, var, mean2, var2


def finish_backward(
    partials: Tensor, var: Tensor, eps: float, var2: Tensor | None = None, eps2: float = 0.0
) -> tuple[Tensor, ...]:
    """(grad_gamma, grad_beta), of two BNs (grad_gamma, grad_beta, grad_gamma2, grad_beta2)."""
    _, parts, channels = partials.shape
    grads = [partials.new_empty(channels) for _ in range(2 if var2 is None else 4)]
    grid = (ceil_div(channels, FINISH["BLOCK_C"]),)
    second = (None, None) if var2 is None else grads[2:]
    launch(
        bn_backward_finish_kernel, grid, partials, var, eps, *grads[:2], var2, eps2, *second, parts, channels, **FINISH
    )
    return tuple(grads)


def reduce_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    bn: tuple[Any, ...],
    relu: bool,
    masked: Tensor | None,
    grad_x: Tensor | None,
) -> Tensor:
    """The (2, P, C) partial sums of the masked gradient and of its products with x; fills the tensors given last."""
    size = geometry(x)
    grid, config = plan(BACKWARD_REDUCE, x, size[0], size[2])
    partials = workspace(x, 2, grid[0])
    second = (*_NO_SECOND, masked, grad_x)
    launch(bn_backward_reduce_kernel, grid, grad, x, out, None, *bn, *second, partials, *size, RELU=relu, **config)
    return partials


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
    if not x.numel():
        return reference.bn_act_backward(grad, x, out, gamma, beta, mean, var, eps, activation, training, has_residual)
    relu = activation == "relu"
    gamma, beta, mean, var = contiguous(gamma, beta, mean, var)  # type: ignore[assignment]
    grad_x = torch.empty_like(x)
    masked = torch.empty_like(x) if relu and has_residual else None  # both the residual's gradient and pass 2's input
    bn = (mean, var, gamma, beta, eps)
    partials = reduce_backward(grad, x, out, bn, relu, masked, None if training else grad_x)
    grad_gamma, grad_beta = finish_backward(partials, var, eps)
    size = geometry(x)
    if training:
        grid, config = plan(BACKWARD_APPLY, x, size[0], size[2])
        g, recompute = (grad, relu) if masked is None else (masked, False)
        launch(
            bn_backward_apply_kernel,
            grid,
            g,
            x,
            None,
            grad_x,
            None,
            *bn,
            grad_gamma,
            grad_beta,
            *_NO_SECOND,
            None,
            *size,
            RELU=recompute,
            **config,
        )
    return grad_x, grad_gamma, grad_beta, (grad if masked is None else masked) if has_residual else None


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
    if not x.numel():
        first, second = (gamma, beta, mean, var, eps), (gamma2, beta2, mean2, var2, eps2)
        return reference.bn_bn_act_backward(grad, x, *first, x2, *second, activation)
    relu = activation == "relu"
    bn, bn2 = (*contiguous(mean, var, gamma, beta), eps), (*contiguous(mean2, var2, gamma2, beta2), eps2)
    size = geometry(x)
    grid, config = plan(BACKWARD_REDUCE, x, size[0], size[2])
    partials = workspace(x, 3, grid[0])
    launch(
        bn_backward_reduce_kernel,
        grid,
        grad,
        x,
        None,
        x2,
        *bn,
        *bn2,
        None,
        None,
        partials,
        *size,
        RELU=relu,
        **config,
    )
    grad_gamma, grad_beta, grad_gamma2, grad_beta2 = finish_backward(partials, var, eps, var2, eps2)
    grad_x, grad_x2 = torch.empty_like(x), torch.empty_like(x)
    grid, config = plan(BACKWARD_APPLY, x, size[0], size[2])
    launch(
        bn_backward_apply_kernel,
        grid,
        grad,
        x,
        x2,
        grad_x,
        grad_x2,
        *bn,
        grad_gamma,
        grad_beta,
        *bn2,
        grad_gamma2,
        *size,
        RELU=relu,
        **config,
    )
    return grad_x, grad_gamma, grad_beta, grad_x2, grad_gamma2, grad_beta2
