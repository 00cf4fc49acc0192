"""How a kernel is started. Every launch of this package goes through `launch`, which tests replace to look at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    kernel[grid](*args, **meta)


launcher: Callable[..., None] = _launch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes microseconds


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **meta: Any) -> None:
    """kernel[grid](x, *args, **meta) on x's device and its current stream. `meta`: constexprs and launch options."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            launcher(kernel, grid, x, *args, **meta)
    else:
        launcher(kernel, grid, x, *args, **meta)
