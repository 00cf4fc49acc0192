"""An operand's way in and a tile's way out, for the kernels of convolutions with prologues."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from fused_resnet.backends.triton.bn_act import channels, gradient, slopes
from fused_resnet.backends.triton.common import load, relu, relu_grad
from fused_resnet.backends.triton.conv import SLICE


@triton.jit
def read(
    x, y, at, mask, cols, inside, mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT: tl.constexpr
):
    """[R, C] of an operand, 0 where masked: x, relu(bn(x)) where `mean` is given, or (GRADIENT) the gradient of y from
    x, that of bn(y); bn took its statistics from y, `count` values per channel, where `grad_gamma` is given."""
    value = tl.load(x + at, mask=mask, other=0.0)
    raw = load(y + at, mask) if GRADIENT and grad_gamma is not None else None
    return formed(value, raw, mask, cols, inside, mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT)


@triton.jit
def formed(
    value, raw, mask, cols, inside, mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT: tl.constexpr
):
    """`read`, of values that are there already, y's (`raw`) in float32."""
    result = value
    if GRADIENT:
        m, s, _ = channels(mean, var, gamma, None, eps, cols, inside)
        g = value.to(tl.float32)
        if grad_gamma is not None:
            mean_g = load(grad_beta + cols, inside)[None, :] / count
            slope = slopes(grad_gamma, var, eps, count, cols, inside)
            g = gradient(g, raw - m, s, mean_g, slope)
        else:
            g = s * g
        result = tl.where(mask, g, 0.0).to(value.dtype)
    elif mean is not None:
        m, s, b = channels(mean, var, gamma, beta, eps, cols, inside)
        result = tl.where(mask, relu(s * (value.to(tl.float32) - m) + b), 0.0).to(value.dtype)
    return result


@triton.jit
def end_tile(
    acc,  # [BM, BN]
    out,
    shift,
    residual,
    x2,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    partials,
    tile_m,
    tile_n,
    M,
    P,
    Q,
    K: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PARTIALS: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of a tile."""
    m = tile_m * BM + tl.arange(0, BM)
    in_m = m < M
    image, p, q = m // (P * Q), m // Q % P, m % Q
    if WIDE:
        m = m.to(tl.int64)
        image = image.to(tl.int64)
    added, in_added = m, in_m
    if ADD_STRIDE[0] * ADD_STRIDE[1] > 1:
        in_added = in_m & (p % ADD_STRIDE[0] == 0) & (q % ADD_STRIDE[1] == 0)
        added = (image * tl.cdiv(P, ADD_STRIDE[0]) + p // ADD_STRIDE[0]) * tl.cdiv(Q, ADD_STRIDE[1])
        added = added + q // ADD_STRIDE[1]
    rows = tl.minimum(M - tile_m * BM, BM).to(tl.float32)
    _finish(
        acc, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, m * K, added * K, in_m, in_added,
        tile_n * BN, tile_m, tl.cdiv(M, BM), rows, K, RELU, PARTIALS, BN,
    )  # fmt: skip


@triton.jit
def _finish(
    acc,  # [BM, BN]
    out,
    shift,
    residual,
    x2,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    partials,  # (2 or 3, tiles of rows, K)
    row,  # [BM], offsets
    added,  # [BM], offsets in `residual`
    in_m,
    in_added,
    n,
    tile,
    tiles,
    rows,  # in the tile, float
    K: tl.constexpr,
    RELU: tl.constexpr,
    PARTIALS: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of columns n to n + BN, by halves down to SLICE columns: all at once would not fit in registers."""
    if BN > SLICE:
        HALF: tl.constexpr = BN // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        _finish(
            low, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, row, added, in_m, in_added,
            n, tile, tiles, rows, K, RELU, PARTIALS, HALF,
        )  # fmt: skip
        _finish(
            high, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, row, added, in_m, in_added,
            n + HALF, tile, tiles, rows, K, RELU, PARTIALS, HALF,
        )  # fmt: skip
    else:
        n = n + tl.arange(0, BN)
        in_n = n < K
        mask = in_m[:, None] & in_n[None, :]
        if shift is not None:
            acc += load(shift + n, in_n)[None, :]
        if residual is not None:
            acc += load(residual + (added[:, None] + n[None, :]), in_added[:, None] & in_n[None, :])
        if RELU:
            acc = relu(acc)
        at = row[:, None] + n[None, :]
        if PARTIALS == "sums":
            m, s, b = channels(mean2, var2, gamma2, beta2, eps2, n, in_n)
            centred = load(x2 + at, mask) - m
            acc = relu_grad(acc, (s * centred + b).to(out.dtype.element_ty).to(tl.float32))
        value = acc.to(out.dtype.element_ty)
        tl.store(out + at, value, mask=mask)
        if PARTIALS != "":
            value = tl.where(mask, value.to(tl.float32), 0.0)  # as stored
            total = tl.sum(value, 0)
            here, plane = partials + (tile * K + n), tiles * K
            if PARTIALS == "sums":
                tl.store(here, total, mask=in_n)
                tl.store(here + plane, tl.sum(tl.where(mask, value * centred, 0.0), 0), mask=in_n)
            else:
                average = total / rows
                deviation = tl.where(mask, value - average[None, :], 0.0)
                tl.store(here, total * 0.0 + rows, mask=in_n)
                tl.store(here + plane, average, mask=in_n)
                tl.store(here + 2 * plane, tl.sum(deviation * deviation, 0), mask=in_n)
