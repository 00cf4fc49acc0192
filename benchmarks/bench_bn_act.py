"""bn_act: relu(bn(x) + residual), after each conv of the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

import fused_resnet

from .kernels import EPS, Case, Cost, Inputs, Maker, Op, across_models, compiled, function, shape_of
from .roofline import Network

Sizes = tuple[int, int, int, bool]  # C, H, W, with a residual?


def _norms(net: Network) -> Iterator[tuple[Sizes, str]]:
    for block in net.blocks:
        for conv in block.convs:
            shape, end = shape_of(conv), conv is block.convs[-1]
            yield (*shape, end), "x".join(map(str, shape)) + (" + residual" if end else "")


def cases() -> list[Case]:
    return across_models(_norms)


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    *shape, end = sizes
    return {"x": make.image(*shape), **make.bn(shape[0]), "residual": make.image(*shape) if end else None}


def cost(sizes: Sizes, direction: str) -> Cost:
    """Inference x, out. Training: statistics x; x, out. Backward: sums over grad and x, then grad, x, grad_x.
    A residual is one more to read; backward it brings the mask (out) and a gradient of its own: 3 + 4."""
    c, h, w, end = sizes
    passes = {"infer": 2 + end, "forward": 3 + end, "backward": 7 if end else 5}
    return Cost(passes[direction] * c * h * w)


def eager(training: bool, x: Tensor, residual: Tensor | None, **bn: Any) -> Tensor:
    y = F.batch_norm(x, bn["running_mean"], bn["running_var"], bn["gamma"], bn["beta"], training, 0.1, EPS)
    if residual is not None:
        y = y + residual
    return F.relu(y, inplace=True)


def ours(training: bool, x: Tensor, residual: Tensor | None, **bn: Any) -> Tensor:
    return fused_resnet.ops.bn_act(x, residual=residual, training=training, eps=EPS, **bn)


OP = Op(
    "bn_act",
    "relu(bn(x) + residual)",
    cases,
    inputs,
    cost,
    {"eager": function(eager), "compile": compiled(eager), "fused_resnet": function(ours)},
    leaves=("x", "gamma", "beta", "residual"),
)
