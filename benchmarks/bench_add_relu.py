"""add_relu: relu(x + residual), the end of each block whose last BN is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

import fused_resnet

from .kernels import Case, Cost, Inputs, Maker, Op, across_models, compiled, function, shape_of
from .roofline import Network

Sizes = tuple[int, int, int]


def _block_ends(net: Network) -> Iterator[tuple[Sizes, str]]:
    for block in net.blocks:
        shape = shape_of(block.convs[-1])
        yield shape, "x".join(map(str, shape))


def cases() -> list[Case]:
    return across_models(_block_ends)


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    return {"x": make.image(*sizes), "residual": make.image(*sizes)}


def cost(sizes: Sizes, direction: str) -> Cost:
    """x, residual, out; backward grad, out, and one gradient for both."""
    c, h, w = sizes
    return Cost(3 * c * h * w)


def eager(training: bool, x: Tensor, residual: Tensor) -> Tensor:
    return F.relu(x + residual, inplace=True)


def ours(training: bool, x: Tensor, residual: Tensor) -> Tensor:
    return fused_resnet.ops.add_relu(x, residual)


OP = Op(
    "add_relu",
    "relu(x + residual)",
    cases,
    inputs,
    cost,
    {"eager": function(eager), "compile": compiled(eager), "fused_resnet": function(ours)},
    leaves=("x", "residual"),
    directions=("forward", "backward"),
)
