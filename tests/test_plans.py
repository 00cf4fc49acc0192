"""How blocks train is data: rules for a device, rules for layers of some shape, what is asked for; looked up once."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from networks import images, randomise
from torch import nn

import fused_resnet as fr
from fused_resnet import plans
from fused_resnet.blocks import training_plans
from fused_resnet.models.cifar import CifarResNet
from fused_resnet.ops.residual_block import Plan
from fused_resnet.plans import Choice, Layer, LayerRule, Rules, layer_rule, look_up

LAYER = Layer(64, 256, (1, 1), (1, 1), (0, 0), 1, 6272, "float32")
CPU = torch.device("cpu")


def ship(monkeypatch: pytest.MonkeyPatch, *layers: dict[str, Any], **rules: Any) -> None:
    monkeypatch.setattr(plans, "_shipped", lambda: {"cpu": plans._rules(layers, **rules)})


def test_shipped_rules() -> None:
    shipped = plans._shipped()
    assert shipped.keys() >= {"cpu", "cuda"}
    for rules in shipped.values():
        assert all(isinstance(rule, LayerRule) for rule in rules.layers)
    assert plans.rules(CPU) == shipped["cpu"]
    assert plans.rules(torch.device("meta")) == Rules()


@pytest.mark.parametrize("pixels", [64 * 64 - 1, 64 * 64])
def test_a_device_is_the_fallback(pixels: int) -> None:
    layer = LAYER._replace(pixels=pixels)
    assert look_up(layer, Rules(64.0)) == Choice(pixels >= 64 * 64, False, False, False)
    assert look_up(layer, Rules()) == Choice(False, False, False, False)
    assert look_up(layer, Rules(None, True, True)) == Choice(False, True, True, False)


@pytest.mark.parametrize(
    ("condition", "fits"),
    [
        ({}, True),
        ({"in_channels": 64}, True),
        ({"in_channels": 65}, False),
        ({"out_channels": 256}, True),
        ({"out_channels": 64}, False),
        ({"kernel": [1, 1]}, True),
        ({"kernel": (3, 3)}, False),
        ({"stride": [1, 1]}, True),
        ({"stride": [2, 2]}, False),
        ({"groups": 1}, True),
        ({"groups": 32}, False),
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"pixels": [6272, 6273]}, True),
        ({"pixels": [0, 6272]}, False),
        ({"pixels": [6273, None]}, False),
        ({"pixels": [6272, None]}, True),
        ({"in_channels": 64, "dtype": "float16"}, False),
    ],
)
def test_a_rule_holds_for_its_layers(condition: dict[str, Any], fits: bool) -> None:
    rule = layer_rule(condition | {"gram": True})
    assert look_up(LAYER, Rules(layers=(rule,))) == Choice(fits, False, False, fits)


def test_the_first_rule_that_says_counts() -> None:
    rules = Rules(64.0, layers=(LayerRule(stored=True), LayerRule(gram=False), LayerRule(gram=True, stored=False)))
    assert look_up(LAYER, rules) == Choice(False, False, True, True)


@pytest.mark.parametrize(
    "change",
    [{"kernel": (3, 3)}, {"kernel": (1, 1), "padding": (1, 1)}, {"groups": 2}, {"in_channels": 512}],
    ids=str,
)
def test_what_a_layer_does_not_allow(change: dict[str, Any]) -> None:
    asked = Rules(layers=(LayerRule(gram=True, prologue=True),))
    assert look_up(LAYER._replace(**change), asked).gram is False
    assert look_up(LAYER, asked) == Choice(True, True, False, True)


def test_where_processes_differ_in_their_batches() -> None:
    """No rule that depends on pixels holds for any of them."""
    layer = LAYER._replace(pixels=None)
    ranged, others = layer_rule({"pixels": [0, None], "gram": False}), layer_rule({"gram": False, "prologue": True})
    assert look_up(layer, Rules(64.0, layers=(ranged,))).gram is True
    assert look_up(layer, Rules(64.0, layers=(others,))) == Choice(False, True, False, True)
    assert look_up(layer._replace(in_channels=256), Rules(64.0)).gram is False


def test_what_is_asked_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers asked for, then all as asked, then layers as shipped, then the device."""
    ship(monkeypatch, {"in_channels": 64, "gram": False, "prologue": True}, gram_pixels_per_channel=64.0)

    def found() -> Choice:
        return look_up(LAYER, plans.rules(CPU))

    assert found() == Choice(False, True, False, True)
    with fr.use_plan(gram=True):
        assert found() == Choice(True, True, False, True)
        with fr.use_plan(prologue=False, stored=True):
            assert found() == Choice(False, False, True, True)
        with fr.use_plan(gram=True, layers=[{"out_channels": 256, "gram": False}, {"gram": True}]):
            assert found() == Choice(False, True, False, True)
        assert found() == Choice(True, True, False, True)
    with fr.use_plan(gram=False, prologue=False):
        assert found() == Choice(False, False, False, False)
    assert found() == Choice(False, True, False, True)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"channels": 3}, "has in_channels, .*got 'channels'"),
        ({"gram": 1}, "gram = 1"),
        ({"kernel": 3}, "kernel = 3"),
        ({"stride": [1, None]}, "stride = "),
        ({"pixels": [1, 2, 3]}, "pixels = "),
        ({"pixels": [None, 3]}, "pixels = "),
        ({"dtype": "half precision"}, "dtype = 'half precision'"),
        ({"dtype": "nn"}, "dtype = 'nn'"),
        ({"in_channels": "64"}, "in_channels = '64'"),
        ({"in_channels": True}, "in_channels = True"),
    ],
)
def test_rules_that_there_are_not(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), fr.use_plan(layers=[rule]):
        pass
    assert plans._asked.get() == plans.Asked()


def net() -> fr.ResNet:
    torch.manual_seed(0)
    found = fr.ResNet(fr.Bottleneck, [2, 1, 1, 1], num_classes=4, width_per_group=16).train()
    randomise(found)
    return found


@pytest.mark.parametrize("form", ["Gram", "projection", "stored", "prologue"])
def test_a_rule_changes_its_layer_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a network: the plans, and what runs, which gives the same gradients."""
    model = net()
    block = model.layer2[0]
    last, projection, size = block.conv3, block.downsample[0], 2 * 8 * 8
    ship(monkeypatch, gram_pixels_per_channel=None)
    shapes = [(conv.in_channels, conv.out_channels) for conv in (block.conv1, block.conv2, last, projection)]
    layers: list[dict[str, Any]] = {
        "Gram": [{"out_channels": last.out_channels, "in_channels": last.in_channels, "gram": True}],
        "projection": [
            {"stride": [2, 2], "in_channels": projection.in_channels, "kernel": [1, 1], "gram": True},
            {"out_channels": last.out_channels, "pixels": [size, size + 1], "stored": True},
        ],
        "stored": [{"out_channels": last.out_channels, "in_channels": last.in_channels, "stored": True}],
        "prologue": [{"in_channels": i, "out_channels": o, "prologue": True} for i, o in shapes],
    }[form]
    expected = Plan(form == "Gram", form == "projection", "balanced", form == "prologue")
    x = images(2, 3, 64, 64)
    with fr.use_plan(layers=layers):
        found = {name: plan for name, _, _, plan, _ in training_plans(model, 2, 64)}
        rows = next(row.layers for row in training_plans(model, 2, 64) if row.name == "layer2.0")
        twin = copy.deepcopy(model)
        twin(x).square().sum().backward()
    assert found == dict.fromkeys(found) | {"layer2.0": expected}
    assert [row.form for row in rows.values()] == [
        "stored output",
        "stored output",
        "Gram form" if form == "Gram" else "stored output",
        "Gram form" if form == "projection" else "stored output",
    ]
    assert [row.input == "prologue" for row in rows.values()] == [False, *[form == "prologue"] * 2, False]
    assert any(row.by_layer for row in rows.values())
    assert {name: plan for name, _, _, plan, _ in training_plans(model, 2, 64)} == dict.fromkeys(found)
    model(x).square().sum().backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-3 * float(theirs.grad.abs().max()))


def test_one_look_up_per_layer_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: Counter[Layer] = Counter()

    def counted(layer: Layer, rules: Rules) -> Choice:
        looked[layer] += 1
        return look_up(layer, rules)

    monkeypatch.setattr(plans, "look_up", counted)
    plans._plan.cache_clear()
    model, x = CifarResNet((2, 2, 2), shortcut="B").train(), images(2, 3, 16, 16)
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules()) - 1  # but the stem
    for _ in range(3):
        model(x)
        assert 0 < sum(looked.values()) <= convs
    first = sum(looked.values())
    assert {layer.pixels for layer in looked} == {2 * 16 * 16, 2 * 8 * 8, 2 * 4 * 4}
    CifarResNet((2, 2, 2), shortcut="B").train()(x)
    assert sum(looked.values()) == first, "another network of these shapes"
    with fr.use_plan(stored=False):
        model(x)
    assert sum(looked.values()) == 2 * first, "other rules"
    model(images(3, 3, 16, 16))
    assert sum(looked.values()) == 3 * first, "another shape"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert sum(looked.values()) == 4 * first, "another dtype"
    assert {layer.dtype for layer in looked} == {"float32", "bfloat16"}
    model.layer2[0].conv2.stride = (1, 1)  # type: ignore[index]
    model(x)
    assert sum(looked.values()) == 4 * first, "a geometry seen before"
