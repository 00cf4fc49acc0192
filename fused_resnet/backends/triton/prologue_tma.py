"""`prologue_conv_kernel` once more, for dense products (one tap, stride 1, no padding) on sm_90 and sm_100.

Programs are few and persistent: each goes from tile to tile. Operands come by TMA, through tensor descriptors that the
host makes for each call (in 2 to 4 us each). What an operand goes through on its way in, and a tile on its way out, is
the same code as there: `prologue_parts`. Nothing takes this kernel but a config that tuning has chosen: where its
"PERSISTENT", programs per multiprocessor, is not 0.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends.triton import configs
from fused_resnet.backends.triton.conv import tile_of
from fused_resnet.backends.triton.prologue_parts import end_tile, formed

ALIGNMENT = 16  # bytes: where a matrix that TMA reads begins, and each of its rows


@triton.jit
def prologue_tiles_kernel(
    out,  # (M, K)
    x,  # tensor descriptors: (M, C)
    y,  # like x, or None
    weight,  # (K, C), or (C, K) if TRANSPOSED
    x2_tiles,  # (M, C2), or None
    weight2,  # like `weight`, or None
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    count,
    x2,
    mean2,
    var2,
    gamma2,
    beta2,
    eps2,
    shift,
    residual,
    partials,
    M,
    P,
    Q,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    RELU: tl.constexpr,
    PARTIALS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = act(read(x) weight + read(x2) weight2 + shift + residual); see `prologue_conv_kernel`."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(K, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BM, tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _product(
            acc, x, y, weight, m, n, M, mean, var, gamma, beta, eps, grad_gamma, grad_beta, count,
            C, TRANSPOSED, GRADIENT, PRECISION, BM, BN, BK,
        )  # fmt: skip
        if weight2 is not None:
            acc = _product(
                acc, x2_tiles, None, weight2, m, n, M, mean2, var2, gamma2, beta2, eps2, None, None, 1.0,
                C2, TRANSPOSED, False, PRECISION, BM, BN, BK,
            )  # fmt: skip
        end_tile(
            acc, out, shift, residual, x2, mean2, var2, gamma2, beta2, eps2, partials, tile_m, tile_n, M, P, Q, K,
            ADD_STRIDE, RELU, PARTIALS, WIDE, BM, BN,
        )  # fmt: skip


@triton.jit
def _product(
    acc,
    x,
    y,
    weight,
    m,
    n,
    M,
    mean,
    var,
    gamma,
    beta,
    eps,
    grad_gamma,
    grad_beta,
    count,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc + read(x) weight, of the rows from m and the columns from n on."""
    in_m = m + tl.arange(0, BM) < M
    for first in range(0, C, BK):
        c = first + tl.arange(0, BK)
        in_c = c < C
        raw = y.load([m, first]).to(tl.float32) if y is not None else None
        a = formed(
            x.load([m, first]), raw, in_m[:, None] & in_c[None, :], c, in_c,
            mean, var, gamma, beta, eps, grad_gamma, grad_beta, count, GRADIENT,
        )  # fmt: skip
        b = weight.load([first, n]) if TRANSPOSED else weight.load([n, first]).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def descriptors(
    config: configs.Config,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    columns: int,
    transposed: bool,
) -> tuple[TensorDescriptor | None, ...] | None:
    """Of each operand, in the kernel's order; None where TMA cannot read one of them, or there is nothing to read.

    Args:
        x, y, x2: (N, C, H, W) in channels_last: matrices of N H W rows.
        weight, weight2: in memory `columns` rows, of as many channels as x and x2 have, or (`transposed`) the reverse.
    """
    BM, BN, BK = config["BM"], config["BN"], config["BK"]
    C, C2 = x.shape[1], 0 if x2 is None else x2.shape[1]
    pixels, block = [BM, BK], [BK, BN] if transposed else [BN, BK]
    matrices = (
        (x, C, pixels),
        (y, C, pixels),
        (weight, columns if transposed else C, block),
        (x2, C2, pixels),
        (weight2, columns if transposed else C2, block),
    )
    found: list[TensorDescriptor | None] = []
    for matrix, width, shape in matrices:
        if matrix is None:
            found.append(None)
        elif matrix.numel() and not (matrix.data_ptr() % ALIGNMENT or width * matrix.element_size() % ALIGNMENT):
            found.append(TensorDescriptor(matrix, [matrix.numel() // width, width], [width, 1], shape))
        else:
            return None
    return tuple(found)
