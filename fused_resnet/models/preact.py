"""Pre-activation networks: He et al. 2016, "Identity Mappings in Deep Residual Networks"; nothing after the addition.

The first block follows the stem's own BN and ReLU and has none; where a stage changes the shape, the shortcut reads the
activated input (the paper's appendix; the projection is a bare 1x1 conv there, as in its published code).

A BN and ReLU between two convs are fused with the first of them: in inference they are in its weights and its kernel,
in training one op on its output. A block's first pair has a sum before it, which the shortcut reads too: it is one op
of its own, forward and backward, one pass over the sum where torch makes two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet import batchnorm, dispatch, foreach, ops
from fused_resnet.models.common import Network, check_options, constructor, initialise
from fused_resnet.modules import (
    FusedModule,
    Units,
    as_leaf,
    call_part,
    call_reason,
    conv_of,
    has_pairs,
    unfused_reason,
)
from fused_resnet.ops.checks import needs_grad


class _PreActModule(FusedModule):
    relu: nn.Module

    def _bn_act(self, x: Tensor, bn: nn.Module) -> Tensor:
        """relu(bn(x)) as one op."""
        if (
            not self._fused
            or isinstance(x, Proxy)
            or unfused_reason(None, bn, self.relu) is not None
            or not dispatch.is_fused("bn_act", x.device.type)
        ):
            with foreach.apart():
                return self.relu(bn(x))
        norm = cast(nn.BatchNorm2d, bn)
        return ops.bn_act(
            x,
            norm.weight,
            norm.bias,
            *batchnorm.running(norm),
            training=batchnorm.uses_batch_statistics(norm),
            momentum=batchnorm.batch_momentum(norm),
            eps=norm.eps,
        )


class _PreActBlock(_PreActModule):
    """x + convs(...), each conv behind a BN and a ReLU. Subclasses have conv1, bn1, ... and name the number of convs.

    BN and ReLU are fused with the conv before them; the first pair is one op, and in inference the last conv adds the
    shortcut. `residual_scale`, a parameter of one element or None, multiplies the last conv, through its weight.
    """

    expansion = 1
    _CONVS = 2
    downsample: nn.Module | None
    residual_scale: nn.Parameter | None

    def units(self) -> Units:
        found: Units = {}
        for i in range(1, self._CONVS):
            found[f"conv{i}"] = (getattr(self, f"conv{i}"), getattr(self, f"bn{i + 1}"), self.relu)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes * expansion, H', W')."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        bn1 = getattr(self, "bn1", None)
        a = x if bn1 is None else self._bn_act(x, bn1)
        units, last = self.units(), f"conv{self._CONVS}"
        convs = {name: conv for name, (conv, *_) in units.items()} | {last: getattr(self, last)}
        if self.downsample is not None:
            convs["downsample"] = self.downsample
        weights = self._autocast_weights(x, convs)
        shortcut = x if self.downsample is None else self._alone(a, self.downsample, weights.get("downsample"))
        for name, unit in units.items():
            a = self._conv_bn_act(name, a, *unit, weight=weights.get(name))
        return self._last(a, convs[last], shortcut, weights.get(last))

    def _alone(self, a: Tensor, conv: nn.Module, weight: Tensor | None) -> Tensor:
        """conv(a), by the weight that `_autocast_weights` made where that is the same."""
        if not self._fused or isinstance(a, Proxy) or unfused_reason(conv, None, None) is not None:
            return call_part(conv, a)
        conv = cast(nn.Conv2d, conv)
        if not needs_grad(a, conv.weight):
            return conv(a)
        return conv_of(conv, a, conv.weight if weight is None else weight)

    def _last(self, a: Tensor, conv: nn.Conv2d, shortcut: Tensor, weight: Tensor | None) -> Tensor:
        """scale * conv(a) + shortcut; `weight` as in `_alone`."""
        scale = self.residual_scale
        fused = self._fused and not isinstance(a, Proxy) and unfused_reason(conv, None, None) is None
        if not fused or not has_pairs(conv) or a.dtype != conv.weight.dtype or torch.is_autocast_enabled(a.device.type):
            y = self._alone(a, conv, weight)
            return (y if scale is None else y * scale) + shortcut
        weight = conv.weight if scale is None else conv.weight * scale
        geometry: Any = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        return ops.conv_bias_act(a, weight, None, shortcut, groups=conv.groups, activation=None, **geometry)


class PreActBasicBlock(_PreActBlock):
    """Two 3x3 convs. `first`: behind the stem, without a BN and ReLU of its own."""

    _OURS = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        first: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not first:
            self.bn1 = norm_layer(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2 = norm_layer(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.register_parameter("residual_scale", None)


class PreActBottleneck(_PreActBlock):
    """1x1, 3x3, 1x1 convs around a narrow middle, the stride on the 3x3. `first` as in `PreActBasicBlock`."""

    expansion = 4
    _OURS = True
    _CONVS = 3

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        first: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not first:
            self.bn1 = norm_layer(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn2 = norm_layer(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.register_parameter("residual_scale", None)


class PreActResNet(Network, _PreActModule):
    """A stem, three or four stages of pre-activation blocks, a last BN and ReLU, global average pooling, a classifier.

    Args:
        block: PreActBasicBlock or PreActBottleneck.
        layers: blocks per stage. Four stages: ImageNet's 7x7/2 stem and max pool, 64 to 512 planes; three: CIFAR's 3x3
            stem, 16 to 64 planes.
        num_classes, in_channels: outputs of the classifier, channels of the images.
        residual_scale: None, or where to start each block's learnable scale: x + scale * f(x).
        norm_layer: called with a number of channels; anything but nn.BatchNorm2d runs unfused.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock | PreActBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        residual_scale: float | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_options("B", "balanced", residual_scale)
        if len(layers) not in (3, 4):
            raise ValueError(f"layers must be four numbers of blocks (ImageNet) or three (CIFAR), got {layers!r}")
        norm = norm_layer or nn.BatchNorm2d
        inplanes = planes = 64 if len(layers) == 4 else 16
        self.maxpool: nn.Module
        if len(layers) == 4:
            self.conv1 = nn.Conv2d(in_channels, planes, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, planes, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        for stage, blocks in enumerate(layers):
            row: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                width = planes * block.expansion
                changes = stride != 1 or inplanes != width
                path = nn.Conv2d(inplanes, width, 1, stride, bias=False) if changes else None
                row.append(block(inplanes, planes, stride, path, stage == index == 0, norm))
                inplanes = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*row))
            planes *= 2
        self.bn = norm(inplanes)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        initialise(self)
        for module in self.modules() if residual_scale is not None else ():
            if isinstance(module, _PreActBlock):
                module.residual_scale = nn.Parameter(torch.tensor(float(residual_scale)))  # type: ignore[arg-type]

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
            x = self.maxpool(self._conv_bn_act("conv1", x, self.conv1, self.bn1, self.relu))
            for name, stage in self.named_children():
                if name.startswith("layer"):
                    x = stage(x)
            x = self._bn_act(x, self.bn)
        return self.fc(torch.flatten(self.avgpool(x), 1))


_OPTIONS = "as `PreActResNet`: num_classes, in_channels, residual_scale, norm_layer"


def _preact(name: str, title: str, block: type[Any], layers: tuple[int, ...], classes: int) -> Callable[..., Any]:
    def build(**kwargs: Any) -> PreActResNet:
        return PreActResNet(block, layers, **{"num_classes": classes} | kwargs)

    return constructor(name, title, _OPTIONS, build)


def _imagenet(depth: int, block: type[Any], layers: tuple[int, ...], parameters: str) -> Callable[..., PreActResNet]:
    return _preact(f"preact_resnet{depth}", f"Pre-activation ResNet-{depth}: {parameters}.", block, layers, 1000)


def _cifar(depth: int, block: type[Any], parameters: str) -> Callable[..., PreActResNet]:
    blocks = (depth - 2) // (3 * block._CONVS)
    title = f"Pre-activation ResNet-{depth} for CIFAR-10 (32x32 images): {parameters}."
    return _preact(f"cifar_preact_resnet{depth}", title, block, (blocks,) * 3, 10)


preact_resnet18 = _imagenet(18, PreActBasicBlock, (2, 2, 2, 2), "11.7 M parameters")
preact_resnet34 = _imagenet(34, PreActBasicBlock, (3, 4, 6, 3), "21.8 M parameters")
preact_resnet50 = _imagenet(50, PreActBottleneck, (3, 4, 6, 3), "25.5 M parameters")
preact_resnet101 = _imagenet(101, PreActBottleneck, (3, 4, 23, 3), "44.5 M parameters")
preact_resnet152 = _imagenet(152, PreActBottleneck, (3, 8, 36, 3), "60.2 M parameters")
cifar_preact_resnet110 = _cifar(110, PreActBasicBlock, "1.7 M parameters")
cifar_preact_resnet164 = _cifar(164, PreActBottleneck, "1.7 M parameters")
cifar_preact_resnet1001 = _cifar(1001, PreActBottleneck, "10.2 M parameters")
