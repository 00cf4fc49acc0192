"""The models that people have, fused: expected fusions, one float64 training step tensor by tensor, and inference.

A fast part runs in `make test`; `make test-zoo` sets FUSED_RESNET_ZOO and runs them all.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import GIVEN, INFERENCE, TRAINING, primitives, randomise, relative, units_run
from same import step, tensors
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import whole
from fused_resnet.cli import load_benchmarks
from fused_resnet.convert import unfused_units

zoo = load_benchmarks("zoo")
ZOO = zoo.ZOO
FAST = (
    "torchvision:resnet18",
    "torchvision:googlenet",
    "torchvision:video.r3d_18",
    "timm:resnet26d",
    "mmdetection's bottlenecks",
    "nn.Sequential blocks",
    "unet",
    "yolo",
)
NAMES = tuple(ZOO) if os.environ.get("FUSED_RESNET_ZOO") else (*FAST, "medical")


@pytest.fixture
def model(
    request: pytest.FixtureRequest, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[nn.Module]:
    name = request.param
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    # torchvision's extension is built for another torch, and compiling its roi_align takes longer than the test.
    monkeypatch.setattr(torchvision.ops.boxes, "nms", zoo.nms)
    made = ZOO[name].make()
    randomise(made)
    with torch.compiler.set_stance("force_eager"):
        yield made


def assert_same_results(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Of a float64 step; a detector computes some of its targets in float32."""
    assert ours.keys() == theirs.keys()
    scale = max(t.norm().item() for name, t in theirs.items() if name.startswith("gradient"))
    for name, tensor in theirs.items():
        if not tensor.is_floating_point():
            assert torch.equal(ours[name], tensor), name
            continue
        size = max(tensor.double().norm().item(), 1e-5 * scale if name.startswith("gradient") else 0.0)
        error = (ours[name].double() - tensor.double()).norm().item() / (size or 1.0)
        assert error <= (1e-9 if tensor.dtype == torch.float64 else 1e-5), f"{name}: {error:.1e}"


class CountedBlocks:
    """How many residual blocks ran as one op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, whole.residual_block

        def run(*args: Any) -> Tensor:
            self.count += 1
            return real(*args)

        monkeypatch.setattr(whole, "residual_block", run)


@needs_cpp
@pytest.mark.parametrize(("name", "model"), [(name, name) for name in NAMES], indirect=["model"], ids=NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_zoo(name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO[name]
    before = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    report = fr.fuse(model, memory="low")
    assert (len(report.fused), len(report.blocks), len(report.skipped)) == entry[2:5], str(report)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    x = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))

    blocks = CountedBlocks(monkeypatch)
    layout: Any = torch.channels_last if entry.blocks else torch.contiguous_format
    doubles = [copy.deepcopy(m).double().to(memory_format=layout).train() for m in (model, before)]
    x64 = x.double().to(memory_format=layout)
    with primitives(monkeypatch) as ran:
        ours = step(doubles[0], x64)
    assert blocks.count == entry.blocks
    joined = sum(what == "add + ReLU" for _, what in report.fused)
    frozen = "frozen" in name
    assert units_run(ran, {**TRAINING, **GIVEN} if frozen else TRAINING) >= len(report.fused) - joined
    assert ran["add_relu_forward"] >= joined
    assert_same_results(ours, step(doubles[1], x64))

    model.eval()
    before = fr.restore(copy.deepcopy(model))
    with torch.no_grad(), primitives(monkeypatch) as ran:
        ours_out = tensors(model(x))
    if name != "torchvision:googlenet":  # its auxiliary heads train only
        assert units_run(ran, {**INFERENCE, **GIVEN, **TRAINING}) >= len(report.fused) - joined
    with torch.no_grad():
        theirs_out, exact = tensors(before(x)), tensors(before.double()(x.double()))
    for a, b, c in zip(ours_out, theirs_out, exact, strict=True):
        assert relative(a, c) <= 2 * relative(b, c) + 4 * torch.finfo(torch.float32).eps
    assert unfused_units(model) == []

    classes = [type(m) for m in before.modules()]
    fr.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_fusion" in m.__dict__ for m in model.modules())
