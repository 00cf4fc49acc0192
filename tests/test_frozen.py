"""`freeze`: the same results from fewer calls, whatever the input's size, layout and thread."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.frozen import FrozenConv, FrozenModel
from fused_resnet.parity import compare


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def lively(model: nn.Module) -> nn.Module:
    """Statistics and scales of a trained net, of both signs."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def assert_agrees(frozen: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
        ours = frozen(x)
    if x.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        return
    row = compare("out", ours.float(), plain.float(), exact, granted=2e-6)  # folded weights are rounded elsewhere
    assert row.ok, row


class Odd(nn.Module):
    """Convs without BN, with one that is shared, a residual that is read twice, functional and in-place forms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.bn = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.shared_bn = nn.BatchNorm2d(8)
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.stateless = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.first(x)))
        y = self.shared_bn(self.shared(x)) + self.shared_bn(self.shared(x * 0.5))
        z = torch.relu(self.a(y) + self.b(y))  # both operands are convs
        w = self.c(z).add_(z).relu_()  # z is read again
        return torch.relu(w + z) + self.stateless(self.c(w))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: fr.resnet18(num_classes=7),
    "resnet50": lambda: fr.resnet50(num_classes=7),
    "resnet50d, groups": lambda: fr.resnet50d(num_classes=7, groups=2),
    "cifar, option A": lambda: fr.cifar_resnet20(),
    "preact": lambda: fr.preact_resnet18(num_classes=7),
    "odd": Odd,
}


@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_models(name: str) -> None:
    dtype = torch.float64 if name == "odd" else torch.float32  # batch statistics magnify roundings
    model = lively(MODELS[name]()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    frozen = fr.freeze(model)
    for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 75, 53), (1, 3, 64, 64)):
        if name == "cifar, option A":
            shape = (*shape[:2], 32, 32)
        assert_agrees(frozen, model, images(*shape, dtype=dtype))
        assert_agrees(frozen, model, images(*shape, dtype=dtype).to(memory_format=torch.channels_last))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_fused() -> None:
    frozen = fr.freeze(fr.resnet50())
    assert isinstance(frozen, FrozenModel)
    assert [what for _, what in frozen.fused].count("conv + add + relu") == 16
    assert [what for _, what in frozen.fused].count("conv + relu") == 32
    assert dict(frozen.fused)["conv1"] == "conv + relu + max pool"
    assert [what for _, what in frozen.fused].count("conv") == 4
    assert not frozen.skipped
    convs = [module for module in frozen.modules() if isinstance(module, FrozenConv)]
    assert sum(conv.overwrites for conv in convs) == 16
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.ReLU, nn.Conv2d)) for module in frozen.modules())
    assert "conv + add + relu" in dict(frozen.fused).values()


def test_what_cannot_be_folded_is_named() -> None:
    frozen: Any = fr.freeze(lively(Odd()))
    assert frozen.skipped == [
        ("shared_bn", "its conv is called more than once"),
        ("shared_bn", "its conv is called more than once"),
        ("stateless", "it has no running statistics"),
    ]


class InPlace(nn.Module):
    """Writes in place whose results nobody names, and a sum that is read under its operand's name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.kind, self.relu, self.pool = kind, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.kind == "method":
            y.relu_()
        elif self.kind == "function":
            torch.relu_(y)
        elif self.kind == "module":
            self.relu(y)
        elif self.kind == "add_":
            y.add_(1)
        elif self.kind == "input written":  # between a conv and the addition behind it
            z = self.other(y)
            w = y + 1
            y.mul_(3)
            return torch.relu(z + w)
        elif self.kind == "written before the pool":
            z = torch.relu(self.other(y))
            y.mul_(3)
            return self.pool(z) + y.mean()
        elif self.kind == "named twice":
            z = y
            y += self.other(z)
            return torch.relu(y) + z
        return y


@pytest.mark.parametrize("convert", [fr.to_plain, fr.freeze])
@pytest.mark.parametrize(
    "kind", ["method", "function", "module", "add_", "input written", "written before the pool", "named twice"]
)
def test_writes_in_place_stay(kind: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    model = lively(InPlace(kind))
    assert_agrees(convert(model), model, images(2, 3, 8, 8))


def test_torchvision(torchvision: ModuleType) -> None:
    model = lively(torchvision.models.resnet34(num_classes=5))
    frozen: Any = fr.freeze(model)
    assert len(frozen.fused) == 36
    assert_agrees(frozen, model, images(2, 3, 96, 96))
    fused = copy.deepcopy(model)
    fr.fuse(fused)
    assert fr.freeze(fused).fused == frozen.fused  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = lively(fr.resnet18(num_classes=7)).to(dtype)
    assert_agrees(fr.freeze(model), model, images(2, 3, 64, 64, dtype=dtype))


def test_autocast() -> None:
    model = lively(fr.resnet18(num_classes=7))
    frozen, x = fr.freeze(model), images(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_agrees(frozen, model, x)
    assert_agrees(frozen, model, x)  # and float32 again


def test_threads_and_memory() -> None:
    """Several threads with other sizes at once; 200 calls keep no more than the first."""
    model = lively(fr.resnet18(num_classes=7))
    frozen = fr.freeze(model)
    sizes = [(1, 3, 32 + 16 * i, 48) for i in range(4)]
    with torch.no_grad():
        expected = [model(images(*size)) for size in sizes]
        wrong: list[int] = []

        def run(index: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    out = frozen(images(*sizes[index]))
                    if not torch.allclose(out, expected[index], rtol=1e-4, atol=1e-4):
                        wrong.append(index)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        for count in range(200):
            frozen(images(1, 3, 32, 32 + count % 100))
    for conv in frozen.modules():
        if isinstance(conv, FrozenConv):
            assert len(conv._calls) <= 64
            assert len(conv._packed) <= 3


def test_input_is_left_alone_and_gradients_are_refused() -> None:
    frozen = fr.freeze(fr.resnet18())
    x = images(1, 3, 64, 64).to(memory_format=torch.channels_last)
    before = x.clone()
    frozen(x)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen(x.requires_grad_())
    with pytest.raises(ValueError, match="3 channels"):
        frozen(images(1, 4, 64, 64))


def test_copies_and_files() -> None:
    model = lively(fr.resnet18(num_classes=7))
    frozen, x = fr.freeze(model), images(2, 3, 64, 64)
    with torch.no_grad():
        expected = frozen(x)
        assert torch.equal(copy.deepcopy(frozen)(x), expected)
        buffer = io.BytesIO()
        torch.save(frozen, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
        other = fr.freeze(fr.resnet18(num_classes=7))
        other(x)
        for p in other.parameters():
            p.zero_()
        other.load_state_dict(frozen.state_dict())
        assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="saved from an unfolded one"):
        frozen.load_state_dict(model.state_dict())


def test_compiles() -> None:
    frozen, x = fr.freeze(lively(fr.cifar_resnet20())), images(2, 3, 32, 32)
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-4, atol=1e-4)


def test_openvino() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    model = lively(fr.resnet18(num_classes=7))
    frozen = fr.freeze(model, engine="openvino")
    for shape in ((1, 3, 64, 64), (3, 3, 80, 64)):
        assert_agrees(frozen, model, images(*shape))
    assert_agrees(copy.deepcopy(frozen), model, images(1, 3, 64, 64))


def test_bad_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'tvm'; expected one of None, 'openvino'"):
        fr.freeze(fr.cifar_resnet20(), engine="tvm")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ImportError, match="needs the package openvino"):
        fr.freeze(fr.cifar_resnet20(), engine="openvino")
