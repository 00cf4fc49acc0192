"""How a residual block runs in training: as one op or unit by unit, and which convs take the Gram form.

The Gram form of a 1x1 conv (`fused_resnet.ops.block_units`) trades passes over its wide output for products of the
size of its weight, so it pays where a batch has many pixels for each of the conv's input channels.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.ops.residual_block import Plan

MEMORY = ("balanced", "low", "fast")


class Rules(NamedTuple):
    """What plans are made of, per device.

    gram_pixels_per_channel: pixels of the batch per input channel from which a conv takes the Gram form; None: none.
    prologue: whether convs read raw outputs through BN and ReLU, see `fused_resnet.ops.prologue_block`.
    stored: whether "balanced" blocks without either are one op too, which keeps raw conv outputs alone and forms the
        rectified ones again, one more pass over each; else they run unit by unit.
    """

    gram_pixels_per_channel: float | None = None
    prologue: bool = False
    stored: bool = False


# Input channels up to which a conv in a block that merges statistics across processes takes the Gram form whatever its
# batch: its products are small beside those of any batch worth a process.
MERGED_GRAM_CHANNELS = 128

_asked: ContextVar[dict[str, bool | None]] = ContextVar("fused_resnet_plan", default={})  # noqa: B039


@contextlib.contextmanager
def use_plan(*, gram: bool | None = None, prologue: bool | None = None, stored: bool | None = None) -> Iterator[None]:
    """Ask for one way of training residual blocks within a `with` block, in this thread or task; None: as shipped.

    Args:
        gram: the Gram form wherever a conv allows it, or nowhere.
        prologue: convs that read raw conv outputs through BN and ReLU, wherever a block allows it, or nowhere.
            Kernels for it are the Triton backend's; on a CPU plain torch computes the same, more slowly.
        stored: blocks that take neither as one op, which keeps less, or unit by unit.
    """
    token = _asked.set({"gram": gram, "prologue": prologue, "stored": stored})
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def _shipped() -> dict[str, Rules]:
    """fused_resnet/data/plans.json: the rules by device name or type; all that departs from `Rules()` was measured."""
    found = json.loads((Path(__file__).parent / "data" / "plans.json").read_text())
    return {device: Rules(**rules) for device, rules in found.items()}


def rules(device: torch.device) -> Rules:
    """The rules for a device: as asked for, else as shipped for its name, else for its type."""
    shipped = _shipped()
    found = shipped.get(device.type, Rules())
    if device.type == "cuda":
        found = shipped.get(torch.cuda.get_device_name(device), found)
    asked = dict(_asked.get())
    gram = asked.pop("gram", None)
    if gram is not None:
        found = found._replace(gram_pixels_per_channel=0.0 if gram else None)
    return found._replace(**{name: value for name, value in asked.items() if value is not None})


def takes_gram_form(conv: nn.Conv2d, pixels: int | None, least: float | None) -> bool:
    """Whether a conv with `pixels` output positions in the batch takes the Gram form: 1x1, ungrouped, not narrowing.

    `pixels` None: for all processes alike, whose batches differ. `least`: `Rules.gram_pixels_per_channel`.
    """
    if least is None or conv.groups != 1 or conv.kernel_size != (1, 1) or conv.padding != (0, 0):
        return False
    enough = conv.in_channels <= MERGED_GRAM_CHANNELS if pixels is None else pixels >= least * conv.in_channels
    return enough and conv.out_channels >= conv.in_channels


def plan_block(
    x: Tensor, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None, memory: str, merged: bool = False
) -> Plan | None:
    """The plan for a block that reads x, (N, C, H, W); None: unit by unit. `merged`: the same for all processes.

    Unit by unit keeps the rectified outputs too and forms none again: "fast" always, "balanced" by `Rules.stored`.
    """
    if memory == "fast":
        return None
    pixels = None
    if not merged:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        for conv in convs:
            pixels //= conv.stride[0] * conv.stride[1]
    least, prologue, stored = rules(x.device)
    gram = takes_gram_form(convs[-1], pixels, least)
    prologue = prologue and not merged and all(conv.groups == 1 for conv in convs)
    if memory == "balanced" and not (gram or prologue or stored):
        return None
    gram_projection = projection is not None and takes_gram_form(projection, pixels, least)
    return Plan(gram, gram_projection, memory, prologue)
