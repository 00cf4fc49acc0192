"""How a residual block runs in training: as one op or unit by unit, which convs take the Gram form, which a prologue.

The Gram form of a 1x1 conv (`fused_resnet.ops.block_units`) trades passes over its wide output for products of the
size of its weight, so it pays where a batch has many pixels for each of the conv's input channels.

Plans are made of rules, which are data: `fused_resnet/data/plans.json` holds those of each device, by its name or type,
and among them `layers`, a list of objects that say otherwise for convs of some shape:

    {"in_channels": 512, "kernel": [1, 1], "pixels": [0, 25088], "dtype": "float32", "gram": false}

What an object leaves out it does not ask for, or leaves to the next that fits, and in the end to its device's rules.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.ops.checks import autocast_dtype, conv_extent
from fused_resnet.ops.residual_block import Plan

MEMORY = ("balanced", "low", "fast")


class Layer(NamedTuple):
    """A conv as rules see it. `pixels`: of its output, the whole batch; None: batches of several processes differ."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    pixels: int | None
    dtype: str


class LayerRule(NamedTuple):
    """What is so for convs of some shape: those that have what is not None here, and `pixels` from the first number up
    to the second, without it (None: no limit)."""

    in_channels: int | None = None
    out_channels: int | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    groups: int | None = None
    pixels: tuple[int, int | None] | None = None
    dtype: str | None = None
    gram: bool | None = None
    prologue: bool | None = None
    stored: bool | None = None

    def fits(self, layer: Layer) -> bool:
        for name in ("in_channels", "out_channels", "kernel", "stride", "groups", "dtype"):
            if getattr(self, name) not in (None, getattr(layer, name)):
                return False
        if self.pixels is None:
            return True
        least, limit = self.pixels
        return layer.pixels is not None and least <= layer.pixels and (limit is None or layer.pixels < limit)


CHOICES = ("gram", "prologue", "stored")


def layer_rule(given: Mapping[str, Any]) -> LayerRule:
    """A rule from what JSON has of it.

    Raises:
        ValueError: a name or a value that no rule has.
    """
    for name, value in given.items():
        if name not in LayerRule._fields:
            raise ValueError(f"a layer's rule has {', '.join(LayerRule._fields)}; got {name!r}")
        if not _is_valid(name, value):
            raise ValueError(f"a layer's rule cannot have {name} = {value!r}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return LayerRule(**fields)


def _is_valid(name: str, value: Any) -> bool:
    if name in CHOICES:
        return isinstance(value, bool)
    if name == "dtype":
        return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
    if name in ("kernel", "stride", "pixels"):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            return False
        return type(value[0]) is int and (type(value[1]) is int or (name == "pixels" and value[1] is None))
    return type(value) is int


class Rules(NamedTuple):
    """What plans are made of, per device.

    gram_pixels_per_channel: pixels of the batch per input channel from which a conv takes the Gram form; None: none.
    prologue: whether convs read raw outputs through BN and ReLU, see `fused_resnet.ops.prologue_block`. A block does so
        where all its convs do; one with groups is the library's then, its input materialised.
    stored: whether "balanced" blocks without either are one op too, which keeps raw conv outputs alone and forms the
        rectified ones again, one more pass over each; else they run unit by unit. For a layer: the last of its block.
    layers: what is otherwise for some layers; of those that fit and say, the first counts.
    """

    gram_pixels_per_channel: float | None = None
    prologue: bool = False
    stored: bool = False
    layers: tuple[LayerRule, ...] = ()


class Choice(NamedTuple):
    """How a conv is to run, and whether a rule for such layers said so."""

    gram: bool
    prologue: bool
    stored: bool
    by_layer: bool


class Asked(NamedTuple):
    """What `use_plan` was asked for."""

    gram: bool | None = None
    prologue: bool | None = None
    stored: bool | None = None
    layers: tuple[LayerRule, ...] = ()


# Input channels up to which a conv in a block that merges statistics across processes takes the Gram form whatever its
# batch: its products are small beside those of any batch worth a process.
MERGED_GRAM_CHANNELS = 128

_asked: ContextVar[Asked] = ContextVar("fused_resnet_plan", default=Asked())  # noqa: B039


@contextlib.contextmanager
def use_plan(
    *,
    gram: bool | None = None,
    prologue: bool | None = None,
    stored: bool | None = None,
    layers: Sequence[Mapping[str, Any]] = (),
) -> Iterator[None]:
    """Ask for one way of training residual blocks within a `with` block, in this thread or task; None: as shipped.

    Args:
        gram: the Gram form wherever a conv allows it, or nowhere.
        prologue: convs that read raw conv outputs through BN and ReLU, wherever a block allows it, or nowhere.
            Kernels for it are the Triton backend's; on a CPU plain torch computes the same, more slowly.
        stored: blocks that take neither as one op, which keeps less, or unit by unit.
        layers: what is otherwise for convs of some shape, as `layers` in `fused_resnet/data/plans.json`: mappings of
            any of in_channels, out_channels, kernel, stride, groups, dtype ("bfloat16") and pixels (of the whole
            batch's output, [from, below or None]) to what must hold, and of gram, prologue, stored to what is asked.

    Raises:
        ValueError: a layer's rule has a name or a value that there is not.
    """
    token = _asked.set(Asked(gram, prologue, stored, tuple(layer_rule(rule) for rule in layers)))
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def _shipped() -> dict[str, Rules]:
    """fused_resnet/data/plans.json: the rules by device name or type; all that departs from `Rules()` was measured."""
    found = json.loads((Path(__file__).parent / "data" / "plans.json").read_text())
    return {device: _rules(**rules) for device, rules in found.items()}


def _rules(layers: Sequence[Mapping[str, Any]] = (), **rules: Any) -> Rules:
    return Rules(layers=tuple(layer_rule(rule) for rule in layers), **rules)


def rules(device: torch.device) -> Rules:
    """The rules for a device: as asked for, else as shipped for its name, else for its type."""
    shipped = _shipped()
    found = shipped.get(device.type, Rules())
    if device.type == "cuda":
        found = shipped.get(torch.cuda.get_device_name(device), found)
    asked = _asked.get()
    return found if asked == Asked() else _changed(found, asked)


def _changed(found: Rules, asked: Asked) -> Rules:
    """The rules with what was asked for in their place: for all layers first, then for some."""
    flags = {name: value for name in CHOICES if (value := getattr(asked, name)) is not None}
    layers = tuple(rule._replace(**dict.fromkeys(flags)) for rule in found.layers)
    if "gram" in flags:
        flags["gram_pixels_per_channel"] = 0.0 if flags.pop("gram") else None
    return found._replace(layers=asked.layers + layers, **flags)


def may_take_gram_form(layer: Layer) -> bool:
    """Whether there is a Gram form of the conv: 1x1, ungrouped, not narrowing."""
    if layer.groups != 1 or layer.kernel != (1, 1) or layer.padding != (0, 0):
        return False
    return layer.out_channels >= layer.in_channels


def look_up(layer: Layer, rules: Rules) -> Choice:
    """What the rules say of a layer, as far as it allows that."""
    fitting = [rule for rule in rules.layers if rule.fits(layer)]
    said = {name: [value for rule in fitting if (value := getattr(rule, name)) is not None] for name in CHOICES}
    least = rules.gram_pixels_per_channel
    if layer.pixels is None:
        enough = least is not None and layer.in_channels <= MERGED_GRAM_CHANNELS
    else:
        enough = least is not None and layer.pixels >= least * layer.in_channels
    gram, prologue, stored = (
        next(iter(said[name]), usual) for name, usual in zip(CHOICES, (enough, *rules[1:3]), strict=True)
    )
    return Choice(gram and may_take_gram_form(layer), prologue, stored, any(said.values()))


def plan_block(
    x: Tensor, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None, memory: str, merged: bool = False
) -> Plan | None:
    """The plan for a block that reads x, (N, C, H, W); None: unit by unit. `merged`: the same for all processes.

    Unit by unit keeps the rectified outputs too and forms none again: "fast" always, "balanced" by `Rules.stored`.
    """
    if memory == "fast":
        return None
    return _plan(_convs(x, convs, projection), memory, merged, rules(x.device))


class _Convs(NamedTuple):
    """All that the layers of a block follow from."""

    shape: torch.Size
    dtype: torch.dtype
    projected: bool
    geometry: tuple[Any, ...]

    def layers(self, merged: bool) -> list[Layer]:
        batch, _, *before = self.shape
        sizes, dtype = before, str(self.dtype).removeprefix("torch.")
        found = []
        for i, (inputs, outputs, kernel, stride, padding, dilation, groups) in enumerate(self.geometry):
            if self.projected and i == len(self.geometry) - 1:
                sizes = before
            sizes = [conv_extent(*of) for of in zip(sizes, kernel, stride, padding, dilation, strict=True)]
            pixels = None if merged else batch * sizes[0] * sizes[1]
            found.append(Layer(inputs, outputs, kernel, stride, padding, groups, pixels, dtype))
        return found


def _convs(x: Tensor, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None) -> _Convs:
    every = convs if projection is None else (*convs, projection)
    geometry = tuple(
        (c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups) for c in every
    )
    return _Convs(x.shape, autocast_dtype(x) or x.dtype, projection is not None, geometry)


@functools.lru_cache(maxsize=4096)
def _plan(convs: _Convs, memory: str, merged: bool, rules: Rules) -> Plan | None:
    """Made once for all blocks of a shape: each conv is looked up once."""
    choices = [look_up(layer, rules) for layer in convs.layers(merged)]
    last = choices[-2 if convs.projected else -1]
    prologue = all(choice.prologue for choice in choices)
    if memory == "balanced" and not (last.gram or prologue or last.stored):
        return None
    return Plan(last.gram, convs.projected and choices[-1].gram, memory, prologue)


class LayerPlan(NamedTuple):
    """How a conv of a block runs: "Gram form" or "stored output"; "prologue" or "materialised" its input, BN and ReLU
    of the conv before it; and whether a rule for such layers was asked."""

    layer: Layer
    form: str
    input: str
    by_layer: bool


def plan_layers(
    x: Tensor, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None, plan: Plan | None
) -> list[LayerPlan]:
    """What a block's plan is for each of its convs, the projection last; x as for `plan_block`."""
    grams = [False] * (len(convs) - 1) + [plan is not None and plan.gram]
    if projection is not None:
        grams.append(plan is not None and plan.gram_projection)
    found = []
    for i, (layer, gram) in enumerate(zip(_convs(x, convs, projection).layers(False), grams, strict=True)):
        prologue = plan is not None and plan.prologue and 0 < i < len(convs) and layer.groups == 1
        reads = "prologue" if prologue else "materialised"
        form = "Gram form" if gram else "stored output"
        found.append(LayerPlan(layer, form, reads, look_up(layer, rules(x.device)).by_layer))
    return found
