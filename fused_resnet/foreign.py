"""Models of other packages and of one's own files, by name: `fused-resnet verify --model timm:resnet50`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet.convert import fuse
from fused_resnet.parity import ParityError, verify

FORMS = "timm:NAME, torchvision:NAME or path/to/file.py:FUNCTION"


class ModelNotFoundError(ValueError):
    """The name leads to no model; the message is one sentence."""


def load(name: str) -> nn.Module:
    """The model that a name in one of `FORMS` stands for: random weights, nothing is downloaded. FUNCTION takes no
    arguments and returns a module.

    Raises:
        ModelNotFoundError: the package, the file or the name in it is not there, or makes no module.
    """
    where, _, what = name.rpartition(":")
    if where in ("timm", "torchvision"):
        package = _package(where)
        make: Callable[..., Any] = package.create_model if where == "timm" else package.models.get_model
        options = {"pretrained": False} if where == "timm" else {"weights": None}
        if where == "torchvision" and _takes_backbone_weights(package, what):
            options["weights_backbone"] = None  # type: ignore[assignment]
        try:
            return make(what, **options)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelNotFoundError(f"{where} has no model {what!r}: {error}") from error
    return _from_file(Path(where), what)


def _takes_backbone_weights(torchvision: Any, what: str) -> bool:
    try:
        return "weights_backbone" in torchvision.models.get_model_builder(what).__annotations__
    except ValueError:
        return False


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision's extension may not load beside this torch
        raise ModelNotFoundError(f"{name} cannot be imported: {str(error).splitlines()[0]}") from error


def _from_file(path: Path, what: str) -> nn.Module:
    if path.suffix != ".py" or not path.is_file():
        raise ModelNotFoundError(f"no Python file {str(path)!r}; a model is {FORMS}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    make = getattr(module, what, None)
    if not callable(make):
        raise ModelNotFoundError(f"{path} has no function {what!r}")
    model = make()
    if not isinstance(model, nn.Module):
        raise ModelNotFoundError(f"{what}() of {path} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def check(
    name: str, *, train: bool = False, size: int = 224, batch: int = 4, device: Any = "cpu", autocast: Any = None
) -> int:
    """Fuse a model, print what was fused, and hold it against itself unfused. 0 where parity holds, else 1."""
    torch.manual_seed(0)
    model = load(name).to(device)
    print(fuse(model))
    convs = (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    first = next(convs, None)
    if first is None:
        raise ModelNotFoundError(f"{name} has no convolution, so there is no image to give it")
    frames = (8,) if isinstance(first, nn.Conv3d) else ()
    x = torch.randn(batch, first.in_channels, *frames, size, size, device=device)
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        try:
            print(verify(model, x, train=train))
        except ParityError as error:
            print(error)
            return 1
    return 0
