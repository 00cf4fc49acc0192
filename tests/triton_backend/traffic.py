"""Bytes that the elementwise kernels move for ResNet-50, against the counting rules of fused training.

    python tests/triton_backend/traffic.py [--batch 256]

prints them per call: unique bytes (each once per launch), and issued ones (as often as programs ask for them; caches
serve the difference). Nothing is computed: launches are only looked at, with tensors that have no storage.
`interpret_traffic.py` holds this model against what kernels really access.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from fused_resnet.backends.triton import add_relu, bn_act, bn_act_pool, configs, runtime  # noqa: E402

EPS = 1e-5


class Bytes(NamedTuple):
    """Of one launch: argument -> bytes touched."""

    kernel: str
    unique: dict[str, int]
    issued: dict[str, int]


def _factor(kernel: str, name: str, size: dict[str, int]) -> float:
    """How often an element of an activation is asked for: once, except where windows overlap."""
    if kernel == "bn_pool_apply_kernel" and name == "x":
        taps = [3 * out - 1 - extent % 2 for out, extent in ((size["P"], size["H"]), (size["Q"], size["W"]))]
        return taps[0] * taps[1] / (size["H"] * size["W"])
    if kernel.startswith("bn_pool_backward") and name in ("grad", "offsets"):
        return (2 * size["P"] - 1) * (2 * size["Q"] - 1) / (size["P"] * size["Q"])
    return 1.0


def launched(call: Callable[[], Any]) -> list[Bytes]:
    """What each launch of a call touches: every element of its tensors once; per-channel vectors again by each part."""
    found: list[Bytes] = []

    def launcher(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        name = kernel.__name__
        named = dict(zip(kernel.arg_names, args, strict=False))
        sizes = {key: value for key, value in named.items() if isinstance(value, int)}
        tensors = {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}
        unique = {
            key: t.nbytes * (2 if key.startswith("running") else 1) for key, t in tensors.items()
        }  # read, written
        issued = dict(unique)
        for key, tensor in tensors.items():
            if tensor.dim() == 4:
                issued[key] = round(tensor.nbytes * _factor(name, key, sizes))
            elif tensor.dim() == 1 and "finish" not in name:
                issued[key] *= grid[0]
        found.append(Bytes(name, unique, issued))

    before, runtime.launcher = runtime.launcher, launcher
    try:
        call()
    finally:
        runtime.launcher = before
    return found


class Call(NamedTuple):
    """A call in ResNet-50, and its traffic by the counting rules, in bytes of activations."""

    name: str
    run: Callable[[], Any]
    rule: float


def vectors(x: Tensor) -> list[Tensor]:
    """gamma, beta and two statistics."""
    return [torch.ones(x.shape[1], device=x.device) for _ in range(4)]


def stem_calls(x: Tensor) -> Iterator[Call]:
    """X + (X + P) forward, (X + P) + (2X + P) backward, P being the pooled values and one byte beside each."""
    shape = (*x.shape[:2], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    pooled = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    offsets = torch.zeros_like(pooled, dtype=torch.uint8)
    window = pooled.nbytes + offsets.nbytes
    yield Call(
        "stem forward",
        lambda: bn_act_pool.bn_act_pool_train_forward(x, *vectors(x), 0.1, EPS, "relu", True),
        2 * x.nbytes + window,
    )
    yield Call(
        "stem backward",
        lambda: bn_act_pool.bn_act_pool_backward(pooled, offsets, x, *vectors(x), EPS, "relu", True),
        3 * x.nbytes + 2 * window,
    )


def middle_calls(y: Tensor) -> Iterator[Call]:
    """BN + ReLU after a conv: 3O forward (statistics; read, write), 2O + 3O backward (reduce; apply)."""
    g = torch.zeros_like(y)
    yield Call("forward", lambda: bn_act.bn_act_train_forward(y, *vectors(y), None, 0.1, EPS, "relu"), 3 * y.nbytes)
    yield Call(
        "backward",
        lambda: bn_act.bn_act_backward(g, y, None, *vectors(y), EPS, "relu", True, False),
        5 * y.nbytes,
    )


def end_calls(y: Tensor) -> Iterator[Call]:
    """A block's end: 4O with the shortcut forward, 4O + 3O backward (the first pass stores the masked gradient).

    A projection block's end, both BNs at once: 5O, and 3O + 5O (each pass masks for itself). add_relu: 3O each way.
    """
    a, b, c = (torch.zeros_like(y) for _ in range(3))
    bn, running = [(*vectors(y), EPS) for _ in range(2)], [(*vectors(y), 0.1, EPS) for _ in range(2)]
    calls: list[tuple[str, Callable[[], Any], int]] = [
        ("end forward", lambda: bn_act.bn_act_train_forward(y, *vectors(y), a, 0.1, EPS, "relu"), 4),
        ("end backward", lambda: bn_act.bn_act_backward(a, y, b, *vectors(y), EPS, "relu", True, True), 7),
        ("projection end forward", lambda: bn_act.bn_bn_act_train_forward(y, *running[0], a, *running[1], "relu"), 5),
        ("projection end backward", lambda: bn_act.bn_bn_act_backward(b, y, *bn[0], a, *bn[1], "relu"), 8),
        ("add_relu forward", lambda: add_relu.add_relu_forward(y, c), 3),
        ("add_relu backward", lambda: add_relu.add_relu_backward(y, c), 3),
    ]
    for name, run, rule in calls:
        yield Call(name, run, rule * y.nbytes)


def resnet50(batch: int = 256, dtype: torch.dtype = torch.bfloat16) -> Iterator[Call]:
    """The distinct elementwise calls of its training step at 224 x 224, on tensors without storage."""

    def empty(channels: int, pixels: int) -> Tensor:
        shape = (batch, channels, pixels, pixels)
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    yield from stem_calls(empty(64, 112))
    for stage, (width, pixels) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), 1):
        groups = {"conv2": middle_calls(empty(width, pixels)), "": end_calls(empty(4 * width, pixels))}
        if stage > 1:  # the first block's conv1 still sees the larger image
            groups["first conv1"] = middle_calls(empty(width, 2 * pixels))
        for name, calls in groups.items():
            for call in calls:
                yield call._replace(name=" ".join(f"stage {stage} {name} {call.name}".split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    batch = parser.parse_args().batch
    configs.assume("sm_90")
    print(f"{'call':32} {'rule MB':>9} {'unique':>8} {'issued':>8}   (batch {batch}, bfloat16, NHWC)")
    for call in resnet50(batch):
        launches = launched(call.run)
        unique, issued = (sum(sum(getattr(b, kind).values()) for b in launches) for kind in ("unique", "issued"))
        print(f"{call.name:32} {call.rule / 1e6:9.1f} {unique / call.rule:8.3f} {issued / call.rule:8.3f}")


if __name__ == "__main__":
    main()
