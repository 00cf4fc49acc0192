"""Convolutions with prologues on a GPU: every tile that tuning may choose, beside plain torch, both against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import parity
from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend

_REASON = backend.unavailable("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"triton: {_REASON}")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5
# name: (batch, C, size, K, kernel, stride): ResNet-50's kinds, and odd ones
LAYERS = {
    "1x1 narrow": (8, 256, 56, 64, 1, 1),
    "1x1 widen": (8, 64, 56, 256, 1, 1),
    "1x1 projection": (8, 256, 56, 512, 1, 2),
    "1x1 ragged": (3, 67, 13, 35, 1, 1),
    "1x1 eights": (3, 72, 13, 40, 1, 1),
    "3x3 stage 1": (8, 64, 56, 64, 3, 1),
    "3x3 stage 2": (8, 128, 56, 128, 3, 2),
    "3x3 stage 4": (8, 512, 7, 512, 3, 1),
    "3x3 ragged": (2, 33, 17, 41, 3, 2),
    "1x1 one image": (1, 2048, 7, 512, 1, 1),  # tiles are few: the inner axis is split
    "3x3 one image": (1, 512, 7, 512, 3, 1),
    "1x1 many tiles": (48, 64, 56, 64, 1, 1),  # what they leave is merged by groups first
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # monkeypatch cannot put back what these compute
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def calls(layer: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """primitive -> arguments."""
    N, C, size, K, taps, stride = LAYERS[layer]
    out = (size - 1) // stride + 1
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda")

    def image(*shape: int) -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    def bn(channels: int) -> tuple[Any, ...]:
        return normal(channels), normal(channels).abs() + 0.5, normal(channels), normal(channels), EPS

    x, y, g, weight = image(N, C, size, size), image(N, K, out, out), image(N, K, out, out), image(K, C, taps, taps)
    weight *= (C * taps * taps) ** -0.5
    geometry, pair = ((stride,) * 2, (taps // 2,) * 2, (1, 1)), (stride,) * 2
    inner, gradient = bn(C), (y, bn(K), (normal(K) * N, normal(K) * N))
    found: dict[str, tuple[Any, ...]] = {
        "prologue_conv_forward": (x, inner, weight, *geometry, True, None, None, 0.1),
        "prologue_conv_grad_input": (g, *gradient, weight, x, inner, None, *geometry),
        "prologue_conv_grad_weight": (g, *gradient, x, inner, (taps, taps), *geometry),
        "bn_mask_backward": (g, y, image(N, K, out, out), *bn(K)[:2], EPS),
    }
    if taps == 1:
        bn_of_x = inner if stride == 1 else None
        square = (normal(C, C) * C**-0.5).to(dtype)
        found |= {
            "prologue_moments": (x, inner, pair),
            "prologue_products": (g, x, inner, pair),
            "prologue_end_forward": (x, inner, weight, None, None, normal(K), y, pair, (1, 1), "relu"),
            "prologue_end_backward": (g, weight.flatten(1).contiguous(), x, bn_of_x, square, normal(C), pair),
        }
    return found


def exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(exact(v) for v in value)
    return value.double() if isinstance(value, Tensor) else value


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


def check(layer: str, dtype: torch.dtype) -> None:
    for name, args in calls(layer, dtype).items():
        truth = results(getattr(reference, name)(*exact(args)))
        theirs = results(getattr(reference, name)(*args))
        first, second = (results(getattr(backend, name)(*args)) for _ in range(2))
        for index, (one, two, plain, right) in enumerate(zip(first, second, theirs, truth, strict=True)):
            assert torch.equal(one, two), f"{name} {index} is not deterministic"
            row = parity.compare(f"{name} {index}", one, plain, right)
            assert row.ok, (layer, dtype, row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_primitive(layer: str, dtype: torch.dtype) -> None:
    check(layer, dtype)


@pytest.mark.parametrize("layer", ["1x1 narrow", "1x1 widen", "3x3 stage 1", "3x3 stage 4", "3x3 one image"])
def test_every_candidate_config(layer: str) -> None:
    from fused_resnet.backends.triton import configs, prologue

    for kernel in (prologue.CONV, prologue.PRODUCTS):
        for config in candidates(kernel, layer):
            with configs.override(kernel, config):
                check(layer, torch.bfloat16)


def candidates(kernel: str, layer: str) -> list[dict[str, int]]:
    """Of all its primitives."""
    from fused_resnet.backends.triton import configs, prologue

    N, C, size, K, taps, stride = LAYERS[layer]
    rows, dense = prologue.power_of_two(N * size * size), taps == stride == 1
    key = prologue.Problem("bfloat16", "ieee", True, taps * taps, max(C, K), max(C, K), rows, False, dense)
    return configs.candidates(kernel, key, configs.target(torch.empty(0, device="cuda")))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layer", ["1x1 eights", "1x1 one image", "1x1 many tiles"])
def test_persistent_programs(layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, also where they read other tensors than when their graph was captured; not taken where TMA cannot read."""
    from fused_resnet.backends.triton import configs, prologue

    found = [config for config in candidates(prologue.CONV, layer) if config["PERSISTENT"]]
    if not found:
        pytest.skip("there is no persistent kernel for this GPU")
    kernels: list[str] = []
    launch = prologue.launch

    def noting(kernel: Any, *args: Any, **meta: Any) -> None:
        kernels.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(prologue, "launch", noting)
    args = calls(layer, dtype)["prologue_conv_forward"]
    x, misplaced = args[0], torch.empty(args[0].numel() + 1, dtype=dtype, device="cuda")[1:]
    for config in found:
        with configs.override(prologue.CONV, config):
            check(layer, dtype)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = results(backend.prologue_conv_forward(*args))
            x.normal_()
            graph.replay()
            eager = results(backend.prologue_conv_forward(*args))
            assert "prologue_conv_kernel" not in kernels
            assert all(torch.equal(one, two) for one, two in zip(captured, eager, strict=True))
            other = misplaced.view(*x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
            out = backend.prologue_conv_forward(other, *args[1:])[0]
            assert kernels.count("prologue_conv_kernel") == 1
            assert parity.compare("misplaced", out, eager[0], reference.prologue_conv_forward(*exact(args))[0]).ok
        kernels.clear()


@pytest.mark.parametrize(("batch", "size"), [(8, 28), (1, 7)])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_blocks_train_as_torchs(kind: str, batch: int, size: int) -> None:
    """A step of a whole block, captured as a CUDA graph as well."""
    torch.manual_seed(0)
    width: dict[str, Any] = {"groups": 32, "base_width": 4} if kind == "grouped" else {}
    block: Any = fr.BasicBlock(64, 64) if kind == "basic" else fr.Bottleneck(256, 64, **width)
    block = block.cuda().to(torch.bfloat16).to(memory_format=torch.channels_last)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.float()
    plain, truth = fr.restore(copy.deepcopy(block)), fr.restore(copy.deepcopy(block)).double()
    x = torch.randn(batch, 64 if kind == "basic" else 256, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)

    def step(net: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        names, parameters = zip(*net.named_parameters(), strict=True)
        out = net(x)
        grads = torch.autograd.grad(out, (x, *parameters), grad)
        return dict(zip(("out", "x", *names), (out.detach(), *grads), strict=True))

    with fr.use_backend("triton"), fr.use_plan(gram=True, prologue=True):
        ours = step(block, x, grad)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(block, x, grad)
        graph.replay()
    right, theirs = step(truth, x.double(), grad.double()), step(plain, x, grad)
    worst = max(parity.compare(key, theirs[key], theirs[key], right[key]).torch for key in right)
    for key in right:
        row = parity.compare(key, ours[key], theirs[key], right[key], granted=worst)
        assert row.ok, row
        assert torch.equal(captured[key], ours[key]), key
