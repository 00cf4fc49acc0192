"""The convolutions that the tests of conv_bias_act and conv_bn_act run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tolerances import memory_format
from torch import Tensor


def channels_last(*shape: int) -> Tensor:
    """Standard normal float32 in channels_last."""
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def guarded(n: int, c: int, h: int, w: int) -> Iterator[Tensor]:
    """(n, c, h, w) in channels_last, to be written to; asserts that nothing around it was."""
    memory = torch.full((n * c * h * w + 64,), 7.0)
    yield memory[32:-32].view(n, h, w, c).permute(0, 3, 1, 2)
    assert torch.all(torch.cat([memory[:32], memory[-32:]]) == 7)


class Conv(NamedTuple):
    """A convolution: input (n, c, h, w), weight (k, c / groups, r, s), and torch's options."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (
            self.n,
            self.k,
            (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1,
            (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1,
        )


CONVS = {
    "1x1": Conv(2, 16, 7, 5, 8, 1, 1),  # a GEMM; its weight is NCHW and channels_last at once
    "1x1 stride 2": Conv(2, 6, 7, 9, 12, 1, 1, (2, 2)),  # a projection shortcut
    "3x3": Conv(2, 8, 9, 7, 8, 3, 3, (1, 1), (1, 1)),  # keeps the shape: the residual may be the input
    "3x3 stride 2": Conv(1, 16, 9, 9, 24, 3, 3, (2, 2), (1, 1)),  # batch 1, odd size
    "7x7 stem": Conv(2, 3, 19, 17, 16, 7, 7, (2, 2), (3, 3)),  # 3 input channels
    "groups": Conv(2, 16, 6, 6, 32, 3, 3, (1, 1), (1, 1), (1, 1), 4),  # ResNeXt
    "depthwise": Conv(2, 9, 6, 5, 9, 3, 3, (1, 1), (1, 1), (1, 1), 9),
    "dilated": Conv(2, 5, 11, 12, 7, 3, 3, (1, 1), (2, 2), (2, 2)),  # replace_stride_with_dilation; odd channels
    "uneven": Conv(2, 7, 12, 9, 13, 2, 3, (3, 1), (0, 2), (1, 2)),  # height and width must not be mixed up
    "one pixel": Conv(3, 33, 3, 3, 17, 3, 3),  # the kernel is as large as the image
    "one channel": Conv(2, 1, 8, 8, 1, 3, 3, (1, 1), (1, 1)),
    "wide": Conv(1, 512, 2, 2, 260, 1, 1),  # long sums
    "wide padding": Conv(1, 2, 2, 2, 3, 1, 1, (2, 2), (2, 2)),  # outputs that see padding only
}


def make(conv: Conv, dtype: torch.dtype) -> dict[str, Tensor]:
    fan_in = conv.c // conv.groups * conv.r * conv.s
    return {
        "x": torch.randn(conv.n, conv.c, conv.h, conv.w).to(dtype),
        "weight": (torch.randn(conv.k, conv.c // conv.groups, conv.r, conv.s) / fan_in**0.5).to(dtype),
        "bias": torch.randn(conv.k).to(dtype),
        "residual": torch.randn(conv.out_shape).to(dtype),
        "grad": torch.randn(conv.out_shape).to(dtype),
    }


def options(conv: Conv) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}


def refused(backend: str, dtype: torch.dtype) -> str | None:
    """What `library` says where oneDNN has no convolution of this type on this CPU."""
    if backend != "library" or dtype == torch.float32:
        return None
    if dtype == torch.float64:
        return "oneDNN has no torch.float64 convolution"
    onednn = torch.ops.mkldnn
    has = onednn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported()
    return None if has else f"oneDNN has no {dtype} convolution"


def is_nhwc(t: Tensor) -> bool:
    return memory_format(t) == torch.channels_last
