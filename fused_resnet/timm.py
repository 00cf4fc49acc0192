"""timm's residual networks with fused ops: after `import fused_resnet.timm`, `timm.create_model("fused_resnet50")`.

Each is `fuse(timm.create_model("resnet50", **kwargs))`, with timm's whole interface: the object is timm's own.
Needs timm.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from fused_resnet.convert import fuse

NAMES = (
    "resnet18",
    "resnet26",
    "resnet26d",
    "resnet34",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnet101d",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnetrs50",
    "seresnet50",
    "ecaresnet50d",
    "resnetv2_50",
    "wide_resnet50_2",
)


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
        fuse(model)
        return model

    create.__name__ = create.__qualname__ = f"fused_{name}"
    create.__module__ = __name__
    create.__doc__ = f"timm's {name}, fused."
    timm.models.register_model(create)
    globals()[create.__name__] = create


__all__ = [f"fused_{name}" for name in NAMES]
for _name in NAMES:
    if not timm.is_model(f"fused_{_name}"):
        _register(_name)
