"""Files that a command writes: checked before the work, and whole or not at all."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from . import RequestError

PICTURES = (".png", ".svg", ".pdf", ".jpg")


class Outputs(NamedTuple):
    json: Path | None
    plot: Path | None


def writable(option: str, path: Path) -> Path:
    """The path with links followed.

    Raises:
        RequestError: nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise RequestError(f"{option} {path} is a directory")
    if path.exists() and not path.is_file():
        raise RequestError(f"{option} {path} is not a regular file")
    probe = _beside(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(f"{option} {path} cannot be written: {error.strerror}") from error
    return path


def need_matplotlib(what: str) -> None:
    """Raises `RequestError` where it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"{what} needs matplotlib, which is not installed: pip install 'fused_resnet[bench]'")


def check(json: Path | None, plot: Path | None) -> Outputs:
    """Both paths, known to be writable.

    Raises:
        RequestError: one is not, is no kind of picture, or matplotlib is missing.
    """
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise RequestError(f"--plot {plot} must end in one of {', '.join(PICTURES)}")
        need_matplotlib("--plot")
    checked = Outputs(json and writable("--json", json), plot and writable("--plot", plot))
    if checked.json is not None and checked.json == checked.plot:
        raise RequestError(f"--json and --plot name the same file, {checked.json}")
    return checked


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path` and rename it.

    Raises:
        RequestError: it cannot be written any more.
    """
    temporary = _beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
