"""16-bit convolutions on CPUs that have no instructions for them.

torch runs such convolutions there, several times slower than in float32: oneDNN emulates bfloat16, and float16 has a
plain loop. The automatic choice computes them in float32 instead and rounds once, so no result is less exact.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends.cpp import converted

PRIMITIVES = ("conv_forward", "conv_backward", "conv_bias_act_forward", "conv_bn_act_forward")
DTYPES = (torch.bfloat16, torch.float16)


def emulates(dtype: torch.dtype, device_type: str) -> bool:
    """Whether torch's convolutions of the dtype are emulated on this machine's CPU."""
    return device_type == "cpu" and dtype in DTYPES and not _has_instructions(dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known, so that torch decides
    if dtype is torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if torch.cpu._is_avx512_supported():
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def wide(value: Any) -> Any:
    """A 16-bit tensor in float32; all else as it is."""
    return converted(value, torch.float32) if isinstance(value, Tensor) and value.dtype in DTYPES else value


def stand_in(value: Any) -> Any:
    """What a choice sees of `wide(value)`: its shape, strides and dtype."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)


def narrow(result: Any, dtype: torch.dtype) -> Any:
    """A tensor, or several and None, in the dtype."""
    if isinstance(result, tuple):
        return tuple(narrow(each, dtype) for each in result)
    return None if result is None else converted(result, dtype)


def widened(choice: Any) -> Any:
    """A `dispatch.Choice` for float32 as one for 16 bits. Its functions take x in float32 too, and then return that:
    between calls that follow each other nothing need be rounded."""

    def in_float32(function: Any) -> Any:
        if function is None:
            return None
        return lambda x, *args: narrow(function(wide(x), *map(wide, args)), x.dtype)

    pack, relu_pool = choice.pack, choice.relu_pool

    def make(x: Tensor, *args: Any) -> Any:
        run = relu_pool(stand_in(x), *map(wide, args))
        return None if run is None else lambda x: narrow(run(wide(x)), x.dtype)

    return choice._replace(
        function=in_float32(choice.function),
        onto_residual=in_float32(choice.onto_residual),
        pack=None if pack is None else lambda weight, *args: pack(wide(weight), *args),
        relu_pool=None if relu_pool is None else make,
    )
