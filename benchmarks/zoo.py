"""Models that people have, each with an input and what `fused_resnet.fuse` must find in it.

`ZOO` holds torchvision's and timm's as they come (without weights: nothing is downloaded) and a few in plain torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    """`make` builds the model, `shape` is an input's; the numbers of units and of whole residual blocks that are to be
    found, and of batch norms left alone. For timing, images are `larger` times as wide and high."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fused: int
    blocks: int = 0
    skipped: int = 0
    larger: int = 2


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    where, _, function = f"models.{name}".rpartition(".")

    def make() -> nn.Module:
        return getattr(importlib.import_module(f"torchvision.{where}"), function)(weights=None, **options)

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        chosen = {
            k: getattr(importlib.import_module("timm.layers"), v) if k == "aa_layer" else v for k, v in options.items()
        }
        return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **chosen)

    return make


class Detector(nn.Module):
    """A detector of torchvision as a function of a batch of images: its losses in training, else its feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.model.backbone(x)
        side = x.shape[-1]
        self.model.transform.min_size, self.model.transform.max_size = (side,), side
        boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.8]], dtype=x.dtype, device=x.device) * side
        masks = torch.zeros(2, side, side, dtype=torch.uint8, device=x.device)
        masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
        labels = torch.tensor([1, 2], device=x.device)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        torch.manual_seed(0)  # the samplers of proposals
        return self.model(list(x), [target] * len(x))


# Few proposals: what follows the backbone is torchvision's own.
_PROPOSALS = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 8}


def _detector(name: str, frozen: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        options: dict[str, Any] = {} if name.startswith("retinanet") else _PROPOSALS
        detection = importlib.import_module("torchvision.models.detection")
        return Detector(
            getattr(detection, name)(
                weights=None,
                weights_backbone=None,
                trainable_backbone_layers=5,
                norm_layer=norm,
                num_classes=5,
                **options,
            )
        )

    return make


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression in plain torch: indices of the boxes kept, (n,)."""
    from torchvision.ops import box_iou

    overlap, kept = box_iou(boxes, boxes) > iou_threshold, []
    dead = torch.zeros(len(boxes), dtype=torch.bool)
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not dead[index]:
            kept.append(index)
            dead |= overlap[index]
    return torch.tensor(kept, dtype=torch.long)


_libraries: list[torch.library.Library] = []


def without_extension() -> None:
    """Make torchvision importable beside a torch that its extension was not built for, with `nms` in plain torch and
    `roi_align` its own Python, not compiled."""
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    importlib.import_module("torchvision.ops").boxes.nms = nms
    torch.compiler.set_stance("force_eager")


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


class _ByName(nn.Module):
    """A bottleneck as mmdetection writes it: norms under names that are looked up, a forward within the forward."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name, self.norm3_name = "bn1", "bn2", "bn3"
        for index, (i, o, kernel) in enumerate(((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
            conv = nn.Conv2d(i, o, kernel, stride if kernel == 3 else 1, kernel // 2, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(o))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    @property
    def norm3(self) -> nn.Module:
        return getattr(self, self.norm3_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.relu(self.norm2(self.conv2(out)))
            out = self.norm3(self.conv3(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        return self.relu(inner(x))


def by_name() -> nn.Module:
    """A small backbone of mmdetection-style bottlenecks."""
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, _ByName(16, 8, 1), _ByName(32, 8, 1), _ByName(32, 16, 2), _ByName(64, 16, 1))


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def _row(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


def rows() -> nn.Module:
    """Residual blocks out of nn.Sequential: an empty one, nn.Identity or conv + BN as the shortcut."""
    projection = nn.Sequential(nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    return nn.Sequential(
        *_double(3, 12),
        _Residual(_row(12, 12), nn.Sequential()),
        _Residual(_row(12, 24, 2), projection),
        _Residual(_row(24, 24), nn.Identity()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


_10 = {"num_classes": 10}
_SEGMENTATION = {"weights_backbone": None, "num_classes": 4}
_IMAGES, _PAIR, _VIDEOS = (4, 3, 64, 64), (2, 3, 64, 64), (2, 3, 4, 32, 32)
_DETECTORS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
ZOO: dict[str, Entry] = {
    **{
        f"torchvision:{name}": Entry(_torchvision(name, **_10), _IMAGES, *expected)
        for name, expected in {
            "resnet18": (20, 8),
            "resnet34": (36, 16),
            "resnet50": (53, 16),
            "resnet101": (104, 33),
            "resnet152": (155, 50),
            "resnext50_32x4d": (53, 16),
            "wide_resnet50_2": (53, 16),
            "mobilenet_v2": (52,),
            "densenet121": (121,),
        }.items()
    },
    "torchvision:googlenet": Entry(_torchvision("googlenet", init_weights=False, **_10), (4, 3, 96, 96), 59),
    **{
        f"torchvision:segmentation.{name}": Entry(
            _torchvision(f"segmentation.{name}", **_SEGMENTATION), _PAIR, fused, 16
        )
        for name, fused in {"fcn_resnet50": 54, "deeplabv3_resnet50": 60}.items()
    },
    **{
        f"torchvision:video.{name}": Entry(_torchvision(f"video.{name}", **_10), _VIDEOS, fused, skipped=3)
        for name, fused in {"r3d_18": 17, "mc3_18": 17, "r2plus1d_18": 34}.items()
    },
    **{
        f"torchvision:{name}{', frozen BN' * frozen}": Entry(_detector(name, frozen), _PAIR, 53, 16, larger=1)
        for name in _DETECTORS
        for frozen in (False, True)
    },
    **{
        f"timm:{name}": Entry(_timm(name), _IMAGES, *expected)
        for name, expected in {
            "resnet50": (53, 16),
            "resnet26d": (31, 5),
            "resnetrs50": (68,),
            "seresnet50": (65,),
            "ecaresnet50d": (67,),
            "resnetv2_50": (49,),
            "regnety_002": (57,),
            "gernet_s": (59,),
            "dla34": (37, 6),
            "darknet53": (52,),
        }.items()
    },
    "timm:resnet26, drop path": Entry(_timm("resnet26", drop_path_rate=0.2), _IMAGES, 33, 1),
    "timm:resnet26, drop block": Entry(_timm("resnet26", drop_block_rate=0.1), _IMAGES, 29, 4),
    "timm:resnet26, blur pool": Entry(_timm("resnet26", aa_layer="BlurPool2d"), _IMAGES, 29, 5),
    "timm:resnet26, SiLU": Entry(_timm("resnet26", act_layer="silu"), _IMAGES, 29),
    "mmdetection's bottlenecks": Entry(by_name, _IMAGES, 15, 4),
    "nn.Sequential blocks": Entry(rows, (4, 3, 32, 32), 9, 3),
    "unet": Entry(UNet, (3, 3, 32, 32), 10),
    "yolo": Entry(yolo, (3, 3, 64, 64), 11),
    "medical": Entry(Medical, (4, 1, 25, 25), 4),
}
