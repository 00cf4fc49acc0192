"""Models that people have, each with an input and the number of units that `fused_resnet.fuse` must find in it.

`ZOO` holds torchvision's and timm's as they come (without weights: nothing is downloaded) and a few in plain torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    """`make` builds the model, `shape` is an input's, `fused` the units to be found, `skipped` the norms left alone."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fused: int
    skipped: int = 0


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    where, _, function = f"models.{name}".rpartition(".")

    def make() -> nn.Module:
        return getattr(importlib.import_module(f"torchvision.{where}"), function)(weights=None, **options)

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)


class Detector(nn.Module):
    """A detector of torchvision as a function of a batch of images: its losses in training, else its feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.model.backbone(x)
        side = x.shape[-1]
        boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.8]], dtype=x.dtype, device=x.device) * side
        masks = torch.zeros(2, side, side, dtype=torch.uint8, device=x.device)
        masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
        labels = torch.tensor([1, 2], device=x.device)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        torch.manual_seed(0)  # the samplers of proposals
        return self.model(list(x), [target] * len(x))


def _detector(name: str, frozen: bool = False, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        sizes = {"min_size": 64, "max_size": 64, "num_classes": 5}
        detection = importlib.import_module("torchvision.models.detection")
        return Detector(
            getattr(detection, name)(
                weights=None, weights_backbone=None, trainable_backbone_layers=5, norm_layer=norm, **sizes, **options
            )
        )

    return make


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Ronneberger et al. 2015, small, with batch norm."""

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList(_double(i, o) for i, o in ((channels, width), (width, 2 * width)))
        self.middle = _double(2 * width, 4 * width)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in (2 * width, width))
        self.merge = nn.ModuleList(_double(2 * w, w) for w in (2 * width, width))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = torch.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        return self.head(x)


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _C2f(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = _Conv(channels, channels, 1), _Conv(channels * 3 // 2, channels, 1)
        self.inner = nn.Sequential(_Conv(channels // 2, channels // 2), _Conv(channels // 2, channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat((a, b, b + self.inner(b)), 1))


def yolo() -> nn.Module:
    """A detector's backbone as the YOLO family builds them: conv + BN + SiLU, split and joined stages."""
    return nn.Sequential(_Conv(3, 16, 3, 2), _Conv(16, 32, 3, 2), _C2f(32), _Conv(32, 64, 3, 2), _C2f(64))


class Medical(nn.Module):
    """One-channel residual net with 3-d shortcuts written by hand, functional ReLUs and a BN head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 12, 5, padding=2, bias=False), nn.BatchNorm2d(12, momentum=None)
        self.a, self.bn_a = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12, affine=False)
        self.b, self.bn_b = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12, track_running_stats=False)
        self.fc, self.bn_fc, self.out = nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = nn.functional.relu(self.bn_a(self.a(x)), inplace=True)
        y = self.bn_b(self.b(y))
        y += x
        x = y.relu_().mean((2, 3))
        return self.out(torch.relu(self.bn_fc(self.fc(x))))


_10 = {"num_classes": 10}
_SEGMENTATION = {"weights_backbone": None, "num_classes": 4}
ZOO: dict[str, Entry] = {
    **{
        f"torchvision:{name}": Entry(_torchvision(name, **_10), (4, 3, 64, 64), fused)
        for name, fused in {
            "resnet18": 20,
            "resnet34": 36,
            "resnet50": 53,
            "resnet101": 104,
            "resnet152": 155,
            "resnext50_32x4d": 53,
            "wide_resnet50_2": 53,
            "mobilenet_v2": 52,
        }.items()
    },
    "torchvision:googlenet": Entry(_torchvision("googlenet", init_weights=False, **_10), (4, 3, 96, 96), 59),
    "torchvision:densenet121": Entry(_torchvision("densenet121", **_10), (4, 3, 64, 64), 121),
    "torchvision:segmentation.fcn_resnet50": Entry(
        _torchvision("segmentation.fcn_resnet50", **_SEGMENTATION), (2, 3, 64, 64), 54
    ),
    "torchvision:segmentation.deeplabv3_resnet50": Entry(
        _torchvision("segmentation.deeplabv3_resnet50", **_SEGMENTATION), (2, 3, 64, 64), 60
    ),
    "torchvision:video.r3d_18": Entry(_torchvision("video.r3d_18", **_10), (2, 3, 4, 32, 32), 17, 3),
    "torchvision:video.mc3_18": Entry(_torchvision("video.mc3_18", **_10), (2, 3, 4, 32, 32), 17, 3),
    "torchvision:video.r2plus1d_18": Entry(_torchvision("video.r2plus1d_18", **_10), (2, 3, 4, 32, 32), 34, 3),
    "torchvision:fasterrcnn_resnet50_fpn": Entry(_detector("fasterrcnn_resnet50_fpn"), (2, 3, 64, 64), 53),
    "torchvision:fasterrcnn_resnet50_fpn, frozen BN": Entry(
        _detector("fasterrcnn_resnet50_fpn", frozen=True), (2, 3, 64, 64), 53
    ),
    "torchvision:maskrcnn_resnet50_fpn": Entry(_detector("maskrcnn_resnet50_fpn"), (2, 3, 64, 64), 53),
    "torchvision:retinanet_resnet50_fpn": Entry(_detector("retinanet_resnet50_fpn"), (2, 3, 64, 64), 53),
    "torchvision:retinanet_resnet50_fpn, frozen BN": Entry(
        _detector("retinanet_resnet50_fpn", frozen=True), (2, 3, 64, 64), 53
    ),
    **{
        f"timm:{name}": Entry(_timm(name), (4, 3, 64, 64), fused)
        for name, fused in {
            "resnet50": 53,
            "resnet26d": 28,
            "resnetrs50": 53,
            "seresnet50": 53,
            "ecaresnet50d": 53,
            "resnetv2_50": 49,
            "regnety_002": 44,
            "gernet_s": 45,
            "dla34": 36,
            "darknet53": 52,
        }.items()
    },
    "unet": Entry(UNet, (3, 3, 32, 32), 10),
    "yolo": Entry(yolo, (3, 3, 64, 64), 11),
    "medical": Entry(Medical, (4, 1, 25, 25), 4),
}
