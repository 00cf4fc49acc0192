"""Convolutions of residual networks, and odd ones, for the tests of backends on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_resnet import parity
from fused_resnet.backends import reference

EPS = 1e-5
# name: (batch, C, size, K, kernel, stride, padding, dilation, groups): ResNet-50's kinds, ResNeXt's, and odd ones
LAYERS = {
    "1x1 narrow": (8, 256, 56, 64, 1, 1, 0, 1, 1),
    "1x1 widen": (8, 64, 56, 256, 1, 1, 0, 1, 1),
    "1x1 projection": (8, 1024, 14, 2048, 1, 2, 0, 1, 1),
    "1x1 ragged": (3, 67, 13, 35, 1, 1, 0, 1, 1),
    "3x3 stage 1": (8, 64, 56, 64, 3, 1, 1, 1, 1),
    "3x3 stage 2": (8, 128, 56, 128, 3, 2, 1, 1, 1),
    "3x3 stage 3": (8, 256, 14, 256, 3, 1, 1, 1, 1),
    "3x3 stage 4": (8, 512, 7, 512, 3, 1, 1, 1, 1),
    "3x3 one image": (1, 512, 7, 512, 3, 1, 1, 1, 1),
    "3x3 dilated": (2, 256, 14, 256, 3, 1, 2, 2, 1),
    "3x3 ragged": (2, 33, 17, 41, 3, 2, 4, 1, 1),  # what has been miscompiled at 8 warps
    "7x7 stem": (8, 3, 224, 64, 7, 2, 3, 1, 1),
    "7x7 stem, odd": (2, 3, 37, 64, 7, 2, 3, 1, 1),
    "groups of 4": (8, 128, 56, 128, 3, 1, 1, 1, 32),
    "groups of 32": (8, 1024, 14, 1024, 3, 2, 1, 1, 32),
    "groups of 6": (2, 30, 9, 30, 3, 1, 1, 1, 5),
}


def inputs(layer: str, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> tuple[Any, ...]:
    """Arguments of conv_bn_act_forward."""
    N, C, size, K, taps, stride, padding, dilation, groups = LAYERS[layer]
    out = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda")

    def image(*shape: int) -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=layout)

    x, residual = image(N, C, size, size), image(N, K, out, out)
    weight = (image(K, C // groups, taps, taps) * (C // groups * taps**2) ** -0.5).contiguous(memory_format=layout)
    vectors = (normal(K), normal(K), normal(K), normal(K).abs() + 0.1)
    options = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups, EPS, "relu")
    return x, weight, None, *vectors, residual, *options


def check(backend: ModuleType, layer: str, args: tuple[Any, ...], run: Callable[[], Tensor] | None = None) -> Tensor:
    """The layer by a backend, or by `run`, against float64 and torch's own convolution."""
    exact = reference.conv_bn_act_forward(*(a.double() if isinstance(a, Tensor) else a for a in args))
    plain = reference.conv_bn_act_forward(*args)
    ours = run() if run is not None else backend.conv_bn_act_forward(*args)
    row = parity.compare(layer, ours, plain, exact)
    assert row.ok, row
    assert ours.stride() == plain.stride()
    return ours


def check_nan_and_infinity(backend: ModuleType, layer: str, dtype: torch.dtype) -> None:
    """They pass, and stay where they are."""
    args = list(inputs(layer, dtype))
    args[0][0, 0, 2, 3], args[0][0, -1, 5, 6], args[7][0, 1, 0, 0] = torch.nan, torch.inf, torch.nan
    ours, theirs = (module.conv_bn_act_forward(*args) for module in (backend, reference))
    assert torch.equal(ours.isnan(), theirs.isnan())


def check_graph_replays(backend: ModuleType, layer: str = "3x3 stage 2") -> None:
    """They read the live buffers."""
    args = inputs(layer, torch.bfloat16)
    backend.conv_bn_act_forward(*args)  # what is compiled is compiled here
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.conv_bn_act_forward(*args)
    for tensor in (args[0], args[3], args[5], args[7]):
        tensor.normal_()
    graph.replay()
    check(backend, layer, args, lambda: out)


def check_stream(backend: ModuleType) -> None:
    """It runs on the current one."""
    args = inputs("1x1 widen", torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        args[0].fill_(1.0)
        out = backend.conv_bn_act_forward(*args)
    stream.synchronize()
    check(backend, "1x1 widen", args, lambda: out)
