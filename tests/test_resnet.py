"""The ResNet family beside torchvision's: same constructors, parameters and state dicts, same results and training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import grid
from networks import (
    CLASSES,
    SMALL,
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
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fused_resnet as fr
from fused_resnet import plans
from fused_resnet.convert import unfused_units

FAMILY = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


class _Draws(TorchDispatchMode):
    """Records each draw of random numbers: operator, shape, arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.calls.append((func._schema.name, tuple(args[0].shape), args[1:], kwargs))
        return func(*args, **(kwargs or {}))


def _on_meta(constructor: Callable[..., nn.Module], **options: Any) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    with torch.device("meta"), _Draws() as draws:
        model = constructor(**options)
    return model, draws.calls


# Constructors


@pytest.mark.parametrize("name", FAMILY)
def test_family_is_torchvisions(torchvision: ModuleType, name: str) -> None:
    """On the meta device, where the largest takes milliseconds: modules, keys, shapes, the order of random draws."""
    theirs, their_draws = _on_meta(getattr(torchvision.models, name))
    ours, our_draws = _on_meta(getattr(fr, name))
    assert our_draws == their_draws, "the same draws in the same order: one seed gives the same parameters"
    assert [(n, type(m).__name__, m.extra_repr()) for n, m in ours.named_modules()] == [
        (n, type(m).__name__, m.extra_repr()) for n, m in theirs.named_modules()
    ]
    for attribute in ("state_dict", "named_parameters", "named_buffers"):
        mine, other = (dict(getattr(model, attribute)()) for model in (ours, theirs))
        assert [(k, v.shape, v.dtype, v.requires_grad) for k, v in mine.items()] == [
            (k, v.shape, v.dtype, v.requires_grad) for k, v in other.items()
        ]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for field in ("inplanes", "dilation", "groups", "base_width", "_norm_layer", "training"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for mine, other in zip(ours.modules(), theirs.modules(), strict=True):
        if hasattr(other, "downsample"):
            assert (mine.stride, mine.downsample is None) == (other.stride, other.downsample is None)
    for one, two in ((ours, theirs), (theirs, ours)):
        assert str(one.load_state_dict(two.state_dict(), strict=True, assign=True)) == "<All keys matched successfully>"


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("options", [{}, {"zero_init_residual": True, "num_classes": 7}], ids=["default", "options"])
def test_same_seed_same_parameters(torchvision: ModuleType, name: str, options: dict[str, Any]) -> None:
    models = []
    for package in (fr, torchvision.models):
        torch.manual_seed(7)
        models.append(getattr(package, name)(**options))
    after = torch.get_rng_state()
    ours, theirs = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.manual_seed(7)
    getattr(fr, name)(**options)
    assert torch.equal(torch.get_rng_state(), after), "nothing else draws"
    assert ours._metadata == theirs._metadata


def _parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (p.default, p.kind) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", ["ResNet", "BasicBlock", "Bottleneck"])
def test_class_signatures(torchvision: ModuleType, name: str) -> None:
    ours, theirs = _parameters(getattr(fr, name)), _parameters(getattr(torchvision.models.resnet, name))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[parameter] == theirs[parameter] for parameter in theirs)
    more = {parameter: kind for parameter, (_, kind) in ours.items() if parameter not in theirs}
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in more.values())
    assert ("in_channels" in more) == (name == "ResNet")
    assert getattr(fr, name).__dict__.get("expansion") == getattr(torchvision.models.resnet, name).__dict__.get(
        "expansion"
    ) or (getattr(fr, name).expansion == 1)


def test_expansion() -> None:
    assert fr.BasicBlock.expansion == 1
    assert fr.Bottleneck.expansion == 4


@pytest.mark.parametrize("name", FAMILY)
def test_constructor_signatures(torchvision: ModuleType, name: str) -> None:
    ours, theirs = getattr(fr, name), getattr(torchvision.models, name)
    mine, other = inspect.signature(ours).parameters, inspect.signature(inspect.unwrap(theirs)).parameters
    assert list(mine) == list(other) == ["weights", "progress", "kwargs"]
    assert (mine["weights"].default, mine["progress"].default) == (None, True)
    assert ours.__name__ == name
    assert "num_classes" in ours.__doc__
    assert name in fr.__all__


def test_subclasses_and_blocks_of_ones_own() -> None:
    class Narrow(fr.ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:  # torchvision users override this
            return super()._forward_impl(x) * 2

    torch.manual_seed(0)
    model = Narrow(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    torch.manual_seed(0)
    plain = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    assert torch.equal(infer(model, images()), infer(plain, images()) * 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"replace_stride_with_dilation": [True]}, ValueError, "replace_stride_with_dilation"),
        ({"groups": 2}, ValueError, "groups=1"),
        ({"width_per_group": 32}, ValueError, "base_width=64"),
        ({"replace_stride_with_dilation": [False, False, True]}, NotImplementedError, "dilation"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_impossible_options(
    torchvision: ModuleType, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fr.resnet18(**options)
    with pytest.raises(error):
        torchvision.models.resnet18(**options)


def test_layers_must_be_four() -> None:
    with pytest.raises(ValueError, match="four"):
        fr.ResNet(fr.BasicBlock, [1, 1, 1])


# Options


def _frozen(torchvision: ModuleType) -> Any:
    return torchvision.ops.FrozenBatchNorm2d


NORMS: dict[str, tuple[Callable[[ModuleType], Any], str | None]] = {
    "eps": (lambda tv: partial(nn.BatchNorm2d, eps=1e-3), None),
    "momentum": (lambda tv: partial(nn.BatchNorm2d, momentum=0.3), None),
    "cumulative": (lambda tv: partial(nn.BatchNorm2d, momentum=None), None),
    "untracked": (lambda tv: partial(nn.BatchNorm2d, track_running_stats=False), None),
    "group": (lambda tv: partial(nn.GroupNorm, 8), "GroupNorm is not BatchNorm2d"),
    "instance": (lambda tv: nn.InstanceNorm2d, "InstanceNorm2d is not BatchNorm2d"),
    "frozen": (_frozen, "FrozenBatchNorm2d is not BatchNorm2d"),
    "sync": (lambda tv: nn.SyncBatchNorm, "SyncBatchNorm is not BatchNorm2d"),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norm_layers(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    make, reason = NORMS[norm]
    ours, theirs = twins(torchvision, "bottleneck", norm_layer=make(torchvision))
    if norm != "sync":  # SyncBatchNorm trains on GPUs only
        assert_trains_as(ours, theirs, images(4, 3, 64, 64))
    ours.eval()
    assert_infers_as(ours, theirs.eval(), images(4, 3, 64, 64))
    found = unfused_units(ours)
    if reason is None:
        assert found == []
    else:
        assert len(found) == 1 + 4 * 4
        assert {name for name, _ in found} >= {"conv1", "layer1.0.conv3", "layer4.0.downsample"}
        assert {why for _, why in found} == {reason}
        with primitives(monkeypatch) as ran:
            infer(ours, images(4, 3, 64, 64))
        assert not ran


def test_norm_layer_without_affine_parameters() -> None:
    """torchvision's initialisation fails on it; ours is held against itself unfused."""
    model = fr.ResNet(
        fr.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES, norm_layer=partial(nn.BatchNorm2d, affine=False)
    )
    randomise(model)
    plain = fr.restore(copy.deepcopy(model))
    assert_trains_as(model, plain)
    assert_infers_as(model.eval(), plain.eval())


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dilation": ("bottleneck", {"replace_stride_with_dilation": [False, True, True]}),
    "dilation everywhere": ("bottleneck", {"replace_stride_with_dilation": (True, True, True)}),
    "zero_init_residual": ("bottleneck", {"zero_init_residual": True}),
    "groups": ("bottleneck", {"groups": 8, "width_per_group": 4}),
    "width": ("bottleneck", {"width_per_group": 24}),
    "one class": ("basic", {"num_classes": 1}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(torchvision: ModuleType, option: str) -> None:
    name, options = OPTIONS[option]
    ours, theirs = twins(torchvision, name, **options)
    assert_trains_as(ours, theirs, images(4, 3, 40, 40))
    assert_infers_as(ours.eval(), theirs.eval(), images(2, 3, 40, 40))


@pytest.mark.parametrize("memory", ["balanced", "low", "fast"])
def test_memory(memory: str) -> None:
    """It reaches every block; what is kept for backward shrinks; results are those of torch."""
    model = fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=16, memory=memory)
    blocks = [module for module in model.modules() if isinstance(module, fr.Bottleneck)]
    assert {block.memory for block in blocks} == {memory}
    assert {block.memory for block in copy.deepcopy(blocks)} == {memory}
    randomise(model)
    assert_trains_as(model, fr.restore(copy.deepcopy(model)), images(4, 3, 64, 64))


def test_memory_saves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "rules", lambda device: plans.Rules(0.0))
    kept = {}
    for memory in ("low", "balanced", "fast"):
        torch.manual_seed(0)
        block = fr.Bottleneck(32, 8)
        block.memory = memory
        total: list[int] = []

        def count(t: Tensor, total: list[int] = total) -> Tensor:
            total.append(t.untyped_storage().nbytes())
            return t

        x = images(4, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            block(x).sum().backward()
        kept[memory] = sum(total)
    assert kept["low"] < kept["balanced"] < kept["fast"]


def test_unknown_memory() -> None:
    with pytest.raises(ValueError, match="memory"):
        fr.resnet18(memory="none")


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_zero_init_residual(torchvision: ModuleType, name: str) -> None:
    block, layers, options = SMALL[name]
    model = fr.ResNet(getattr(fr, block), layers, zero_init_residual=True, **options)
    for module in model.modules():
        if isinstance(module, (fr.BasicBlock, fr.Bottleneck)):
            last = module.bn3 if isinstance(module, fr.Bottleneck) else module.bn2
            assert not last.weight.any()
            assert module.bn1.weight.eq(1).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_in_channels(torchvision: ModuleType, channels: int) -> None:
    torch.manual_seed(0)
    ours = fr.resnet18(num_classes=CLASSES, in_channels=channels)
    randomise(ours)
    theirs = torchvision.models.resnet18(num_classes=CLASSES)
    theirs.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_trains_as(ours, theirs, images(4, channels, 32, 32))
    assert_infers_as(ours.eval(), theirs.eval(), images(2, channels, 32, 32))
    with pytest.raises(ValueError, match=f"needs {channels} channels"):
        infer(ours, images(2, 3, 32, 32))


# Inference

EVALUATION = {
    "net": tuple(SMALL),
    "dtype": (torch.float32, torch.bfloat16, torch.float64, torch.float16, "autocast"),
    "shape": ((1, 3, 32, 32), (2, 3, 33, 65), (1, 3, 97, 97), (3, 3, 64, 48)),
    "layout": ("nchw", "channels_last", "sliced", "expanded"),
    "mode": ("no_grad", "inference_mode", "frozen", "grad"),
    "weights": ("nchw", "channels_last"),
}


def _arranged(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        larger = torch.full((x.shape[0], 5, x.shape[2] + 3, 2 * x.shape[3]), 1e4, dtype=x.dtype)
        larger[:, 1:4, 2:-1, ::2] = x
        return larger[:, 1:4, 2:-1, ::2]
    return x[:, :1].expand_as(x) if layout == "expanded" else x


@pytest.mark.parametrize("case", grid(EVALUATION))
def test_inference(torchvision: ModuleType, case: dict[str, Any]) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, case["net"]))
    dtype = case["dtype"]
    x = _arranged(images(*case["shape"], dtype=torch.float32 if dtype == "autocast" else dtype), case["layout"])
    exact = infer(copy.deepcopy(theirs).double(), x.double())
    if dtype != "autocast":
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    if case["weights"] == "channels_last":
        ours = ours.to(memory_format=torch.channels_last)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(case["mode"], torch.enable_grad)
    if case["mode"] == "frozen":
        ours.requires_grad_(False)
    results = []
    for model in (ours, theirs):
        with context(), torch.autocast("cpu", enabled=dtype == "autocast"):
            results += [model(x)]
    first, plain = results
    assert first.requires_grad == (case["mode"] == "grad")
    with context(), torch.autocast("cpu", enabled=dtype == "autocast"):
        again = ours(x)  # with the kept weights
    if dtype == torch.float64:
        assert_same("output", first, plain)
    else:
        assert_close("output", first, plain, exact)
    assert torch.equal(first, again)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_inference_full_size_nets(torchvision: ModuleType, name: str) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, name))
    assert_infers_as(ours, theirs, images(1, 3, 64, 64))
    assert ours.get_submodule("layer1.0.conv1").weight.is_contiguous(), "strides of parameters are left alone"


@pytest.mark.parametrize("train", [False, True])
def test_empty_batch(torchvision: ModuleType, train: bool) -> None:
    ours, theirs = (model.train(train) for model in twins(torchvision, "bottleneck"))
    x = images(0, 3, 32, 32)
    assert ours(x).shape == theirs(x).shape == (0, CLASSES)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, "x must be"),
        (torch.zeros(1, 5, 32, 32), ValueError, "needs 3 channels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), TypeError, "float64"),
        ([[1.0]], (TypeError, AttributeError), "list"),
    ],
    ids=["3-d", "channels", "uint8", "float64", "list"],
)
@pytest.mark.parametrize("train", [False, True])
def test_bad_inputs(x: Any, error: Any, message: str, train: bool) -> None:
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=2).train(train)
    with torch.set_grad_enabled(train), pytest.raises(error, match=message):
        model(x)


def test_one_value_per_channel_is_refused_as_by_torch(torchvision: ModuleType) -> None:
    for model in twins(torchvision, "bottleneck"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model.train()(images(1, 3, 32, 32))


def test_meta_device() -> None:
    """Shapes without memory, as torchvision gives them."""
    with torch.device("meta"):
        model, x = fr.resnet50(num_classes=5), torch.empty(2, 3, 64, 64)
        assert model(x).shape == (2, 5)
        assert infer(model.eval(), x).shape == (2, 5)


def test_tensor_subclass_as_input(torchvision: ModuleType) -> None:
    from torchvision import tv_tensors

    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    assert_infers_as(ours, theirs, tv_tensors.Image(images()))


# Training

TRAINING = {
    "net": tuple(SMALL),
    "shape": ((4, 3, 32, 32), (2, 3, 33, 65), (3, 3, 64, 48)),
    "layout": ("nchw", "channels_last", "sliced"),
    "bn": ("batch", "frozen", "some frozen", "eval", "cumulative", "untracked", "zero momentum"),
    "weights": ("nchw", "channels_last"),
    "memory": ("balanced", "low", "fast"),
    "gram": ("as planned", "always"),
}


def _set_bn(model: nn.Module, how: str) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for index, bn in enumerate(norms):
        if how == "frozen" or (how == "some frozen" and index % 2):
            bn.eval()
            bn.requires_grad_(index % 3 == 0)
        elif how == "cumulative":
            bn.momentum = None
        elif how == "untracked":  # the buffers are there and must not change
            bn.track_running_stats = False
        elif how == "zero momentum":
            bn.momentum = 0.0
    if how == "eval":
        model.eval()


@pytest.mark.parametrize("case", grid(TRAINING))
def test_training_step_in_float64(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    """Outputs, every gradient, running statistics and num_batches_tracked, two steps in a row."""
    if case["gram"] == "always":
        monkeypatch.setattr(plans, "rules", lambda device: plans.Rules(0.0))
    ours, theirs = (model.double() for model in twins(torchvision, case["net"]))
    for module in ours.modules():
        if isinstance(module, (fr.BasicBlock, fr.Bottleneck)):
            module.memory = case["memory"]
    for model in (ours, theirs):
        _set_bn(model, case["bn"])
    if case["weights"] == "channels_last":
        ours, theirs = (model.to(memory_format=torch.channels_last) for model in (ours, theirs))
    for seed in range(2):
        x = _arranged(images(*case["shape"], dtype=torch.float64, seed=seed), case["layout"])
        assert_same_step(step(ours, x), step(theirs, x))


def _errors(named: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the output, of all gradients together, and of all running statistics together."""
    result = {}
    for kind in ("output", "gradient", "buffer"):
        names = [n for n in exact if n.startswith(kind) and exact[n].is_floating_point()]
        error = sum((named[n].double() - exact[n]).square().sum().item() for n in names)
        result[kind] = (error / sum(exact[n].square().sum().item() for n in names)) ** 0.5
    return result


@pytest.mark.parametrize("net", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_training_step_in_lower_precision(torchvision: ModuleType, net: str, dtype: Any) -> None:
    """The medians of the errors, over three batches, stay within the budget that torchvision's set.

    Each batch cannot be held to it: one ReLU that flips by a rounding error moves gradients by more than all rounding
    does (see networks.py). With the momentum at 1, running statistics are those of the last batch, undamped.
    """
    ours, theirs = twins(torchvision, net)
    exact = copy.deepcopy(theirs).double()
    if dtype != "autocast":
        ours, theirs = ours.to(dtype), theirs.to(dtype)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=dtype == "autocast"):
            return model(x)

    errors: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for seed in range(3):
        x = images(4, 3, 64, 64, seed=seed)
        low = x if dtype == "autocast" else x.to(dtype)
        truth = step(exact, low.double())
        for who, model in (("ours", ours), ("theirs", theirs)):
            errors[who].append(_errors(step(model, low, run), truth))
    for kind in ("output", "gradient", "buffer"):
        medians = {who: statistics.median(batch[kind] for batch in batches) for who, batches in errors.items()}
        assert medians["ours"] <= 2 * medians["theirs"] + 1e-6, f"{kind}: {medians}"
    mine, other = ours.state_dict(), theirs.state_dict()
    assert all(mine[key].dtype == other[key].dtype for key in other)
    assert all(torch.equal(mine[key], other[key]) for key in other if key.endswith("num_batches_tracked"))


def _train(model: nn.Module, dtype: torch.dtype, steps: int, **options: Any) -> list[float]:
    """Losses of SGD with momentum and weight decay on fixed random images."""
    model = model.to(dtype).train()
    x, labels = images(8, 3, 32, 32, dtype=dtype), torch.arange(8) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["resnet18", "bottleneck"])
def test_ten_sgd_steps(torchvision: ModuleType, name: str) -> None:
    """Float64 losses agree to 1e-8 after ten steps. Float32 ones drift apart by rounding, which training amplifies:
    held to 4 times torchvision's own drift from float64, 1e-3 granted."""
    ours, theirs = twins(torchvision, name)
    initial = copy.deepcopy(theirs.state_dict())
    exact = _train(theirs, torch.float64, 10)
    assert exact[-1] < 0.5 * exact[0], "ten steps learn"
    wide = copy.deepcopy(ours)
    assert _train(wide, torch.float64, 10) == pytest.approx(exact, rel=1e-8)
    for (key, mine), other in zip(wide.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_same(key, mine, other, 1e-7)
    theirs.float().load_state_dict(initial)
    plain = _train(theirs, torch.float32, 10)
    drift = max(abs(a - b) for a, b in zip(plain, exact, strict=True))
    assert _train(ours, torch.float32, 10) == pytest.approx(exact, abs=4 * drift + 1e-3)


def test_evaluation_after_training(torchvision: ModuleType) -> None:
    """The statistics and weights that training left are the ones that inference folds; then training goes on."""
    ours, theirs = (model.double() for model in twins(torchvision, "bottleneck"))
    x = images(2, 3, 48, 48, dtype=torch.float64, seed=5)
    for _ in range(2):
        for model in (ours, theirs):
            _train(model, torch.float64, 2)
            model.eval()
        assert_same("output", infer(ours, x), infer(theirs, x), 1e-9)


def test_gradient_accumulation(torchvision: ModuleType) -> None:
    ours, theirs = (model.double() for model in twins(torchvision, "bottleneck"))
    for model in (ours, theirs):
        for seed in range(3):
            (model(images(4, 3, 32, 32, dtype=torch.float64, seed=seed)).square().mean() / 3).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_same(name, mine.grad, other.grad, 1e-8)


SUBSETS: dict[str, Callable[[str], bool]] = {
    "only fc": lambda name: name.startswith("fc"),
    "only bn": lambda name: ".bn" in name,
    "only the last stage": lambda name: name.startswith("layer4"),
    "only first conv": lambda name: name == "conv1.weight",
    "only gammas": lambda name: "bn" in name and name.endswith("weight"),
    "only betas": lambda name: "bn" in name and name.endswith("bias"),
    "convs": lambda name: "conv" in name,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_frozen_parameters(torchvision: ModuleType, subset: str, mode: str) -> None:
    """Only what asks for a gradient gets one. The input asks for none here."""
    grads = []
    for model in twins(torchvision, "bottleneck"):
        model.double().train(mode == "train")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(SUBSETS[subset](name))
        model(images(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    ours, theirs = grads
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None) == (not SUBSETS[subset](name)), name
        if grad is not None and grad.norm() > 1e-9:
            assert_same(name, ours[name], grad, 1e-8)


def test_input_gradient_alone(torchvision: ModuleType) -> None:
    """Saliency maps, adversarial examples: an evaluated model without trainable parameters."""
    found = []
    for model in twins(torchvision, "bottleneck"):
        model.double().eval().requires_grad_(False)
        x = images(dtype=torch.float64).requires_grad_()
        found += torch.autograd.grad(model(x).square().sum(), x)
    assert_same("gradient", *found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(torchvision: ModuleType, reentrant: bool) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        x = checkpoint(model.layer1, x, use_reentrant=reentrant)
        x = checkpoint_sequential([model.layer2, model.layer3, model.layer4], 2, x, use_reentrant=reentrant)
        return model.fc(torch.flatten(model.avgpool(x), 1))

    ours, theirs = twins(torchvision, "bottleneck")
    assert_trains_as(ours, theirs, run=run)


def test_saved_tensors_can_be_moved(torchvision: ModuleType) -> None:
    """All that is kept for backward goes through save_for_backward: saved_tensors_hooks see it, offloading works."""
    ours, theirs = (model.double() for model in twins(torchvision, "bottleneck"))
    packed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.numel())
        return t.clone()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
            return model(x)

    x = images(4, 3, 32, 32, dtype=torch.float64)
    assert_same_step(step(ours, x, run), step(theirs, x))
    assert sum(packed) > 4 * 64 * 16 * 16


def test_backward_twice_and_double_backward() -> None:
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=2)
    loss = model(images(4, 3, 32, 32)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time|twice|freed"):
        loss.backward()
    grads = torch.autograd.grad(model(images(4, 3, 32, 32)).square().sum(), model.conv1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        grads[0].sum().backward()


def test_an_output_changed_in_place_is_noticed() -> None:
    block = fr.BasicBlock(8, 8)
    out = block(images(2, 8, 6, 6).requires_grad_())
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("train", [False, True])
def test_the_input_is_not_touched(train: bool) -> None:
    """relu has inplace=True, as torchvision's: no caller's tensor may change for it."""
    for module in (fr.resnet18(num_classes=2), fr.BasicBlock(3, 3), fr.Bottleneck(12, 3)):
        module.train(train)
        x = images(2, 12, 32, 32) if isinstance(module, fr.Bottleneck) else images()
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout)
            with torch.set_grad_enabled(train):
                module(y)
            assert torch.equal(x, y)


# What else goes with models: fx, compile, export, copies, data parallel


def test_symbolic_trace_keeps_blocks_whole(torchvision: ModuleType) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    traced = torch.fx.symbolic_trace(ours)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1.0",
        "layer2.0",
        "layer3.0",
        "layer4.0",
        "avgpool",
        "fc",
    ]
    assert_infers_as(traced, theirs)
    assert_trains_as(traced.train(), theirs.train())


def test_feature_extractor(torchvision: ModuleType) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = {"relu": "stem", "layer2": "mid", "layer4.0": "last", "flatten": "vector"}
    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    assert "layer4.0" in get_graph_node_names(ours)[1]
    exact = infer(create_feature_extractor(copy.deepcopy(theirs), nodes).double(), images().double())
    mine, other = (infer(create_feature_extractor(model, nodes), images()) for model in (ours, theirs))
    for name in nodes.values():
        assert_close(name, mine[name], other[name], exact[name])
    extractors = [create_feature_extractor(model.train(), nodes).double() for model in (ours, theirs)]
    assert_same_step(*(step(m, images(4, 3, 32, 32).double(), lambda m, x: m(x)["last"]) for m in extractors))


def test_backbones_that_take_a_model_apart(torchvision: ModuleType) -> None:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    body = [nn.Sequential(*list(model.children())[:-1]) for model in (ours, theirs)]
    assert_infers_as(body[0], body[1])
    getters = [IntermediateLayerGetter(model, {"layer1": "0", "layer4": "1"}) for model in (ours, theirs)]
    exact = infer(copy.deepcopy(getters[1]).double(), images().double())
    mine, other = (infer(getter, images()) for getter in getters)
    for name in exact:
        assert_close(name, mine[name], other[name], exact[name])
    torch.manual_seed(0)
    fpn = _resnet_fpn_extractor(ours, 2)
    torch.manual_seed(0)
    plain = _resnet_fpn_extractor(theirs, 2)
    mine, other = infer(fpn, images(1, 3, 64, 64)), infer(plain, images(1, 3, 64, 64))
    assert all(relative(mine[name], other[name]) < 1e-5 for name in other)
    assert fpn(images(1, 3, 64, 64))["0"].requires_grad


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_compile(torchvision: ModuleType, name: str) -> None:
    ours, theirs = (model.double() for model in twins(torchvision, name))
    x = images(4, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    named = step(compiled, x)
    assert_same_step({n.replace("_orig_mod.", ""): t for n, t in named.items()}, step(theirs, x))
    ours.eval()
    theirs.eval()
    assert_same("output", infer(compiled, x), infer(theirs, x))
    with torch.no_grad():
        ours.layer1[0].conv1.weight.mul_(2)
        theirs.layer1[0].conv1.weight.mul_(2)
    assert_same("changed weights", infer(compiled, x), infer(theirs, x))
    assert_same("another size", infer(compiled, x[:2, :, :24]), infer(theirs, x[:2, :, :24]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_export(torchvision: ModuleType, strict: bool) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    infer(ours, images())  # kept weights must not end up in the program
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(ours, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert program.state_dict.keys() == ours.state_dict().keys()
    assert_infers_as(loaded.module(), theirs, images(3, 3, 32, 32))


def test_jit_trace(torchvision: ModuleType) -> None:
    """A traced model holds torch's own ops only, so that it loads where fused_resnet is not installed."""
    ours, theirs = (model.eval() for model in twins(torchvision, "bottleneck"))
    infer(ours, images())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        traced = torch.jit.trace(ours, images())
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    kinds = {node.kind() for node in loaded.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    assert_infers_as(loaded, theirs, images(3, 3, 40, 40))


@pytest.mark.parametrize("train", [False, True])
def test_copies(torchvision: ModuleType, train: bool) -> None:
    """deepcopy, pickle and torch.save of a model that has run, then used; what is done to a copy stays there."""
    ours, _ = (model.train(train) for model in twins(torchvision, "basic"))
    with torch.set_grad_enabled(train):
        ours(images(4, 3, 32, 32))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    state = copy.deepcopy(ours.state_dict())
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    expected = infer(copy.deepcopy(ours), images())
    for other in copies:
        assert type(other) is fr.ResNet
        assert other.training is train
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
        assert torch.equal(infer(other, images()), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not infer(other, images()).any()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), state.values(), strict=True))
    assert torch.equal(infer(ours, images()), expected)


def test_distributed_data_parallel(torchvision: ModuleType, tmp_path: Any) -> None:
    """One process: DDP's hooks on gradients, its buckets and its module wrapper."""
    ours, theirs = (model.double() for model in twins(torchvision, "bottleneck"))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        x = images(4, 3, 32, 32, dtype=torch.float64)
        found = {name.replace("module.", ""): t for name, t in step(wrapped, x).items()}
    finally:
        torch.distributed.destroy_process_group()
    assert_same_step(found, step(theirs, x))


def test_update_bn_and_averaged_models(torchvision: ModuleType) -> None:
    """torch.optim.swa_utils: it averages parameters in place and gathers statistics with momentum None."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    outputs = []
    batches = [images(4, 3, 32, 32, dtype=torch.float64, seed=seed) for seed in range(3)]
    for model in twins(torchvision, "basic"):
        model.double().eval()
        averaged = AveragedModel(model)
        for seed in range(2):
            infer(averaged.eval(), batches[0])
            randomise(model, seed + 1)
            averaged.update_parameters(model)
        update_bn(batches, averaged)
        outputs.append(infer(averaged.eval(), batches[0]))
    assert_same("output", *outputs)


# The stem: BN, ReLU and max pool as one op, but for inference

STEM = {  # mode: (training, gradients, the primitives that it runs)
    "training": (True, True, {"bn_act_pool_train_forward", "bn_act_pool_backward"}),
    "batch statistics alone": (True, False, {"bn_act_pool_train_forward"}),
    "frozen statistics": (False, True, {"bn_act_pool_eval_forward", "bn_act_pool_backward"}),
    "inference": (False, False, set()),
}


@pytest.mark.parametrize("mode", STEM)
def test_stem(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    training, gradients, expected = STEM[mode]
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).double()
    randomise(model)
    results = []
    for ours in (model.train(training), fr.restore(copy.deepcopy(model.train(training)))):
        with torch.set_grad_enabled(gradients), primitives(monkeypatch) as ran:
            out = ours(images(3, 3, 45, 39, dtype=torch.float64))
            if gradients:
                out.square().sum().backward()
        pooled = {primitive for primitive in ran if primitive.startswith("bn_act_pool")}
        assert pooled == (expected if ours is model else set())
        found = {"output": out.detach(), "mean": ours.bn1.running_mean, "batches": ours.bn1.num_batches_tracked}
        parameters = (ours.conv1.weight, ours.bn1.weight, ours.bn1.bias)
        results.append(found | ({str(i): p.grad for i, p in enumerate(parameters)} if gradients else {}))
    for name in results[0]:
        assert_same(name, results[0][name], results[1][name], 1e-10)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, 2), nn.Identity()], ids=repr
)
def test_stem_with_another_pool(monkeypatch: pytest.MonkeyPatch, pool: nn.Module) -> None:
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    model.maxpool = pool
    with primitives(monkeypatch) as ran:
        assert_trains_as(model, fr.restore(copy.deepcopy(model)))
    assert "bn_act_pool_train_forward" not in ran
    assert ran["bn_act_train_forward"]


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu", "maxpool"])
def test_hooks_on_the_stem(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).double()
    seen: list[list[Tensor]] = []
    for ours in (model, fr.restore(copy.deepcopy(model))):
        seen.append([])
        ours.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, seen=seen[-1]: seen.extend((inputs[0].detach().clone(), out.detach().clone()))
        )
        with primitives(monkeypatch) as ran:
            ours(images(dtype=torch.float64)).sum().backward()
        assert not any(primitive.startswith("bn_act_pool") for primitive in ran)
    assert len(seen[0]) == 2
    if name == "bn1":  # relu works in place
        del seen[0][1], seen[1][1]
    for ours, plain in zip(*seen, strict=True):
        assert_same(name, ours, plain)


def test_the_stem_keeps_one_byte_per_window() -> None:
    """Beside the image and the conv's output: no rectified tensor, no 64-bit indices."""
    model = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = images(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model._stem(x)
    windows, image, conv_output = out.numel(), x.nbytes, 2 * 64 * 32 * 32 * 4
    large = sorted(size for size in kept.values() if size > 4096 and size != model.conv1.weight.nbytes)
    assert large == sorted((windows, image, conv_output))
