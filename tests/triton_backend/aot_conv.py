"""What is compiled of conv_bias_act and conv_bn_act: the convolutions of ResNet-50 and ResNeXt at batch 64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from aot import Case
from torch import Tensor

from fused_resnet.backends.triton import configs, conv

BATCH = 64
# name: (C, H, K, kernel size, stride, padding, groups)
LAYERS = {
    "1x1-narrow": (256, 56, 64, 1, 1, 0, 1),
    "1x1-widen": (64, 56, 256, 1, 1, 0, 1),
    "1x1-projection": (256, 56, 512, 1, 2, 0, 1),
    "3x3": (64, 56, 64, 3, 1, 1, 1),
    "3x3-wide": (256, 14, 256, 3, 1, 1, 1),
    "3x3-stride": (128, 56, 128, 3, 2, 1, 1),
    "3x3-ragged": (72, 28, 100, 3, 1, 1, 1),
    "stem": (3, 224, 64, 7, 2, 3, 1),
    "groups-of-4": (128, 56, 128, 3, 1, 1, 32),
    "groups-of-32": (1024, 14, 1024, 3, 1, 1, 32),
    "groups-of-72": (144, 14, 144, 3, 1, 1, 2),
}
QUICK = (
    ("1x1-narrow", torch.float16),
    ("3x3", torch.bfloat16),
    ("3x3", torch.float32),
    ("stem", torch.bfloat16),
    ("groups-of-4", torch.bfloat16),
)


def call(layer: str, dtype: torch.dtype, batch: int = BATCH, *, folded: bool = False) -> Callable[[], Tensor]:
    """The layer with BN and a residual, or (folded) with a bias alone."""
    C, size, K, taps, stride, padding, groups = LAYERS[layer]
    out = (size + 2 * padding - taps) // stride + 1

    def run() -> Tensor:
        def images(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

        x, weight = images(batch, C, size, size), images(K, C // groups, taps, taps)
        vector, options = torch.empty(K), ((stride,) * 2, (padding,) * 2, (1, 1), groups)
        if folded:
            return conv.conv_bias_act_forward(x, weight, vector.to(dtype), None, *options, "relu")
        residual = images(batch, K, out, out)
        vectors = (vector,) * 4
        return conv.conv_bn_act_forward(x, weight, None, *vectors, residual, *options, 1e-5, "relu")

    return run


def problem(layer: str, dtype: torch.dtype, precision: str, batch: int = BATCH) -> conv.Problem:
    C, size, K, taps, stride, padding, groups = LAYERS[layer]
    rows = batch * ((size + 2 * padding - taps) // stride + 1) ** 2
    rows = conv.power_of_two(rows)
    return conv.Problem(str(dtype).removeprefix("torch."), precision, taps * taps, stride, C, K, groups, rows)


def cases(full: bool) -> Iterator[Case]:
    dots, vector, merge = ("conv_kernel",), ("conv_kernel",), ("conv_merge_kernel",)
    for layer, dtype in QUICK:
        yield Case(f"{layer}-{dtype}", call(layer, dtype), dot=dots, vector=() if layer == "stem" else vector)
    yield Case("3x3-wide-one-image", call("3x3-wide", torch.bfloat16, 1), dot=dots, vector=vector + merge)
    yield Case("3x3-ieee", ieee(call("3x3", torch.float32)), vector=vector)
    if not full:
        return
    yield Case("1x1-ieee", ieee(call("1x1-widen", torch.float32)), vector=vector)
    yield Case("1x1-wide-offsets", wide(call("1x1-projection", torch.bfloat16)), dot=dots, vector=vector)
    yield Case("3x3-wide-offsets", wide(call("3x3", torch.bfloat16)), dot=dots, vector=vector)
    for layer in LAYERS:
        case = Case(f"{layer}-bias", call(layer, torch.float16, folded=True), dot=dots)
        case.vector = () if layer in ("stem", "3x3-ragged") else vector
        yield case
    for layer in ("1x1-widen", "1x1-projection", "3x3", "3x3-stride", "stem", "groups-of-4"):
        yield Case(f"{layer}-one-image", call(layer, torch.float32, 1), dot=dots)
    for layer, dtype, precision, batch in (
        ("1x1-projection", torch.bfloat16, "ieee", BATCH),
        ("3x3-wide", torch.bfloat16, "ieee", BATCH),
        ("3x3-wide", torch.bfloat16, "ieee", 1),
        ("3x3-stride", torch.float32, "tf32", BATCH),
        ("3x3", torch.float32, "ieee", BATCH),
        ("groups-of-4", torch.bfloat16, "ieee", BATCH),
    ):
        prepare = ieee if dtype == torch.float32 and precision == "ieee" else lambda run: run
        key = problem(layer, dtype, precision, batch)
        for index, config in enumerate(configs.candidates(conv.CONV, key, configs.target(torch.empty(0)))):
            yield Case(
                f"{layer}-{dtype}-{precision}-{batch}-{index}",
                prepare(call(layer, dtype, batch)),
                {conv.CONV: config},
                dot=() if key.exact else dots,
                vector=vector,
            )


def ieee(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call with torch's TF32 switch off."""

    def switched() -> Tensor:
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            return run()
        finally:
            torch.backends.cudnn.conv.fp32_precision = before

    return switched


def wide(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call with 64-bit offsets."""

    def widened() -> Tensor:
        before, conv.WIDE_FROM = conv.WIDE_FROM, 0
        try:
            return run()
        finally:
            conv.WIDE_FROM = before

    return widened
