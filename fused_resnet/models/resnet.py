"""ResNet, ResNeXt and Wide ResNet for images: He et al. 2015, Xie et al. 2016, Zagoruyko & Komodakis 2016.

Constructors, defaults, attribute names, initialisation order and state-dict keys match torchvision.models.resnet
(BSD-3-Clause), so that the two exchange state dicts and, from one seed, start from the same parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet import batchnorm, dispatch, ops
from fused_resnet.blocks import BasicBlock, Bottleneck, run_blocks
from fused_resnet.models.common import (
    DeepStem,
    Network,
    PlainBlock,
    check_options,
    dilations,
    initialise,
    make_shortcut,
    prepare_blocks,
)
from fused_resnet.models.weights import load_weights
from fused_resnet.modules import Units, call_reason, is_watched, unfused_reason
from fused_resnet.ops.checks import is_stem_pool, is_traced, needs_grad
from fused_resnet.ops.conv import conv2d
from fused_resnet.ops.conv_bias_act import check_conv


class ResNet(Network):
    """A residual network: a 7x7/2 stem, a max pool, four stages of blocks, global average pooling, a classifier.

    Args:
        block: BasicBlock or Bottleneck (or a class of the same signature).
        layers: the number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: start the last BN of each block at gamma 0, so that each block starts as its shortcut.
        groups, width_per_group: of the 3x3 convs in bottlenecks (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for stages 2 to 4, whether a dilation takes the stride's place.
        norm_layer: called with a number of channels; anything but nn.BatchNorm2d runs unfused.
        in_channels: channels of the input images.
        shortcut: where the shape changes "A" pads with zeros, "B" projects by a 1x1 conv and BN; "C" projects
            everywhere; "none": a plain network (BasicBlock alone).
        stem: "7x7", or "deep": three 3x3 convs (ResNet-C and -D).
        pooled_shortcut: projections average-pool before a 1x1 conv without stride (ResNet-D).
        residual_scale: None, or where to start each block's learnable scale: relu(scale * f(x) + shortcut).
        output_stride: 8 or 16: dilations in place of the last strides (bottlenecks alone); None or 32: none.
        memory: what training keeps for the backward pass. "fast": raw and rectified conv outputs, as torch does.
            "balanced": as "fast", but blocks that `fused_resnet.plans` runs as one op keep raw outputs alone, and not
            the wide one of a conv in Gram form. "low": block inputs and statistics alone; the convs are computed again.
            The results are the same but for rounding.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        in_channels: int = 3,
        shortcut: str = "B",
        stem: str = "7x7",
        pooled_shortcut: bool = False,
        residual_scale: float | None = None,
        output_stride: int | None = None,
        memory: str = "balanced",
    ) -> None:
        super().__init__()
        dilate = dilations(output_stride, replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be None or three bools, got {dilate}")
        if len(layers) != 4:
            raise ValueError(f"layers must be four numbers of blocks, got {layers!r}")
        check_options(shortcut, memory, residual_scale, zero_init_residual)
        if stem not in ("7x7", "deep"):
            raise ValueError(f"stem must be '7x7' or 'deep', got {stem!r}")
        if shortcut == "none":
            if block is not BasicBlock:
                raise ValueError(f"a plain network has BasicBlock's convs, got {block.__name__}")
            block = PlainBlock
        self._shortcut, self._pooled = shortcut, pooled_shortcut
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1: nn.Module
        if stem == "deep":
            self.conv1 = DeepStem(in_channels, self.inplanes, self._norm_layer)
        else:
            self.conv1 = nn.Conv2d(in_channels, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)
        prepare_blocks(self.modules(), memory, residual_scale)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        width = planes * block.expansion
        stage: list[nn.Module] = []
        for index in range(blocks):
            step = stride if index == 0 else 1
            stage.append(
                block(
                    self.inplanes,
                    planes,
                    step,
                    make_shortcut(self._shortcut, self.inplanes, width, step, self._norm_layer, self._pooled),
                    self.groups,
                    self.base_width,
                    first_dilation if index == 0 else self.dilation,
                    self._norm_layer,
                )
            )
            self.inplanes = width
        return nn.Sequential(*stage)

    def units(self) -> Units:
        return {"conv1": (self._last_stem_conv(), self.bn1, self.relu)}

    def _last_stem_conv(self) -> nn.Module:
        """The conv before bn1: conv1, or the last one of a deep stem that nobody watches."""
        stem = self.conv1
        return stem[-1] if self._fused and type(stem) is DeepStem and not is_watched(stem) else stem

    def _before_bn1(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        """bn1's conv and what it reads."""
        conv = self.conv1 if isinstance(x, Proxy) or call_reason() is not None else self._last_stem_conv()
        return (x if conv is self.conv1 else cast(DeepStem, self.conv1).before_last(x)), conv

    def _stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x)))), all after the conv in one pass; in inference BN and ReLU belong to the conv."""
        x, last = self._before_bn1(x)
        if self._pools_at_once(x, last):
            conv, bn = cast(nn.Conv2d, last), cast(nn.BatchNorm2d, self.bn1)
            if batchnorm.uses_batch_statistics(bn) or needs_grad(x, conv.weight, conv.bias, bn.weight, bn.bias):
                geometry, _ = check_conv(
                    "conv1", x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
                )
                weight = self._autocast_weights(x, {"conv1": conv}).get("conv1", conv.weight)
                return ops.bn_act_pool(
                    conv2d(x, weight, conv.bias, *geometry),
                    bn.weight,
                    bn.bias,
                    *batchnorm.running(bn),
                    training=batchnorm.uses_batch_statistics(bn),
                    momentum=batchnorm.batch_momentum(bn),
                    eps=bn.eps,
                )
            if not is_traced(x):
                y = self._infer("conv1", x, conv, bn, "relu", None, pooled=True)
                if y is not None:
                    return y
        return self.maxpool(self._conv_bn_act("conv1", x, last, self.bn1, self.relu))

    def _pools_at_once(self, x: Tensor, conv: nn.Module) -> bool:
        """Whether bn_act_pool may stand for bn1, relu and maxpool: each is what it should be, and nobody watches it."""
        pool = self.maxpool
        if not self._fused or isinstance(x, Proxy) or x.dim() != 4 or unfused_reason(conv, self.bn1, self.relu):
            return False
        if type(pool) is not nn.MaxPool2d or is_watched(pool) or not is_stem_pool(pool):
            return False
        return dispatch.is_fused("bn_act_pool", x.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), NCHW or channels_last, to logits (N, num_classes)."""
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if (
            self._fused
            and not isinstance(x, Proxy)
            and x.dim() == 4
            and call_reason() is None
            and dispatch.prefers_channels_last(x)
        ):
            x = x.contiguous(memory_format=torch.channels_last)  # once, here: every block keeps the layout
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        with self._at_once(x):
            if self._fused and not torch.is_grad_enabled() and not is_traced(x) and call_reason() is None:
                pooled = type(self.maxpool) is nn.MaxPool2d and not is_watched(self.maxpool)
                x = run_blocks(stages, self._stem(x), overwrite=pooled)
            else:
                x = self._stem(x)
                for stage in stages:
                    x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _build(
    name: str, block: type[BasicBlock | Bottleneck], layers: Sequence[int], weights: Any, progress: bool, kwargs: dict
) -> ResNet:
    if "pretrained" in kwargs or isinstance(weights, bool):
        warnings.warn(
            f"fused_resnet.{name}: `pretrained` is deprecated, use weights='IMAGENET1K_V1' or weights=None",
            DeprecationWarning,
            stacklevel=3,
        )
        if "pretrained" in kwargs and weights is not None:
            raise TypeError(f"{name}: give `weights` or `pretrained`, not both")
        pretrained = kwargs.pop("pretrained", weights)
        weights = "IMAGENET1K_V1" if pretrained else None
    features, out_indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", None)
    if out_indices is not None and not features:
        raise TypeError(f"{name}: out_indices goes with features_only=True")
    net = ResNet(block, layers, **kwargs) if weights is None else None
    net = net or load_weights(name, lambda: ResNet(block, layers, **kwargs), weights, progress)
    return _build_features(name, net, range(5) if out_indices is None else out_indices) if features else net


def _build_features(name: str, net: ResNet, out_indices: Sequence[int]) -> ResNetFeatures:
    try:
        return ResNetFeatures(net, out_indices)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class ResNetFeatures(ResNet):
    """The feature maps of a ResNet's stages, without what comes after the last one asked for.

    Keys of the state dict are those of the network. `channels` and `reductions` tell, for each map, its channels and
    by how much it is smaller than the image.

    Args:
        net: the network; its modules are shared, not copied.
        out_indices: which maps, ascending: 0 the stem's (before the max pool), 1 to 4 the stages'.
    """

    def __init__(self, net: ResNet, out_indices: Sequence[int] = (0, 1, 2, 3, 4)) -> None:
        Network.__init__(self)
        indices = tuple(out_indices)
        if not indices or list(indices) != sorted({*indices} & {*range(5)}):
            raise ValueError(f"out_indices must be ascending numbers of 0 to 4, got {indices}")
        self.out_indices = indices
        for name in ("conv1", "bn1", "relu", "maxpool", *(f"layer{i}" for i in range(1, indices[-1] + 1))):
            self.add_module(name, getattr(net, name))
        channels, reductions = [cast(nn.BatchNorm2d, net.bn1).num_features], [2]
        reduction = 4
        for i in range(1, indices[-1] + 1):
            blocks = cast(nn.Sequential, getattr(net, f"layer{i}"))
            reduction *= cast(Any, blocks[0]).stride if i > 1 else 1
            last = cast(Any, blocks[-1])
            channels.append((last.conv3 if isinstance(last, Bottleneck) else last.conv2).out_channels)
            reductions.append(reduction)
        self.channels = tuple(channels[i] for i in indices)
        self.reductions = tuple(reductions[i] for i in indices)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Images (N, in_channels, H, W) to a list of (N, channels[i], ~H / reductions[i], ~W / reductions[i])."""
        usual = self._fused and not isinstance(x, Proxy) and x.dim() == 4 and call_reason() is None
        if usual and dispatch.prefers_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        with self._at_once(x):
            if 0 in self.out_indices:
                x, conv = self._before_bn1(x)
                x = self._conv_bn_act("conv1", x, conv, self.bn1, self.relu)
                maps.append(x)
                x = self.maxpool(x)
            else:
                x = self._stem(x)
            for i in range(1, self.out_indices[-1] + 1):
                x = getattr(self, f"layer{i}")(x)
                if i in self.out_indices:
                    maps.append(x)
        return maps


_DOC = """{title}

    Args:
        weights: None, a torchvision weights name ("IMAGENET1K_V2", "DEFAULT") or enum member, the path or URL of a
            state dict, or a state dict. Files are read with weights_only=True.
        progress: show a progress bar while downloading.
        kwargs: as `ResNet`: num_classes, in_channels, zero_init_residual, groups, width_per_group,
            replace_stride_with_dilation, norm_layer, shortcut, stem, pooled_shortcut, residual_scale, output_stride,
            memory. features_only=True gives a `ResNetFeatures` of out_indices (all: 0 to 4).

    Raises:
        ValueError: the weights do not fit the model; the message names both sides.
    """


def _document(title: str) -> Callable[[Callable[..., ResNet]], Callable[..., ResNet]]:
    def decorate(function: Callable[..., ResNet]) -> Callable[..., ResNet]:
        function.__doc__ = _DOC.format(title=title)
        return function

    return decorate


@_document("ResNet-18: 11.7 M parameters, 1.8 GFLOPs (multiply-adds) at 224x224.")
def resnet18(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, kwargs)


@_document("ResNet-34: 21.8 M parameters, 3.7 GFLOPs (multiply-adds) at 224x224.")
def resnet34(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, kwargs)


@_document("ResNet-50: 25.6 M parameters, 4.1 GFLOPs (multiply-adds) at 224x224.")
def resnet50(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


@_document("ResNet-101: 44.5 M parameters, 7.8 GFLOPs (multiply-adds) at 224x224.")
def resnet101(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


@_document("ResNet-152: 60.2 M parameters, 11.5 GFLOPs (multiply-adds) at 224x224.")
def resnet152(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, kwargs)


@_document("ResNeXt-50 32x4d: 25.0 M parameters, 4.2 GFLOPs (multiply-adds) at 224x224.")
def resnext50_32x4d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"groups": 32, "width_per_group": 4} | kwargs
    return _build("resnext50_32x4d", Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


@_document("ResNeXt-101 32x8d: 88.8 M parameters, 16.4 GFLOPs (multiply-adds) at 224x224.")
def resnext101_32x8d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"groups": 32, "width_per_group": 8} | kwargs
    return _build("resnext101_32x8d", Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


@_document("ResNeXt-101 64x4d: 83.5 M parameters, 15.5 GFLOPs (multiply-adds) at 224x224.")
def resnext101_64x4d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"groups": 64, "width_per_group": 4} | kwargs
    return _build("resnext101_64x4d", Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


@_document("Wide ResNet-50-2: 68.9 M parameters, 11.4 GFLOPs (multiply-adds) at 224x224.")
def wide_resnet50_2(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"width_per_group": 128} | kwargs
    return _build("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


@_document("Wide ResNet-101-2: 126.9 M parameters, 22.8 GFLOPs (multiply-adds) at 224x224.")
def wide_resnet101_2(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"width_per_group": 128} | kwargs
    return _build("wide_resnet101_2", Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


@_document("ResNet-50-D (deep stem, pooled projections; keys as timm's resnet50d): 25.6 M parameters, 4.4 GFLOPs.")
def resnet50d(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    kwargs = {"stem": "deep", "pooled_shortcut": True} | kwargs
    return _build("resnet50d", Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


@_document("The plain network of 18 layers (ResNet-18 without shortcuts): 11.5 M parameters, 1.8 GFLOPs.")
def plain_net18(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("plain_net18", BasicBlock, (2, 2, 2, 2), weights, progress, {"shortcut": "none"} | kwargs)


@_document("The plain network of 34 layers (ResNet-34 without shortcuts): 21.6 M parameters, 3.6 GFLOPs.")
def plain_net34(weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    return _build("plain_net34", BasicBlock, (3, 4, 6, 3), weights, progress, {"shortcut": "none"} | kwargs)
