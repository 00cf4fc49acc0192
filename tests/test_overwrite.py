"""Inference writes a block's output over its shortcut where nobody else can see the shortcut, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from networks import images, randomise
from torch import Tensor, nn

from fused_resnet import BasicBlock, Bottleneck, ResNet, use_backend
from fused_resnet.backends import cpp, library

pytestmark = pytest.mark.skipif(library.unavailable("cpu") is not None, reason="this torch was built without oneDNN")

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _net(kind: str) -> ResNet:
    torch.manual_seed(0)
    net = ResNet(BLOCKS[kind], (2, 2, 1, 1), num_classes=7).eval()
    randomise(net)
    return net


@pytest.fixture
def overwritten(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The shortcuts that were written over."""
    seen: list[Tensor] = []

    def watch(backend: ModuleType) -> None:
        original = backend.conv_bias_act_onto_residual

        def spy(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *args: object) -> Tensor:
            seen.append(residual)
            out = original(x, weight, bias, residual, *args)
            assert out.data_ptr() == residual.data_ptr()
            return out

        monkeypatch.setattr(backend, "conv_bias_act_onto_residual", spy)

    watch(library)
    watch(cpp)
    return seen


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_every_block_writes_over_its_shortcut(kind: str, count: int, overwritten: list[Tensor]) -> None:
    net, x = _net(kind), images(count, 3, 64, 64)
    kept = x.clone()
    y = net(x)
    assert len(overwritten) == 6
    assert torch.equal(x, kept)
    with use_backend("reference"):
        torch.testing.assert_close(y, net(x), rtol=1e-3, atol=1e-3 * y.abs().max().item())
    assert len(overwritten) == 6


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_a_block_alone_leaves_its_input(kind: str, overwritten: list[Tensor]) -> None:
    net, x = _net(kind), images(2, 3, 64, 64)
    x = net.maxpool(net.bn1(net.conv1(x))).contiguous(memory_format=torch.channels_last)
    for call in (net.layer1[0], net.layer1, nn.Sequential(net.layer1, net.layer2)):
        kept, count = x.clone(), len(overwritten)
        call(x)
        assert torch.equal(x, kept)
        assert all(shortcut.data_ptr() != x.data_ptr() for shortcut in overwritten[count:])


def _keeps_outputs(kept: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    return lambda module, inputs, out: kept.append((out, out.clone()))


def _keeps_inputs(kept: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    return lambda module, inputs: kept.append((inputs[0], inputs[0].clone()))


# torch's own `relu(inplace=True)` and `out += identity` write over these.
_TORCH_OVERWRITES = ("bn1", "bn2", "bn3")


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_what_a_hook_keeps_stays(kind: str, overwritten: list[Tensor]) -> None:
    net, x = _net(kind), images(2, 3, 64, 64)
    expected = net(x)
    tolerance = 1e-4 * expected.abs().max().item()
    most = len(overwritten)
    for name, module in net.named_modules():
        for register, keeps in (
            ("register_forward_hook", _keeps_outputs),
            ("register_forward_pre_hook", _keeps_inputs),
        ):
            writes_over = isinstance(module, nn.ReLU) and register == "register_forward_pre_hook"
            if name.endswith(_TORCH_OVERWRITES) or writes_over:
                continue
            overwritten.clear()
            kept: list[tuple[Tensor, Tensor]] = []
            handle = getattr(module, register)(keeps(kept))
            y = net(x)
            handle.remove()
            assert kept, name
            assert all(torch.equal(now, then) for now, then in kept), f"{register} on {name or 'the net'}"
            torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
            assert len(overwritten) <= most


@torch.no_grad()
def test_an_identity_for_the_max_pool(overwritten: list[Tensor]) -> None:
    """The first block's input is then what the stem made, or what a hook keeps of it."""
    net = _net("basic")
    net.maxpool = nn.Identity()
    kept: list[tuple[Tensor, Tensor]] = []
    net.relu.register_forward_hook(_keeps_outputs(kept))
    net(images(2, 3, 32, 32))
    assert kept
    assert torch.equal(*kept[0])


def test_gradients_keep_everything(overwritten: list[Tensor]) -> None:
    net = _net("bottleneck")
    net(images(2, 3, 64, 64)).sum().backward()
    assert not overwritten
