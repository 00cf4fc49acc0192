"""conv_bn_act: relu(bn(conv(x)) + residual), each conv of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

import fused_resnet

from .kernels import EPS, Case, Cost, Inputs, Maker, Op, across_models, compiled, function, shape_of
from .peer_fused_calls import fused_conv
from .roofline import Conv, Network

Sizes = tuple[tuple[int, int, int], tuple[int, int, int], int, int, bool]  # input, output, kernel, stride, residual?


def sizes_of(conv: Conv, kernel: int, residual: bool) -> tuple[Sizes, str]:
    out, inputs = shape_of(conv), conv.inputs
    side = round((conv.input // inputs) ** 0.5)
    stride = side // out[1]
    name = f"{kernel}x{kernel}{'/2' if stride == 2 else ''} {inputs}x{side}x{side} to {out[0]}"
    return ((inputs, side, side), out, kernel, stride, residual), name + (" + residual" if residual else "")


def _convs(net: Network) -> Iterator[tuple[Sizes, str]]:
    yield sizes_of(net.stem, 7, False)
    for block in net.blocks:
        for conv in block.convs:
            yield sizes_of(conv, 1 if conv.pointwise else 3, conv is block.convs[-1])


def cases() -> list[Case]:
    return across_models(_convs)


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    shape, out, kernel, stride, residual = sizes
    weight = make.weight(out[0], shape[0], kernel, kernel)
    return {
        "x": make.image(*shape),
        "weight": weight,
        **make.bn(out[0]),
        "residual": make.image(*out) if residual else None,
        "stride": stride,
    }


def cost(sizes: Sizes, direction: str) -> Cost:
    """Inference x, weight, residual, out in one kernel. Training: the conv, then bn_act; backward bn_act's, then the
    gradients of x and of the weight."""
    (c, h, w), (k, p, q), kernel, _, residual = sizes
    x, out, weight = c * h * w, k * p * q, k * c * kernel**2
    read = x if kernel > 1 else c * p * q  # a strided 1x1 conv skips pixels
    flops = 2 * weight * p * q
    if direction == "infer":
        return Cost(read + out * (1 + residual), weight, flops)
    if direction == "forward":
        return Cost(read + out + out * (3 + residual), weight, flops)
    return Cost(read + x + 2 * out + out * (7 if residual else 5), 2 * weight, 2 * flops)


def eager(training: bool, x: Tensor, weight: Tensor, residual: Tensor | None, stride: int, **bn: Any) -> Tensor:
    y = F.conv2d(x, weight, None, stride, weight.shape[2] // 2)
    y = F.batch_norm(y, bn["running_mean"], bn["running_var"], bn["gamma"], bn["beta"], training, 0.1, EPS)
    if residual is not None:
        y = y + residual
    return F.relu(y, inplace=True)


def fused_call(inputs: Inputs, training: bool) -> Callable[[], Tensor]:
    """torch's own fused conv call, with BN folded beforehand."""
    if training:
        raise NotImplementedError("torch's fused calls are for inference only")
    i = inputs
    weight, bias = fuse_conv_bn_weights(
        i["weight"].float(), None, i["running_mean"], i["running_var"], EPS, i["gamma"], i["beta"]
    )
    run = fused_conv(weight.detach().to(i["x"].dtype), bias.detach().to(i["x"].dtype), i["stride"], i["x"].shape)
    return lambda: run(i["x"], i["residual"], relu=True)


def ours(inputs: Inputs, training: bool) -> Callable[[], Tensor]:
    """The op in training; in inference the module, which keeps what it folded."""
    options = {name: value for name, value in inputs.items() if name not in ("x", "residual")}
    x, weight, residual, stride = inputs["x"], inputs["weight"], inputs["residual"], inputs["stride"]
    padding = weight.shape[2] // 2
    if training:
        op = fused_resnet.ops.conv_bn_act
        return lambda: op(x, residual=residual, padding=padding, training=True, eps=EPS, **options)
    k, c, kernel, _ = weight.shape
    module = fused_resnet.ConvBNAct(c, k, kernel, stride, padding, eps=EPS).eval().to(x.device, weight.dtype)
    with torch.no_grad():
        module.conv.weight = nn.Parameter(weight)
        names = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
        for name, given in names.items():
            getattr(module.bn, name).copy_(inputs[given])
    module.bn.float()
    return lambda: module(x, residual)


OP = Op(
    "conv_bn_act",
    "relu(bn(conv(x)) + residual)",
    cases,
    inputs,
    cost,
    {
        "eager": function(eager),
        "compile": compiled(eager),
        "fused calls": fused_call,
        "fused_resnet": ours,
    },
    leaves=("x", "weight", "gamma", "beta", "residual"),
)
