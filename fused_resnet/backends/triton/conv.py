"""act(bn(conv(x) + bias) + residual) as one implicit GEMM over NHWC tensors, for any kernel size.

Rows of the product are output pixels, its columns output channels, and its inner axis runs over (tap, input channel),
the order in which a channels_last weight lies in memory. The epilogue works on the fp32 accumulator and rounds once.
Where tiles are few, several programs share the inner axis of each (split-K): their fp32 sums are added in a fixed order
by a second kernel, which has the epilogue. NCHW tensors are converted on the way in and out.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.triton import configs
from fused_resnet.backends.triton.common import load, relu, store
from fused_resnet.backends.triton.runtime import launch

SLICE = tl.constexpr(32)  # columns that the epilogue finishes at a time


@triton.jit
def conv_kernel(
    x,  # (N, H, W, C)
    weight,  # (K, R, S, C / groups)
    out,  # (N, P, Q, K)
    bias,
    gamma,
    beta,
    mean,
    var,
    residual,
    shares,  # (SPLITS, M, K) sums in fp32, the epilogue being left to `conv_merge_kernel`; unused where SPLITS is 1
    eps,
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,  # (R, S)
    FILLED: tl.constexpr,  # (first, end) of the S taps in a row that are not padding of the weight
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    GROUPS: tl.constexpr,
    SPANNED: tl.constexpr,  # groups that the columns of one tile belong to, at most
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "tf32" or "ieee"
    WIDE: tl.constexpr,  # 64-bit offsets
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOOPS: tl.constexpr,  # 1: one loop over all taps; more: the taps shared out among so many loops
    SPLITS: tl.constexpr,  # programs that share a tile's inner axis
):
    """out = act(bn(conv(x) + bias) + residual), bn only where `mean` is given, one [BM, BN] tile per program."""
    CG: tl.constexpr = C // GROUPS
    POINTWISE: tl.constexpr = TAPS[0] * TAPS[1] == 1 and PADDING[0] == 0 and PADDING[1] == 0

    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP_M)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    in_m = m < M
    group = tile_n * BN // (K // GROUPS) if GROUPS > 1 else 0  # of the first column
    group_n = n // (K // GROUPS) - group  # [BN]

    h = m // Q % P * STRIDE[0] - PADDING[0]  # [BM], of the first tap
    w = m % Q * STRIDE[1] - PADDING[1]
    dense = POINTWISE and STRIDE[0] == 1 and STRIDE[1] == 1
    pixel = m if dense else (m // (P * Q) * H + h) * W + w
    if WIDE:
        m = m.to(tl.int64)
        pixel = pixel.to(tl.int64)
    x_row = x + (pixel * C + group * CG)
    w_column = weight + n * (TAPS[0] * TAPS[1] * CG)
    rest = C - group * CG  # channels from the tile's first group on

    acc = _product(
        x_row, w_column, h, w, in_m, n < K, group_n, None, rest, H, W,
        C, CG, TAPS, FILLED, DILATION, SPANNED, POINTWISE, PRECISION, BM, BN, BK, LOOPS, SPLITS,
    )  # fmt: skip
    if SPANNED > 1 or FILLED[0] > 0:  # noqa: SIM102
        # A NaN or Inf times a zero that only fills up the weight is NaN: then again with care, group by group.
        if tl.max((acc != acc).to(tl.int32)) > 0:  # along one axis after the other it does not compile for sm_100
            for only in range(SPANNED):
                part = _product(
                    x_row, w_column, h, w, in_m, n < K, group_n, only, rest, H, W,
                    C, CG, TAPS, FILLED, DILATION, SPANNED, POINTWISE, PRECISION, BM, BN, BK, LOOPS, SPLITS,
                )  # fmt: skip
                acc = part if SPANNED == 1 else tl.where((group_n == only)[None, :], part, acc)
    if SPLITS > 1:
        keep_share(acc, shares, m, n, M, K)
    else:
        _finish(acc, out, bias, gamma, beta, mean, var, residual, eps, m * K, tile_n * BN, in_m, K, RELU, BN)


@triton.jit
def conv_merge_kernel(
    shares,
    out,
    bias,
    gamma,
    beta,
    mean,
    var,
    residual,
    eps,
    M,
    K: tl.constexpr,
    RELU: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """What `conv_kernel` leaves to do where SPLITS programs shared each tile."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN
    acc = merged_shares(shares, m, n + tl.arange(0, BN), M, K, SPLITS, BM, BN)
    row = m.to(tl.int64) * K
    _finish(acc, out, bias, gamma, beta, mean, var, residual, eps, row, n, m < M, K, RELU, BN)


@triton.jit
def keep_share(acc, shares, m, n, M, K: tl.constexpr):
    """Store this program's sums in (splits, M, K) shares, its split being that of the grid's second axis."""
    row = m.to(tl.int64) + tl.program_id(1).to(tl.int64) * M
    tl.store(shares + (row[:, None] * K + n[None, :]), acc, mask=(m < M)[:, None] & (n < K)[None, :])


@triton.jit
def merged_shares(shares, m, n, M, K: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] sums over the splits, in their order."""
    row, mask = m.to(tl.int64), (m < M)[:, None] & (n < K)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.static_range(SPLITS):
        acc += load(shares + (row[:, None] * K + n[None, :]), mask)
        row += M
    return acc


@triton.jit
def _product(
    x_row,  # [BM], pointers
    w_column,  # [BN], pointers
    h,  # [BM], of the first tap
    w,  # [BM]
    in_m,  # [BM]
    in_n,  # [BN]
    group_n,  # [BN], counted from the tile's first group
    only,  # the one group whose channels count, or None for all
    rest,
    H,
    W,
    C: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    FILLED: tl.constexpr,
    DILATION: tl.constexpr,
    SPANNED: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOOPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The tile of conv(x) in fp32: the sum over taps, and over the channels of all groups that the tile spans; of these
    steps the part that falls to this program.

    A weight counts as 0 for the channels of other groups than its column's: b is block diagonal.
    """
    COUNT: tl.constexpr = TAPS[0] * TAPS[1]
    SPAN: tl.constexpr = SPANNED * CG
    PACKED: tl.constexpr = SPAN % BK != 0  # a step may cross from one tap to the next
    STEPS: tl.constexpr = (COUNT * SPAN + BK - 1) // BK
    RUN: tl.constexpr = STEPS // LOOPS if STEPS % LOOPS == 0 else STEPS
    UNIT: tl.constexpr = RUN if RUN < STEPS else 1
    EACH: tl.constexpr = (STEPS + UNIT * SPLITS - 1) // (UNIT * SPLITS) * UNIT
    LENGTH: tl.constexpr = RUN if RUN < STEPS else EACH
    begin = tl.program_id(1) * EACH if SPLITS > 1 else 0
    lane = tl.arange(0, BK)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for first in tl.static_range(0, EACH, LENGTH):
        for turn in range(first, first + LENGTH):
            step = begin + turn
            if PACKED:
                k = step * BK + lane
                a_tap, a_c = (k // SPAN)[None, :], (k % SPAN)[None, :]  # [1, BK]
                b_tap, b_c = (k // SPAN)[:, None], (k % SPAN)[:, None]  # [BK, 1]
            else:
                a_tap = step // (SPAN // BK)
                c = step % (SPAN // BK) * BK + lane
                b_tap, a_c, b_c = a_tap, c[None, :], c[:, None]
            r = a_tap // TAPS[1] * DILATION[0]
            s = a_tap % TAPS[1] * DILATION[1]
            in_a, in_b = in_m[:, None], in_n[None, :]
            if SPLITS > 1 and not PACKED:
                in_a, in_b = in_a & (step < STEPS), in_b & (step < STEPS)
            if not POINTWISE:
                row, column = h[:, None] + r, w[:, None] + s
                in_a = in_a & (row.to(tl.uint32) < H) & (column.to(tl.uint32) < W)  # negative: huge
            if FILLED[1] < TAPS[1]:
                in_a = in_a & (s < FILLED[1])
            if FILLED[0] > 0 and only is not None:  # this mask would split the pairs that are copied
                in_a = in_a & (s >= FILLED[0])
            if PACKED:
                in_a = in_a & (a_tap < COUNT)
                in_b = in_b & (b_tap < COUNT)
            if SPANNED > 1:
                in_a = in_a & (a_c < rest)
                if only is not None:
                    in_a = in_a & (a_c // CG == only)
                b_c = b_c - group_n[None, :] * CG
                in_b = in_b & (b_c >= 0) & (b_c < CG)
            a = tl.load(x_row[:, None] + ((r * W + s) * C + a_c), mask=in_a, other=0.0)
            b = tl.load(w_column[None, :] + (b_tap * CG + b_c), mask=in_b, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a program: GROUP_M row tiles take their turn before the next column (L2 reuse)."""
    width = GROUP_M * tiles_n
    first = pid // width * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % width % rows, pid % width // rows


@triton.jit
def _finish(
    acc,  # [BM, BN]
    out,
    bias,
    gamma,
    beta,
    mean,
    var,
    residual,
    eps,
    row,  # [BM], offsets
    n,
    in_m,  # [BM]
    K: tl.constexpr,
    RELU: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of columns n to n + BN, by halves down to SLICE columns: all at once would not fit in registers."""
    if BN > SLICE:
        HALF: tl.constexpr = BN // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        _finish(low, out, bias, gamma, beta, mean, var, residual, eps, row, n, in_m, K, RELU, HALF)
        _finish(high, out, bias, gamma, beta, mean, var, residual, eps, row, n + HALF, in_m, K, RELU, HALF)
    else:
        n = n + tl.arange(0, BN)
        in_n = n < K
        if mean is not None:
            center = load(mean + n, in_n)  # [BN]
            if bias is not None:
                center -= load(bias + n, in_n)
            scale = tl.rsqrt(load(var + n, in_n) + eps)
            if gamma is not None:
                scale *= load(gamma + n, in_n)
            acc = (acc - center[None, :]) * scale[None, :]
            if beta is not None:
                acc += load(beta + n, in_n)[None, :]
        elif bias is not None:
            acc += load(bias + n, in_n)[None, :]
        at = row[:, None] + n[None, :]
        mask = in_m[:, None] & in_n[None, :]
        if residual is not None:
            acc += load(residual + at, mask)
        if RELU:
            acc = relu(acc)
        store(out + at, acc, mask)


class Problem(NamedTuple):
    """What a config may depend on; a `configs.Key`."""

    dtype: str
    precision: str
    taps: int
    stride: int
    channels: int
    columns: int  # output channels
    groups: int
    rows: int  # output pixels, up to a power of two

    def spanned(self, block: int) -> int:
        """The groups that `block` columns, from a multiple of `block`, belong to, at most."""
        each = self.columns // self.groups
        if each % block == 0:
            return 1
        return min(self.groups, block // each if block % each == 0 else (block + each - 2) // each + 1)

    @property
    def exact(self) -> bool:
        """Products that no tensor core of NVIDIA's computes."""
        return self.dtype == "float32" and self.precision == "ieee"


# BM, BN, warps. A loop over several taps at 8 warps has been miscompiled (triton#1254, pytorch#173068): 4, or LOOPS.
POINTWISE_TILES = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4))
TAPS_TILES = ((128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4))
GROUPS_TILES = ((128, 32, 4), (64, 64, 4), (64, 32, 4))
EXACT_TILES = ((64, 64, 4), (64, 32, 2))
_ROOMY = ("sm_90", "sm_100", "gfx942")  # where the first of these tiles does not spill


def _tiles(problem: Problem, BM: int, BN: int) -> int:
    return triton.cdiv(problem.rows, BM) * triton.cdiv(problem.columns, BN)


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


MOST_SPLITS, LEAST_STEPS = 16, 4
MERGE = {"BM": 32, "BN": SLICE.value, "num_warps": 4}


def splits_of(target: configs.Target, tiles: int, steps: int, loops: int) -> int:
    """Programs to share a tile's `steps`, in whole `loops`, where the tiles alone keep at most half of the machine
    busy; else 1."""
    splits = max(min(target.multiprocessors // tiles, steps // LEAST_STEPS, MOST_SPLITS), 1)
    units = loops if loops > 1 else max(steps, 1)
    return triton.cdiv(units, triton.cdiv(units, splits))


def split_candidates(config: configs.Config, splits: int) -> Iterator[configs.Config]:
    """The config unsplit; where `splits`, from `splits_of`, says that it may pay, so many times and half so many."""
    for count in sorted({1, max(splits // 2, 1), splits}):
        yield config | {"SPLITS": count}


def _config(target: configs.Target, problem: Problem, BM: int, BN: int, warps: int, stages: int = 3) -> configs.Config:
    """BK is 128 bytes of channels if they divide into that, else 32 lanes if they divide into that or are ragged."""
    full = 16 if problem.exact else 32 if problem.dtype == "float32" else 64
    span = problem.spanned(BN) * problem.channels // problem.groups
    BK = min(full, 32) if span % full and (span % 32 == 0 or span % 8) else full
    loops = problem.taps if warps == 8 else 1
    if target.arch.startswith("gfx"):
        stages = 2
    tile = {"BM": BM, "BN": BN, "BK": BK, "GROUP_M": 8, "LOOPS": loops, "SPLITS": 1}
    return tile | {"num_warps": warps, "num_stages": stages}


def _splits(target: configs.Target, problem: Problem, config: configs.Config) -> int:
    BM, BN, BK = (config[name] for name in ("BM", "BN", "BK"))
    steps = problem.taps * problem.spanned(BN) * problem.channels // problem.groups // BK
    return splits_of(target, _tiles(problem, BM, BN), steps, config["LOOPS"])


def _default(target: configs.Target, key: configs.Key) -> configs.Config:
    problem = Problem(*key)  # type: ignore[arg-type]
    roomy = target.arch in _ROOMY
    BM, BN = 128, 128 if problem.taps == 1 or roomy else 64
    if problem.exact:
        BM, BN = 64, 64
    elif problem.groups > 1:
        BN = 64 if problem.spanned(64) == 1 else 32  # few columns: zeros of other groups cost arithmetic
        BM = 128 if roomy or problem.spanned(BN) == 1 else 64
    BN = max(16, min(BN, power_of_two(problem.columns)))
    while BM * BN > 64 * 32 and _tiles(problem, BM, BN) < target.multiprocessors:
        BM, BN = (BM, BN // 2) if BN >= BM and BN > 32 else (BM // 2, BN)
    warps = 8 if problem.taps == 1 and BM * BN >= 128 * 128 else 2 if problem.exact and BM * BN <= 64 * 32 else 4
    config = _config(target, problem, BM, BN, warps)
    return config | {"SPLITS": _splits(target, problem, config)}


def _candidates(target: configs.Target, key: configs.Key) -> Iterator[configs.Config]:
    problem = Problem(*key)  # type: ignore[arg-type]
    roomy = target.arch in _ROOMY
    tiles: tuple[tuple[int, int, int], ...] = POINTWISE_TILES if problem.taps == 1 else TAPS_TILES
    if problem.exact:
        tiles = EXACT_TILES
    elif problem.groups > 1:
        tiles = GROUPS_TILES[0 if roomy else 2 :]
    elif not roomy:
        tiles = tuple(tile for tile in tiles if tile[0] * tile[1] // tile[2] < 4096)
    for BM, BN, warps in tiles:
        if power_of_two(problem.columns) >= BN:
            config = _config(target, problem, BM, BN, warps)
            small = BM * BN <= 64 * 128  # what is left of a larger one would not fit in registers
            yield from split_candidates(config, _splits(target, problem, config) if small else 1)
            if BM * BN <= 128 * 128 and not problem.exact:
                yield _config(target, problem, BM, BN, warps, 4)
    if problem.taps > 1 and problem.channels >= 256 and problem.groups == 1 and target.arch in ("sm_90", "sm_100"):
        yield _config(target, problem, 128, 128, 8)


def _shared(config: configs.Config, key: configs.Key) -> int:
    size = 4 if key[0] == "float32" else 2
    return config["num_stages"] * (config["BM"] + config["BN"]) * config["BK"] * size


SPACE = configs.Space(_default, _candidates, _shared)
CONV = configs.register("conv_kernel", SPACE)
INDEX_LIMIT = 2**31 - 2**16  # indices that 32 bits hold, a tile beyond the end included
WIDE_FROM = 2**30  # elements from which offsets have 64 bits


def supports(primitive: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    if x.shape[1] == 0:
        return "the input has no channels"
    if weight.shape[1] == 1 < x.shape[1]:
        return "no kernels for depthwise convolutions"
    if max(x.numel() // x.shape[1], weight.numel()) >= INDEX_LIMIT:
        return "the input has over 2**31 pixels, or the weight over 2**31 elements"
    return None


def _precision(x: Tensor) -> str:
    """torch's switch for convolutions, a 1x1 included; ROCm's convolutions have none."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: tuple[Tensor | None, ...],
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """`bn` is (gamma, beta, mean, var). What is not channels_last is copied, the weight too, at every call."""
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    (N, C, H, W), (K, _, R, S) = x.shape, weight.shape
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    out = torch.empty((N, K, P, Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        rows, precision = N * P * Q, _precision(x)
        dtype = str(x.dtype).removeprefix("torch.")
        problem = Problem(dtype, precision, R * S, stride[0], C, K, groups, power_of_two(rows))
        config = configs.pick(CONV, problem, x)
        splits = config["SPLITS"]
        shares = x.new_empty((splits, rows, K), dtype=torch.float32) if splits > 1 else None
        filled = (0, S)
        if C <= FEW_CHANNELS and S > 1 and dilation[1] == 1 and groups == 1 and x.numel() < INDEX_LIMIT:
            weight, filled = _as_one_channel(weight, padding[1] * C % 2)
            W, C = W * C, 1
            stride, padding = (stride[0], stride[1] * x.shape[1]), (padding[0], padding[1] * x.shape[1] + filled[0])
        vectors = [None if v is None else v.contiguous() for v in (bias, *bn)]
        launch(
            conv_kernel,
            (triton.cdiv(rows, config["BM"]) * triton.cdiv(K, config["BN"]), splits),
            x,
            weight,
            out,
            *vectors,
            residual,
            shares,
            eps,
            rows,
            H,
            W,
            P,
            Q,
            C=C,
            K=K,
            TAPS=tuple(weight.shape[2:]),
            FILLED=filled,
            STRIDE=tuple(stride),
            PADDING=tuple(padding),
            DILATION=tuple(dilation),
            GROUPS=groups,
            SPANNED=problem.spanned(config["BN"]),
            RELU=activation == "relu",
            PRECISION=precision,
            WIDE=max(x.numel(), out.numel()) >= WIDE_FROM,
            **config,
        )
        if shares is not None:
            launch(
                conv_merge_kernel,
                (triton.cdiv(rows, MERGE["BM"]), triton.cdiv(K, MERGE["BN"])),
                shares,
                out,
                *vectors,
                residual,
                eps,
                rows,
                K=K,
                RELU=activation == "relu",
                SPLITS=splits,
                **MERGE,
            )
    return out if channels_last else out.clone(memory_format=torch.contiguous_format)


FEW_CHANNELS = 4


def _as_one_channel(weight: Tensor, shift: int) -> tuple[Tensor, tuple[int, int]]:
    """The weight of the same convolution over an image of one channel, its rows W * C long; and its columns in use.

    The stem's taps of one row are neighbours in memory. Filled up with zeros to a power of two, and `shift` in front so
    that they begin at even elements, they are copied to shared memory asynchronously and by pairs, not one by one.
    """
    K, C, R, S = weight.shape
    packed = weight.new_zeros((K, R, max(16, power_of_two(shift + S * C))))
    packed[:, :, shift : shift + S * C] = weight.permute(0, 2, 3, 1).reshape(K, R, S * C)
    return packed.unsqueeze(1), (shift, shift + S * C)


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
    bn = (None, None, None, None)
    return _conv(x, weight, bias, bn, residual, stride, padding, dilation, groups, 0.0, activation)


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
    bn = (gamma, beta, mean, var)
    return _conv(x, weight, bias, bn, residual, stride, padding, dilation, groups, eps, activation)
