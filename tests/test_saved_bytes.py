"""What training keeps for the backward pass, beside torchvision: counted on fake tensors, for batches of 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fused_resnet as fr
from fused_resnet import modules
from fused_resnet.cli import load_benchmarks
from fused_resnet.ops import checks

saved_by = load_benchmarks("saved").saved_by

BATCH, SIZE = 256, 224
# "balanced" where each conv takes the form that keeps least, and "low"
BOUNDS = {
    "resnet18": (0.75, 0.40),
    "resnet34": (0.75, 0.40),
    "resnet50": (0.55, 0.35),
    "resnet101": (0.55, 0.35),
    "resnet152": (0.55, 0.35),
}


def kept(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that a forward pass saves for the backward pass, weights in `dtype`."""
    for module in model.train().modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().to(dtype, memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight)  # `to` fails on fake parameters
        elif isinstance(module, nn.Linear):
            module.weight, module.bias = (nn.Parameter(p.detach().to(dtype)) for p in (module.weight, module.bias))
    x = torch.empty((BATCH, 3, SIZE, SIZE), dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
    return saved_by(model, x)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without values that pass for plain ones; asked, they say no: no variance has lost its digits."""
    for module in (checks, modules):
        monkeypatch.setattr(module, "_PLAIN", {*module._PLAIN, FakeTensor})
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: False, raising=False)
    with FakeTensorMode(), fr.use_backend("reference"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_networks_keep_less(torchvision: ModuleType, fake: None, name: str, dtype: torch.dtype) -> None:
    build: Callable[[], nn.Module] = getattr(torchvision.models, name)
    plain = kept(build(), dtype)
    for prologue in (False, True):
        for memory, bound in zip(("balanced", "low"), BOUNDS[name], strict=True):
            with fr.use_plan(gram=True, prologue=prologue, stored=True):
                share = kept(getattr(fr, name)(memory=memory), dtype) / plain
            print(f"{name} {dtype} prologue={prologue} {memory}: {share:.3f}")
            assert share <= bound
