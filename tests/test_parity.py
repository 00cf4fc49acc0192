"""fused_resnet.verify: passes on good models, finds kernels broken on purpose, and touches nothing."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import needs_cpp
from networks import images, primitives, randomise
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import dispatch, parity
from fused_resnet.backends import cpp, library, reference


def net(kind: str = "BasicBlock", **options: Any) -> nn.Module:
    """Deep enough to hold every case, shallow enough that gradients are not chaotic."""
    torch.manual_seed(0)
    block = getattr(fr, kind)
    width = 8 * block.expansion
    model = nn.Sequential(
        fr.ConvBNAct(3, 8),
        block(8, 8, 1, nn.Sequential(nn.Conv2d(8, width, 1, bias=False), nn.BatchNorm2d(width))),
        block(width, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )
    randomise(model)
    return model


# Good models


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, "autocast"], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_good_models_pass(kind: str, train: bool, dtype: Any, layout: torch.memory_format) -> None:
    model, x = net(kind), images(4, 3, 20, 20).contiguous(memory_format=layout)
    if dtype != "autocast":
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", enabled=dtype == "autocast"):
        report = fr.verify(model, x, train=train)
    assert report.ok
    assert report.train is train
    assert report.unfused == []
    names = [row.name for row in report.rows]
    assert names[0] == "output 0"
    assert len(set(names)) == len(names)
    if train:
        assert "gradient input" in names
        assert {f"gradient {n}" for n, _ in model.named_parameters()} <= set(names)
        assert {f"buffer {n}" for n, _ in model.named_buffers()} <= set(names)
    else:
        assert len(names) == 1
    text = str(report)
    assert text.startswith(f"parity ok ({'training' if train else 'inference'}): {len(names)} of {len(names)}")
    assert report.worst.name in text


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_deep_models_pass(name: str, train: bool) -> None:
    """On seeds that nobody chose: the budget must hold for what chance does to deep gradients."""
    model = getattr(fr, name)(num_classes=10)
    randomise(model)
    for seed in range(2):
        assert fr.verify(model, images(4, 3, 64, 64, seed=seed), train=train, seed=seed).ok


@pytest.mark.parametrize("memory", ["low", "fast"])
def test_memory_modes_pass(memory: str) -> None:
    model = fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16, memory=memory)
    randomise(model)
    assert fr.verify(model, images(4, 3, 48, 48), train=True).ok


def test_the_small_modules_are_compared_with_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.join = fr.BNAct(3), fr.AddReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.norm(x), x)

    good = reference.bn_act_train_forward
    with fr.use_backend("reference"):
        assert fr.verify(Small(), images(), train=True).ok
        wrong = lambda *args: (lambda out, *more: (out * 1.01, *more))(*good(*args))  # noqa: E731
        monkeypatch.setattr(reference, "bn_act_train_forward", wrong)
        with pytest.raises(fr.ParityError, match="output 0"):
            fr.verify(Small(), images(), train=True)


def test_reported_units() -> None:
    """What ran unfused stands in the report, so that nobody takes a trivial comparison for a proof."""
    model = net()
    model[1].conv1.register_forward_hook(lambda *_: None)
    report = fr.verify(model, images())
    assert report.unfused == [("1.conv1", "a hook is set on its Conv2d")]
    assert "1.conv1 runs unfused: a hook is set on its Conv2d" in str(report)


# Kernels broken on purpose


def scaled(index: int, factor: float = 1.01) -> Callable[[Any], Any]:
    """One result of a primitive off by a factor."""

    def change(result: Any) -> Any:
        if isinstance(result, Tensor):
            return result * factor
        return tuple(r * factor if i == index and r is not None else r for i, r in enumerate(result))

    return change


def one_channel(result: Any) -> Any:
    first = (result if isinstance(result, Tensor) else result[0]).clone()
    first[:, 0] = first[:, 1]
    return first if isinstance(result, Tensor) else (first, *result[1:])


def nan(result: Any) -> Any:
    first = (result if isinstance(result, Tensor) else result[0]).clone()
    first.view(-1)[0] = math.nan
    return first if isinstance(result, Tensor) else (first, *result[1:])


def broken(monkeypatch: pytest.MonkeyPatch, module: Any, primitive: str, change: Callable[[Any], Any]) -> None:
    good = getattr(module, primitive)
    monkeypatch.setattr(module, primitive, lambda *args: change(good(*args)))


INFERENCE: dict[str, Callable[[Any], Any]] = {
    "1% off": scaled(0),
    "1e-5 off": scaled(0, 1 + 1e-5),
    "one channel": one_channel,
    "NaN": nan,
    "zeros": torch.zeros_like,
    "no relu": lambda y: y - 0.01,
    "other dtype": lambda y: y.to(torch.float64).to(torch.bfloat16).to(y.dtype),
}


@pytest.mark.parametrize("how", INFERENCE)
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_broken_inference_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, how: str) -> None:
    model = net(kind)
    broken(monkeypatch, library, "conv_bias_act_forward", INFERENCE[how])
    with pytest.raises(fr.ParityError, match=r"parity FAILED \(inference\): 0 of 1 .*worst output 0") as caught:
        fr.verify(model, images(2, 3, 20, 20))
    assert isinstance(caught.value, AssertionError)
    assert caught.value.report is not None
    assert not caught.value.report.ok
    monkeypatch.undo()
    assert fr.verify(model, images(2, 3, 20, 20)).ok


def test_a_wrong_fold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gamma's sign, say, as in folds that take its absolute value."""
    from fused_resnet import modules

    fold = modules.fold
    monkeypatch.setattr(modules, "fold", lambda w, b, gamma, *args: fold(w, b, gamma.abs(), *args))
    with pytest.raises(fr.ParityError):
        fr.verify(net(), images())


TRAINING: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "forward 1% off": ("bn_act_train_forward", scaled(0), "output|gradient|buffer"),
    "forward, one channel": ("bn_act_train_forward", one_channel, "output|gradient|buffer"),
    "forward, NaN": ("bn_act_train_forward", nan, "output|gradient|buffer"),
    "saved mean": ("bn_act_train_forward", scaled(1), "gradient"),
    "saved variance": ("bn_act_train_forward", scaled(2), "gradient"),
    "grad of x": ("bn_act_backward", scaled(0), "gradient"),
    "grad of gamma": ("bn_act_backward", scaled(1), "gradient"),
    "grad of beta": ("bn_act_backward", scaled(2), "gradient"),
    "grad of beta, sign": ("bn_act_backward", scaled(2, -1.0), "gradient"),
    "grad of residual": ("bn_act_backward", scaled(3), "gradient"),
    "grad, NaN": ("bn_act_backward", nan, "gradient"),
}


@needs_cpp
@pytest.mark.parametrize("how", TRAINING)
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_broken_training_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, how: str) -> None:
    primitive, change, names = TRAINING[how]
    model, x = net(kind), images(4, 3, 20, 20)
    broken(monkeypatch, cpp, primitive, change)
    if how == "grad of residual":
        with primitives(monkeypatch) as ran:
            model(x.contiguous(memory_format=torch.channels_last)).sum().backward()
        if ran["second_moments"]:  # Gram blocks take the shortcut's gradient elsewhere
            broken(monkeypatch, cpp, "add_relu_backward", scaled(0))
    with pytest.raises(fr.ParityError, match=r"parity FAILED \(training\)") as caught:
        fr.verify(model, x, train=True)
    report = caught.value.report
    assert report is not None
    assert report.worst.name.split(" ")[0] in names.split("|")
    assert not report.worst.ok
    assert report.worst.name in str(caught.value)
    assert fr.verify(model, x).ok, "inference is another kernel"
    monkeypatch.undo()
    assert fr.verify(model, x, train=True).ok


@needs_cpp
@pytest.mark.parametrize("which", [0, 1])
def test_broken_running_statistics_are_found(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """The biased variance kept, or the mean's sign: outputs and gradients are all right."""
    good = cpp.bn_act_train_forward

    def wrong(x: Tensor, gamma: Any, beta: Any, mean: Any, var: Any, *args: Any) -> Any:
        kept = (mean, var)[which]
        before = None if kept is None else kept.clone()
        result = good(x, gamma, beta, mean, var, *args)
        if kept is not None:
            kept.lerp_(before, 0.1)
        return result

    monkeypatch.setattr(cpp, "bn_act_train_forward", wrong)
    with pytest.raises(fr.ParityError, match="buffer .*running_" + ("mean" if which == 0 else "var")):
        fr.verify(net(), images(4, 3, 20, 20), train=True)


@needs_cpp
@pytest.mark.parametrize("size", [1e-8, 1e-4])
def test_a_mean_that_is_0_but_for_rounding(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Behind a conv of what is centred: rounding passes, and what matters beside the deviation does not."""
    model = nn.Sequential(nn.BatchNorm2d(8), fr.ConvBNAct(8, 8, 1))
    good = cpp.bn_act_train_forward

    def off(x: Tensor, gamma: Any, beta: Any, mean: Tensor, *args: Any) -> Any:
        result = good(x, gamma, beta, mean, *args)
        mean += size * torch.randn(8)
        return result

    monkeypatch.setattr(cpp, "bn_act_train_forward", off)
    if size < 1e-7:
        assert fr.verify(model, images(4, 8, 9, 9), train=True).ok
    else:
        with pytest.raises(fr.ParityError, match="running_mean"):
            fr.verify(model, images(4, 8, 9, 9), train=True)


@needs_cpp
@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_a_relu_near_0_is_no_failure(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """A gradient may be off at three of four inputs; one that is off at each of them is wrong."""
    model, x = nn.Sequential(fr.ConvBNAct(3, 8), fr.ConvBNAct(8, 8)), images(4, 3, 20, 20)
    runs: list[int] = []
    good = parity._compared

    def compared(*args: Any) -> parity.Report:
        runs.append(0)
        with monkeypatch.context() as patch:
            if len(runs) <= wrong:
                broken(patch, cpp, "bn_act_backward", scaled(0))
            return good(*args)

    monkeypatch.setattr(parity, "_compared", compared)
    if wrong < 4:
        assert fr.verify(model, x, train=True).ok
    else:
        with pytest.raises(fr.ParityError, match="gradient"):
            fr.verify(model, x, train=True)
    assert len(runs) == min(wrong + 1, 4)


def test_broken_counter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet import batchnorm

    monkeypatch.setattr(batchnorm, "batch_momentum", lambda bn: bn.momentum)
    if dispatch.is_fused("bn_act", "cpu"):
        with pytest.raises(fr.ParityError, match="num_batches_tracked"):
            fr.verify(net(), images(4, 3, 20, 20), train=True)


@needs_cpp
def test_a_broken_second_order_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram form's moments, which only some blocks use."""
    good = reference.second_moments
    monkeypatch.setattr(reference, "second_moments", lambda rows: (good(rows)[0], good(rows)[1] * 1.01))
    with fr.use_plan(gram=True), pytest.raises(fr.ParityError):
        fr.verify(net("Bottleneck"), images(4, 3, 20, 20).to(memory_format=torch.channels_last), train=True)


# What it leaves behind


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_not_touched(monkeypatch: pytest.MonkeyPatch, train: bool, fails: bool) -> None:
    model = net().train()
    model[1].eval()
    model[2].bn1.requires_grad_(False)
    model(images(4, 3, 20, 20)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wants = [p.requires_grad for p in model.parameters()]
    identities = [id(p) for p in [*model.parameters(), *model.buffers()]]
    x = images(4, 3, 20, 20)
    before, random = x.clone(), torch.get_rng_state()
    if fails:
        monkeypatch.setattr(parity, "FACTOR", -1e9)
        with pytest.raises(fr.ParityError):
            fr.verify(model, x, train=train)
    else:
        fr.verify(model, x, train=train)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert [module.training for module in model.modules()] == modes
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert [id(p) for p in [*model.parameters(), *model.buffers()]] == identities
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.__dict__.get("_fused", True) for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_called_in_any_grad_mode(context: Any, train: bool) -> None:
    model = net()
    with context():
        x = images(4, 3, 20, 20)
        assert fr.verify(model, x, train=train).ok


def test_inputs_that_want_gradients() -> None:
    x = images(4, 3, 20, 20).requires_grad_()
    assert fr.verify(net(), x, train=True).ok
    assert fr.verify(net(), x).ok
    assert fr.verify(net(), x * 2, train=True).ok
    assert x.grad is None


# Other models


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Heads(nn.Module):
    """Outputs of every kind of nesting, in training another one."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrap = net()[:3], wrap

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return self.wrap(x.mean((2, 3)), x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"b": b}],
        lambda a, b: {"out": a, "aux": (b,)},
        lambda a, b: OrderedDict(out=a, aux=b),
        lambda a, b: Pair(a, [b]),
        lambda a, b: {"out": a, "b": b, "none": None, "text": "x", "number": 3},
    ],
    ids=["tuple", "list", "dict", "ordered", "named", "mixed"],
)
def test_nested_outputs(monkeypatch: pytest.MonkeyPatch, wrap: Any, train: bool) -> None:
    model = Heads(wrap)
    report = fr.verify(model, images(4, 3, 20, 20), train=train)
    assert [row.name for row in report.outputs] == ["output 0", "output 1"]
    broken(monkeypatch, library, "conv_bias_act_forward", scaled(0))
    if not train:
        with pytest.raises(fr.ParityError, match="0 of 2"):
            fr.verify(model, images(4, 3, 20, 20))


def test_a_model_without_tensors_to_compare() -> None:
    with pytest.raises(ValueError, match="tensor"):
        fr.verify(Heads(lambda a, b: "nothing"), images())


def test_dropout_is_seeded() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5))
    assert fr.verify(model, images(4, 3, 20, 20), train=True).ok


def test_frozen_models() -> None:
    assert fr.verify(net().requires_grad_(False), images(4, 3, 20, 20), train=True).ok


def test_nan_and_inf_in_both_are_equal() -> None:
    """A comparison must neither choke on them nor let a finite number stand for one."""
    value = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert parity.compare("x", value, value, value.double()).ok
    for wrong in ([1.0, 0.0, math.inf, -math.inf], [1.0, math.nan, -math.inf, -math.inf], [math.nan] * 4):
        assert not parity.compare("x", torch.tensor(wrong), value, value.double()).ok
    assert not parity.compare("x", value, torch.ones(4), torch.ones(4).double()).ok


def test_compare() -> None:
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain = exact.float()
    assert parity.compare("x", plain, plain, exact).ok
    off = (exact * (1 + 3e-6)).float()
    row = parity.compare("x", off, plain, exact)
    assert not row.ok
    assert row.ours == pytest.approx(3e-6, rel=0.1)
    assert row.max_abs == pytest.approx(6e-6, rel=0.1)
    assert parity.compare("x", off, plain, exact, granted=2e-6).ok
    assert not parity.compare("x", plain.double(), plain, exact).ok, "another dtype"
    assert not parity.compare("x", plain[:50], plain, exact).ok, "another shape"
    zeros = torch.zeros(3)
    assert parity.compare("x", zeros, zeros, zeros.double()).ok
    assert not parity.compare("x", zeros + 1e-3, zeros, zeros.double()).ok
    assert parity.compare("n", torch.tensor(3), torch.tensor(3), torch.tensor(3)).ok
    assert not parity.compare("n", torch.tensor(4), torch.tensor(3), torch.tensor(3)).ok
    empty = torch.zeros(0, 3)
    assert parity.compare("x", empty, empty, empty.double()).ok


def test_errors_are_the_callers() -> None:
    with pytest.raises(ValueError, match="needs 3 channels"):
        fr.verify(net(), images(1, 4, 8, 8))
