"""Launch configurations: which block sizes, warps and stages a kernel runs with.

A kernel registers a `Space` under its name. `pick(name, key, x)` answers, for a problem `key` (a tuple of str, int and
bool), the config tuned on this machine, else the shipped one, else the space's default. Nothing is ever timed here:
tuning is explicit, see `fused_resnet.tuning`.

Tuned configs are one JSON file per device, versions and kernels' source in `cache_folder()`; shipped ones stand in
fused_resnet/data/triton_configs.json, {device: that file's content}. What cannot be read or does not fit is ignored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[str | int | bool, ...]
Config = dict[str, int]  # constexprs of the kernel, num_warps, num_stages
Table = dict[str, dict[str, Config]]  # kernel -> key as JSON -> config


class Target(NamedTuple):
    """What a config must fit: architecture, bytes of shared memory per block, multiprocessors, threads per warp."""

    arch: str
    shared: int
    multiprocessors: int
    warp: int = 32


# Shared memory that one block may have; multiprocessors of the largest part, for where there is no device to ask.
TARGETS = {
    target.arch: target
    for target in (
        Target("sm_80", 163 << 10, 108),
        Target("sm_86", 99 << 10, 84),
        Target("sm_89", 99 << 10, 128),
        Target("sm_90", 227 << 10, 132),
        Target("sm_100", 227 << 10, 148),
        Target("sm_120", 99 << 10, 188),
        Target("gfx942", 64 << 10, 304, 64),
    )
}


class Space(NamedTuple):
    """The configs of one kernel.

    Args:
        default: the config to use where nothing was tuned.
        candidates: what tuning tries.
        shared: an estimate of the bytes of shared memory; candidates over the target's limit are dropped.
    """

    default: Callable[[Target, Key], Config]
    candidates: Callable[[Target, Key], Iterable[Config]]
    shared: Callable[[Config, Key], int] = lambda config, key: 0


_spaces: dict[str, Space] = {}
_picked: dict[tuple[str, Key, int | None], Config] = {}
_targets: dict[int | None, Target] = {}
_tables: dict[int, Table] = {}
_overrides: dict[str, tuple[Config, Callable[[Key], bool]]] = {}
_assumed = "sm_90"


def register(kernel: str, space: Space) -> str:
    """Make `space` the configs of `kernel`; returns the name."""
    _spaces[kernel] = space
    return kernel


def assume(arch: str) -> None:
    """Pick for this architecture where tensors are on the CPU: interpreting, or compiling ahead of time."""
    global _assumed
    _assumed = arch
    _targets.pop(None, None)
    _picked.clear()


def target(x: Tensor) -> Target:
    """The target that x's device is."""
    index = x.device.index if x.is_cuda else None
    found = _targets.get(index)
    if found is None:
        if index is None:
            found = TARGETS[_assumed]
        else:
            device = torch.cuda.get_device_properties(index)
            arch = device.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{device.major}{device.minor}"
            shared = getattr(device, "shared_memory_per_block_optin", 0) or TARGETS["gfx942"].shared
            found = Target(arch, shared, device.multi_processor_count, device.warp_size)
        _targets[index] = found
    return found


def candidates(kernel: str, key: Key, on: Target) -> list[Config]:
    """The distinct configs worth trying on a target, the default first."""
    space = _spaces[kernel]
    found = [space.default(on, key)]
    for config in space.candidates(on, key):
        if config not in found and space.shared(config, key) <= on.shared:
            found.append(config)
    return found


def pick(kernel: str, key: Key, x: Tensor) -> Config:
    """The config for a problem on x's device; the caller must not change it."""
    if _overrides and kernel in _overrides:
        config, concerns = _overrides[kernel]
        if concerns(key):
            return config
    found = _picked.get((kernel, key, x.device.index))
    if found is None:
        default = _spaces[kernel].default(target(x), key)
        tuned = _table(x).get(kernel, {}).get(json.dumps(key)) if _is_tunable(x) else None
        found = tuned if tuned is not None and _fits(kernel, key, tuned, default, target(x)) else default
        _picked[kernel, key, x.device.index] = found
    return found


def tuned(kernel: str, x: Tensor) -> Iterator[tuple[Key, Config]]:
    """The problems of a kernel that were tuned for x's device, and their configs."""
    for text in _table(x).get(kernel, {}) if _is_tunable(x) else ():
        with contextlib.suppress(TypeError, ValueError):
            key = tuple(json.loads(text))
            yield key, pick(kernel, key, x)


def _is_tunable(x: Tensor) -> bool:
    return x.is_cuda


def _fits(kernel: str, key: Key, config: Any, default: Config, on: Target) -> bool:
    return (
        isinstance(config, dict)
        and config.keys() == default.keys()
        and all(type(value) is int and (value > 0 or value == default[name]) for name, value in config.items())
        and _spaces[kernel].shared(config, key) <= on.shared
    )


@contextlib.contextmanager
def override(kernel: str, config: Config, concerns: Callable[[Key], bool] = lambda key: True) -> Iterator[None]:
    """Use this config for every problem that it concerns, in the whole process: for tuning, self-checks and tests."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config, concerns
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


# Tuned configs on disk


def cache_folder() -> Path:
    """FUSED_RESNET_CACHE, else fused_resnet in XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FUSED_RESNET_CACHE") or Path(base, "fused_resnet"))


@functools.cache
def source() -> dict[str, str]:
    """What a measurement depends on besides the device: the kernels' source and versions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # ROCm and XPU builds of torch name theirs otherwise
        version = "unknown"
    return {"kernels": digest.hexdigest()[:16], "triton": version, "torch": torch.__version__}


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else f"cpu, {_assumed}"


def cache_file(x: Tensor) -> Path:
    name = re.sub(r"\W+", "-", _device_name(x))
    digest = hashlib.sha256(json.dumps(source(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"triton-{name}-{digest}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _checked(content: Any, of: tuple[str, ...] = ("kernels", "triton", "torch")) -> Table:
    """The table of a file's content, empty where that is something else or not of the same kernels (and versions)."""
    found = content.get("source") if isinstance(content, dict) else None
    if not isinstance(found, dict) or any(found.get(name) != source()[name] for name in of):
        return {}
    table = content.get("configs")
    if not isinstance(table, dict) or not all(isinstance(of_kernel, dict) for of_kernel in table.values()):
        return {}
    return table


def _table(x: Tensor) -> Table:
    """What was tuned for x's device: shipped, then the user's."""
    index = x.device.index
    if index not in _tables:
        shipped = _read(Path(__file__).parents[2] / "data" / "triton_configs.json")
        table = _checked(shipped.get(_device_name(x)) if isinstance(shipped, dict) else None, of=("kernels",))
        for kernel, configs in _checked(_read(cache_file(x))).items():
            table[kernel] = table.get(kernel, {}) | configs
        _tables[index] = table
    return _tables[index]


def store(x: Tensor, kernel: str, key: Key, config: Config) -> None:
    """Keep a tuned config for x's device. Of two processes that write at once the last wins; no file is half done."""
    path = cache_file(x)
    table = _checked(_read(path))
    table.setdefault(kernel, {})[json.dumps(key)] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"device": _device_name(x), "source": source(), "configs": table}, file, indent=1)
    os.replace(file.name, path)
    _tables.pop(x.device.index, None)
    _picked.clear()
