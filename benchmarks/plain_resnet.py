"""The unfused rival: ResNet, ResNeXt and Wide ResNet in nothing but torch.nn, one call per layer.

It shares no code with `fused_resnet`. Names, defaults, initialisation order and eager arithmetic follow
torchvision.models.resnet, so that state dicts load strictly both ways, one seed gives the same parameters, and outputs
are equal bit for bit; tests/test_plain_resnet.py holds it to that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def conv(inplanes: int, planes: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, size, stride, size // 2, groups=groups, bias=False)


class PlainBasicBlock(nn.Module):
    """Two 3x3 convs."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, *_: int) -> None:
        super().__init__()
        self.conv1 = conv(inplanes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convs, the stride on the 3x3."""

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, base_width: int
    ) -> None:
        super().__init__()
        width = planes * base_width // 64 * groups
        self.conv1 = conv(inplanes, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, planes * 4, 1)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainResNet(nn.Module):
    """A 7x7/2 stem, a max pool, four stages of blocks, global average pooling, a classifier."""

    def __init__(
        self,
        block: type[PlainBasicBlock | PlainBottleneck],
        layers: tuple[int, ...],
        groups: int = 1,
        width_per_group: int = 64,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inplanes = 64
        for stage, blocks in enumerate(layers):
            planes = 64 * 2**stage
            row: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample = None
                if stride != 1 or inplanes != planes * block.expansion:
                    width = planes * block.expansion
                    downsample = nn.Sequential(conv(inplanes, width, 1, stride), nn.BatchNorm2d(width))
                row.append(block(inplanes, planes, stride, downsample, groups, width_per_group))
                inplanes = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*row))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


_BASIC, _BOTTLENECK = PlainBasicBlock, PlainBottleneck
FAMILY: dict[str, tuple[Any, ...]] = {  # name -> block, layers, groups, width per group
    "resnet18": (_BASIC, (2, 2, 2, 2)),
    "resnet34": (_BASIC, (3, 4, 6, 3)),
    "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (_BOTTLENECK, (3, 4, 23, 3)),
    "resnet152": (_BOTTLENECK, (3, 8, 36, 3)),
    "resnext50_32x4d": (_BOTTLENECK, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (_BOTTLENECK, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (_BOTTLENECK, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (_BOTTLENECK, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (_BOTTLENECK, (3, 4, 23, 3), 1, 128),
}


def plain_resnet(name: str, num_classes: int = 1000) -> PlainResNet:
    """The member of `FAMILY` with that name, freshly initialised."""
    return PlainResNet(*FAMILY[name], num_classes=num_classes)
