"""The calls that a block keeps in inference: taken while nothing has changed, and only then."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import images, infer, primitives, randomise
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.blocks import ResidualBlock
from fused_resnet.inference import InferencePlan

if dispatch.choose("conv_bias_act_forward", torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 1, None).pack is None:
    pytest.skip("no backend keeps folded weights here: oneDNN is off", allow_module_level=True)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InferencePlan]]:
    """The plans that ran."""
    seen: list[InferencePlan] = []
    run = InferencePlan.run
    monkeypatch.setattr(InferencePlan, "run", lambda plan, *args: (seen.append(plan), run(plan, *args))[1])
    return seen


def net(block: type[ResidualBlock] = fr.Bottleneck) -> fr.ResNet:
    torch.manual_seed(3)
    model = fr.ResNet(block, (2, 1, 1, 1), num_classes=5).eval()
    randomise(model)
    return model


BLOCKS = 5


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("block", [fr.BasicBlock, fr.Bottleneck])
def test_second_calls_are_planned(block: type[ResidualBlock], count: int, runs: list[InferencePlan]) -> None:
    model, x = net(block), images(count, 3, 64, 64)
    first = infer(model, x)
    assert not runs
    assert torch.equal(infer(model, x), first)
    assert len(runs) == BLOCKS
    assert [plan.projection is not None for plan in runs] == [block is fr.Bottleneck, False, True, True, True]
    alone = model.layer1[1]
    y = images(count, 64 * block.expansion, 9, 9).contiguous(memory_format=torch.channels_last)
    kept = y.clone()
    assert torch.equal(infer(alone, y), infer(alone, y))
    assert len(runs) == BLOCKS + 1
    assert torch.equal(y, kept), "a block that is called alone leaves its input"


def set_(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def in_place(path: str, name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            getattr(model.get_submodule(path), name).mul_(0.5)

    return change


def double_forward(model: nn.Module) -> None:
    conv = model.get_submodule("layer1.0.conv2")
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign,arg-type]


def halved(path: str, name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        value = getattr(module, name).detach() / 2
        setattr(module, name, nn.Parameter(value) if name in module._parameters else value)

    return change


def set_storage(model: nn.Module) -> None:
    weight = model.get_submodule("layer2.0.conv1").weight
    weight.data = weight.data / 2


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a weight in place": in_place("layer1.1.conv2", "weight"),
    "gamma in place": in_place("layer3.0.bn3", "weight"),
    "running_var in place": in_place("layer1.0.downsample.1", "running_var"),
    "a new parameter": halved("layer1.0.conv3", "weight"),
    "a new buffer": halved("layer2.0.bn1", "running_mean"),
    "another storage": set_storage,
    "eps": set_("layer1.0.bn2", "eps", 0.5),
    "dilation": lambda model: (
        set_("layer1.1.conv2", "dilation", (2, 2))(model),
        set_("layer1.1.conv2", "padding", (2, 2))(model),
    ),
    "a forward of its own": double_forward,
    "another activation": set_("layer1.0", "relu", nn.LeakyReLU(0.3)),
    "no shortcut's BN": lambda model: setattr(model.layer2[0], "downsample", model.layer2[0].downsample[:1]),
    "a BN in training": lambda model: model.layer4[0].bn2.train(),
    "a BN without statistics": lambda model: (
        model.layer1[1].bn1.register_buffer("running_mean", None)
        or model.layer1[1].bn1.register_buffer("running_var", None)
    ),
    "a hook that changes": lambda model: model.layer1[0].conv1.register_forward_hook(lambda module, args, out: out * 2),
    "a hook before": lambda model: model.layer1[0].bn2.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a hook on a shortcut": lambda model: model.layer2[0].downsample.register_forward_hook(
        lambda m, args, out: out / 2
    ),
    "a parametrization": lambda model: (
        nn.utils.parametrizations.weight_norm(model.layer1[0].conv2)
        and in_place("layer1.0.conv2.parametrizations.weight", "original0")(model)
    ),
    "a state dict": lambda model: model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()}),
    "a residual scale": lambda model: setattr(model.layer1[0], "residual_scale", nn.Parameter(torch.tensor(0.25))),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Callable[[nn.Module], Any], count: int, runs: list[InferencePlan]) -> None:
    model, x = net(), images(count, 3, 64, 64)
    before = infer(model, x)
    assert torch.equal(infer(model, x), before)
    assert len(runs) == BLOCKS
    plain = fr.restore(copy.deepcopy(model))
    change(model), change(plain)
    for _ in range(3):
        after, expected = infer(model, x), infer(plain, x)
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not torch.allclose(after, before, rtol=1e-2), "the change shows in the output"


def test_surroundings_are_seen(runs: list[InferencePlan]) -> None:
    """Other sizes, layouts, types, backends and contexts are served otherwise, and plans made anew."""
    model, x = net(), images(2, 3, 64, 64)
    exact = infer(fr.restore(copy.deepcopy(model)), x)
    infer(model, x), infer(model, x)
    assert len(runs) == BLOCKS

    def ran(call: Callable[[], Tensor]) -> int:
        runs.clear()
        torch.testing.assert_close(call().float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
        return len(runs)

    for name in ("reference", "library"):
        with fr.use_backend(name):
            assert ran(lambda: infer(model, x)) == 0
    assert ran(lambda: model(x)) == 0  # with gradients
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(lambda: infer(model, x)) == 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert ran(lambda: infer(model, x)) == 0
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert ran(lambda: infer(model, x)) == 0
    handle.remove()
    infer(model, x)
    assert ran(lambda: infer(model, x)) == BLOCKS
    infer(model, images(1, 3, 96, 64))
    assert ran(lambda: infer(model, x)) == 0  # the plans are for the last size
    assert ran(lambda: infer(model, x)) == BLOCKS


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_start_without_plans(copied: Callable[[nn.Module], nn.Module], runs: list[InferencePlan]) -> None:
    model, x = net(), images(2, 3, 64, 64)
    expected = infer(model, x)
    other = copied(model)
    in_place("layer1.0.conv1", "weight")(model)
    assert torch.equal(infer(other, x), expected)
    assert not runs


def test_train_and_refresh_drop_plans() -> None:
    model, x = net(), images(2, 3, 64, 64)
    for drop in (lambda: model.train().eval(), lambda: fr.refresh(model), lambda: model.to(torch.float32)):
        infer(model, x)
        blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
        assert all(block._inference._plan is not None for block in blocks)
        drop()
        assert all(block._inference._plan is None for block in blocks)


def test_several_threads_call_one_model() -> None:
    model = net()
    sizes = [(1, 3, 64, 64), (2, 3, 64, 64), (1, 3, 80, 64)]
    inputs = [images(*size) for size in sizes]
    expected = [infer(copy.deepcopy(model), x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.allclose(infer(model, inputs[index]), expected[index], rtol=1e-4, atol=1e-4):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_plans_count_as_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images(1, 3, 64, 64)
    counts = []
    for _ in range(2):
        with primitives(monkeypatch) as ran:
            infer(model, x)
        counts.append(dict(ran))
    assert counts[0] == counts[1] == {"conv_bias_act_forward": 1 + 3 * BLOCKS + 4}
