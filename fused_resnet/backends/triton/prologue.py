"""Convolutions that read raw conv outputs through BN and ReLU, or form a raw output's gradient, while they load.

All on NHWC tensors. `prologue_conv_kernel` is an implicit GEMM whose rows are output pixels: the forward convolution,
the gradient of its input (TRANSPOSED), and the products of the Gram form, with up to two pairs of operands. Where its
tiles are few, several programs share the inner axis of each (split-K): `prologue_merge_kernel` then adds their sums
in a fixed order and has the epilogue. What it leaves per tile is merged by `prologue_gather_kernel` first where it is
much. Tuning may put `prologue_tiles_kernel` of prologue_tma.py in its place where a product is dense.
`prologue_products_kernel` sums over pixels: weight gradients, Q and second moments, rows split over programs whose
shares are added in a fixed order. What an operand goes through on the way in is `read`; padding is applied after.

Formulas and signatures stand in `fused_resnet.backends.reference`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.reference import Norm, Sums
from fused_resnet.backends.triton import bn_act, configs, conv
from fused_resnet.backends.triton.bn_act import merge_rows
from fused_resnet.backends.triton.common import load
from fused_resnet.backends.triton.conv import (
    INDEX_LIMIT,
    MERGE,
    keep_share,
    merged_shares,
    power_of_two,
    split_candidates,
    splits_of,
    tile_of,
)
from fused_resnet.backends.triton.prologue_parts import end_tile, read
from fused_resnet.backends.triton.prologue_tma import ALIGNMENT, descriptors, prologue_tiles_kernel
from fused_resnet.backends.triton.runtime import ceil_div, launch


@triton.jit
def prologue_conv_kernel(
    x,  # (N, H, W, C)
    y,  # like x, the raw output that x is the BN's gradient of
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    count,
    weight,
    x2,  # (N, H2, W2, C2): the second pair's operand, or what the result is masked by
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    weight2,
    shift,
    residual,
    out,  # (N, P, Q, K)
    partials,
    shares,  # (SPLITS, M, K) sums in fp32, the epilogue being left to `prologue_merge_kernel`; unused where SPLITS is 1
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    H2,
    W2,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,  # (R, S)
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # from output pixels of a convolution back to its input's
    STRIDE2: tl.constexpr,
    ADD_STRIDE: tl.constexpr,  # `residual` belongs to every so-many-th pixel
    LAYOUT: tl.constexpr,  # steps in `weight` from one column, tap and inner channel to the next
    LAYOUT2: tl.constexpr,  # the same in `weight2`, without taps
    GRADIENT: tl.constexpr,
    RELU: tl.constexpr,
    PARTIALS: tl.constexpr,  # "", "moments" (count, mean, M2) or "sums" (g, g * (x2 - mean2)) per tile of rows
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOOPS: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share a tile's inner axis
):
    """out = act(conv(read(x)) + read(x2) weight2 + shift + residual); with "sums" it is masked by relu(bn2(x2))."""
    COUNT: tl.constexpr = TAPS[0] * TAPS[1]
    DENSE: tl.constexpr = COUNT == 1 and STRIDE[0] * STRIDE[1] == 1 and PADDING[0] + PADDING[1] == 0
    tiles_m = tl.cdiv(M, BM)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(K, BN), GROUP_M)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    in_m = m < M
    image, p, q = m // (P * Q), m // Q % P, m % Q
    if WIDE:
        m = m.to(tl.int64)
        image = image.to(tl.int64)

    lane = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    PER_TAP: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = COUNT * PER_TAP
    RUN: tl.constexpr = STEPS // LOOPS if STEPS % LOOPS == 0 else STEPS
    UNIT: tl.constexpr = RUN if RUN < STEPS else 1
    EACH: tl.constexpr = (STEPS + UNIT * SPLITS - 1) // (UNIT * SPLITS) * UNIT
    LENGTH: tl.constexpr = RUN if RUN < STEPS else EACH
    begin = tl.program_id(1) * EACH if SPLITS > 1 else 0
    for first in tl.static_range(0, EACH, LENGTH):
        for turn in range(first, first + LENGTH):
            step = begin + turn
            tap, c = step // PER_TAP, step % PER_TAP * BK + lane
            in_c = c < C
            if SPLITS > 1:
                in_c = in_c & (step < STEPS)
            if DENSE:
                row, in_row = m, in_m
            elif TRANSPOSED:
                h = p + PADDING[0] - tap // TAPS[1] * DILATION[0]
                w = q + PADDING[1] - tap % TAPS[1] * DILATION[1]
                in_row = in_m & (h >= 0) & (w >= 0) & (h % STRIDE[0] == 0) & (w % STRIDE[1] == 0)
                h, w = h // STRIDE[0], w // STRIDE[1]
                in_row = in_row & (h < H) & (w < W)
                row = (image * H + h) * W + w
            else:
                h = p * STRIDE[0] - PADDING[0] + tap // TAPS[1] * DILATION[0]
                w = q * STRIDE[1] - PADDING[1] + tap % TAPS[1] * DILATION[1]
                in_row = in_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                row = (image * H + h) * W + w
            a = read(
                x, y, row[:, None] * C + c[None, :], in_row[:, None] & in_c[None, :], c, in_c,
                mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT,
            )  # fmt: skip
            at = n[None, :] * LAYOUT[0] + tap * LAYOUT[1] + c[:, None] * LAYOUT[2]
            b = tl.load(weight + at, mask=(n < K)[None, :] & in_c[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if weight2 is not None:
        row = m
        if STRIDE2[0] * STRIDE2[1] > 1:
            row = (image * H2 + p * STRIDE2[0]) * W2 + q * STRIDE2[1]
        EACH2: tl.constexpr = ((C2 + BK - 1) // BK + SPLITS - 1) // SPLITS
        begin = tl.program_id(1) * EACH2 if SPLITS > 1 else 0
        for turn in range(EACH2):
            c = (begin + turn) * BK + lane
            in_c = c < C2
            a = read(
                x2, None, row[:, None] * C2 + c[None, :], in_m[:, None] & in_c[None, :], c, in_c,
                mean2, var2, gamma2, beta2, eps2, None, None, 1.0, False,
            )  # fmt: skip
            at = n[None, :] * LAYOUT2[0] + c[:, None] * LAYOUT2[1]
            b = tl.load(weight2 + at, mask=(n < K)[None, :] & in_c[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if SPLITS > 1:
        keep_share(acc, shares, m, n, M, K)
    else:
        end_tile(
            acc, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, tile_m, tile_n, M, P, Q, K,
            ADD_STRIDE, RELU, PARTIALS, WIDE, BM, BN,
        )  # fmt: skip


@triton.jit
def prologue_merge_kernel(
    shares,
    x2,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    shift,
    residual,
    out,
    partials,
    M,
    P,
    Q,
    K: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PARTIALS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """What `prologue_conv_kernel` leaves to do where SPLITS programs shared each tile."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = merged_shares(shares, m, n, M, K, SPLITS, BM, BN)
    end_tile(
        acc, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, tile_m, tile_n, M, P, Q, K,
        ADD_STRIDE, RELU, PARTIALS, WIDE, BM, BN,
    )  # fmt: skip


@triton.jit
def prologue_gather_kernel(
    partials, fewer, P, C, NUMBERS: tl.constexpr, MOMENTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """BLOCK_P of the (NUMBERS, P, C) partials as one of `fewer`: (count, mean, M2) with MOMENTS, else sums."""
    part = tl.program_id(0)
    parts, cols = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    valid = (parts < P)[:, None] & inside[None, :]
    here, to = partials + (parts[:, None] * C + cols[None, :]), fewer + (part * C + cols)
    plane, fewer_plane = P * C, tl.num_programs(0) * C
    if MOMENTS:
        total, mean, m2 = merge_rows(load(here, valid), load(here + plane, valid), load(here + 2 * plane, valid))
        tl.store(to, total, mask=inside)
        tl.store(to + fewer_plane, mean, mask=inside)
        tl.store(to + 2 * fewer_plane, m2, mask=inside)
    else:
        for number in tl.static_range(NUMBERS):
            total = tl.sum(load(here + number * plane, valid), 0)
            tl.store(to + number * fewer_plane, total, mask=inside)


@triton.jit
def prologue_products_kernel(
    g,  # (N, GH, GW, K)
    y,
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    count,
    x,  # (N, H, W, C)
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    partials,  # (splits, K, taps, C)
    sums,  # (splits, K), of the left operand
    pivot,  # (K,), the left operand's first pixel
    M,  # N * P * Q
    GH,
    GW,
    P,
    Q,
    H,
    W,
    K: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    LEFT_STRIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    PIVOT: tl.constexpr,  # the first pixel of each operand is subtracted
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,  # channels of the left operand
    BN: tl.constexpr,  # channels of the right operand
    BK: tl.constexpr,  # rows at a time
):
    """partials[split, k, tap, c] = sum over the split's rows of read(g)[row, k] * read(x)[the tap's pixel, c]."""
    COUNT: tl.constexpr = TAPS[0] * TAPS[1]
    TILES_N: tl.constexpr = (C + BN - 1) // BN
    tile = tl.program_id(0)
    tile_n, tap, tile_m = tile % TILES_N, tile // TILES_N % COUNT, tile // (TILES_N * COUNT)
    split = tl.program_id(1)
    steps = tl.cdiv(M, BK)
    each = tl.cdiv(steps, tl.num_programs(1))
    k = tile_m * BM + tl.arange(0, BM)
    c = tile_n * BN + tl.arange(0, BN)
    in_k, in_c = k < K, c < C
    if PIVOT:
        left_0 = read(
            g, y, k[None, :], in_k[None, :], k, in_k,
            mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT,
        )  # fmt: skip
        right_0 = read(
            x, None, c[None, :], in_c[None, :], c, in_c, mean2, var2, gamma2, beta2, eps2, None, None, 1.0, False
        )
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        m = step * BK + tl.arange(0, BK)
        in_m = m < M
        image, p, q = m // (P * Q), m // Q % P, m % Q
        if WIDE:
            m = m.to(tl.int64)
            image = image.to(tl.int64)
        row = m
        if LEFT_STRIDE[0] * LEFT_STRIDE[1] > 1:
            row = (image * GH + p * LEFT_STRIDE[0]) * GW + q * LEFT_STRIDE[1]
        in_left = in_m[:, None] & in_k[None, :]
        left = read(
            g, y, row[:, None] * K + k[None, :], in_left, k, in_k,
            mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT,
        )  # fmt: skip
        row, in_row = m, in_m
        if COUNT > 1 or STRIDE[0] * STRIDE[1] > 1 or PADDING[0] + PADDING[1] > 0:
            h = p * STRIDE[0] - PADDING[0] + tap // TAPS[1] * DILATION[0]
            w = q * STRIDE[1] - PADDING[1] + tap % TAPS[1] * DILATION[1]
            in_row = in_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            row = (image * H + h) * W + w
        in_right = in_row[:, None] & in_c[None, :]
        right = read(
            x, None, row[:, None] * C + c[None, :], in_right, c, in_c,
            mean2, var2, gamma2, beta2, eps2, None, None, 1.0, False,
        )  # fmt: skip
        if PIVOT:
            left = tl.where(in_left, left - left_0, 0.0)
            right = tl.where(in_right, right - right_0, 0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
        if sums is not None:
            total += tl.sum(left.to(tl.float32), 0)
    at = ((split * K + k) * COUNT + tap).to(tl.int64)
    tl.store(partials + (at[:, None] * C + c[None, :]), acc, mask=in_k[:, None] & in_c[None, :])
    if sums is not None:  # noqa: SIM102
        if tile % (TILES_N * COUNT) == 0:
            tl.store(sums + split * K + k, total, mask=in_k)
            if PIVOT:
                tl.store(pivot + k[None, :], left_0.to(tl.float32), mask=in_k[None, :])


# Host side


class Problem(NamedTuple):
    """What a config may depend on; a `configs.Key`."""

    dtype: str
    precision: str
    gradient: bool  # an operand is formed from two tensors
    taps: int
    columns: int
    inner: int  # channels of the inner axis; in products, of the left operand
    rows: int  # pixels, up to a power of two
    wide: bool  # 64-bit offsets
    dense: bool = False  # one tap, stride 1, no padding, in both pairs of operands

    @property
    def exact(self) -> bool:
        """Products that no tensor core of NVIDIA's computes."""
        return self.dtype == "float32" and self.precision == "ieee"

    @property
    def depth(self) -> int:
        return 16 if self.exact else 32 if self.dtype == "float32" else 64

    @property
    def aligned(self) -> bool:
        """Whether TMA can read matrices with so many channels."""
        size = 4 if self.dtype == "float32" else 2
        return self.columns * size % ALIGNMENT == 0 and self.inner * size % ALIGNMENT == 0


# BM, BN, warps. A loop over several taps at 8 warps has been miscompiled (triton#1254): one loop for each tap there.
CONV_TILES = ((128, 64, 4), (64, 64, 4), (64, 128, 4), (64, 32, 4))
POINTWISE_TILES = ((128, 128, 8), (256, 64, 8))
BLACKWELL_TILES = ((128, 64, 8), (64, 64, 8))  # at 4 warps its compiler runs out of registers
PRODUCT_TILES = ((64, 64, 4), (128, 64, 4), (64, 128, 4))
EXACT_TILES = ((64, 64, 4), (64, 32, 4))
# BM, BN, warps, stages, programs per multiprocessor of `prologue_tiles_kernel`, which no compiler spills. None for
# sm_120: triton 3.6 and 3.7 spill there. Of 64-bit offsets the first alone: sm_100's second is spilled.
PERSISTENT_TILES = {
    "sm_90": ((128, 64, 4, 3, 2), (128, 128, 8, 4, 1), (64, 128, 4, 3, 2), (256, 64, 8, 3, 1)),
    "sm_100": ((128, 128, 8, 3, 2), (64, 64, 4, 3, 4)),
}


def _is_small(target: configs.Target) -> bool:
    """Parts without much shared memory, whose compiler spills larger tiles."""
    return target.shared < 100 << 10


def _stages(target: configs.Target) -> int:
    return 2 if _is_small(target) else 3


def _config(target: configs.Target, problem: Problem, BM: int, BN: int, warps: int) -> configs.Config:
    return {"BM": BM, "BN": BN, "BK": problem.depth, "num_warps": warps, "num_stages": _stages(target)}


def _conv_config(target: configs.Target, problem: Problem, BM: int, BN: int, warps: int) -> configs.Config:
    loops = problem.taps if warps == 8 else 1
    return _config(target, problem, BM, BN, warps) | {"GROUP_M": 8, "LOOPS": loops, "SPLITS": 1, "PERSISTENT": 0}


def _splits(target: configs.Target, problem: Problem, config: configs.Config) -> int:
    tiles = ceil_div(problem.rows, config["BM"]) * ceil_div(problem.columns, config["BN"])
    return splits_of(target, tiles, problem.taps * ceil_div(problem.inner, config["BK"]), config["LOOPS"])


def _heavy(problem: Problem) -> bool:
    """Whether addresses and two tensors per operand take so many registers that 128 x 64 at 4 warps may spill."""
    return problem.gradient and (problem.wide or problem.taps > 1)


def _narrow(columns: int) -> int:
    return max(16, min(64, power_of_two(columns)))


def _conv_default(target: configs.Target, key: configs.Key) -> configs.Config:
    problem = Problem(*key)  # type: ignore[arg-type]
    warps = 8 if target.arch == "sm_100" and not problem.exact else 4
    small = problem.exact or _is_small(target) or (target.arch == "sm_100" and problem.dtype == "float32")
    BM = 64 if small or (warps == 4 and _heavy(problem)) else 128
    BN = _narrow(problem.columns)
    least = 32 if problem.exact else 64  # wgmma's
    if target.arch == "sm_100" and _heavy(problem):
        least = BM
    while least < BM and ceil_div(problem.rows, BM) * ceil_div(problem.columns, BN) < target.multiprocessors:
        BM //= 2
    config = _conv_config(target, problem, BM, BN, warps)
    return config | {"SPLITS": _splits(target, problem, config)}


def _conv_candidates(target: configs.Target, key: configs.Key) -> Iterator[configs.Config]:
    problem = Problem(*key)  # type: ignore[arg-type]
    tiles: tuple[tuple[int, int, int], ...] = EXACT_TILES if problem.exact else CONV_TILES
    if target.arch == "sm_100" and not problem.exact:
        tiles = BLACKWELL_TILES[problem.dtype == "float32" :]
        if _heavy(problem) and problem.dtype != "float32":
            tiles = tiles[:1]
    elif _is_small(target) or (_heavy(problem) and (problem.wide or target.arch != "sm_90")):
        tiles = tuple(tile for tile in tiles if tile[0] * tile[1] // tile[2] <= 1024)
    elif problem.taps == 1 and not problem.exact and target.arch == "sm_90":
        tiles = (*tiles, *POINTWISE_TILES)
    for BM, BN, warps in tiles:
        if max(32, power_of_two(problem.columns)) >= BN:
            config = _conv_config(target, problem, BM, BN, warps)
            yield from split_candidates(config, _splits(target, problem, config))
    if problem.dense and problem.aligned and not problem.exact:
        persistent = PERSISTENT_TILES.get(target.arch, ())
        for BM, BN, warps, stages, programs in persistent[:1] if problem.wide else persistent:
            if max(32, power_of_two(problem.columns)) >= BN:
                config = _conv_config(target, problem, BM, BN, warps)
                yield config | {"num_stages": stages, "PERSISTENT": programs}


def _products_default(target: configs.Target, key: configs.Key) -> configs.Config:
    problem = Problem(*key)  # type: ignore[arg-type]
    columns = min(32, _narrow(problem.columns)) if problem.exact else _narrow(problem.columns)
    return _config(target, problem, _narrow(problem.inner), columns, 4)


def _products_candidates(target: configs.Target, key: configs.Key) -> Iterator[configs.Config]:
    problem = Problem(*key)  # type: ignore[arg-type]
    tiles = EXACT_TILES[1:] if problem.exact else PRODUCT_TILES[:1] if target.arch == "sm_100" else PRODUCT_TILES
    for BM, BN, warps in tiles:
        if power_of_two(problem.inner) >= BM and power_of_two(problem.columns) >= BN:
            yield _config(target, problem, BM, BN, warps)


def _conv_shared(config: configs.Config, key: configs.Key) -> int:
    size, gradient = (4 if key[0] == "float32" else 2), bool(key[2])
    return config["num_stages"] * ((1 + gradient) * config["BM"] + config["BN"]) * config["BK"] * size


CONV = configs.register("prologue_conv_kernel", configs.Space(_conv_default, _conv_candidates, _conv_shared))
PRODUCTS = configs.register(
    "prologue_products_kernel", configs.Space(_products_default, _products_candidates, _conv_shared)
)


def supports(primitive: str, x: Tensor, *args: Any) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "it is for channels_last tensors"
    if max(t.numel() // t.shape[1] for t in (x, *args) if isinstance(t, Tensor) and t.dim() == 4) >= INDEX_LIMIT:
        return "over 2**31 pixels"
    if primitive == "prologue_end_backward" and args[2] is not None and args[5] != (1, 1):
        return "a stride in front of a BN's mask"
    return None


_NOTHING = (None, None, None, None, 0.0)


def _vectors(bn: Norm | None) -> tuple[Any, ...]:
    return _NOTHING if bn is None else (*bn_act.contiguous(*bn[:4]), bn[4])


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _wide(*tensors: Tensor | None) -> bool:
    return max(t.numel() for t in tensors if t is not None) >= conv.WIDE_FROM


def _empty(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _conv(
    x: Tensor,
    bn: Norm | None,
    weight: Tensor,
    out: Tensor,
    *,
    layout: tuple[int, int, int],
    geometry: tuple[tuple[int, int], ...] = ((1, 1), (1, 1), (0, 0), (1, 1)),
    transposed: bool = False,
    gradient: tuple[Tensor, Sums | None] | None = None,
    x2: Tensor | None = None,
    bn2: Norm | None = None,
    weight2: Tensor | None = None,
    layout2: tuple[int, int] = (0, 0),
    stride2: tuple[int, int] = (1, 1),
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    add_stride: tuple[int, int] = (1, 1),
    activation: str | None = None,
    partials: str = "",
) -> Tensor | None:
    """Fill `out`; the partial results, (2 or 3, tiles of rows, K), where they are asked for."""
    N, K, P, Q = out.shape
    taps, stride, padding, dilation = geometry
    rows, exactness, wide = N * P * Q, conv._precision(x), _wide(x, x2, out)
    dense = geometry[:3] == ((1, 1), (1, 1), (0, 0)) and (weight2 is None or stride2 == (1, 1))
    problem = Problem(
        _dtype(x), exactness, gradient is not None, taps[0] * taps[1], K, x.shape[1], power_of_two(rows), wide, dense
    )
    config = dict(configs.pick(CONV, problem, x))
    tiles, splits, persistent = ceil_div(rows, config["BM"]), config["SPLITS"], config.pop("PERSISTENT")
    parts = tiles if splits == 1 else ceil_div(rows, MERGE["BM"])
    space = bn_act.workspace(out, 3 if partials == "moments" else 2, parts) if partials else None
    shares = x.new_empty((splits, rows, K), dtype=torch.float32) if splits > 1 else None
    y, sums = gradient or (None, None)
    grad_gamma, grad_beta = sums or (None, None)
    prologue = *_vectors(bn), grad_gamma, grad_beta, float(x.numel() // x.shape[1])
    vectors2 = _vectors(bn2)
    operands: dict[str, Any] = {"C": x.shape[1], "C2": 0 if x2 is None else x2.shape[1]}
    operands |= {"GRADIENT": gradient is not None, "PRECISION": exactness}
    epilogue: dict[str, Any] = {"K": K, "ADD_STRIDE": add_stride, "RELU": activation == "relu", "PARTIALS": partials}
    epilogue["WIDE"] = wide
    described = None
    if persistent and dense and splits == 1:
        second = None if weight2 is None else x2
        described = descriptors(config, x, y if sums else None, weight, second, weight2, K, layout[2] != 1)
    if described is not None:
        del config["LOOPS"], config["SPLITS"]
        launch(
            prologue_tiles_kernel,
            (min(tiles * ceil_div(K, config["BN"]), persistent * configs.target(x).multiprocessors),),
            out,
            *described,
            *prologue,
            x2,
            *vectors2,
            shift,
            residual,
            space,
            rows,
            P,
            Q,
            TRANSPOSED=layout[2] != 1,
            **operands,
            **epilogue,
            **config,
        )
        return space
    launch(
        prologue_conv_kernel,
        (tiles * ceil_div(K, config["BN"]), splits),
        x,
        y,
        *prologue,
        weight,
        x2,
        *vectors2,
        weight2,
        shift,
        residual,
        out,
        space,
        shares,
        rows,
        x.shape[2],
        x.shape[3],
        P,
        Q,
        0 if x2 is None else x2.shape[2],
        0 if x2 is None else x2.shape[3],
        TAPS=taps,
        STRIDE=stride,
        PADDING=padding,
        DILATION=dilation,
        TRANSPOSED=transposed,
        STRIDE2=stride2,
        LAYOUT=layout,
        LAYOUT2=layout2,
        **operands,
        **epilogue,
        **config,
    )
    if shares is not None:
        launch(
            prologue_merge_kernel,
            (parts, ceil_div(K, MERGE["BN"])),
            shares,
            x2,
            *vectors2,
            shift,
            residual,
            out,
            space,
            rows,
            P,
            Q,
            SPLITS=splits,
            **epilogue,
            **MERGE,
        )
    return space


GATHER = {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4}
MANY = 1024  # partials from which they are merged by groups first: what finishes them has few programs


def _gathered(partials: Tensor, moments: bool) -> Tensor:
    """The partials of the tiles, many of them as fewer: (count, mean, M2) with `moments`, else sums."""
    while partials.shape[1] >= MANY:
        numbers, parts, channels = partials.shape
        fewer = partials.new_empty((numbers, ceil_div(parts, GATHER["BLOCK_P"]), channels))
        grid = (fewer.shape[1], ceil_div(channels, GATHER["BLOCK_C"]))
        launch(
            prologue_gather_kernel, grid, partials, fewer, parts, channels, NUMBERS=numbers, MOMENTS=moments, **GATHER
        )
        partials = fewer
    return partials


def _packed(weight: Tensor) -> Tensor:
    """(K, R, S, C) in memory."""
    return weight.contiguous(memory_format=torch.channels_last)


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
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    out = _empty(N, K, P, Q, x)
    partials = _conv(
        x,
        bn,
        _packed(weight),
        out,
        layout=(R * S * C, C, 1),
        geometry=((R, S), stride, padding, dilation),
        partials="moments" if statistics else "",
    )
    if partials is None:
        return out, None, None
    partials = _gathered(partials, True)
    return out, *bn_act.merged_statistics(partials, running_mean, running_var, momentum, N * P * Q)


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
    _, C, R, S = weight.shape
    out = torch.empty_like(x)
    steps = (1, 1) if add is None else (ceil_div(x.shape[2], add.shape[2]), ceil_div(x.shape[3], add.shape[3]))
    partials = _conv(
        g,
        bn,
        _packed(weight),
        out,
        layout=(1, C, R * S * C),
        geometry=((R, S), stride, padding, dilation),
        transposed=True,
        gradient=(y, sums),
        x2=None if x_bn is None else x,
        bn2=x_bn,
        residual=add,
        add_stride=steps,
        partials="" if x_bn is None else "sums",
    )
    return _with_sums(out, x_bn, partials)


def _with_sums(out: Tensor, bn: Norm | None, partials: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if bn is None or partials is None:
        return out, None, None
    grad_gamma, grad_beta = bn_act.finish_backward(_gathered(partials, False), bn[1].contiguous(), bn[4])
    return out, grad_gamma, grad_beta


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
    N, C, H, W = x.shape
    out = _empty(N, weight.shape[0], ceil_div(H, stride[0]), ceil_div(W, stride[1]), x)
    _conv(
        x,
        bn,
        _packed(weight),
        out,
        layout=(C, 0, 1),
        geometry=((1, 1), stride, (0, 0), (1, 1)),
        x2=x2,
        weight2=None if weight2 is None else _packed(weight2),
        layout2=(0 if x2 is None else x2.shape[1], 1),
        stride2=stride2,
        shift=shift.contiguous(),
        residual=residual,
        activation=activation,
    )
    return out


def prologue_end_backward(
    g: Tensor,
    weight: Tensor,
    x: Tensor,
    bn: Norm | None,
    square: Tensor | None,
    shift: Tensor | None,
    stride: tuple[int, int],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    N, _, P, Q = g.shape
    C = weight.shape[1]
    out = _empty(N, C, P, Q, g)
    partials = _conv(
        g,
        None,
        weight.contiguous(),
        out,
        layout=(1, 0, C),
        x2=x,
        bn2=bn,
        weight2=None if square is None else square.contiguous(),
        layout2=(1, C),
        stride2=stride,
        shift=shift,
        partials="" if bn is None else "sums",
    )
    return _with_sums(out, bn, partials)


def _products(
    left: Tensor,
    bn: Norm | None,
    x: Tensor,
    bn2: Norm | None,
    *,
    rows: tuple[int, int, int],
    exactness: str,
    geometry: tuple[tuple[int, int], ...],
    left_stride: tuple[int, int] = (1, 1),
    gradient: tuple[Tensor, Sums | None] | None = None,
    summed: bool = False,
    pivoted: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """((K, taps, C) products, sums of the left operand, its pivot); `rows` are (images, height, width)."""
    K, C = left.shape[1], x.shape[1]
    taps, stride, padding, dilation = geometry
    count = taps[0] * taps[1]
    N, P, Q = rows
    M = N * P * Q
    wide = _wide(left, x)
    problem = Problem(_dtype(x), exactness, gradient is not None, count, C, K, power_of_two(M), wide)
    config = configs.pick(PRODUCTS, problem, x)
    tiles = ceil_div(K, config["BM"]) * ceil_div(C, config["BN"]) * count
    steps = ceil_div(M, config["BK"])
    splits = max(min(ceil_div(2 * configs.target(x).multiprocessors, tiles), ceil_div(steps, 4)), 1)
    partials = x.new_empty((splits, K, count, C), dtype=torch.float32)
    sums = x.new_empty((splits, K), dtype=torch.float32) if summed else None
    pivot = x.new_empty(K, dtype=torch.float32) if pivoted else None
    y, of_bn = gradient or (None, None)
    grad_gamma, grad_beta = of_bn or (None, None)
    launch(
        prologue_products_kernel,
        (tiles, splits),
        left,
        y,
        *_vectors(bn),
        grad_gamma,
        grad_beta,
        float(left.numel() // K),
        x,
        *_vectors(bn2),
        partials,
        sums,
        pivot,
        M,
        left.shape[2],
        left.shape[3],
        P,
        Q,
        x.shape[2],
        x.shape[3],
        K=K,
        C=C,
        TAPS=taps,
        STRIDE=stride,
        PADDING=padding,
        DILATION=dilation,
        LEFT_STRIDE=left_stride,
        GRADIENT=gradient is not None,
        PIVOT=pivoted,
        PRECISION=exactness,
        WIDE=wide,
        **config,
    )
    return partials.sum(0), None if sums is None else sums.sum(0), pivot


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
    N, K, P, Q = y.shape
    found, _, _ = _products(
        g,
        bn,
        x,
        x_bn,
        rows=(N, P, Q),
        exactness=conv._precision(x),
        geometry=(kernel, stride, padding, dilation),
        gradient=(y, sums),
    )
    return found.to(y.dtype).view(K, *kernel, x.shape[1]).permute(0, 3, 1, 2)


def prologue_products(g: Tensor, x: Tensor, bn: Norm | None, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    N, K, P, Q = g.shape
    geometry = ((1, 1), stride, (0, 0), (1, 1))
    found, sums, _ = _products(
        g, None, x, bn, rows=(N, P, Q), exactness=conv._precision(x), geometry=geometry, summed=True
    )
    assert sums is not None
    return found.view(K, -1), sums


def prologue_moments(x: Tensor, bn: Norm | None, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """In 16 bit products of values as they are, exact in fp32; in fp32 of their distances to the first pixel's."""
    N, C, H, W = x.shape
    rows = N, ceil_div(H, stride[0]), ceil_div(W, stride[1])
    found, sums, pivot = _products(
        x,
        bn,
        x,
        bn,
        rows=rows,
        exactness="ieee",
        geometry=((1, 1), stride, (0, 0), (1, 1)),
        left_stride=stride,
        summed=True,
        pivoted=x.dtype == torch.float32,
    )
    assert sums is not None
    count = rows[0] * rows[1] * rows[2]
    mean = sums / count
    moments = found.view(C, C).addr_(sums, mean, alpha=-1)
    return mean if pivot is None else mean + pivot, moments


def bn_mask_backward(
    grad: Tensor, out: Tensor | None, y: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    g = grad if out is None else torch.empty_like(grad)
    mean, var = mean.contiguous(), var.contiguous()
    masked = None if out is None else g
    partials = bn_act.reduce_backward(grad, y, out, (mean, var, None, None, eps), out is not None, masked, None)
    grad_gamma, grad_beta = bn_act.finish_backward(partials, var, eps)
    return g, grad_gamma, grad_beta
