"""Whole residual blocks of models that exist: found by structure, one op in training, and as good as our own blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import SMALL, images, randomise, step, twins
from same import assert_fuses_as_itself, assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fused_resnet as fr
from fused_resnet import plans, whole
from fused_resnet.cli import load_benchmarks
from fused_resnet.convert import unfused_units
from fused_resnet.ops.residual_block import Plan
from fused_resnet.parity import compare

saved_by = load_benchmarks("saved").saved_by
pytestmark = needs_cpp  # without it torch's own batch norm runs, and no block is one op


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    """The plans of the blocks that run as one op, in order."""
    seen: list[Plan] = []
    real = whole.residual_block

    def run(x: Tensor, units: Any, projection: Any, plan: Plan) -> Tensor:
        seen.append(plan)
        return real(x, units, projection, plan)

    monkeypatch.setattr(whole, "residual_block", run)
    return seen


@pytest.fixture(params=[1e9, 0.0], ids=["stored", "Gram"])
def gram(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether 1x1 convs take the Gram form, whatever their size."""
    monkeypatch.setattr(plans, "rules", lambda device: plans.Rules(request.param))
    return request.param == 0


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", ["balanced", "low", "fast"])
@pytest.mark.parametrize("name", SMALL)
def test_torchvision_as_our_own(name: str, memory: str, gram: bool, torchvision: ModuleType, ran: list[Plan]) -> None:
    """The same plans, the same results to the last bit, and the same bytes kept."""
    own, fused = twins(torchvision, name)
    for block in own.modules():
        if isinstance(block, fr.blocks.ResidualBlock):
            block.memory = memory
    own, fused = (m.to(memory_format=torch.channels_last).train() for m in (own, fused))
    plain = copy.deepcopy(fused)
    report = fr.fuse(fused, memory=memory)
    assert len(report.blocks) == sum(isinstance(m, fr.blocks.ResidualBlock) for m in own.modules())
    x = nhwc(images(4, 3, 32, 32))
    a = step(own, x)
    by_own = list(ran)
    ran.clear()
    b = step(fused, x)
    assert ran == by_own
    whole_ones = memory == "low" or (memory == "balanced" and gram and name != "basic")
    assert len(ran) == (len(report.blocks) if whole_ones else 0)
    assert a.keys() == b.keys()
    stem = {"conv1.weight", "bn1.weight", "bn1.bias"}  # ours pools in the same op, and rounds elsewhere
    for key, value in a.items():
        if key.removeprefix("gradient ") not in stem and key != "gradient input":
            assert torch.equal(b[key], value), key
    kept = [
        saved_by(stage, nhwc(images(4, stage[0].conv1.in_channels, 16, 16))) for stage in (own.layer1, fused.layer1)
    ]
    assert kept[0] == kept[1]
    if whole_ones:
        assert kept[1] < saved_by(plain.layer1, nhwc(images(4, plain.layer1[0].conv1.in_channels, 16, 16)))
    fr.restore(fused)
    ran.clear()
    step(fused, x)
    assert ran == []


class Basic(nn.Module):
    """Two convs as many write them by hand; subclasses join in other ways."""

    def __init__(self, inputs: int = 6, outputs: int = 6, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, 1, kernel // 2, bias=False)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ShortcutFirst(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Identities(Basic):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drop, self.aa = nn.Identity(), nn.Identity()
        self.shortcut = nn.Identity() if len(self.shortcut) == 0 else self.shortcut  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out = self.aa(F.relu(self.drop(self.bn1(self.conv1(x)))))
        return F.relu(self.drop(self.bn2(self.conv2(out))) + self.shortcut(x))


class ByNames(Basic):
    """As mmdetection's: norms under names that are looked up."""

    norm1_name, norm2_name = "bn1", "bn2"

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            if self.shortcut is not None:
                out += self.shortcut(x)
            return out

        return F.relu(inner(x))


class Twice(nn.Module):
    """Two blocks in one forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.c, self.d = (nn.Conv2d(6, 6, 1, bias=False) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bns[1](self.b(torch.relu(self.bns[0](self.a(x))))) + x)
        return torch.relu(x + self.bns[3](self.d(torch.relu(self.bns[2](self.c(x))))))


STYLES: list[type[nn.Module]] = [Basic, ShortcutFirst, Identities, ByNames]
SHAPES = {"identity": (6, 6, 1), "projection": (6, 10, 1), "stride 2": (6, 10, 2), "last 1x1": (6, 6, 1, 1)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("style", STYLES)
def test_blocks_by_hand(style: type[nn.Module], shape: str, gram: bool, ran: list[Plan]) -> None:
    model = style(*SHAPES[shape])
    randomise(model)
    model.double()
    before = copy.deepcopy(model)
    report = fr.fuse(model, memory="low")
    names = "bn1, bn2" + ("; projection shortcut.1" if SHAPES[shape][0] != SHAPES[shape][1] else "")
    assert report.blocks == [(style.__name__, names)], str(report)
    assert f"one op in training: {names}" in str(report)
    assert f"one op in training: {names}" in repr(model)
    assert "1 residual blocks whole" in str(report)
    x = nhwc(images(5, 6, 9, 7).double())
    for mode in (True, False):
        for m in (model, before):
            m.train(mode)
        for _ in range(2):
            assert_same(model, before, x)
    assert len(ran) == 4
    assert all(plan.gram is (gram and shape == "last 1x1") for plan in ran)
    assert_same(model, before, x.contiguous())
    with torch.no_grad():
        model(x)
    assert len(ran) == 4
    assert unfused_units(model) == []


def test_two_blocks_in_one_forward(ran: list[Plan]) -> None:
    model = Twice()
    report = assert_fuses_as_itself(model, nhwc(images(4, 6, 9, 7)))
    assert [what for _, what in report.blocks] == ["bns.0, bns.1", "bns.2, bns.3"]
    fr.fuse(model.train(), memory="low")
    ran.clear()
    model(nhwc(images(4, 6, 9, 7)).double()).sum().backward()
    assert len(ran) == 2


def middle_seen(self: Any, x: Tensor) -> Any:
    y = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(y)) + x), y


def other_shortcut(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + torch.sigmoid(x))


def something_between(self: Any, x: Tensor) -> Tensor:
    y = torch.relu(self.bn1(self.conv1(x)))
    z = torch.tanh(x)
    return torch.relu(self.bn2(self.conv2(y)) + x) * z


def no_last_relu(self: Any, x: Tensor) -> Tensor:
    return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x


def no_inner_relu(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def gated(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
    return torch.relu(y * torch.sigmoid(y.mean((2, 3), keepdim=True)) + x)


def one_unit(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn1(self.conv1(x)) + x)


def row_on_both_sides(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
    return torch.relu(y + self.shortcut[1](self.shortcut[0](torch.relu(x))))


NEARLY = (
    middle_seen,
    other_shortcut,
    something_between,
    no_last_relu,
    no_inner_relu,
    gated,
    one_unit,
    row_on_both_sides,
)


@pytest.mark.parametrize("forward", NEARLY, ids=lambda f: f.__name__)
def test_what_is_no_block(forward: Callable[..., Any], ran: list[Plan]) -> None:
    """Their units run fused all the same."""
    kind = type(forward.__name__, (Basic,), {"forward": forward})
    model = kind(*((6, 6, 1) if forward is not row_on_both_sides else (6, 8, 1)))
    report = assert_fuses_as_itself(model, nhwc(images(4, 6, 9, 7)))
    assert report.blocks == []
    assert report.fused
    assert ran == []


class SharedNorm(Basic):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def test_one_norm_twice_in_a_block(ran: list[Plan]) -> None:
    model = SharedNorm().double()
    before = copy.deepcopy(model)
    fr.fuse(model, memory="low")
    assert_same(model, before, nhwc(images(4, 6, 9, 7).double()))
    assert ran == []


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on a conv": lambda m: m.conv1.register_forward_hook(lambda mod, args, out: out * 1.5),
    "backward hook on a norm": lambda m: m.bn2.register_full_backward_hook(lambda mod, gin, gout: (gin[0] * 1.5,)),
    "hook on the projection's norm": lambda m: m.shortcut[1].register_forward_hook(lambda mod, args, out: out * 2),
    "hook on the projection": lambda m: m.shortcut.register_forward_hook(lambda mod, args, out: out * 2),
    "hook on an identity": lambda m: m.aa.register_forward_hook(lambda mod, args, out: out * 2),
    "replaced identity": lambda m: setattr(m, "aa", nn.Tanh()),
    "replaced projection": lambda m: m.shortcut.__setitem__(1, nn.InstanceNorm2d(10)),
    "longer projection": lambda m: m.shortcut.append(nn.Tanh()),
    "bias": lambda m: setattr(m.conv2, "bias", nn.Parameter(torch.randn(10, dtype=torch.float64))),
    "pruned": lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.conv1),
    "one norm for two": lambda m: setattr(m, "bn2", m.bn1),
    "no gradients": lambda m: m.requires_grad_(False),
    "another stride": lambda m: (setattr(m.conv1, "stride", (2, 2)), setattr(m.shortcut[0], "stride", (2, 2))),
}
STILL_WHOLE = {"another stride", "no gradients"}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fuse(change: str, ran: list[Plan]) -> None:
    ours = Identities(6, 10, 1).double()
    randomise(ours)
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    x = nhwc(images(4, 6, 9, 7).double())
    assert_same(ours, theirs, x)
    assert len(ran) == 1
    for model in (ours, theirs):
        torch.manual_seed(3)
        CHANGES[change](model)
    ran.clear()
    assert_same(ours, theirs, x)
    assert len(ran) == (change in STILL_WHOLE)


def test_partly_frozen(ran: list[Plan]) -> None:
    """Norms in evaluation, parameters without gradients."""
    ours = Basic(6, 10, 2).double()
    randomise(ours)
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    for model in (ours, theirs):
        model.bn1.eval()
        model.conv2.requires_grad_(False)
        model.shortcut.eval().requires_grad_(False)
    assert_same(ours, theirs, nhwc(images(4, 6, 9, 7).double()))
    assert len(ran) == 1


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_options_of_norms(options: dict[str, Any], ran: list[Plan]) -> None:
    ours = Basic(6, 10, 1)
    ours.bn1, ours.bn2, ours.shortcut[1] = (nn.BatchNorm2d(10, **options) for _ in range(3))
    ours.double()
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    for _ in range(2):
        assert_same(ours, theirs, nhwc(images(4, 6, 9, 7).double()))
    assert len(ran) == 2


def test_frozen_batch_norm(torchvision: ModuleType, gram: bool, ran: list[Plan]) -> None:
    """The detection case: one op, forward and backward."""
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    ours = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=16, norm_layer=frozen
    )
    randomise(ours)
    ours = ours.double().to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    assert_same(ours, theirs, nhwc(images(2, 3, 32, 32).double()))
    assert [plan.gram for plan in ran] == [gram] * 4


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 7), (3, 1, 7)], ids=str)
def test_small_batches(size: tuple[int, int, int], ran: list[Plan]) -> None:
    """One value per channel is torch's own error, and leaves the statistics as torch leaves them."""
    ours = Basic(6, 10, 1).double()
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    x = images(size[0], 6, *size[1:]).double().to(memory_format=torch.channels_last)
    if size == (1, 1, 1):
        for model in (ours, theirs):
            with pytest.raises(ValueError, match="more than 1 value"):
                model(x)
    else:
        assert_same(ours, theirs, x)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_shortcuts_that_broadcast_run_as_torch_runs_them(ran: list[Plan]) -> None:
    ours = ShortcutFirst(6, 6, 1).double()
    ours.conv1.stride = (9, 7)
    theirs = copy.deepcopy(ours)
    fr.fuse(ours, memory="low")
    assert_same(ours, theirs, nhwc(images(4, 6, 9, 7).double()))
    assert ran == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(dtype: torch.dtype, autocast: bool, gram: bool, ran: list[Plan]) -> None:
    model = nn.Sequential(Basic(6, 16, 2), Basic(16, 16, 1, 1))
    randomise(model)
    if not autocast:
        model.to(dtype)
    fr.fuse(model, memory="low")
    x = nhwc(images(6, 6, 20, 20).to(torch.float32 if autocast else dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert fr.verify(model, x, train=True).ok
    assert len(ran) == 2


def test_autocast_promotes_where_torch_does(ran: list[Plan]) -> None:
    """A float32 input added to a bfloat16 branch makes a float32 sum."""
    model = Identities(6, 6, 1)
    before = copy.deepcopy(model)
    fr.fuse(model, memory="low")
    x = nhwc(images(4, 6, 9, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == before(x).dtype == torch.float32
    assert ran == []


def test_copies_and_pickles(ran: list[Plan]) -> None:
    model = Basic(6, 10, 2).double()
    before = copy.deepcopy(model)
    fr.fuse(model, memory="low")
    x = nhwc(images(4, 6, 9, 7).double())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(made, copy.deepcopy(before), x)
    assert len(ran) == 2


def test_fusing_again_changes_the_memory(ran: list[Plan]) -> None:
    model = Basic().double()
    x = nhwc(images(4, 6, 9, 7).double())
    for memory, count in (("low", 1), ("fast", 1), ("balanced", 1), ("low", 2)):
        assert len(fr.fuse(model, memory=memory).blocks) == 1
        model(x).sum().backward()
        assert len(ran) == count
    with pytest.raises(ValueError, match="memory must be one of 'balanced', 'low', 'fast', got 'least'"):
        fr.fuse(model, memory="least")
    assert len(fr.fuse(Basic(6, 10, 1)).blocks) == 1


def test_compile(ran: list[Plan]) -> None:
    """Compiled, units are ops of a graph; blocks do not break it."""
    model = Basic(6, 10, 2).double()
    before = copy.deepcopy(model)
    fr.fuse(model, memory="low")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(model, before, nhwc(images(4, 6, 9, 7).double()), call=lambda m, x: (compiled if m is model else m)(x))
    assert ran == []


def test_budget_of_float32(gram: bool) -> None:
    """Single blocks against float64, tensor by tensor."""
    model = Basic(24, 40, 2, 1)
    randomise(model)
    x = nhwc(images(8, 24, 21, 19))
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fr.fuse(model, memory="low")
    ours, theirs, truth = step(model, x), step(plain, x), step(exact, x.double())
    granted = max(compare(key, theirs[key], theirs[key], truth[key]).torch for key in truth)
    for key in truth:
        row = compare(key, ours[key], theirs[key], truth[key], granted=granted)
        assert row.ok, row
