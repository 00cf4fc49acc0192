"""Convolutions of few pixels and many weights as matrix products, on channels_last tensors.

A weight is read as it lies in memory, and its gradient written so once; oneDNN would bring both into an order of its
own, which takes longer than the products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.ops.checks import is_channels_last


def rows_of(x: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """The pixels of (N, C, H, W) that a 1x1 conv reads, as (pixels, C)."""
    return x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images_of(rows: Tensor, n: int, height: int, width: int) -> Tensor:
    """(N H W, C) as (N, C, H, W), channels_last."""
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def _new_matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """In the network's memory."""
    return torch.ops.fused_resnet_cpp.new_images.default(like, rows, columns, 1, 1)[:, :, 0, 0]


def nchw(x: Tensor) -> Tensor:
    """A contiguous copy of a channels_last x, float32, in the network's memory."""
    out = _new_matrix(x, x.shape[0], math.prod(x.shape[1:])).view(x.shape)
    torch.ops.fused_resnet_cpp.nhwc_to_nchw.default(x, out)
    return out


def product(u: Tensor, v: Tensor) -> Tensor:
    """u^T v of two matrices, in the network's memory."""
    return torch.mm(u.t(), v, out=_new_matrix(u, u.shape[1], v.shape[1]))


def output(
    x: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """conv2d(x, weight), of `size`: (N, height, width)."""
    return images_of(_windows(x, size, weight, stride, padding, dilation) @ _matrix(weight).t(), *size)


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The gradient of conv2d's weight, in its layout."""
    k, c, *kernel = weight.shape
    windows = _windows(x, (grad.shape[0], *grad.shape[2:]), weight, stride, padding, dilation)
    matrix = product(rows_of(grad), windows)
    return matrix.view(k, *kernel, c).permute(0, 3, 1, 2) if is_channels_last(weight) else matrix.view(weight.shape)


def _matrix(weight: Tensor) -> Tensor:
    """(K, R S C) of a weight in channels_last, else (K, C R S)."""
    return (weight.permute(0, 2, 3, 1) if is_channels_last(weight) else weight).flatten(1)


def _windows(
    x: Tensor,
    size: Sequence[int],
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """(pixels of the output, columns of `_matrix`): what the kernel meets of a channels_last x; `size`: as above."""
    if math.prod(weight.shape[2:]) == 1 and not any(padding):
        return rows_of(x, stride)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    image, row, pixel, _ = padded.stride()
    shape = (*size, *weight.shape[2:], x.shape[1])
    steps = (image, row * stride[0], pixel * stride[1], row * dilation[0], pixel * dilation[1], 1)
    windows = padded.as_strided(shape, steps).contiguous().view(math.prod(size), *shape[3:])
    return (windows if is_channels_last(weight) else nchw(windows.permute(0, 3, 1, 2))).flatten(1)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The gradient of conv2d's input x; what the product gives for each tap is added up."""
    (n, c, height, width), (_, _, p, q), (*_, r, s) = x.shape, grad.shape, weight.shape
    taps = rows_of(grad) @ _matrix(weight)
    if is_channels_last(weight):
        taps = taps.view(n, p, q, r, s, c)
    else:
        taps = taps.view(n, p, q, c, r, s).permute(0, 1, 2, 4, 5, 3)
    padded = x.new_zeros(n, height + 2 * padding[0], width + 2 * padding[1], c)
    for i, j in itertools.product(range(r), range(s)):
        top, left = i * dilation[0], j * dilation[1]
        reached = padded[:, top : top + p * stride[0] : stride[0], left : left + q * stride[1] : stride[1]]
        reached += taps[:, :, :, i, j]
    inside = padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inside.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
