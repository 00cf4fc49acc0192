"""Triton kernels for GPUs.

The kernels have been interpreted on a CPU and compiled for GPUs, but not yet run on one: until that is done they count
as unverified, and are chosen automatically only where `selfcheck` passes on the device at hand.

Importing this package imports neither triton nor the kernels; the first call of a primitive does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import selfcheck

# primitive -> the module here that has it
_MODULES = {
    "add_relu_forward": "add_relu",
    "add_relu_backward": "add_relu",
    "bn_act_train_forward": "bn_act",
    "bn_act_eval_forward": "bn_act",
    "bn_act_backward": "bn_act",
    "bn_bn_act_train_forward": "bn_act",
    "bn_bn_act_backward": "bn_act",
    "bn_act_pool_train_forward": "bn_act_pool",
    "bn_act_pool_eval_forward": "bn_act_pool",
    "bn_act_pool_backward": "bn_act_pool",
    "conv_bias_act_forward": "conv",
    "conv_bn_act_forward": "conv",
    "bn_mask_backward": "prologue",
    "prologue_conv_forward": "prologue",
    "prologue_conv_grad_input": "prologue",
    "prologue_conv_grad_weight": "prologue",
    "prologue_end_backward": "prologue",
    "prologue_end_forward": "prologue",
    "prologue_moments": "prologue",
    "prologue_products": "prologue",
}
PRIMITIVES = tuple(_MODULES)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (3, 6)
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def _installed() -> str | None:
    """None where a triton that is new enough can be imported, else the reason."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:  # ROCm and XPU builds of torch name theirs otherwise
            version = importlib.import_module("triton").__version__
        except Exception:
            return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, _OLDEST))}"
    return None


def interpreted() -> bool:
    """Whether this process interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable(device_type: str) -> str | None:
    reason = _installed()
    if reason is not None:
        return reason
    if device_type == "cpu":
        return None if interpreted() else "it needs a GPU"
    if device_type != "cuda":
        return f"no kernels for device {device_type}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set"
    if not torch.cuda.is_available():
        return "no GPU is available"
    if torch.version.cuda and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return f"the GPU is older than compute capability {'.'.join(map(str, _LEAST_CAPABILITY))}"
    return None


def supports(primitive: str, x: Tensor, *args: Any) -> str | None:
    if x.dtype not in _DTYPES:
        return f"no kernels for {x.dtype}"
    module = importlib.import_module(f"{__name__}.{_MODULES[primitive]}")
    special = getattr(module, "supports", None)
    return None if special is None else special(primitive, x, *args)


_tested: dict[selfcheck.Case, str | None] = {}


def untested(op: str, x: Tensor) -> str | None:
    """None where the kernels of an op proved equal to `reference` on x's device, dtype and layout, else the reason.

    The proof is run once per process, by the first automatic choice; see `selfcheck`.
    """
    return selfcheck.untested(sys.modules[__name__], op, x, _tested)


def variants(op: str, x: Tensor) -> Iterator[AbstractContextManager[None]]:
    """In each of these contexts the kernels of an op are to prove equal as well: one per config that tuning chose for
    `prologue_tiles_kernel`, which nothing takes by default."""
    if op != "prologue":
        return
    from fused_resnet.backends.triton import configs, prologue

    def dense(alike: configs.Key, key: configs.Key) -> bool:
        return key[:2] == alike[:2] and prologue.Problem(*key).dense  # type: ignore[arg-type]

    seen: list[configs.Config] = []
    for key, config in configs.tuned(prologue.CONV, x):
        if key[0] == str(x.dtype).removeprefix("torch.") and config["PERSISTENT"] and config not in seen:
            seen.append(config)
            yield configs.override(prologue.CONV, config, functools.partial(dense, key))


def __getattr__(name: str) -> Any:
    if name not in _MODULES or _installed() is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = function
    return function
