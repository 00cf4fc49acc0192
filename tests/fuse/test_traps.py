"""Forwards made to mislead: each is fused correctly, or left alone with its reason, and never silently wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import images
from same import assert_fuses_as_itself, assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.convert import unfused_units


class Base(nn.Module):
    """Two units and a stateless ReLU; `X` has as many channels in as out."""

    def __init__(self, **bn: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, **bn)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, **bn)
        self.relu = nn.ReLU(inplace=True)
        self.plain = nn.ReLU()
        self.flag, self.count, self.kept = True, 0, []
        self.run: Callable[..., Any] = None  # type: ignore[assignment]


def X() -> Tensor:
    return images(4, 6, 9, 7)


def trap(*fused: str, skipped: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Registers a forward, the units that fuse finds in it, and the reason that stands in the report."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        TRAPS[forward.__name__] = (type(forward.__name__, (Base,), {"forward": forward}), fused, skipped)
        return forward

    return register


TRAPS: dict[str, tuple[type[Base], tuple[str, ...], str | None]] = {}
CBR, CB, CBAR, BR, AR = "conv + BN + ReLU", "conv + BN", "conv + BN + add + ReLU", "BN + ReLU", "add + ReLU"


@trap(CBR, CBAR)
def block(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    y += x
    return self.relu(y)


@trap(CBAR)
def added_from_the_left(self: Any, x: Tensor) -> Tensor:
    return torch.relu(x + self.bn1(self.conv1(x)))


@trap(CBAR)
def torch_add(self: Any, x: Tensor) -> Tensor:
    return F.relu(torch.add(self.bn1(self.conv1(x)), x))


@trap(CBAR)
def methods(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x)).add_(x).relu_()


@trap(CB)
def add_with_alpha(self: Any, x: Tensor) -> Tensor:
    return torch.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


@trap("conv + BN + add")
def no_relu(self: Any, x: Tensor) -> Tensor:
    return self.bn1(self.conv1(x)) + x


@trap(CB)
def added_number(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn1(self.conv1(x)) + 0.5)


@trap(CB)
def doubled(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y + y)


@trap(CB)
def doubled_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    y += y
    return torch.relu(y)


@trap(CB, CB)
def relu_in_place_on_a_tensor_used_later(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    z = self.relu(y)
    return self.bn2(self.conv2(z)) * y


@trap(CB)
def bn_output_used_later(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) - y


@trap(BR)
def conv_output_used_elsewhere(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(x)
    return torch.relu(self.bn1(y)) + y.mean()


@trap(BR)
def conv_output_written_to(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(x)
    y.mul_(2)
    return torch.relu(self.bn1(y))


@trap(BR)
def input_written_to_between_conv_and_bn(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv1(x)
    x.mul_(2)
    return torch.relu(self.bn1(y)) + x


@trap(CBAR)
def shortcut_adds_in_place(self: Any, x: Tensor) -> Tensor:
    identity = x * 2
    identity += self.bn1(self.conv1(x))
    return torch.relu(identity)


@trap(CB)
def adds_in_place_to_its_input(self: Any, x: Tensor) -> Tensor:
    x += self.bn1(self.conv1(x))
    return torch.relu(x)


@trap(CBR)
def writes_to_its_input(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn1(self.conv1(x)))
    x += y
    return y + x


@trap(CB)
def sum_in_place_under_two_names(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x)) * 2
    same = y.view(y.shape)
    y += x
    return torch.relu(y) - same


@trap(CB, AR)
def sum_in_place_under_one_name(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x)) * 2
    y += x
    return torch.relu(y)


@trap(CBR)
def sum_in_place_of_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn1(self.conv1(x)))
    part = y[:, :3]
    part += x[:, :3]
    return torch.relu(part).sum() + y


@trap(CBR, CBR)
def one_conv_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn2(self.conv1(self.relu(self.bn1(self.conv1(x))))))


@trap(CBR, CBR)
def one_bn_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


@trap(CB, CB)
def one_bn_twice_out_of_order(self: Any, x: Tensor) -> Tensor:
    """As one op at its ReLU, the first use would come after the second, and the running statistics with it."""
    a = self.bn1(self.conv1(x))
    b = self.bn1(self.conv2(x))
    return torch.relu(a) * torch.sigmoid(b)


@trap(CBR, CBR)
def all_relus(self: Any, x: Tensor) -> Tensor:
    return torch.relu_(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), True))))


@trap(CB, CB)
def other_activations(self: Any, x: Tensor) -> Tensor:
    return F.hardswish(self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x))))))


@trap(CBR, CB)
def part_of_the_output(self: Any, x: Tensor) -> Any:
    y = self.relu(self.bn1(self.conv1(x)))
    z = self.bn2(self.conv2(y))
    return {"y": y, "z": z, "relu": torch.relu(z)}


@trap(CBR)
def slice_of_bn(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x)))[:, ::2]


@trap(CBR)
def both_modes_differ(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if self.training else torch.tanh(y)


@trap(CBR)
def dropout_by_mode(self: Any, x: Tensor) -> Tensor:
    return F.dropout(torch.relu(self.bn1(self.conv1(x))), 0.5, self.training)


@trap(CBR)
def asks_for_type_of_its_input(self: Any, x: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return torch.relu(self.bn1(self.conv1(x)))
    return self.bn1(self.conv1(x[0]))


@trap(CBR)
def compares_its_input_with_none(self: Any, x: Tensor) -> Tensor:
    return x if x is None else torch.relu(self.bn1(self.conv1(x)))


@trap(CBR, CBAR)
def helper_methods_and_closures(self: Any, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(y)))))

    return self.relu(inner(x) + x)


# What cannot be followed


@trap(skipped="decides by a value")
def branches_on_values(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if y.mean() > 0 else y


@trap(skipped="decides by a value")
def branches_on_shapes(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if x.shape[0] == 4 else y


@trap(skipped="sets an attribute")
def counts_its_calls(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return torch.relu(self.bn1(self.conv1(x))) * self.count


@trap(skipped="changes what it reads")
def keeps_features(self: Any, x: Tensor) -> Tensor:
    y = torch.relu(self.bn1(self.conv1(x)))
    self.kept.append(1)
    return y * len(self.kept)


@trap(skipped="torch's rand")
def draws(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn1(self.conv1(x))) * torch.rand(1)


@trap(CBR)
def draws_anew_in_each_call(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.bn1(self.conv1(x))) * torch.rand_like(x)


@trap(skipped="calls random")
def draws_with_python(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if random.random() < 2 else y


@trap(skipped="uses `print`")
def prints(self: Any, x: Tensor) -> Tensor:
    print("called")
    return torch.relu(self.bn1(self.conv1(x)))


@trap(skipped="context")
def no_grad_inside(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.bn1(self.conv1(x))
    return torch.relu(y) + x


@trap(skipped="is_grad_enabled")
def asks_for_grad_mode(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if torch.is_grad_enabled() else -y


@trap(skipped="checkpoint")
def checkpoints(self: Any, x: Tensor) -> Tensor:
    return torch.relu(checkpoint(self.bn1, checkpoint(self.conv1, x, use_reentrant=False), use_reentrant=False))


@trap(skipped="exceptions")
def catches(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    try:
        return torch.relu(y) if bool(y.sum() > -1e9) else y
    except Exception:
        return y


@trap(skipped="tests what")
def compares_a_result_with_none(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    if y is None:
        return x
    return torch.relu(y)


@trap(skipped="tests what")
def asks_for_identity(self: Any, x: Tensor) -> Tensor:
    y = self.plain(x)
    z = torch.relu(self.bn1(self.conv1(x)))
    return z if y is x else z * 2


@trap(skipped="type")
def asks_for_type_of_a_result(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if isinstance(y, Tensor) else y[0]


FLAGS = SimpleNamespace(on=True)
ufunc = np.absolute
ON = True


@trap(skipped="FLAGS")
def reads_a_global_object(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if FLAGS.on else y


@trap(skipped="a tensor that is neither")
def decides_by_a_constant(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if self.constant else y


@trap(skipped="past its class")
def reads_past_its_class(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if self.__dict__["flag"] else y


@trap(skipped="uses `ufunc`, which nothing")
def calls_what_no_profiler_sees(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if ufunc(-3) == 3 else y


# Autograd itself refuses the backward pass of these: they write to what a conv or a ReLU keeps for it.
NO_BACKWARD = {
    "input_written_to_between_conv_and_bn",
    "adds_in_place_to_its_input",
    "writes_to_its_input",
    "sum_in_place_of_a_view",
}
STATEFUL = {
    "counts_its_calls",
    "keeps_features",
    "draws",
    "draws_anew_in_each_call",
}  # another precision is another result


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    kind, fused, skipped = TRAPS[name]
    model = kind()
    model.__dict__["constant"] = torch.tensor(3.0, dtype=torch.float64)
    report = assert_fuses_as_itself(model, X(), gradients=name not in NO_BACKWARD, stateful=name in STATEFUL)
    assert sorted(what for _, what in report.fused) == sorted(fused), str(report)
    assert all(why for _, why in report.skipped)
    if skipped is not None:
        assert report.skipped
        assert all(skipped in why for name, why in report.skipped if name == "bn1"), str(report)
        assert not isinstance(model, fr.modules.FusedModule)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norms_options(options: dict[str, Any]) -> None:
    report = assert_fuses_as_itself(TRAPS["block"][0](**options), X())
    assert len(report.fused) == 2


# State that changes after fuse


def changed(name: str, change: Callable[[Any], Any]) -> tuple[nn.Module, nn.Module]:
    """(fused and then changed, changed but never fused)."""
    ours, theirs = (TRAPS[name][0]().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fr.fuse(ours)
    assert fr.fuse(ours).fused
    for model in (ours, theirs):
        torch.manual_seed(3)
        change(model)
    return ours, theirs


def reads_flags(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    return torch.relu(y) if self.flag and ON else y * 3


trap(CBR)(reads_flags)
HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda mod, args, out: out * 1.5),
    "pre": lambda m: m.register_forward_pre_hook(lambda mod, args: (args[0] * 1.5,)),
    "backward": lambda m: m.register_full_backward_hook(lambda mod, gin, gout: tuple(g * 1.5 for g in gin)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda mod, gout: tuple(g * 1.5 for g in gout)),
}


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def replace(model: Any, name: str, child: nn.Module) -> None:
    setattr(model, name, child.double())


def half(m: Any) -> None:
    m.bn1.forward = lambda x: x / 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5),
    "weight norm": lambda m: parametrizations.weight_norm(m.conv1),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.conv1),
    "old spectral norm": lambda m: nn.utils.spectral_norm(m.conv1),
    "subclassed conv": lambda m: setattr(m.conv1, "__class__", Halved),
    "replaced relu": lambda m: replace(m, "relu", nn.LeakyReLU(0.3)),
    "replaced bn": lambda m: replace(m, "bn1", nn.GroupNorm(2, 6)),
    "replaced conv": lambda m: replace(m, "conv2", nn.Conv2d(6, 6, 5, padding=2, padding_mode="circular")),
    "instance norm": lambda m: replace(m, "bn2", nn.InstanceNorm2d(6)),
    "identity": lambda m: replace(m, "bn1", nn.Identity()),
    "patched forward": half,
    "frozen statistics": lambda m: m.bn1.eval(),
    "frozen weights": lambda m: m.conv1.requires_grad_(False),
    "no momentum": lambda m: setattr(m.bn1, "momentum", None),
    "LoRA": lambda m: replace(m, "conv1", LoRA(m.conv1)),
    "shared conv": lambda m: setattr(m, "conv2", m.conv1),
    "shared bn": lambda m: setattr(m, "bn2", m.bn1),
    "shared weight": lambda m: setattr(m.conv2, "weight", m.conv1.weight),
    "old weight norm": lambda m: nn.utils.weight_norm(m.conv1),
    "orthogonal": lambda m: parametrizations.orthogonal(m.conv1),
    "sync": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
    "another eps": lambda m: setattr(m.bn1, "eps", 0.1),
    "another stride": lambda m: (setattr(m.conv1, "stride", (1, 1)), setattr(m.conv1, "padding", 1)),
    "no tracking": lambda m: setattr(m.bn1, "track_running_stats", False),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fuse(change: str, mode: bool) -> None:
    ours, theirs = (m.train(mode) for m in changed("block", CHANGES[change]))
    if change == "frozen statistics":
        ours.bn1.eval(), theirs.bn1.eval()
    for _ in range(2):
        assert_same(ours, theirs, X().double())
    fr.fuse(ours)
    assert_same(ours, theirs, X().double())
    fr.restore(ours)
    assert_same(ours, theirs, X().double())


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "conv2", "bn2", ""])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str, child: str) -> None:
    """On any child, set before or after fuse, and taken away again."""
    ours, theirs = changed("helper_methods_and_closures", lambda m: None)
    ours.relu.inplace = theirs.relu.inplace = False  # backward hooks refuse in-place modules
    for first in ("hook", "fuse"):
        handles = [HOOKS[kind](m.get_submodule(child)) for m in (ours, theirs)]
        if first == "hook":
            fr.restore(ours)
            report = fr.fuse(ours)
            assert len(report.fused) + len(report.skipped) >= 2
        assert_same(ours, theirs, X().double())
        for handle in handles:
            handle.remove()
        fr.fuse(ours)
        assert_same(ours, theirs, X().double())
        assert unfused_units(ours) == []


def test_attributes_that_the_forward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = changed("reads_flags", lambda m: None)
    assert_same(ours, theirs, X().double())
    ours.flag = theirs.flag = False
    assert_same(ours, theirs, X().double())
    assert "has changed since fuse" in unfused_units(ours)[0][1]
    ours.flag = theirs.flag = True
    assert_same(ours, theirs, X().double())
    assert unfused_units(ours) == []
    monkeypatch.setitem(globals(), "ON", False)
    assert_same(ours, theirs, X().double())
    assert unfused_units(ours)
    assert fr.fuse(ours).fused == [("bn1", CB)]
    assert_same(ours, theirs, X().double())


def test_classes_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = changed("block", lambda m: None)
    monkeypatch.setattr(type(theirs), "forward", lambda self, x: self.bn1(self.conv1(x)) * 7)
    assert_same(ours, theirs, X().double())


class Row(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize("kind", [nn.Sequential, Row])
def test_containers_that_grow(kind: Any) -> None:
    models = [kind(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()).double() for _ in range(2)]
    ours, theirs = models
    theirs.load_state_dict(ours.state_dict())
    assert len(fr.fuse(ours).fused) == 1
    for model in models:
        (model if kind is nn.Sequential else model.parts).append(nn.Softplus())
    assert_same(ours, theirs, X().double())
    for model in models:
        (model if kind is nn.Sequential else model.parts).insert(1, nn.Tanh())
    assert_same(ours, theirs, X().double())


def test_a_module_of_two_models() -> None:
    """It runs fused in both, correctly, until one of them is restored."""
    shared = TRAPS["block"][0]().double()
    a, b = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Conv2d(6, 6, 1).double(), shared)
    import copy

    before = copy.deepcopy(b)
    fr.fuse(a)
    assert_same(b, before, X().double())
    fr.restore(b)
    assert type(shared) is TRAPS["block"][0]


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)
        self.bn = self.again = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.again(self.conv(torch.relu(self.bn(self.conv(x))))))


def test_a_child_under_two_names() -> None:
    report = assert_fuses_as_itself(TwoNames(), X())
    assert report.fused == []
    assert "two names" in report.skipped[0][1]


class Optional(Base):
    def forward(self, x: Tensor, residual: Any = None, scale: float = 1.0) -> Tensor:
        y = self.bn1(self.conv1(x))
        if residual is not None:
            y = y + residual
        return torch.relu(y) * scale


def test_arguments_other_than_followed() -> None:
    import copy

    ours = Optional().double()
    theirs = copy.deepcopy(ours)
    assert fr.fuse(ours).fused == [("bn1", CBR)]
    x = X().double()
    assert_same(ours, theirs, x)
    assert unfused_units(ours) == []
    assert_same(ours, theirs, x, call=lambda m, x: m(x, x * 2))
    assert "last call" in unfused_units(ours)[0][1]
    assert_same(ours, theirs, x, call=lambda m, x: m(x, scale=2.0))
    assert_same(ours, theirs, x, call=lambda m, x: m(x=x))
    assert unfused_units(ours) == []
    assert_same(ours, theirs, x, call=lambda m, x: m(residual=x, x=x))


class CallsWithMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.many = Optional(), Many()

    def forward(self, x: Tensor) -> Tensor:
        return self.many([self.inner(x, x * 2), self.inner(x, residual=x)])


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(12)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.relu(self.bn(torch.cat(parts, 1)))


def test_arguments_as_the_caller_passes_them() -> None:
    """A child is followed with what its parent's forward passes: a second tensor, a list."""
    model = CallsWithMore()
    report = assert_fuses_as_itself(model, X())
    assert sorted(report.fused) == [("inner.bn1", CBAR), ("many.bn", BR)]
    assert unfused_units(model) == []


class LoRA(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class FakeQuantized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, torch.round(self.weight * 8) / 8, self.bias)


class Observed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.low = x.min().item()
        return x


def halved_by_a_hook(conv: nn.Module) -> nn.Module:
    conv.register_forward_hook(lambda module, args, out: out / 2)
    return conv


WRAPPED: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "LoRA": lambda: (LoRA(nn.Conv2d(6, 6, 3, padding=1)), nn.BatchNorm2d(6)),
    "QAT": lambda: (FakeQuantized(6, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "circular": lambda: (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)),
    "same": lambda: (nn.Conv2d(6, 6, 3, padding="same"), nn.BatchNorm2d(6)),
    "spectral": lambda: (parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1)), nn.BatchNorm2d(6)),
    "weight norm": lambda: (parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1)), nn.BatchNorm2d(6)),
    "hooked": lambda: (halved_by_a_hook(nn.Conv2d(6, 6, 3, padding=1)), nn.BatchNorm2d(6)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_convs_that_are_not_plain(name: str) -> None:
    conv, bn = WRAPPED[name]()
    report = assert_fuses_as_itself(nn.Sequential(conv, bn, nn.ReLU()), X())
    assert report.fused == [("1", BR)]


@pytest.mark.parametrize("bn", [nn.SyncBatchNorm, nn.InstanceNorm2d, type("Mine", (nn.BatchNorm2d,), {})])
def test_norms_that_are_not_plain(bn: Any) -> None:
    report = fr.fuse(nn.Sequential(nn.Conv2d(6, 6, 3), bn(6), nn.ReLU()))
    assert report.fused == []
    assert len(report.skipped) == (0 if bn is nn.InstanceNorm2d else 1)
    assert all("across processes" in why or "Mine is not" in why for _, why in report.skipped)


def test_observers_between() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), Observed(), nn.BatchNorm2d(6), nn.ReLU())
    report = assert_fuses_as_itself(model, X())
    assert report.fused == [("2", BR)]
    assert model[1].low
