"""torch.hub.load("OWNER/fused_resnet", "resnet50", weights="IMAGENET1K_V2"): the networks of `fused_resnet`."""

dependencies = ["torch", "tqdm"]

from fused_resnet import (  # noqa: E402
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
