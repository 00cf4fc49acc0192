"""bn_act_pool: maxpool(relu(bn(x))), the stem after its conv."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

import fused_resnet

from .kernels import EPS, Case, Cost, Inputs, Maker, Op, across_models, compiled, function, shape_of
from .roofline import Network

Sizes = tuple[int, int, int]


def _stems(net: Network) -> Iterator[tuple[Sizes, str]]:
    shape = shape_of(net.stem)
    yield shape, "x".join(map(str, shape))


def cases() -> list[Case]:
    return across_models(_stems)


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    return {"x": make.image(*sizes), **make.bn(sizes[0])}


def cost(sizes: Sizes, direction: str) -> Cost:
    """x in one pass or, for its statistics, two; a quarter of it comes out. Backward: the pooled gradient and x twice,
    grad_x. (An offset of a byte per pooled element is left out.)"""
    c, h, w = sizes
    pooled = c * ((h + 1) // 2) * ((w + 1) // 2)
    passes = {"infer": 1, "forward": 2, "backward": 3}[direction]
    return Cost(passes * c * h * w + pooled * (2 if direction == "backward" else 1))


def eager(training: bool, x: Tensor, **bn: Any) -> Tensor:
    y = F.batch_norm(x, bn["running_mean"], bn["running_var"], bn["gamma"], bn["beta"], training, 0.1, EPS)
    return F.max_pool2d(F.relu(y, inplace=True), 3, 2, 1)


def ours(training: bool, x: Tensor, **bn: Any) -> Tensor:
    return fused_resnet.ops.bn_act_pool(x, training=training, eps=EPS, **bn)


OP = Op(
    "bn_act_pool",
    "maxpool(relu(bn(x)))",
    cases,
    inputs,
    cost,
    {"eager": function(eager), "compile": compiled(eager), "fused_resnet": function(ours)},
    leaves=("x", "gamma", "beta"),
)
