"""Checkpoints that are whole or absent: written beside the old one, flushed to the disk, then renamed over it."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fused_resnet.cli import RequestError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end of the block, at once; on an error nothing does.

    Killed at any moment, either the old file is there or the new one, whole.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(state: Any, path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint, on the CPU; it holds tensors, numbers and text alone.

    Raises:
        RequestError: it cannot be read, or is none of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = (str(error) or "it is empty or cut short").splitlines()[0]
        raise RequestError(f"{path} is not a readable checkpoint: {why}") from error
    if not isinstance(state, dict) or "position" not in state:
        raise RequestError(f"{path} is no checkpoint of `fused-resnet train`")
    return state
