"""torchvision's ResNets with fused ops: after `import fused_resnet.torchvision`,
`torchvision.models.get_model("fused_resnet50")`. Needs torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models._api import register_model

from fused_resnet.convert import fuse

NAMES = (
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
)


def _register(name: str) -> None:
    def create(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        model = get_model(name, weights=weights, progress=progress, **kwargs)
        fuse(model)
        return model

    create.__name__ = create.__qualname__ = f"fused_{name}"
    create.__module__ = __name__
    create.__doc__ = f"torchvision's {name}, fused."
    globals()[create.__name__] = register_model(create.__name__)(create)


__all__ = [f"fused_{name}" for name in NAMES]
for _name in NAMES:
    if f"fused_{_name}" not in list_models():
        _register(_name)
