"""What is compiled of bn_act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from aot import Case
from harness import DTYPES
from torch import Tensor

from fused_resnet.backends.triton import bn_act, configs

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
PASSES = (bn_act.STATISTICS, bn_act.APPLY, bn_act.BACKWARD_REDUCE, bn_act.BACKWARD_APPLY)


def everything(x: Tensor, residual: bool, second: bool, activation: str | None, momentum: float | Tensor) -> Any:
    """A call that launches every kernel once, forward and backward."""
    v = torch.empty(x.shape[1])
    if second:
        bn_act.bn_bn_act_train_forward(x, v, v, v, v, momentum, 1e-5, x, v, v, v, v, momentum, 1e-5, activation)
        return bn_act.bn_bn_act_backward(x, x, v, v, v, v, 1e-5, x, v, v, v, v, 1e-5, activation)
    shortcut = x if residual else None
    bn_act.bn_act_train_forward(x, v, v, v, v, shortcut, momentum, 1e-5, activation)
    out = x if residual and activation else None
    return bn_act.bn_act_backward(x, x, out, v, v, v, v, 1e-5, activation, True, residual)


def frozen(x: Tensor) -> Any:
    """Given statistics, without gamma and beta."""
    v = torch.empty(x.shape[1])
    bn_act.bn_act_eval_forward(x, None, None, v, v, None, 1e-5, "relu")
    return bn_act.bn_act_backward(x, x, None, None, None, v, v, 1e-5, "relu", False, False)


def cases(full: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for layout in FORMATS if full else ("nhwc",):
            x = torch.empty((2, 64, 56, 56), dtype=dtype, memory_format=FORMATS[layout])
            name = f"{str(dtype)[6:]}-{layout}"
            vector = tuple(f"{kernel}_kernel" for kernel in PASSES)
            variants = {
                "residual": lambda x=x: everything(x, True, False, "relu", 0.1),
                "second-bn": lambda x=x: everything(x, False, True, "relu", 0.1),
            }
            if full and layout == "nhwc" and dtype != torch.float16:
                variants |= {
                    "plain": lambda x=x: everything(x, False, False, "relu", torch.tensor(0.1)),
                    "linear": lambda x=x: everything(x, True, False, None, 0.1),
                    "frozen": lambda x=x: frozen(x),
                }
            for variant, call in variants.items():
                yield Case(f"{name}-{variant}", call, vector=vector)
            if not full or dtype == torch.float16:  # the same tiles as bfloat16
                continue
            key = (layout == "nhwc", x.element_size(), x.shape[1])
            tuned = {kernel: configs.candidates(kernel, key, configs.target(x))[1:] for kernel in PASSES}
            for index in range(max(map(len, tuned.values()))):
                config = {kernel: found[index % len(found)] for kernel, found in tuned.items()}
                yield Case(f"{name}-second-bn-{index}", variants["second-bn"], config)  # what needs most registers
        if full and dtype != torch.float16:
            odd = torch.empty((2, 67, 7, 7), dtype=dtype, memory_format=torch.channels_last)
            yield Case(f"{str(dtype)[6:]}-67", lambda x=odd: everything(x, True, False, "relu", 0.1))
        if full and dtype == torch.bfloat16:
            one = torch.empty((2, 1, 1, 1), dtype=dtype)  # arguments that are 1 are constants for the compiler
            yield Case("1", lambda x=one: everything(x, True, False, "relu", 0.1))
            wide = torch.empty((2, 2048, 7, 7), dtype=dtype, memory_format=torch.channels_last)
            yield Case("2048", lambda x=wide: everything(x, True, False, "relu", 0.1), vector=vector)
