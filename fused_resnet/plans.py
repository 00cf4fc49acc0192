"""How a residual block runs in training: as one op or unit by unit, and which convs take the Gram form.

The Gram form of a 1x1 conv (`fused_resnet.ops.residual_block`) trades passes over its wide output for products of the
size of its weight, so it pays where a batch has many pixels for each of the conv's input channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fused_resnet.ops.residual_block import Plan

MEMORY = ("balanced", "low", "fast")

# Pixels in the batch per input channel from which the Gram form is taken, by device type; nowhere else. On the CPU a
# provisional choice from few and noisy runs (2 cores, float32, 5 each): at 98 to 784 it was between 13% slower and 18%
# faster than unit by unit. To be measured again.
GRAM_PIXELS_PER_CHANNEL = {"cpu": 64.0}

# Input channels up to which a conv in a block that merges statistics across processes takes the Gram form whatever its
# batch: its products are small beside those of any batch worth a process.
MERGED_GRAM_CHANNELS = 128


def takes_gram_form(conv: nn.Conv2d, pixels: int | None, device_type: str) -> bool:
    """Whether a conv with `pixels` output positions in the batch takes the Gram form: 1x1, ungrouped, not narrowing.

    `pixels` None: for all processes alike, whose batches differ.
    """
    least = GRAM_PIXELS_PER_CHANNEL.get(device_type)
    if least is None or conv.groups != 1 or conv.kernel_size != (1, 1) or conv.padding != (0, 0):
        return False
    enough = conv.in_channels <= MERGED_GRAM_CHANNELS if pixels is None else pixels >= least * conv.in_channels
    return enough and conv.out_channels >= conv.in_channels


def plan_block(
    x: Tensor, convs: Sequence[nn.Conv2d], projection: nn.Conv2d | None, memory: str, merged: bool = False
) -> Plan | None:
    """The plan for a block that reads x, (N, C, H, W); None: unit by unit. `merged`: the same for all processes.

    Unit by unit keeps the rectified outputs too and forms none again: "fast" always, "balanced" where the block's last
    conv does not take the Gram form.
    """
    if memory == "fast":
        return None
    pixels = None
    if not merged:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        for conv in convs:
            pixels //= conv.stride[0] * conv.stride[1]
    gram = takes_gram_form(convs[-1], pixels, x.device.type)
    if memory == "balanced" and not gram:
        return None
    return Plan(gram, projection is not None and takes_gram_form(projection, pixels, x.device.type), memory)
