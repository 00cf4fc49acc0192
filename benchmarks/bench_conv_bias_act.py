"""conv_bias_act: relu(conv(x) + bias + residual), what a folded network runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

import fused_resnet

from . import bench_conv_bn_act
from .bench_conv_bn_act import Sizes
from .kernels import Case, Cost, Inputs, Maker, Op, compiled, function
from .peer_fused_calls import fused_conv


def cases() -> list[Case]:
    """The block ends: with a residual the two differ most."""
    return [case for case in bench_conv_bn_act.cases() if case.sizes[-1]]


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    found = bench_conv_bn_act.inputs(sizes, make)
    bias = found["beta"].to(make.dtype)
    return {name: found[name] for name in ("x", "weight", "residual", "stride")} | {"bias": bias}


def cost(sizes: Sizes, direction: str) -> Cost:
    """Inference x, weight, residual, out in one kernel. Training: the conv, then add_relu; backward add_relu's, then
    the gradients of x and of the weight."""
    base = bench_conv_bn_act.cost(sizes, "infer")
    _, (k, p, q), *_ = sizes
    out = k * p * q
    if direction == "infer":
        return base
    if direction == "forward":
        return base._replace(activations=base.activations + 2 * out)
    c, h, w = sizes[0]
    return Cost(base.activations + c * h * w + 3 * out, 2 * base.weights, 2 * base.flops)


def eager(training: bool, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, weight.shape[2] // 2)
    if residual is not None:
        y = y + residual
    return F.relu(y, inplace=True)


def fused_call(inputs: Inputs, training: bool) -> Callable[[], Tensor]:
    if training:
        raise NotImplementedError("torch's fused calls are for inference only")
    run = fused_conv(inputs["weight"], inputs["bias"], inputs["stride"], inputs["x"].shape)
    return lambda: run(inputs["x"], inputs["residual"], relu=True)


def ours(training: bool, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int) -> Tensor:
    padding = weight.shape[2] // 2
    return fused_resnet.ops.conv_bias_act(x, weight, bias, residual, stride=stride, padding=padding)


OP = Op(
    "conv_bias_act",
    "relu(conv(x) + bias + residual)",
    cases,
    inputs,
    cost,
    {
        "eager": function(eager),
        "compile": compiled(eager),
        "fused calls": fused_call,
        "fused_resnet": function(ours),
    },
    leaves=("x", "weight", "bias", "residual"),
)
