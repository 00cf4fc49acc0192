"""How a whole residual block runs in training: which convs take the Gram form, and what is kept for backward.

The Gram form of a 1x1 conv (`fused_resnet.ops.residual_block`) trades passes over its wide output for products of the
size of its weight, so it pays where a batch has many pixels for each of the conv's input channels.
"""

from __future__ import annotations

from torch import Tensor

from fused_resnet.ops.residual_block import Plan, Unit

MEMORY = ("balanced", "low", "fast")

# Pixels in the batch per input channel from which the Gram form is taken, by device type.
GRAM_PIXELS_PER_CHANNEL = {"cpu": 4.0}


def takes_gram_form(unit: Unit, pixels: int, device_type: str) -> bool:
    """Whether a conv that reads `pixels` positions of the batch takes the Gram form."""
    least = GRAM_PIXELS_PER_CHANNEL.get(device_type)
    return least is not None and unit.gram_form and pixels >= least * unit.weight.shape[1]


def plan_block(x: Tensor, units: tuple[Unit, ...], projection: Unit | None, memory: str) -> Plan:
    """The plan for a block that reads x, (N, C, H, W)."""
    stride = 1
    for unit in units:
        stride *= unit.stride[0] * unit.stride[1]
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // stride
    device = x.device.type
    projected = projection is not None and takes_gram_form(projection, pixels, device)
    return Plan(takes_gram_form(units[-1], pixels, device), projected, memory)
