"""The benchmark's unfused rival is torchvision's network: same parameters from one seed, same numbers, same keys."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import fused_resnet
from fused_resnet.cli import MODELS, load_benchmarks

plain = load_benchmarks("plain_resnet")
SMALL = ("resnet18", "resnet50", "resnext50_32x4d")  # each kind of block; the rest is depth and width


def test_the_family_is_complete() -> None:
    assert tuple(plain.FAMILY) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_torchvisions(name: str, torchvision: ModuleType) -> None:
    with torch.device("meta"):
        ours, theirs = plain.plain_resnet(name), getattr(torchvision.models, name)()
        fused = getattr(fused_resnet, name)()
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert {key: value.shape for key, value in fused.state_dict().items()} == shapes
    assert list(ours.state_dict()) == list(shapes)


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_network(name: str, torchvision: ModuleType) -> None:
    torch.manual_seed(3)
    ours = plain.plain_resnet(name, num_classes=7)
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    for (key, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x = torch.randn(2, 3, 40, 40)
    a, b = ours.train()(x), theirs.train()(x)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(p, q), key
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_it_shares_no_code_with_ours() -> None:
    ours = {cls for module in plain.plain_resnet("resnet50").modules() for cls in type(module).__mro__}
    assert not [
        cls for cls in ours if cls.__module__.startswith("fused_resnet.") and "benchmarks" not in cls.__module__
    ]
    assert all(cls.__module__.startswith(("torch.", "builtins", plain.__name__)) for cls in ours)
