"""torch.ao's quantisation of fused models, and fuse on models that it has prepared: nothing of it is bypassed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import images, randomise
from torch import Tensor, nn
from torch.ao import quantization

import fused_resnet as fr
from fused_resnet.convert import unfused_units

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    """A stem and a residual block between the stubs that torch.ao asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.end = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.dequant(self.bn2(self.conv2(y)))
        return self.end(y + self.dequant(x))


def net(engine: str = "x86") -> Any:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no quantised kernels for {engine}")
    torch.manual_seed(0)
    model: Any = Net()
    randomise(model)
    model.qconfig = quantization.get_default_qat_qconfig(engine)
    return model


def observed(model: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in model.named_buffers() if "min_val" in name or "max_val" in name]


def step(model: nn.Module) -> list[Tensor]:
    """Outputs, gradients and all buffers of a training step."""
    model.train().zero_grad()
    out = model(images(4, 6, 9, 7))
    out.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.detach(), *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("first", ["fuse", "prepare"])
def test_training_with_observers(first: str) -> None:
    """Every observer sees what it saw, to the last bit, whichever came first."""
    ours, theirs = net(), net()
    if first == "fuse":
        assert len(fr.fuse(ours).fused) == 3
        ours = quantization.prepare_qat(ours.train())
    theirs = quantization.prepare_qat(theirs.train())
    if first == "prepare":
        ours = quantization.prepare_qat(ours.train())
        report = fr.fuse(ours)
        assert [what for _, what in report.fused] == ["add + ReLU"]
        assert all("hook is set on its batch norm" in why for _, why in report.skipped)
        assert len(report.skipped) == 2
    for _ in range(2):
        for a, b in zip(step(ours), step(theirs), strict=True):
            assert torch.equal(a, b)
    assert len(observed(ours)) >= 8
    assert any(seen.numel() and bool((seen != 0).any()) for seen in observed(ours))


@pytest.mark.parametrize("first", ["fuse", "prepare", "convert"])
def test_converted(first: str) -> None:
    """Quantised modules are called as they are."""
    ours, theirs = net(), net()
    for model in (ours, theirs):
        model.qconfig = quantization.get_default_qconfig("x86")
        if model is ours and first == "fuse":
            fr.fuse(model)
        quantization.prepare(model.eval(), inplace=True)
        if model is ours and first == "prepare":
            fr.fuse(model)
        with torch.no_grad():
            model(images(4, 6, 9, 7))
        quantization.convert(model, inplace=True)
        assert "quantized" in type(model.conv1).__module__
    if first == "convert":
        report = fr.fuse(ours)
        assert all("is not a batch norm that fusion knows" in why for _, why in report.skipped)
        assert len(report.skipped) == 2
    with torch.no_grad():
        assert torch.equal(ours(images(4, 6, 9, 7)), theirs(images(4, 6, 9, 7)))


def test_restored_after_all() -> None:
    """Quantisation without fused modules is what `restore` leads back to."""
    ours, theirs = net(), net()
    fr.fuse(ours)
    fr.restore(ours)
    ours, theirs = (quantization.prepare_qat(copy.deepcopy(m).train()) for m in (ours, theirs))
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert unfused_units(ours) == []
