"""Rule 5 of the design: what fusion bypasses must not be missed. And ConvBNAct, BNAct, AddReLU, restore."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import (
    GIVEN,
    INFERENCE,
    TRAINING,
    assert_close,
    assert_infers_as,
    assert_same,
    assert_same_step,
    assert_trains_as,
    images,
    infer,
    primitives,
    randomise,
    relative,
    step,
    twins,
    units_of,
    units_run,
)
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.func import grad as func_grad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet.convert import unfused_units

# What runs where


@needs_cpp
@pytest.mark.parametrize("net", ["basic", "bottleneck"])
def test_training_and_inference_take_the_fused_paths(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, net: str
) -> None:
    """Every conv + BN unit runs by a primitive of ours; torch's own batch norm and ReLU are never called."""
    ours, _ = twins(torchvision, net)
    units = units_of(ours)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module that fusion bypasses was called")

    with monkeypatch.context() as patch:
        for kind in (nn.BatchNorm2d, nn.ReLU):
            patch.setattr(kind, "forward", forbidden)
        with primitives(monkeypatch) as ran:
            out = ours(images(4, 3, 64, 64))
        assert units_run(ran, TRAINING) == units
        with primitives(monkeypatch) as ran:
            out.sum().backward()
        assert any(name.endswith("_backward") for name in ran)
        ours.eval()
        with primitives(monkeypatch) as ran:
            out = ours(images())
        assert units_run(ran, GIVEN) == units
        out.sum().backward()
        for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with primitives(monkeypatch) as ran, context():
                ours(images())
            assert ran.keys() <= INFERENCE.keys()
            assert units_run(ran, INFERENCE) == units
    assert unfused_units(ours) == []


def test_restored_models_run_unfused(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before any fusion: bit for bit torchvision's, in its layout."""
    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    keys = list(ours.state_dict())
    assert fr.restore(ours) is ours
    with primitives(monkeypatch) as ran:
        assert torch.equal(infer(ours, images()), infer(theirs, images()))
        mine, other = (step(model.train(), images(4, 3, 32, 32)) for model in (ours, theirs))
    assert not ran
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert list(ours.state_dict()) == keys
    assert {reason for _, reason in unfused_units(ours)} == {"restored"}
    assert not any(module.__dict__.get("_fused", False) for module in copy.deepcopy(ours).modules())


# Hooks

HOOKED = ("conv1", "bn1", "relu", "layer1.0.conv2", "layer1.0.bn3", "layer1.0.relu", "layer2.0.downsample",
          "layer2.0.downsample.0", "layer2.0.downsample.1", "layer3.0", "layer4", "maxpool", "avgpool")  # fmt: skip
# A module's hooks -> the units that run unfused for it.
UNFUSED = {
    "conv1": ["conv1"],
    "bn1": ["conv1"],
    "relu": ["conv1"],
    "layer1.0.conv2": ["layer1.0.conv2"],
    "layer1.0.bn3": ["layer1.0.conv3"],
    "layer1.0.relu": ["layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3"],
    "layer2.0.downsample": ["layer2.0.downsample"],
    "layer2.0.downsample.0": ["layer2.0.downsample"],
    "layer2.0.downsample.1": ["layer2.0.downsample"],
}


def _kinds() -> dict[str, Callable[[nn.Module, list[Any]], Any]]:
    def changed(_: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * 1.25 + 0.1

    return {
        "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
        "forward kwargs": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1), with_kwargs=True),
        "forward that changes the output": lambda m, seen: (seen.append(1), m.register_forward_hook(changed))[1],
        "pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
        "pre that changes the input": lambda m, seen: (
            seen.append(1),
            m.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,)),
        )[1],
    }


@pytest.mark.parametrize("kind", _kinds())
@pytest.mark.parametrize("name", HOOKED)
def test_forward_hooks(torchvision: ModuleType, kind: str, name: str) -> None:
    """They fire as often as torchvision's, see and change what they would there, and unfuse no more than they must."""
    ours, theirs = twins(torchvision, "bottleneck")
    seen: dict[int, list[int]] = {0: [], 1: []}
    handles = [_kinds()[kind](m.get_submodule(name), seen[i]) for i, m in enumerate((ours, theirs))]
    assert_infers_as(ours.eval(), theirs.eval())
    assert len(seen[0]) > 0
    assert seen[0] == seen[1][: len(seen[0])]
    assert [unit for unit, _ in unfused_units(ours)] == UNFUSED.get(name, [])
    for handle in handles:
        handle.remove()
    assert unfused_units(ours) == []
    assert_infers_as(ours, theirs)


@needs_cpp
@pytest.mark.parametrize("name", [*UNFUSED, "layer3.0"])
def test_hooked_units_alone_fall_back(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ours, _ = twins(torchvision, "bottleneck")
    ours.get_submodule(name).register_forward_hook(lambda *_: None)
    fused = units_of(ours) - len(UNFUSED.get(name, []))
    with primitives(monkeypatch) as ran:
        ours(images(4, 3, 64, 64))
    assert units_run(ran, TRAINING) == fused
    with primitives(monkeypatch) as ran:
        infer(ours.eval(), images())
    assert units_run(ran, INFERENCE) == fused


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_in_training(torchvision: ModuleType, name: str) -> None:
    """Activations that a forward hook records are those of torchvision, and so is all else."""
    recorded: list[list[Tensor]] = [[], []]
    results = []
    for model, seen in zip(twins(torchvision, "bottleneck"), recorded, strict=True):
        model.double().get_submodule(name).register_forward_hook(
            lambda m, i, o, seen=seen: seen.append(o.detach().clone())
        )
        results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
    assert_same_step(*results)
    assert len(recorded[0]) == len(recorded[1]) > 0
    for mine, other in zip(*recorded, strict=True):
        assert_same(name, mine, other, 1e-9)


@pytest.mark.parametrize("name", [name for name in HOOKED if "relu" not in name and "bn" not in name])
@pytest.mark.parametrize("pre", [False, True])
def test_backward_hooks(torchvision: ModuleType, name: str, pre: bool) -> None:
    """Not on BN and ReLU: torch refuses them there, as torchvision's ReLUs write in place (next test)."""
    recorded: list[list[Tensor]] = [[], []]
    results = []
    for model, seen in zip(twins(torchvision, "bottleneck"), recorded, strict=True):
        module = model.double().get_submodule(name)
        if pre:
            module.register_full_backward_pre_hook(lambda m, g, seen=seen: seen.append(g[0].clone()))
        else:
            module.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.extend((gi[0].clone(), go[0].clone())))
        results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
    assert_same_step(*results)
    assert len(recorded[0]) == len(recorded[1]) == (1 if pre else 2)
    for mine, other in zip(*recorded, strict=True):
        assert_same(name, mine, other, 1e-8)


@pytest.mark.parametrize("name", ["bn1", "relu", "layer1.0.bn2", "layer1.0.relu", "layer2.0.downsample.1"])
def test_backward_hooks_before_in_place_modules(torchvision: ModuleType, name: str) -> None:
    """With inplace=False they work as in torchvision."""
    counts = []
    results = []
    for model in twins(torchvision, "bottleneck"):
        seen: list[int] = []
        for module in model.double().modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        model.get_submodule(name).register_full_backward_hook(lambda *_, seen=seen: seen.append(1))
        results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
        counts.append(len(seen))
    assert_same_step(*results)
    assert counts[0] == counts[1] > 0


def test_backward_hook_that_changes_gradients(torchvision: ModuleType) -> None:
    results = []
    for model in twins(torchvision, "bottleneck"):
        hook = lambda m, gi, go: (gi[0] * 2,)  # noqa: E731
        model.double().layer2[0].conv2.register_full_backward_hook(hook)
        results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
    assert_same_step(*results)


def test_gradient_hooks_on_tensors(torchvision: ModuleType) -> None:
    """On parameters, before and after accumulation, and on the input."""
    results, counts = [], []
    for model in twins(torchvision, "basic"):
        seen: Counter[str] = Counter()
        for name, parameter in model.double().named_parameters():
            parameter.register_hook(lambda g, name=name, seen=seen: (seen.update([name]), g * 0.5)[1])
            parameter.register_post_accumulate_grad_hook(lambda p, name=name, seen=seen: seen.update([name]))
        results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
        counts.append(seen)
    assert_same_step(*results)
    assert counts[0] == counts[1]


GLOBAL = {
    "forward": nn.modules.module.register_module_forward_hook,
    "pre": nn.modules.module.register_module_forward_pre_hook,
}
GLOBAL_BACKWARD = {
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks(torchvision: ModuleType, kind: str) -> None:
    """They see every module, as often as in torchvision's model: profilers, FLOP counters and loggers rely on it."""
    counts, results = [], []
    for model in twins(torchvision, "bottleneck"):
        names = {id(module): name for name, module in model.double().named_modules()}
        seen: Counter[str] = Counter()
        handle = GLOBAL[kind](lambda module, *_, names=names, seen=seen: seen.update([names[id(module)]]))
        try:
            results.append(step(model, images(4, 3, 32, 32, dtype=torch.float64)))
            if isinstance(model, fr.ResNet):
                assert {reason for _, reason in unfused_units(model)} == {"a global module hook is set"}
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1]
    assert set(names.values()) - set(counts[0]) <= {""}
    assert_same_step(*results)
    assert unfused_units(twins(torchvision, "basic")[0]) == []


@pytest.mark.parametrize("kind", GLOBAL_BACKWARD)
def test_global_backward_hooks(torchvision: ModuleType, kind: str) -> None:
    """Torch refuses them where a BN's output is written in place, as torchvision's blocks do; elsewhere they fire."""
    for model in twins(torchvision, "basic"):
        handle = GLOBAL_BACKWARD[kind](lambda *_: None)
        try:
            with pytest.raises(RuntimeError, match="modified inplace"):
                model(images(4, 3, 32, 32))
        finally:
            handle.remove()
    model = nn.Sequential(fr.ConvBNAct(3, 4, activation=None), fr.BNAct(4), nn.Flatten())
    seen: list[str] = []
    handle = GLOBAL_BACKWARD[kind](lambda module, *_: seen.append(type(module).__name__))
    try:
        model(images()).sum().backward()
    finally:
        handle.remove()
    assert sorted(seen) == ["BNAct", "BatchNorm2d", "Conv2d", "ConvBNAct", "Flatten", "Sequential"]


def test_flop_counter(torchvision: ModuleType) -> None:
    totals = []
    for model in twins(torchvision, "bottleneck"):
        with FlopCounterMode(display=False) as counter:
            model(images(4, 3, 32, 32)).sum().backward()
            infer(model.eval(), images())
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


# Children that are something else


class _Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _LoRA(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(
            conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False
        )
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class _Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def _block(model: nn.Module) -> Any:
    return model.layer2[0]


def _replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(3)
        parent, _, child = f"layer2.0.{name}".rpartition(".")
        owner = model.get_submodule(parent)
        owner.register_module(child, make(getattr(owner, child)))

    return change


def _subclass(conv: nn.Module) -> nn.Module:
    new = _Doubling(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    new.load_state_dict(conv.state_dict())
    return new


def _override(name: str, attribute: str = "forward") -> Callable[[nn.Module], None]:
    """Set on the instance, as quantisers, offloaders and monkeypatching users do."""

    def change(model: nn.Module) -> None:
        child = model.get_submodule(f"layer2.0.{name}")
        original = getattr(child, attribute)
        setattr(child, attribute, lambda *args: original(*args) * 1.5)

    return change


def _functional(model: nn.Module) -> None:
    """A weight that is no parameter: a function of others, set before each call (hypernetworks)."""
    conv = _block(model).conv2
    weight = conv.weight
    del conv.weight
    conv.register_parameter("source", weight)
    conv.register_buffer("weight", weight.detach() * 2)


def _shortcut(make: Callable[[nn.Sequential], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(3)
        _block(model).downsample = make(_block(model).downsample)

    return change


def _reflect(model: nn.Module) -> None:
    old = _block(model).conv2
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, 1, padding_mode="reflect", bias=False)
    new.load_state_dict(old.state_dict())
    _block(model).conv2 = new


def _same(model: nn.Module) -> None:
    old = model.layer1[0].conv2
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding="same", bias=False)
    new.load_state_dict(old.state_dict())
    model.layer1[0].conv2 = new


def _weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(_block(model).conv2)
    with torch.no_grad():
        _block(model).conv2.parametrizations.weight.original0.mul_(1.5)


def _old_weight_norm(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(_block(model).conv2)
    with torch.no_grad():
        _block(model).conv2.weight_g.mul_(1.5)


def _spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(_block(model).conv2)


def _parametrized_bn(model: nn.Module) -> None:
    parametrize.register_parametrization(_block(model).bn2, "weight", _Negated())


def _fused_by_torch(model: nn.Module) -> None:
    """torch.nn.utils.fuse_conv_bn_eval, and an identity where the BN was."""
    model.eval()
    _block(model).conv1 = nn.utils.fuse_conv_bn_eval(_block(model).conv1, _block(model).bn1)
    _block(model).bn1 = nn.Identity()
    model.train()


def _biased(conv: nn.Module) -> nn.Module:
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=True)
    new.load_state_dict(conv.state_dict(), strict=False)
    return new


# change -> what is said about it; None where it fuses all the same.
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str | None]] = {
    "conv subclass": (_replace("conv2", _subclass), "_Doubling is not Conv2d"),
    "lora": (_replace("conv2", _LoRA), "_LoRA is not Conv2d"),
    "conv in a sequential": (_replace("conv2", nn.Sequential), "Sequential is not Conv2d"),
    "bn gone": (_replace("bn2", lambda _: nn.Identity()), "Identity is not BatchNorm2d"),
    "bn wrapped": (_replace("bn2", nn.Sequential), "Sequential is not BatchNorm2d"),
    "instance norm": (_replace("bn2", lambda bn: nn.InstanceNorm2d(bn.num_features)), "InstanceNorm2d is not"),
    "leaky relu": (_replace("relu", lambda _: nn.LeakyReLU(0.1)), "LeakyReLU is not ReLU"),
    "relu6": (_replace("relu", lambda _: nn.ReLU6()), "ReLU6 is not ReLU"),
    "silu": (_replace("relu", lambda _: nn.SiLU()), "SiLU is not ReLU"),
    "conv with bias": (_replace("conv2", _biased), None),
    "forward of conv": (_override("conv2"), "forward is replaced on its Conv2d"),
    "forward of bn": (_override("bn2"), "forward is replaced on its BatchNorm2d"),
    "forward of relu": (_override("relu"), "forward is replaced on its ReLU"),
    "forward of downsample": (_override("downsample"), "downsample"),
    "forward of downsample's conv": (_override("downsample.0"), "forward is replaced on its Conv2d"),
    "_conv_forward": (_override("conv2", "_conv_forward"), "forward is replaced on its Conv2d"),
    "reflect": (_reflect, "reflect"),
    "same": (_same, "same"),
    "pruned": (lambda m: prune.l1_unstructured(_block(m).conv2, "weight", 0.4), "a hook is set on its Conv2d"),
    "pruned for good": (
        lambda m: prune.remove(prune.l1_unstructured(_block(m).conv2, "weight", 0.4), "weight"),
        None,
    ),
    "channels pruned": (lambda m: prune.ln_structured(_block(m).conv1, "weight", 0.5, 2, 0), "a hook is set"),
    "bn pruned": (lambda m: prune.l1_unstructured(_block(m).bn2, "weight", 0.4), "a hook is set on its BatchNorm2d"),
    "weight_norm": (_weight_norm, "ParametrizedConv2d is not Conv2d"),
    "old weight_norm": (_old_weight_norm, "a hook is set on its Conv2d"),
    "spectral_norm": (_spectral_norm, "ParametrizedConv2d is not Conv2d"),
    "parametrized bn": (_parametrized_bn, "ParametrizedBatchNorm2d is not BatchNorm2d"),
    "weight as an attribute": (_functional, None),
    "folded by torch": (_fused_by_torch, "Identity is not BatchNorm2d"),
    "shortcut with pooling": (_shortcut(lambda old: nn.Sequential(nn.AvgPool2d(1), *old)), "downsample"),
    "shortcut without bn": (_shortcut(lambda old: nn.Sequential(old[0], nn.Identity())), "Identity is not"),
    "shortcut alone": (_shortcut(lambda old: old[0]), "downsample"),
    "shortcut by conv and relu": (_shortcut(lambda old: nn.Sequential(old[0], nn.ReLU())), "ReLU is not BatchNorm2d"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children(torchvision: ModuleType, change: str) -> None:
    """Results equal those of torchvision's model with the same change, in training and in inference; and the reason
    is told. The model has run before, fused."""
    ours, theirs = twins(torchvision, "bottleneck")
    infer(ours.eval(), images())
    ours.train()
    function, reason = CHANGES[change]
    for model in (ours, theirs):
        function(model)
    x = images(4, 3, 64, 64, dtype=torch.float64)
    assert_same_step(*(step(model.double(), x) for model in (ours, theirs)))
    outputs = [infer(model.float().eval(), images()) for model in (ours, theirs)]
    assert relative(*outputs) < 1e-5
    found = dict(unfused_units(ours))
    if reason is None:
        assert found == {}
    else:
        assert any(reason in f"{name}: {why}" for name, why in found.items()), found
        assert len(found) <= 3, "no other block pays for it"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_geometry_changed_by_hand(torchvision: ModuleType, layout: torch.memory_format) -> None:
    """Ints, where nn.Conv2d itself makes pairs."""
    models = []
    for kind in (fr.BasicBlock, torchvision.models.resnet.BasicBlock):
        block = kind(8, 8)
        randomise(block)
        nn.init.normal_(block.conv1.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(block.conv2.weight, generator=torch.Generator().manual_seed(1))
        block.conv1.stride, block.conv1.padding = 1, 2
        block.conv1.dilation = (2, 2)
        block.conv2.padding, block.conv2.dilation = 3, 3
        models.append(block)
    x = images(3, 8, 9, 9).contiguous(memory_format=layout)
    assert_trains_as(*models, x)
    assert_infers_as(*(model.eval() for model in models), x)


MISFITS: dict[str, Callable[[Any], Any]] = {
    "short bn1": lambda block: setattr(block, "bn1", nn.BatchNorm2d(1)),
    "short bn2": lambda block: setattr(block, "bn2", nn.BatchNorm2d(4)),
    "long bn2": lambda block: setattr(block, "bn2", nn.BatchNorm2d(9)),
    "short running_mean": lambda block: setattr(block.bn2, "running_mean", torch.zeros(3)),
    "short gamma": lambda block: setattr(block.bn2, "weight", nn.Parameter(torch.ones(1))),
    "double bn": lambda block: block.bn1.double(),
    "half bn": lambda block: block.bn1.half(),
    "double conv": lambda block: block.conv2.double(),
    "short conv": lambda block: setattr(block.conv1, "weight", nn.Parameter(torch.ones(8, 4, 3, 3))),
    "flat conv": lambda block: setattr(block.conv1, "weight", nn.Parameter(torch.ones(8, 8))),
    "stride": lambda block: setattr(block.conv2, "stride", (2, 2)),
    "padding": lambda block: setattr(block.conv2, "padding", (0, 0)),
    "kernel larger than image": lambda block: setattr(block.conv2, "dilation", (9, 9)),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("mode", ["train", "eval", "graded"])
def test_children_that_do_not_fit(torchvision: ModuleType, misfit: str, kind: str, mode: str) -> None:
    """Torch raises; ours must too, never crash or broadcast."""
    for package in (fr, torchvision.models.resnet):
        block = getattr(package, kind)(8 * getattr(package, kind).expansion, 8)
        MISFITS[misfit](block)
        block.train(mode == "train")
        x = images(2, 8 * block.expansion, 6, 6).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(mode != "eval"), pytest.raises((ValueError, TypeError, RuntimeError)):
            block(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_a_block_under_autocast(
    torchvision: ModuleType, dtype: torch.dtype, layout: torch.memory_format, train: bool, grad: bool
) -> None:
    """Torchvision adds in place, so that a block's output has the convs' type whatever comes in."""
    outputs = []
    for package in (fr, torchvision.models.resnet):
        torch.manual_seed(0)
        block = package.BasicBlock(8, 8).train(train)
        block = block.double() if dtype == torch.float64 else block
        x = images(2, 8, 9, 9, dtype=dtype).contiguous(memory_format=layout)
        with torch.set_grad_enabled(grad), torch.autocast("cpu"):
            outputs.append(block(x).detach())
    assert outputs[0].dtype == outputs[1].dtype
    assert relative(*outputs) < (1e-12 if dtype == torch.float64 else 2e-2)


def test_a_subclass_of_the_block(torchvision: ModuleType) -> None:
    """Squeeze and excitation in a subclass's forward, written against torchvision's attribute names."""

    def make(base: Any) -> Any:
        class Block(base):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.gate = nn.Conv2d(self.bn2.num_features, self.bn2.num_features, 1)

            def forward(self, x: Tensor) -> Tensor:
                out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
                out = out * self.gate(out.mean((2, 3), keepdim=True)).sigmoid()
                return self.relu(out + (x if self.downsample is None else self.downsample(x)))

        return Block

    models = []
    for resnet, block in (
        (fr.ResNet, make(fr.BasicBlock)),
        (torchvision.models.resnet.ResNet, make(torchvision.models.resnet.BasicBlock)),
    ):
        torch.manual_seed(0)
        models.append(resnet(block, [1, 1, 1, 1], num_classes=10))
        randomise(models[-1])
    assert_trains_as(*models)
    assert_infers_as(*(model.eval() for model in models))


def test_torchvision_blocks_in_our_resnet(torchvision: ModuleType) -> None:
    block = torchvision.models.resnet.Bottleneck
    ours = fr.ResNet(block, [1, 1, 1, 1], num_classes=10, width_per_group=16)
    _, theirs = twins(torchvision, "bottleneck")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_trains_as(ours, theirs)
    assert_infers_as(ours.eval(), theirs.eval())


class _Twice(Tensor):
    """A weight that is twice what is stored, to convolutions only: as quantised weights are more than their numbers."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, nn.functional.conv2d):
            plain = [a.as_subclass(Tensor) if isinstance(a, _Twice) else a for a in args]
            return func(plain[0], plain[1] * 2, *plain[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_tensor_subclass(torchvision: ModuleType) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    infer(ours, images())
    for model in (ours, theirs):
        conv = model.layer1[0].conv1
        conv.weight = nn.Parameter(conv.weight.detach().as_subclass(_Twice), requires_grad=False)
    assert relative(infer(ours, images()), infer(theirs, images())) < 1e-5
    assert unfused_units(ours) == [("layer1.0.conv1", "the weight of its Conv2d is a tensor subclass")]


def test_convert_sync_batchnorm(torchvision: ModuleType) -> None:
    ours, theirs = (nn.SyncBatchNorm.convert_sync_batchnorm(model).eval() for model in twins(torchvision, "basic"))
    assert_infers_as(ours, theirs)
    assert {reason for _, reason in unfused_units(ours)} == {"SyncBatchNorm is not BatchNorm2d"}


# torch.func, forward mode


def _functional_parts(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {n: p.detach() for n, p in model.named_parameters()}, {
        n: b.detach().clone() for n, b in model.named_buffers()
    }


@pytest.fixture
def doubles(torchvision: ModuleType) -> tuple[nn.Module, nn.Module]:
    ours, theirs = twins(torchvision, "bottleneck")
    return ours.double().eval(), theirs.double().eval()


X = images(2, 3, 32, 32, dtype=torch.float64)


def test_functional_call(doubles: tuple[nn.Module, nn.Module]) -> None:
    """Other parameters for one call, while the module's own are folded."""
    ours, theirs = (model.float() for model in doubles)
    infer(ours, images())
    parameters, buffers = _functional_parts(theirs)
    other = {name: value * 1.1 for name, value in parameters.items()}
    with torch.no_grad():
        for state in (other, parameters, other):
            mine, plain = (functional_call(model, {**state, **buffers}, (images(),)) for model in (ours, theirs))
            assert relative(mine, plain) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_func_grad(doubles: tuple[nn.Module, nn.Module], train: bool) -> None:
    found = []
    for model in doubles:
        parameters, buffers = _functional_parts(model.train(train))

        def loss(parameters: Any, buffers: Any, model: Any = model) -> Tensor:
            return functional_call(model, {**parameters, **buffers}, (torch.cat((X, X * 2)),)).square().sum()

        found.append(func_grad(loss)(parameters, buffers))
    for name, value in found[1].items():
        if value.norm() > 1e-9:
            assert_same(name, found[0][name], value, 1e-8)


def test_vmap(doubles: tuple[nn.Module, nn.Module]) -> None:
    """Over images, and over models (an ensemble)."""
    with torch.no_grad():
        singles = [vmap(lambda x, model=model: model(x[None])[0])(X) for model in doubles]
    assert_same("output", *singles)
    ensembles = []
    for model in doubles:
        other = copy.deepcopy(model)
        randomise(other, 9)
        state = stack_module_state([model, other])
        ensembles.append(vmap(lambda p, b, model=model: functional_call(model, (p, b), (X,)))(*state))
    assert_same("output", *ensembles)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(doubles: tuple[nn.Module, nn.Module], grad: bool) -> None:
    """Kernels that know no tangents would drop them without a word."""
    tangents = []
    for model in doubles:
        infer(model, X)
        with torch.set_grad_enabled(grad):
            tangents.append(jvp(model, (X,), (torch.ones_like(X),))[1])
        with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
    for tangent in tangents:
        assert_same("tangent", tangent, tangents[-1])


def test_second_derivatives_in_a_restored_model(torchvision: ModuleType) -> None:
    """Fused ops differentiate once; `restore` is the way to Hessians."""
    ours, theirs = (model.double() for model in twins(torchvision, "basic"))
    found = []
    for model in (fr.restore(ours), theirs):
        weight = model.fc.weight if model is None else model.layer4[0].conv2.weight
        (first,) = torch.autograd.grad(model(torch.cat((X, -X))).square().sum(), weight, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), weight)
    assert_same("second derivative", *found, 1e-8)


# The small modules


def _conv_bn_act(module: fr.ConvBNAct) -> Callable[..., Tensor]:
    def plain(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = nn.functional.conv2d(
            x, module.conv.weight, module.conv.bias, module.conv.stride, module.conv.padding, module.conv.dilation,
            module.conv.groups,
        )  # fmt: skip
        bn = module.bn
        y = nn.functional.batch_norm(
            y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps
        )
        y = y if residual is None else y + residual
        return y if module.act is None else torch.relu(y)

    return plain


CONVS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"kernel_size": 1},
    "5x5 stride 2": {"kernel_size": 5, "stride": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "bias": {"bias": True},
    "no padding": {"padding": 0},
    "linear": {"activation": None},
    "eps and momentum": {"eps": 0.1, "momentum": 0.5},
}


@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("residual", [False, True])
def test_conv_bn_act(options: str, residual: bool) -> None:
    module = fr.ConvBNAct(4, 8, **({"kernel_size": 3} | CONVS[options])).double()
    randomise(module)
    x = images(3, 4, 9, 11, dtype=torch.float64)
    shape = infer(copy.deepcopy(module), x).shape
    if CONVS[options].get("padding") is None and module.conv.stride == (1, 1):
        assert shape[2:] == x.shape[2:], "padding None keeps the size"
    args = (images(*shape, dtype=torch.float64, seed=3),) if residual else ()
    for train in (True, False):
        mine, other = (copy.deepcopy(module).train(train) for _ in range(2))
        found = step(mine, x, lambda m, x: m(x, *args))
        # The oracle is wrapped so that `step` finds its parameters and buffers.
        expected = step(other, x, lambda m, x: _conv_bn_act(m)(x, *args))
        expected["buffer bn.num_batches_tracked"] += train
        assert_same_step(found, expected)
        assert_same("inference", infer(mine, x) if not args else mine.eval()(x, *args), _conv_bn_act(mine)(x, *args))
    assert next(iter(module.state_dict())) == "conv.weight"


def test_conv_bn_act_arguments() -> None:
    with pytest.raises(ValueError, match="activation"):
        fr.ConvBNAct(1, 1, 1, activation="gelu")
    with pytest.raises(ValueError, match="residual has shape"):
        fr.ConvBNAct(2, 2, 3)(images(2, 2, 5, 5), images(2, 2, 4, 5))
    assert fr.ConvBNAct(2, 2, 3).conv.bias is None


BN_OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"eps": 0.1, "momentum": 1.0},
]
BN_SHAPES = [(6, 5), (4, 5, 7), (3, 5, 4, 6), (2, 5, 3, 2, 4)]


@pytest.mark.parametrize("shape", BN_SHAPES, ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("options", BN_OPTIONS, ids=str)
def test_bn_act(shape: tuple[int, ...], activation: str | None, options: dict[str, Any]) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    mine, other = fr.BNAct(5, activation=activation, **options).double(), kind(5, **options).double()
    randomise(other)
    assert str(mine.load_state_dict(other.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert list(mine.state_dict()) == list(other.state_dict())
    residual = images(*shape, dtype=torch.float64, seed=2)

    def plain(m: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        y = m(x) + args[0] if args else m(x)
        return y if activation is None else torch.relu(y)

    for args in ((), (residual,)):
        run, oracle = (lambda m, x, args=args: m(x, *args)), (lambda m, x, args=args: plain(m, x, *args))
        for seed in range(3):
            x = images(*shape, dtype=torch.float64, seed=seed) * 3 + 1
            assert_same_step(step(mine, x, run), step(other, x, oracle))
        for model in (mine, other):
            model.eval()
        assert_same_step(step(mine, x, run), step(other, x, oracle))
        with torch.no_grad():
            assert_same("inference", mine(x, *args), plain(other, x, *args))
        for model in (mine, other):
            model.train()


def test_bn_act_is_a_batch_norm() -> None:
    module = fr.BNAct(4, eps=1e-3, momentum=0.2, activation=None)
    assert isinstance(module, nn.BatchNorm2d)
    assert repr(module).startswith("BNAct(4, eps=0.001, momentum=0.2, affine=True, ")
    assert repr(module).endswith("track_running_stats=True, activation=None)")
    module.train()(images(2, 4, 3, 3))
    module.reset_parameters()
    assert not module.running_mean.any()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(infer(other.eval(), images(1, 4, 3, 3)), infer(module.eval(), images(1, 4, 3, 3)))
    with pytest.raises(ValueError, match="activation"):
        fr.BNAct(4, activation="tanh")
    with pytest.raises(ValueError, match=r"\(N, C, ...\)"):
        module(images(4))
    with pytest.raises(ValueError, match="shape"):
        module(images(1, 5, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value"):
        module.train()(images(1, 4))


def test_add_relu() -> None:
    module = fr.AddReLU()
    assert list(module.state_dict()) == []
    a, b = (images(2, 3, 4, 4, dtype=torch.float64, seed=s).requires_grad_() for s in range(2))
    out = module(a, b)
    assert torch.equal(out, torch.relu(a + b))
    out.square().sum().backward()
    assert torch.equal(a.grad, 2 * out.detach())
    assert torch.equal(a.grad, b.grad)
    with pytest.raises(ValueError, match="shape"):
        module(a, b[:1])
    with pytest.raises(TypeError, match="float"):
        module(a, b.float())


class _Small(nn.Module):
    """Each of the small modules, in a model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fr.ConvBNAct(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = fr.BNAct(8)
        self.last = fr.ConvBNAct(8, 8, 1, activation=None)
        self.join = fr.AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.join(self.last(self.norm(self.conv(x), x)), x)


@pytest.fixture
def small() -> _Small:
    model = _Small().double()
    randomise(model)
    return model


def test_restore_reaches_the_small_modules(small: _Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `verify` would compare them with themselves."""
    x = images(4, 3, 9, 9, dtype=torch.float64)
    plain = fr.restore(copy.deepcopy(small))
    with primitives(monkeypatch) as ran:
        expected = step(plain, x)
        plain.eval()(x)
    assert not ran
    assert_same_step(step(small, x), expected)
    with primitives(monkeypatch) as ran:
        small(x)
    assert ran == {"bn_act_train_forward": 3, "add_relu_forward": 1}


def test_small_modules_with_torchs_tools(small: _Small) -> None:
    """Global hooks, torch.func, forward mode, fx, compile, export, pickle."""
    x = images(2, 3, 9, 9, dtype=torch.float64)
    small.eval()
    expected = infer(fr.restore(copy.deepcopy(small)), x)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        assert_same("global hook", infer(small, x), expected)
    finally:
        handle.remove()
    called = "ConvBNAct Conv2d BatchNorm2d ReLU Conv2d BNAct ConvBNAct Conv2d BatchNorm2d AddReLU _Small"
    assert sorted(seen) == sorted(called.split())
    tangents = [jvp(m, (x,), (x,))[1] for m in (small, fr.restore(copy.deepcopy(small)))]
    assert_same("tangent", *tangents)
    with torch.no_grad():
        assert_same("vmap", vmap(lambda x: small(x[None])[0])(x), expected)
    traced = torch.fx.symbolic_trace(small)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["first", "conv", "norm", "last", "join"]
    assert_same("fx", infer(traced, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert_same("compile", infer(compiled, x), expected)
    plain = step(fr.restore(copy.deepcopy(small)).train(), x)
    assert_same_step({n.replace("_orig_mod.", ""): t for n, t in step(compiled.train(), x).items()}, plain)
    torch._dynamo.reset()
    small.eval()
    with torch.no_grad():
        program = torch.export.export(small, (x,))
    assert_same("export", infer(program.module(), x), infer(small, x))
    assert_same("pickle", infer(pickle.loads(pickle.dumps(small)), x), infer(small, x))


def test_unfused_results_under_autocast(torchvision: ModuleType) -> None:
    """A hooked unit and its fused neighbours agree on dtypes."""
    ours, theirs = twins(torchvision, "bottleneck")
    ours.layer1[0].conv2.register_forward_hook(lambda *_: None)
    exact = copy.deepcopy(theirs).double().eval()
    for train in (True, False):
        outputs = []
        for model in (ours, theirs):
            with torch.autocast("cpu"):
                outputs.append(model.train(train)(images(4, 3, 64, 64)).detach())
        assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert_close("output", *outputs, infer(exact, images(4, 3, 64, 64).double())) if not train else None


def test_partial_norm_layer_keeps_its_options(torchvision: ModuleType) -> None:
    ours, theirs = twins(torchvision, "basic", norm_layer=partial(nn.BatchNorm2d, eps=0.3, momentum=0.7))
    assert ours.layer1[0].bn1.eps == 0.3
    assert_trains_as(ours, theirs)
    assert_infers_as(ours.eval(), theirs.eval())
