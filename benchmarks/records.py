"""Measured numbers in long format: one a row, with what was measured, where and on which versions.

A file is written anew, whole or not at all, after each case: an interrupted run keeps what it has, and the next run
with the same code on the same machine goes on from there.
"""

from __future__ import annotations

import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fused_resnet import cli
from fused_resnet._version import __version__

from . import RequestError, files

KEY = ("suite", "subject", "case", "direction", "dtype", "batch", "rival", "metric")
VALUE = ("value", "low", "high", "runs", "note")
PLACE = ("device", "driver", "torch", "cuda", "cudnn", "triton", "fused_resnet", "commit")
COLUMNS = (*KEY, *VALUE, *PLACE, "date")
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """The last commit that changed the measured code; uncommitted changes to it as "+" and a hash of them."""
    code = (":/fused_resnet", ":/csrc")
    found = _output("git", "log", "-1", "--format=%h", "--", *code)
    changes = _output("git", "diff", "HEAD", "--", *code)
    return f"{found}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if found and changes else found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cli._cpu_name()}, {torch.get_num_threads()} threads"


def folder(device: torch.device) -> Path:
    """Where results of a device are kept: results/cpu, results/nvidia-h100-80gb-hbm3, ..."""
    name = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
    return RESULTS / name


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def place(device: torch.device) -> Row:
    """The columns that say where and with what a number was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else "",
        "triton": version("triton"),
        "fused_resnet": __version__,
        "commit": commit(),
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a file, every value as text.

    Raises:
        RequestError: it is no such file.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix != ".json" else json.load(file)
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    if rows and (
        not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(COLUMNS) for row in rows)
    ):
        raise RequestError(f"{path} holds no results: expected the columns {', '.join(COLUMNS)}")
    return rows


class Store:
    """The rows of one file (.csv or .json) for one device.

    Args:
        path: the file; what it holds is kept, and replaced key by key.
        device: the device measured on.
        fresh: measure anew what is there already.
    """

    def __init__(self, path: Path, device: torch.device, fresh: bool = False) -> None:
        if path.suffix not in (".csv", ".json"):
            raise RequestError(f"{path} must end in .csv or .json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{path.parent} cannot be made: {error.strerror}") from error
        self.path = files.writable("the results file", path)
        self.place = {name: _text(value) for name, value in place(device).items()}
        self.rows = {tuple(row[name] for name in KEY): row for row in (read(path) if path.exists() else ())}
        self._fresh, self._new = fresh, set[tuple[str, ...]]()

    def has(self, **key: Any) -> bool:
        """Whether all columns named in `key` were measured already by this code on this machine."""
        wanted = {name: _text(value) for name, value in key.items()}
        return any(
            wanted.items() <= row.items()
            and (identity in self._new if self._fresh else self.place.items() <= row.items())
            for identity, row in self.rows.items()
        )

    def put(self, rows: Iterable[Row]) -> None:
        """Add rows, or replace those of the same key, and write the file."""
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
        for row in rows:
            full = dict.fromkeys(COLUMNS, "") | {name: _text(value) for name, value in row.items()} | self.place
            full["date"] = date
            identity = tuple(full[name] for name in KEY)
            self.rows[identity] = full
            self._new.add(identity)
        files.write(self.path, self._content().encode())

    def drop(self, **key: Any) -> None:
        """Forget what stands under these columns, before it is measured again."""
        wanted = {name: _text(value) for name, value in key.items()}
        self.rows = {i: row for i, row in self.rows.items() if not wanted.items() <= row.items()}

    def _content(self) -> str:
        if self.path.suffix == ".json":
            return json.dumps(list(self.rows.values()), indent=1) + "\n"
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        return buffer.getvalue()
