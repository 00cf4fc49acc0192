"""`weights=` in all its forms. Nothing that holds code is ever read: files are opened with weights_only=True."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from fused_resnet.folding import FOLDED

Model = TypeVar("Model", bound=nn.Module)


def load_weights(name: str, build: Callable[[], Model], weights: Any, progress: bool) -> Model:
    """The model that `build` makes, with `weights` in it. The state dict is read and compared before it is used."""
    state = _state_dict(name, weights, progress)
    model = build()
    _compare(name, model.state_dict(), state)
    model.load_state_dict(state)
    return model


def _state_dict(name: str, weights: Any, progress: bool) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        return _unwrapped(name, weights)
    if hasattr(weights, "get_state_dict"):
        return _published(name, weights, progress)
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"{name}: weights must be None, a name, an enum member, a path, a URL or a state dict, "
            f"got {type(weights).__name__}"
        )
    text = os.fspath(weights)
    if not isinstance(text, str):
        raise TypeError(f"{name}: weights must be a path in text, got {text!r}")
    if text.lower().startswith("file://"):  # never through torch.hub, which caches by file name alone
        weights = Path(url2pathname(urlsplit(text).path))
        text = str(weights)
    if "://" in text:
        return _unwrapped(
            name,
            _safely(
                name,
                text,
                lambda: torch.hub.load_state_dict_from_url(
                    text, progress=progress, map_location="cpu", weights_only=True
                ),
            ),
        )
    path = Path(text)
    if path.is_file():
        return _unwrapped(name, _safely(name, text, lambda: torch.load(path, map_location="cpu", weights_only=True)))
    if (isinstance(weights, os.PathLike) or path.suffix or os.path.dirname(text)) and "_Weights." not in text:
        raise FileNotFoundError(f"{name}: no weights file at {text!r}")
    return _published(name, text, progress)


def _published(name: str, weights: Any, progress: bool) -> dict[str, Tensor]:
    """The state dict of a torchvision weights name or enum member, through torchvision's own loader and cache."""
    try:
        from torchvision.models import get_model_weights
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        raise ModuleNotFoundError(
            f"{name}: weights={str(weights)!r} needs torchvision, which does not import here ({error}); "
            "install fused_resnet[vision], or give a path, a URL or a state dict"
        ) from error
    enum = get_model_weights(name)
    if isinstance(weights, str):
        owner, _, member = weights.rpartition(".")
        if owner not in ("", enum.__name__) or member not in enum.__members__:
            raise ValueError(
                f"{name}: unknown weights {weights!r}; expected one of {', '.join(enum.__members__)}, a path or a URL"
            )
        weights = enum[member]
    elif not isinstance(weights, enum):
        raise ValueError(f"{name}: {weights} belong to another model; expected a member of {enum.__name__}")
    return _safely(
        name,
        str(weights),
        lambda: weights.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True),
    )


def _safely(name: str, source: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: {source!r} is refused: it holds more than tensors (or is no torch file); "
            "save a plain state dict with torch.save(model.state_dict(), path)"
        ) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # what a truncated archive gives
            raise ValueError(f"{name}: {source!r} is not a readable state dict: {error}") from error
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        raise kind(f"{name}: {source!r} cannot be read: {error}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{name}: {source!r} is not a readable state dict: {error}") from error


def _unwrapped(name: str, loaded: Any) -> dict[str, Tensor]:
    """A state dict out of a checkpoint: under "state_dict" or "model", and with DistributedDataParallel's prefix."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise ValueError(f"{name}: expected a state dict (names to tensors), got {type(loaded).__name__}")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _compare(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """One sentence about what differs; the argument to change comes first."""
    if FOLDED in state:
        raise ValueError(
            f"{name}: the weights were saved from a folded model (fused_resnet.to_plain) and have no batch norm left: "
            "give those of the model before folding"
        )
    for key, argument, axis in (("fc.weight", "num_classes", 0), ("conv1.weight", "in_channels", 1)):
        if key in state and key in expected and state[key].dim() == expected[key].dim():
            sides = state[key].shape[axis], expected[key].shape[axis]
            if sides[0] != sides[1]:
                raise ValueError(f"{name}: the weights have {argument}={sides[0]}, the model {argument}={sides[1]}")
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    for what, keys in (("lack", missing), ("have unknown", unknown), ("have other shapes:", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{name}: the weights do not fit the model: they {what} {', '.join(keys[:3])}{more}")
