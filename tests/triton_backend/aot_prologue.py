"""What is compiled of the convolutions with prologues: the bottlenecks of ResNet-50 and basic blocks at batch 64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from aot import Case
from aot_conv import ieee, wide
from torch import Tensor

from fused_resnet.backends.triton import configs, conv, prologue

BATCH = 64
CONV, PRODUCTS = "prologue_conv_kernel", "prologue_products_kernel"
MERGE, GATHER, TILES = "prologue_merge_kernel", "prologue_gather_kernel", "prologue_tiles_kernel"
# name: (C, H, K, kernel size, stride)
LAYERS = {
    "1x1-narrow": (256, 56, 64, 1, 1),
    "1x1-widen": (64, 56, 256, 1, 1),
    "1x1-projection": (256, 56, 512, 1, 2),
    "1x1-deep": (512, 7, 2048, 1, 1),
    "3x3": (64, 56, 64, 3, 1),
    "3x3-wide": (256, 14, 256, 3, 1),
    "3x3-stride": (128, 56, 128, 3, 2),
    "3x3-ragged": (72, 28, 100, 3, 1),
}


def images(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def bn(channels: int) -> tuple[Any, ...]:
    return *(torch.empty(channels) for _ in range(4)), 1e-5


def call(what: str, layer: str, dtype: torch.dtype, batch: int = BATCH) -> Callable[[], Any]:
    """One primitive; "first": its input is the block's, read without a BN."""
    C, size, K, taps, stride = LAYERS[layer]
    out, geometry = (size - 1) // stride + 1, ((stride,) * 2, (taps // 2,) * 2, (1, 1))

    def run() -> Any:
        x, y, g = (
            images(dtype, batch, C, size, size),
            images(dtype, batch, K, out, out),
            images(dtype, batch, K, out, out),
        )
        weight, inner = images(dtype, K, C, taps, taps), None if "first" in what else bn(C)
        gradient = (y, bn(K), (torch.empty(K), torch.empty(K)))
        name = what.split(",")[0]
        if name == "forward":
            return prologue.prologue_conv_forward(x, inner, weight, *geometry, True, None, None, 0.1)
        if name == "grad_input":
            add = torch.empty_like(x) if inner is None else None
            return prologue.prologue_conv_grad_input(g, *gradient, weight, x, inner, add, *geometry)
        if name == "grad_weight":
            return prologue.prologue_conv_grad_weight(g, *gradient, x, inner, (taps, taps), *geometry)
        if name == "moments":
            return prologue.prologue_moments(x, inner, (stride,) * 2)
        if name == "products":
            return prologue.prologue_products(g, x, inner, (stride,) * 2)
        if name == "end":
            x2, weight2, residual = None, None, y
            if "projected" in what:
                x2, weight2 = images(dtype, batch, 2 * C, 2 * out, 2 * out), images(dtype, K, 2 * C, 1, 1)
                residual = None
            args = (x2, weight2, torch.empty(K), residual, (stride,) * 2, (2, 2), "relu")
            return prologue.prologue_end_forward(x, inner, weight, *args)
        square = torch.empty((C, C), dtype=dtype)
        scaled = torch.empty((K, C), dtype=dtype)
        return prologue.prologue_end_backward(g, scaled, x, inner, square, torch.empty(C), (stride,) * 2)

    return run


def _case(
    what: str,
    layer: str,
    dtype: torch.dtype,
    suffix: str = "",
    exact: bool = False,
    batch: int = BATCH,
    **options: Any,
) -> Case:
    run = call(what, layer, dtype, batch)
    name = f"{what} {layer} {dtype}".replace("torch.", "") + suffix
    dots = () if exact else (CONV, PRODUCTS, TILES)
    return Case(name, ieee(run) if exact else run, dot=dots, only=(CONV, PRODUCTS, MERGE, GATHER, TILES), **options)


def persistent(what: str, layer: str, dtype: torch.dtype, offsets: str = "") -> Iterator[Case]:
    """A dense product with each config of `prologue_tiles_kernel`; `offsets`: "wide", or 32 bits."""
    C, size, K, _, _ = LAYERS[layer]
    back = what.startswith(("grad_input", "end_backward"))
    key = prologue.Problem(
        str(dtype).removeprefix("torch."),
        conv._precision(torch.empty(0, dtype=dtype)),
        what.startswith("grad"),
        1,
        *((C, K) if back else (K, C)),
        conv.power_of_two(BATCH * size * size),
        bool(offsets),
        True,
    )
    for index, config in enumerate(configs.candidates(prologue.CONV, key, configs.target(torch.empty(0)))):
        if config["PERSISTENT"]:
            suffix = " ".join((" persistent", *offsets.split(), str(index)))
            case = _case(what, layer, dtype, suffix, configs={prologue.CONV: config}, tma=(TILES,))
            yield dataclasses.replace(case, call=wide(case.call)) if offsets else case


QUICK = (
    ("forward", "3x3", torch.bfloat16),
    ("forward, first", "1x1-narrow", torch.float16),
    ("grad_input", "3x3", torch.bfloat16),
    ("grad_weight", "1x1-narrow", torch.bfloat16),
    ("end_backward", "1x1-widen", torch.bfloat16),
    ("moments", "1x1-widen", torch.bfloat16),
)


def cases(full: bool) -> Iterator[Case]:
    for what, layer, dtype in QUICK:
        yield _case(what, layer, dtype, vector=(CONV, GATHER) if what == "forward, first" else (GATHER,))
    yield _case("forward", "3x3-wide", torch.bfloat16, " one image", batch=1, vector=(MERGE,))
    if not full:
        yield from itertools.islice(persistent("grad_input", "1x1-narrow", torch.bfloat16), 1)
        return
    for what, layer, dtype in (
        ("forward", "1x1-widen", torch.bfloat16),
        ("forward", "1x1-widen", torch.float32),
        ("forward, first", "1x1-widen", torch.float16),
        ("grad_input", "1x1-narrow", torch.bfloat16),
        ("grad_input", "1x1-narrow", torch.float32),
        ("grad_input, first", "1x1-narrow", torch.float16),
        ("end", "1x1-widen", torch.bfloat16),
        ("end_backward", "1x1-deep", torch.bfloat16),
    ):
        yield from persistent(what, layer, dtype)
    for what, layer in (("forward", "1x1-widen"), ("grad_input", "1x1-narrow")):
        yield from persistent(what, layer, torch.bfloat16, "wide")
    for what, layer in (
        ("forward", "3x3-stride"),
        ("forward", "3x3-ragged"),
        ("grad_input", "3x3-stride"),
        ("grad_input, first", "1x1-narrow"),
        ("grad_weight", "3x3-wide"),
        ("grad_weight, first", "1x1-narrow"),
        ("end", "1x1-widen"),
        ("end, projected", "1x1-widen"),
        ("products", "1x1-widen"),
        ("products, first", "1x1-projection"),
        ("end_backward, first", "1x1-projection"),
    ):
        yield _case(what, layer, torch.bfloat16)
    for what, layer in (
        ("forward", "3x3"),
        ("grad_input", "3x3"),
        ("grad_weight", "3x3"),
        ("end_backward", "1x1-widen"),
    ):
        yield _case(what, layer, torch.float32)
        yield _case(what, layer, torch.float32, " ieee", exact=True)
    yield _case("moments", "1x1-widen", torch.float32, exact=True)
    for what, layer, dtype in (
        ("forward", "3x3-wide", torch.float32),
        ("grad_input", "3x3-wide", torch.bfloat16),
        ("grad_input, first", "1x1-deep", torch.bfloat16),
        ("end, projected", "1x1-deep", torch.bfloat16),
        ("end_backward", "1x1-deep", torch.bfloat16),
    ):
        yield _case(what, layer, dtype, " one image", batch=1, vector=(MERGE,))
    yield Case("wide offsets", wide(call("grad_input", "3x3", torch.bfloat16)), dot=(CONV,), only=(CONV,))
    for what, layer, kernel, batch in (
        ("forward", "3x3-wide", prologue.CONV, BATCH),
        ("forward", "3x3-wide", prologue.CONV, 1),
        ("grad_input", "1x1-narrow", prologue.CONV, BATCH),
        ("end_backward", "1x1-widen", prologue.CONV, BATCH),
        ("grad_weight", "1x1-narrow", prologue.PRODUCTS, BATCH),
    ):
        C, size, K, taps, _ = LAYERS[layer]
        gradient = what.startswith("grad")
        columns, inner = (C, K) if what in ("grad_input", "end_backward") or kernel == prologue.PRODUCTS else (K, C)
        rows = conv.power_of_two(batch * size * size)
        key = prologue.Problem("bfloat16", "ieee", gradient, taps * taps, columns, inner, rows, False)
        for index, config in enumerate(configs.candidates(kernel, key, configs.target(torch.empty(0)))):
            yield _case(what, layer, torch.bfloat16, f" {batch} {index}", batch=batch, configs={kernel: config})
