"""The CIFAR networks of He et al. 2015, section 4.2: 6n + 2 layers of 16 to 64 channels, with shortcuts or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet import dispatch
from fused_resnet.blocks import BasicBlock
from fused_resnet.models.common import (
    Network,
    PlainBlock,
    check_options,
    constructor,
    initialise,
    make_shortcut,
    prepare_blocks,
)
from fused_resnet.modules import Units, call_reason


class CifarResNet(Network):
    """A 3x3 stem, three stages of basic blocks at strides 1, 2 and 4, global average pooling, a classifier.

    Args:
        layers: the number of blocks in each of the three stages.
        num_classes: outputs of the classifier.
        shortcut: "A": strided identity, padded with zeros, no parameters (the paper's choice here); "B": 1x1 conv and
            BN where the shape changes; "C": everywhere; "none": a plain network.
        widths: channels of the stages; the stem has the first.
        in_channels: channels of the input images.
        zero_init_residual: start the last BN of each block at gamma 0, so that each block starts as its shortcut.
        residual_scale: None, or where to start each block's learnable scale: relu(scale * f(x) + x). 0 is ReZero's
            start (Bachlechner et al. 2020; SkipInit, De & Smith 2020).
        norm_layer: called with a number of channels; anything but nn.BatchNorm2d runs unfused.
        memory: what training keeps for the backward pass, as in `fused_resnet.ResNet`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 10,
        shortcut: str = "A",
        *,
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        zero_init_residual: bool = False,
        residual_scale: float | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        memory: str = "balanced",
    ) -> None:
        super().__init__()
        check_options(shortcut, memory, residual_scale, zero_init_residual)
        if len(layers) != 3 or len(widths) != 3:
            raise ValueError(f"layers and widths must be three numbers each, got {layers!r} and {widths!r}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = norm(widths[0])
        self.relu = nn.ReLU(inplace=True)
        block = PlainBlock if shortcut == "none" else BasicBlock
        inplanes = widths[0]
        for stage, (planes, blocks) in enumerate(zip(widths, layers, strict=True), 1):
            row: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                path = make_shortcut(shortcut, inplanes, planes, stride, norm)
                row.append(block(inplanes, planes, stride, path, norm_layer=norm))
                inplanes = planes
            self.add_module(f"layer{stage}", nn.Sequential(*row))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        initialise(self, zero_init_residual)
        prepare_blocks(self.modules(), memory, residual_scale)

    def units(self) -> Units:
        return {"conv1": (self.conv1, self.bn1, self.relu)}

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), NCHW or channels_last, to logits (N, num_classes)."""
        if (
            self._fused
            and not isinstance(x, Proxy)
            and x.dim() == 4
            and call_reason() is None
            and dispatch.prefers_channels_last(x)
        ):
            x = x.contiguous(memory_format=torch.channels_last)
        with self._at_once(x):
            x = self._conv_bn_act("conv1", x, self.conv1, self.bn1, self.relu)
            x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.fc(torch.flatten(self.avgpool(x), 1))


_OPTIONS = (
    "as `CifarResNet`: num_classes, shortcut, in_channels, zero_init_residual, residual_scale, norm_layer, memory"
)


def _cifar(depth: int, parameters: str, plain: bool = False) -> Callable[..., CifarResNet]:
    blocks = (depth - 2) // 6

    def build(**kwargs: Any) -> CifarResNet:
        if plain and kwargs.setdefault("shortcut", "none") != "none":
            raise TypeError(f"plain_cifar_net{depth} has no shortcuts; cifar_resnet{depth} has")
        return CifarResNet((blocks, blocks, blocks), **kwargs)

    if plain:
        title = f"The plain network of {depth} layers, cifar_resnet{depth} without shortcuts: {parameters} parameters."
        return constructor(f"plain_cifar_net{depth}", title, _OPTIONS, build)
    title = f"ResNet-{depth} for CIFAR-10 (32x32 images): {parameters} parameters."
    return constructor(f"cifar_resnet{depth}", title, _OPTIONS, build)


cifar_resnet20 = _cifar(20, "0.27 M")
cifar_resnet32 = _cifar(32, "0.46 M")
cifar_resnet44 = _cifar(44, "0.66 M")
cifar_resnet56 = _cifar(56, "0.85 M")
cifar_resnet110 = _cifar(110, "1.7 M")
cifar_resnet1202 = _cifar(1202, "19.4 M")
plain_cifar_net20 = _cifar(20, "0.27 M", plain=True)
plain_cifar_net32 = _cifar(32, "0.46 M", plain=True)
plain_cifar_net44 = _cifar(44, "0.66 M", plain=True)
plain_cifar_net56 = _cifar(56, "0.85 M", plain=True)
plain_cifar_net110 = _cifar(110, "1.7 M", plain=True)
