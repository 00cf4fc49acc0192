"""Launch configurations: which block sizes, warps and stages a kernel runs with.

A kernel registers a `Space` under its name. `pick(name, key, x)` answers, for a problem `key` (a tuple of str, int and
bool), the config tuned on this machine, else the shipped one, else the space's default. Nothing is ever timed here:
tuning is explicit, see `fused_resnet.backends.triton.tuning`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Key = tuple[str | int | bool, ...]
Config = dict[str, int]  # constexprs of the kernel, num_warps, num_stages


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
_overrides: dict[str, Config] = {}
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
        return _overrides[kernel]
    found = _picked.get((kernel, key, x.device.index))
    if found is None:
        found = _picked[kernel, key, x.device.index] = _spaces[kernel].default(target(x), key)
    return found


@contextlib.contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Use this config for every problem of a kernel, in the whole process: for tuning and tests."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before
