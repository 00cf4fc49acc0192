"""What the ops share: argument checks, one clear sentence each; memory layouts; autocast; the path of a call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ACTIVATIONS = ("relu", None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def check_activation(op: str, activation: Any) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be 'relu' or None, got {activation!r}")


def check_input(op: str, name: str, x: Any, like: Tensor | None = None, *, any_dtype: bool = False) -> None:
    """x is a strided floating-point tensor; on the device and (unless any will do) of the dtype of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {x.layout}")
    if like is not None:
        if x.device != like.device:
            raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device} as the input")
        if x.dtype != like.dtype and not any_dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected {like.dtype} as the input (no type promotion)")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def check_channels(op: str, x: Tensor, channels: int, vectors: Iterable[tuple[str, Any]]) -> None:
    """Per-channel vectors: shape (C,), x's device, and x's dtype or (for 16-bit x) float32."""
    for name, vector in vectors:
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor or None, got {type(vector).__name__}")
        check_shape(op, name, vector, (channels,))
        if vector.device != x.device:
            raise ValueError(f"{op}: {name} is on {vector.device}, expected {x.device} as the input")
        if vector.dtype != x.dtype and not (vector.dtype == torch.float32 and x.dtype.itemsize == 2):
            raise TypeError(f"{op}: {name} is {vector.dtype}, expected {x.dtype} (or float32 beside a 16-bit input)")


def check_momentum(op: str, momentum: Any, x: Tensor) -> None:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.device != x.device:
            got = f"shape {tuple(momentum.shape)} on {momentum.device}"
            raise ValueError(f"{op}: momentum must be a float or a 0-d tensor on {x.device}, got {got}")
    elif not isinstance(momentum, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: momentum must be a float or a 0-d tensor, got {type(momentum).__name__}")


def check_batch_statistics(shape: Sequence[int], eps: float, merged: bool = False) -> None:
    """A tensor of the shape can be normalised with its own statistics, or with those `merged` over processes. In
    torch's own sentences."""
    if not merged and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least `least`, as a pair."""
    two = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(two) != 2 or not all(isinstance(v, (int, torch.SymInt)) and v >= least for v in two):
        raise ValueError(f"{op}: {name} must be an int >= {least} or a pair of them, got {value!r}")
    return two


def conv_extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """What a convolution makes of a height or a width; below 1 where the kernel does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_output_shape(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """(N, K, H', W') of a 2-d convolution; a size below 1 means that the kernel does not fit."""
    height, width = map(conv_extent, x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.shape[0], weight.shape[0], height, width


def is_stem_pool(pool: nn.MaxPool2d) -> bool:
    """Whether it is max_pool2d(x, 3, 2, 1), as after a ResNet's first conv."""
    given = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    usual = all(value in (number, (number, number)) for value, number in zip(given, (3, 2, 1, 1), strict=True))
    return usual and not pool.ceil_mode and not pool.return_indices


def is_channels_last(x: Tensor) -> bool:
    """NHWC (NDHWC) in memory, and not at the same time NCHW-contiguous."""
    if x.is_contiguous():
        return False
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def suggests_channels_last(x: Tensor) -> bool:
    """Whether a convolution of torch takes the 4-d x for channels_last: by its strides alone, those of size 1 included.

    A 1x1 weight in channels_last, for one, has the memory of an NCHW one. As c10::is_channels_last_strides_2d.
    """
    least, stride = 0, x.stride()
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * x.shape[d] if x.shape[d] > 1 else stride[d]
    return stride[1] != 0


def dense(x: Tensor) -> Tensor:
    """x itself where it is NCHW-contiguous or channels_last, else a copy in the layout its strides resemble."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    steps = [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    if x.dim() in (4, 5) and x.shape[1] > 1 and x.stride(1) == min(steps):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x.contiguous()


def as_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the strides of x, which has the same shape and is dense."""
    if t.stride() == x.stride():
        return t
    if (t.is_contiguous() and x.is_contiguous()) or (is_channels_last(t) and is_channels_last(x)):
        return t.as_strided(x.shape, x.stride())  # strides of size 1 differ: aten is slower, and rounds more, with such
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast would run a convolution of x in, or None."""
    if not is_autocast(x) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call; forward mode too, for the kernels would lose its tangents silently."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_traced(x: Tensor) -> bool:
    """Whether the call must go through registered ops: compiling, exporting, make_fx, a tensor subclass (fake, ...)."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
